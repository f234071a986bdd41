"""Step 4: train the ResNet18, one fold of the cross-validation or all of them.

In:  what step 1 prepared (it is run if nothing is).
Out: runs/<run>/settings.json, history.csv, figures/, fold-K/best.pt and fold-K/last.pt.

    python 04_train.py                      fold 0 with the default settings
    python 04_train.py --fold all           every fold, for figures that mean something
    python 04_train.py --recipe plain       the recipe of most public projects, to compare with
    python 04_train.py --resume             goes on with the newest run where it stopped
    torchrun --nproc-per-node 2 -- 04_train.py --fold all  the folds spread over two processes
"""

# %% Imports: this script finds its own folder first, whatever the working directory is
import contextlib
import importlib
import re
import shutil
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(globals().get("__file__", "cell")).resolve().parent))

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from sklearn.metrics import accuracy_score, f1_score, recall_score
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import common
from common import CLASS_NAMES, MALIGNANT, UserError

data = importlib.import_module("02_dataset")
network = importlib.import_module("03_model")
prepare = data.prepare


# %% Settings: change a value and run the cells below again; each name is a command-line flag
@dataclass
class Settings:
    """One training run."""

    # input and output
    source: Literal["auto", "mias", "phantom", "own"] = "auto"  # auto: what was prepared last
    fold: str = "0"  # the fold that is the test set: 0, 1, ... or all
    run: str = ""  # name under runs/; empty: source, recipe and the next free number
    resume: bool = False  # go on with this run, or with the newest one
    overwrite: bool = False  # delete a run of this name first
    # model
    recipe: Literal["lesion", "plain"] = "lesion"  # plain: labels alone; lesion: circles too
    weights: str = "auto"  # auto (ImageNet if it can be had), imagenet, none, or a state dict FILE
    freeze: int = -1  # stages kept as pretrained, 0 to 5; -1: 3 with weights, else 0
    dropout: float = 0.2  # share of the 512 features left out in training
    # data
    batch_size: int = 8  # films in a batch
    balance: Literal["sampler", "loss", "none"] = "sampler"  # how rare classes count: never both
    augment: float = 1.0  # multiplies the augmentation strengths of step 2; 0: none
    shuffle_labels: bool = False  # leak test: labels permuted between patients; expect chance
    # optimisation
    epochs: int = 0  # passes over the training films, at most; 0: 10 with weights, else 20
    lr: float = 1e-3  # rate of the new head, Adam
    backbone_lr: float = 1e-4  # rate of the pretrained stages; a random start takes `lr` for both
    weight_decay: float = 1e-4  # decoupled (AdamW)
    label_smoothing: float = 0.1  # share of the target spread over the classes
    lesion_weight: float = 1.0  # weight of the circles' loss beside the films'; recipe lesion only
    ema: float = 0.9  # share of the averaged weights kept at each step; the average is judged
    lr_patience: int = 0  # epochs without a better loss that halve the rates; 0: a third of all
    patience: int = 0  # epochs without a better loss that end the training; 0: half of all
    max_norm: float = 5.0  # gradients longer than this are shortened to it
    # machine
    seed: int = 0  # of weights, order, augmentation and dropout
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where the hardware has it
    profile: bool = False  # show at the end where the time went


if __name__ == "__main__":
    settings = common.command_line(Settings, __doc__)


# %% The loss: of the film, and of every place where a radiologist's circle says what is there
def lesion_loss(maps, targets, known):
    """Cross-entropy of every place with what the circles say about it.

    Parameters
    ----------
    maps : float tensor, shape (B, 3, h, w)
        Logits of every place.
    targets : float tensor, shape (B, 2, H, W)
        Benign and malignant circles, 0 to 1; a place takes the largest value in its reach.
    known : bool tensor, shape (B,)
        Films whose circles are the whole truth; the others are left out.

    Returns
    -------
    loss : float tensor, scalar
        Places inside and outside of circles count half each: inside are about 1 %.
    """
    benign, malignant = F.adaptive_max_pool2d(targets, maps.shape[2:]).unbind(1)
    benign = (benign - malignant).clamp(0, 1)  # where both overlap, the worse counts
    wanted = torch.stack([benign, 1 - benign - malignant, malignant], 1)
    loss = F.cross_entropy(maps.float(), wanted, reduction="none")  # (B, h, w)
    inside = (benign + malignant) * known[:, None, None]
    outside = (1 - benign - malignant) * known[:, None, None]
    return 0.5 * sum((loss * part).sum() / part.sum().clamp(min=1) for part in (inside, outside))


