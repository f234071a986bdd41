#!/usr/bin/env bash
# The same PGM of 12 bits holds 4,095 in one library and 65,535 in the other.
#
# Versions:  Pillow 13.0.0 and imageio 2.37.2 against OpenCV 5.0.0 and netpbmfile 2026.1.29.
# Expected:  a PGM, the format of the MIAS database and of its digitiser's raw films, has its grey
#            values stored plainly, so that every reader gives the same numbers; and a PNG made
#            of them holds these numbers too.
# Seen:      where the header's maxval is neither 255 nor 65535, Pillow (and imageio, which asks
#            Pillow) stretch the values to 65,535 without a word; OpenCV and netpbmfile leave them.
#            A threshold or a window found with one is off by 16 times with the other, and a set
#            of PNG and PGM films of one scanner lies on two scales. An 8-bit film of maxval 199
#            is stretched to 255 alike.
# Source:    Pillow, src/PIL/PpmImagePlugin.py (PpmDecoder scales by the maxval); the format's
#            specification (netpbm.sourceforge.net/doc/pgm.html) has values from 0 to maxval.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pillow==13.0.0 imageio==2.37.2 \
    opencv-python-headless==5.0.0.93 netpbmfile==2026.1.29

"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys
from importlib.metadata import version
from pathlib import Path

import cv2
import imageio.v3 as imageio
import netpbmfile
import numpy as np
from PIL import Image

for name in ("pillow", "imageio", "opencv-python-headless", "netpbmfile"):
    print(name, version(name))
READERS = {
    "Pillow": lambda path: np.asarray(Image.open(path)),
    "imageio": imageio.imread,
    "OpenCV": lambda path: cv2.imread(str(path), cv2.IMREAD_UNCHANGED),
    "netpbmfile": netpbmfile.imread,
}
found = {}
for most, dtype in ((4095, ">u2"), (199, "u1")):
    grey = np.linspace(0, most, 64 * 64).astype(int).reshape(64, 64)
    path = Path(sys.argv[1]) / f"film-{most}.pgm"
    path.write_bytes(b"P5\n64 64\n%d\n" % most + grey.astype(dtype).tobytes())
    for name, read in READERS.items():
        pixels = read(path)
        found[name, most] = int(pixels.max())
        print(f"maxval {most:>4}: {name:<10} {str(pixels.dtype):<6} up to {pixels.max()}")
stretched = {(name, most): {4095: 65535, 199: 255}[most] for name, most in found}
seen = {key: stretched[key] if key[0] in ("Pillow", "imageio") else key[1] for key in found}
assert found == seen, f"it has changed: {found}"
print("As described: two of the four stretch to the full range, two do not.")
PYTHON
