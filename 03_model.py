"""Step 3: the ResNet18, for one grey channel and three classes.

In:  ImageNet weights (torchvision's download, a state dict of yours, or none).
Out: build_model() and what belongs to it. Nothing is written but a figure.

    python 03_model.py                          shows the layers and the output of one batch
    python 03_model.py --weights resnet18.pth   with a state dict that you have
"""

# %% Imports: this script finds its own folder first, whatever the working directory is
import importlib
import math
import pickle
import re
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Optional

sys.path.insert(0, str(Path(globals().get("__file__", "cell")).resolve().parent))

import matplotlib.pyplot as plt
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

    script = "03_model.py"
    weights: str = "auto"  # auto (ImageNet if it can be had), imagenet, none, a FILE, or a RUN
    recipe: Literal["lesion", "plain"] = "lesion"  # plain: labels alone; lesion: circles too
    freeze: int = -1  # stages kept as pretrained, 0 to 5; -1: 3 with weights, else 0
    dropout: float = 0.2  # share of the 512 features left out in training


if __name__ == "__main__":
    settings = common.command_line(Settings, __doc__)


# %% The head: what turns the features of a place into three logits; change it here
# It starts with small weights, so that all classes are equally likely at first. Anything that maps
# features to three logits will do, nn.Sequential(nn.Linear(features, 64), nn.ReLU(), ...) for one.
def new_head(features):
    """Return a module that maps (..., features) to (..., 3), the classes' logits."""
    head = nn.Linear(features, len(CLASS_NAMES))
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return head


# %% The network: torchvision's ResNet18, read as a map of what every place looks like
# plain: what most projects do, one label a film and the mean over the last stage (32 px a place).
# lesion: places of 16 px, by a second head on the stage before (a skip connection as in FCN-16s,
# Long, Shelhamer and Darrell, CVPR 2015); a film's logits are the mean over its strongest places,
# and in training the radiologists' circles say where the lesions are. Its batch-norm statistics
# stay as pretrained: those of eight films are noise.
class MammogramNet(nn.Module):
    """ResNet18 whose head classifies every place; places are pooled to logits of the film.

    "plain" equals torchvision's average pooling and linear layer, since both are linear.
    """

    TOP = 4  # strongest places of each class, by their log-odds against normal
    MEAN, STD = (torch.tensor(v).view(1, 3, 1, 1)  # of ImageNet, torchvision's values
                 for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))  # fmt: skip

    def __init__(self, recipe="lesion", dropout=0.2):
        super().__init__()
        self.lesion, self.frozen, self.keep_statistics = recipe == "lesion", 0, False
        self.backbone = resnet18(weights=None)
        self.backbone.fc = nn.Identity()
        self.dropout = nn.Dropout2d(dropout)
        self.head = new_head(512)
        self.skip_head = new_head(256) if self.lesion else None
        self.film_bias = nn.Parameter(torch.zeros(len(CLASS_NAMES)))

    def stages(self):
        """Return the five stages of the backbone in their order."""
        b = self.backbone
        stem = nn.Sequential(b.conv1, b.bn1, b.relu, b.maxpool)
        return [stem, b.layer1, b.layer2, b.layer3, b.layer4]

    def forward(self, films):
        """Classify films, float (B, 1, H, W), 0 (black) to 1.

        Returns logits of the films (B, 3), in the order of CLASS_NAMES, and of every place
        (B, 3, h, w), h = ceil(H / 32) for "plain" and ceil(H / 16) for "lesion".
        """
        coarse = (films.expand(-1, 3, -1, -1) - self.MEAN.to(films)) / self.STD.to(films)
        for stage in self.stages():
            fine, coarse = coarse, stage(coarse)
        places = self.classify(self.head, coarse)
        if not self.lesion:
            return places.mean((2, 3)) + self.film_bias, places
        places = F.interpolate(places, fine.shape[2:], mode="bilinear", align_corners=False)
        places = places + self.classify(self.skip_head, fine)
        against_normal = (places - places[:, NORMAL : NORMAL + 1]).flatten(2)
        strongest = against_normal.topk(min(self.TOP, against_normal.shape[2]), dim=2).values
        return strongest.mean(2) + self.film_bias, places

    def classify(self, head, features):
        """Apply a head to features (B, C, h, w) place by place."""
        return head(self.dropout(features).movedim(1, -1)).movedim(-1, 1)

    def freeze(self, stages):
        """Keep the first stages as they are, their batch-norm statistics too."""
        self.frozen = stages
        for stage in self.stages()[:stages]:
            stage.requires_grad_(False)
        return self.train(self.training)

    def train(self, mode=True):
        """Switch to training, but for the frozen stages and statistics that are to be kept."""
        super().train(mode)
        for part in [self.backbone] if self.keep_statistics else self.stages()[: self.frozen]:
            part.eval()
        return self


