"""Step 2: from prepared films to augmented, balanced batches.

In:  data/<source>/films.npy and the tables beside it (step 1 is run if they are missing).
Out: MammogramDataset, the batches of an epoch, and their augmentation. Nothing is written
     but figures.

    python 02_dataset.py            shows batches, the augmentation, and what a network looks at
"""

# %% Imports: this script finds its own folder first, whatever the working directory is
import copy
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(globals().get("__file__", "cell")).resolve().parent))

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

import common
from common import BENIGN, CLASS_NAMES, MALIGNANT, NORMAL, UserError


# %% Settings: change a value and run the cells below again; each name is a command-line flag
@dataclass
class Settings(common.BatchSettings):
    """Which films, and how they are varied."""

    script = "02_dataset.py"
    source: str = "auto"  # mias, phantom, own; auto: what was prepared last
    fold: str = "0"  # the fold that is the test set; in step 4 also several (0,2), all or none
    validation: float = 0.2  # share of the other patients: taken as 1/2, 1/3, 1/4, 1/5 ...
    train_share: float = 1.0  # of the training patients, 1, 1/2, 1/3 ...: for a learning curve
    augment: float = 1.0  # multiplies the strengths of the augmentation; 0 switches it off


if __name__ == "__main__":
    settings = common.command_line(Settings, __doc__)


# %% The parts of a fold: training, validation and test patients
# The fold itself is the test set, looked at once. Of the other patients a stratified share is kept
# for validation: it chooses the epoch, the calibration and the threshold.
def named_folds(text, splits):
    """Return the folds that a setting such as "0", "0,2" or "all" names, a list of int.

    "none" is the number after the last: no film is a test film of it, all but validation train.
    """
    text, total = str(text), splits["fold"].nunique()
    if text == "none":
        return [total]
    names = [str(name).strip() for name in (range(total) if text == "all" else text.split(","))]
    if not all(name.isdecimal() and int(name) < total for name in names):
        raise UserError(f"--fold {text}: expected 0 to {total - 1}, all or none")
    return list(dict.fromkeys(int(name) for name in names))


def fold_parts(prepared, fold, validation=0.2, train_share=1.0):
    """Return row numbers, {"train", "validation", "test": ndarray of int}, of one fold."""
    tested = (prepared.splits["fold"] == fold).to_numpy()
    rest = prepared.labels[~tested]
    kept = common.deal_patients(rest, round(1 / validation), seed=fold, fewest=1) == 0
    train = rest[~kept]
    if round(1 / train_share) > 1:
        train = train[common.deal_patients(train, round(1 / train_share), fold, fewest=1) == 0]
    rows = {"train": train.index, "validation": rest.index[kept]}
    rows["test"] = prepared.labels.index[tested]
    patients = [set(prepared.labels["patient"][part]) for part in rows.values()]
    assert len(set.union(*patients)) == sum(map(len, patients)), "a patient is in two parts"
    return {name: part.to_numpy() for name, part in rows.items()}


if __name__ == "__main__":
    prepared = common.open_prepared(settings.source)
    chosen_fold = named_folds(settings.fold, prepared.splits)[0]
    parts = fold_parts(prepared, chosen_fold, settings.validation, settings.train_share)
    part = prepared.labels["label_name"]
    parts_mix = pd.DataFrame({name: part[rows].value_counts() for name, rows in parts.items()})
    parts_mix = parts_mix.reindex([name for name in CLASS_NAMES if name in parts_mix.index])
    common.table(parts_mix.fillna(0).astype(int), f"films per class of fold {chosen_fold}")


