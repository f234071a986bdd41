#!/usr/bin/env bash
# A detector that finds every lesion and nothing else gets an FROC score of 0.75, or of 0.
#
# Versions:  monai 1.6.1, torch 2.14.1, numpy 2.4.6.
# Expected:  four of four lesions found without a false positive: sensitivity 1 at any number of
#            false positives an image, FROC score 1. The only lesion of a film found: 1.
# Seen:      four found with 0.9, 0.8, 0.7 and 0.6: 0.75, as much as when the last was missed. The only
#            lesion found: 0. Four found with 0.9 each: 0. The curve has no point at the lowest of all
#            scores, so that what was found with it counts for nothing. Where a lesion was missed the
#            lowest is the 0 that stands for it, and nothing is lost.
# Matters:   a mammogram has one lesion as a rule and test sets are small, so that the step is large;
#            it is the best detectors that lose it, and two that differ score alike.
# Source:    monai/metrics/froc.py, compute_froc_curve_data: thresholds are all scores but the first
#            (as in the evaluation code of CAMELYON16, which it comes from).
# Exits 1 where what is seen is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 monai==1.6.1 numpy==2.4.6

"$folder/venv/bin/python" - <<'PYTHON'
import sys

import monai
import numpy as np
from monai.metrics import compute_fp_tp_probs, compute_froc_curve_data, compute_froc_score

print("python", sys.version.split()[0], "monai", monai.__version__, "numpy", np.__version__)


def score(probabilities, lesions):
    """Return the FROC score of one film with lesions, the first of which are found."""
    mask = np.zeros((64, 64), int)
    for number in range(lesions):
        mask[12 * number + 5 : 12 * number + 9, 10:14] = number + 1
    rows = 12 * np.arange(len(probabilities)) + 6
    found = np.array(probabilities), rows, np.full(len(rows), 11)
    false, true, total = compute_fp_tp_probs(*found, mask, resolution_level=0)
    assert len(false) == 0 and total == lesions
    return float(compute_froc_score(*compute_froc_curve_data(false, true, total, 1)))


cases = {
    "four of four": ([0.9, 0.8, 0.7, 0.6], 4, 1.0, 0.75),
    "three of four": ([0.9, 0.8, 0.7], 4, 0.75, 0.75),
    "one of one": ([0.9], 1, 1.0, 0.0),
    "four of four, alike sure": ([0.9] * 4, 4, 1.0, 0.0),
}
same = []
for name, (probabilities, lesions, expected, described) in cases.items():
    seen = score(probabilities, lesions)
    same.append(abs(seen - described) < 1e-9)
    print(f"{name:<25} expected {expected:.2f}, seen {seen:.2f}")
sys.exit(0 if all(same) else 1)
PYTHON
