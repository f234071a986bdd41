"""Step 2: from prepared films to augmented, balanced batches.

In:  data/<source>/films.npy and the tables beside it (step 1 is run if they are missing).
Out: MammogramDataset, the batches of an epoch, and their augmentation. Nothing is written
     but figures.

    python 02_dataset.py            shows a batch, the augmentation and the effect of the sampler
"""

# %% Imports: this script finds its own folder first, whatever the working directory is
import importlib
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

sys.path.insert(0, str(Path(globals().get("__file__", "cell")).resolve().parent))

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from sklearn.model_selection import StratifiedGroupKFold
from torch.nn import functional as F
from torch.utils.data import BatchSampler, Dataset, SequentialSampler, WeightedRandomSampler

import common
from common import CLASS_NAMES, MALIGNANT, NORMAL, UserError

prepare = importlib.import_module("01_prepare_data")


# %% Settings: change a value and run the cells below again; each name is a command-line flag
@dataclass
class Settings:
    """Which films, and how many at a time."""

    source: Literal["auto", "mias", "phantom", "own"] = "auto"  # auto: prepared last
    fold: int = 0  # the fold that is the test set
    batch_size: int = 8  # films in a batch
    augment: float = 1.0  # multiplies the strengths below; 0 switches augmentation off
    seed: int = 0  # of the order of films and of the augmentation


# The largest change either way. The rarer classes, drawn again and again by the sampler, are
# varied more. Not much more: a network could learn to tell strong augmentation from weak.
STRENGTHS = pd.DataFrame(
    {
        "rotation": [15.0, 10.0, 15.0],  # degrees
        "scale": [0.15, 0.10, 0.15],  # share of the size
        "shift": [0.03, 0.02, 0.03],  # share of the canvas side
        "mirror": [0.5, 0.5, 0.5],  # probability of turning the film upside down
        "gamma": [0.30, 0.20, 0.30],  # exponent between exp(-0.3) and exp(0.3)
        "contrast": [0.25, 0.15, 0.25],  # share of the grey values' spread
    },
    index=CLASS_NAMES,
)

if __name__ == "__main__":
    settings = common.command_line(Settings, __doc__)
    common.table(STRENGTHS, "largest change of the augmentation, per class")


# %% Open what step 1 prepared, and the parts of a fold
def prepared_source(source="auto"):
    """Open what was prepared last, or prepare it now with the default settings.

    Parameters
    ----------
    source : str
        "mias", "phantom", "own", or "auto" for the one prepared last.

    Returns
    -------
    prepared : Prepared
        From step 1.
    """
    sources = ("mias", "phantom", "own") if source == "auto" else (source,)
    states = [common.data_dir(name) / "prepared.json" for name in sources]
    states = [state for state in states if state.is_file()]
    if not states:
        print("nothing is prepared yet; running step 1 with its default settings")
        return prepare.prepare(prepare.Settings(source=source))
    newest = max(states, key=lambda state: state.stat().st_mtime)
    if newest.parent.name == "phantom":
        common.banner("SYNTHETIC PHANTOMS: figures from here on say nothing about mammograms.")
    return prepare.load_prepared(newest.parent.name)


def fold_parts(splits, labels, fold):
    """Return the films of one fold's training, validation and test set.

    Test is the fold itself. Validation is a stratified fifth of the other patients: it chooses
    the epoch, the temperature and the threshold, so that test is looked at once.

    Parameters
    ----------
    splits, labels : DataFrame
        As prepared, in the same order.
    fold : int
        The fold that is the test set.

    Returns
    -------
    parts : dict of str to ndarray of int
        Row numbers for "train", "validation" and "test".
    """
    if fold not in set(splits["fold"]):
        raise UserError(f"there is no fold {fold}; the folds are 0 to {splits['fold'].max()}")
    rest = np.flatnonzero(splits["fold"] != fold)
    worse, patients = prepare.worse_label(labels).iloc[rest], splits["patient"].iloc[rest]
    counts = worse.groupby(patients).first().value_counts()
    if len(counts) < 2 or counts.max() < 5:
        raise UserError(
            "validation needs at least 5 patients of some class beside the test fold; found "
            f"{counts.max()}. Add films, or choose more --folds in step 1"
        )
    dealer = StratifiedGroupKFold(n_splits=5, shuffle=True, random_state=fold)
    train, validation = next(dealer.split(rest, worse, patients))
    test = np.flatnonzero(splits["fold"] == fold)
    parts = {"train": rest[train], "validation": rest[validation], "test": test}
    seen = [set(splits["patient"].iloc[rows]) for rows in parts.values()]
    assert sum(map(len, seen)) == len(set.union(*seen)) == splits["patient"].nunique(), (
        "a patient is in two parts of the split"
    )
    return parts


