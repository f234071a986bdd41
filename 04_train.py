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
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, Tuple

sys.path.insert(0, str(Path(globals().get("__file__", "cell")).resolve().parent))

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from sklearn.metrics import accuracy_score, f1_score, recall_score
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import RandomSampler

import common
from common import CLASS_NAMES, LOOKS, MALIGNANT, NORMAL, UserError

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
    shuffle_labels: bool = False  # leak test: labels permuted between patients; expect chance
    epochs: int = 0  # at most; 0: 10, 20 from a random start; of windows 1.6 times, as patience too
    lr: float = 1e-3  # rate of the new head, AdamW
    backbone_lr: float = 1e-4  # rate of the pretrained stages; a random start takes `lr` for both
    weight_decay: float = 1e-4  # decoupled (AdamW)
    label_smoothing: float = 0.1  # share of the target spread over the classes
    lesion_weight: float = 1.0  # weight of the circles' loss beside the films'; recipe lesion only
    looks: Tuple[str, ...] = ("auto",)  # whole, window or both, a network each; auto: by the canvas
    ema: float = 0.9  # share of the averaged weights kept at each step; the average is judged
    lr_patience: int = 0  # epochs without a better loss that halve the rates; 0: a third of all
    patience: int = 0  # epochs without a better loss that end the training; 0: half of all
    max_norm: float = 5.0  # gradients longer than this are shortened to it


if __name__ == "__main__":
    settings = common.command_line(Settings, __doc__)


# %% Two looks: a network sees whole films, another windows of large ones as they are
# Which films the two get wrong differs, so that their mean is better than either. Both see as many
# pixels at a step; a window is a part of a film, and takes more epochs.
def plans_of_looks(plan):
    """Return the plan of each look."""
    longer = {n: round(1.6 * getattr(plan, n)) for n in ("epochs", "lr_patience", "patience")}
    return [replace(plan, looks=(look,), **(longer if look == "window" else {}))
            for look in plan.looks]  # fmt: skip


# %% The plan: settings with all values filled in or, on resuming, those that the run began with
# A run goes on with the same films, labels and folds only. Settings of 0 are filled in by the kind
# of start: with pretrained weights a network learns in fewer epochs, and gently below its head.
MAY_CHANGE = ("fold", "run", "resume", "overwrite", "epochs", "patience", "device", "precision")


def resumed(settings, prepared):
    """Return the settings of the run that is gone on with, and its folder."""
    folder = common.find_run(settings.run)
    record = common.read_record(folder)
    noted, now = record["data"], prepared.identity()
    changed = [f"{n} {noted.get(n)} -> {now[n]}" for n in now if noted.get(n) != now[n]]
    for field in fields(settings):
        mine, old = getattr(settings, field.name), record.get(field.name, field.default)
        old = tuple(old) if isinstance(old, list) else old  # JSON knows no tuples
        if field.name not in MAY_CHANGE and mine not in (old, field.default):
            changed.append(f"{field.name} {old} -> {mine}")
        elif mine == field.default and field.name not in ("resume", "overwrite"):
            settings = replace(settings, **{field.name: old})
    if changed:
        raise UserError(
            f"the run {folder.name} cannot be resumed with other settings or data: "
            f"{'; '.join(changed)}. Start a new run, or put them back"
        )
    return settings, folder


