"""Step 3: the ResNet18, for one grey channel and three classes.

In:  ImageNet weights (torchvision's download, a state dict of yours, or none).
Out: build_model() and what belongs to it. Nothing is written.

    python 03_model.py                          shows the layers and the output of one batch
    python 03_model.py --weights resnet18.pth   with a state dict that you have
"""

# %% Imports: this script finds its own folder first, whatever the working directory is
import importlib
import pickle
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(globals().get("__file__", "cell")).resolve().parent))

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import ResNet18_Weights, resnet18

import common
from common import BENIGN, CLASS_NAMES, MALIGNANT, NORMAL, UserError

data = importlib.import_module("02_dataset")


# %% Settings: change a value and run the cells below again; each name is a command-line flag
@dataclass
class Settings:
    """The network."""

    weights: str = "auto"  # auto (ImageNet if it can be had), imagenet, none, or a state dict FILE
    recipe: Literal["lesion", "plain"] = "lesion"  # see RECIPES
    freeze: int = -1  # stages kept as pretrained, 0 to 5; -1: 3 with weights, else 0
    dropout: float = 0.2  # share of the 512 features left out in training


# plain: what most projects do, one label a film and the mean over the last stage (32 px a place).
# lesion: places of 16 px, by a skip from the stage before (FCN-16s of Long, Shelhamer and Darrell,
# CVPR 2015); the film's evidence for a lesion is the mean of its strongest places, and in
# training the radiologists' circles say where the lesions are.
RECIPES = {
    "plain": {"skip": False, "pooling": "mean"},
    "lesion": {"skip": True, "pooling": "top"},
}

if __name__ == "__main__":
    settings = common.command_line(Settings, __doc__)


