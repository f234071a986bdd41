#!/usr/bin/env bash
# pydicom 3.0.2: a VOI LUT with entries of 8 bits is looked up at the pixel's value modulo 256.
# Source: DICOM PS3.3 C.11.2.1.1 and C.8.11.3.1.5 (8 bits are allowed);
#   pydicom/pixels/processing.py, apply_voi: the index array gets the dtype of the entries.
# Exits 1 where what is seen is no longer so.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pydicom==3.0.2 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian
from pydicom.pixels import apply_voi


def film(pixels, bits, **tags):
    """Return a digital mammogram of one frame."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.2"  # for presentation
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

values = np.arange(4096, dtype=np.uint16).reshape(64, 64)  # every value of 12 bits
table = Dataset()
table.add_new("LUTDescriptor", "US", [4096, 0, 8])
table.add_new("LUTData", "US", [n >> 4 for n in range(4096)])  # a straight line to 255
shown = apply_voi(values, film(values, 12, VOILUTSequence=[table])).ravel()

print("python", sys.version.split()[0], "numpy", np.__version__, "pydicom", pydicom.__version__)
print("values       ", [0, 255, 256, 2048, 4095])
print("expected     ", [0, 15, 16, 128, 255])
print("seen         ", shown[[0, 255, 256, 2048, 4095]].tolist(), "brightest:", shown.max())
wraps = np.array_equal(shown, (np.arange(4096) % 256) >> 4) or shown.max() <= 15
print("no error, no warning; the film is black:", bool(wraps))
sys.exit(0 if wraps and shown.max() <= 15 else 1)
PYTHON
