#!/usr/bin/env bash
# torchvision's KeyPoints follow a flip by one convention of pixel centres, a turn by another.
#
# Versions:  torchvision 0.29.1, torch 2.14.1 (KeyPoints came with 0.23), Python 3.9 or newer.
# Expected:  the centre of a lesion, given as a KeyPoints, stays on its pixel whatever
#            transforms.v2 does to the film; two flips are a turn by 180 degrees.
# Seen:      horizontal_flip and vertical_flip move x to width - 1 - x, as for the index of a pixel,
#            and the point stays on its pixel. rotate moves x to width - x, as for the corner of a
#            pixel: after 90 and 180 degrees the point lies one pixel beside the lesion. resize
#            multiplies, as for corners: a point on the middle of a pixel ends half a pixel beside.
# Matters:   radiologists mark lesions of 3 px radius and more in MIAS; on a film reduced to 224 px
#            most small ones are a few pixels wide. Bounding boxes have no such step, since corners
#            are what they are made of.
# Source:    torchvision/transforms/v2/functional/_geometry.py: horizontal_flip_keypoints against
#            the rotation's _affine_keypoints_with_expand.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 numpy

"$folder/venv/bin/python" - <<'PYTHON'
import torch
import torchvision
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

print("torch", torch.__version__, "torchvision", torchvision.__version__)
height, width, x, y = 64, 48, 10, 20
film = torch.zeros(1, height, width)
film[0, y, x] = 1  # a lesion of one pixel
point = tv_tensors.KeyPoints(torch.tensor([[float(x), float(y)]]), canvas_size=(height, width))


def middle(image):
    """Return x and y of the lesion's centre of mass, in indices of pixels."""
    rows, columns = torch.meshgrid(*map(torch.arange, image.shape[-2:]), indexing="ij")
    share = image[0] / image[0].sum()
    return [round(float((share * axis).sum()), 2) for axis in (columns, rows)]


ways = {
    "horizontal_flip": F.horizontal_flip,
    "two flips": lambda part: F.vertical_flip(F.horizontal_flip(part)),
    "rotate by 180": lambda part: F.rotate(part, 180.0),
    "rotate by 90": lambda part: F.rotate(part, 90.0, expand=True),
    "resize to twice": lambda part: F.resize(part, [2 * height, 2 * width]),
}
off = {}
for name, way in ways.items():
    lesion, follows = middle(way(film)), [round(v, 2) for v in way(point)[0].tolist()]
    off[name] = [round(b - a, 2) for a, b in zip(lesion, follows)]
    print(f"{name:<16} lesion {lesion}  point {follows}  off by {off[name]}")
seen = {
    "horizontal_flip": [0, 0],
    "two flips": [0, 0],
    "rotate by 180": [1, 1],
    "rotate by 90": [0, 1],
    "resize to twice": [-0.5, -0.5],
}
assert off == seen, f"it has changed: {off}"
print("As described: flips keep the point on the lesion, turns move it one pixel beside.")
PYTHON