def make_plan(settings, prepared, weights=None):
    """Return the settings with all values filled in, and the folder of an old run or None."""
    if settings.epochs < 0 or settings.batch_size < 1 or settings.lr <= 0:
        raise UserError("batch size must be at least 1, epochs not negative, the rate above 0")
    looks = settings.looks  # a list or a word may be typed in a cell
    settings = replace(settings, looks=(looks,) if isinstance(looks, str) else tuple(looks))
    settings, folder = resumed(settings, prepared) if settings.resume else (settings, None)
    random_start = weights is None or weights.state is None
    large = data.reduction(prepared.films) > 1 and settings.recipe == "lesion"
    looks = tuple(dict.fromkeys(settings.looks))
    if looks == ("auto",):
        circled = prepared.findings.dropna(subset=["canvas_radius"])["image"].nunique()
        most = circled > (prepared.labels["label"] != NORMAL).sum() / 2
        looks = LOOKS if large and most else LOOKS[:1]
    if not looks or not set(looks) <= set(LOOKS) or "window" in looks and not large:
        raise UserError(
            f"--looks {' '.join(looks)}: expected whole or window, or both; windows need a canvas "
            f"of {2 * data.ROWS} rows or more (step 1, --size 1024x576) and the recipe lesion"
        )
    epochs = settings.epochs or (20 if random_start else 10)
    plan = replace(
        settings,
        epochs=epochs,
        looks=looks,
        lr_patience=settings.lr_patience or max(epochs // 3, 1),
        patience=settings.patience or max(epochs // 2, 1),
        backbone_lr=settings.lr if random_start else settings.backbone_lr,
    )
    return plan, folder


# %% The films of the first fold
# No test film is trained or chosen on. Under torchrun several folds are dealt out to the
# processes; a single one is trained by all of them together.
def seen_by(look, datasets):
    """Return Datasets as a look has them."""
    return [d.reduced(data.reduction(d.films) if look == "whole" else 1) for d in datasets]


def fold_films(prepared, fold, plan):
    """Return the training and the validation films of a fold, as the plan's first look has them."""
    parts = data.fold_parts(prepared, fold, plan.validation, plan.train_share)
    labels = data.shuffled_labels(prepared.labels, plan.seed) if plan.shuffle_labels else None
    films = [data.MammogramDataset(prepared, parts[n], labels) for n in ("train", "validation")]
    return seen_by(plan.looks[0], films)


if __name__ == "__main__":
    common.check_settings(settings, "04_train.py")
    prepared = common.open_prepared(settings.source)
    plan, old_run = make_plan(settings, prepared)
    all_folds = data.named_folds(plan.fold, prepared.splits)
    rank, count = common.processes()
    dealt = count > 1 and len(all_folds) > 1
    folds = all_folds[rank::count] if dealt else all_folds
    train_films, validation_films = fold_films(prepared, (folds or all_folds)[0], plan)
    chosen_by = ("source", "fold", "validation", "train_share", "shuffle_labels")
    films_for = {name: getattr(plan, name) for name in chosen_by}
    print(f"folds {common.listing(all_folds)}; in the first {len(train_films)} films train and "
          f"{len(validation_films)} validate")  # fmt: skip


# %% The network and its optimiser: what stands here after the cell is what is trained first
# The new head learns at its own rate, ten times that of the pretrained stages. The networks of the
# other look and of later folds are made by the same function.
def marks(prepared):
    """Return by what each film is known again, and its patient, a DataFrame of text."""
    patients = prepared.source + "/" + prepared.labels["patient"]
    return pd.DataFrame({"films": prepared.table["digest"], "patients": patients})


def weights_for(plan, fold, prepared):
    """Load what a fold begins with; refused if it saw a test film or patient of the fold."""
    weights = network.load_weights(plan.weights, fold)
    test = prepared.splits["fold"] == fold
    known = test & marks(prepared).isin(weights.seen).any(axis=1)
    if known.any():
        raise UserError(
            f"--weights {plan.weights}: {weights.name} was trained or chosen on "
            f"{known.sum()} of the {test.sum()} test films of fold {fold}, or on their "
            f"patients ({common.listing(prepared.labels['image'][known], 3)}); it would "
            "know the answers. Take a run on other patients, or one with the same folds"
        )
    return weights


def network_and_optimizer(plan, weights):
    """Return the model, the optimiser and the scheduler that a fold begins with."""
    device = common.choose_device(plan.device)
    torch.manual_seed(plan.seed)
    model, _ = network.build_model(weights, plan.recipe, plan.dropout, plan.freeze)
    model = model.to(device, memory_format=torch.channels_last)
    backbone = [p for p in model.backbone.parameters() if p.requires_grad]
    head = [p for n, p in model.named_parameters() if not n.startswith("backbone.")]
    groups = [{"params": head, "lr": plan.lr}, {"params": backbone, "lr": plan.backbone_lr}]
    fused = device.type in ("cpu", "cuda")  # one pass over the weights in place of many
    optimizer = torch.optim.AdamW(groups, weight_decay=plan.weight_decay, fused=fused)
    scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=plan.lr_patience - 1)
    return model, optimizer, scheduler


if __name__ == "__main__":
    common.check_settings(settings, "04_train.py")
    with common.first_process_first():
        weights = weights_for(plan, (folds or all_folds)[0], train_films.prepared)
    plan, old_run = make_plan(settings, train_films.prepared, weights)
    model, optimizer, scheduler = network_and_optimizer(plans_of_looks(plan)[0], weights)
    made_for, beginning = plan, None  # nothing is trained yet
    trained_count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    most = ", ".join(f"{p.epochs} of the look {p.looks[0]}" for p in plans_of_looks(plan))
    print(f"weights: {weights.name}; {trained_count:,} parameters learn, epochs at most: {most}")


# %% The loss: of the film, and of every place where a radiologist's circle says what is there
# A film's label says that there is a lesion, a circle says where. One film has hundreds of places
# and few in a circle, so that those inside and those outside count half each.
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
    benign, malignant = F.adaptive_max_pool2d(circles, places.shape[2:]).unbind(1)
    benign = (benign - malignant).clamp(0, 1)  # where both overlap, the worse counts
    wanted = torch.stack([benign, 1 - benign - malignant, malignant], 1)
    loss = F.cross_entropy(places.float(), wanted, reduction="none")  # (B, h, w)
    inside = (benign + malignant) * known[:, None, None]
    outside = (1 - benign - malignant) * known[:, None, None]
    return 0.5 * sum((loss * part).sum() / part.sum().clamp(min=1) for part in (inside, outside))


# %% The loss of a batch: varied films, their labels and their circles
# The films go to the device as bytes and are varied there, all at once; the circles are carried
# along. Both losses are added: cross-entropy of the films, and of their places.
def batch_loss(model, batch, dataset, plan, generator):
    """Augment a batch (films, labels, rows); return its loss and which films were right (B,)."""
    films, labels, rows = batch
    device, circles, centres = next(model.parameters()).device, None, None
    films = films.to(device).float().div_(255)  # in place: large films take a while
    # Circles of true labels would give shuffled ones away; own films may have none.
    if plan.recipe == "lesion" and dataset.circles and not plan.shuffle_labels:
        circles, known = (part.to(device) for part in dataset.lesion_maps(rows))
    window = 1 / data.reduction(dataset.films) if plan.looks[0] == "window" else 1.0
    if window < 1:
        centres = data.window_centres(dataset, rows, window, generator)
    films, circles = data.augment(films, labels, generator, plan.augment, circles, window, centres)
    if centres is not None and circles is not None:
        labels = data.window_labels(labels, circles, known)
    dtype = common.choose_precision(plan.precision, device)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        logits, places = model(films)
    weight = data.class_weights(dataset.labels).to(device) if plan.balance == "loss" else None
    loss = F.cross_entropy(
        logits.float(), labels.to(device), weight, label_smoothing=plan.label_smoothing
    )
    if circles is not None:
        loss = loss + plan.lesion_weight * lesion_loss(places, circles, known)
    return loss, logits.detach().argmax(1).cpu() == labels


# %% Out of memory: name a smaller --batch-size
# On a GPU the films, their maps and all layers' outputs for the gradient have to fit at once.
@contextlib.contextmanager
def enough_memory(plan):
    """Put a lack of memory into words."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        if not any(t in text for t in ("out of memory", "allocate memory", "not enough memory")):
            raise
        smaller = max(plan.batch_size // 2, 1)
        raise UserError(f"the device ran out of memory; try --batch-size {smaller}") from None


# %% One batch: films in, loss out
# In evaluation mode, so that looking changes nothing of what is trained. Three equally likely
# classes would give ln 3 = 1.10 for the films, and as much again for the places.
if __name__ == "__main__":
    batch_generator = torch.Generator().manual_seed(plan.seed)
    batch_sampler = data.balanced_sampler(train_films.labels, batch_generator)
    first_batch = next(iter(data.batches(train_films, plan.batch_size, batch_sampler)))
    with torch.no_grad(), enough_memory(plan):
        first_loss, _ = batch_loss(model.eval(), first_batch, train_films, plan, batch_generator)
    print(f"a batch {tuple(first_batch[0].shape)} before training: loss {first_loss.item():.3f}")


# %% The state of a fold: all that changes while it trains, so that it can be saved and taken up
# Single weights are noisy at 25 steps an epoch; their average over the last steps is not. The
# average is what is validated and kept.
class FoldState:
    """A fold in training with one look; `rank` of `count` processes that train it together."""

    PARTS = ("model", "average", "optimizer", "scheduler")  # what has a state dict

    def __init__(self, fold, plan, films, parts, rank=0, count=1):
        self.fold, self.plan, self.rank, self.count = fold, plan, rank, count
        (self.look,) = plan.looks
        self.name = common.fold_name(fold, self.look)
        self.train_films, self.validation_films = films
        self.model, self.optimizer, self.scheduler = parts
        self.scheduler.optimizer = self.optimizer  # one put in the place of ours, too
        self.scheduler.min_lrs = [0.0] * len(self.optimizer.param_groups)
        if count > len(self.validation_films):
            raise UserError("more processes than validation films; start fewer")
        self.saved = 0  # the epoch of last.pt
        self.inherited = {}  # films and patients that the weights saw before
        stepped = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if not stepped <= set(map(id, self.model.parameters())):
            raise UserError("run the cell 'The network and its optimiser' first: the optimiser "
                            "holds the weights of another model")  # fmt: skip
        torch.manual_seed(plan.seed)  # dropout; each fold begins alike, alone or after others
        self.generator = torch.Generator().manual_seed(plan.seed)
        if plan.balance == "sampler":
            self.sampler = data.balanced_sampler(self.train_films.labels, self.generator)
        else:
            self.sampler = RandomSampler(self.train_films, generator=self.generator)
        counts = torch.bincount(self.train_films.labels, minlength=3).clamp(min=0.5)
        self.prior = counts / counts.sum() if plan.balance != "none" else torch.ones(3)
        blend = get_ema_multi_avg_fn(plan.ema)
        self.average = AveragedModel(self.model, multi_avg_fn=blend, use_buffers=True)
        self.network = DistributedDataParallel(self.model) if count > 1 else self.model
        self.progress = {"epoch": 0, "best_loss": float("inf"), "best_epoch": 0, "history": []}

    def state_dict(self):
        """Return all that a resumed run needs, as tensors and plain values."""
        states = {name: getattr(self, name).state_dict() for name in self.PARTS}
        generators = {"generator": self.generator.get_state(), "torch": torch.get_rng_state()}
        return {**states, **generators, **self.progress}

    def load_state_dict(self, state):
        """Take up a state that `state_dict` gave."""
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch"])
        self.progress = {name: state[name] for name in self.progress}
        self.saved = self.progress["epoch"]

    def seen(self):
        """Return the digests and patients that the weights were trained or chosen on."""
        rows = np.concatenate([self.train_films.rows, self.validation_films.rows])
        own = marks(self.train_films.prepared).iloc[rows]
        return {n: sorted({*own[n], *self.inherited.get(n, ())}) for n in own}

    def take_note(self, row):
        """Add an epoch's row of history.csv; return whether it is the best so far."""
        row = {n: v if n in ("fold", "epoch", "look") else float(v) for n, v in row.items()}
        self.progress["history"].append(row)
        self.progress["epoch"], better = row["epoch"], row["val_loss"] < self.progress["best_loss"]
        if better:
            self.progress.update(best_loss=row["val_loss"], best_epoch=row["epoch"])
        return better

    def finished(self):
        """Tell whether all epochs are done, or the best one lies too far back."""
        waited = self.progress["epoch"] - self.progress["best_epoch"]
        return self.progress["epoch"] >= self.plan.epochs or waited >= self.plan.patience


# %% The batches of an epoch; of several processes each takes its share of every batch
# All processes draw the same order from the same seed, and each takes every n-th film of it, so
# that they see together what one process would see in batches n times as large.
def epoch_batches(state):
    """Return a DataLoader; all processes must take part in every step."""
    size = state.plan.batch_size
    if state.count == 1:
        return data.batches(state.train_films, size, state.sampler)
    order = list(state.sampler)
    whole = len(order) // (size * state.count) * size * state.count
    if not whole:
        raise UserError(
            f"{len(order)} training films do not fill one batch of {state.count} processes; "
            "start fewer, or use a smaller --batch-size"
        )
    return data.batches(state.train_films, size, order[:whole][state.rank :: state.count])


# %% An epoch: batch, augment, forward, backward, step
# The usual five lines, and the averaged weights. A loss that is not a number ends the training with
# the films' names, before it can reach a checkpoint.
def train_epoch(state, progress):
    """Train on every batch of an epoch; return the mean loss and the accuracy."""
    state.model.train()
    total = hits = count = 0
    for batch in epoch_batches(state):
        rows = batch[2]
        loss, right = batch_loss(
            state.network, batch, state.train_films, state.plan, state.generator
        )
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss became {loss.item()} in epoch {state.progress['epoch'] + 1} at the "
                f"films {common.listing(state.train_films.images[rows])}; the last good checkpoint "
                "is kept. Try a lower --lr"
            )
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(state.model.parameters(), state.plan.max_norm)
        state.optimizer.step()
        state.average.update_parameters(state.model)
        total += loss.item() * len(rows)
        hits += right.sum().item()
        count += len(rows)
        progress.step(len(rows) * state.count, f"loss {total / count:.3f}")
    if state.count > 1:
        total, hits, count = np.sum(common.collect((total, hits, count)), axis=0)
    return total / count, hits / count


