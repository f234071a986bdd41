"""Benchmarks: how fast the project is, as ratios measured in one run on one machine.

In:  synthetic phantoms (made in data/benchmarks), or the MIAS films that step 1 prepared.
Out: runs/benchmarks.csv and the same table on the screen; curve's picture beside it. No film or
     run of yours is touched; data/benchmarks can be deleted afterwards.

    python tests/benchmarks/benchmarks.py                     everything but the last three
    python tests/benchmarks/benchmarks.py --only epoch bf16   some of the benchmarks
    python tests/benchmarks/benchmarks.py --only quality      what bf16 does to what is learned
    python tests/benchmarks/benchmarks.py --only curve        what more training patients do to it
    python tests/benchmarks/benchmarks.py --only earlier      a training beside an earlier commit's;
        for both looks --source mias --size 1024x576 --weights FILE --earlier 9dc470f
    python tests/benchmarks/benchmarks.py --quick             a try on tiny films

Nothing else should run on the machine. What is compared runs in turns, so that a machine that
slows down meanwhile slows both sides, and medians are shown.
"""

# %% Imports: this script finds the project and its tests first, whatever the working directory is
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, Tuple
from unittest import mock

sys.path.insert(0, str(Path(globals().get("__file__", "cell")).resolve().parents[1]))
sys.path.insert(0, str(Path(globals().get("__file__", "cell")).resolve().parents[2]))

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scripts
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models import resnet18
from torchvision.transforms import v2

import common
from common import UserError

steps = scripts.definitions("04_train")
data, network = steps.data, steps.network
NAMES = ("epoch", "ordinary", "preparation", "flat", "bf16", "quality", "curve", "earlier")


# %% Settings: change a value and run the cells below again; each name is a command-line flag
@dataclass
class Settings:
    """What to measure, and on what."""

    source: Literal["phantom", "mias"] = "phantom"  # mias: as step 1 prepared it
    only: Tuple[str, ...] = NAMES[:-3]  # some of NAMES; quality, curve and earlier train for long
    quick: bool = False  # a try: tiny films, one round
    size: str = "512x288"  # canvas, height x width in px, of all but flat
    films: int = 0  # prepared films, 64 % of them train; 0: 160, on a GPU 3220
    batch_size: int = 8  # films in a batch
    rounds: int = 3  # epochs of each side; their median counts
    flat_size: str = "64x36"  # canvas of flat, where the number of films matters, not their size
    flat_films: int = 32200  # the largest number of films of flat; also a tenth and a hundredth
    flat_steps: int = 300  # batches that flat times, drawn from the whole training set
    seeds: int = 3  # trainings of quality in each precision, of curve with each share
    epochs: int = 0  # of each of them; 0: as many as step 4 takes
    earlier: str = "HEAD~1"  # the commit that earlier compares with
    weights: str = "auto"  # they start from, as in step 4
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of our side, as in step 4


def filled_in(settings):
    """Return the settings with `quick` and the automatic values put in."""
    if unknown := set(settings.only) - set(NAMES):
        raise UserError(f"--only {common.listing(unknown)}: expected some of {', '.join(NAMES)}")
    if settings.quick:
        tiny = {"size": "64x64", "films": 40, "batch_size": 4, "rounds": 1, "epochs": 1}
        settings = replace(settings, **tiny, flat_films=4000, flat_steps=4)
    on_gpu = common.choose_device(settings.device).type == "cuda"
    return replace(settings, films=settings.films or (3220 if on_gpu else 160))


def height_width(text):
    """Read a size such as "64x36"; step 1's own reader refuses canvases below 64 px."""
    height, width = map(int, text.split("x"))
    return height, width


if __name__ == "__main__":
    settings = filled_in(common.command_line(Settings, __doc__))
    results = {}


# %% The table: a row a figure, beside what the figure should be
def row(benchmark, what, value, unit, ratio=None, most=None, least=None, precision=None):
    """Return a row of the table.

    The target, `most` or `least`, is about the ratio to the other side of a comparison or, where
    there is none, about the value. A figure that could not be had is None, and `unit` says why;
    `precision` is given where it is not the run's.
    """
    judged = value if ratio is None else ratio
    target = f"at most {most:g}" if most else f"at least {least:g}" if least else ""
    good = judged is not None and (judged <= most if most else judged >= (least or 0))
    met = ("yes" if good else "no") if target else ""
    columns = "benchmark what value unit ratio target met precision".split()
    return dict(zip(columns, (benchmark, what, value, unit, ratio, target, met, precision)))


