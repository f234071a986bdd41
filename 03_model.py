"""Step 3: the ResNet18, for one grey channel and three classes.

In:  ImageNet weights (torchvision's download, a state dict of yours, or none).
Out: build_model() and what belongs to it. Nothing is written but a figure.

    python 03_model.py                          shows the layers and what the network says
    python 03_model.py --weights resnet18.pth   with a state dict that you have
"""

# %% Imports: this script finds its own folder first, whatever the working directory is
import importlib
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Optional

sys.path.insert(0, str(Path(globals().get("__file__", "cell")).resolve().parent))

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

import common
from common import BENIGN, CLASS_NAMES, MALIGNANT, NORMAL, UserError

data = importlib.import_module("02_dataset")


# %% Settings: change a value and run the cells below again; each name is a command-line flag
@dataclass
class Settings(common.ScriptSettings):
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


if __name__ == "__main__":
    torch.manual_seed(0)
    head = new_head(512)
    rows = [f"{p:.2f}" for p in F.softmax(head(torch.randn(512)), 0).tolist()]
    print(head, "says of features drawn at random:", rows)


# %% The network, a map of places: torchvision's ResNet18, its stages and their shapes
# Each stage halves the film; what is left is a grid, and a place is one square of it, with its own
# three logits. plain: what most projects do, the mean over the places of the last stage (32 px).
# lesion: places of 16 px, by a second head on the stage before (a skip connection as in FCN-16s,
# Long, Shelhamer and Darrell, CVPR 2015); a film's logits are the mean over its strongest places,
# and in training the radiologists' circles say where the lesions are.
class MammogramNet(nn.Module):
    """ResNet18 whose head classifies every place; places are pooled to logits of the film.

    "plain" equals torchvision's average pooling and linear layer, since both are linear.
    """

    TOP = 4  # strongest places of each class, by their log-odds against normal; 1 of 144 if more
    MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)  # of ImageNet, torchvision's values
    STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)

    def __init__(self, recipe="lesion", dropout=0.2):
        from torchvision.models import resnet18  # more than a second to import

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

    def head_parameters(self):
        """Return the parameters that no ResNet18 has, those of the heads."""
        return [p for name, p in self.named_parameters() if not name.startswith("backbone.")]

    def frozen_features(self, films):
        """Return what the frozen stages, but for the last, make of films; always the same."""
        features = (films.expand(-1, 3, -1, -1) - self.MEAN.to(films)) / self.STD.to(films)
        for stage in self.stages()[: min(self.frozen, 4)]:
            features = stage(features)
        return features

    def forward(self, films, features=None):
        """Classify films, float (B, 1, H, W), 0 (black) to 1, or go on from frozen features.

        Returns logits of the films (B, 3), in the order of CLASS_NAMES, and of every place
        (B, 3, h, w), h = ceil(H / 32) for "plain" and ceil(H / 16) for "lesion".
        """
        coarse = self.frozen_features(films) if features is None else features
        for stage in self.stages()[min(self.frozen, 4) :]:
            fine, coarse = coarse, stage(coarse)
        places = self.classify(self.head, coarse)
        if not self.lesion:
            return places.mean((2, 3)) + self.film_bias, places
        places = F.interpolate(places, fine.shape[2:], mode="bilinear", align_corners=False)
        places = places + self.classify(self.skip_head, fine)
        against_normal = (places - places[:, NORMAL : NORMAL + 1]).flatten(2)
        count = max(self.TOP, round(against_normal.shape[2] / 144))  # 16 of a film with windows
        return against_normal.topk(count, dim=2).values.mean(2) + self.film_bias, places

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


def numbers_in(parameters):
    """Return how many numbers parameters hold."""
    return sum(parameter.numel() for parameter in parameters)


if __name__ == "__main__":
    untrained = MammogramNet(settings.recipe, settings.dropout).eval()
    part, columns = torch.zeros(1, 3, 512, 288), ["stage", "output", "parameters"]
    title = ("stem", "layer1", "layer2", "layer3", "layer4")
    with torch.no_grad():
        row = [tuple(output.shape[1:]) for output in untrained(part[:, :1])]
        rows = [("heads", f"{row[1]}, of the film {row[0]}", untrained.head_parameters())]
        for name, stage in zip(title, untrained.stages()):
            part = stage(part)
            rows.insert(-1, (name, tuple(part.shape[1:]), stage.parameters()))
    layers = pd.DataFrame(rows, columns=columns)
    layers["parameters"] = layers["parameters"].map(numbers_in)
    common.table(layers, f"{layers['parameters'].sum():,} parameters; outputs of 512 x 288 px")


