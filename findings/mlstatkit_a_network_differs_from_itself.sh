#!/usr/bin/env bash
# Two networks that rank all films alike differ "significantly" in AUC: z = 0 and p = 0.
#
# Versions:  MLstatkit 0.1.91, numpy 2.4.6, scikit-learn 1.9.1.
# Expected:  a network against its temperature-scaled self: the same AUC, so p = 1, or undefined
#            (the variance of the difference is 0).
# Seen:      Delong_test falls back to a bootstrap, whose differences are all 0, and takes twice the
#            smaller of P(difference <= 0) = 1 and P(difference > 0) = 0: p = 0, beside z = 0. Its
#            Permutation_test says 1. Where one pair of 200 films changes places, p is 0.48.
# Matters:   temperature scaling changes no rank. Who compares a network with its calibrated self, or
#            with another that ranks a small test set alike, reports p < 0.05 where nothing differs.
# Source:    MLstatkit/delong.py, bootstrap_diff ("Symmetric two-sided p"); the test itself: DeLong et
#            al., Biometrics 44 (1988), 837.
# Exits 1 where what is seen is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q MLstatkit==0.1.91 scikit-learn==1.9.1 numpy==2.4.6

TQDM_DISABLE=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
from MLstatkit import Delong_test, Permutation_test

print("python", sys.version.split()[0], *(f"{name} {version(name)}" for name in
      ("MLstatkit", "scikit-learn", "numpy")))
random = np.random.default_rng(0)
malignant = random.permutation(np.repeat([0, 1], [150, 50]))
logits = 1.2 * malignant + random.normal(size=200)


def probability(temperature):
    """Return what the network says at a temperature."""
    return 1 / (1 + np.exp(-logits / temperature))


swapped = probability(1)  # the highest normal film changes places with the malignant one below it
order = np.argsort(-swapped)
place = next(i for i in range(199) if malignant[order[i]] < malignant[order[i + 1]])
swapped[order[[place, place + 1]]] = swapped[order[[place + 1, place]]]
seen = {}
for name, other in {"itself": probability(1), "itself at temperature 2": probability(2),
                    "one pair swapped": swapped}.items():
    z, p = Delong_test(malignant, probability(1), other, return_ci=False, return_auc=False,
                       n_boot=500, random_state=0)
    witness = Permutation_test(malignant, probability(1), other, "roc_auc", n_bootstraps=200)[2]
    seen[name] = z, p, witness
    print(f"against {name:<24} z {z:.2f}  p {p:.3f}  (its permutation test: p {witness:.2f})")
same = [seen[name] == (0, 0, 1) for name in ("itself", "itself at temperature 2")]
usual = seen["one pair swapped"][1] > 0.2
print("As described." if all(same) and usual else "It has changed.")
sys.exit(0 if all(same) and usual else 1)
PYTHON
