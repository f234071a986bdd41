#!/usr/bin/env bash
# RandAugment turns about a quarter of the films of 12 bits black, if they are int32.
#
# Versions:  torchvision 0.29.1, torch 2.14.1, numpy 2.4.6, pillow 12.0.0.
# Expected:  an integer tensor is varied within its grey values, or refused: transforms v1 takes uint8
#            only for both changes below, and says it.
# Seen:      two of its 14 changes go by the whole range of the dtype, not of the film. v2's equalize
#            brings the film to uint8 first: of int16 it divides by 128 and leaves 31 of 4,096 grey
#            values, of int32 by 2 ** 23, which makes films of 12 and 16 bits black. posterize keeps
#            the top bits of 31, where such films have none. (autocontrast of int32 works but for its
#            brightest pixel, which becomes -2147483648 on x86: 2 ** 31 - 1 is no float32.)
# Remedy:    float32 of 0 to 1 (equalize then counts 256 values).
# Matters:   Pillow reads a PGM of 12 or 16 bits, or a TIFF of 32, as mode I, of which PILToTensor makes
#            int32. Of 300 such films some 80 come out black; nothing is said, and the network learns
#            that black films have every label.
# Source:    torchvision/transforms/v2/functional/_color.py: equalize_image, posterize_image and
#            autocontrast_image.
# Exits 1 where what is seen is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 numpy==2.4.6 pillow==12.0.0

"$folder/venv/bin/python" - <<'PYTHON'
import io
import platform
import sys

import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

print("python", sys.version.split()[0], "on", platform.machine(), "torch", torch.__version__,
      "torchvision", torchvision.__version__)
grey = np.arange(4096, dtype=np.int32).reshape(64, 64)  # each value of 12 bits once
pgm = b"P5 64 64 4095\n" + grey.astype(">u2").tobytes()
film = functional.pil_to_tensor(Image.open(io.BytesIO(pgm)))
seen = {}
deep = torch.from_numpy(grey.astype(np.int16))[None]
films = {"int16": deep, "int32, a PGM read by Pillow": film, "0 to 1": film / film.max()}
for name, picture in films.items():
    seen[name] = len(functional.equalize(picture).unique())
    print(f"equalize of {name} ({picture.dtype}): 4096 grey values become {seen[name]}")
posterized = functional.posterize(film, 8).max().item()
print(f"posterize of int32 to 8 bits: the brightest pixel is {posterized}")
bright = functional.autocontrast(film)
torch.manual_seed(0)
augment = v2.RandAugment()
count = sum(augment(film).max().item() == 0 for _ in range(300))
print(f"RandAugment of int32: {count} of 300 films are black")
print(f"autocontrast of int32: darkest and brightest of before are now {bright.flatten()[0]} and "
      f"{bright.flatten()[-1]}")
black = functional.equalize(film).max().item() == posterized == 0
same = film.dtype == torch.int32 and black and seen["int16"] <= 32 and seen["0 to 1"] > 200
sys.exit(0 if same and 50 < count < 120 else 1)
PYTHON