# %% The Dataset: films from the memory map, and the radiologists' circles as maps
# An item is a film, its label and its row. The row is for look-ups only and never enters the
# network: file order leaks the class (AUC 0.69 on MIAS from the number alone). A map says where a
# lesion is; an abnormal film without a usable circle has none that could be trusted.
class MammogramDataset(Dataset):
    """Films of one part of a split: item n is (film, label, row).

    Parameters
    ----------
    prepared : Prepared
        What step 1 left.
    rows : sequence of int, optional
        Row numbers of the films; all of them by default.
    labels : ndarray of int, optional
        One label for each row of `prepared`, in place of the true ones (leak test).
    reduce : int
        How many canvas pixels, each way, become one by their mean.
    """

    CELL = 8  # px of a film for one px of the lesion map

    def __init__(self, prepared, rows=None, labels=None, reduce=1):
        self.prepared, self.films, self.reduce = prepared, prepared.films, reduce
        self.images = prepared.labels["image"].to_numpy()
        self.rows = np.arange(len(self.films)) if rows is None else np.array(rows)
        true = prepared.labels["label"].to_numpy()
        self.all_labels = torch.tensor(true if labels is None else labels)
        self.labels = self.all_labels[self.rows]
        placed = prepared.findings["canvas_radius"].notna()
        self.circles = {}
        for circle in prepared.findings[placed].itertuples():
            self.circles.setdefault(circle.image, []).append(circle)
        circled = np.isin(self.images, list(self.circles))
        # an abnormal film without a usable circle must not teach that it is normal everywhere
        unplaced = np.isin(self.images, prepared.findings["image"][~placed].to_list())
        self.known = (circled | (true == NORMAL)) & ~unplaced
        cancers = prepared.findings["image"][prepared.findings["severity"] == "M"]
        self.known &= (true != MALIGNANT) | np.isin(self.images, cancers.to_list())

    @classmethod
    def of_canvases(cls, canvases):
        """Wrap canvases (n, H, W) of uint8 that no table knows; all are called normal."""
        labels = pd.DataFrame({"image": [str(n) for n in range(len(canvases))], "label": NORMAL})
        none = pd.DataFrame({"image": [], "severity": [], "canvas_radius": []})
        return cls(SimpleNamespace(films=canvases, labels=labels, findings=none))

    def reduced(self, reduce):
        """Return the same films, reduced."""
        other = copy.copy(self)
        other.reduce = reduce
        return other

    def table(self):
        """Return the rows of labels.csv of these films."""
        return self.prepared.labels.iloc[self.rows]

    def __len__(self):
        """Return the number of films."""
        return len(self.rows)

    def __getitem__(self, n):
        """Return film n, uint8 (1, height, width), its label and its row in `prepared`."""
        films, labels, rows = self.__getitems__([n])
        return films[0], int(labels[0]), int(rows[0])

    def __getitems__(self, numbers):
        """Return a whole batch at once: films (B, 1, H, W) uint8, labels (B,), rows (B,)."""
        rows = self.rows[np.asarray(numbers)]
        films = torch.from_numpy(self.films[rows][:, None])
        if self.reduce > 1:
            films = block_means(films, self.reduce)
        return films, self.all_labels[rows], torch.from_numpy(rows)

    def lesion_maps(self, rows):
        """Draw the circles of films, given by their row numbers.

        Returns maps, float32 (B, 2, height / CELL, width / CELL), 1 inside a benign (channel 0) or
        a malignant circle (1), at least at the pixel of its centre; and bool (B,), whether they are
        the whole truth.
        """
        cell = self.CELL * self.reduce  # canvas px
        height, width = (math.ceil(side / cell) for side in self.films.shape[1:])
        ys, xs = np.mgrid[:height, :width] * cell + (cell - 1) / 2
        maps = np.zeros((len(rows), 2, height, width), np.float32)
        for n, image in enumerate(self.images[np.asarray(rows)]):
            for circle in self.circles.get(image, []):
                distance = np.hypot(xs - circle.canvas_x, ys - circle.canvas_y)
                inside = distance <= max(circle.canvas_radius, distance.min())
                maps[n, int(circle.severity == "M")][inside] = 1
        return torch.from_numpy(maps), torch.from_numpy(self.known[np.asarray(rows)])


if __name__ == "__main__":
    dataset = MammogramDataset(prepared, parts["train"])
    name = next((n for n in dataset.table()["image"] if n in dataset.circles), dataset.images[0])
    shown_row = int(np.argmax(dataset.images == name))
    part, (maps, _) = MammogramDataset(prepared, [shown_row])[0], dataset.lesion_maps([shown_row])
    print(f"film {tuple(part[0].shape)}, {CLASS_NAMES[part[1]]}; maps {tuple(maps.shape[1:])}")
    pictures = [(name, part[0][0], maps[0].amax(0)), *zip(("benign", "malignant"), 255 * maps[0])]
    figure, axes = common.draw_films(pictures, "A film and its lesion maps", size=(6, 4))
    common.show(figure, prepared.folder / "figures" / "lesion-map.png")