# %% Weights of a file: a state dict, or an earlier run
# A large database teaches what a small one cannot. A run remembers which films and patients it was
# trained or chosen on, and those of the run that it began with, so that step 4 can refuse a leak.
class Weights(NamedTuple):
    """What a network begins with."""

    state: Optional[dict]  # of torchvision's resnet18, or of an earlier run; None: a random start
    name: str
    seen: dict = {}  # of a run: digests of its "films", and "patients" as source/patient


def read_weights(name, fold=0):
    """Return the Weights of a file or a run, its wrappers (DataParallel's, say) taken off."""
    path = common.weights_file(name, fold)
    values, seen, label = common.read_checkpoint(path), {}, f"file {path.name}"
    if "validation" in values:  # of step 4
        if "seen" not in values:
            raise UserError(f"{path} was made by an earlier version; train again")
        record, seen = values["record"], values["seen"]
        label = f"run {record['run']} ({record['source_used']}; {record['weights_used']})"
        print(f"weights: {path}, fold {values['fold']} of {label}")
    for wrapper in ("state_dict", "model"):
        values = values[wrapper] if isinstance(values.get(wrapper), dict) else values
    state = {re.sub(r"^((module|model|backbone)\.)+", "", k): v for k, v in values.items()}
    broken = [k for k, v in state.items() if torch.is_tensor(v) and not torch.isfinite(v).all()]
    if broken:
        raise UserError(f"{path} holds NaN or infinite values ({common.listing(broken, 3)}); "
                        "it cannot be trained on")  # fmt: skip
    return Weights(state, label, seen)


# %% Weights: torchvision's ImageNet weights, a file, or a random start that says so
# Filters learned on a million photographs see edges and textures on films too; 322 films alone
# teach none of it. Nothing that is read can run code.
def load_weights(weights, fold=0):
    """Return the Weights that the setting names; of a run, those of the fold if it has them."""
    weights = str(weights)
    if weights == "none":
        return Weights(None, "none (random start)")
    if weights not in ("auto", "imagenet"):
        return read_weights(weights, fold)
    chosen = ResNet18_Weights.IMAGENET1K_V1
    cached = Path(torch.hub.get_dir()) / "checkpoints" / chosen.url.rsplit("/", 1)[-1]
    try:
        if not cached.is_file():
            common.contact(chosen.url)
        state = chosen.get_state_dict(progress=True, check_hash=True, weights_only=True)
        return Weights(state, "ImageNet (IMAGENET1K_V1)")
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
    return Weights(None, "none (random start)")


def build_model(weights="auto", recipe="lesion", dropout=0.2, freeze=-1):
    """Build the network; `weights` as in the settings, or what `load_weights` returned.

    Returns the MammogramNet, in training mode, and the name of the weights.
    """
    if not 0 <= dropout < 1 or not -1 <= freeze <= 5:
        raise UserError(f"dropout {dropout} (0 to below 1), freeze {freeze} (-1 to 5)")
    state, name, seen = weights if isinstance(weights, Weights) else load_weights(weights)
    model = MammogramNet(recipe, dropout)
    if state is not None:
        heads = {k: v for k, v in model.state_dict().items() if not k.startswith("backbone.")}
        fitting = {k: v for k, v in state.items() if k in heads and v.shape == heads[k].shape}
        others = ("fc.", "head.", "skip_head.", "film_bias") if seen else ("fc.",)
        state = {key: value for key, value in state.items() if not key.startswith(others)}
        try:
            model.load_state_dict(fitting, strict=False)
            missing, unknown = model.backbone.load_state_dict(state, strict=False)
        except (RuntimeError, AttributeError) as error:  # other shapes, no tensors
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{name} is no resnet18 ({reason})") from None
        if missing or unknown:
            raise UserError(
                f"{name} is no resnet18 state dict: {len(missing)} tensors are missing "
                f"({common.listing(missing, 3)}), {len(unknown)} unknown "
                f"({common.listing(unknown, 3)})"
            )
        model.keep_statistics = model.lesion
    return model.freeze((0 if state is None else 3) if freeze < 0 else freeze), name


if __name__ == "__main__":
    common.check_settings(settings, "03_model.py")
    torch.manual_seed(0)
    model, weights_name = build_model(**vars(settings))
    print(f"weights: {weights_name}; frozen stages: {model.frozen}")


