#!/usr/bin/env bash
# SimpleITK 2.5.7: signed MONOCHROME1 films are read with 10, 14 and 16 bits stored, not with 12;
# and signed films with slope -1 and an intercept that lifts them above zero are not read at all.
# Source: DICOM PS3.3 C.7.6.3.1.2 and C.11.1.1.2 (both are allowed); the messages name
#   gdcmImageCodec.cxx and itkGDCMImageIO.cxx. pydicom reads all of them.
# Exits 1 where what is seen is no longer so.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q pydicom==3.0.2 numpy==2.4.6 SimpleITK==2.5.7
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian
import SimpleITK


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

def read(bits, **tags):
    """Return what SimpleITK says of a signed film."""
    values = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).astype(np.int16).reshape(32, -1)
    pydicom.dcmwrite("film.dcm", film(values, bits, **tags))
    assert np.array_equal(pydicom.dcmread("film.dcm").pixel_array, values)
    try:
        grey = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage("film.dcm"))
        return f"read, {grey.min()} to {grey.max()}"
    except RuntimeError as error:
        return "refused: " + str(error).strip().splitlines()[-1][-70:]


print("python", sys.version.split()[0], "numpy", np.__version__, "pydicom", pydicom.__version__,
      "SimpleITK", SimpleITK.Version.VersionString())
print("expected: all of these valid films are read")
SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
kinds = {
    "MONOCHROME2": lambda bits: {},
    "MONOCHROME1": lambda bits: {"PhotometricInterpretation": "MONOCHROME1"},
    "slope -1": lambda bits: {"RescaleSlope": -1, "RescaleIntercept": 2**bits - 1},
}
refused = {}
for kind, tags in kinds.items():
    for bits in (10, 12, 14, 16):
        seen = read(bits, **tags(bits))
        print(f"signed, {bits} bits, {kind}: {seen}")
        refused.setdefault(kind, []).extend([bits] if seen.startswith("refused") else [])
expected = {"MONOCHROME2": [], "MONOCHROME1": [12], "slope -1": [10, 12, 14]}
sys.exit(0 if refused == expected else 1)
PYTHON
