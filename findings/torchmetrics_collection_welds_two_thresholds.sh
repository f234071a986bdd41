#!/usr/bin/env bash
# Two recalls at two thresholds become one in a MetricCollection, if the first batch sees no
# difference between them.
#
# Versions:  torchmetrics 1.9.0, torch 2.14.1, numpy 2.4.6.
# Expected:  a recall at 0.1 and a recall at 0.3 stay two metrics. "Compute groups" share the state of
#            metrics that count the same, such as precision and recall.
# Seen:      after the first update, metrics whose states hold equal numbers are grouped for good,
#            whatever their thresholds; reset() keeps the groups. From then on one member of a group
#            is updated, and both recalls are its: 0.75 and 0.75, where 0.75 and 0.25 are right.
# Remedy:    MetricCollection(..., compute_groups=False).
# Matters:   a network says 0.5 of everything at first, so that the first batch of validation (Lightning
#            checks two before it trains) lies on one side of all operating points. The sensitivities
#            at two of them are then one number in every epoch, and nothing warns.
# Source:    torchmetrics/collections.py, _merge_compute_groups and _equal_metric_states: states are
#            compared by name and value, arguments are not.
# Exits 1 where what is seen is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchmetrics==1.9.0 numpy==2.4.6

"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import torchmetrics
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryRecall

print("python", sys.version.split()[0], "torch", torch.__version__,
      "torchmetrics", torchmetrics.__version__)
untrained = torch.tensor([0.45, 0.50, 0.52, 0.55]), torch.tensor([1, 0, 1, 1])
trained = torch.tensor([0.05, 0.20, 0.20, 0.40]), torch.tensor([1, 1, 1, 1])


def both(**options):
    """Return both recalls of the trained network, after a batch of the untrained one."""
    metrics = {"recall_at_01": BinaryRecall(threshold=0.1)}
    metrics["recall_at_03"] = BinaryRecall(threshold=0.3)
    collection = MetricCollection(metrics, **options)
    collection.update(*untrained)
    collection.reset()
    collection.update(*trained)
    return {name: round(value.item(), 3) for name, value in sorted(collection.compute().items())}


expected, seen = both(compute_groups=False), both()
print("expected, and seen without compute groups:", expected)
print("seen as it is:                            ", seen)
right = expected == {"recall_at_01": 0.75, "recall_at_03": 0.25}
sys.exit(0 if right and set(seen.values()) == {0.75} else 1)
PYTHON
