"""Step 4: train the ResNet18, one fold of the cross-validation or all of them.

In:  what step 1 prepared (it is run if nothing is).
Out: runs/<run>/settings.json, history.csv, figures/, fold-K/best.pt and fold-K/last.pt of whole
     films, and fold-K-window/ of windows of large ones.

    python 04_train.py                      fold 0 with the default settings
    python 04_train.py --fold all           every fold, for figures that mean something
    python 04_train.py --recipe plain       the recipe of most public projects, to compare with
    python 04_train.py --resume             goes on with the newest run where it stopped
    torchrun --nproc-per-node 2 -- 04_train.py --fold all  the folds spread over two processes
"""

# %% Imports: this script finds its own folder first, whatever the working directory is
import contextlib
import copy
import importlib
import itertools
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Tuple

sys.path.insert(0, str(Path(globals().get("__file__", "cell")).resolve().parent))

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.ticker import MaxNLocator
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import RandomSampler

import common
from common import CLASS_NAMES, MALIGNANT, NORMAL, UserError

data = importlib.import_module("02_dataset")
network = importlib.import_module("03_model")


# %% Settings: change a value and run the cells below again; each name is a command-line flag
@dataclass
class Settings(data.Settings, network.Settings, common.RunSettings):
    """One training run; `settings.fold = "all"` and the like also set what is inherited.

    From step 2: source, fold, validation, train_share, augment; from step 3: weights, recipe,
    freeze, dropout; from common.py: seed, batch_size, run, device, precision.
    """

    script = "04_train.py"
    resume: bool = False  # go on with this run, or with the newest one
    overwrite: bool = False  # delete a run of this name first
    balance: Literal["sampler", "loss", "none"] = "sampler"  # how rare classes count: never both
    shuffle_labels: bool = False  # leak test: labels permuted between patients; see the fold mean
    epochs: int = 0  # at most; 0: 5 from a run, 10 from a file, 20 at random; windows 1.6 times
    lr: float = 1e-3  # rate of the new head at first, Adam; rates fall to zero along a cosine
    backbone_lr: float = 1e-4  # rate of the pretrained stages; a random start takes `lr` for both
    label_smoothing: float = 0.1  # share of the target spread over the classes
    lesion_weight: float = 1.0  # weight of the circles' loss beside the films'; recipe lesion only
    looks: Tuple[str, ...] = ("auto",)  # whole, window or both, a network each; auto: by the canvas
    ema: float = 0.9  # share of the averaged weights kept at each step; the average is judged
    patience: int = 0  # epochs without a better loss that end the training; 0: half of all
    max_norm: float = 5.0  # gradients longer than this are shortened to it; 0: none are


settings = common.command_line(Settings, __doc__)


# %% The films of the first fold: what trains, and what chooses
# No test film is trained or chosen on. Under torchrun several folds are dealt out to the
# processes; a single one is trained by all of them together. With settings.resume the settings of
# the run that goes on take the place of those that were left at their defaults.
def fold_films(prepared, fold, settings):
    """Return the training and the validation films of a fold, two MammogramDatasets."""
    parts = data.fold_parts(prepared, fold, settings.validation, settings.train_share)
    shuffle = settings.shuffle_labels
    labels = data.shuffled_labels(prepared.labels, settings.seed) if shuffle else None
    return [data.MammogramDataset(prepared, parts[n], labels) for n in ("train", "validation")]


def shares_used(train_films, validation_films, fold):
    """Return the shares of patients that validate a fold and, of the others, that train it.

    UserError if two of training, validation and test films have a patient in common: a leak.
    """
    train, kept = ({*films.table()["patient"]} for films in (train_films, validation_films))
    splits = train_films.prepared.splits
    there = {*splits["patient"][splits["fold"] != fold]}
    what = f"training, validation and test films of fold {fold} may have no patient in common"
    common.refuse(sorted(train & kept | (train | kept) - there), f"{what}; leave out films of")
    used = len(kept) / len(there), len(train) / len(there - kept)
    return dict(zip(("validation_used", "train_share_used"), used))