# %% Validation: films judged beside the other breast, as they are in the end
# The other breast's weight and the temperature are fitted on the validation films, and their loss
# with these chooses the epoch: it judges how well films are ranked, not how loud the logits are.
def validate(state):
    """Return the logits of the validation films, and metrics."""
    films = state.validation_films
    rows = films.rows[state.rank :: state.count]
    share = data.MammogramDataset(films.prepared, rows, reduce=films.reduce)
    for buffer in state.average.buffers() if state.count > 1 else ():
        torch.distributed.broadcast(buffer, 0)  # batch-norm statistics are each process's own
    dtype = common.choose_precision(state.plan.precision, next(state.model.parameters()).device)
    read = network.predict(state.average.module, share, state.plan.batch_size, dtype).logits
    logits = torch.empty(len(films), len(CLASS_NAMES))
    for number, part in enumerate(common.collect(read) if state.count > 1 else [read]):
        logits[number :: state.count] = part
    labels, table = films.labels, films.table()
    weight, temperature = network.fit_calibration(logits, table, labels, state.prior)
    judged = network.beside_other_breast(logits, table, weight)
    judged = network.calibrated(judged, temperature, state.prior)
    predicted = judged.argmax(1)
    recall = recall_score(labels == MALIGNANT, predicted == MALIGNANT, zero_division=0)
    metrics = {
        "val_loss": F.cross_entropy(judged, labels).item(),
        "val_accuracy": accuracy_score(labels, predicted),
        "val_macro_f1": f1_score(labels, predicted, average="macro", zero_division=0),
        "val_malignant_recall": recall,
    }
    if not np.isfinite(metrics["val_loss"]):
        raise UserError(
            f"the validation loss became {metrics['val_loss']} in epoch "
            f"{state.progress['epoch'] + 1}; the last good checkpoint is kept. Try a lower --lr"
        )
    return logits, metrics