if __name__ == "__main__":
    prepared = prepared_source(settings.source)
    labels = prepared.labels
    parts = fold_parts(prepared.splits, labels, settings.fold)
    parts_mix = {
        part: labels["label_name"].iloc[rows].value_counts() for part, rows in parts.items()
    }
    parts_mix = pd.DataFrame(parts_mix).reindex(CLASS_NAMES)
    common.table(parts_mix, f"films per class of fold {settings.fold}")


# %% The Dataset: a film, its label and its row number, read from the memory map
class MammogramDataset(Dataset):
    """Films of one part of a split, with the radiologists' circles as a map beside them.

    Parameters
    ----------
    prepared : Prepared
        From step 1.
    rows : sequence of int, optional
        Row numbers of the films; all of them by default.
    labels : ndarray of int, optional
        One label for each row of `prepared`, in place of the true ones (leak test).

    Notes
    -----
    Item n is ``(film, label, row)``: uint8 tensor of shape (1, height, width), int, int. The film
    number is in no item and no map: file order leaks the class (AUC 0.69 on MIAS).
    """

    CELL = 8  # canvas px for one px of the lesion map

    def __init__(self, prepared, rows=None, labels=None):
        self.prepared = prepared
        self.films = prepared.films
        self.rows = np.arange(len(self.films)) if rows is None else np.asarray(rows)
        self.labels = prepared.labels["label"].to_numpy() if labels is None else labels
        self.labels = torch.as_tensor(self.labels.copy())
        self.circles = prepared.findings.dropna(subset=["canvas_radius"]).groupby("image")
        unplaced = prepared.findings["canvas_radius"].isna()
        self.unplaced = set(prepared.findings.loc[unplaced, "image"])

    @classmethod
    def of_canvases(cls, canvases):
        """Wrap canvases (n, H, W) of uint8 that no table knows; all are called normal."""
        labels = pd.DataFrame({"image": [str(n) for n in range(len(canvases))], "label": NORMAL})
        none = pd.DataFrame({"image": [], "canvas_radius": []})
        return cls(SimpleNamespace(films=canvases, labels=labels, findings=none))

    def __len__(self):
        """Return the number of films."""
        return len(self.rows)

    def __getitem__(self, n):
        """Return film n of this part, its label and its row number in `prepared`."""
        row = int(self.rows[n])
        return torch.from_numpy(self.films[row][None].copy()), int(self.labels[row]), row

    def __getitems__(self, numbers):
        """Return a whole batch at once: films (B, 1, H, W) uint8, labels (B,), rows (B,)."""
        rows = self.rows[np.asarray(numbers)]
        films = torch.from_numpy(self.films[rows][:, None])
        return films, self.labels[rows], torch.from_numpy(rows)

    def lesion_maps(self, rows):
        """Draw the circles of films as maps.

        Parameters
        ----------
        rows : sequence of int
            Row numbers in `prepared`.

        Returns
        -------
        maps : float32 tensor, shape (B, 2, height / CELL, width / CELL)
            1 inside a benign (channel 0) or a malignant circle (channel 1), else 0. A circle
            counts at least the pixel that its centre lies in.
        known : bool tensor, shape (B,)
            Whether the maps are the whole truth: false for an abnormal film without a usable
            circle, which must not teach that it is normal everywhere.
        """
        height, width = (math.ceil(side / self.CELL) for side in self.films.shape[1:])
        ys, xs = np.mgrid[:height, :width] * self.CELL + (self.CELL - 1) / 2
        maps = np.zeros((len(rows), 2, height, width), np.float32)
        known = np.ones(len(rows), bool)
        for n, row in enumerate(np.asarray(rows)):
            image = self.prepared.labels["image"].iat[row]
            if image in self.circles.groups:
                for circle in self.circles.get_group(image).itertuples():
                    distance = np.hypot(xs - circle.canvas_x, ys - circle.canvas_y)
                    inside = distance <= max(circle.canvas_radius, distance.min())
                    maps[n, int(circle.severity == "M")][inside] = 1
            else:
                known[n] = self.prepared.labels["label"].iat[row] == NORMAL
            known[n] &= image not in self.unplaced
        return torch.from_numpy(maps), torch.from_numpy(known)


