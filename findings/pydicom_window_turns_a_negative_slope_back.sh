#!/usr/bin/env bash
# pydicom 3.0.2: with a negative RescaleSlope, apply_windowing returns the negative of the film.
# Source: DICOM PS3.3 C.11.2.1.2 (the least value of the window becomes the least of the output);
#   pydicom/pixels/processing.py, apply_windowing: y_min is the output of the least stored value.
#   highdicom 0.28.2, which applies the same standard, is the witness.
#   Films with such a slope: https://github.com/OHIF/Viewers/issues/127
# Exits 1 where what is seen is no longer so.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pydicom==3.0.2 numpy==2.4.6 highdicom==0.28.2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian
import highdicom
from pydicom.pixels import apply_modality_lut, apply_windowing


def film(pixels, bits, **tags):
    """Return a computed radiograph, as plates of mammography are stored."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"  # computed radiography
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    data = FileDataset("film.dcm", {}, file_meta=meta, preamble=bytes(128))
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, "1.2.3"
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, bits, bits - 1
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    data.PixelData = pixels.tobytes()
    data["PixelData"].VR = "OW"
    for name, value in tags.items():
        setattr(data, name, value)
    return data

stored = np.arange(4096, dtype=np.uint16).reshape(64, 64)
slope = {"RescaleSlope": -1, "RescaleIntercept": 4095, "RescaleType": "US"}
data = film(stored, 12, **slope, WindowCenter=2048, WindowWidth=4096)
rescaled = apply_modality_lut(stored, data)
shown = apply_windowing(rescaled, data)  # a window as wide as the range: should change nothing
witness = highdicom.Image.from_dataset(data).get_frame(
    1, apply_voi_transform=True, voi_output_range=(0, 4095)
)

print("python", sys.version.split()[0], "numpy", np.__version__, "pydicom", pydicom.__version__,
      "highdicom", highdicom.__version__)
ends = lambda grey: np.rint(grey.ravel()[[0, 2000, 4095]]).astype(int).tolist()
print("stored             ", ends(stored))
print("after the slope    ", ends(rescaled))
print("expected, windowed ", ends(rescaled))
print("highdicom, windowed", ends(witness))
print("pydicom, windowed  ", ends(shown))
inverted = np.abs(shown - (4095 - rescaled)).max() < 2
right = np.abs(witness - rescaled).max() < 2
print("pydicom inverts:", bool(inverted), " highdicom does not:", bool(right))
sys.exit(0 if inverted and right else 1)
PYTHON
