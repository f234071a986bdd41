#!/usr/bin/env bash
# The same tissue of two MONOCHROME1 films comes out 1.5 times as bright, if one film's ground is blacker.
#
# Versions:  pydicom 3.0.2, numpy 2.4.6.
# Expected:  a Presentation LUT Shape of INVERSE turns grey values about the range of their bits, or of
#            the window: 1000 of 12 bits becomes 3095 on every film.
# Seen:      apply_presentation_lut subtracts from the greatest value of the array that it is given (the
#            blackest, in MONOCHROME1): tissue of 1000 becomes 2000 on a film whose ground is 3000, and
#            3095 on one whose ground is 4095. A part of a film is shown otherwise than the whole.
# Remedy:    turn it yourself, (2 ** BitsStored - 1) - pixels, or about the window's ends.
# Matters:   mammograms are often MONOCHROME1. Their brightness then hangs on how black the ground is,
#            which differs between devices and exposures, and which a network can learn from.
# Source:    DICOM PS3.3 C.11.6; pydicom/pixels/processing.py, apply_presentation_lut (since 3.0).
# Exits 1 where what is seen is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pydicom==3.0.2 numpy==2.4.6

"$folder/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.pixels import apply_presentation_lut

print("python", sys.version.split()[0], "pydicom", pydicom.__version__, "numpy", np.__version__)
header = Dataset()
header.PhotometricInterpretation, header.PresentationLUTShape = "MONOCHROME1", "INVERSE"
header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = 16, 12, 11, 0
films = {}
for ground in (3000, 4095):
    film = np.full((64, 64), 1000, np.uint16)  # tissue
    film[:, 40:] = ground  # beside the breast, and black when it is shown
    whole, part = (apply_presentation_lut(pixels, header)[32, 8] for pixels in (film, film[:, :32]))
    films[ground] = int(whole), int(part)
    print(f"ground {ground}: tissue of 1000 is shown as {whole}, in the left half alone as {part}; "
          "expected 3095")
sys.exit(0 if films == {3000: (2000, 0), 4095: (3095, 0)} else 1)
PYTHON