# %% Checkpoints: the best epoch for judging, the last one for going on
# Tensors and plain values only; each file is written whole or not at all. best.pt has all that it
# takes to judge a film: weights, class frequencies, and validation logits to calibrate it by.
HISTORY = [
    "fold", "epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy",
    "val_macro_f1", "val_malignant_recall", "seconds", "films_per_second", "look",
]  # fmt: skip


def save_checkpoint(values, path):
    """Save tensors and plain values."""
    with common.replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save(values, file)  # given a name, torch would not say that the disk is full


def save_state(state, folder, record, logits=None):
    """Save the last state and, if it is the best so far, the logits of its validation films."""
    target = folder / state.name
    if logits is not None:
        films = state.validation_films
        validation = films.table()[["image", "patient", "laterality"]].to_dict("list")
        values = {
            "model": state.average.module.state_dict(),
            "validation": {**validation, "logits": logits, "labels": films.labels},
            "prior": state.prior,
            "seen": state.seen(),
            "reduce": films.reduce,
            "epoch": state.progress["epoch"],
            "fold": state.fold,
            "record": record,
        }
        save_checkpoint(values, target / "best.pt")
    save_checkpoint({**state.state_dict(), "record": record}, target / "last.pt")
    state.saved = state.progress["epoch"]
    write_history(state, folder)