# %% Predict: logits of films, and where the network looked
# Each film is read together with its top-to-bottom flip, which training showed too. Grad-CAM
# (Selvaraju et al., ICCV 2017) weighs the channels of a stage with the mean gradient of a class's
# logit; here of benign or malignant, whichever is likelier. The stage is the last one that all
# places pass: layer4, or layer3 where the second head reads it.
class Reading(NamedTuple):
    """What a model says of n films, on the CPU, in the order of the dataset."""

    logits: torch.Tensor  # (n, 3), of each film alone, not calibrated
    cams: np.ndarray = None  # (n, h, w), Grad-CAM of the lesion class a network finds likelier
    places: np.ndarray = None  # (n, h', w'), 0 to 1, of that class against normal, per place


def predict(model, dataset, batch_size=8, dtype=torch.float32, progress=None, maps=False):
    """Return the Reading of a dataset, in evaluation mode; Grad-CAM and places if `maps`."""
    device, kept, parts = next(model.parameters()).device, {}, []
    stage = model.backbone.layer3 if model.lesion else model.backbone.layer4

    def keep(module, inputs, output):
        kept["stage"] = output.detach().requires_grad_()
        return kept["stage"]

    model.eval()
    # of larger films fewer at once, for they take as much memory as those of 512 x 288
    pixels = math.prod(dataset.films.shape[1:]) / dataset.reduce**2
    fewer = math.ceil(batch_size * min(1, 512 * 288 / pixels))
    with stage.register_forward_hook(keep), torch.set_grad_enabled(maps):
        for films, _, _ in data.batches(dataset, fewer):
            films = films.to(device).float() / 255
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                each, places = model(torch.cat([films, films.flip(2)]))
            logits = torch.stack(each.float().chunk(2)).mean(0)
            heat = heat_maps(logits, places.detach().float(), kept["stage"]) if maps else []
            parts.append([logits.detach().cpu(), *heat])
            if progress:
                progress.step(len(films))
    logits, *heat = zip(*parts)
    return Reading(torch.cat(logits), *(torch.cat(part).numpy() for part in heat))


def mean_reading(readings):
    """Average Readings with maps of the same films; Grad-CAMs count alike, 1 at their highest."""
    shape = max(reading.places.shape[1:] for reading in readings)

    def mean(maps):
        maps = [F.interpolate(torch.from_numpy(m)[:, None], shape, mode="bilinear") for m in maps]
        return torch.cat(maps, 1).mean(1).numpy()

    cams = mean([r.cams / r.cams.max((1, 2), keepdims=True).clip(1e-9) for r in readings])
    logits = torch.stack([reading.logits for reading in readings]).mean(0)
    return Reading(logits, cams, mean([reading.places for reading in readings]))


def heat_maps(logits, places, stage):
    """Return Grad-CAM and places of the likelier lesion class, mirror images turned back."""
    lesion = torch.where(logits[:, MALIGNANT] > logits[:, BENIGN], MALIGNANT, BENIGN)
    (gradient,) = torch.autograd.grad(logits.gather(1, lesion[:, None]).sum(), stage)
    weight = gradient.float().mean((2, 3), keepdim=True)
    cams = F.relu((weight * stage.detach().float()).sum(1))
    against_normal = places[torch.arange(len(places)), lesion.repeat(2)] - places[:, NORMAL]
    heat = [cams.chunk(2), against_normal.sigmoid().chunk(2)]
    return [((film + mirrored.flip(1)) / 2).cpu() for film, mirrored in heat]


# %% The other breast
# Breasts of one woman are alike, so that what both show is her tissue and what one shows is news:
# a film's logits are raised by what they exceed the other's, times a weight. How much that says
# depends on how films were collected, so validation films choose the weight.
def beside_other_breast(logits, films, weight=1.0):
    """Judge films against the same patient's other breast.

    `logits` is (n, 3), of each film alone; `films` has patient and laterality ("left", "right" or
    "") for each. Returns own + weight * (own - mean of the other's), tensor (n, 3); a film whose
    other breast is not among them keeps its own.
    """
    logits = pd.DataFrame(np.asarray(logits))
    patients, sides = np.asarray(films["patient"]), pd.Series(list(films["laterality"]))
    means = logits.groupby([patients, sides.to_numpy()]).mean()
    opposite = sides.map({"left": "right", "right": "left"}).fillna("no other")
    others = means.reindex(pd.MultiIndex.from_arrays([patients, opposite])).to_numpy()
    return torch.tensor((logits + weight * (logits - others)).fillna(logits).to_numpy())


# %% Probabilities that mean what they say
# Training saw the classes equally often: Bayes' rule puts their frequency back in, and a
# temperature chosen on validation films mends what is too sure (Guo, Pleiss, Sun and Weinberger,
# ICML 2017).
def calibrated(logits, temperature, prior):
    """Return logits / temperature + log(prior), (n, 3); `prior` (3,): how frequent classes are."""
    return torch.as_tensor(logits) / temperature + prior.log()