def finished(rows, settings):
    """Return the rows as a DataFrame, with what they were measured on in further columns."""
    device = common.choose_device(settings.device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    usual = str(common.choose_precision(settings.precision, device))[6:]
    table = pd.DataFrame(rows)
    return table.assign(
        precision=table["precision"].fillna(usual),
        device=str(device),
        threads=torch.get_num_threads(),
        machine=f"{name}, {cores()} cores{gpu}",
        torch=str(torch.__version__),
        date=time.strftime("%Y-%m-%d %H:%M"),
        settings=" ".join(f"{n}={v}" for n, v in asdict(settings).items() if n != "only"),
    )


def cores():
    """Return the number of cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count()


# %% Films: prepared ones, repeated with noise to any number on any canvas
def below(home):
    """Let the steps keep their data and runs below a folder, as a context manager."""
    folders = {"BCD_DATA_DIR": str(home), "BCD_RUNS_DIR": str(home / "runs")}
    return mock.patch.dict(os.environ, folders)


def run_script(name, home, **flags):
    """Run a script with flags, data and runs below `home`; return its variables.

    No picture is saved, since pictures are not what is timed.
    """
    unseen = mock.patch.object(
        common, "show", lambda figure, path=None, title="": plt.close(figure)
    )
    with below(home), unseen, mock.patch.object(sys, "path", [*sys.path]):
        return scripts.run(common.PROJECT / name, *scripts.flags(**flags))


def run_step_1(settings, home, **flags):
    """Run step 1 below `home`, in a try on few and small phantoms; return what it prepared."""
    few = {"patients": 24, "phantom_size": 256} if settings.quick else {}
    flags = {"source": settings.source, **few, **flags}
    return run_script("01_prepare_data.py", home, **flags).prepared


def prepared_films(settings, home):
    """Return prepared films to begin with, in memory: MIAS as it is prepared, or phantoms."""
    if settings.source == "mias":
        prepared = common.load_prepared("mias")
    else:
        prepared = run_step_1(settings, home, size=settings.size)
    # a database may have a class at its end: mix the patients, so that few films have all classes
    patient = prepared.labels["patient"]
    mixed = patient.drop_duplicates().sample(frac=1, random_state=0)
    order = patient.map(pd.Series(range(len(mixed)), mixed)).argsort(kind="stable").to_numpy()
    table, labels = (part.iloc[order] for part in (prepared.table, prepared.labels))
    return prepared._replace(films=prepared.films[order], table=table, labels=labels)


def repeated(prepared, count, size, home):
    """Save `count` films on canvases of `size`, copies of prepared ones with noise of their own.

    Each copy of a patient is a patient of its own. What comes back lies below `home` as step 1
    would have saved it, the films as a memory map.
    """
    resized = [np.asarray(Image.fromarray(film).resize(size[::-1])) for film in prepared.films]

    def films():
        rng = np.random.default_rng(0)
        for n in range(count):
            film = resized[n % len(resized)]
            noise = rng.integers(-3, 4, size) * (film > 0)  # black stays black
            yield (film + noise).clip(0, 255).astype(np.uint8)

    def copied(table):
        parts = [
            table.assign(**{n: table[n] + f"-{k}" for n in ("image", "patient") if n in table})
            for k in range(-(-count // len(resized)))
        ]
        return pd.concat(parts, ignore_index=True)

    labels, findings = copied(prepared.labels)[:count], copied(prepared.findings)
    findings = findings[findings["image"].isin(labels["image"])].reset_index(drop=True)
    down, across = np.divide(size, prepared.films.shape[1:])
    findings["canvas_x"] *= across
    findings[["canvas_y", "canvas_radius"]] *= down
    splits = labels[["image", "patient"]].assign(fold=common.deal_patients(labels, 5, 0, 1))
    tables = {"films.csv": copied(prepared.table)[:count], "labels.csv": labels,
              "findings.csv": findings, "splits.csv": splits}  # fmt: skip
    source = f"repeated-{count}-{size[0]}x{size[1]}"
    state = {"source": source, "films": count, "size": size, "crop": "breast"}
    with below(home):
        common.save_prepared(films(), tables, {**state, "split_seed": 0, "note": ""})
        return common.load_prepared(source)


AT_RANDOM = network.Weights(None, "none")


def new_state(prepared, settings, freeze, precision=None, look="auto"):
    """Return step 4's FoldState. Values of weights cost no time, so a random start will do."""
    chosen = steps.Settings(
        batch_size=settings.batch_size,
        freeze=freeze,
        looks=(look,),
        device=settings.device,
        precision=precision or settings.precision,
    )
    schedule = steps.schedule_of(steps.filled_in(chosen, prepared, AT_RANDOM))
    look, waits = schedule.index[-1], schedule.iloc[-1]  # on a large canvas windows
    parts = steps.network_and_optimizer(chosen, AT_RANDOM)
    return steps.FoldState(0, look, chosen, waits, steps.fold_films(prepared, 0, chosen), parts)


if __name__ == "__main__":
    home = common.data_dir("benchmarks") / ("quick" if settings.quick else "full")
    base = prepared_films(settings, home)
    films = repeated(base, settings.films, height_width(settings.size), home)
    print(f"{len(films.films)} films of {settings.size} px, copies of {len(base.films)}")


# %% Time in turns: a batch of an epoch, then the bare step of the same network, and so on
class Enough(Exception):
    """As many batches were timed as were asked for."""


class Turns(common.Progress):
    """A progress line that times the epoch it is given to, and runs a bare step after each batch.

    ``bare(count)`` runs one with `count` films. On a GPU a turn is 25 batches, since it ends with
    waiting for the GPU; after `most` batches `Enough` is raised. `ours` and `bares` are the seconds
    of each turn. What an epoch does before its first batch is in its first turn.
    """

    def __init__(self, total, label, bare, device, most=None):
        super().__init__(total, label)
        self.bare, self.most, self.device = bare, most, device
        self.turn = 1 if device.type == "cpu" else 25
        self.ours, self.bares, self.counts, self.batches, self.own_memory = [], [], [], 0, 0
        self.mark = now(device)

    def step(self, count=1, text=""):
        """Take note of a batch; when the turn is over, time as many bare steps."""
        super().step(count, text)
        self.counts.append(count)
        if len(self.counts) >= self.turn or self.done >= self.total:
            middle = now(self.device)
            for films in self.counts:
                self.bare(films)
            end = now(self.device)
            self.ours.append(middle - self.mark)
            self.bares.append(end - middle)
            self.batches, self.counts = self.batches + len(self.counts), []
            self.own_memory = max(self.own_memory, own_memory())
            if self.most and self.batches >= self.most:
                raise Enough
            self.mark = now(self.device)


def now(device):
    """Return the time in seconds, when all that was asked of the device is done."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def own_memory():
    """Return the bytes that this process holds beside mapped files; 0 where that is not known."""
    with contextlib.suppress(OSError):
        resident, shared = Path("/proc/self/statm").read_text().split()[1:3]
        return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
    return 0


def peak_memory():
    """Return the most bytes that this process ever held; None where that is not known."""
    with contextlib.suppress(OSError):  # Linux: getrusage would give the parent's, if that is more
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    with contextlib.suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes
    return None


def bare_step(state, training):
    """Return a function that runs the network, and trains it, on a resident random batch.

    The network is the fold's own, so that everything about it is the same: forward, and for
    training the films' loss, backward, clipping and the optimiser; nothing else.
    """
    model = state.model if training else state.average.module
    device = common.choose_device(state.settings.device)
    dtype = common.choose_precision(state.settings.precision, device)
    films = state.train_films.films
    times = data.reduction(films) if training else state.train_films.reduce
    sides = [side // times for side in films.shape[1:]]
    films = torch.rand(state.settings.batch_size, 1, *sides)
    films = films.to(device, memory_format=torch.channels_last)
    labels = torch.arange(len(films), device=device) % 3

    def step(count):
        batch = films[:count] if training else films[:count].repeat(2, 1, 1, 1)  # and mirrored
        with torch.set_grad_enabled(training):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits, _ = model(batch)
            if training:
                state.optimizer.zero_grad(set_to_none=True)
                nn.functional.cross_entropy(logits.float(), labels[:count]).backward()
                nn.utils.clip_grad_norm_(model.parameters(), state.settings.max_norm)
                state.optimizer.step()

    return step


def timed(run, total, label, bare, device, batches=None):
    """Return the Turns of ``run(progress)``, run once, or again and again up to `batches`.

    The first three batches are run before and not counted.
    """
    with contextlib.suppress(Enough):
        run(Turns(total, label, bare, device, 3))
    turns = Turns(total, label, bare, device, batches)
    with contextlib.suppress(Enough):
        run(turns)
        turns.ours[-1] += now(device) - turns.mark  # after the last batch
        while batches:
            run(turns)
    turns.close(f"{label}: {sum(turns.ours):.2f} s, bare {sum(turns.bares):.2f} s")
    return turns


# %% Close to the limit: an epoch against bare steps, validation against bare inference
def epoch_against_bare(prepared, settings):
    """Return rows: seconds of an epoch of step 4 divided by those of as many bare steps."""
    rows, device = [], common.choose_device(settings.device)
    most = 1.15 if device.type == "cuda" else 1.05
    kinds = ((3, "3 stages frozen"), (0, "all stages trained"))
    looks = steps.filled_in(steps.Settings(), prepared, AT_RANDOM)["looks"]
    for (freeze, stages), look in itertools.product(kinds, looks):
        name = f"{stages}, {look}" if len(looks) > 1 else stages
        state = new_state(prepared, settings, freeze, look=look)

        def validate(progress, state=state):
            with mock.patch.object(network, "predict", partial(network.predict, bar=progress)):
                steps.validate(state)

        sides = (
            ("epoch / bare steps", partial(steps.train_epoch, state), state.train_films, True),
            ("validation / bare inference", validate, state.validation_films, False),
        )
        for what, run, part, training in sides:
            label, bare = f"{what}, {name}", bare_step(state, training)
            rounds = [timed(run, len(part), label, bare, device) for _ in range(settings.rounds)]
            seconds = np.array([(sum(t.ours), sum(t.bares)) for t in rounds])  # (rounds, 2)
            ratio = np.median(seconds[:, 0] / seconds[:, 1])
            per_film = np.median(seconds[:, 0]) / len(part)
            rows.append(row("epoch", label, per_film, "s/film", ratio, most=most))
            turns = np.concatenate([(t.ours, t.bares) for t in rounds], axis=1)  # (2, turns)
            medians = np.median(turns, axis=1)
            label = f"... median of {turns.shape[1]} turns"  # without what comes once an epoch
            rows.append(row("epoch", label, medians[0], "s/turn", medians[0] / medians[1]))
    return rows


if __name__ == "__main__" and "epoch" in settings.only:
    results["epoch"] = epoch_against_bare(films, settings)


# %% Ahead of the ordinary script: what one would otherwise write, and fastai where it is there
class FilmFiles(Dataset):
    """Films opened, decoded, augmented and repeated to three channels one by one."""

    def __init__(self, paths, labels, size):
        self.paths, self.labels = list(paths), list(labels)
        self.transform = v2.Compose(
            [
                v2.ToImage(),
                v2.Resize(size),
                v2.RandomAffine(degrees=15, translate=(0.03, 0.03), scale=(0.85, 1.15)),
                v2.RandomHorizontalFlip(),
                v2.ColorJitter(brightness=0.25, contrast=0.25),
                v2.Grayscale(num_output_channels=3),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
            ]
        )

    def __len__(self):
        """Return the number of films."""
        return len(self.paths)

    def __getitem__(self, n):
        """Return film n, float32 (3, height, width), and its label."""
        return self.transform(Image.open(self.paths[n])), self.labels[n]


def ordinary(dataset, settings, workers):
    """Return a function that trains an epoch in the ordinary way: float32, Adam, a DataLoader."""
    device = common.choose_device(settings.device)
    loader = DataLoader(dataset, settings.batch_size, shuffle=True, num_workers=workers)
    model = resnet18(num_classes=3).to(device)
    optimizer, criterion = torch.optim.Adam(model.parameters()), nn.CrossEntropyLoss()

    def epoch():
        model.train()
        total = 0.0
        for films, labels in loader:
            films, labels = films.to(device), labels.to(device)
            optimizer.zero_grad()
            loss = criterion(model(films), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()
        return len(dataset)

    return epoch


def with_fastai(dataset, settings, size):
    """Return a function that trains an epoch with fastai's vision_learner, all stages."""
    from fastai.vision.all import ImageDataLoaders, Resize, aug_transforms, vision_learner

    loaders = ImageDataLoaders.from_lists(
        Path(dataset.paths[0]).parent, dataset.paths, dataset.labels, valid_pct=0.02,
        item_tfms=Resize(size, method="squish"), batch_tfms=aug_transforms(), num_workers=0,
        bs=settings.batch_size, device=common.choose_device(settings.device), n_inp=1,
    )  # fmt: skip
    learner = vision_learner(loaders, resnet18, pretrained=False, n_out=3)

    def epoch():
        with learner.no_bar(), learner.no_logging():
            learner.fit(1)
        return len(loaders.train) * settings.batch_size + len(loaders.valid_ds)

    return epoch


def ours(prepared, settings, freeze, precision=None):
    """Return a function that trains an epoch of step 4."""
    state = new_state(prepared, settings, freeze, precision)
    count = len(state.train_films)

    def epoch():
        steps.train_epoch(state, common.Progress(count, "an epoch of ours"))
        return count

    return epoch


def race(sides, rounds):
    """Return the median speed (films or runs a second) of functions that return how many."""
    speeds = {name: [] for name in sides}
    for number in range(rounds):
        for name, epoch in sides.items():
            start = time.perf_counter()
            speeds[name].append(epoch() / (time.perf_counter() - start))
            print(f"round {number + 1}: {name}: {speeds[name][-1]:.3g} a second", flush=True)
    return {name: float(np.median(values)) for name, values in speeds.items()}


def against_ordinary(prepared, settings):
    """Return rows: films/s of the ordinary script, of fastai and of step 4."""
    size = prepared.films.shape[1:]
    rows_used = data.fold_parts(prepared, 0)["train"]
    files, labels = prepared.table["file"].iloc[rows_used], prepared.labels["label"].iloc[rows_used]
    dataset = FilmFiles(files, labels, size)
    device, rows = common.choose_device(settings.device), []
    bf16 = common.choose_precision(settings.precision, device) != torch.float32
    same = 10 if device.type == "cuda" else 2.3 if bf16 else 1.15
    reference = "ordinary script, no workers"
    sides = {reference: ordinary(dataset, settings, 0)}
    if common.in_ipython() and multiprocessing.get_start_method() != "fork":
        rows.append(row("ordinary", "ordinary script, 2 workers", None, "run it as a file"))
    else:  # spawned workers import this file anew; a cell's Dataset is not in it
        sides["ordinary script, 2 workers"] = ordinary(dataset, settings, 2)
    try:
        sides["fastai's vision_learner"] = with_fastai(dataset, settings, size)
    except ImportError:
        rows.append(row("ordinary", "fastai's vision_learner", None, "fastai is not installed"))
    targets = {
        "ours, all stages trained": (same, 0),
        "ours, 3 stages frozen (default)": (max(3, same), 3),
    }
    if bf16:
        targets["ours, all stages trained, fp32"] = (1.15, 0, "fp32")
    for name, (_, *arguments) in targets.items():
        sides[name] = ours(prepared, settings, *arguments)
    speeds = race(sides, settings.rounds)
    for name, speed in speeds.items():
        fp32 = "float32" if "ours" not in name or "fp32" in name else None
        ratio = None if name == reference else speed / speeds[reference]
        least = targets.get(name, [None])[0]
        rows.append(row("ordinary", name, speed, "films/s", ratio, None, least, fp32))
    return rows


if __name__ == "__main__" and "ordinary" in settings.only:
    results["ordinary"] = against_ordinary(films, settings)


# %% Preparation: all cores against decoding alone in one process
def preparation(base, settings, home):
    """Return rows: films/s of decoding alone and of step 1's film work, and of a run of step 1."""
    paths = [Path(name) for name in base.table["file"]]
    laterality = dict(zip(paths, base.labels["laterality"]))
    size = height_width(settings.size)

    def decode():
        return len([np.array(Image.open(path)) for path in paths])

    def film_work():
        def work(path):
            common.prepare_film(path, laterality[path], size)

        return len(common.in_threads(work, paths, "film work of step 1"))

    speeds = race({"decode alone": decode, "film work": film_work}, settings.rounds)
    speed, ratio = speeds["film work"], speeds["film work"] / speeds["decode alone"]
    common.discard(home / base.source / "prepared.json")
    start = time.perf_counter()
    run_step_1(settings, home, images=paths[0].parent, size=settings.size, allow_partial=True)
    seconds = time.perf_counter() - start
    label, name = f"film work, {os.cpu_count()} threads", "preparation"
    return [
        row(name, "PIL decode alone, one process", speeds["decode alone"], "films/s"),
        row(name, label, speed, "films/s", ratio, least=0.8 * cores()),
        row(name, "... the ratio per core", ratio / cores(), "", least=0.8),
        row(name, "a run of step 1", len(paths) / seconds, "films/s"),
    ]


if __name__ == "__main__" and "preparation" in settings.only:
    results["preparation"] = preparation(base, settings, home)


# %% Flat: seconds per film and memory as the number of films grows, each in a process of its own
def measure_flat(source, settings):
    """Return figures of training on data/<source>; the work of a fresh process."""
    settings = Settings(**settings)
    start = time.perf_counter()
    state = new_state(common.load_prepared(source), settings, 3)
    built = time.perf_counter() - start
    run, total = partial(steps.train_epoch, state), settings.flat_steps * settings.batch_size
    device = common.choose_device(settings.device)
    turns = timed(run, total, source, bare_step(state, True), device, settings.flat_steps)
    return {
        "built": built,
        "seconds": sum(turns.ours) / turns.done,
        "relative": sum(turns.ours) / sum(turns.bares),
        "own": turns.own_memory / 1e6,
        "peak": (peak_memory() or float("nan")) / 1e6,
    }


def flat(base, settings, home):
    """Return rows for several numbers of films: the same number of batches out of all of them.

    The time per film is compared by its ratio to bare steps in the same process, so that a noisy
    machine does not count.
    """
    parts = (100, 1) if settings.quick else (100, 10, 1)
    counts = [settings.flat_films // part for part in parts]
    size = height_width(settings.flat_size)
    sources = [repeated(base, count, size, home).source for count in counts]
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import benchmarks as b;"
        "print(json.dumps(b.measure_flat(*json.loads(sys.argv[2]))))"
    )
    folder = str(common.PROJECT / "tests" / "benchmarks")
    found = {source: [] for source in sources}
    with below(home):
        for source in sources * settings.rounds:
            values = json.dumps([source, asdict(settings)])
            command = [sys.executable, "-c", code, folder, values]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            *lines, figures = done.stdout.splitlines()
            print(*lines, sep="\n", flush=True)
            found[source].append(json.loads(figures))
    medians = [pd.DataFrame(figures).median() for figures in found.values()]
    rows, first = [], medians[0]
    for count, median in zip(counts, medians):
        later = [{"ratio": median[n] / first[n], "most": 1.1} for n in ("relative", "own")]
        time_target, memory_target = later if median is not first else ({}, {})
        if not median["own"]:
            memory_target = {}  # no /proc here
        for what, part, unit, target in (
            (f"{settings.flat_steps} batches of {settings.batch_size}", "seconds", "s/film",
             time_target),
            ("open them and build the Trainer", "built", "s", {}),
            ("most memory beside mapped films", "own", "MB", memory_target),
            ("peak memory, mapped films too", "peak", "MB", {}),
        ):  # fmt: skip
            known = median[part] > 0
            figure = (median[part], unit) if known else (None, "not known on this system")
            rows.append(row("flat", f"{count:,} films: {what}", *figure, **target))
    return rows


if __name__ == "__main__" and "flat" in settings.only:
    results["flat"] = flat(base, settings, home)


# %% bf16 against fp32, where the hardware multiplies bf16 natively
def bf16_against_fp32(prepared, settings):
    """Return rows: films/s of an epoch in both precisions."""
    device = common.choose_device(settings.device)
    if common.choose_precision("auto", device) == torch.float32:
        return [row("bf16", "bf16 / fp32", None, "this device has no native bf16")]
    rows = []
    for freeze, name in ((3, "3 stages frozen"), (0, "all stages trained")):
        sides = {p: ours(prepared, settings, freeze, p) for p in ("fp32", "bf16")}
        speeds = race(sides, settings.rounds)
        ratio = speeds["bf16"] / speeds["fp32"]
        rows.append(row("bf16", f"fp32, {name}", speeds["fp32"], "films/s", precision="float32"))
        figures = (speeds["bf16"], "films/s", ratio)
        rows.append(row("bf16", f"bf16, {name}", *figures, precision="bfloat16"))
    return rows


if __name__ == "__main__" and "bf16" in settings.only:
    results["bf16"] = bf16_against_fp32(films, settings)


# %% No loss of quality for speed: the same fold in both precisions, from several seeds
@contextlib.contextmanager
def rounded_convolutions(device):
    """Give convolutions under autocast the arithmetic of bf16 hardware, where there is none.

    Inputs, weights and results are rounded to bf16, sums are kept in float32; backward too. A CPU
    without bf16 takes ten times as long for the same numbers.
    """
    plain = nn.Conv2d._conv_forward

    def rounded(self, films, weight, bias):
        if not torch.is_autocast_enabled(device.type):
            return plain(self, films, weight, bias)
        with torch.autocast(device.type, enabled=False):
            films, weight = (part.bfloat16().float() for part in (films, weight))
            return plain(self, films, weight, bias).bfloat16()

    if common.choose_precision("auto", device) == torch.float32:
        nn.Conv2d._conv_forward = rounded
    try:
        yield
    finally:
        nn.Conv2d._conv_forward = plain


def ready_to_train(base, settings, home):
    """Prepare the films of `base` below `home`; return the flags that step 4 takes from here."""
    folder = Path(base.table["file"].iloc[0]).parent
    run_step_1(settings, home, images=folder, allow_partial=True)
    names = "source device batch_size epochs weights".split()
    return {name: getattr(settings, name) for name in names}


def quality(base, settings, home):
    """Return rows: each look's validation loss and macro-F1 of fold 0, by precision and seed."""
    device = common.choose_device(settings.device)
    flags = ready_to_train(base, settings, home)
    flags.update(run="quality", overwrite=True, patience=10**6)  # all train equally long
    found = []
    for seed in range(settings.seeds):
        for precision in ("fp32", "bf16"):
            print(f"{precision}, seed {seed}", flush=True)
            with rounded_convolutions(device):
                done = run_script("04_train.py", home, precision=precision, seed=seed, **flags)
            if not done.whole:
                raise KeyboardInterrupt
            best = done.history.groupby("look")["val_loss"].idxmin()
            found.append(done.history.loc[best].assign(precision=precision, seed=seed))
    rows, found = [], pd.concat(found).set_index(["look", "precision", "seed"]).sort_index()
    for look, name in itertools.product(found.index.unique("look"), ("val_loss", "val_macro_f1")):
        values = found.loc[look, name]
        for (precision, seed), value in values.items():
            dtype = str(common.choose_precision(precision, device))[6:]
            label = f"{look}: {name}, seed {seed}"
            rows.append(row("quality", label, value, "", precision=dtype))
        full, half = values["fp32"], values["bf16"]
        apart, spread = abs(half.mean() - full.mean()), full.max() - full.min()
        ratio = apart / spread if spread > 0 else None
        label = f"{look}: {name}: means apart / spread of the fp32 seeds"
        rows.append(row("quality", label, apart, "", ratio, most=1))
    return rows


if __name__ == "__main__" and "quality" in settings.only:
    results["quality"] = quality(base, settings, home)


# %% The learning curve: all folds with a quarter, a half and all of the training patients
SHARES = (0.25, 0.5, 1.0)
CURVES = {"AUC malignant": "#D55E00", "AUC abnormal": "#0072B2", "macro F1": "#009E73"}


def learning_curve(base, settings, home):
    """Return pooled test metrics for each share of the training patients, seed by seed."""
    flags = {**ready_to_train(base, settings, home), "precision": settings.precision}
    found = []
    for seed in range(settings.seeds):
        for share in SHARES:
            run = f"share-{share:g}-seed-{seed}"
            run_script("04_train.py", home, run=run, fold="all", train_share=share, seed=seed,
                       overwrite=True, **flags)  # fmt: skip
            metrics = run_script("05_evaluate.py", home, run=run).metrics
            found += [{"share": share, "seed": seed, "metric": name, **metrics.loc[name]}
                      for name in CURVES]  # fmt: skip
    return pd.DataFrame(found)


def draw_curve(found, base, path):
    """Draw the mean over the seeds, and each seed's 95 % interval over patients."""
    kind = "SYNTHETIC PHANTOMS, " if base.source == "phantom" else ""
    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for place, (name, colour) in enumerate(CURVES.items()):
        part = found[found["metric"] == name]
        mean = part.groupby("share")["value"].mean()
        axis.plot(100 * mean.index, mean, "o-", color=colour, label=name)
        x = 100 * part["share"] + 2 * (place - 1) + part["seed"] / 2
        axis.vlines(x, part["low"], part["high"], color=colour, alpha=0.4)
    axis.axhline(0.5, color="#999999", ls="--", label="chance of an AUC")
    axis.set(xlabel="training patients (%)", ylabel="test value", xticks=[25, 50, 100])
    axis.set_title(f"{kind}n = {len(base.films)} films, split seed 0, mean of "
                   f"{found['seed'].nunique()} training seeds; bars: 95 % over patients",
                   fontsize=9)  # fmt: skip
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    common.show(figure, path)


if __name__ == "__main__" and "curve" in settings.only:
    curve = learning_curve(base, settings, home)
    draw_curve(curve, base, common.runs_dir("learning-curve.png"))
    means = curve.groupby(["metric", "share"])["value"].mean()
    results["curve"] = [row("curve", f"{name}, {share:.0%} of the training patients", value, "")
                        for (name, share), value in means.items()]  # fmt: skip


# %% An earlier commit: a training of fold 0 and --help, each a whole command, in turns
def beside_earlier(base, settings, home):
    """Return rows: seconds of both versions; each trains on what its own step 1 prepared."""
    films, code = Path(base.table["file"].iloc[0]).parent, home / "code"
    git = ["git", "-C", str(common.PROJECT), "archive", "--format=tar", settings.earlier]
    packed = subprocess.run(git, stdout=subprocess.PIPE)
    if packed.returncode:
        return [row("earlier", f"commit {settings.earlier}", None, "not in this copy's history")]
    common.discard(code)
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as file:
        file.extractall(code)
    folders = {settings.earlier: code, "now": common.PROJECT}

    def command(name, script, *words):
        with below(home / f"of-{name}"):
            subprocess.run([sys.executable, str(folders[name] / script), *words], check=True,
                           stdout=subprocess.DEVNULL)  # fmt: skip
        return 1

    flags = {"source": settings.source, "size": settings.size, "images": films}
    for name in folders:
        command(name, "01_prepare_data.py", *scripts.flags(**flags, allow_partial=True))
    epochs = settings.epochs or 5
    names = "source device batch_size weights precision".split()
    flags = {**{name: getattr(settings, name) for name in names}, "patience": epochs}
    flags = scripts.flags(**flags, epochs=epochs, run="timed", overwrite=True)
    kinds = {f"fold 0, {epochs} epochs": (1 / 1.5, "04_train.py", *flags)}
    kinds["--help of step 1"] = 0.6, "01_prepare_data.py", "--help"
    kinds["--help of step 4"] = 0.6, "04_train.py", "--help"
    rows = []
    for kind, (most, *words) in kinds.items():
        sides = {f"{kind}, {name}": partial(command, name, *words) for name in folders}
        before, after = (1 / speed for speed in race(sides, settings.rounds).values())
        rows.append(row("earlier", f"{kind}, {settings.earlier}", before, "s"))
        rows.append(row("earlier", f"{kind}, now", after, "s", after / before, most))
    return rows


if __name__ == "__main__" and "earlier" in settings.only:
    results["earlier"] = beside_earlier(base, settings, home)


# %% The whole table
if __name__ == "__main__":
    whole = finished(sum(results.values(), []), settings)
    machine, device, threads = whole.loc[0, ["machine", "device", "threads"]]
    shown = whole.loc[:, "benchmark":"precision"].round(4).astype(object)
    shown = shown.where(shown.notna(), "").set_index("benchmark")
    common.table(shown, f"{machine}; {device}, {threads} threads, torch {torch.__version__}")
    common.write_csv(whole, common.runs_dir("benchmarks.csv"))
    print(f"saved {common.runs_dir('benchmarks.csv')}")
    if settings.quick:
        common.banner("A QUICK TRY ON TINY FILMS: these ratios say nothing about the project.")
