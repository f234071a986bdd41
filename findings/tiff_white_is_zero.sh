#!/usr/bin/env bash
# A TIFF whose header says WhiteIsZero is positive or negative by library, bits and flag.
#
# Versions:  Pillow 13.0.0, OpenCV 5.0.0, SimpleITK 2.5.7, imageio 2.37.2, tifffile 2026.3.3.
# Expected:  film digitisers write TIFF with PhotometricInterpretation 0 (WhiteIsZero: optical
#            density grows with the number); a reader minds it, or none does, at 8 and at 16 bits.
# Seen:      Pillow inverts at 8 bits and leaves 16 bits as they are. OpenCV does the same with
#            IMREAD_UNCHANGED, but with IMREAD_GRAYSCALE it inverts 16 bits too. SimpleITK, imageio
#            and tifffile never invert. Two copies of one film, 8 and 16 bits, read by one library,
#            are each other's negatives; so are one file read by two of them.
# Matters:   a network that was trained on films of one polarity answers on the other all the same.
# Source:    TIFF 6.0, section "PhotometricInterpretation"; Pillow, src/PIL/TiffImagePlugin.py
#            (OPEN_INFO: "L;I" for 8 bits of photometric 0, none for "I;16").
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pillow==13.0.0 opencv-python-headless==5.0.0.93 \
    simpleitk==2.5.7 imageio==2.37.2 tifffile==2026.3.3

"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys
from importlib.metadata import version
from pathlib import Path

import cv2
import imageio.v3 as imageio
import numpy as np
import SimpleITK
import tifffile
from PIL import Image

for name in ("pillow", "opencv-python-headless", "simpleitk", "imageio", "tifffile"):
    print(name, version(name))
READERS = {
    "Pillow": lambda path: np.asarray(Image.open(path)),
    "OpenCV, unchanged": lambda path: cv2.imread(path, cv2.IMREAD_UNCHANGED),
    "OpenCV, greyscale": lambda path: cv2.imread(path, cv2.IMREAD_GRAYSCALE),
    "SimpleITK": lambda path: SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(path)),
    "imageio": imageio.imread,
    "tifffile": tifffile.imread,
}
inverts = {}
for bits, dtype in ((8, "u1"), (16, "u2")):
    film = np.full((32, 32), 10, dtype)  # stored: 10 round a square of 200
    film[8:24, 8:24] = 200
    film = film * (257 if bits == 16 else 1)
    path = str(Path(sys.argv[1]) / f"film-{bits}.tif")
    tifffile.imwrite(path, film.astype(dtype), photometric="miniswhite")
    for name, read in READERS.items():
        pixels = read(path)
        inverts[name, bits] = bool(pixels[0, 0] > pixels[16, 16])
        word = "inverted" if inverts[name, bits] else "as stored"
        print(f"{bits:>2} bits: {name:<18} {pixels[0, 0]:>5} round {pixels[16, 16]:>5}, {word}")
seen = dict.fromkeys(inverts, False)
for name, bits in (("Pillow", 8), ("OpenCV, unchanged", 8), ("OpenCV, greyscale", 8)):
    seen[name, bits] = True
seen["OpenCV, greyscale", 16] = True
assert inverts == seen, f"it has changed: {inverts}"
print("As described: who inverts what hangs on the library, the bits and the flag.")
PYTHON
