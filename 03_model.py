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
# training the radiologists' circles say where the lesions are. Batch-norm statistics stay as
# pretrained: those of eight films are noise.
RECIPES = {
    "plain": {"skip": False, "pooling": "mean", "keep_statistics": False},
    "lesion": {"skip": True, "pooling": "top", "keep_statistics": True},
}

if __name__ == "__main__":
    settings = common.command_line(Settings, __doc__)


# %% The network: torchvision's ResNet18, read as a map of what every place looks like
class GreyConv2d(nn.Conv2d):
    """A first convolution that gives on a grey film what the RGB one gives on three equal channels.

    The RGB network sees ``(grey - mean_c) / std_c`` in channel c, so its kernels fold into one for
    the grey values and one for a constant. The constant is a channel of ones, not a bias, since
    zero padding comes after the normalisation: a bias would be wrong along the border.
    """

    MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)  # ImageNet, torchvision's values
    STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)

    def __init__(self, rgb):
        super().__init__(2, 64, kernel_size=7, stride=2, padding=3, bias=False)
        grey = rgb.weight.detach() / self.STD  # (64, 3, 7, 7)
        self.weight = nn.Parameter(torch.stack([grey.sum(1), -(grey * self.MEAN).sum(1)], 1))

    def forward(self, films):
        """Map films of shape (B, 1, H, W), 0 to 1, to (B, 64, H / 2, W / 2)."""
        return super().forward(torch.cat([films, torch.ones_like(films)], 1))


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
        self.frozen, self.keep_statistics = 0, False

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
        """Switch to training, but for the frozen stages and statistics that are to be kept."""
        super().train(mode)
        for stage in self.stages()[: self.frozen]:
            stage.eval()
        for module in self.backbone.modules() if self.keep_statistics else ():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
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
        rgb.conv1, rgb.fc = GreyConv2d(rgb.conv1), nn.Identity()
        model.backbone.load_state_dict(rgb.state_dict())
        model.keep_statistics = RECIPES[recipe]["keep_statistics"]
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


# %% Predict: logits of films, what the other breast adds, and probabilities
def with_mirror(films):
    """Turn uint8 films (B, 1, H, W) to 0 to 1, and put each one upside down behind them."""
    films = films.float() / 255
    return torch.cat([films, films.flip(2)])


def without_mirror(logits):
    """Return the mean over films and their mirror images, from what `with_mirror` became."""
    return torch.stack(logits.float().chunk(2)).mean(0)


def predict(model, dataset, batch_size=8, dtype=torch.float32, progress=None):
    """Return the logits (n_films, 3) of a dataset, float32 on the CPU, in its order.

    Each is the mean over the film and its mirror image, which training showed as often.
    """
    device = next(model.parameters()).device
    model.eval()
    logits = []
    with torch.inference_mode():
        for films, _, _ in data.batches(dataset, batch_size):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                both = model(with_mirror(films.to(device)))[0]
            logits.append(without_mirror(both).cpu())
            if progress:
                progress.step(len(films))
    return torch.cat(logits)


def beside_other_breast(logits, patients, sides):
    """Judge each film against the same patient's other breast, as radiologists do.

    Breasts of one woman are alike, so that what both show is her tissue and what one shows is
    news: a film's logits are raised by as much as they exceed the other's.

    Parameters
    ----------
    logits : tensor or ndarray, shape (n_films, 3)
        Of each film alone.
    patients : sequence of int or str, length n_films
        Whose film it is.
    sides : sequence of str, length n_films
        "left", "right" or "" for unknown.

    Returns
    -------
    logits : tensor, shape (n_films, 3)
        Twice the film's own minus the (mean of the) other's. A film whose other breast is not
        among the films keeps its own.
    """
    logits, sides = pd.DataFrame(np.asarray(logits)), pd.Series(np.asarray(sides))
    patients = np.asarray(patients)
    means = logits.groupby([patients, sides.to_numpy()]).mean()
    opposite = sides.map({"left": "right", "right": "left"}).fillna("no other")
    others = means.reindex(pd.MultiIndex.from_arrays([patients, opposite])).to_numpy()
    return torch.tensor((2 * logits - others).fillna(logits).to_numpy())


def fit_temperature(logits, labels, prior):
    """Return the temperature that makes validation probabilities most likely.

    Guo, Pleiss, Sun and Weinberger, On Calibration of Modern Neural Networks, ICML 2017.

    Parameters
    ----------
    logits : float tensor, shape (n_films, 3)
        Of validation films.
    labels : int tensor, shape (n_films,)
        Theirs.
    prior : float tensor, shape (3,)
        See `probabilities`.

    Returns
    -------
    temperature : float
        Above 1 where the network was too sure; kept within 0.05 and 20.
    """
    candidates = torch.linspace(-3, 3, 1201).exp()  # steps of half a per cent
    losses = [F.cross_entropy(calibrated(logits, t, prior), labels) for t in candidates]
    return float(candidates[torch.stack(losses).argmin()])


def calibrated(logits, temperature, prior):
    """Return the logits (n_films, 3) of `probabilities`."""
    return torch.as_tensor(logits) / temperature + prior.log()


def probabilities(logits, temperature, prior):
    """Return calibrated probabilities (n_films, 3), float32 ndarray.

    Parameters
    ----------
    logits : tensor or ndarray, shape (n_films, 3)
        Of a network that was trained as if the classes were equally frequent.
    temperature : float
        Divides them.
    prior : tensor, shape (3,)
        How frequent the classes are among the training films, by Bayes' rule; ones if training
        was not balanced.
    """
    return F.softmax(calibrated(logits, temperature, prior), dim=1).numpy()


class Reading(NamedTuple):
    """What a model says of films."""

    logits: np.ndarray  # float32, (n, 3), of each film alone, not calibrated
    cams: np.ndarray  # float32, (n, h, w), Grad-CAM of the likelier lesion class
    places: np.ndarray  # float32, (n, h', w'), 0 to 1, of that class against normal, per place


def read_films(model, dataset, batch_size, dtype, progress):
    """Predict films as `predict` does, and compute Grad-CAM in the same pass.

    Grad-CAM (Selvaraju et al., ICCV 2017) weighs the channels of a stage with the mean gradient of
    a class's logit; here of benign or malignant, whichever is likelier. The stage is the last one
    that all evidence passes: layer4, or layer3 where a skip leaves from it.

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

    stage = model.backbone.layer4 if model.skip is None else model.backbone.layer3
    hook = stage.register_forward_hook(keep)
    model.requires_grad_(False)  # the gradient runs from the logit to this stage, no further
    try:
        for films, _, _ in data.batches(dataset, batch_size):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                each, maps = model(with_mirror(films.to(device)))
            logits = without_mirror(each)
            lesion = torch.where(logits[:, MALIGNANT] > logits[:, BENIGN], MALIGNANT, BENIGN)
            (gradient,) = torch.autograd.grad(
                logits.gather(1, lesion[:, None]).sum(), kept["stage"]
            )
            weight = gradient.float().mean((2, 3), keepdim=True)
            cams = F.relu((weight * kept["stage"].detach().float()).sum(1))
            maps = maps.detach().float()
            evidence = maps[torch.arange(len(maps)), lesion.repeat(2)] - maps[:, NORMAL]
            heat = [cams.chunk(2), evidence.sigmoid().chunk(2)]
            cams, places = ((film + mirrored.flip(1)) / 2 for film, mirrored in heat)
            parts.append([t.detach().float().cpu().numpy() for t in (logits, cams, places)])
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
