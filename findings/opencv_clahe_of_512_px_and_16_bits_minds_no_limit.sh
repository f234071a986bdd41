#!/usr/bin/env bash
# CLAHE of a film of 12 bits, reduced to 512 x 512, is the same for every clip limit from 1 to 31.
#
# Versions:  opencv-python-headless 5.0.0.93, numpy 2.4.6.
# Expected:  clip limits of 1, 2, 4, 8 and 16 give more and more contrast, as at 8 bits; a film of 12
#            bits (0 to 4095) stays one.
# Seen:      with 8 x 8 tiles, at 8 bits, no other limit gives the picture of limit 1; in uint16 all
#            from 1 to 31 give it, byte for byte, and its brightest pixel needs 14 bits. The limit is
#            multiplied by the pixels of a tile (4,096 here) and divided by the 65,536 bins of uint16,
#            cut to a whole number, and is then 1 at least: 32 is the first that makes 2. From
#            2048 x 2048 on, with as many tiles, every whole limit counts.
# Matters:   who tunes the limit on films of the size of a network's compares equal pictures, and the
#            values of tutorials (2 to 4, made for 8 bits) do nothing.
# Source:    opencv, modules/imgproc/src/clahe.cpp, CLAHE_Impl::apply.
# Exits 1 where what is seen is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q opencv-python-headless==5.0.0.93 numpy==2.4.6

"$folder/venv/bin/python" - <<'PYTHON'
import sys

import cv2
import numpy as np

print("python", sys.version.split()[0], "opencv", cv2.__version__, "numpy", np.__version__)
y, x = np.mgrid[:512, :512]
film = 800 + 1500 * np.exp(-((x - 150) ** 2 + (y - 256) ** 2) / 60000)
film = (film + np.random.default_rng(0).normal(0, 40, film.shape)).clip(0, 4095).astype(np.uint16)
limits, kinds = (1, 2, 4, 8, 16, 31, 32, 64), {}
for name, picture in {"8 bits": (film >> 4).astype(np.uint8), "12 bits in 16": film}.items():
    made = {limit: cv2.createCLAHE(limit, (8, 8)).apply(picture) for limit in limits}
    as_one = [limit for limit in limits if (made[limit] == made[1]).all()]
    kinds[name] = as_one, int(made[1].max())
    print(f"{name:<14} brightest {picture.max()} -> {made[1].max()}; as with limit 1: {as_one}")
same = kinds["8 bits"][0] == [1] and kinds["12 bits in 16"][0] == [1, 2, 4, 8, 16, 31]
sys.exit(0 if same and film.max() <= 4095 and 8191 < kinds["12 bits in 16"][1] <= 16383 else 1)
PYTHON