part = common.record_in(common.find_run(settings.run)) if settings.resume else {}
prepared = common.open_prepared(part.get("source_used", settings.source))
settings = common.taken_up(settings, prepared)
all_folds = data.named_folds(settings.fold, prepared.splits)
rank, count = common.processes()
dealt = count > 1 and len(all_folds) > 1
folds = all_folds[rank::count] if dealt else all_folds
first_fold = (folds or all_folds)[0]
train_films, validation_films = fold_films(prepared, first_fold, settings)
FILMS_BY = ("source", "fold", "validation", "train_share", "shuffle_labels", "seed")
record = {name: getattr(settings, name) for name in FILMS_BY}
part = {"train": train_films.labels, "validation": validation_films.labels}
part = {name: np.bincount(labels, minlength=3) for name, labels in part.items()}
title = f"films of fold {first_fold}; folds to train: {common.listing(all_folds)}"
common.table(pd.DataFrame(part, index=CLASS_NAMES), title)
rows = [name for name, n in zip(CLASS_NAMES, part["train"]) if not n]
common.warn_of(rows, "classes have no film to train on, and are not learned")
part = shares_used(train_films, validation_films, first_fold)
title = "of the patients outside the fold {validation_used:.2f} validate"
print((title + ", of the others {train_share_used:.2f} train").format(**part))


# %% The network, its optimiser, and how long each look may train
# What stands here after the cell is what is trained first: change `optimizer`, or epochs and
# patience in `schedule`; the network itself in step 3. The new head learns at ten times the rate of
# pretrained stages. Networks of the other look and of later folds are made by the same function.
def marks(prepared):
    """Return by what each film is known again, and its patient, a DataFrame of text."""
    patients = prepared.source + "/" + prepared.labels["patient"]
    return pd.DataFrame({"films": prepared.table["digest"], "patients": patients})


def weights_for(settings, fold, look, validation_films):
    """Load what a look of a fold begins with; refused if it saw a test film or patient of it.

    Validation films that it saw are named in a warning.
    """
    weights = network.load_weights(settings.weights, fold, look)
    prepared = validation_films.prepared
    names, test = prepared.labels["image"], prepared.splits["fold"] == fold
    seen = marks(prepared).isin(weights.seen).any(axis=1)
    known = names[seen & test]
    what = f"--weights {settings.weights}: {weights.name} was trained or chosen on {len(known)} of"
    what += f" the {test.sum()} test films of fold {fold}, or on their patients, and would know the"
    common.refuse(known, f"{what} answers; take one that saw none of")
    what = f"validation films of fold {fold} were seen by --weights, and will judge it too well"
    common.warn_of(names[seen & names.index.isin(validation_films.rows)], what)
    return weights


def network_and_optimizer(settings, weights):
    """Return the model and the optimiser that a fold begins with."""
    device = common.choose_device(settings.device)
    torch.manual_seed(settings.seed)
    model, _ = network.build_model(weights, settings.recipe, settings.dropout, settings.freeze)
    model = model.to(device, memory_format=torch.channels_last)
    backbone = [p for p in model.backbone.parameters() if p.requires_grad]
    head = model.head_parameters()
    slower = settings.lr if weights.state is None else settings.backbone_lr
    groups = [{"params": head, "lr": settings.lr}, {"params": backbone, "lr": slower}]
    fused = device.type in ("cpu", "cuda")  # one pass over the weights in place of many
    return model, torch.optim.Adam(groups, fused=fused)


def precision_of(model, settings):
    """Return the dtype in which a network computes on its device."""
    return common.choose_precision(settings.precision, next(model.parameters()).device)


def described(model, weights, settings):
    """Return what settings.json notes of a network."""
    device, dtype = next(model.parameters()).device, precision_of(model, settings)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    facts = {"weights_used": weights.name, "frozen_stages": model.frozen}
    facts.update(parameters_trained=learning, device_used=str(device))
    return {**facts, "precision_used": str(dtype)[6:]}