# %% Histories: of each fold, and of all folds of the run
# Each fold has its own, so that folds can be trained by several processes; the run's is put
# together from them after every epoch.
def write_history(state, folder):
    """Write a fold's history.csv, and with it the run's."""
    table = pd.DataFrame(state.progress["history"], columns=HISTORY)
    common.write_csv(table, folder / state.name / "history.csv")
    merge_histories(folder)


def merge_histories(folder):
    """Put the histories of a run's folds together in the run's own, and return it."""
    parts = [pd.read_csv(path) for path in sorted(folder.glob("fold-*/history.csv"))]
    history = pd.concat(parts) if parts else pd.DataFrame(columns=HISTORY)
    if parts:  # none if every fold failed in its first epoch
        common.write_csv(history, folder / "history.csv")
    return history.reset_index(drop=True)


# %% Going on: from the last state of a fold
# last.pt has the weights, the optimiser, the scheduler and both random states: what follows is bit
# for bit what it would have been without the stop.
def take_up(state, folder):
    """Go on from last.pt of a fold, if it is there; name what is still good if it is damaged."""
    target = folder / state.name
    if not (target / "last.pt").is_file():
        return
    try:
        state.load_state_dict(common.read_checkpoint(target / "last.pt"))
    except (UserError, KeyError, ValueError, RuntimeError) as error:
        best = target / "best.pt"
        offer = f" {best} is still there and can be evaluated." if best.is_file() else ""
        raise UserError(f"{error}.{offer} To train this fold anew, delete {target}") from None