def probabilities(logits, temperature, prior):
    """Return calibrated probabilities (n, 3), float32 ndarray."""
    return F.softmax(calibrated(logits, temperature, prior), dim=1).numpy()


def decide(probabilities, prior, tempering):
    """Return the classes (n,) whose probability divided by prior ** tempering is largest.

    0: the likeliest class, which is nearly always the commonest; 1: as if all were as common.
    """
    if not 0 <= tempering <= 1:
        raise UserError(f"--tempering {tempering}: expected 0 (the likeliest class) to 1")
    return (probabilities / np.asarray(prior) ** tempering).argmax(1)


def fit_temperature(logits, labels, prior):
    """Return the loss of validation labels (n,) and the temperature, 0.05 to 20, of the least."""
    candidates = torch.linspace(-3, 3, 1201).exp()  # steps of half a per cent
    losses = []
    for some in candidates.split(50):  # at once they would need much memory for many films
        posterior = F.log_softmax(calibrated(logits.float(), some[:, None, None], prior), 2)
        losses.append(-posterior[:, torch.arange(len(labels)), labels].mean(1))
    losses = torch.cat(losses)
    return losses.min().item(), candidates[losses.argmin()].item()


OTHER_BREAST = (1.0, 0.0, 0.5, 1.5, 2.0, 3.0)  # weights to choose from; the first if all do alike


def fit_calibration(logits, films, labels, prior):
    """Return the other breast's weight, and the temperature of films judged beside it.

    They make the labels (n,) of validation films most likely.
    """
    judged = {w: beside_other_breast(logits, films, w) for w in OTHER_BREAST}
    found = {w: fit_temperature(judged[w], labels, prior) for w in OTHER_BREAST}
    weight = min(found, key=found.get)
    return weight, found[weight][1]


# %% Look: the stages with their parameters and output shapes
# The stem quarters the resolution, layer1 keeps it, layers 2 to 4 halve it and double the channels;
# the deeper a stage, the more parameters. With three stages frozen, 94 % of them still learn.
if __name__ == "__main__":
    prepared = common.open_prepared()
    look_films, look_labels, _ = data.MammogramDataset(prepared).__getitems__(range(4))
    look_films = look_films.to(next(model.parameters()).device) / 255
    rows, features = [], look_films[:1].expand(-1, 3, -1, -1)
    stage_names = ["stem", "layer1", "layer2", "layer3", "layer4"]
    model.eval()
    with torch.no_grad():
        for name, stage in zip(stage_names, model.stages()):
            features = stage(features)
            rows.append((name, tuple(features.shape[1:]), list(stage.parameters())))
    heads = [p for n, p in model.named_parameters() if not n.startswith("backbone.")]
    rows.append(("heads", (len(CLASS_NAMES),), heads))
    layers = pd.DataFrame(rows, columns=["stage", "output", "parameters"])
    tensors = layers.pop("parameters")
    layers["parameters"] = [sum(p.numel() for p in part) for part in tensors]
    layers["trained"] = [sum(p.numel() for p in part if p.requires_grad) for part in tensors]
    common.table(layers, f"{layers['parameters'].sum():,} parameters")


# %% Look: what the network says of four films, and what two stages see on one of them
# Before training it says nearly the same of every film. The early stages already see skin, muscle
# and strands: that is what pretraining gives.
if __name__ == "__main__":
    model.eval()
    shown_films = look_films.to(next(model.parameters()).device)
    with torch.no_grad():
        logits, places = (part.cpu() for part in model(shown_films))
        early = model.stages()[0](shown_films[:1].expand(-1, 3, -1, -1))
        late = model.stages()[2](model.stages()[1](early))
    output = pd.DataFrame(F.softmax(logits, 1).numpy(), columns=[f"p_{c}" for c in CLASS_NAMES])
    output.insert(0, "label", [CLASS_NAMES[label] for label in look_labels])
    common.table(output.round(3), "what the network says as it is now")
    print(f"logits {tuple(logits.shape)}, of places {tuple(places.shape)}. {common.DISCLAIMER}")
    figure, axes = plt.subplots(1, 7, figsize=(10, 3.2), layout="constrained")
    maps = [part.cpu() for part in (shown_films[0, 0], *early[0, :3], *late[0, :3])]
    titles = ["film", *(f"stem {n}" for n in range(3)), *(f"layer2 {n}" for n in range(3))]
    for axis, channel, title in zip(axes, maps, titles):
        axis.imshow(channel.numpy(), cmap="gray")
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    figure.suptitle("A film, and three channels of two stages", fontsize=10)
    common.show(figure, prepared.folder / "figures" / "stages.png")