def looks_of(settings, prepared):
    """Return the looks to train, some of LOOKS; both by default, if most lesions have circles."""
    looks = [*settings.looks]
    large = data.reduction(prepared.films) > 1 and settings.recipe == "lesion"
    if looks == ["auto"]:
        circled = prepared.findings.dropna(subset=["canvas_radius"])["image"].nunique()
        most = circled > (prepared.labels["label"] != NORMAL).sum() / 2
        looks = [*common.LOOKS] if large and most else [common.LOOKS[0]]
    if not looks or not set(looks) <= set(common.LOOKS) or "window" in looks and not large:
        need = f"windows need a canvas of {2 * data.ROWS} rows or more and the recipe lesion"
        raise UserError(f"--looks {' '.join(looks)}: expected whole or window, or both; {need}")
    return list(dict.fromkeys(looks))


def filled_in(settings, prepared, weights):
    """Return all settings as a dict, those filled in that were left to the kind of start.

    With pretrained weights a network learns in fewer epochs, and gently below its head; one that
    begins with a run knows mammograms and takes half as many.
    """
    values, pretrained = asdict(settings), weights.state is not None
    epochs = settings.epochs or (5 if weights.seen else 10 if pretrained else 20)
    values.update(epochs=epochs, looks=looks_of(settings, prepared))
    values["patience"] = settings.patience or max(epochs // 2, 1)
    values["backbone_lr"] = settings.backbone_lr if pretrained else settings.lr
    # step 5 makes the same anew
    values["network"] = common.fingerprint(network.MammogramNet(settings.recipe, settings.dropout))
    return values


WAITS = ["epochs", "patience"]


def schedule_of(values):
    """Return WAITS of each look: a window is a part of a film, and takes 1.6 times as long."""
    longer = [1.6 if look == "window" else 1.0 for look in values["looks"]]
    rows = [[round(times * values[name]) for name in WAITS] for times in longer]
    return pd.DataFrame(rows, index=values["looks"], columns=WAITS)


if settings.run in Path(settings.weights).parts:
    raise UserError(f"the run {settings.run} cannot begin with itself; choose another --run")
first_look = looks_of(settings, train_films.prepared)[0]
with common.first_process_first():
    weights = weights_for(settings, first_fold, first_look, validation_films)
values = filled_in(settings, train_films.prepared, weights)
schedule = schedule_of(values)
model, optimizer = network_and_optimizer(settings, weights)
part = {**values, **{name: record[name] for name in FILMS_BY}}
record = {**common.record_of(part, train_films.prepared), **described(model, weights, settings)}
print(f"weights: {weights.name}; {record['parameters_trained']:,} parameters learn")
common.table(schedule, "how many epochs at most, and how many without a better loss")


# %% One batch: films in, loss out
# A film's label says that there is a lesion, a circle says where. One film has hundreds of places
# and few in a circle, so that those inside and those outside count half each. Here in evaluation
# mode, so that looking changes nothing of what is trained. Three equally likely classes would give
# ln 3 = 1.10 for the films and 1.10 for the places; an untrained head may be a little worse.
def lesion_loss(places, circles, known):
    """Cross-entropy of every place with what the circles say about it.

    Parameters
    ----------
    places : float tensor, shape (B, 3, h, w)
        Logits.
    circles : float tensor, shape (B, 2, H, W)
        Benign and malignant, 0 to 1; a place takes the largest value in its reach.
    known : bool tensor, shape (B,)
        Films whose circles are the whole truth; the others are left out.

    Returns
    -------
    loss : float tensor, scalar
        Places inside and outside of circles count half each: inside are about 1 %.
    """
    if any(n % m for n, m in zip(circles.shape[2:], places.shape[2:])):
        circles = circles.cpu()  # where sizes do not divide, torch to 2.13 is wrong on Apple's MPS
    benign, malignant = F.adaptive_max_pool2d(circles, places.shape[2:]).to(places.device).unbind(1)
    benign = (benign - malignant).clamp(0, 1)  # where both overlap, the worse counts
    wanted = torch.stack([benign, 1 - benign - malignant, malignant], 1)
    loss = F.cross_entropy(places.float(), wanted, reduction="none")  # (B, h, w)
    inside = (benign + malignant) * known[:, None, None]
    outside = (1 - benign - malignant) * known[:, None, None]
    return 0.5 * sum((loss * part).sum() / part.sum().clamp(min=1) for part in (inside, outside))


def seen_by(look, dataset):
    """Return a MammogramDataset as a look has it: whole films of large canvases are reduced."""
    return dataset.reduced(data.reduction(dataset.films) if look == "whole" else 1)


def batch_loss(model, batch, dataset, look, settings, generator):
    """Augment a batch (films, labels, rows); return its loss and which films were right (B,)."""
    films, labels, rows = batch
    device, circles, centres = next(model.parameters()).device, None, None
    films = films.to(device).float().div_(255)  # in place: large films take a while
    # Circles of true labels would give shuffled ones away; own films may have none.
    if settings.recipe == "lesion" and dataset.circles and not settings.shuffle_labels:
        circles, known = (part.to(device) for part in dataset.lesion_maps(rows))
    window = 1 / data.reduction(dataset.films) if look == "window" else 1.0
    if window < 1:
        centres = data.window_centres(dataset, rows, window, generator)
    strength = settings.augment
    films, circles = data.augment(films, labels, generator, strength, circles, window, centres)
    if centres is not None and circles is not None:
        labels = data.window_labels(labels, circles, known)
    dtype = precision_of(model, settings)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        logits, places = model(films)
    weight = data.class_weights(dataset.labels).to(device) if settings.balance == "loss" else None
    smoothing = settings.label_smoothing
    loss = F.cross_entropy(logits.float(), labels.to(device), weight, label_smoothing=smoothing)
    if circles is not None:
        loss = loss + settings.lesion_weight * lesion_loss(places, circles, known)
    return loss, logits.detach().argmax(1).cpu() == labels


@contextlib.contextmanager
def enough_memory(batch_size):
    """Put a lack of memory into words; films, maps and outputs of layers have to fit at once."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        if not any(t in text for t in ("out of memory", "allocate memory", "not enough memory")):
            raise
        raise UserError(f"out of memory; try --batch-size {max(batch_size // 2, 1)}") from None


generator = torch.Generator().manual_seed(settings.seed)
sampler = data.balanced_sampler(train_films.labels, generator)
part = seen_by(first_look, train_films)
batch = next(iter(data.batches(part, settings.batch_size, sampler)))
with torch.no_grad(), enough_memory(settings.batch_size):
    rows = batch_loss(model.eval(), batch, part, first_look, settings, generator)
print(f"a batch {tuple(batch[0].shape)} before training: loss {rows[0].item():.3f}")


# %% What an untrained network scores: little more than always answering "normal"
# Films are judged beside the other breast, as they are in the end: that one's weight and the
# temperature are fitted on the validation films, and their loss with these chooses the epoch, so
# that mere overconfidence does not. What is chosen and judged on the same films looks too good.
from sklearn.metrics import accuracy_score, f1_score, recall_score


def judge(logits, films, prior):
    """Return the metrics of validation films (a MammogramDataset) with logits (n, 3)."""
    labels, table = films.labels, films.table()
    weight, temperature = network.fit_calibration(logits, table, labels, prior)
    judged = network.beside_other_breast(logits, table, weight)
    judged = network.calibrated(judged, temperature, prior)
    predicted = judged.argmax(1)
    recall = recall_score(labels == MALIGNANT, predicted == MALIGNANT, zero_division=0)
    f1 = f1_score(labels, predicted, average="macro", zero_division=0)
    values = {"val_loss": F.cross_entropy(judged, labels).item()}
    values.update(val_accuracy=accuracy_score(labels, predicted), val_macro_f1=f1)
    return {**values, "val_malignant_recall": recall}


def no_number(loss, state, where):
    """Return the UserError of a loss that is no finite number."""
    what = f"the loss became {loss} in epoch {state.progress['epoch'] + 1} {where}"
    return UserError(f"{what}; the last good checkpoint is kept. Try a lower --lr")


def validate(state):
    """Return the logits of the validation films, of the averaged weights, and their metrics."""
    films = state.validation_films
    rows = films.rows[state.rank :: state.count]
    share = data.MammogramDataset(films.prepared, rows, reduce=films.reduce)
    for buffer in state.average.buffers() if state.count > 1 else ():
        torch.distributed.broadcast(buffer, 0)  # batch-norm statistics are each process's own
    dtype = precision_of(state.model, state.settings)
    part = state.average.module, share, state.settings.batch_size, dtype
    read = network.predict(*part, kept=state.kept).logits
    logits = torch.empty(len(films), len(CLASS_NAMES))
    for number, part in enumerate(common.collect(read) if state.count > 1 else [read]):
        logits[number :: state.count] = part
    metrics = judge(logits, films, state.prior)
    if not np.isfinite(metrics["val_loss"]):
        raise no_number(metrics["val_loss"], state, "on the validation films")
    return logits, metrics


part = validation_films.rows[:64], validation_films.all_labels.numpy()
part = seen_by(first_look, data.MammogramDataset(train_films.prepared, *part))
with enough_memory(settings.batch_size):
    rows = network.predict(model, part, settings.batch_size, precision_of(model, settings)).logits
rows = judge(rows, part, data.prior_of(train_films.labels, settings.balance))
title = f"{len(part)} validation films"
common.table(pd.Series(rows).round(3).to_frame("untrained"), title)


# %% A fold's state: all that changes while it trains, so that it can be saved and taken up
# Single weights are noisy at 25 steps an epoch; their average over the last steps is not. The
# average is what is validated and kept: best.pt has all that it takes to judge a film, last.pt all
# that it takes to go on, on a CPU bit for bit.
class FoldState:
    """A fold in training with one look; `rank` of `count` processes that train it together.

    `waits` has WAITS; `films` are the training and the validation films, `parts` what
    `network_and_optimizer` returns; `saved` is the epoch of last.pt, `kept` for `network.predict`.
    """

    PARTS = ("model", "average", "optimizer")  # what has a state dict

    def __init__(self, fold, look, settings, waits, films, parts, rank=0, count=1):
        self.fold, self.look, self.settings, self.waits = fold, look, settings, waits
        self.rank, self.count, self.seen_before = rank, count, {}
        self.name, self.saved, self.kept = common.fold_name(fold, look), 0, []
        self.train_films, self.validation_films = (seen_by(look, part) for part in films)
        self.model, self.optimizer = parts
        if count > len(self.validation_films):
            raise UserError("more processes than validation films; start fewer")
        stepped = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if not stepped <= set(map(id, self.model.parameters())):
            cell = "run the cell 'The network, its optimiser' first"
            raise UserError(f"{cell}: `optimizer` holds the weights of another model")
        torch.manual_seed(settings.seed)  # dropout; each fold begins alike, alone or after others
        self.generator = torch.Generator().manual_seed(settings.seed)
        if settings.balance == "sampler":
            self.sampler = data.balanced_sampler(self.train_films.labels, self.generator)
        else:
            self.sampler = RandomSampler(self.train_films, generator=self.generator)
        self.prior = data.prior_of(self.train_films.labels, settings.balance)
        blend = get_ema_multi_avg_fn(settings.ema)
        self.average = AveragedModel(self.model, multi_avg_fn=blend, use_buffers=True)
        self.network = DistributedDataParallel(self.model) if count > 1 else self.model
        self.progress = {"epoch": 0, "best_loss": float("inf"), "best_epoch": 0, "history": []}

    def finished(self):
        """Tell whether all epochs are done, or the best one lies too far back."""
        waited = self.progress["epoch"] - self.progress["best_epoch"]
        return self.progress["epoch"] >= self.waits["epochs"] or waited >= self.waits["patience"]

    def take_note(self, row):
        """Add an epoch's row of history.csv; return whether it is the best so far."""
        row = {n: v if n in ("fold", "epoch", "look") else float(v) for n, v in row.items()}
        self.progress["history"].append(row)
        self.progress["epoch"], better = row["epoch"], row["val_loss"] < self.progress["best_loss"]
        if better:
            self.progress.update(best_loss=row["val_loss"], best_epoch=row["epoch"])
        return better

    def save(self, folder, record, logits=None):
        """Save the last state and, if it is the best so far, the logits of validation films."""
        if logits is not None:
            films, train = self.validation_films, self.train_films
            validation = films.table()[["image", "patient", "laterality"]].to_dict("list")
            own = marks(train.prepared).iloc[[*train.rows, *films.rows]]
            values = {"model": self.average.module.state_dict(), "prior": self.prior}
            values["validation"] = {**validation, "logits": logits, "labels": films.labels}
            values["seen"] = {n: sorted({*own[n], *self.seen_before.get(n, ())}) for n in own}
            values.update(reduce=films.reduce, epoch=self.progress["epoch"], fold=self.fold)
            values["record"] = record
            common.save_checkpoint(values, folder / self.name / "best.pt")
        states = {name: getattr(self, name).state_dict() for name in self.PARTS}
        generators = {"generator": self.generator.get_state(), "torch": torch.get_rng_state()}
        last = {**states, **generators, **self.progress, "record": record}
        common.save_checkpoint(last, folder / self.name / "last.pt")
        self.saved = self.progress["epoch"]
        common.write_history(self.progress["history"], folder / self.name)

    def take_up(self, folder):
        """Go on from last.pt, if the run does; name what is still good if it is damaged."""
        target = folder / self.name
        if not self.settings.resume:
            return
        try:
            if (target / "last.pt").is_file():
                state = common.read_checkpoint(target / "last.pt")
                for name in self.PARTS:
                    getattr(self, name).load_state_dict(state[name])
                self.generator.set_state(state["generator"])
                torch.set_rng_state(state["torch"])
                self.progress = {name: state[name] for name in self.progress}
        except (UserError, KeyError, ValueError, RuntimeError) as error:
            best = target / "best.pt"
            offer = f" {best} is still there and can be evaluated." if best.is_file() else ""
            raise UserError(f"{error}.{offer} To train this fold anew, delete {target}") from None
        self.saved = self.progress["epoch"]
        if self.count > 1:
            common.collect(None)  # all have read it before one writes
        if self.rank == 0 and self.saved:
            common.write_history(self.progress["history"], target)  # a kill may have come before


part = (train_films, validation_films), copy.deepcopy((model, optimizer))
state = FoldState(first_fold, first_look, settings, schedule.loc[first_look], *part)
rows = {name: len(getattr(state, name).state_dict()) for name in state.PARTS}
common.table(pd.Series(rows).to_frame("entries"), f"{state.name}: values that last.pt keeps")


# %% An epoch: batch, augment, forward, backward, step; then the validation films
# The usual five lines, and the averaged weights. A loss that is not a number ends the training with
# the films' names, before it can reach a checkpoint. Several processes draw the same order from the
# same seed, and each takes every n-th film of it, so that they see together what one would see in
# batches n times as large.
def epoch_batches(state):
    """Return a DataLoader; all processes must take part in every step."""
    size = state.settings.batch_size
    if state.count == 1:
        return data.batches(state.train_films, size, state.sampler)
    order = list(state.sampler)
    whole = len(order) // (size * state.count) * size * state.count
    if not whole:
        what = f"{len(order)} training films do not fill one batch of {state.count} processes"
        raise UserError(f"{what}; start fewer, or use a smaller --batch-size")
    return data.batches(state.train_films, size, order[:whole][state.rank :: state.count])


def train_epoch(state, progress):
    """Train on every batch of an epoch; return the mean loss and the accuracy."""
    state.model.train()
    total = hits = count = 0
    part = state.train_films, state.look, state.settings, state.generator
    for batch in epoch_batches(state):
        loss, right = batch_loss(state.network, batch, *part)
        value = loss.item()
        if not np.isfinite(value):
            names = common.listing(state.train_films.images[batch[2]])
            raise no_number(value, state, f"at the films {names}")
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if state.settings.max_norm:
            torch.nn.utils.clip_grad_norm_(state.model.parameters(), state.settings.max_norm)
        state.optimizer.step()
        state.average.update_parameters(state.model)
        total += value * len(right)
        hits += right.sum().item()
        count += len(right)
        progress.step(len(right) * state.count, f"loss {total / count:.3f}")
    if state.count > 1:
        total, hits, count = np.sum(common.collect((total, hits, count)), axis=0)
    return total / count, hits / count


def falling_rates(state):
    """Return the scheduler of a fold: half a cosine (Loshchilov and Hutter, ICLR 2017)."""

    def share(epoch):
        return 0.5 + 0.5 * math.cos(math.pi * epoch / state.waits["epochs"])

    return LambdaLR(state.optimizer, share, state.progress["epoch"] - 1)


def train_fold(state, folder, record):
    """Train a fold until it is finished or stopped; return whether it is finished."""
    films, words = len(state.train_films), state.name.replace("-", " ")
    began, epochs, scheduler = state.progress["epoch"], state.waits["epochs"], falling_rates(state)
    with contextlib.suppress(KeyboardInterrupt), enough_memory(state.settings.batch_size):
        while not state.finished():
            start, lr = time.perf_counter(), state.optimizer.param_groups[0]["lr"]
            epoch = state.progress["epoch"] + 1
            bar = common.Progress(films, f"{words} epoch {epoch}")
            loss, accuracy = train_epoch(state, bar)
            speed = films / (time.perf_counter() - start)
            logits, validation = validate(state)
            row = {"fold": state.fold, "epoch": epoch, "lr": lr}
            row.update(train_loss=loss, train_accuracy=accuracy, **validation)
            row["seconds"] = time.perf_counter() - start
            row.update(films_per_second=speed, look=state.look)
            better = state.take_note(row)
            if state.rank == 0:
                state.save(folder, record, logits if better else None)
                bar.close(common.history_line(row, epochs, better))
            scheduler.step()
        done, best = state.progress["epoch"], state.progress["best_epoch"]
        if done < epochs or done == began:
            why = "stopped early" if done < epochs else "was finished before"
            said = f"{words} {why}: {done} of {epochs} epochs are done, the best was {best}"
            print(f"{said}; --resume with larger --patience (or --epochs, if all are done) goes on")
        return True  # the stop button leads past this line
    saved = f"the state of epoch {state.saved} is saved" if state.saved else "no state is saved yet"
    print(f"\nstopped; {saved}")
    return False


print(f"an epoch: {len(epoch_batches(state))} batches; {len(validation_films)} films validate it")

# %% Train: every fold of settings.fold, with each look
# Stop it whenever you like: `trained_model` (the averaged weights of the first fold's best epoch),
# `history` and the checkpoints are there, and this cell goes on after settings.resume = True. It
# trains copies of `model` and `optimizer`: run again, it begins a new run from the same beginning.
settings = common.taken_up(settings, train_films.prepared)
values = filled_in(settings, train_films.prepared, weights)
part = (*WAITS, "run", "resume", "overwrite")  # may change since the network was made
rows = [name for name in values if name not in part and values[name] != record.get(name)]
rows = rows if "weights_used" in record else ["the films"]  # after the cell of the network
common.refuse(rows, "run the cells from 'The films of the first fold' on again, for changed are")
if any(values[name] != record[name] for name in WAITS):
    schedule = schedule_of(values)
trained_model, *rows = copy.deepcopy((model, optimizer))
run_folder = common.folder_of_run(settings, record)
record = {**record, **values, "run": run_folder.name, "schedule": schedule.T.to_dict()}
record.update(shares_used(train_films, validation_films, first_fold))
problems, whole = [], True
with common.recorded(run_folder, record, settings):
    for fold, look in itertools.product(folds, schedule.index):
        try:
            both, start, made = (train_films, validation_films), weights, (trained_model, *rows)
            if fold != first_fold:
                both = fold_films(train_films.prepared, fold, settings)
            if (fold, look) != (first_fold, first_look):
                part = settings, fold, look, both[1]
                start = weights_for(*part) if weights.seen else weights
                made = network_and_optimizer(settings, start)
            part = (0, 1) if dealt else (rank, count)
            state = FoldState(fold, look, settings, schedule.loc[look], both, made, *part)
            state.seen_before = start.seen
            state.take_up(run_folder)
            whole = train_fold(state, run_folder, record)
        except UserError as error:
            problems.append(f"{common.fold_name(fold, look).replace('-', ' ')}: {error}")
            if not dealt:  # the other processes go on
                raise
        if not whole:
            break
    problems, whole = sum(common.collect(problems), []), all(common.collect(whole))
    history = common.merge_histories(run_folder, rank == 0)
part = run_folder / common.fold_name(first_fold, schedule.index[0]) / "best.pt"
if part.is_file():
    trained_model.load_state_dict(common.read_checkpoint(part)["model"])
trained_model.eval()
if problems and rank == 0:
    raise UserError("; ".join(problems) + ". --resume goes on with these folds")
title = {"none": "01_prepare_data.py, then 04_train.py --weights"}.get(settings.fold)
title = (title or "05_evaluate.py --run") if whole else "04_train.py --resume --run"
print(f"run {run_folder.name}: {run_folder}\nNext: python {title} {run_folder.name}")


# %% The curves of loss, accuracy, macro-F1 and malignant recall, a line a fold and look
# Compare shapes, not heights: the training loss adds the circles' loss and label smoothing, on
# balanced batches. A validation loss that rises while the training loss falls is overfitting: with
# some thirty malignant films to learn from, that comes soon.
import seaborn as sns


def draw_history(history):
    """Draw three panels of history.csv; return the figure."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 5), layout="constrained")
    panels = {"loss": ["train_loss", "val_loss"], "accuracy": ["train_accuracy", "val_accuracy"]}
    panels["validation score"] = ["val_macro_f1", "val_malignant_recall"]
    best = history.loc[history.groupby(["fold", "look"])["val_loss"].idxmin()]
    options = {"hue": "curve", "palette": ["#0072B2", "#D55E00"], "style": "look", "units": "fold"}
    for axis, (label, names) in zip(axes, panels.items()):
        curves = history.melt(["fold", "look", "epoch"], names, "curve", label)
        options.update(data=curves, x="epoch", y=label, estimator=None, markers=True)
        sns.lineplot(ax=axis, **options)
        axis.plot(best["epoch"], best[names[1]], "o", mec="black", mfc="none", ms=10)
        axis.set(ylim=(0, None) if label == "loss" else (-0.02, 1.02))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        sns.move_legend(axis, "upper center", bbox_to_anchor=(0.5, -0.16), title=None)
    return figure


history = common.merge_histories(run_folder, False)  # of this run, if an error ended it too
print(f"{len(history)} epochs are finished")
if len(history):
    part = common.record_in(run_folder)
    title = [run_folder.name, "SYNTHETIC PHANTOMS" if part["synthetic"] else "", part["note"]]
    title = f"{', '.join(filter(None, title))} (rings: lowest validation loss)"
    common.show(draw_history(history), run_folder / "figures" / "history.png", title)