# %% The weights it begins with: torchvision's ImageNet weights, a file, a run, or a random start
# Filters learned on a million photographs see edges and textures on films too; 322 films alone
# teach little of it. A large database teaches more: a run remembers which films and patients it was
# trained or chosen on, so that step 4 can refuse a leak. Nothing that is read can run code.
class Weights(NamedTuple):
    """What a network begins with."""

    state: Optional[dict]  # of torchvision's resnet18, or of an earlier run; None: a random start
    name: str
    seen: dict = {}  # of a run: digests of its "films", and "patients" as source/patient


def flat(values, name=""):
    """Yield the values of nested dicts, each with its dotted name."""
    for key, value in values.items():
        nested = isinstance(value, dict)
        yield from flat(value, f"{name}{key}.") if nested else [(f"{name}{key}", value)]


def read_weights(name, fold=0, look=common.LOOKS[0]):
    """Return the Weights of a file or a run.

    What stands before the names of resnet18 (state_dict, module, _orig_mod, net ...) is taken off;
    tensors without it, as those of a loss, are not the network's.
    """
    path = common.weights_file(name, fold, look)
    values, seen, label = common.read_checkpoint(path), {}, f"file {path.name}"
    if "validation" in values:  # of step 4
        record, seen = values["record"], values["seen"]
        made = filter(None, [record["source_used"], record["note"], record["weights_used"]])
        label = f"run {record['run']} ({'; '.join(made)})"
        print(f"weights: {path}, fold {values['fold']} of {label}")
    values, known = dict(flat(values["model"] if seen else values)), "layer1.0.conv1.weight"
    before = sorted({k[: -len(known)] for k in values if k.endswith(known)}) or [""]
    what = f"{path} holds several networks, save the state dict of one; their names begin with"
    common.refuse(before if len(before) > 1 else (), what)
    state = {k[len(before[0]) :]: v for k, v in values.items() if k.startswith(before[0])}
    state.update({k: v for k, v in values.items() if seen and not k.startswith(before[0])})  # heads
    broken = [k for k, v in state.items() if torch.is_tensor(v) and not torch.isfinite(v).all()]
    common.refuse(broken, f"{path} cannot be trained on, since it holds NaN or infinite values")
    return Weights(state, label, seen)


def load_weights(weights, fold=0, look=common.LOOKS[0]):
    """Return the Weights that the setting names; of a run, of the fold and look if it has them."""
    weights = str(weights)
    if weights == "none":
        return Weights(None, "none (random start)")
    if weights not in ("auto", "imagenet"):
        return read_weights(weights, fold, look)
    from torchvision.models import ResNet18_Weights

    chosen = ResNet18_Weights.IMAGENET1K_V1
    cached = Path(torch.hub.get_dir()) / "checkpoints" / chosen.url.rsplit("/", 1)[-1]
    try:
        state = common.read_checkpoint(common.download(chosen.url, cached, cached.stem[-8:]))
        return Weights(state, "ImageNet (IMAGENET1K_V1)")
    except ConnectionError as error:
        reason = str(error)
    if weights == "imagenet":
        what = f"the ImageNet weights could not be had from {chosen.url} ({reason})"
        raise UserError(f"{what}; name a file with --weights FILE, or try --weights none")
    common.banner(
        f"NO IMAGENET WEIGHTS ({reason}): going on from a RANDOM START, much weaker on mammograms.",
        f"Download {chosen.url} elsewhere and name it with --weights FILE.",
    )
    return Weights(None, "none (random start)")


def build_model(weights="auto", recipe="lesion", dropout=0.2, freeze=-1):
    """Build the network, in training mode; return it and the name of its weights.

    `weights` is as in the settings, or what `load_weights` returned.
    """
    state, name, seen = weights if isinstance(weights, Weights) else load_weights(weights)
    model = MammogramNet(recipe, dropout)
    if state is not None:
        heads = {k: v for k, v in model.state_dict().items() if not k.startswith("backbone.")}
        fitting = {k: v for k, v in state.items() if k in heads and v.shape == heads[k].shape}
        others = ("fc.", "head.", "skip_head.", "film_bias") if seen else ("fc.",)
        state = {key: value for key, value in state.items() if not key.startswith(others)}
        try:
            model.load_state_dict(fitting, strict=False)
            model.backbone.load_state_dict(state)
        except (RuntimeError, AttributeError) as error:  # other names, other shapes, no tensors
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{name} is no resnet18 ({reason})") from None
        model.keep_statistics = model.lesion  # batch-norm statistics of eight films are noise
    return model.freeze((0 if state is None else 3) if freeze < 0 else freeze), name