# %% Batches: every class equally often
# The sampler draws every class equally often; a batch of eight may differ by chance, the next cell
# counts an epoch. Either this or class weights in the loss, not both:
# together they would count the rare classes twice. Whole batches come from memory, so that no
# worker processes are needed.
def balanced_sampler(labels, generator):
    """Return a sampler that draws `len(labels)` films, every class equally often."""
    from sklearn.utils.class_weight import compute_sample_weight

    weights = compute_sample_weight("balanced", np.asarray(labels))
    return WeightedRandomSampler(weights.tolist(), len(labels), generator=generator)


def class_weights(labels):
    """Return a weight per class, float32 (3,), inverse to its number of films, mean film 1.

    0 for a class without films, or label smoothing would make all the loss of it.
    """
    counts = torch.bincount(labels, minlength=3)
    return (counts > 0) * len(labels) / (torch.count_nonzero(counts) * counts.clamp(min=1))


def prior_of(labels, balance):
    """Return how frequent the classes are, float32 (3,); alike if training saw them as they are."""
    counts = torch.bincount(labels, minlength=3).clamp(min=0.5)
    return counts / counts.sum() if balance != "none" else torch.ones(3)


def batches(dataset, batch_size, sampler=None):
    """Return a DataLoader of (films, labels, rows); in order if there is no sampler."""
    return DataLoader(dataset, batch_size, sampler=sampler, collate_fn=lambda batch: batch)


def shuffled_labels(labels, seed):
    """Permute labels between patients with the same number of films; returns int (n_films,).

    The leak test: a sound evaluation of a model trained on these falls to chance, in the mean of
    folds. A fold with many malignant films trains on few, so that pooled films fall below it.
    """
    rng = np.random.default_rng(seed)
    mixed = labels["label"].to_numpy().copy()
    groups = labels.groupby("patient").indices
    sizes = pd.Series({patient: len(rows) for patient, rows in groups.items()})
    for _, same_size in sizes.groupby(sizes):
        rows = np.array([groups[patient] for patient in same_size.index])  # (patients, films)
        mixed[rows] = labels["label"].to_numpy()[rows[rng.permutation(len(rows))]]
    return mixed


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(settings.seed)
    sampler = balanced_sampler(dataset.labels, generator)
    batch = next(iter(batches(dataset, settings.batch_size, sampler)))  # films, labels, rows
    pictures = [(CLASS_NAMES[row], part[0]) for part, row, _ in zip(*batch)]
    title = f"A training batch drawn by the sampler: {tuple(batch[0].shape)}, uint8"
    figure, axes = common.draw_films(pictures, title)
    common.show(figure, prepared.folder / "figures" / "batch.png")


# %% The sampler's effect: classes drawn in one epoch, with and without it
# Drawn by chance, two of three films of an epoch are normal; by the sampler, each class is a third.
# The price: a malignant film is drawn about twice an epoch, a normal one every second epoch.
if __name__ == "__main__":
    rows = list(balanced_sampler(dataset.labels, torch.Generator().manual_seed(0)))
    epoch_mix = {"without": dataset.labels, "with the sampler": dataset.labels[rows]}
    epoch_mix = {name: np.bincount(part, minlength=3) for name, part in epoch_mix.items()}
    epoch_mix = pd.DataFrame(epoch_mix, index=CLASS_NAMES)
    common.table(epoch_mix, f"an epoch of {len(dataset)} films, fold {chosen_fold}")


# %% Augmentation: how a film is varied each time that it is seen
# A kind gets films (B, 1, H, W), 0 to 1, the largest change for each (B,), and the generator. A
# move returns the way back from the varied canvas (x and y from -1 to 1) to the original's, as
# matrices (B, 3, 3); a change of grey values returns films, where black, which is no tissue, stays
# black. A new kind is one function, and one line in MOVES or GREYS.
def between(limit, generator):
    """Draw a number from -limit to limit for each of the limits (B,)."""
    return limit * (2 * torch.rand(len(limit), generator=generator) - 1)