def film_loss(logits, labels, weights=None, smoothing=0.0):
    """Cross-entropy of films (B, 3) with labels (B,), in float32."""
    return F.cross_entropy(logits.float(), labels, weights, label_smoothing=smoothing)


# %% An epoch: batch, augment, forward, backward, step
class Trainer:
    """Everything that changes while one fold trains, so that it can be saved and taken up again.

    Parameters
    ----------
    settings : Settings
        The run's.
    prepared : Prepared
        From step 1.
    fold : int
        The fold that is the test set; its films are never touched here.
    weights : tuple
        What `load_weights` of step 3 returned.
    team : Team
        The processes that train this fold together, each on its share of every batch.
    """

    def __init__(self, settings, prepared, fold, weights, team=common.ALONE):
        settings = filled_in(settings, weights)
        self.settings, self.fold, self.team = settings, fold, team
        self.device = common.choose_device(settings.device)
        self.dtype = common.choose_precision(settings.precision, self.device)
        torch.manual_seed(settings.seed)
        self.generator = torch.Generator().manual_seed(settings.seed)
        labels = prepared.labels["label"].to_numpy()
        if settings.shuffle_labels:
            labels = shuffled_labels(prepared.labels, settings.seed)
        parts = data.fold_parts(prepared.splits, prepared.labels, fold)
        self.training = data.MammogramDataset(prepared, parts["train"], labels)
        self.validation = data.MammogramDataset(prepared, parts["validation"], labels)
        kept = self.training.labels[self.training.rows]
        # Circles of true labels would give shuffled ones away; own films may have none.
        known = self.training.circles.ngroups > 0 and not settings.shuffle_labels
        self.circles = settings.recipe == "lesion" and known
        self.class_weights = data.class_weights(kept).to(self.device)
        counts = torch.bincount(kept, minlength=len(CLASS_NAMES)).clamp(min=0.5)
        self.prior = counts / counts.sum() if settings.balance != "none" else torch.ones(3)
        if settings.balance == "sampler":
            self.sampler = data.balanced_sampler(kept, self.generator)
        else:
            self.sampler = torch.utils.data.RandomSampler(self.training, generator=self.generator)
        model, _ = network.build_model(weights, settings.recipe, settings.dropout, settings.freeze)
        self.model = model.to(self.device, memory_format=torch.channels_last)
        # Single weights are noisy at 25 steps an epoch; their average over the last steps is not.
        blend = get_ema_multi_avg_fn(settings.ema)
        self.average = AveragedModel(self.model, multi_avg_fn=blend, use_buffers=True)
        self.network = DistributedDataParallel(self.model) if team.size > 1 else self.model
        groups = network.parameter_groups(self.model, settings.lr, settings.backbone_lr)
        fused = self.device.type in ("cpu", "cuda")  # one pass over the weights in place of many
        self.optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=fused)
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, factor=0.5, patience=settings.lr_patience - 1
        )
        self.epoch, self.best_loss, self.best_epoch, self.history = 0, float("inf"), 0, []
        self.saved = 0  # the epoch of last.pt
        self.watch = common.Stopwatch(self.device if settings.profile else None)

    def losses(self, films, labels, rows):
        """Augment a batch, classify it, and return the loss to train on and the film logits."""
        with self.watch("augmentation"):
            films = films.to(self.device).float() / 255
            maps = None
            if self.circles:
                maps, known = self.training.lesion_maps(rows)
                maps, known = maps.to(self.device), known.to(self.device)
            films, maps = data.augment(films, labels, self.generator, self.settings.augment, maps)
            labels = labels.to(self.device)
        with self.watch("forward"):
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                logits, places = self.network(films)
            weights = self.class_weights if self.settings.balance == "loss" else None
            loss = film_loss(logits, labels, weights, self.settings.label_smoothing)
            if maps is not None:
                loss = loss + self.settings.lesion_weight * lesion_loss(places, maps, known)
        return loss, logits.detach()

    def train_epoch(self, progress):
        """Train on every batch of an epoch; return the mean loss and the accuracy."""
        self.model.train()
        total = hits = count = 0
        epoch = data.batches(self.training, self.settings.batch_size, self.sampler, *self.team)
        while True:
            with self.watch("batches"):
                films, labels, rows = next(epoch, (None, None, None))
            if films is None:
                break
            loss, logits = self.losses(films, labels, rows)
            if not torch.isfinite(loss):
                names = self.training.prepared.labels["image"].iloc[rows.numpy()]
                raise UserError(
                    f"the loss became {loss.item()} in epoch {self.epoch + 1} at the films "
                    f"{common.listing(names)}; the last good checkpoint is kept. Try a lower --lr"
                )
            with self.watch("backward"):
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
            with self.watch("optimiser"):
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.max_norm)
                self.optimizer.step()
                self.average.update_parameters(self.model)
            total += loss.item() * len(rows)
            hits += (logits.argmax(1).cpu() == labels).sum().item()
            count += len(rows)
            progress.step(len(rows) * self.team.size, f"loss {total / count:.3f}")
        if not count:
            raise UserError(
                f"{len(self.training)} training films do not fill one batch of {self.team.size} "
                "processes; start fewer, or use a smaller --batch-size"
            )
        total, hits, count = np.sum(self.team.collect((total, hits, count)), axis=0)
        return total / count, hits / count

    def validate(self):
        """Predict the validation films; return their logits, labels and metrics."""
        rank, size = self.team
        for buffer in self.average.buffers() if size > 1 else ():
            torch.distributed.broadcast(buffer, 0)  # batch-norm statistics are each process's own
        rows = self.validation.rows
        share = data.MammogramDataset(self.validation.prepared, rows[rank::size])
        logits = torch.empty(len(rows), len(CLASS_NAMES))
        mine = network.predict(self.average.module, share, self.settings.batch_size, self.dtype)
        for number, part in enumerate(self.team.collect(mine)):
            logits[number::size] = part
        labels, films = self.validation.labels[rows], self.validation.prepared.labels.iloc[rows]
        judged = network.beside_other_breast(logits, films["patient"], films["laterality"])
        temperature = network.fit_temperature(judged, labels, self.prior)
        judged = network.calibrated(judged, temperature, self.prior)
        predicted = judged.argmax(1)
        metrics = {
            "val_loss": F.cross_entropy(judged, labels).item(),
            "val_accuracy": accuracy_score(labels, predicted),
            "val_macro_f1": f1_score(labels, predicted, average="macro", zero_division=0),
            "val_malignant_recall": recall_score(
                labels == MALIGNANT, predicted == MALIGNANT, zero_division=0
            ),
        }
        return logits, labels, metrics

    def state(self):
        """Return all that a resumed run needs, as tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "generator": self.generator.get_state(),
            "torch_generator": torch.get_rng_state(),
            "epoch": self.epoch,
            "best_loss": self.best_loss,
            "best_epoch": self.best_epoch,
            "history": self.history,
        }

    def restore(self, state):
        """Take up a state that `state` gave."""
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_generator"])
        self.epoch, self.history = state["epoch"], state["history"]
        self.saved = self.epoch
        self.best_loss, self.best_epoch = state["best_loss"], state["best_epoch"]

    def finished(self):
        """Tell whether all epochs are done, or the best one lies too far back."""
        waited = self.epoch - self.best_epoch
        return self.epoch >= self.settings.epochs or waited >= self.settings.patience


def filled_in(settings, weights):
    """Return the settings with the values that go with this kind of start, see `load_weights`."""
    random_start = weights[0] is None
    epochs = settings.epochs or (20 if random_start else 10)
    return replace(
        settings,
        epochs=epochs,
        lr_patience=settings.lr_patience or max(epochs // 3, 1),
        patience=settings.patience or max(epochs // 2, 1),
        backbone_lr=settings.lr if random_start else settings.backbone_lr,
    )


def shuffled_labels(labels, seed):
    """Permute the labels between patients, each patient's films staying together.

    A sound evaluation of a model trained on these falls to chance; a leak shows as more.

    Parameters
    ----------
    labels : DataFrame
        image, patient, label.
    seed : int
        Of the permutation.

    Returns
    -------
    labels : ndarray of int, shape (n_films,)
        Patients with the same number of films exchange their label pairs.
    """
    rng = np.random.default_rng(seed)
    mixed = labels["label"].to_numpy().copy()
    groups = labels.groupby("patient").indices
    sizes = pd.Series({patient: len(rows) for patient, rows in groups.items()})
    for _, same_size in sizes.groupby(sizes):
        rows = np.array([groups[patient] for patient in same_size.index])  # (patients, films)
        mixed[rows] = labels["label"].to_numpy()[rows[rng.permutation(len(rows))]]
    return mixed


# %% A fold: epochs until the validation loss stops falling, the best and the last state saved
HISTORY = [
    "fold", "epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy",
    "val_macro_f1", "val_malignant_recall", "seconds", "films_per_second",
]  # fmt: skip


def fit_fold(settings, prepared, fold, weights, folder, record, team=common.ALONE):
    """Train one fold, or go on with it.

    Parameters
    ----------
    settings : Settings
        The run's.
    prepared : Prepared
        From step 1.
    fold : int
        The fold that is the test set.
    weights : tuple
        What `load_weights` of step 3 returned.
    folder : Path
        runs/<run>.
    record : dict
        settings.json, stored in the checkpoints too.
    team : Team
        The processes that train this fold together; rank 0 writes.

    Returns
    -------
    model : MammogramNet
        With the weights of the best epoch, in evaluation mode.
    history : DataFrame
        One row an epoch.
    whole : bool
        False if the user stopped it.
    """
    trainer = Trainer(settings, prepared, fold, weights, team)
    target = folder / f"fold-{fold}"
    if settings.resume and (target / "last.pt").is_file():
        trainer.restore(load_last(target))
        team.wait()  # all have read it before one writes
        if team.rank == 0:
            write_history(trainer, target)  # a run may be killed between last.pt and history.csv
    stopped = False
    try:
        while not trainer.finished():
            run_epoch(trainer, target, record)
    except KeyboardInterrupt:
        stopped = True
        print(f"\nstopped; the state of epoch {trainer.saved} is saved")
    except RuntimeError as error:
        if not re.search("out of memory|allocate memory|not enough memory", str(error).lower()):
            raise
        raise UserError(
            f"the device ran out of memory; try --batch-size {max(settings.batch_size // 2, 1)}"
        ) from None
    if trainer.watch.seconds and settings.profile and team.rank == 0:
        common.table(trainer.watch.table(), f"where the time of fold {fold} went")
    if (target / "best.pt").is_file():
        trainer.model.load_state_dict(common.read_checkpoint(target / "best.pt")["model"])
    return trainer.model.eval(), pd.DataFrame(trainer.history, columns=HISTORY), not stopped


def run_epoch(trainer, target, record):
    """Train and validate once, print a row, and save the last and, if it is, the best state."""
    start = time.perf_counter()
    lr = trainer.optimizer.param_groups[0]["lr"]
    count = len(trainer.training)
    progress = common.Progress(count, f"fold {trainer.fold} epoch {trainer.epoch + 1}")
    train_loss, train_accuracy = trainer.train_epoch(progress)
    speed = count / (time.perf_counter() - start)
    with trainer.watch("validation"):
        logits, labels, metrics = trainer.validate()
    if not np.isfinite(metrics["val_loss"]):
        raise UserError(
            f"the validation loss became {metrics['val_loss']} in epoch {trainer.epoch + 1}; the "
            "last good checkpoint is kept. Try a lower --lr"
        )
    trainer.scheduler.step(metrics["val_loss"])
    trainer.epoch += 1
    row = {
        "fold": trainer.fold,
        "epoch": trainer.epoch,
        "lr": lr,
        "train_loss": train_loss,
        "train_accuracy": train_accuracy,
        **metrics,
        "seconds": time.perf_counter() - start,
        "films_per_second": speed,
    }
    whole = ("fold", "epoch")
    trainer.history.append({n: int(v) if n in whole else float(v) for n, v in row.items()})
    better = metrics["val_loss"] < trainer.best_loss
    if better:
        trainer.best_loss, trainer.best_epoch = metrics["val_loss"], trainer.epoch
    if trainer.team.rank == 0:
        with trainer.watch("checkpoints"):
            if better:
                films = trainer.validation.prepared.labels.iloc[trainer.validation.rows]
                best = {
                    "model": trainer.average.module.state_dict(),
                    "validation": {
                        "logits": logits,
                        "labels": labels,
                        **{n: list(films[n]) for n in ("image", "patient", "laterality")},
                    },
                    "prior": trainer.prior,
                    "epoch": trainer.epoch,
                    "fold": trainer.fold,
                    "record": record,
                }
                save_checkpoint(best, target / "best.pt")
            save_checkpoint({**trainer.state(), "record": record}, target / "last.pt")
            write_history(trainer, target)
    trainer.saved = trainer.epoch
    if trainer.team.rank > 0:
        return
    left = (trainer.settings.epochs - trainer.epoch) * row["seconds"]
    progress.close(
        f"fold {trainer.fold} epoch {trainer.epoch:2d}/{trainer.settings.epochs}  "
        f"loss {train_loss:.3f}  val loss {metrics['val_loss']:.3f}  "
        f"accuracy {metrics['val_accuracy']:.2f}  macro-F1 {metrics['val_macro_f1']:.2f}  "
        f"malignant recall {metrics['val_malignant_recall']:.2f}  lr {lr:.0e}  "
        f"{speed:.1f} films/s  {common.clock(left)} left{'  best' if better else ''}"
    )


def save_checkpoint(state, path):
    """Save tensors and plain values, completely or not at all."""
    with common.replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)  # given a name, torch would not say that the disk is full


def load_last(target):
    """Read last.pt of a fold, or name what is still good."""
    try:
        return common.read_checkpoint(target / "last.pt")
    except UserError as error:
        best = target / "best.pt"
        offer = f" {best} is still there and can be evaluated." if best.is_file() else ""
        raise UserError(f"{error}.{offer} To train this fold anew, delete {target}") from None


def write_history(trainer, target):
    """Write a fold's history.csv, and with it the run's."""
    common.write_csv(pd.DataFrame(trainer.history, columns=HISTORY), target / "history.csv")
    merge_histories(target.parent)


def merge_histories(folder):
    """Put the histories of a run's folds together in the run's own."""
    parts = sorted(folder.glob("fold-*/history.csv"))
    if parts:  # none if every fold failed in its first epoch
        common.write_csv(pd.concat([pd.read_csv(p) for p in parts]), folder / "history.csv")


# %% A run: a new name, or an old one that fits; then fold after fold
FREE_ON_RESUME = (
    "fold", "run", "resume", "overwrite", "epochs", "patience", "device", "precision", "profile",
)  # fmt: skip


def newest_run():
    """Return the folder of the run that was written to last."""
    found = [p.parent for p in common.runs_dir().glob("*/settings.json")]
    if not found:
        raise UserError(f"there is no run in {common.runs_dir()}; python 04_train.py makes one")
    return max(found, key=lambda folder: max(p.stat().st_mtime for p in folder.glob("*.*")))


def open_run(settings, prepared):
    """Find the folder of a new run, or check that an old one can be gone on with.

    Returns
    -------
    settings : Settings
        On resuming, what was left at its default takes the run's value.
    folder : Path
        runs/<run>.

    Raises
    ------
    UserError
        If the name is taken, or data, split or a setting differ from the run's.
    """
    allowed = all(c.isalnum() or c in "-_. " for c in settings.run)
    if not allowed or settings.run != settings.run.strip(". "):  # ".." leads out of runs/
        raise UserError(
            f"--run {settings.run!r}: letters, digits, and inside also blank, '-', '_' and '.'"
        )
    described = describe_data(prepared)
    if settings.resume:
        folder = common.runs_dir(settings.run) if settings.run else newest_run()
        if not (folder / "settings.json").is_file():
            raise UserError(f"there is no run {folder.name!r} in {common.runs_dir()} to resume")
        record = common.read_json(folder / "settings.json")
        changed = [
            f"{name} {record['data'].get(name)} -> {value}"
            for name, value in described.items()
            if record["data"].get(name) != value
        ]
        for field in fields(Settings):
            mine, old = getattr(settings, field.name), record.get(field.name, field.default)
            if field.name not in FREE_ON_RESUME and mine not in (old, field.default):
                changed.append(f"{field.name} {old} -> {mine}")
            elif mine == field.default and field.name not in ("resume", "overwrite"):
                settings = replace(settings, **{field.name: old})
        if changed:
            raise UserError(
                f"the run {folder.name} cannot be resumed with other settings or data: "
                f"{'; '.join(changed)}. Start a new run, or put them back"
            )
        return replace(settings, resume=True), folder
    name = settings.run
    if not name:
        stem = f"{prepared.source}-{settings.recipe}"
        taken = [int(p.name[-3:]) for p in common.runs_dir().glob(f"{stem}-[0-9][0-9][0-9]")]
        name = f"{stem}-{max(taken, default=0) + 1:03d}"
    folder = common.runs_dir(name)
    used = folder.exists() and any(p.name != ".lock" for p in folder.glob("*"))
    if used and not settings.overwrite:
        raise UserError(f"the run {name} exists; choose another --run, --resume or --overwrite")
    if folder.exists():
        with common.locked(folder):
            pass  # a run that is being trained is not deleted
        shutil.rmtree(folder)
    return settings, folder


def describe_data(prepared):
    """Return what identifies the data and the split of a run."""
    return {
        "source": prepared.source,
        "films": len(prepared.films),
        "size": list(prepared.films.shape[1:]),
        "pixels_and_labels": prepared.fingerprint,
        "split": common.fingerprint(prepared.splits.to_csv(index=False)),
        "folds": int(prepared.splits["fold"].max()) + 1,
    }


def describe_run(settings, prepared, folder, weights):
    """Return settings.json: the settings, what they came to, and what the films are like."""
    spread = data.film_statistics(prepared.films).quantile([0.005, 0.995])
    device = common.choose_device(settings.device)
    model, weights_used = network.build_model(
        weights, settings.recipe, settings.dropout, settings.freeze
    )
    return {
        **asdict(filled_in(settings, weights)),
        "run": folder.name,
        "source_used": prepared.source,
        "weights_used": weights_used,
        "frozen_stages": model.frozen,
        "parameters_trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "device_used": str(device),
        "precision_used": str(common.choose_precision(settings.precision, device))[6:],
        "class_names": list(CLASS_NAMES),
        "synthetic": prepared.source == "phantom",
        "data": describe_data(prepared),
        "split_seed": prepared.split_seed,
        "film_statistics": {name: list(spread[name]) for name in spread},
        "torch": str(torch.__version__),
        "disclaimer": common.DISCLAIMER,
    }


def named_folds(text, total):
    """Return the folds that --fold names, or end with a message."""
    names = range(total) if text == "all" else text.split(",")
    if not all(str(name).strip().isdecimal() and int(name) < total for name in names):
        raise UserError(f"--fold {text}: expected 0 to {total - 1}, or all")
    return [int(name) for name in names]


def begin_run(settings, folder, record):
    """Write settings.json, or check that a run that is gone on with began with these weights."""
    for part in folder.rglob(".*.part"):
        part.unlink()  # of a killed run; the folder is locked, so nobody writes it now
    began = common.read_json(folder / "settings.json") if settings.resume else record
    if began["weights_used"] != record["weights_used"]:
        raise UserError(
            f"{folder.name} began with the weights {began['weights_used']}, not "
            f"{record['weights_used']}; name the same ones with --weights"
        )
    common.write_json(record, folder / "settings.json")
    data_used = record["data"]
    print(
        f"run {folder.name}: {record['source_used']}, {data_used['films']} films of "
        f"{'x'.join(map(str, data_used['size']))} px, split seed {record['split_seed']}, recipe "
        f"{settings.recipe}, weights: {record['weights_used']}, "
        f"{record['parameters_trained']:,} parameters trained on {record['device_used']} in "
        f"{record['precision_used']}"
    )


def train(settings):
    """Train the folds that the settings name: the whole of this script in one call.

    Started by torchrun, its processes share the folds, or train a single one together.

    Returns
    -------
    model : MammogramNet
        The last fold's, with the weights of its best epoch.
    history : DataFrame
        One row an epoch of every fold of the run.
    folder : Path
        runs/<run>.
    """
    if settings.epochs < 0 or settings.batch_size < 1 or settings.lr <= 0:
        raise UserError("batch size must be at least 1, epochs not negative, the rate above 0")
    team = common.join_team()
    prepared = team.first(lambda: data.prepared_source(settings.source))
    total = int(prepared.splits["fold"].max()) + 1
    named_folds(settings.fold, total)  # before open_run deletes anything
    opened = open_run(settings, prepared) if team.rank == 0 else None
    settings, folder = team.collect(opened)[0]
    names = named_folds(settings.fold, total)
    # Several folds are dealt out to the processes; one fold is trained by all of them together.
    dealt = team.size > 1 and len(names) > 1
    mine, crew = (names[team.rank :: team.size], common.ALONE) if dealt else (names, team)
    with common.locked(folder) if team.rank == 0 else contextlib.nullcontext():
        weights = team.first(lambda: network.load_weights(settings.weights))
        record = describe_run(settings, prepared, folder, weights)
        if team.rank == 0:
            begin_run(settings, folder, record)
        problems, whole, model, history = [], True, None, pd.DataFrame()
        team.wait()  # nobody writes before the run is begun
        for fold in mine:
            try:
                model, history, whole = fit_fold(
                    settings, prepared, fold, weights, folder, record, crew
                )
            except UserError as error:
                if crew is team:
                    raise
                problems.append(f"fold {fold}: {error}")  # the other processes go on
            if not whole:
                break
        problems, whole = sum(team.collect(problems), []), all(team.collect(whole))
        if team.rank == 0 and team.size > 1:
            merge_histories(folder)
    if team.rank > 0:
        return model, pd.DataFrame(), folder
    if problems:
        raise UserError("; ".join(problems) + ". --resume goes on with these folds")
    history = pd.read_csv(folder / "history.csv") if (folder / "history.csv").is_file() else history
    follow = f"python 05_evaluate.py --run {folder.name}"
    again = f"python 04_train.py --resume --run {folder.name}"
    print(f"run {folder.name}: {folder}\nNext: {follow if whole else again}")
    return model, history, folder


if __name__ == "__main__":
    model, history, run_folder = train(settings)


# %% Look: the curves of loss, accuracy, macro-F1 and malignant recall
def plot_history(history, title):
    """Draw a run's curves, one line a fold; the best epoch is marked.

    Parameters
    ----------
    history : DataFrame
        history.csv.
    title : str
        Of the figure.

    Returns
    -------
    figure : matplotlib.figure.Figure
        Three panels.
    """
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
    panels = [
        ("loss", "train_loss", "val_loss"),
        ("accuracy", "train_accuracy", "val_accuracy"),
        ("validation score", "val_macro_f1", "val_malignant_recall"),
    ]
    for axis, (label, first, second) in zip(axes, panels):
        for _, part in history.groupby("fold"):
            axis.plot(part["epoch"], part[first], color="#0072B2", lw=1.2, label=first)
            axis.plot(part["epoch"], part[second], color="#D55E00", lw=1.2, label=second)
            best = part.loc[part["val_loss"].idxmin()]
            axis.plot(best["epoch"], best[second], "o", color="#D55E00", ms=5)
        axis.set(xlabel="epoch", ylabel=label)
        if label != "loss":
            axis.set_ylim(-0.02, 1.02)
        handles, names = axis.get_legend_handles_labels()
        axis.legend(handles[:2], [name.replace("_", " ") for name in names[:2]], fontsize=8)
    figure.suptitle(title)
    return figure


if __name__ == "__main__" and len(history):
    figure = plot_history(history, f"{run_folder.name} (dots: epoch of the lowest validation loss)")
    common.show(figure, run_folder / "figures" / "history.png")