# %% A new run: a folder whose name is free and leads nowhere else
# Nothing is overwritten unasked, and no name leads out of runs/. Without --run the name is source,
# recipe and the next free number.
def new_run(plan, prepared):
    """Return the folder of a new run; UserError if the name is taken or leads elsewhere."""
    if plan.run.strip(". ") != plan.run or not all(c.isalnum() or c in "-_. " for c in plan.run):
        raise UserError(
            f"--run {plan.run!r}: letters, digits, and inside also blank, '-', '_' and '.'"
        )
    stem = f"{prepared.source}-{plan.recipe}"
    taken = [int(p.name[-3:]) for p in common.runs_dir().glob(f"{stem}-[0-9][0-9][0-9]")]
    folder = common.runs_dir(plan.run or f"{stem}-{max(taken, default=0) + 1:03d}")
    if not plan.overwrite and any(path.name != ".lock" for path in folder.glob("*")):
        raise UserError(
            f"the run {folder.name} exists; choose another --run, --resume or --overwrite"
        )
    return folder


# %% What is noted of a run: settings.json
# Enough to repeat the run, and to refuse going on with it on other data: settings, weights, device,
# digests of films, labels and split, the split's seed, and in what labels were edited.
def describe_run(plan, prepared, folder, weights_name, model):
    """Return settings.json: the settings, what they came to, and what the films are like."""
    spread = prepared.table[data.prepare.STATISTICS].quantile([0.005, 0.995])
    device = next(model.parameters()).device
    return {
        **asdict(plan),
        "run": folder.name,
        "source_used": prepared.source,
        "weights_used": weights_name,
        "film_bits": int(prepared.table["bits"].max()),
        "frozen_stages": model.frozen,
        "parameters_trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "device_used": str(device),
        "precision_used": str(common.choose_precision(plan.precision, device))[6:],
        "class_names": list(CLASS_NAMES),
        "synthetic": prepared.source == "phantom",
        "data": prepared.identity(),
        "split_seed": prepared.split_seed,
        "note": prepared.note,
        "film_statistics": {name: list(spread[name]) for name in spread},
        "torch": str(torch.__version__),
        "disclaimer": common.DISCLAIMER,
    }


