#!/usr/bin/env bash
# Grad-CAM of a ResNet18 shows a lesion 15.5 px to the right of where it is, and as much below.
#
# Versions:  grad-cam 1.5.7, captum 0.9.0, torchvision 0.29.1, torch 2.14.1, numpy 2.4.6.
# Expected:  the map of a network whose kernels prefer no side, for a film with one round lesion, has
#            its middle on the lesion.
# Seen:      of ResNet18 it lies 15.5 px to the right and below, in grad-cam as in captum; of VGG11 by
#            the same code on the lesion. Each of ResNet's five halvings (kernels of 3 and 7, padding 1
#            and 3) keeps the even pixels, so that place i of the last stage looks at pixel 32 i. Both
#            libraries spread place i over pixels 32 i to 32 i + 31, which is right for VGG.
# Remedy:    interpolate to 32 (h - 1) + 1 pixels with align_corners=True, which puts place i on pixel
#            32 i (shown).
# Matters:   15.5 px are 7 % of the width of a film of 224 px. Whether a map meets a radiologist's
#            circle is counted with it, and a box made of it is moved, always to the same side.
# Source:    Araujo et al., "Computing Receptive Fields of Convolutional Neural Networks", Distill 2019,
#            doi 10.23915/distill.00021; pytorch_grad_cam/utils/image.py, scale_cam_image (cv2.resize);
#            captum/attr/_utils/attribution.py, LayerAttribution.interpolate.
# Exits 1 where what is seen is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 numpy==2.4.6 \
    grad-cam==1.5.7 captum==0.9.0

"$folder/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from captum.attr import LayerAttribution, LayerGradCam
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn
from torchvision.models import resnet18, vgg11

print("python", sys.version.split()[0], *(f"{name} {version(name)}" for name in
      ("grad-cam", "captum", "torchvision", "torch")))
SIDE, PLACE = 512, 256  # of the film, and of the lesion's middle in both directions, in px


def network(stages):
    """Return the stages without preference for a side, and a head that adds what they see."""
    for part in stages.modules():
        if isinstance(part, nn.Conv2d):
            kernel = part.weight.data
            part.weight.data = sum(kernel.flip(d) for d in ([], [2], [3], [2, 3])) / 4
            if part.bias is not None:
                part.bias.data.zero_()
    head = nn.Linear(512, 1)
    nn.init.ones_(head.weight)
    return nn.Sequential(stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()


def off(picture):
    """Return how far to the right and below the lesion a map's middle lies, in px."""
    share, axis = torch.as_tensor(picture).double(), torch.arange(SIDE)
    return [round(float((share.sum(d) * (axis - PLACE)).sum() / share.sum()), 1) + 0 for d in (0, 1)]


torch.manual_seed(0)
far = (torch.arange(SIDE) - PLACE) ** 2
film = torch.exp(-(far[:, None] + far) / 2 / 12**2).expand(1, 3, SIDE, SIDE)  # a round lesion
seen = {}
for name, stages in {"ResNet18": nn.Sequential(*list(resnet18().children())[:-2]),
                     "VGG11": vgg11().features}.items():
    model = network(stages)
    first = GradCAM(model, [stages])(input_tensor=film, targets=[ClassifierOutputTarget(0)])[0]
    places = LayerGradCam(model, stages).attribute(film, 0).detach()
    second = LayerAttribution.interpolate(places, (SIDE, SIDE), "bilinear")[0, 0]
    seen[name] = off(first), off(second)
    print(f"{name:<8} grad-cam off by {seen[name][0]} px, captum by {seen[name][1]} px")
    if name == "ResNet18":
        sides = [32 * (side - 1) + 1 for side in places.shape[2:]]
        right = nn.functional.interpolate(places, sides, mode="bilinear", align_corners=True)
        seen["aligned"] = off(nn.functional.pad(right, (0, SIDE - sides[1], 0, SIDE - sides[0]))[0, 0])
print(f"ResNet18 with place i on pixel 32 i: off by {seen['aligned']} px")
beside = all(abs(value - 15.5) < 0.5 for pair in seen["ResNet18"] for value in pair)
on = all(abs(value) < 1.5 for pair in (*seen["VGG11"], seen["aligned"]) for value in pair)
print("As described." if beside and on else "It has changed.")
sys.exit(0 if beside and on else 1)
PYTHON