if __name__ == "__main__":
    dataset = MammogramDataset(prepared, parts["train"])
    film, label, row = dataset[0]
    print(f"film 0: {tuple(film.shape)} {film.dtype}, {CLASS_NAMES[label]}, row {row}")


# %% What films are like: by this a film of yours is judged to be like the training films, or not
def film_statistics(films, most=2000):
    """Measure films.

    Parameters
    ----------
    films : ndarray of uint8, shape (n, height, width)
        On the canvas; of more than `most`, evenly spread ones are taken.

    Returns
    -------
    statistics : DataFrame
        A row a film: breast (share of the canvas, 0 to 1), mean and sd of its grey values (0 to 1).
    """
    rows = []
    for n in np.unique(np.linspace(0, len(films) - 1, most).astype(int)):
        breast = films[n][films[n] > 0] / 255
        rows.append((breast.size / films[n].size, breast.mean(), breast.std()))
    return pd.DataFrame(rows, columns=["breast", "mean", "sd"])


if __name__ == "__main__":
    statistics = film_statistics(prepared.films)
    common.table(statistics.describe().round(3), f"the films in numbers (n = {len(statistics)})")


# %% Batches: whole batches come from memory, so that no worker processes are needed
def class_weights(labels):
    """Return a weight per class, float32 (3,), inverse to its number of films, mean film 1."""
    counts = np.bincount(labels, minlength=3)
    weights = len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return torch.tensor(weights, dtype=torch.float32)


def balanced_sampler(labels, generator):
    """Return a WeightedRandomSampler that draws every class equally often.

    Either this or class weights in the loss, not both: each alone makes the classes count alike;
    together they would count the rare classes twice.

    Parameters
    ----------
    labels : tensor of int, shape (n_films,)
        Labels of the training films.
    generator : torch.Generator
        Random state, on the CPU.
    """
    weights = class_weights(labels)[labels]
    return WeightedRandomSampler(weights.tolist(), len(labels), generator=generator)


def batches(dataset, batch_size, sampler=None, rank=0, size=1):
    """Yield ``(films, labels, rows)`` of an epoch; in order if there is no sampler.

    Of `size` processes that train together, each takes every size-th film of a larger batch; the
    last, smaller batch is left out there, since all must take part in every step.
    """
    order = SequentialSampler(dataset) if sampler is None else sampler
    for numbers in BatchSampler(order, batch_size * size, drop_last=size > 1):
        yield dataset.__getitems__(numbers[rank::size])


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(settings.seed)
    sampler = balanced_sampler(dataset.labels[dataset.rows], generator)
    films, batch_labels, rows = next(batches(dataset, settings.batch_size, sampler))
    figure, axes = plt.subplots(1, len(films), figsize=(10, 3), layout="constrained", squeeze=False)
    for axis, film, label in zip(axes.flat, films, batch_labels):
        axis.imshow(film[0], cmap="gray", vmin=0, vmax=255)
        axis.set_title(CLASS_NAMES[label], fontsize=9)
        axis.axis("off")
    figure.suptitle(f"A training batch drawn by the sampler: {tuple(films.shape)}, {films.dtype}")
    common.show(figure, prepared.folder / "figures" / "batch.png")