def begin_run(plan, folder, record):
    """Write settings.json of a new run, or of one that began with the same weights."""
    left = [] if plan.resume else [path for path in folder.iterdir() if path.name != ".lock"]
    if left and not plan.overwrite:
        raise UserError(f"the run {folder.name} exists; another process has just begun it")
    # parts are a killed run's; the folder is locked, so nobody writes them now
    common.discard(*left, *folder.rglob(".*.part"))
    began = common.read_record(folder) if plan.resume else record
    if began["weights_used"] != record["weights_used"]:
        raise UserError(
            f"{folder.name} began with the weights {began['weights_used']}, not "
            f"{record['weights_used']}; name the same ones with --weights"
        )
    common.write_json(record, folder / "settings.json")
    size = "x".join(map(str, record["data"]["size"]))
    print(
        f"run {folder.name}: {record['source_used']}, {record['data']['films']} films of {size} px"
        f"{', ' + record['note'] if record['note'] else ''}, split seed {record['split_seed']}, "
        f"recipe {plan.recipe}, looks {' and '.join(plan.looks)}, weights: "
        f"{record['weights_used']}, on {record['device_used']} in {record['precision_used']}"
    )


# %% An epoch in one line
# What a log file keeps of it, and what the progress bar turns into.
def epoch_line(row, epochs, better):
    """Return a row of history.csv in words."""
    left = common.clock((epochs - row["epoch"]) * row["seconds"])
    return (
        f"{common.fold_name(row['fold'], row['look']).replace('-', ' ')} epoch "
        f"{row['epoch']:2d}/{epochs}  loss {row['train_loss']:.3f}  "
        f"val loss {row['val_loss']:.3f}  accuracy {row['val_accuracy']:.2f}  "
        f"macro-F1 {row['val_macro_f1']:.2f}  malignant recall {row['val_malignant_recall']:.2f}  "
        f"lr {row['lr']:.0e}  {row['films_per_second']:.1f} films/s  {left} left"
        f"{'  best' if better else ''}"
    )


# %% Train: every fold of settings.fold, every epoch
# Stop it whenever you like: `model` (then with the averaged weights of the first fold's best
# epoch), `history` and the checkpoints are there, and this cell goes on after settings.resume =
# True. Run again without it, it begins a new run from the same beginning.
if __name__ == "__main__":
    common.check_settings(settings, "04_train.py")
    plan, old_run = make_plan(settings, train_films.prepared, weights)
    kept = ("run", "resume", "overwrite", "epochs", "patience", "lr_patience")
    new = {n for n, v in vars(plan).items() if n not in kept and v != getattr(made_for, n)}
    new |= {name for name, value in films_for.items() if getattr(plan, name) != value}
    if new or beginning and optimizer is not beginning[1]:
        raise UserError(
            f"{common.listing(sorted(new)) or 'the optimiser'} changed since the network was made; "
            "run the cells from 'The films of the first fold' on again, then change what you like"
        )
    if beginning:  # the cell runs again, and the network was trained in it
        model, optimizer, scheduler = beginning[0]
    plans = plans_of_looks(plan)
    if plan.lr_patience != made_for.lr_patience:  # it follows from the epochs
        scheduler.patience = plans[0].lr_patience - 1
    chosen = old_run or (new_run(plan, train_films.prepared) if rank == 0 else None)
    run_folder = common.collect(chosen)[0]
    record = describe_run(plan, train_films.prepared, run_folder, weights.name, model)
    problems, whole, (mate, mates) = [], True, (0, 1) if dealt else (rank, count)
    with common.locked(run_folder) if rank == 0 else contextlib.nullcontext():
        if rank == 0:
            begin_run(plan, run_folder, record)
        beginning = copy.deepcopy((model, optimizer, scheduler)), optimizer
        common.collect(None)  # nobody writes before the run is begun
        for fold, look_plan in itertools.product(folds, plans):
            words = common.fold_name(fold, look_plan.looks[0]).replace("-", " ")
            try:
                films = seen_by(look_plan.looks[0], (train_films, validation_films))
                made, start_weights = (model, optimizer, scheduler), weights
                if fold != folds[0]:
                    films = fold_films(train_films.prepared, fold, look_plan)
                    if weights.seen:
                        start_weights = weights_for(plan, fold, train_films.prepared)
                if (fold, look_plan) != (folds[0], plans[0]):
                    made = network_and_optimizer(look_plan, start_weights)
                state = FoldState(fold, look_plan, films, made, mate, mates)
                state.inherited = start_weights.seen
                if plan.resume:
                    take_up(state, run_folder)
                    if not dealt:
                        common.collect(None)  # all have read it before one writes
                    if mate == 0:
                        write_history(state, run_folder)  # a kill may have come before it
                whole = False
                with contextlib.suppress(KeyboardInterrupt), enough_memory(plan):  # the stop button
                    while not state.finished():
                        start, lr = time.perf_counter(), state.optimizer.param_groups[0]["lr"]
                        seen, epoch = len(state.train_films), state.progress["epoch"] + 1
                        bar = common.Progress(seen, f"{words} epoch {epoch}")
                        train_loss, train_accuracy = train_epoch(state, bar)
                        speed = seen / (time.perf_counter() - start)
                        logits, validation = validate(state)
                        state.scheduler.step(validation["val_loss"])
                        row = {"fold": fold, "epoch": epoch, "lr": lr, "train_loss": train_loss,
                               "train_accuracy": train_accuracy, **validation,
                               "seconds": time.perf_counter() - start,
                               "films_per_second": speed, "look": state.look}  # fmt: skip
                        better = state.take_note(row)
                        if mate == 0:
                            save_state(state, run_folder, record, logits if better else None)
                            bar.close(epoch_line(row, look_plan.epochs, better))
                    whole = True
                if not whole:
                    print(f"\nstopped; the state of epoch {state.saved} is saved" if state.saved
                          else "\nstopped in the first epoch; no state is saved yet")  # fmt: skip
                    break
            except UserError as error:
                if not dealt:
                    raise
                problems.append(f"{words}: {error}")  # the other processes go on
        problems, whole = sum(common.collect(problems), []), all(common.collect(whole))
        history = merge_histories(run_folder) if rank == 0 else pd.DataFrame(columns=HISTORY)
    best_file = run_folder / common.fold_name((folds or all_folds)[0], plan.looks[0]) / "best.pt"
    if best_file.is_file():
        model.load_state_dict(common.read_checkpoint(best_file)["model"])
    model.eval()
    if problems and rank == 0:
        raise UserError("; ".join(problems) + ". --resume goes on with these folds")
    follow = "05_evaluate.py" if whole else "04_train.py --resume"
    if rank == 0:
        print(f"run {run_folder.name}: {run_folder}\nNext: python {follow} --run {run_folder.name}")


