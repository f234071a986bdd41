#!/usr/bin/env bash
# Weighted kappa of two readers falls when they agree on one film more.
#
# Versions:  scikit-learn 1.9.1, numpy 2.4.6.
# Expected:  weights count BI-RADS steps: 2 against 4 is two steps apart, whoever else was read. One
#            more film that both readers call 3 is agreement, so that kappa does not fall.
# Seen:      cohen_kappa_score counts steps between the categories that occur. While no film is a 3,
#            2 and 4 are neighbours, and kappa is 0.737 (linear) and 0.852 (quadratic). The film
#            that both call 3 puts a step between them: 0.648 and 0.724.
# Remedy:    labels=[1, 2, 3, 4, 5]: 0.640 and 0.724 before, 0.648 and 0.724 after.
# Matters:   reader studies, folds and resamples are small, and a category that is rare drops out of
#            some of them: each is then measured on a scale of its own, without a warning.
# Source:    sklearn/metrics/_classification.py, cohen_kappa_score: labels=None takes those that
#            occur, the weights come of their positions; its docstring speaks of no distance.
# Exits 1 where what is seen is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q scikit-learn==1.9.1 numpy==2.4.6

"$folder/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import sklearn
from sklearn.metrics import cohen_kappa_score

print("python", sys.version.split()[0], "scikit-learn", sklearn.__version__, "numpy", np.__version__)
same = [1, 2, 4, 5] * 5
first, second = same + [2] * 4 + [4] * 4, same + [4] * 4 + [2] * 4  # eight disagreements, no 3
seen = {}
for weights in ("linear", "quadratic"):
    for name, labels in {"as it is": None, "labels 1 to 5": [1, 2, 3, 4, 5]}.items():
        options = {"weights": weights, "labels": labels}
        before = cohen_kappa_score(first, second, **options)
        after = cohen_kappa_score([*first, 3], [*second, 3], **options)
        seen[weights, labels is None] = before, after
        print(f"{weights:<10} {name:<14} {before:.3f}, with one more film that both call 3 {after:.3f}")
falls = [after < before - 0.05 for (_, plain), (before, after) in seen.items() if plain]
keeps = [after >= before - 1e-9 for (_, plain), (before, after) in seen.items() if not plain]
sys.exit(0 if all(falls) and all(keeps) else 1)
PYTHON
