#!/usr/bin/env bash
# A detector that marks an empty corner of every film gets a sensitivity of 1 without a false positive.
#
# Versions:  coco-froc-analysis 0.2.15, numpy 1.26.4, scipy 1.17.1, Python 3.11 or 3.12.
# Expected:  a mark counts as a lesion found if its centre lies in the lesion's box (or if IoU exceeds
#            the threshold), as the package says; else it is a false positive. Marks in a corner
#            of ten films with a lesion elsewhere: sensitivity 0, one false positive a film.
# Seen:      sensitivity 1, no false positive, with either rule and for any place of the mark. The
#            Hungarian matching pairs as many marks with lesions as there are, those that do not touch
#            at a cost of 1e6, and every pair counts as found. Nothing but the number of marks counts:
#            false positives are those that a film has beyond its number of lesions.
# Matters:   its rule of the centre is that of Ribli 2018, for lesions in mammograms (its issue 3). Where
#            each film has a lesion, its FROC curve says how many marks there are, not whether right.
# Source:    coco_froc_analysis/froc/froc_stats.py, update_stats (len(row_ind) after
#            linear_sum_assignment); its README, "About"; the same doubt, refused, in its issue 13.
# Exits 1 where what is seen is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q coco-froc-analysis==0.2.15 numpy==1.26.4 scipy==1.17.1

MPLBACKEND=agg TQDM_DISABLE=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

from coco_froc_analysis.froc import generate_froc_curve

print("python", sys.version.split()[0], *(f"{name} {version(name)}" for name in
      ("coco-froc-analysis", "numpy", "scipy")))
LESION, CORNER, OTHER = [100, 100, 40, 40], [900, 900, 40, 40], [900, 20, 40, 40]  # x, y, w, h


def froc(marks, **rule):
    """Return the sensitivity and the false positives a film of ten films with one lesion each."""
    films = range(10)
    truth = {"images": [{"id": film} for film in films],
             "categories": [{"id": 1, "name": "mass"}],
             "annotations": [{"id": film, "image_id": film, "category_id": 1, "bbox": LESION}
                             for film in films]}
    made = [{"image_id": film, "category_id": 1, "bbox": box, "score": 0.9}
            for film in films for box in marks]
    found, false = generate_froc_curve(truth, made, n_sample_points=1, plot_title=None, **rule)
    return found[1][0], false[1][0]


same = []
for name, marks, expected, described in (
    ("on the lesion", [LESION], (1, 0), (1, 0)),
    ("in a corner", [CORNER], (0, 1), (1, 0)),
    ("in two corners", [CORNER, OTHER], (0, 2), (1, 1)),
):
    for rule in ({"use_iou": False}, {"use_iou": True, "iou_thres": 0.5}):
        seen = froc(marks, **rule)
        same.append(seen == described)
        print(f"{name:<14} {'IoU   ' if rule['use_iou'] else 'centre'} sensitivity, false positives "
              f"a film: expected {expected[0]}, {expected[1]}; seen {seen[0]:g}, {seen[1]:g}")
print("As described." if all(same) else "It has changed.")
sys.exit(0 if all(same) else 1)
PYTHON
