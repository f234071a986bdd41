#!/usr/bin/env bash
# A film of 16 bits, resized with bicubic interpolation: black beside a bright label becomes white.
#
# Versions:  torchvision 0.29.1, torch 2.14.1, numpy 2.4.6.
# Expected:  what bicubic interpolation overshoots is cut at black and white, as in uint8, which
#            v2.functional.resize rounds and clamps.
# Seen:      a uint16 tensor is neither rounded nor clamped. On x86, with antialias, -3548 beside the
#            edge becomes 61988 (nearly white), 69083 on the other side 3547 (nearly black), and white
#            65535 is 65534; without antialias and in transforms v1 it is alike.
# Remedy:    resize the film as float32, then clamp.
# Matters:   decode_image returns uint16 for a PNG of 16 bits, Resize of many pretrained networks is
#            bicubic, and films have labels and a skin line as bright edges on black: a white line
#            appears where there is nothing, as a microcalcification would.
# Source:    torchvision/transforms/v2/functional/_geometry.py, resize_image: clamp_ for uint8 alone,
#            round_ for five dtypes, without uint16; v1 _functional_tensor.py, _cast_squeeze_out.
# Exits 1 where what is seen is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 numpy==2.4.6

"$folder/venv/bin/python" - <<'PYTHON'
import platform
import sys

import torch
import torchvision
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as v1_functional
from torchvision.transforms.v2 import functional

print("python", sys.version.split()[0], "on", platform.machine(), "torch", torch.__version__,
      "torchvision", torchvision.__version__)
wide = torch.zeros(1, 64, 64)
wide[:, :, 32:] = 1  # a bright label on black


def row(dtype, white, antialias):
    """Return a row of the edge, resized from 64 to 47 px, as numbers."""
    film = (wide * white).round().to(torch.int64).to(dtype)
    options = {"interpolation": InterpolationMode.BICUBIC, "antialias": antialias}
    made = functional.resize(film, [47, 47], **options)
    return [round(value) for value in made.to(torch.float64)[0, 20, 21:27].tolist()]


wrapped = []
for antialias in (True, False):
    right = [min(max(value, 0), 65535) for value in row(torch.float32, 65535, antialias)]
    seen = row(torch.uint16, 65535, antialias)
    film = (wide * 65535).to(torch.int64).to(torch.uint16)
    first = v1_functional.resize(film, [47, 47], InterpolationMode.BICUBIC, antialias=antialias)
    print(f"antialias {antialias}: uint8    {row(torch.uint8, 255, antialias)}")
    print(f"      expected of uint16 {right}\n      seen               {seen}")
    v1 = [round(value) for value in first.to(torch.float64)[0, 20, 21:27].tolist()]
    print(f"      in transforms v1   {v1}")
    wrapped.append(seen == v1 and right[1] == 0 and seen[1] > 60000 and right[3] == 65535 and seen[3] < 5000)
sys.exit(0 if all(wrapped) else 1)
PYTHON