if __name__ == "__main__":
    torch.manual_seed(0)
    part = settings.weights, settings.recipe, settings.dropout, settings.freeze
    model, weights_name = build_model(*part)
    part = numbers_in(p for p in model.parameters() if p.requires_grad)
    print(f"weights: {weights_name}; {model.frozen} of 5 stages are frozen, {part:,} numbers learn")


# %% What it says of four films, and where it looked: Grad-CAM and the map of places
# Each film is read together with its top-to-bottom flip, which training showed too. Grad-CAM
# (Selvaraju et al., ICCV 2017) weighs the channels of a stage with the mean gradient of a class's
# logit; here of benign or malignant, whichever is likelier. The stage is the last one that all
# places pass: layer4, or layer3 where the second head reads it. Before training it says nearly the
# same of every film.
class Reading(NamedTuple):
    """What a model says of n films, on the CPU, in the order of the dataset."""

    logits: torch.Tensor  # (n, 3), of each film alone, not calibrated
    cams: np.ndarray = None  # (n, h, w), Grad-CAM of the lesion class a network finds likelier
    places: np.ndarray = None  # (n, h', w'), 0 to 1, of that class against normal, per place


KEPT = 2**29  # bytes of frozen features that are kept at most


def predict(model, dataset, batch_size=8, dtype=torch.float32, bar=None, maps=False, kept=None):
    """Return the Reading of a dataset, in evaluation mode; Grad-CAM and places if `maps`.

    A list `kept` takes the frozen features of the films, up to KEPT bytes; called with it again,
    they are not computed again. Without `maps` only.
    """
    device, caught, parts = next(model.parameters()).device, {}, []
    stage = model.backbone.layer3 if model.lesion else model.backbone.layer4

    def keep(module, inputs, output):
        caught["stage"] = output.detach().requires_grad_()
        return caught["stage"]

    model.eval()
    # of larger films fewer at once, for they take as much memory as those of 512 x 288
    pixels = math.prod(dataset.films.shape[1:]) / dataset.reduce**2
    fewer = math.ceil(batch_size * min(1, 512 * 288 / pixels))
    known = bool(kept)
    read = (films for films, _, _ in data.batches(dataset, fewer))  # draws a number for dropout
    with stage.register_forward_hook(keep), torch.set_grad_enabled(maps):
        for part in kept if known else read:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                if not known:
                    films = part.to(device).float() / 255
                    part = model.frozen_features(torch.cat([films, films.flip(2)]))
                each, places = model(None, part)
            if kept is not None and not known and model.frozen:
                total = part.nbytes * 2 * len(dataset) / len(part)
                kept += [part] if total <= KEPT else []
            logits = torch.stack(each.float().chunk(2)).mean(0)
            heat = heat_maps(logits, places.detach().float(), caught["stage"]) if maps else []
            parts.append([logits.detach().cpu(), *heat])
            if bar:
                bar.step(len(part) // 2)
    logits, *heat = zip(*parts)
    return Reading(torch.cat(logits), *(torch.cat(part).numpy() for part in heat))


def heat_maps(logits, places, stage):
    """Return Grad-CAM and places of the likelier lesion class, mirror images turned back."""
    lesion = torch.where(logits[:, MALIGNANT] > logits[:, BENIGN], MALIGNANT, BENIGN)
    (gradient,) = torch.autograd.grad(logits.gather(1, lesion[:, None]).sum(), stage)
    weight = gradient.float().mean((2, 3), keepdim=True)
    cams = F.relu((weight * stage.detach().float()).sum(1))
    against_normal = places[torch.arange(len(places)), lesion.repeat(2)] - places[:, NORMAL]
    heat = [cams.chunk(2), against_normal.sigmoid().chunk(2)]
    return [((film + mirrored.flip(1)) / 2).cpu() for film, mirrored in heat]


def mean_reading(readings):
    """Average Readings with maps of the same films; Grad-CAMs count alike, 1 at their highest."""
    shape = max(reading.places.shape[1:] for reading in readings)

    def mean(maps):
        maps = [F.interpolate(torch.from_numpy(m)[:, None], shape, mode="bilinear") for m in maps]
        return torch.cat(maps, 1).mean(1).numpy()

    cams = mean([r.cams / r.cams.max((1, 2), keepdims=True).clip(1e-9) for r in readings])
    logits = torch.stack([reading.logits for reading in readings]).mean(0)
    return Reading(logits, cams, mean([reading.places for reading in readings]))


if __name__ == "__main__":
    prepared = common.open_prepared()
    rows = prepared.labels["patient"].isin(prepared.labels["patient"].unique()[:2])
    four = data.MammogramDataset(prepared, np.flatnonzero(rows))
    four = four.reduced(data.reduction(prepared.films))
    four_read = predict(model, four, maps=True)
    output = pd.DataFrame(F.softmax(four_read.logits, 1).numpy(), columns=[*CLASS_NAMES]).round(3)
    output.insert(0, "label", [CLASS_NAMES[label] for label in four.labels])
    common.table(output.set_axis(four.images[four.rows]), "what the network says as it is now")
    options = [(name, row) for name in ("", ", Grad-CAM", ", places") for row in four.rows]
    pictures = [(four.images[row] + name, prepared.films[row]) for name, row in options]
    title = f"{len(four)} films; below them Grad-CAM, and places by how suspicious (bright: more)"
    figure, axes = common.draw_films(pictures, title, rows=3, size=(7, 9))
    options = {"cmap": "inferno", "alpha": 0.5, "extent": (0, *prepared.films.shape[:0:-1], 0)}
    for axis, part in zip(axes[len(four) :], [*four_read.cams, *four_read.places]):
        axis.imshow(part, **options)  # extent: left, width, height, top
    common.show(figure, prepared.folder / "figures" / "four-films.png")
    print(common.DISCLAIMER)


# %% The other breast: a film is judged beside the same patient's other one
# Breasts of one woman are alike, so that what both show is her tissue and what one shows is news:
# to a film's logits a weight times their excess over the other's is added. How much that says
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


if __name__ == "__main__":
    beside = four.table()[["image", "patient", "laterality"]].reset_index(drop=True)
    rows = four_read.logits, beside_other_breast(four_read.logits, beside)
    for name, part in zip(("alone", "beside"), rows):
        beside[f"malignant - normal, {name}"] = (part[:, MALIGNANT] - part[:, NORMAL]).numpy()
    common.table(beside.round(4), f"logits of {len(four)} films, alone and beside the other")


# %% Probabilities that mean what they say: one film under three priors and temperatures
# Training saw the classes equally often: Bayes' rule puts their frequency back in, and a
# temperature chosen on validation films mends what is too sure (Guo, Pleiss, Sun and Weinberger,
# ICML 2017). The decision favours rare classes, or nearly every film would be called normal.
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
    return (probabilities / np.asarray(prior) ** tempering).argmax(1)


def fit_temperature(logits, labels, prior):
    """Return the loss of validation labels (n,) and the temperature, 0.05 to 20, of the least."""
    candidates = torch.linspace(-3, 3, 1201).exp()  # steps of half a per cent
    posterior = F.log_softmax(calibrated(logits.float(), candidates[:, None, None], prior), 2)
    losses = -posterior[:, torch.arange(len(labels)), labels].mean(1)
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


def worded(logits, prior, temperature):
    """Return the probabilities of one film's logits (1, 3), and what it is called."""
    prior = torch.tensor(prior) / sum(prior)
    p = probabilities(logits, temperature, prior)
    return temperature, *p[0].round(3), CLASS_NAMES[decide(p, prior, 0.33)[0]]


if __name__ == "__main__":
    options = {"equal": [1, 1, 1], "MIAS": [63, 207, 52], "screening": [20, 975, 5]}
    part = torch.tensor([[0.5, -0.5, 1.0]])
    rows = [(n, *worded(part, options[n], t)) for n in options for t in (0.5, 1.0, 2.0)]
    columns = ["prior", "temperature", *CLASS_NAMES, "called, tempering 0.33"]
    common.table(pd.DataFrame(rows, columns=columns), "the logits 0.5, -0.5, 1.0 as probabilities")
