#!/usr/bin/env bash
# A decision curve recalls the women of the lowest risk: a risk factor is turned upside down.
#
# Versions:  dcurves 1.1.7, lifelines 0.30.3, pandas 2.3.3, numpy 2.4.6.
# Expected:  dca(models_to_prob=["density"], time=5, ...) turns breast density into the risk of cancer
#            within five years, as its docstring says, so that the densest breasts are recalled first.
#            Without times (binary outcome) it does.
# Seen:      with times it takes the Cox model's probability to stay free of cancer for the risk, and
#            recalls the fattiest first. Its net benefit at thresholds of 0.2, 0.3 and 0.5 is 0.26,
#            -0.03 and -0.33, to the digit that of S(t) given as a column; by 1 - S(t), the risk, it is
#            0.29, 0.25 and 0.15. A good predictor seems worse than to recall nobody.
# Remedy:    give 1 - S(t) as a column of your own, and leave models_to_prob out.
# Matters:   whether a density or a network's score of a mammogram is of use for screening intervals
#            is judged by such curves; the package is of the group that invented them.
# Source:    dcurves/risks.py, _calc_surv_risks (predict_survival_function, not 1 minus it; "risk
#            scores" in its docstring); Vickers et al., BMC Med Inform Decis Mak 8:53 (2008); in the
#            vignette of dcurves for R, "DCA for Survival Outcomes", the column given is 1 - S(t).
# Exits 1 where what is seen is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q dcurves==1.1.7 lifelines==0.30.3 pandas==2.3.3 numpy==2.4.6

"$folder/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
import pandas as pd
from dcurves import dca
from lifelines import CoxPHFitter

print("python", sys.version.split()[0], *(f"{name} {version(name)}" for name in
      ("dcurves", "lifelines", "pandas", "numpy")))
random = np.random.default_rng(0)
density = random.integers(0, 4, 2000)  # 0 fatty to 3 dense: each step brings cancer 2.5 times as soon
years = random.exponential(50 / np.exp(0.9 * density))
women = pd.DataFrame({"density": density.astype(float), "cancer": (years < 10) * 1,
                      "years": years.clip(max=10)})
cox = CoxPHFitter().fit(women, "years", "cancer")
women["free"] = cox.predict_survival_function(women[["density"]], times=5).to_numpy()[0]
women["risk"] = 1 - women["free"]

thresholds = [0.2, 0.3, 0.5]
options = {"data": women, "outcome": "cancer", "modelnames": ["density", "free", "risk"],
           "models_to_prob": ["density"], "thresholds": thresholds}
seen = {}
for name, times in {"five years": {"time": 5, "time_to_outcome_col": "years"}, "no times": {}}.items():
    table = dca(**options, **times).pivot(index="model", columns="threshold", values="net_benefit")
    seen[name] = table
    for model in ("density", "free", "risk"):
        print(f"{name:<10} net benefit of {model:<8}",
              *(f"{table.loc[model, at]:6.3f} at {at}" for at in thresholds))
timed, agree = seen["five years"], (seen["no times"].loc["density"] > 0).all()
swapped = np.allclose(timed.loc["density"], timed.loc["free"])
worse = timed[0.3]["density"] < 0 and timed[0.3]["risk"] > 0.2
print("As described." if swapped and worse and agree else "It has changed.")
sys.exit(0 if swapped and worse and agree else 1)
PYTHON