# %% The network: torchvision's ResNet18, read as a map of what every place looks like
class GreyConv2d(nn.Conv2d):
    """A first convolution that gives on a grey film what the RGB one gives on three equal channels.

    The RGB network sees ``(grey - mean_c) / std_c`` in channel c, so its kernels fold into one for
    the grey values and one for a constant. The constant has a kernel of its own, since zero
    padding comes after the normalisation: a bias would be wrong along the border.
    """

    MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)  # ImageNet, torchvision's values
    STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)

    def __init__(self, rgb):
        super().__init__(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
        weight = rgb.weight.detach()
        self.weight = nn.Parameter((weight / self.STD).sum(1, keepdim=True))
        self.constant = nn.Parameter((-weight * self.MEAN / self.STD).sum(1, keepdim=True))

    def forward(self, films):
        """Map films of shape (B, 1, H, W), 0 to 1, to (B, 64, H / 2, W / 2)."""
        ones = torch.ones_like(films[:1])
        return super().forward(films) + F.conv2d(ones, self.constant, None, 2, 3)


class MammogramNet(nn.Module):
    """ResNet18 with a 1 x 1 head: logits for every place, pooled to logits for the film.

    Parameters
    ----------
    recipe : str
        A key of `RECIPES`.
    dropout : float
        Share of the 512 features left out in training.

    Notes
    -----
    With mean pooling the film's logits equal those of torchvision's average pooling and linear
    layer, since both are linear: the maps come for free. With top pooling a place's evidence is
    its log-odds against normal, a film's the mean over its `TOP` strongest places.
    """

    TOP = 4

    def __init__(self, recipe="lesion", dropout=0.2):
        super().__init__()
        self.pooling = RECIPES[recipe]["pooling"]
        self.backbone = resnet18(weights=None)
        self.backbone.conv1 = GreyConv2d(self.backbone.conv1)
        self.backbone.fc = nn.Identity()
        self.dropout = nn.Dropout2d(dropout)
        self.head = nn.Conv2d(512, len(CLASS_NAMES), kernel_size=1)
        self.skip = nn.Conv2d(256, len(CLASS_NAMES), 1) if RECIPES[recipe]["skip"] else None
        self.film_bias = nn.Parameter(torch.zeros(len(CLASS_NAMES)))
        for layer in filter(None, (self.head, self.skip)):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        self.frozen = 0

    def stages(self):
        """Return the five stages of the backbone in their order."""
        b = self.backbone
        stem = [b.conv1, b.bn1, b.relu, b.maxpool]
        return [nn.Sequential(*stem), b.layer1, b.layer2, b.layer3, b.layer4]

    def features(self, films):
        """Map films (B, 1, H, W) to the last two stages, (B, 256, h, w) and (B, 512, h/2, w/2)."""
        outputs = []
        for number, stage in enumerate(self.stages()):
            with torch.set_grad_enabled(torch.is_grad_enabled() and number >= self.frozen):
                films = stage(films)
            outputs.append(films)
        return outputs[-2:]

    def places(self, fine, coarse):
        """Classify every place from the last two stages."""
        maps = self.head(self.dropout(coarse))
        if self.skip is None:
            return maps
        maps = F.interpolate(maps, fine.shape[2:], mode="bilinear", align_corners=False)
        return maps + self.skip(self.dropout(fine))

    def pool(self, maps):
        """Pool logits of places (B, 3, h, w) to logits of films (B, 3)."""
        if self.pooling == "mean":
            return maps.mean((2, 3)) + self.film_bias
        evidence = (maps - maps[:, NORMAL : NORMAL + 1]).flatten(2)
        strongest = evidence.topk(min(self.TOP, evidence.shape[2]), dim=2).values
        return strongest.mean(2) + self.film_bias

    def forward(self, films):
        """Classify films.

        Parameters
        ----------
        films : float tensor, shape (B, 1, H, W)
            Grey values, 0 (black) to 1.

        Returns
        -------
        logits : float tensor, shape (B, 3)
            Of the film, in the order of `CLASS_NAMES`.
        maps : float tensor, shape (B, 3, h, w)
            Of every place, h = ceil(H / 32) for "plain" and ceil(H / 16) for "lesion".
        """
        maps = self.places(*self.features(films))
        return self.pool(maps), maps

    def freeze(self, stages):
        """Keep the first stages as they are, their batch-norm statistics too."""
        self.frozen = stages
        for stage in self.stages()[:stages]:
            stage.requires_grad_(False)
        return self.train(self.training)

    def train(self, mode=True):
        """Switch to training, but for the frozen stages."""
        super().train(mode)
        for stage in self.stages()[: self.frozen]:
            stage.eval()
        return self


# %% Weights: torchvision's ImageNet weights, a file, or a random start that says so
def load_weights(weights):
    """Get pretrained weights.

    Parameters
    ----------
    weights : str
        "imagenet" (torchvision's IMAGENET1K_V1, checksum included), "auto" (the same, or a random
        start with a banner where they cannot be had), "none", or a file with a state dict of
        torchvision's resnet18.

    Returns
    -------
    state : dict of str to tensor, or None
        None is a random start.
    name : str
        What was used, for the records.
    """
    if weights == "none":
        return None, "none (random start)"
    if weights not in ("auto", "imagenet"):
        return read_weights(weights), f"file {Path(weights).name}"
    chosen = ResNet18_Weights.IMAGENET1K_V1
    cached = Path(torch.hub.get_dir()) / "checkpoints" / chosen.url.rsplit("/", 1)[-1]
    try:
        if not cached.is_file():
            common.contact(chosen.url)
        state = chosen.get_state_dict(progress=True, check_hash=True, weights_only=True)
        return state, "ImageNet (IMAGENET1K_V1)"
    except (pickle.UnpicklingError, EOFError, IndexError, struct.error):
        raise UserError(f"{cached} is damaged or no state dict; delete it, run again") from None
    except (OSError, RuntimeError) as error:
        reason = str(getattr(error, "reason", error))
    if weights == "imagenet":
        raise UserError(
            f"the ImageNet weights could not be had from {chosen.url} ({reason}); name a file with "
            "--weights FILE, or start at random with --weights none"
        )
    common.banner(
        f"NO IMAGENET WEIGHTS ({reason}).",
        "Going on from a RANDOM START, which is much weaker on mammograms.",
        f"Download {chosen.url} elsewhere and name it with --weights FILE.",
    )
    return None, "none (random start)"


def read_weights(path):
    """Read a state dict of torchvision's resnet18, and nothing that runs code."""
    state = common.read_checkpoint(path)
    expected = {name: value.shape for name, value in resnet18(weights=None).state_dict().items()}
    found = {name: value.shape for name, value in state.items() if torch.is_tensor(value)}
    missing = [name for name in expected if name not in found and not name.startswith("fc.")]
    if missing:
        raise UserError(
            f"{path} is no resnet18 state dict: {len(missing)} tensors are missing "
            f"({common.listing(missing, 3)}); found {common.listing(found, 3) or 'none'}"
        )
    wrong = [n for n in expected if n in found and n[:3] != "fc." and found[n] != expected[n]]
    if wrong:
        raise UserError(
            f"{path}: {wrong[0]} has shape {tuple(found[wrong[0]])}, expected "
            f"{tuple(expected[wrong[0]])}; is it a resnet18?"
        )
    return {name: state[name].float() for name in expected if name[:3] != "fc."}


def build_model(weights="auto", recipe="lesion", dropout=0.2, freeze=-1):
    """Build the network.

    Parameters
    ----------
    weights : str or tuple
        See `load_weights`; or what it returned, so that several models share one loading.
    recipe : str
        A key of `RECIPES`.
    dropout : float
        0 to below 1.
    freeze : int
        Stages kept as pretrained, 0 to 5; -1: stem, layer1 and layer2 with weights, else none.

    Returns
    -------
    model : MammogramNet
        In training mode.
    name : str
        The weights that were used.
    """
    if not 0 <= dropout < 1 or not -1 <= freeze <= 5:
        raise UserError(f"dropout {dropout} (0 to below 1), freeze {freeze} (-1 to 5)")
    state, name = load_weights(weights) if isinstance(weights, str) else weights
    model = MammogramNet(recipe, dropout)
    if state is not None:
        rgb = resnet18(weights=None)
        rgb.load_state_dict(state, strict=False)
        grey = GreyConv2d(rgb.conv1).state_dict()
        state = {n: v for n, v in state.items() if n != "conv1.weight" and n[:3] != "fc."}
        state.update({f"conv1.{n}": v for n, v in grey.items()})
        model.backbone.load_state_dict(state)
    return model.freeze((0 if state is None else 3) if freeze < 0 else freeze), name


def parameter_groups(model, lr, backbone_lr):
    """Return the optimiser's groups: the new head at `lr`, the pretrained backbone at its own."""
    backbone = [p for p in model.backbone.parameters() if p.requires_grad]
    head = [p for n, p in model.named_parameters() if not n.startswith("backbone.")]
    return [{"params": head, "lr": lr}, {"params": backbone, "lr": backbone_lr}]


if __name__ == "__main__":
    torch.manual_seed(0)
    model, weights_name = build_model(**vars(settings))
    print(f"weights: {weights_name}; frozen stages: {model.frozen}")


# %% Predict: logits of films, and where the network looked
def predict(model, dataset, batch_size=8, dtype=torch.float32, progress=None):
    """Return the film logits (n_films, 3) of a dataset, float32 on the CPU, in its order."""
    device = next(model.parameters()).device
    model.eval()
    logits = []
    with torch.inference_mode():
        for films, _, _ in data.batches(dataset, batch_size):
            films = films.to(device, memory_format=torch.channels_last).float() / 255
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits.append(model(films)[0].float().cpu())
            if progress:
                progress.step(len(films))
    return torch.cat(logits)


def fit_temperature(logits, labels):
    """Return the temperature that makes validation probabilities most likely.

    Guo, Pleiss, Sun and Weinberger, On Calibration of Modern Neural Networks, ICML 2017.

    Parameters
    ----------
    logits : float tensor, shape (n_films, 3)
        Of validation films.
    labels : int tensor, shape (n_films,)
        Theirs.

    Returns
    -------
    temperature : float
        Above 1 where the network was too sure; kept within 0.05 and 20.
    """
    candidates = torch.linspace(-3, 3, 1201).exp()  # steps of half a per cent
    losses = torch.stack([F.cross_entropy(logits / t, labels) for t in candidates])
    return float(candidates[losses.argmin()])


def softmax(logits, temperature=1.0):
    """Return probabilities of logits (n, 3) at a temperature."""
    return F.softmax(torch.as_tensor(logits) / temperature, dim=1).numpy()


class Reading(NamedTuple):
    """What a model says of films."""

    logits: np.ndarray  # float32, (n, 3), before the temperature
    cams: np.ndarray  # float32, (n, h, w), Grad-CAM of the likelier lesion class
    evidence: np.ndarray  # float32, (n, h', w'), log-odds of the likelier lesion class, per place


def read_films(model, dataset, batch_size, dtype, progress):
    """Predict films and compute Grad-CAM in the same pass.

    Grad-CAM (Selvaraju et al., ICCV 2017) weighs the channels of the last stage with the mean
    gradient of a class's logit; here of benign or malignant, whichever is likelier.

    Parameters
    ----------
    model : MammogramNet
        In evaluation mode.
    dataset : MammogramDataset
        The films.
    batch_size : int
        Films at a time.
    dtype : torch.dtype
        torch.float32, or torch.bfloat16 for autocast.
    progress : Progress
        Told of every batch.

    Returns
    -------
    reading : Reading
        In the order of the dataset.
    """
    device = next(model.parameters()).device
    kept, parts = {}, []

    def keep(module, inputs, output):
        kept["stage"] = output.detach().requires_grad_()
        return kept["stage"]

    hook = model.backbone.layer4.register_forward_hook(keep)
    model.requires_grad_(False)  # the gradient runs from the logit to the last stage, no further
    try:
        for films, _, _ in data.batches(dataset, batch_size):
            films = films.to(device, memory_format=torch.channels_last).float() / 255
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits, maps = model(films)
            lesion = torch.where(logits[:, MALIGNANT] > logits[:, BENIGN], MALIGNANT, BENIGN)
            chosen = logits.gather(1, lesion[:, None]).sum()
            (gradient,) = torch.autograd.grad(chosen, kept["stage"])
            weight = gradient.float().mean((2, 3), keepdim=True)
            cams = F.relu((weight * kept["stage"].detach().float()).sum(1))
            maps = maps.detach().float()
            evidence = maps[torch.arange(len(maps)), lesion] - maps[:, NORMAL]
            parts.append([t.detach().float().cpu().numpy() for t in (logits, cams, evidence)])
            progress.step(len(films))
    finally:
        hook.remove()
    return Reading(*(np.concatenate(column) for column in zip(*parts)))


# %% Look: the stages with their parameters and output shapes
def summary(model, size):
    """Return a DataFrame with a row per stage: output shape, parameters, how many are trained.

    Parameters
    ----------
    model : MammogramNet
        The network.
    size : tuple of int
        Canvas height and width, px.
    """
    rows, films = [], torch.zeros(1, 1, *size)
    device = next(model.parameters()).device
    names = ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
    films, training = films.to(device), model.training
    model.eval()
    with torch.no_grad():
        for name, stage in zip(names, [*model.stages(), model.head]):
            films = stage(films)
            count = sum(p.numel() for p in stage.parameters())
            trained = sum(p.numel() for p in stage.parameters() if p.requires_grad)
            rows.append((name, str(tuple(films.shape[1:])), count, trained))
    model.train(training)
    return pd.DataFrame(rows, columns=["stage", "output", "parameters", "trained"])


if __name__ == "__main__":
    prepared = data.prepared_source("auto")
    layers = summary(model, prepared.films.shape[1:])
    common.table(layers, f"{settings.recipe}: {layers['parameters'].sum():,} parameters")


# %% Look: the head's output on one batch, before any training
if __name__ == "__main__":
    dataset = data.MammogramDataset(prepared)
    films, labels, rows = next(data.batches(dataset, 4))
    model.eval()
    with torch.no_grad():
        logits, maps = model(films / 255)
    output = pd.DataFrame(F.softmax(logits, 1).numpy(), columns=[f"p_{c}" for c in CLASS_NAMES])
    output.insert(0, "label", [CLASS_NAMES[label] for label in labels])
    common.table(
        output.round(3), f"untrained output on films {tuple(films.shape)}; {common.DISCLAIMER}"
    )
    print(f"logits {tuple(logits.shape)}, maps of places {tuple(maps.shape)}")