def matrices(xx=1.0, xy=0.0, yx=0.0, yy=1.0, x=0.0, y=0.0):
    """Return (B, 3, 3) of the entries, each a number or (B,)."""
    entries = [xx, xy, x, yx, yy, y, 0.0, 0.0, 1.0]
    return torch.stack(torch.broadcast_tensors(*map(torch.as_tensor, entries)), -1).view(-1, 3, 3)


def mirror(films, probability, generator):
    """Flip some films top to bottom; the chest wall stays on the left."""
    chosen = torch.rand(len(films), generator=generator) < probability.clamp(max=0.5)
    return matrices(yy=torch.where(chosen, -1.0, 1.0))


def scale(films, share, generator):
    """Enlarge or shrink by up to exp(share)."""
    factor = torch.exp(between(share, generator))
    return matrices(xx=factor, yy=factor)


def rotation(films, degrees, generator):
    """Turn without shear: the coordinates of a canvas that is no square have two units."""
    angle, aspect = torch.deg2rad(between(degrees, generator)), films.shape[2] / films.shape[3]
    sin, cos = torch.sin(angle), torch.cos(angle)
    return matrices(xx=cos, xy=-sin * aspect, yx=sin / aspect, yy=cos)


def shift(films, share, generator):
    """Shift by a share of the canvas, which is 2 wide here."""
    return matrices(x=2 * between(share, generator), y=2 * between(share, generator))


def gamma(films, strength, generator):
    """Raise grey values to a power between exp(-strength) and exp(strength)."""
    return films ** torch.exp(between(strength, generator)).to(films.device)[:, None, None, None]


def contrast(films, strength, generator):
    """Multiply grey values by up to exp(strength)."""
    return films * torch.exp(between(strength, generator)).to(films.device)[:, None, None, None]


# How strong, for benign, normal and malignant films: the rarer classes, drawn again and again by
# the sampler, are varied more; not much more, or a network could tell them by it.
MOVES = {
    mirror: (0.5, 0.5, 0.5),  # probability
    scale: (0.15, 0.10, 0.15),  # share of the size
    rotation: (15.0, 10.0, 15.0),  # degrees
    shift: (0.03, 0.02, 0.03),  # share of the canvas side
}
GREYS = {
    gamma: (0.30, 0.20, 0.30),  # exponent between exp(-0.3) and exp(0.3)
    contrast: (0.25, 0.15, 0.25),  # factor between exp(-0.25) and exp(0.25)
}


def sampling_grid(theta, height, width):
    """Return F.affine_grid of matrices (B, 3, 3), in a third of its time: x and y are planes."""
    x, y = ((2 * torch.arange(n, device=theta.device) + 1) / n - 1 for n in (width, height))
    across, down, origin = theta[:, :2, :, None, None].unbind(2)  # (B, 2, 1, 1)
    return (across * x + down * y[:, None] + origin).movedim(1, 3)


def augment(films, labels, generator, strength=1.0, maps=None, window=1.0, centres=None):
    """Vary films (B, 1, H, W), float32, 0 to 1; maps over the same canvas go where they go.

    `labels` (B,) choose the strengths, `strength` multiplies them, `generator` lies on the CPU so
    that a run repeats on any device. Of films with `centres` (B, 2) a `window` is left, whose sides
    are that share of theirs. Returns films and maps (or None).
    """
    if strength == 0 and centres is None:
        return films, maps
    kinds = {**MOVES, **GREYS}
    limits = {kind: strength * torch.tensor(each)[labels.cpu()] for kind, each in kinds.items()}
    theta = torch.eye(3).repeat(len(films), 1, 1)
    for kind in MOVES:
        theta = kind(films, limits[kind], generator) @ theta
    if centres is not None:
        theta = matrices(xx=window, yy=window, x=centres[:, 0], y=centres[:, 1]) @ theta

    def move(images):
        sides = [round(side * window) for side in images.shape[2:]]
        grid = sampling_grid(theta.to(films.device), *sides)
        return F.grid_sample(images, grid, align_corners=False)

    films, maps = move(films), None if maps is None else move(maps)
    for kind in GREYS:
        films = kind(films, limits[kind], generator).clamp_(0, 1)
    return films, maps