# %% Look: the curves of loss, accuracy, macro-F1 and malignant recall, a line a fold and look
# Compare shapes, not heights: the training loss adds the circles' loss and label smoothing, on
# balanced batches. A validation loss that rises while the training loss falls is overfitting: with
# some thirty malignant films to learn from, that comes soon.
if __name__ == "__main__" and len(history):
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
    panels = [("loss", "train_loss", "val_loss"), ("accuracy", "train_accuracy", "val_accuracy"),
              ("validation score", "val_macro_f1", "val_malignant_recall")]  # fmt: skip
    for axis, (label, first, second) in zip(axes, panels):
        for (_, look), part in history.groupby(["fold", "look"]):
            style = {"lw": 1.2, "ls": "--" if look == "window" else "-"}
            axis.plot(part["epoch"], part[first], color="#0072B2", label=first, **style)
            axis.plot(part["epoch"], part[second], color="#D55E00", label=second, **style)
            best_row = part.loc[part["val_loss"].idxmin()]
            axis.plot(best_row["epoch"], best_row[second], "o", color="#D55E00", ms=5)
        axis.set(xlabel="epoch", ylabel=label)
        if label != "loss":
            axis.set_ylim(-0.02, 1.02)
        handles, curves = axis.get_legend_handles_labels()
        axis.legend(handles[:2], [name.replace("_", " ") for name in curves[:2]], fontsize=8)
    synthetic = ", SYNTHETIC PHANTOMS" if record["synthetic"] else ""
    noted = f", {record['note']}" if record["note"] else ""
    dashed = ", dashed: windows" if "window" in set(history["look"]) else ""
    figure.suptitle(f"{run_folder.name}{synthetic}{noted} (dots: lowest validation loss{dashed})")
    common.show(figure, run_folder / "figures" / "history.png")
