#!/usr/bin/env bash
# highdicom 0.28.2: a mammogram's VOI LUT of 12 bits is refused as an invalid descriptor.
# Source: DICOM PS3.3 C.8.11.3.1.5 (DX, of which mammography is one: 10 to 16 bits an entry);
#   highdicom/content.py, LUT.lut_data: 8 or 16 bits only. pydicom reads the same table.
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

values = np.arange(4096, dtype=np.uint16).reshape(64, 64)


def shown(bits):
    """Return what pydicom and highdicom make of a straight line to white in `bits` bits."""
    table = Dataset()
    line = (np.arange(4096) * (2**bits - 1) / 4095).astype("<u2")
    table.add_new("LUTDescriptor", "US", [4096, 0, bits])
    table.add_new("LUTData", "OW", line.tobytes())
    data = film(values, bits=12, VOILUTSequence=[table])
    first = apply_voi(values, data).max()
    try:
        image = highdicom.Image.from_dataset(data)
        return first, image.get_frame(1, apply_voi_transform=True, voi_output_range=(0, 255)).max()
    except RuntimeError as error:
        return first, f"RuntimeError: {error}"


print("python", sys.version.split()[0], "numpy", np.__version__, "pydicom", pydicom.__version__,
      "highdicom", highdicom.__version__)
print("expected: white, of each number of bits that the standard allows")
seen = {bits: shown(bits) for bits in (10, 12, 14, 16)}
for bits, (first, second) in seen.items():
    print(f"{bits} bits an entry: pydicom's brightest {first}, highdicom's {second}")
refused = [bits for bits, (_, second) in seen.items() if isinstance(second, str)]
sys.exit(0 if refused == [10, 12, 14] else 1)
PYTHON