if __name__ == "__main__":
    maps, _ = dataset.lesion_maps([shown_row] * 8)
    part = torch.from_numpy(prepared.films[[shown_row] * 8][:, None]) / 255
    options = torch.full((8,), MALIGNANT), torch.Generator().manual_seed(0), settings.augment, maps
    pictures = [("original", part[0, 0], maps[0].amax(0))]
    rows = zip(*augment(part, *options))
    pictures += [(n, row[0][0], row[1].amax(0)) for n, row in enumerate(rows, 1)]
    title = f"{dataset.images[shown_row]} under eight augmentations, its circles carried along"
    figure, axes = common.draw_films(pictures, title, size=(10, 2.6), white=1)
    common.show(figure, prepared.folder / "figures" / "augmentation.png")


# %% Two looks at a large film: the whole film reduced, and windows of it as it is
# Each shows a network as many rows at a step, 512 of a canvas of 1024, so both cost the same. The
# whole film shows how tissue is spread, a window small lesions and calcifications. Windows lie
# three of four times at a circle, where the film has one, else anywhere on the breast, and are
# called what their circles say, whatever their film is. A canvas of fewer than 1024 rows is trained
# on whole, and looked at in two ways only here.
ROWS = 512  # of a film that a step sees, at least where there are as many


def reduction(films):
    """Return how many times `ROWS` go into the rows of films (n, H, W), 1 at least."""
    return max(1, films.shape[1] // ROWS)


def block_means(films, side):
    """Return uint8 films (B, 1, H, W) reduced by `side`, each pixel the mean of its block."""
    return F.avg_pool2d(films.float(), side).round_().byte()


def window_centres(dataset, rows, window, generator):
    """Draw where to look at films, given by their row numbers: float (B, 2), x and y, -1 to 1."""
    height, width = dataset.films.shape[1:]
    drawn, centres = torch.rand(len(rows), 4, generator=generator).tolist(), []
    for row, (lesion, which, across, down) in zip(np.asarray(rows), drawn):
        circles = dataset.circles.get(dataset.images[row], [])
        if circles and lesion < 0.75:
            circle = circles[int(which * len(circles))]
            room = [max(side * window / 2 - circle.canvas_radius, 8) for side in (width, height)]
            x = circle.canvas_x + (2 * across - 1) * room[0]
            y = circle.canvas_y + (2 * down - 1) * room[1]
        else:
            ys, xs = np.nonzero(dataset.films[row, ::32, ::32])
            place = int(which * len(xs))
            y, x = (32 * ys[place], 32 * xs[place]) if len(xs) else (height / 2, width / 2)
        centres.append((2 * (x + 0.5) / width - 1, 2 * (y + 0.5) / height - 1))
    return torch.tensor(centres, dtype=torch.float32).clamp(window - 1, 1 - window)


def window_labels(labels, maps, known):
    """Return the labels (B,) of windows whose maps (B, 2, h, w) are `known`, the films' else.

    A lesion counts from four pixels of the map on.
    """
    benign, malignant = ((maps > 0.5).sum((2, 3)) > 3).cpu().unbind(1)
    seen = torch.where(benign, BENIGN, torch.full_like(labels, NORMAL))
    seen = torch.where(malignant, MALIGNANT, seen)
    return torch.where(known.cpu() & (labels != NORMAL), seen, labels)


def two_looks(dataset, row):
    """Return pictures [(title, array)] of a film: the whole of it reduced, and four windows."""
    share, rows = 1 / max(reduction(dataset.films), 2), [row] * 4
    films = torch.from_numpy(dataset.films[rows][:, None])  # (4, 1, H, W)
    maps, known = dataset.lesion_maps(rows)
    labels, generator = dataset.all_labels[rows], torch.Generator().manual_seed(1)
    centres = window_centres(dataset, rows, share, generator)
    windows, maps = augment(films / 255, labels, generator, 0, maps, share, centres)
    names = [CLASS_NAMES[label] for label in window_labels(labels, maps, known)]
    whole = "the film reduced", block_means(films[:1], round(1 / share))[0, 0] / 255
    return [whole, *((f"a window, {name}", film[0]) for name, film in zip(names, windows))]


if __name__ == "__main__":
    pictures = two_looks(dataset, shown_row)
    title = f"{dataset.images[shown_row]}: {prepared.films.shape[1:]} px, looked at in two ways"
    figure, axes = common.draw_films(pictures, title, size=(9, 4), white=1)
    common.show(figure, prepared.folder / "figures" / "looks.png")