# %% Augmentation: one affine map and one change of the grey values a film, for the whole batch
def augment(films, labels, generator, strength=1.0, maps=None):
    """Vary films in ways that keep their class, more for the rarer classes.

    Parameters
    ----------
    films : float32 tensor, shape (B, 1, height, width)
        Grey values, 0 (black) to 1, on any device.
    labels : int tensor, shape (B,)
        They choose the row of `STRENGTHS`.
    generator : torch.Generator
        Random state on the CPU, so that a run can be resumed and repeated on any device.
    strength : float
        Multiplies the strengths; 0 changes nothing.
    maps : float32 tensor, shape (B, C, h, w), optional
        Masks or heat maps over the same canvas, at any resolution; they go where the film goes.

    Returns
    -------
    films : float32 tensor
        As before, 0 to 1.
    maps : float32 tensor or None
        As before.
    """
    if strength == 0:
        return films, maps
    count, height, width = len(films), *films.shape[2:]
    limits = torch.tensor(STRENGTHS.to_numpy(), dtype=torch.float32)[labels.cpu()] * strength
    limits[:, 3] = torch.tensor(STRENGTHS["mirror"].to_numpy(), dtype=torch.float32)[labels.cpu()]
    draw = torch.rand(count, 7, generator=generator) * 2 - 1
    angle = draw[:, 0] * limits[:, 0] * math.pi / 180
    scale = torch.exp(-draw[:, 1] * limits[:, 1])
    flip = torch.where(draw[:, 2].abs() < limits[:, 3], -1.0, 1.0)
    aspect = height / width
    theta = torch.zeros(count, 2, 3)  # from canvas coordinates -1..1 back to the original's
    theta[:, 0, 0] = scale * torch.cos(angle)
    theta[:, 0, 1] = -scale * torch.sin(angle) * aspect * flip
    theta[:, 1, 0] = scale * torch.sin(angle) / aspect
    theta[:, 1, 1] = scale * torch.cos(angle) * flip
    theta[:, :, 2] = 2 * draw[:, 3:5] * limits[:, 2:3]  # the canvas is 2 wide
    theta = theta.to(films.device)

    def move(images):
        grid = F.affine_grid(theta, images.shape, align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)

    films = move(films)
    grey = torch.exp(draw[:, 5:7] * limits[:, 4:6]).to(films.device)[:, :, None, None, None]
    # black stays black: both changes leave 0 where it is
    films = (films.clamp(0, 1) ** grey[:, 0] * grey[:, 1]).clamp(0, 1)
    return films, None if maps is None else move(maps)


def plot_augmentation(dataset, row, generator, strength):
    """Draw a film and eight variations of it as if it were malignant, its circles carried along."""
    films = torch.from_numpy(dataset.films[[row] * 8][:, None]) / 255
    maps, _ = dataset.lesion_maps([row] * 8)
    varied, moved = augment(films, torch.full((8,), MALIGNANT), generator, strength, maps)
    figure, axes = plt.subplots(1, 9, figsize=(10, 2.6), layout="constrained")
    shown = [(films[0], maps[0]), *zip(varied, moved)]
    for n, (axis, (film, lesion)) in enumerate(zip(axes, shown)):
        extent = (-0.5, film.shape[2] - 0.5, film.shape[1] - 0.5, -0.5)
        axis.imshow(film[0], cmap="gray", vmin=0, vmax=1, extent=extent)
        if lesion.max() > 0.5:
            axis.contour(lesion.amax(0), [0.5], colors="#E69F00", extent=extent, origin="upper")
        axis.set_title("original" if n == 0 else str(n), fontsize=9)
        axis.axis("off")
    figure.suptitle(f"Film {row} under eight augmentations, its circles carried along")
    return figure


if __name__ == "__main__":
    row = int(np.flatnonzero(labels["label"] != NORMAL)[0])
    figure = plot_augmentation(dataset, row, generator, settings.augment)
    common.show(figure, prepared.folder / "figures" / "augmentation.png")


# %% The sampler's effect: classes drawn in one epoch, with and without it
if __name__ == "__main__":
    drawn = dataset.labels[dataset.rows][list(sampler)].numpy()
    epoch = pd.DataFrame(
        {
            "without": np.bincount(dataset.labels[dataset.rows], minlength=3),
            "with the sampler": np.bincount(drawn, minlength=3),
        },
        index=CLASS_NAMES,
    )
    common.table(epoch, "films of an epoch")
    figure, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
    tidy = epoch.rename_axis("class").reset_index().melt("class", var_name="", value_name="films")
    sns.barplot(data=tidy, x="class", y="films", hue="", palette=["#999999", "#009E73"], ax=axis)
    axis.set(xlabel="", title=f"Films of an epoch, fold {settings.fold} (n = {len(dataset)})")
    common.show(figure, prepared.folder / "figures" / "sampler.png")
