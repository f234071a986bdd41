"""The project's package: what the five scripts share. It knows no loss, no metric and no network.

Sections, each a `# %%` line: names and folders; errors; settings and flags; files never half
written; device and processes; what the console shows; reading a film file; getting the films;
tables of your own; from film to canvas, and back; patients; what was prepared; runs; phantoms;
digests of MIAS.
"""

import atexit
import base64
import contextlib
import dataclasses
import datetime
import difflib
import errno
import filecmp
import hashlib
import http.client
import inspect
import io
import json
import math
import os
import pickle
import re
import runpy
import shutil
import socket
import sys
import tarfile
import tempfile
import textwrap
import time
import typing
import unicodedata
import warnings
import zipfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from PIL import Image, ImageFilter, ImageOps, ImageSequence, UnidentifiedImageError
from torch.nn import functional as F

# %% Names and folders

CLASS_NAMES = ("benign", "normal", "malignant")
BENIGN, NORMAL, MALIGNANT = range(3)
SEVERITY = (NORMAL, BENIGN, MALIGNANT)  # from harmless to worst
OTHER_SIDE = {"left": "right", "right": "left", "": ""}
LOOKS = ("whole", "window")  # what a network sees of a large film
COLOURS = {"benign": "#0072B2", "normal": "#999999", "malignant": "#D55E00"}  # Okabe and Ito, 2008
DISCLAIMER = "For research and teaching only. Not a medical device, not for diagnosis."
PROJECT = Path(__file__).resolve().parent


def data_dir(source=""):
    """Return the folder of prepared data, moved by the environment variable BCD_DATA_DIR."""
    return Path(os.environ.get("BCD_DATA_DIR") or PROJECT / "data").expanduser() / source


def runs_dir(run=""):
    """Return the folder of training runs, moved by the environment variable BCD_RUNS_DIR."""
    return Path(os.environ.get("BCD_RUNS_DIR") or PROJECT / "runs").expanduser() / run


def fold_name(fold, look):
    """Return the name, below a run, of the folder of a fold's network that has one of LOOKS."""
    return f"fold-{fold}" + ("-window" if look == "window" else "")


# %% Errors

FULL = (errno.ENOSPC, errno.EDQUOT)  # no space left on the disk, or none of one's quota


class UserError(Exception):
    """A message for the user: what was found, what was expected, what to do next."""

    def _render_traceback_(self):
        """Show the message alone in IPython (Spyder, VS Code), where a traceback would bury it."""
        return [f"error: {self}"]


def explain(error):
    """Put an exception into words for the user.

    Parameters
    ----------
    error : BaseException
        What was raised.

    Returns
    -------
    message : str
        One message without a traceback.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "stopped by the user; what was finished is saved"
    if isinstance(error, OSError) and error.errno in FULL:
        return f"the disk is full ({error.filename or 'while writing'}); free some space, run again"
    if isinstance(error, PermissionError):
        return f"no permission for {error.filename2 or error.filename}; close it or mend its rights"
    if isinstance(error, OSError):
        return f"{error.strerror or error}: {error.filename or 'no file name known'}"
    return f"unexpected {type(error).__name__}: {error} (--debug shows where; please report it)"


@contextlib.contextmanager
def in_words(path=None):
    """Turn a full disk and a missing permission into a UserError; a failed write names no file."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            error = error.__context__  # torch.save fails once more while it ends its file
        if getattr(error, "errno", 0) not in (*FULL, errno.EACCES, errno.EPERM, errno.EROFS):
            raise error
        error.filename = error.filename or path
        raise UserError(explain(error)) from None


def quiet_excepthook(kind, error, trace):
    """End a command-line run with one message on stderr instead of a traceback."""
    if "--debug" in sys.argv:
        sys.__excepthook__(kind, error, trace)
    else:
        sys.stdout.flush()
        print(f"\nerror: {explain(error)}", file=sys.stderr)


def refuse(names, what):
    """Raise a UserError that says what is wrong with names, if there are any."""
    if len(names):
        raise UserError(f"{what}: {listing(names)}")


def listing(names, most=8):
    """Return names as text, the first few and how many more there are."""
    names = [text if len(text := str(name)) < 120 else f"{text[:120]} ..." for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def nearest(name, names):
    """Return a hint at the name that was probably meant."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    return f" - did you mean {near[0]}?" if near else ""


# %% Settings and flags


# of settings that are numbers: the least and the most
RANGES = {"seed": (0, 2**32 - 1), "batch_size": (1, 4096), "folds": (2, 1000)}
RANGES.update(patients=(12, 99999), phantom_size=(128, 4096), validation=(0.001, 0.5))
RANGES.update(train_share=(0.001, 1), augment=(0, 5), freeze=(-1, 5), dropout=(0, 0.99))
RANGES.update(epochs=(0, 99999), lr=(1e-12, 10), backbone_lr=(0, 10))
RANGES.update(label_smoothing=(0, 0.99), lesion_weight=(0, 1000), ema=(0, 0.9999))
RANGES.update(patience=(0, 99999), max_norm=(0, 1e12))
RANGES.update(recall=(0, 1), tempering=(0, 1), resamples=(1, 10**6))


class ScriptSettings:
    """What the settings of all scripts can do; `script` is the file's name."""

    def __getattr__(self, name):
        """Say whose settings these are, where a cell asks for what they have not."""
        if name.startswith("_"):  # Python and IPython ask for much
            raise AttributeError(name)
        whose = f"`settings` are those of {self.script} now, which has no {name}"
        raise UserError(f"{whose}; run the Settings cell of this cell's script first")

    def __setattr__(self, name, value):
        """Refuse what is no setting, as a mistyped name, and values outside of their range."""
        kinds = {field.name: field.type for field in dataclasses.fields(self)}
        if name not in kinds:
            raise UserError(f"{self.script} has no setting {name!r}{nearest(name, kinds)}")
        kind, said = kinds[name], f"--{name.replace('_', '-')} {value!r}: expected"
        low, high = RANGES.get(name, (None, None))
        number = (int, np.integer) if kind is int else (int, float, np.number)
        if name in RANGES and not (isinstance(value, number) and low <= value <= high):
            raise UserError(f"{said} {low:.10g} to {high:.10g} ({kind.__name__}, without quotes)")
        if typing.get_origin(kind) is typing.Literal:
            choices = typing.get_args(kind)
            refuse(choices if value not in choices else (), f"{said} one of")
        elif typing.get_origin(kind) is tuple:  # in a cell a word or a list may be typed
            value = [value] if value is None or isinstance(value, (str, Path)) else value
            value = tuple(filter(None, value))  # "" and None name nothing
        super().__setattr__(name, value)


@dataclasses.dataclass
class SeedSettings(ScriptSettings):
    """What most scripts have."""

    seed: int = 0  # of every random choice in this script; a fold's parts hang on its number


@dataclasses.dataclass
class BatchSettings(SeedSettings):
    """What a script has that takes films in batches."""

    batch_size: int = 8  # films in a batch


@dataclasses.dataclass
class RunSettings(BatchSettings):
    """What a script has that works on a run."""

    run: str = ""  # name under runs/; empty: a new one in step 4, the newest in step 5
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    precision: typing.Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where hardware has it


def in_ipython():
    """Tell whether the code runs in IPython: Spyder's console, VS Code or a notebook."""
    return "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None


class _Parser(ArgumentParser):
    """An ArgumentParser that suggests the nearest flag when one is mistyped (status 2)."""

    def error(self, message):
        flags = [flag for action in self._actions for flag in action.option_strings]
        unknown = re.findall(r"unrecognized arguments: (--\S+)", message)
        hint = nearest(unknown[0].split("=")[0], flags) if unknown else ""
        self.exit(2, f"{self.prog}: {message}{hint or ' - --help lists the options'}\n")


def command_line(settings_class, description):
    """Return and print a script's settings: the values in its cell, changed by flags.

    Every field of the dataclass is a flag of the same name (``batch_size`` is ``--batch-size``);
    the comment on its line is the help. In a cell run by an IDE no flag is read.

    Parameters
    ----------
    settings_class : type
        A dataclass and ScriptSettings, whose fields are bool (False by default), int, float, str,
        a Literal or a tuple of str.
    description : str
        The script's docstring, shown by ``--help``.

    Returns
    -------
    settings : object
        An instance of `settings_class`.
    """
    flags = True
    if in_ipython():
        shell = sys.modules["IPython"].get_ipython()
        shell.extension_manager.load_extension("autoreload")  # an edited step is used next time
        shell.run_line_magic("autoreload", "2")
        main_file = getattr(sys.modules["__main__"], "__file__", None)
        flags = main_file and sys.argv[0] and os.path.samefile(main_file, sys.argv[0])
    else:
        sys.excepthook = quiet_excepthook
        plt.switch_backend("agg")  # MPLBACKEND may be a notebook's, which is not installed here
        with contextlib.suppress(AttributeError):  # of a stream that is no file
            sys.stdout.reconfigure(errors="backslashreplace")  # cp1252 cannot show every name
    if not first_rank():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    settings = settings_class(**(flag_values(settings_class, description) if flags else {}))
    words = ", ".join(f"{name}={value!r}" for name, value in vars(settings).items())
    print(textwrap.fill(f"settings: {words}", 100, break_on_hyphens=False), flush=True)
    return settings


def flag_values(settings_class, description):
    """Return the values of all flags, the settings' own where none is given."""
    layout = {"formatter_class": RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = _Parser(description=description, **layout)
    classes = filter(dataclasses.is_dataclass, reversed(settings_class.__mro__))
    # reading the comments takes a while
    source = "".join(map(inspect.getsource, classes if {"-h", "--help"} & {*sys.argv} else ()))
    comments = dict(re.findall(r"^\s+(\w+): .*?  # (.*)$", source, flags=re.MULTILINE))
    for field in dataclasses.fields(settings_class):
        text = comments.get(field.name, "").replace("%", "%%")
        options = {"help": text, "default": field.default}
        if field.type is bool:
            options["action"] = "store_true"
        elif typing.get_origin(field.type) is tuple:
            options.update(nargs="+", metavar=field.name.upper())
        elif typing.get_origin(field.type) is typing.Literal:
            options["choices"] = typing.get_args(field.type)
        else:
            options.update(type=field.type, metavar=field.type.__name__.upper())
        parser.add_argument("--" + field.name.replace("_", "-"), **options)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return {name: value for name, value in vars(parser.parse_args()).items() if name != "debug"}


def run_step(name, *arguments):
    """Run an earlier script as a file, in this process, with its default settings."""
    path, before = str(PROJECT / name), sys.argv
    try:
        sys.argv = [path, *arguments]
        runpy.run_path(path, run_name="__main__")
    finally:
        sys.argv = before


def end_here():
    """End a script whose work is done, on the command line; in an IDE the next cells go on."""
    if not in_ipython():
        sys.exit()


# %% Files, never half written


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary name beside `path`; the file or folder made there takes its place.

    A crash at any moment leaves the old one or the new one, never a part of it; between two
    folders there is a moment without either.

    Raises
    ------
    UserError
        If the disk is full or may not be written to. What was there before stays.
    """
    path, hidden = Path(path), f".{Path(path).name}.{os.getpid()}"
    temporary, old = path.with_name(f"{hidden}.part"), path.with_name(f"{hidden}.old")
    with in_words(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            if temporary.is_file():
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())  # the name must not reach the disk before the content
            elif path.is_dir():
                os.replace(path, old)  # no system moves a folder over a full one
            os.replace(temporary, path)
        finally:
            if old.exists() and not path.exists():
                os.replace(old, path)
            discard(temporary, old)


def discard(*paths):
    """Delete files and whole folders, if they are there."""
    for path in paths:
        path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)


def write_csv(table, path):
    """Write a DataFrame as CSV (UTF-8, no index), completely or not at all."""
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False, encoding="utf-8", lineterminator="\n")


def write_json(values, path):
    """Write plain values as indented JSON, NaN as null, completely or not at all."""
    with replacing(path) as temporary:
        values = json.loads(json.dumps(values, default=_plain), parse_constant=lambda name: None)
        text = json.dumps(values, indent=2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def _plain(value):
    """Turn numpy values into what JSON knows."""
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else str(value)


def read_json(path):
    """Read a JSON file, or end with a message that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is not there; was the step before this one run?") from None
    except ValueError as error:
        raise UserError(f"{path} is no valid JSON ({error}); make it again or delete it") from None


@contextlib.contextmanager
def locked(folder):
    """Hold a folder for this process; a second process is refused with a message.

    The lock is the operating system's, so that a killed process leaves none behind.
    """
    with in_words(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+b")
    with file:
        try:
            if os.name == "nt":
                import msvcrt

                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # as Linux and macOS, and as Windows say
            hint = "wait until it has finished, or choose another run name or BCD_DATA_DIR"
            raise UserError(f"another process is writing to {folder}; {hint}") from None
        except OSError as error:
            # some network drives have no locks: ENOSYS, ENOLCK, EOPNOTSUPP
            warn(f"{folder} cannot be locked ({error.strerror}); let no other process write there")
        yield


def fingerprint(*parts):
    """Return a short sha256 (16 hex digits) of values, for telling whether two things differ."""
    text = json.dumps(parts, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(path):
    """Return a file's sha256, 64 hex digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# %% Device and processes


def choose_device(name="auto"):
    """Return a torch.device: the named one, or the best that is there (cuda, mps, cpu)."""
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        if torch.cuda.is_available():  # processes of torchrun take a device each
            name = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    try:
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:150]
        raise UserError(f"no device {name!r} here ({reason}); try --device auto or cpu") from None


def choose_precision(name, device):
    """Return torch.float32 or torch.bfloat16.

    ``auto`` takes bfloat16 where the hardware multiplies it natively: recent GPUs, and CPUs with
    AVX512-BF16. Elsewhere bfloat16 is emulated and slower than float32.
    """
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device)[0] >= 8
    else:
        probe = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        native = device.type == "cpu" and bool(probe())
    return torch.bfloat16 if native else torch.float32


def first_rank():
    """Tell whether this process is the one that prints and draws: the first of torchrun's."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["RANK"] == "0"


def processes():
    """Return this process's rank and how many there are: those of torchrun, or (0, 1)."""
    if not dist.is_available() or not dist.is_torchelastic_launched():
        return 0, 1
    if not dist.is_initialized():
        # A process that is done waits for those that still train, however long that takes.
        dist.init_process_group(timeout=datetime.timedelta(days=30))
        atexit.register(dist.destroy_process_group)
    return dist.get_rank(), dist.get_world_size()


def collect(value):
    """Return the values of all processes as a list, on each of them; all wait for one another."""
    values = [value] * processes()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def first_process_first():
    """Let rank 0 through before the others: it makes what they find made."""
    rank, count = processes()
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and count > 1:
        dist.barrier()


# %% What the console shows


class Progress:
    """One line that stays on one line, and in a log file becomes one line at the end.

    Parameters
    ----------
    total : int
        Number of steps.
    label : str
        What is being done.
    """

    def __init__(self, total, label):
        self.total, self.label = total, label
        self.done, self.start, self.drawn = 0, time.perf_counter(), 0.0
        self.live, self.width = in_ipython() or sys.stdout.isatty(), 0

    def step(self, count=1, text=""):
        """Count `count` more steps as done and show `text` behind the bar."""
        self.done += count
        now = time.perf_counter()
        if self.live and (now - self.drawn > 0.1 or self.done == self.total):
            self.drawn = now
            left = (now - self.start) / max(self.done, 1) * (self.total - self.done)
            bar = "#" * int(20 * self.done / max(self.total, 1))
            line = f"{self.label} [{bar:<20}] {self.done}/{self.total}  {clock(left)} left  {text}"
            print("\r" + line.ljust(self.width), end="", flush=True)
            self.width = len(line)

    def close(self, text=None):
        """Finish the line; `text` takes the place of the bar."""
        seconds = time.perf_counter() - self.start
        line = text or f"{self.label}: {self.done} in {clock(seconds)}"
        print("\r" + line.ljust(self.width) if self.live else line, flush=True)


def clock(seconds):
    """Return seconds as minutes and seconds, such as 3:05 min."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"


def banner(*lines):
    """Print lines in a frame that cannot be missed."""
    frame = "!" * 100
    print("", frame, *(f"!! {line}" for line in lines), frame, "", sep="\n", flush=True)


def warn(message):
    """Print a warning on stderr and go on."""
    if first_rank():
        sys.stdout.flush()
        print(f"warning: {message}", file=sys.stderr, flush=True)


def warn_of(names, what):
    """Warn of names, if there are any: how many, what they are, and which."""
    if len(names):
        warn(f"{len(names)} {what}: {listing(names)}")


def table(frame, title):
    """Print a DataFrame under a title, whole and unwrapped; "-" stands for what is not defined."""
    print(f"\n{title}\n{frame.to_string(na_rep='-')}\n", flush=True)


def draw_films(pictures, title, rows=1, size=(10, 3), white=255):
    """Draw pictures [(title, (h, w))] in grey, black 0; return the figure and its axes, flat.

    A third entry is a map over the same film, whose outline at 0.5 is drawn.
    """
    columns = max(-(-len(pictures) // rows), 1)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, picture, *outline) in zip(axes.flat, pictures):
        axis.imshow(np.asarray(picture), cmap="gray", vmin=0, vmax=white)
        axis.set_title(str(name)[-44:], fontsize=9)  # paths may be names, as in CBIS-DDSM
        extent = (-0.5, picture.shape[1] - 0.5, picture.shape[0] - 0.5, -0.5)
        for over in (part for part in outline if part.max() > 0.5):
            axis.contour(over, [0.5], colors="#56B4E9", extent=extent, origin="upper")
    figure.suptitle(title, fontsize=10)
    return figure, axes.ravel()


def draw_circles(axis, findings, prefix=""):
    """Draw findings as circles, of film pixels or, with the prefix "canvas_", of the canvas."""
    columns = [prefix + name for name in ("x", "y", "radius")]
    for severity, x, y, radius in findings[["severity", *columns]].dropna().to_numpy():
        colour = COLOURS["malignant" if severity == "M" else "benign"]
        axis.add_patch(plt.Circle((x, y), radius, fill=False, color=colour))


def draw_heat(axis, film, heat):
    """Draw a heat map over a film (uint8) of the same shape, clearer where it is cold."""
    axis.imshow(film, cmap="gray", vmin=0, vmax=255)
    axis.imshow(heat, cmap="inferno", alpha=0.6 * np.clip(heat / max(heat.max(), 1e-9), 0, 1))
    axis.set(xticks=[], yticks=[])


def show(figure, path=None, title=""):
    """Save a figure, show it in the Plots pane where there is one, and close it.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
        The figure.
    path : Path, optional
        PNG file; its folder is made.
    title : str
        Over the whole figure, small.
    """
    if title:
        figure.suptitle(title, fontsize=8)
    if path is not None and first_rank():
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120, bbox_inches="tight")
        print(f"saved {path}")
    if in_ipython():
        plt.show()
    plt.close(figure)


# %% Reading a film file

FILM_SUFFIXES = (".pgm", ".png", ".bmp", ".jpg", ".jpeg", ".tif", ".tiff", ".dcm", ".dicom")
SIDE_FILES = ".txt .csv .tsv .json .xml .md .pdf .html .xls .xlsx .doc .docx .ini .db .log".split()
MASK = r"(^|[\W_])(masks?|gt|ground[\W_]?truths?|segmentations?|annotations?)([\W_\d]|$)"


def read_film(path, bits=None, notes=None, crop="breast"):
    """Read a film as grey values.

    Parameters
    ----------
    path : str or Path
        A PGM (binary or ASCII), PNG, BMP, JPEG or TIFF; DICOM when pydicom is there.
    bits : int, optional
        A film of more than 8 bits is divided by ``2**bits - 1``, unless its header says more; by
        default by the depth that holds 99.99 % of its own pixels. What lies above is clipped.
    notes : list, optional
        Takes what was guessed or is odd, in place of a warning.
    crop : "breast" or "none"
        Negatives are looked for in films of a breast only.

    Returns
    -------
    film : ndarray of uint8, shape (height, width)
        0 is black, upright as its header says.

    Raises
    ------
    UserError
        If the file is missing, no film, cut short, or cannot be read without a loss.
    """
    path = Path(path).expanduser()
    said, dicom = [] if notes is None else notes, is_dicom(path)
    try:
        pixels, depth = (read_dicom if dicom else read_image)(path, said)
    except FileNotFoundError:
        raise UserError(f"{path} is not there; check the name and the folder") from None
    except UnidentifiedImageError:
        what = f"{path} ({path.stat().st_size} bytes) is damaged, or of a kind that is not read"
        expected = "a PGM, PNG, JPEG, or a TIFF of 8 or 16 bits or float32 (not float64)"
        raise UserError(f"{what}; expected {expected}; copy it again, or save it so") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, (PermissionError, IsADirectoryError)):
            raise
        raise UserError(f"{path} cannot be decoded ({error}); copy it from the source") from None
    pixels = as_positive(pixels, said, stated=dicom) if crop == "breast" else pixels
    used = bits_in_use(bit_lengths(pixels))
    if depth == 8 and used <= (bits or 8) < 8:
        depth = bits
        said.append(f"has only {bits} of its 8 bits, as its whole set, and was made brighter")
    depth = depth or (bits if bits and bits >= 8 else max(used, 8))
    if used <= depth - 2:
        said.append(f"has only {used} of the {depth} bits of its file or set, so that it is dark")
    if pixels.dtype != np.uint8 or depth < 8:
        white = 2**depth - 1
        pixels = (pixels.clip(0, white) * (255 / white) + 0.5).astype(np.uint8)
    for what in said if notes is None else ():
        warn(f"{path}: {what}")
    return pixels


def read_image(path, said):
    """Return the pixels of a film that Pillow reads, and their depth if its header tells it."""
    with Image.open(path) as image:
        pages = getattr(image, "n_frames", 1)
        if pages > 1:
            areas = [page.width * page.height for page in ImageSequence.Iterator(image)]
            image.seek(areas.index(max(areas)))
            said.append(f"has {pages} pages, of which the largest is used")
        tags = image.tag_v2 if image.format == "TIFF" else {}
        layout = str(image.tile)
        if len(image.getbands()) > 1 and (";16" in layout or max(tags.get(258, (8,))) > 8):
            image, exif = one_of_channels(path), image.getexif()
            image.getexif().update(exif)
        # Pillow stretches a PGM to 16 bits, unless it is said to have them, true or not
        stretched = image.format == "PPM" and not re.search("65535|I;16", layout)
        image = ImageOps.exif_transpose(image)
        deep, clear = image.mode.startswith(("I", "F")), image.info.get("transparency")
        if image.mode in ("LA", "PA", "RGBA") or clear is not None and not deep:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
        if image.mode in ("1", "P") or len(image.getbands()) > 1:
            colours = np.array(image.convert("RGB"))
            image = image.convert("L")  # a grey film that was saved in colour
            tinted = np.ptp(colours, axis=2) > 32  # JPEG alone tints a grey film a little
            if tinted.mean() > 0.1:
                grey, blue = np.array(image).ravel(), colours[..., 2].ravel().astype(float)
                usual = np.bincount(grey, blue) / np.bincount(grey).clip(1)
                # How blue is what is equally bright? Jet 27 and more, viridis and hot up to 6.
                if (blue - usual[grey]).std() > 12:
                    raise UserError(f"{path} is in false colours, not in grey; take the grey film")
                said.append("is in false colours, of which the brightness is taken")
            elif tinted.any():
                said.append("has colours: marks on a film may give its label away")
        pixels = np.array(image)
    if deep and clear is not None:
        pixels[pixels == clear] = 0
    if tags.get(258) == (32,) and tags.get(339, (1,)) == (1,):  # Pillow takes them for signed
        pixels = pixels.view(np.uint32)
    if pixels.dtype == np.uint8:
        return pixels, 8
    if not np.isfinite(pixels).all():
        raise ValueError("pixels that are NaN or infinite")
    if pixels.dtype.kind == "f" and -1 < pixels.min() and pixels.max() <= 2:  # 0 to 1, or nearly
        pixels, stretched = pixels * 65535.0, True
    pixels = np.rint(pixels).astype(np.int64)
    if pixels.min() < 0:  # signed: black is what all but a few pixels lie above
        pixels = pixels - int(np.quantile(pixels, 1e-4))
        said.append("has grey values below zero, the lowest of which were made black")
    if tags.get(262) == 0:  # WhiteIsZero, which Pillow minds in films of 8 bits only
        pixels = 2 ** bits_in_use(bit_lengths(pixels)) - 1 - pixels
    return pixels, 16 if stretched else None


def one_of_channels(path):
    """Return a picture whose channels of 16 bits are equal as a grey one, else a UserError.

    Pillow would leave 8 bits out; torchvision reads PNG whole.
    """
    from torchvision.io import decode_png, read_file  # a second to import, and rarely needed

    with contextlib.suppress(RuntimeError):  # no PNG
        channels = decode_png(read_file(str(path))).numpy()
        equal = (channels[:3] == channels[0]).all() and (channels[3:] == 65535).all()
        if equal and channels.dtype == np.uint16:
            return Image.fromarray(channels[0])
    hint = 'save one: Image.fromarray(film[..., 0].astype("float32")).save("film.tif")'
    raise UserError(f"{path} has 16 bits in channels, of which 8 would be lost; {hint}")


def as_positive(pixels, said, stated=False):
    """Return a film's pixels with light tissue on black, none of them below zero.

    What lies at either end of the grey levels and is joined to the border is ground or padding.
    Beside it the breast is thin, so that it is darker there than inside; in a negative it is
    lighter. Of 1,914 films of MIAS and CBIS-DDSM that is unclear for 10, and wrong for none. A
    negative is inverted, unless its header has `stated` what is black; white padding is made black.
    """
    cell = max(1, round(max(pixels.shape) / 128))
    rows, columns = (slice(n // 25, n - n // 25, cell) for n in pixels.shape)  # frames are white
    sample = pixels[rows, columns]  # (about 128, about 128)
    low, high = np.quantile(sample, (0.001, 0.999))
    coarse = ((sample - low) * (255 / max(high - low, 1e-9))).clip(0, 255).astype(np.uint8)
    ends = (coarse <= 5) | (coarse >= 250)
    ground = joined_to_border(ends)
    tissue = np.pad(~ground, 4)  # means of it are 255 where a whole square is tissue
    near, inside = (filtered(tissue, ImageFilter.BoxBlur(n))[4:-4, 4:-4] == 255 for n in (1, 4))
    skin = near & ~inside
    if not inside.any():
        return pixels
    smooth = np.asarray(Image.fromarray(coarse).filter(ImageFilter.MedianFilter(5)))
    contrast = sum(of(smooth[inside]) - of(smooth[skin]) for of in (np.median, np.mean))
    contrast = contrast / max(smooth[near].std(), 1)  # MIAS and CBIS-DDSM: -0.37 to 4
    negative = contrast < -0.5 and np.median(coarse[skin | ground & (coarse > 5)]) > 102
    end = low if negative else high
    padded = (ground & (sample == end)).mean() > 0.05  # MIAS and CBIS-DDSM: up to 0.025
    if negative and (stated or contrast > -0.8) or padded and abs(contrast) <= 0.5:
        said.append("may be a negative, but that is not sure: look at it")
        return pixels
    if padded:
        mask = abs(pixels - end) <= 0.02 * (high - low)
        seed = np.zeros_like(mask)
        seed[rows, columns] = ground
        black = int(high) if negative else 0
        pixels = np.where(connected(seed & mask, mask), black, pixels).astype(pixels.dtype)
    if negative:
        white = 2 ** bits_in_use(bit_lengths(pixels)) - 1
        pixels = white - pixels.clip(None, white)
        said.append("taken for a negative, since tissue darkens inwards, and inverted")
    elif padded:
        said.append("has padding that is not black, and was made black")
    return pixels


def bit_lengths(pixels):
    """Count the pixels that need 0, 1, 2, ... bits; returns (65,)."""
    values, counts = pixels.clip(0).ravel(), None
    if pixels.dtype == np.uint8:  # in a tenth of the time
        values, counts = np.arange(256), Image.fromarray(pixels).histogram()
    return np.bincount(np.frexp(values.astype(np.float64))[1], counts, minlength=65)


def bits_in_use(counts):
    """Return the fewest bits, 1 at least, that hold 99.99 % of the pixels that were counted."""
    return max(int((counts.cumsum() >= 0.9999 * counts.sum()).argmax()), 1)


# What pydicom warns of changes no pixel, or is noted in read_dicom. For good, since
# warnings.catch_warnings is not safe in threads.
warnings.filterwarnings("ignore", module="pydicom")


def is_dicom(path):
    """Tell DICOM by the suffix or, where there is none or a piece of a UID, by what is inside."""
    suffix = path.suffix.lower()
    if suffix in (*FILM_SUFFIXES, *SIDE_FILES) or path.name == "DICOMDIR" or not path.is_file():
        return suffix in (".dcm", ".dicom")
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


@contextlib.contextmanager
def opened_dicom(path, **options):
    """Yield pydicom's reading of a file; what goes wrong with it becomes a UserError.

    pydicom is no requirement of this project. What a film of one frame keeps in functional groups
    (tomosynthesis) is brought to where other films have it.
    """
    try:
        import pydicom
    except ImportError:
        raise UserError(f"{path} needs pydicom: pip install pydicom, or export a PNG") from None
    try:
        film = pydicom.dcmread(path, **options)
        for kind in ("Shared", "PerFrame"):
            for group in film.get(f"{kind}FunctionalGroupsSequence") or ():
                for name in ("PixelValueTransformation", "FrameVOILUT", "FrameAnatomy"):
                    film.update((group.get(f"{name}Sequence") or [{}])[0])
        yield film
    except FileNotFoundError:
        raise
    except Exception as error:  # pydicom's are of all kinds: no decoder, no pixels, no DICOM
        reason, hint = " ".join(str(error).split()) or type(error).__name__, "export a PNG of it"
        if re.search("missing .*dependencies|Pillow does not support", reason):  # compressed
            hint = f"pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg, or {hint}"
        raise UserError(f"{path} cannot be read as a DICOM film ({reason[:200]}); {hint}") from None


def dicom_header(path):
    """Return patient and laterality (right, left) of a DICOM film, "" where it has none."""
    with opened_dicom(path, stop_before_pixels=True) as film:
        sides = [film.get(f"{whose}Laterality") for whose in ("Image", "Frame", "")]
        side = next(({"R": "right", "L": "left"}[s] for s in sides if s in ("R", "L")), "")
        return {"patient": str(film.get("PatientID") or ""), "laterality": side}


def looked_up(values, table, order):
    """Return values as a DICOM lookup table changes them, and the range that it can reach.

    Entries of 8 bits come one or two to a word, and some makers write 16 bits for what they store
    12 in. ValueError if the data are not as described.
    """
    (entries, first, bits), data = table.LUTDescriptor, table.LUTData
    entries = entries or 1 << 16
    words = np.frombuffer(data, order) if isinstance(data, bytes) else np.ravel(data).astype("u2")
    if bits == 8 and len(words) == (entries + 1) // 2:
        words = words.astype("<u2").view(np.uint8)[:entries]
    used = int(words.max()).bit_length()
    if len(words) != entries or used > bits:
        raise ValueError(f"its lookup table is {len(words)} x {used} bits, not {entries} x {bits}")
    white = 2 ** (bits if used > bits - 2 else used) - 1
    first -= (first > values.max()) << 16  # a number below zero that was written as unsigned
    # a value between two entries gets the lower one
    return words[(values - first + 1e-6).clip(0, entries - 1).astype(int)], (0, white)


def windowed(values, film):
    """Return values as a DICOM film's window changes them, and their range: PS3.3 C.11.2.1."""
    center, width = (np.ravel(film[f"Window{name}"].value)[0] for name in ("Center", "Width"))
    curve = film.get("VOILUTFunction") or "LINEAR"
    linear = curve == "LINEAR"  # whose ends are the middles of the outermost values
    if curve not in ("LINEAR", "LINEAR_EXACT", "SIGMOID") or width < max(linear, 1e-9):
        raise ValueError(f"its window is {curve} and {width:g} wide")
    place = (values - center + linear / 2) / max(width - linear, 1e-9)
    return np.tanh(2 * place) / 2 if curve == "SIGMOID" else place, (-0.5, 0.5)


def read_dicom(path, said):
    """Return the pixels of a DICOM film as its header wants them shown, and 16, their depth.

    With the lookup table or the window, inverted, and black where padding touches the border.
    """
    with opened_dicom(path) as film:
        photometric = str(film.get("PhotometricInterpretation") or "MONOCHROME2")
        bits, last, syntax = film.BitsStored, film.HighBit, film.file_meta.TransferSyntaxUID
        white, order = 2**bits - 1, "<u2" if syntax.is_little_endian else ">u2"
        grey = int(film.get("NumberOfFrames") or 1) == 1 and "MONOCHROME" in photometric
        if not grey or not last == bits - 1 < 16 or film.pixel_array.ndim > 2:
            raise ValueError(f"it is no single grey frame ({photometric}, bit {last} of {bits})")
        plain = film.BitsAllocated == 16 and not (film.PixelRepresentation or syntax.is_compressed)
        if plain and (np.frombuffer(film.PixelData, order) > white).any():
            said.append(f"has bits above the {bits} of its header, which are left out")
        stored = np.arange(white + 1)  # every pattern of bits, and the number that it stands for
        stored -= (stored > white // 2) * film.PixelRepresentation << bits
        shown = stored * (film.get("RescaleSlope") or 1) + (film.get("RescaleIntercept") or 0)
        ends = shown.min(), shown.max()
        if film.get("ModalityLUTSequence"):
            shown, ends = looked_up(stored, film.ModalityLUTSequence[0], order)
        if film.get("VOILUTSequence"):
            shown, ends = looked_up(shown, film.VOILUTSequence[0], order)
        elif film.get("WindowWidth") is not None:
            shown, ends = windowed(shown, film)
        inverse = (film.get("PresentationLUTShape") or photometric) in ("INVERSE", "MONOCHROME1")
        if inverse != (photometric == "MONOCHROME1"):
            said.append("has two polarities, of which PresentationLUTShape is taken")
        shown = np.rint(np.interp(shown, ends, (65535, 0) if inverse else (0, 65535)))
        patterns = film.pixel_array.astype(np.uint16) & white
        pixels = shown.astype(np.uint16)[patterns]
        # PixelPaddingValue and, where a range is padding, PixelPaddingRangeLimit
        ends = [tag.value & white for tag in film[0x280120:0x280122] if tag.value is not None]
        if ends and shown[ends].any():
            padded = (stored.clip(min(stored[ends]), max(stored[ends])) == stored)[patterns]
            pixels[joined_to_border(padded)] = 0
    return pixels, 16


def bits_of_set(paths):
    """Return the depth of the films of more than 8 bits whose headers tell none, else of the rest.

    The fewest bits that hold 99.99 % of the set's pixels, so that it hangs on no single pixel. A
    set of 8 bits has fewer if they are 6 or less in each film: of 14 bits, say, divided by 256.
    """
    shallow = []

    def count(path):
        """Count a film's pixels by their bits, if they are more than 8."""
        # a broken or a huge one is named when it is placed
        broken = (OSError, ValueError, SyntaxError, UserError, Image.DecompressionBombError)
        with contextlib.suppress(*broken):
            with Image.open(path) as image:
                deep = image.mode.startswith(("I", "F")) or ";16" in str(image.tile)
            if deep or 8 not in shallow:  # the first film of 8 bits mostly tells
                pixels, depth = read_image(path, [])
                counts = bit_lengths(as_positive(pixels, []))
                if not depth:
                    return counts
                used = bits_in_use(counts)
                shallow.append(8 if deep or used > 6 else used)
        return np.zeros(65)

    counts = sum(in_threads(count, paths, "looking at grey levels"))
    return max(bits_in_use(counts), 8) if counts.any() else max(shallow, default=8)


def list_files(folder):
    """Return all files in a folder and below, but for hidden ones; links are followed.

    Left out as well is what the steps make, and what comes and goes by itself: Windows' Thumbs.db,
    Excel's ~$mine.xlsx.

    Returns
    -------
    files : DataFrame
        Sorted by path: `path`, `name` (below the folder, with slashes), `kind` ("film", "mask",
        "text", or "other": what may be a film, but is not read), `bytes` and `changed` (ns).
    """

    def stop(error):
        raise error

    ours = [runs_dir(), *(data_dir(source) for source in ("own", "mias", "phantom"))]
    paths, seen = [], {os.path.realpath(path) for path in ours}  # with `--images .`
    walk = os.walk(folder, onerror=stop, followlinks=True) if Path(folder).is_dir() else ()
    for root, folders, names in walk:
        seen.add(os.path.realpath(root))  # a link may lead back up
        real = {name: os.path.realpath(os.path.join(root, name)) for name in folders}
        folders[:] = [n for n in real if not n.startswith(".") and real[n] not in seen]
        paths += [Path(root, n) for n in names if not n.startswith((".", "~$", "Thumbs.db"))]
    rows = []
    for path in sorted(paths):
        name, status = path.relative_to(folder), path.stat()
        stamp = status.st_size, status.st_mtime_ns  # by which a file is known to be the same
        rows.append((path, name.as_posix(), kind_of(path, name), *stamp))
    return pd.DataFrame(rows, columns=["path", "name", "kind", "bytes", "changed"])


def kind_of(path, name):
    """Tell a mask by its own or its folders' names: film_mask.png, masks/film.png."""
    suffix = path.suffix.lower()
    if suffix in FILM_SUFFIXES or is_dicom(path):
        parts = [*name.parts[:-1], name.stem]
        return "mask" if any(re.search(MASK, part, re.IGNORECASE) for part in parts) else "film"
    return "text" if suffix in ("", *SIDE_FILES) else "other"


def say_left_out(files):
    """Name the masks in `list_files`, and the files of a kind that is not known."""
    masks, others = (files["name"][files["kind"] == kind] for kind in ("mask", "other"))
    if len(masks):
        print(f"{len(masks)} masks are left out: {listing(masks)}")
    warn_of(others, f"files are left out, not being called {', '.join(FILM_SUFFIXES)}")


def film_paths(folder):
    """Return the films in a folder and below, a list of Path."""
    files = list_files(folder)
    return list(files["path"][files["kind"] == "film"])


def matching(name):
    """Return the path that a name stands for or, if there is none, those of its pattern."""
    path = Path(name).expanduser()
    return [path] if path.exists() else sorted(path.parent.glob(path.name)) or [path]


def named_films(names):
    """Return the paths that names, patterns such as scans/*.png, and folders stand for."""
    paths = sum(map(matching, [names] if isinstance(names, (str, Path)) else names), [])
    films = [film_paths(path) if path.is_dir() else [path] for path in paths]
    empty = [path for path, found in zip(paths, films) if not found]
    refuse(empty, f"no films ({', '.join(FILM_SUFFIXES)}) are in")
    return sum(films, [])


def in_threads(function, items, label):
    """Apply a function to every item on all cores, with a progress line; return a list, in order.

    Threads suffice: decoding, resizing and hashing release Python's lock, and threads work
    alike in a cell, a script and on Windows.
    """
    progress, results = Progress(len(items), label), []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for result in pool.map(function, items):
            results.append(result)
            progress.step()
    progress.close()
    return results


# %% Getting the films: a folder, an archive, an earlier download, the mirror, or phantoms

MIRROR = "http://peipa.essex.ac.uk/pix/mias/all-mias.tar.gz"
LICENCE = """The MIAS database is free for research purposes only; it may not be rented, leased or
sold. Publications must cite: J Suckling et al (1994), "The Mammographic Image Analysis Society
Digital Mammogram Database", Exerpta Medica, International Congress Series 1069, pp 375-378."""


def filled(folder, stamp, fill):
    """Return a folder after `fill(temporary)`; one with the same stamp is kept as it is."""
    mark = folder / ".stamp.json"
    if mark.is_file() and read_json(mark) == stamp:
        return folder
    if folder.is_dir() and not mark.is_file() and any(folder.iterdir()):
        raise UserError(f"{folder} holds files that are not ours; move them or use --images")
    discard(*folder.parent.glob(".*.part*"), *folder.parent.glob(".*.old"))  # of killed runs
    with replacing(folder) as temporary:
        temporary.mkdir()
        fill(temporary)
        write_json(stamp, temporary / mark.name)
    return folder


def members(archive):
    """Yield (name, bytes, open function or None where no regular file) of a tar or zip."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            for member in file.infolist():
                if not member.is_dir():
                    yield member.filename, member.file_size, lambda m=member: file.open(m)
        return
    with tarfile.open(archive) as file:
        for member in file:
            if not member.isdir():
                opened = (lambda m=member: file.extractfile(m)) if member.isreg() else None
                yield member.name, member.size, opened
        while file.fileobj.read(1 << 20):  # to the end, where gzip's checksum is
            pass


def unpack(archive, folder):
    """Write the films and texts of an archive, flat; ValueError says what is not allowed.

    More than 1 GiB and more than 30 times the archive's own size is taken for a bomb.
    """
    limit, films = max(1 << 30, 30 * archive.stat().st_size), 0
    for name, length, stream in members(archive):
        if ".." in Path(name).parts or name.startswith(("/", "\\")) or stream is None:
            raise ValueError(f"it has a member that is not allowed: {name!r}")
        limit -= length
        if limit < 0:
            raise ValueError("it unpacks to far more than its size")
        path = folder / Path(name).name
        if path.name.startswith(".") or path.suffix.lower() not in (*FILM_SUFFIXES, ".txt"):
            continue  # macOS adds ._mdb001.pgm
        if path.exists():
            raise ValueError(f"it holds {path.name} twice; unpack it, and name that with --images")
        with open(path, "wb") as file, stream() as data:
            shutil.copyfileobj(data, file)
        films += path.suffix.lower() != ".txt"
    if not films:
        raise ValueError("it holds no film")
    if folder.parent.name == "mias" and not [*folder.glob("[Ii][Nn][Ff][Oo].[Tt][Xx][Tt]")]:
        raise UserError("the archive has no Info.txt; films of your own need --labels or --images")


def extract(archive, folder, downloaded=False):
    """Unpack an archive into `folder`, once; a `downloaded` one that is refused is deleted."""
    if not archive.is_file():
        raise UserError(f"the archive {archive} is not there; check the name and the folder")
    status = archive.stat()
    stamp = {"archive": archive.name, "bytes": status.st_size, "changed": status.st_mtime_ns}
    try:
        return filled(folder, stamp, lambda temporary: unpack(archive, temporary))
    except UserError:  # a full disk, files in the way: not the archive's fault
        raise
    except Exception as error:  # damage shows as TarError, BadZipFile, zlib.error, EOFError, ...
        if downloaded:
            archive.unlink()  # or it would be taken for the database next time
        raise UserError(f"{archive} is damaged or not safe: {error}; get it again") from None


def download(url, path, digest=None):
    """Download a file, once, whose sha256 begins with `digest`.

    ConnectionError if it cannot be had, or if the server is silent for 12 seconds.
    """
    if path.is_file():
        return path
    print(f"downloading {url} ...", flush=True)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(12)
    try:
        with replacing(path) as temporary:
            torch.hub.download_url_to_file(url, str(temporary), digest)
        return path
    except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
        raise ConnectionError(str(getattr(error, "reason", error))) from None
    finally:
        socket.setdefaulttimeout(before)


def phantom_films(settings):
    """Draw the synthetic films, once for a number of patients and a seed; return their folder."""
    stamp = dict(n_patients=settings.patients, seed=settings.seed, film_size=settings.phantom_size)

    return filled(data_dir("phantom") / "raw", stamp, lambda folder: make_phantoms(folder, **stamp))


@in_words()
def find_films(settings):
    """Return the source ("mias", "phantom" or "own"), the folder of its films, and `list_files`.

    Phantoms take over under --source auto only, and say so; whatever is named and is not there
    ends with a message.
    """
    source, images = settings.source, settings.images and Path(settings.images).expanduser()
    files = list_files(images or os.devnull)
    own = settings.labels or in_class_folders(files, settings.classes)
    if source == "auto":
        source = "own" if own else "mias"
    given = [n for n in "labels findings classes patient_from".split() if getattr(settings, n)]
    if given and source in ("mias", "phantom"):
        hint = "films of your own need --images and --labels, or a folder for each class"
        refuse(given, f"{hint}; with --source {source} there can be no")
    if source == "phantom":
        folder = phantom_films(settings)
    elif source == "own" and not own:
        either = "--labels FILE and --images DIR (or --archive FILE)"
        raise UserError(f"own films need {either}, or --images DIR with a folder for each class")
    elif images:
        if not (files["kind"] == "film").any():
            found = listing(sorted(path.name for path in images.glob("*"))) or "nothing"
            what = f"--images {images} is no folder of films; it holds {found}"
            raise UserError(f"{what}; read are {', '.join(FILM_SUFFIXES)}, in folders below it too")
        return source, images, files
    elif settings.archive:
        folder = extract(Path(settings.archive).expanduser(), data_dir(source) / "raw")
    elif source == "mias":
        source, folder = find_mias(settings)
    else:
        need = "films of your own need --images DIR or --archive FILE"
        raise UserError(f"{need} (--source {source}: expected auto, mias, phantom or own)")
    return source, folder, list_files(folder)


def find_mias(settings):
    """Return "mias" and the folder of its films, or phantoms under --source auto."""
    raw = data_dir("mias") / "raw"
    if film_paths(raw):
        return "mias", raw
    if os.environ.get("MIAS_ARCHIVE"):
        return "mias", extract(Path(os.environ["MIAS_ARCHIVE"]), raw)
    url = os.environ.get("MIAS_URL", MIRROR)
    print(LICENCE)
    try:
        archive = download(url, raw.parent / "all-mias.tar.gz")
        return "mias", extract(archive, raw, downloaded=True)
    except ConnectionError as error:
        if settings.source != "auto":
            what = f"the database could not be downloaded from {url} ({error})"
            hint = "download it elsewhere and name it with --archive FILE, or try --source phantom"
            raise UserError(f"{what}; {hint}") from None
        banner(
            f"NO MIAS DATABASE: not found here, and not to be downloaded ({url}: {error}).",
            "Going on with SYNTHETIC PHANTOMS. Figures from phantoms say nothing about mammograms.",
            "Have the database? python 01_prepare_data.py --archive all-mias.tar.gz",
        )
    return "phantom", phantom_films(settings)


# %% Tables of your own: as Excel, R and text editors write them


HEADER = "write a CSV with the columns image, x0, y0, x1, y1 (px, from the top left) and severity"
NO_CSV = {
    "an Excel workbook; save it as CSV there, and name that": rb"PK\x03\x04|\xd0\xcf\x11\xe0",
    f"JSON, as COCO has it; {HEADER}": rb"\s*[{\[]\s*[\"{]",
    f"a text of numbers, as YOLO has it (shares of the film); {HEADER}": rb"\d+( [\d.]+){4,}\s",
}


def read_own_table(name):
    """Return a CSV, or all that a pattern stands for, as a DataFrame of text, stripped.

    Its index is the number of the line. All stays text: 007 is no number here.
    """
    tables, spelling = {path: read_csv(path) for path in matching(name)}, {}
    for path, table in tables.items():
        table.columns = [spelling.setdefault(plain_name(column), column) for column in table]
        table.index = [f"{path.name}:{n}" for n in table.index] if len(tables) > 1 else table.index
    return pd.concat(tables.values()).fillna("")


def plain_name(name):
    """Return a column's name in small letters, without blanks and signs."""
    return re.sub(r"[\W_]", "", str(name)).lower()


def read_csv(path):
    """Return one CSV; separators, encodings and line ends differ from program to program."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    for kind, beginning in NO_CSV.items():
        if re.match(beginning, raw):
            raise UserError(f"{path} is {kind}")
    wide = raw.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = raw.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("cp1252", errors="replace")
        warn(f"{path} is not UTF-8; read as Windows-1252")
    lines = text.splitlines()
    first = next((n for n, line in enumerate(lines) if line.strip(" \t,;\"'")), 0)
    separator = re.fullmatch(r"\W*sep=(.)\W*", lines[first]) if lines else None
    first += bool(separator)  # Excel's own line
    if not any(lines[first:]):
        raise UserError(f"{path} has no rows")
    comma = separator[1] if separator else max(",;\t|", key=lines[first].count)
    most = max(line.count(comma) for line in lines[first:]) + 1  # a row may exceed the header
    options = {"keep_default_na": False, "skip_blank_lines": False, "skipinitialspace": True}
    try:
        text = io.StringIO("\n".join(lines[first:]))
        table = pd.read_csv(text, sep=comma, names=range(most), dtype=str, **options)
    except ValueError as error:
        raise UserError(f"{path} cannot be read as CSV ({str(error).strip()})") from None
    table = table.fillna("").apply(lambda column: column.str.strip())
    table.index += first + 1
    names, table = table.iloc[0], table.iloc[1:].set_axis(table.iloc[0], axis=1)
    if names.iloc[0] == "" and (table.iloc[:, 0] != "").any():
        print(f"{path}: not used: the first column, which has no name (row names?)")
        names, table = names.iloc[1:], table.iloc[:, 1:]
    named = (names != "").to_numpy()
    more = table.index[(table.loc[:, ~named] != "").any(axis=1)]
    what = f"{path} cannot be read: more values than columns ({listing(names, 99)})"
    refuse(more, f"{what}; has it a line of column names, and no prose above? In line")
    table = table.loc[(table != "").any(axis=1), named]
    plain = [plain_name(name) for name in table]
    twice = sorted({str(n) for n, p in zip(table, plain) if p and plain.count(p) > 1})
    refuse(twice, f"{path} has a column twice")
    if table.empty:
        raise UserError(f"{path} has no rows below its header ({listing(names, 99)})")
    return table


LABELS = ["image", "patient", "laterality", "tissue", "label", "label_name", "findings"]
FINDINGS = ["image", "type", "severity", "x", "y", "radius"]
# of MIAS: calcifications, circumscribed, spiculated and other masses, distortion, asymmetry, none
TYPES = "CALC CIRC SPIC MISC ARCH ASYM NORM".split()
COLUMNS = [  # in small letters, without blanks and signs; the first that is there is taken
    "image file filename filepath path film imageid imagename imagefile imagefilepath refnum",
    "label labelname class classname pathology diagnosis classification severity cancer status "
    "breastbirads birads assessment",
    "patient patientid patientno anonpatientid empianon mrn subject subjectid sourcesubjectid case "
    "caseid studyid id id1",
    "laterality imagelaterality side breast leftorrightbreast leftright view",
    "type",
]
BOXES = [
    COLUMNS[0],
    "severity findingbirads pathology classification class classname label birads assessment",
    *("type", "x", "y", "radius"),
    *("x0 xmin left", "y0 ymin top", "x1 xmax right", "y1 ymax bottom"),
]


def own_columns(table, path, wanted=COLUMNS, needed=(), quiet=False):
    """Return the columns of a table by the first names of `wanted`, and those that are left.

    What is taken for what is said: a patient column that is overlooked would put films of a
    patient on both sides. A column with words of TYPES is the type, whatever it is called.
    """
    types = [name for name, words in table.items() if words.str.upper().isin(TYPES[:-1]).any()]
    plain = ["type" if name in types[:1] else plain_name(name) for name in table]
    columns, found = dict(zip(plain, table)), {}
    for role, *others in map(str.split, wanted):
        for name in [name for name in (role, *others) if name in columns][:1]:
            found[role] = columns[name]
            if name != role and not quiet:
                print(f'{path}: its column "{columns[name]}" is taken for {role}')
    breasts = {"image"} if {"patient", "laterality"} <= {*found} else set()  # a row is a breast
    missing = " and ".join(role for role in needed if role not in {*found, *breasts})
    if missing:
        what = f"{path} lacks the column {missing}; found {listing(table.columns, 99)}"
        raise UserError(f"{what}; the first line names columns (image,label,patient,laterality)")
    kept = list(found.values())
    rest = table.drop(columns=kept)
    unused = [name for name in rest if plain_name(name) not in " ".join(BOXES).split()]
    if unused and not quiet:
        print(f"{path}: not used: {listing(unused, 99)}")
    table = table[kept].set_axis(list(found), axis=1)
    table.attrs["label"] = plain_name(found.get("label", ""))
    return table, rest


def named_classes(classes=""):
    """Return {word: code} of the classes' own names and of a setting as "0=normal,1=malignant"."""
    known = {name: code for code, name in enumerate(CLASS_NAMES)}
    for part in filter(str.strip, str(classes).split(",")):
        word, _, name = (text.strip().lower() for text in part.partition("="))
        if name not in CLASS_NAMES:
            raise UserError(f'--classes {classes}: expected such as "0=normal,1=malignant"')
        word, code = re.sub(r"\.0+$", "", word), CLASS_NAMES.index(name)
        if known.setdefault(word, code) != code:
            raise UserError(f"--classes {classes}: {word} has two meanings")
    return known


# of MIAS, BCDR and CBIS-DDSM
WORDS = {"b": 0, "n": 1, "m": 2, "norm": 1, "malign": 2, "benign_without_callback": 0}


def class_codes(words, known):
    """Return the codes of words (Series of text), NaN where unknown; BI-RADS 4a is known as 4."""
    words = words.str.lower().str.replace(r"\.0+$", "", regex=True)
    number = words.str.extract(r"^(?:bi-?rads?)?[ :_-]*(\d)[abc]?$", expand=False)
    return words.map({**WORDS, **known}).fillna(number.map(known))


def checked_labels(table, rest, classes, path):
    """Return the labels (codes) of a table; UserError names lines without one, or with two.

    1 means cancer in many tables and "normal" here, so numbers count only if they are exactly 0,
    1 and 2, or if --classes says what they mean. Nothing is normal where a type says NORM only.
    """
    known = named_classes(classes)
    words = table["label"].str.lower().str.replace(r"\.0+$", "", regex=True)
    if "type" in table:
        words = words.mask((words == "") & (table["type"].str.upper() == "NORM"), "normal")
    numbers = sorted(set(words[words.str.fullmatch(r"[-+]?\d+")]) - set(known))
    if numbers == ["0", "1", "2"] and not re.search("birads|assess", table.attrs.get("label", "")):
        known.update({"0": BENIGN, "1": NORMAL, "2": MALIGNANT})
        warn(f"{path}: label 0 is taken for benign, 1 for normal, 2 for malignant")
    elif numbers:
        ours = "only exactly 0 (benign), 1 (normal) and 2 (malignant) are known; BI-RADS are none"
        hint = 'say what yours mean, --classes "0=normal,...", or write names'
        raise UserError(f"{path}: labels are the numbers {listing(numbers)}; {ours}; {hint}")
    label = class_codes(words, known)
    bad = table.index[label.isna() | (table.get("image", "a film") == "")]
    found = listing(table.loc[bad, "label"].unique())
    ours = "labels are benign, normal, malignant or 0, 1, 2"
    hint = f'{ours}; --classes "cancer=malignant,..." says what other words mean'
    refuse(bad, f"{path}: no valid image or label (found {found}); {hint}. In line")
    for name, words in rest.items():
        words = words[(words != "") & (not plain_name(name).startswith("finding"))].str.lower()
        second = words[~words.str.fullmatch(r"[\d.]+|yes|no|y|n|true|false")].map(known)
        other = second.index[second.notna() & (second != label[second.index])]
        refuse(other, f'{path}: mend or delete one: label and column "{name}" contradict in line')
    return label.astype(int)


MISSING = r"n/?a|nan|none|null|unknown|\W+|-\d+|anon\D*|de-?identified|removed|x+|[\d.,]+e\+\d+"


def same_patients(names):
    """Return patients' names (Series of text) in one spelling each; say what was merged.

    P01 and p1 taken for two patients would leak; two patients taken for one would do no harm.
    """
    small = names.str.lower().str.strip()
    key = small.str.replace(r"\.0+$|[\W_]|(?<!\d)0+(?=\d)", "", regex=True)
    key = key.where(small.str.contains(r"\w"), small)
    missing = small.str.fullmatch(MISSING)
    if missing.any():
        what = f"{missing.sum()} films of patient {listing(names[missing].unique())} count as one"
        warn(f"{what} patient each; are these missing values, or rounded by a spreadsheet?")
    merged = names.groupby(key).transform("first")
    several = sorted(set(names[merged != names]) | set(merged[merged != names]))
    warn_of(several, "names are taken for the same patients, but written differently")
    return merged


VIEWS = "cc|mlo|o|ml|lm|lmo|xccl|xccm|xcc|sio|at|cv|fb|breast"


def sides_of(sides, path="`labels`"):
    """Return "right", "left" or "" for sides such as R, Left or L-MLO, a Series of text."""
    words = sides.str.strip().str.lower()
    words = words.str.replace(r"^(?:cc|mlo)([lr])t$", r"\1", regex=True)  # DMID: CCLT
    found = words.str.extract(rf"^(?!lat$)(r|l|right|left|)(?:[ _-]*(?:{VIEWS}))?$", expand=False)
    wrong = sides[found.isna()].unique()
    refuse(wrong, f"{path}: expected right, left or nothing, found laterality")
    return found.replace({"r": "right", "l": "left"})


def film_name(name):
    """Return a film's name with slashes and without a known suffix; other dots stay."""
    name = unicodedata.normalize("NFC", str(name)).replace("\\", "/").strip("/ ")  # macOS: NFD
    suffix = next((end for end in FILM_SUFFIXES if name.lower().endswith(end)), "")
    return name[: len(name) - len(suffix)]


def tails(key):
    """Return a key and what is left of it without its first folder, its first two, ..."""
    parts = key.split("/")
    return ["/".join(parts[n:]) for n in range(len(parts))]


def match_films(labels, files):
    """Return the labelled films among `list_files`, {image: path} in their order, and the rest.

    A table's names and a folder's need not be written alike, and either may begin further up. Where
    no film is called so, a folder of one row's path, or a part of a film's name, stands for it.
    UserError if a name could be meant in two ways, or none is there.
    """
    refuse(labels["image"][labels["image"].duplicated()], "`labels` has films twice")
    wanted = {film_name(image).lower(): image for image in labels["image"]}
    longer, parts = {}, {}  # names that begin further up than the folder; parts of names
    for key, image in wanted.items():
        for tail in tails(key)[1:]:
            longer.setdefault(tail, []).append(image)
        for part in key.split("/"):
            parts.setdefault(re.sub(r"\.0$", "", part), []).append(image)
    films = files[files["kind"] == "film"]
    names = dict(zip(films["path"], films["name"].map(film_name)))
    meant = {}
    for path, name in names.items():
        ends = tails(name.lower())
        found = next(([wanted[tail]] for tail in ends if tail in wanted), longer.get(ends[0], []))
        meant[path] = found
    if not any(meant.values()):
        for path, name in names.items():
            own = {*name.lower().split("/"), *name.lower().split("/")[-1].split("_")}
            alone = [parts[part][0] for part in own if len(parts.get(part, ())) == 1]
            meant[path] = sorted({*alone})
    found, several = {}, []
    for path, images in meant.items():
        for image in images:
            found.setdefault(image, []).append(path)
        several += [path] if len(images) > 1 else []
    several = [image for image, paths in found.items() if len(paths) > 1] + several
    hint = "give each file a name of its own, or name its folder too"
    refuse(several, f"{hint}; several films could be meant by")
    extra = [names[path] for path, images in meant.items() if not images]
    if not found:
        wanted, there = listing(labels["image"], 3) or "no film", listing(extra, 3)
        raise UserError(f"no labelled film was found; expected {wanted}, found {there}")
    return {image: paths[0] for image, paths in found.items()}, extra


def class_of_folder(name, known):
    """Return the one word of `known` that a film's folders are called; "" if none or several."""
    words = {part.lower() for part in name.split("/")[:-1]} & set(known)
    return words.pop() if len(words) == 1 else ""


def in_class_folders(files, classes=""):
    """Return (image, label) of the films if all lie in folders named as classes, else [].

    At any depth; a part that is called train or test means nothing, the folds take its place.
    """
    known = named_classes(classes)
    names = files["name"][files["kind"] == "film"]
    found = [(film_name(name), class_of_folder(name, known)) for name in names]
    unnamed = [image for image, word in found if not word]
    if unnamed and len(unnamed) < len(found):
        what = f"some films lie in folders called as classes, but not {listing(unnamed, 3)}"
        warn(f"{what}; --classes says what other names mean")
    return [] if unnamed else found


def headers_of(paths):
    """Return patient and laterality of those films that are DICOM, a DataFrame by image."""
    read, dicom = {}, {image: path for image, path in paths.items() if is_dicom(path)}
    for image, path in dicom.items():
        with contextlib.suppress(UserError):  # a broken film is named later
            read[image] = dicom_header(path)
    return pd.DataFrame(read).T.rename_axis("image")


def say_contradictions(labels, folders, headers, path):
    """Warn of films whose folder or DICOM header says another thing than their row of labels.

    `folders` is {image: label} of folders called as classes. Which one is wrong cannot be known.
    """
    rows = labels.set_index("image")
    wrong = {"the name of their folder": [i for i, c in folders.items() if c != rows["label"][i]]}
    if len(headers):
        rows = rows.loc[headers.index]
        sides = headers["laterality"]
        differ = (sides != "") & (rows["laterality"] != "") & (sides != rows["laterality"])
        patients = rows["patient"].groupby(headers["patient"]).transform("nunique")
        mixed = (headers["patient"] != "") & (patients > 1) & (headers["patient"].nunique() > 1)
        wrong["the laterality of their headers"] = rows.index[differ]
        wrong["their headers, where they are the same patient's"] = rows.index[mixed]
    for what, images in wrong.items():
        warn_of(images, f"films where {path} contradicts {what}")


def one_column(table, path, classes):
    """Return a table with one column `label` in place of a column of 0 and 1 for each class."""
    known, yes = named_classes(classes), ["1", "1.0"]
    flags = [n for n in table if n.lower() in known and table[n].isin(["0", "0.0", *yes]).all()]
    if len(flags) < 2:
        return table
    print(f"{path}: its columns {listing(flags)} are taken for label")
    label = pd.Series("", table.index)
    for name in sorted(flags, key=lambda name: SEVERITY.index(known[name.lower()])):
        label = label.mask(table[name].isin(yes), name)
    return table.drop(columns=flags).assign(label=label)


def films_of_breasts(table, files, path):
    """Return a row for each film of the breasts in a table, by the patient and side of headers."""
    films = files[files["kind"] == "film"]
    headers = headers_of(dict(zip(films["name"].map(film_name), films["path"])))
    if headers.empty:
        what = "has no column image, and no film could be read as DICOM that names patient and side"
        raise UserError(f"{path} {what}; pip install pydicom, or add the column image (names)")
    rows = headers.reset_index().merge(table, "right", on=["patient", "laterality"])
    lost = rows["patient"][rows["image"].isna()]
    warn_of(lost, f"breasts of {path} have no film and are left out, of patients")
    return rows.drop(index=lost.index)


def one_row_a_film(table, path):
    """Return the first row of each film, with its worst label; rows may be findings."""
    key = table["image"].map(film_name).str.lower()
    for role in {"patient", "laterality"} & {*table}:
        lines = table.index[table[role].groupby(key).transform("nunique") > 1]
        refuse(lines, f"{path}: films with more than one {role}, in line")
    label, several = worst(table["label"], key), key[key.duplicated()].nunique()
    if several:
        mixed = (table["label"].groupby(key).nunique() > 1).sum()
        what = f"{several} films have several rows, {mixed} of them several labels"
        print(f"{path}: {what}; the worst counts")
    return table.assign(label=label)[~key.duplicated()]


COPY = r"(?: \(\d+\)|[ _-]+(?:copy|aug|augmented|rot|rotated|flip|flipped)[ _-]?\d*|\.rf\.\w+)$"


def originals(names):
    """Return the names of films without the number of a copy; say which ones are copies."""
    first = names.str.replace(COPY, "", regex=True, case=False)
    # benign (1), benign (2): numbers of films; mdb001 (1), mdb001 (2): copies of a film
    copy = first.duplicated(keep=False) & (first.str.contains(r"\d[^/]*$") | first.isin(names))
    warn_of(names[copy & (first != names)], "films are copies by their names, of one patient each")
    return first.where(copy, names)


def patients_from(pattern, names):
    """Return what the first group of a regular expression finds in films' names."""
    try:
        found = names.str.extract(pattern).iloc[:, 0]
    except (re.error, ValueError) as error:
        what = f"--patient-from {pattern}: {error}"
        raise UserError(f'{what}; expected such as "^([0-9]+)_", (patient) in brackets') from None
    refuse(names[found.isna()], f"--patient-from {pattern} finds no patient in")
    return found


def hint_at_patients(names):
    """Return the --patient-from for a part of films' names that several share, else ""."""
    if names.str.contains(r"mdb\d{3}", case=False).all():
        return "; of MIAS mdb001 and mdb002 are one patient's, mdb003 and mdb004, and so on"
    parts = names.str.split("[_/ -]", expand=True, regex=True)
    for n, part in parts.items() if parts.notna().all(axis=None) else ():
        if max(5, len(names) / 25) < part.nunique() < 0.75 * len(names):
            pattern = f"([^_/ -]+)([_/ -][^_/ -]*){{{parts.shape[1] - 1 - n}}}$"
            return f'; their names look so, try --patient-from "{pattern}"'
    return ""


def say_patients_labels(labels, path):
    """Warn where each patient with a finding has the same label on both sides."""
    sides = labels[labels["laterality"] != ""].groupby("patient")
    sides = sides.agg({"laterality": "nunique", "label": ["nunique", "max", "min"]})
    both = sides[(sides.iloc[:, 0] == 2) & ~(sides.iloc[:, 2:] == NORMAL).all(axis=1)]
    if len(both) >= 8 and (both.iloc[:, 1] == 1).all():
        what = f"all {len(both)} patients with an abnormal film have one label on both sides"
        warn(f"{path}: {what}; is it the patient's? the other breast would be taught wrongly")


def read_own_labels(path, files=None, classes="", patient_from=""):
    """Return labels of your own, from a CSV or ("") from folders named as classes.

    Whatever could be meant in two ways is refused, with its line.
    """
    if path:
        table = one_column(read_own_table(path), path, classes)
        table, rest = own_columns(table, path, needed=("image", "label"))
    else:
        path, rest = "the folders of classes", pd.DataFrame()
        table = pd.DataFrame(in_class_folders(files, classes), columns=["image", "label"])
    table["label"] = checked_labels(table, rest, classes, path).astype(int)
    table["laterality"] = sides_of(table.get("laterality", pd.Series("", table.index)), path)
    table = table if "image" in table else films_of_breasts(table, files, path)
    table = one_row_a_film(table, path)
    table["image"] = table["image"].map(film_name)
    paths = match_films(table, files)[0] if files is not None else {}
    names = dict(zip(files["path"], files["name"])) if paths else {}
    names = {image: film_name(names[path]) for image, path in paths.items()}
    headers = headers_of(paths)
    for role in headers:
        own = table.get(role, pd.Series("", table.index))
        values = own.where(own != "", table["image"].map(headers[role]).fillna(""))
        if (values != own).any():
            print(f"{path}: {role} of {(values != own).sum()} films is taken from DICOM headers")
            if role == "patient":
                warn_of(table["image"][values == ""], "films have no patient, one each is assumed")
                values = values.where(values != "", table["image"])
            table[role] = values
    name = table["image"].map(lambda image: names.get(image, image))  # of the file: it says more
    if "patient" in table and re.fullmatch(MISSING, "\n".join({*table["patient"].str.lower()})):
        table = table.drop(columns="patient")  # one word such as removed for all
    if patient_from:
        found = patients_from(patient_from, name)
        parted = found.groupby(table.get("patient", found)).nunique()
        warn_of(parted.index[parted > 1], f"patients of {path} are parted by --patient-from")
        table["patient"] = found
    if "patient" in table:
        without = table.index[table["patient"] == ""]
        refuse(without, f"{path}: fill the column patient or leave it out; no patient in line")
    if "patient" not in table or len(table) > 2 and table["patient"].is_unique:
        what = "all patients are different" if "patient" in table else "no patient column"
        hint = "if some have several films, name them in a column patient, or films leak"
        what = f"{what}, so each image counts as its own patient; {hint} between the parts"
        warn(f"{path}: {what}{hint_at_patients(name)}")
    patient = same_patients(table["patient"]) if "patient" in table else originals(table["image"])
    labels = table.assign(patient=patient, tissue="", findings=0)
    labels["label_name"] = labels["label"].map(dict(enumerate(CLASS_NAMES)))
    known = named_classes(classes)
    folders = {image: class_of_folder(name, known) for image, name in names.items()}
    folders = {i: known[word] for i, word in folders.items() if word and not word.isdigit()}
    say_contradictions(labels, folders, headers, path)
    say_patients_labels(labels, path)
    return labels.reset_index(drop=True)[LABELS]


def read_own_findings(path, labels, classes="", needed=True):
    """Return the findings of a CSV: image and x,y,radius or x0,y0,x1,y1[, severity][, type].

    In pixels of the film, y from the top; a box becomes the circle round its middle with half its
    longer side. A row without a place is a finding that has none, unless it says that there is
    nothing. What is not `needed`, as in a table of labels, may have no findings at all.
    """
    raw = read_own_table(path)
    table, _ = own_columns(raw, path, BOXES, needed=["image"] if needed else (), quiet=not needed)
    box = "x0" in table
    numbers = ["x0", "y0", "x1", "y1"] if box else ["x", "y", "radius"]
    if not {"image", *numbers} <= {*table}:
        expected = "x, y, radius or the corners x0, y0, x1, y1"
        refuse(raw.columns if needed else (), f"{path}: expected {expected}; found")
        return pd.DataFrame(columns=FINDINGS)
    names, keys = (part["image"].map(film_name).str.lower() for part in (table, labels))
    ends = keys.map(tails).explode().drop_duplicates(keep=False)  # folders may be left out
    film = names.map({**dict(zip(ends, ends.index)), **dict(zip(keys, labels.index))})
    label = film.map(labels["label"])
    word = table.get("severity", pd.Series("", table.index)).str.lower()
    own = class_codes(word, named_classes(classes))
    if own.isna().all() and "severity" not in map(plain_name, raw):
        word = pd.Series("", table.index)  # words such as mass: no class
    severity = own.where(word != "", label)
    empty = ["", "0", "0.0", "-", "nan", "na", "n/a", "none", "null"]
    nowhere = table[numbers].apply(lambda words: words.str.lower().isin(empty)).all(axis=1)
    nothing = raw.apply(lambda column: column.str.contains("no.?finding", case=False)).any(axis=1)
    nothing = nowhere & (nothing | (severity == NORMAL))
    if nothing.any():
        print(f"{path}: {nothing.sum()} rows that say that there is no finding are left out")
    kept = (part[~nothing] for part in (table, film, label, word, severity, nowhere))
    table, film, label, word, severity, nowhere = kept
    severity = severity.where((severity != NORMAL) | (word == ""))
    texts = pd.Series(table[numbers].to_numpy().ravel(), dtype=object)
    if {",", "."} <= set("".join(texts)):
        raise UserError(f"{path}: numbers with commas and others with points; write 1040 and 12.5")
    thousands = texts[texts.str.fullmatch(r"\d+\.\d{3}")].unique()
    if len(thousands) and max(map(float, thousands)) < 20:  # 78.706 is no 78,706 px
        warn(f"{path}: points are taken for decimal ones in {listing(thousands)}")
    points = table[numbers].replace(r",(?!\d{3}$)", ".", regex=True)  # 1,020 may be a thousand
    table[numbers] = points.apply(pd.to_numeric, errors="coerce")
    if box:
        low, high = table[["x0", "y0"]].to_numpy(), table[["x1", "y1"]].to_numpy()
        table["radius"] = np.where((high > low).all(1), (high - low).max(1) / 2, np.nan)
        table[["x", "y"]] = (low + high) / 2
    worse = (severity == MALIGNANT) & (label == BENIGN)
    vague = ~table["radius"].between(1e-9, 1e5) | table[["x", "y"]].isna().any(axis=1)
    for wrong, what in [
        (film.isna(), "a film that has no label"),
        (vague & ~nowhere, "no circle or box in numbers such as 1040 and 12.5"),
        ((table[numbers] <= 1).all(axis=1) & ~nowhere, "shares of the film in place of its pixels"),
        (severity.isna(), "a severity other than benign (B) or malignant (M)"),
        (worse | (label == NORMAL), "a finding that its film's label contradicts"),
    ]:
        refuse(table.index[wrong], f"{path}: {what} in line")
    table["image"] = film.map(labels["image"])
    table["severity"] = severity.map({BENIGN: "B", MALIGNANT: "M"})
    table["type"] = table.get("type", "lesion")
    print(f"{path}: {len(table)} findings, {nowhere.sum()} of them without a place")
    return table.reset_index(drop=True)[FINDINGS]


# %% From film to canvas, and back


def chest_wall(film, laterality=""):
    """Return the side of a film, "right" or "left", that the chest wall lies at.

    The pixels decide, since light is where tissue is, and films are turned now and then (455 of
    1,592 of CBIS-DDSM); where both halves are nearly alike (mdb151 and mdb152 fill the frame) the
    `laterality` of the breast does, if it is known.
    """
    left, right = (half.sum() for half in np.array_split(film.mean(axis=0), 2))
    if laterality and max(left, right) < 1.3 * min(left, right):
        return laterality
    return "right" if right > left else "left"


def tissue_threshold(film):
    """Return the grey level between tissue and background: Otsu's (1979), two thirds moved back.

    Square roots of the grey levels, because the skin line is nearly as dark as background; for the
    same reason Otsu's level alone would shave the skin off.
    """
    root = np.sqrt(np.arange(256))
    counts = np.bincount(film.ravel(), minlength=256)
    for again in (False, True):
        n, total = np.cumsum(counts), np.cumsum(counts * root)
        between = (total[-1] * n - n[-1] * total) ** 2 / np.maximum(n * (n[-1] - n), 1)
        level = between.argmax()
        parted = between[level] / max(n[-1] * (counts * root**2).sum() - total[-1] ** 2, 1)
        dark = (total[-1] - total[level]) / max(n[-1] - n[level], 1)
        # An implant outshines the breast: below it, tissue and background are parted once more.
        if again and not (parted > 0.94 and dark > 4.2 and n[-1] - n[level] > 0.05 * film.size):
            break
        otsu, unlit = level, total[level] / max(n[level] - n[0], 1)
        counts = np.where(np.arange(256) <= otsu, counts, 0)
    # Level 0 is left out of `unlit`: it is the padding round the film.
    return ((2 * unlit + root[otsu]) / 3) ** 2


def connected(seed, mask):
    """Return the pixels of a bool mask that are joined to a bool seed, through 4 neighbours.

    Each sweep spreads the seed along the columns up to the next wall, in four directions, until
    nothing changes: two or three rounds, where pixel by pixel it would be a hundred.
    """
    position = np.arange(1, max(mask.shape) + 1, dtype=np.int16)[:, None]
    walls = [np.rot90(~mask, turn) for turn in (1, 2, 3, 4)]
    walls = [np.maximum.accumulate(wall * position[: len(wall)], axis=0) for wall in walls]
    size = -1
    while seed.sum() > size:
        size = seed.sum()
        for wall in walls:
            seed = np.rot90(seed)
            seed = np.maximum.accumulate(seed * position[: len(seed)], axis=0) > wall
    return seed


def joined_to_border(mask):
    """Return the pixels of a bool mask that are joined to the outermost ones."""
    border = np.ones_like(mask)
    border[1:-1, 1:-1] = False
    return connected(border & mask, mask)


def filtered(mask, pixel_filter):
    """Return a bool mask as PIL's filter leaves it, uint8 0 to 255."""
    return np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).filter(pixel_filter))


def fill_holes(mask):
    """Return a bool mask with those pixels added that see it upwards, downwards, left and right."""
    seen = np.ones_like(mask)
    for _ in range(4):
        mask, seen = np.rot90(mask), np.rot90(seen)
        seen = seen & np.logical_or.accumulate(mask, axis=0)
    return seen


def find_breast(film, wall):
    """Return the steps to the breast, {name: bool mask}; "outline", the last, has the film's size.

    `wall`, "right" or "left", is the film's edge that the chest wall lies against. Labels,
    tape and frames are as bright as the breast; what tells them apart is where they lie and how
    full they are: the breast is the fullest bright piece near the chest wall.
    ValueError if no single piece brighter than the film covers 3 to 98 % of it.
    """
    height, width = film.shape
    cell = max(1, round(max(film.shape) / 128))
    coarse = np.asarray(Image.fromarray(film).reduce(cell))  # (about 128, about 128)
    bright = coarse > tissue_threshold(coarse)
    # Two cells off every rim break the bridges to labels and tape, and remove scratches.
    core = filtered(bright, ImageFilter.MinFilter(5)) > 0
    wall_right = wall == "right"
    nearness = np.linspace(*((0.5, 1) if wall_right else (1, 0.5)), num=coarse.shape[1])
    fullness = filtered(bright, ImageFilter.BoxBlur(14)) * nearness * core
    piece = connected(core & (fullness == fullness.max()), core)
    piece = filtered(piece, ImageFilter.MaxFilter(5)) > 0
    if not 0.03 < piece.mean() < 0.98:
        what = f"no breast found: the main bright piece covers {piece.mean():.1%} of the film"
        raise ValueError(f"{what} (grey levels {film.min()} to {film.max()}), expected 3 to 98 %")
    breast = fill_holes(filtered(piece, ImageFilter.MaxFilter(5)) > 0)
    # The skin may be darker than the threshold, but behind the chest wall there is only padding.
    columns = np.flatnonzero(piece.any(axis=0))
    breast[:, slice(columns[-1] + 1, None) if wall_right else slice(columns[0])] = False
    # Smoothed at half size only: a quarter of the time, and the last step is too small to see.
    box, half = (0, 0, width / cell, height / cell), (width // 2, height // 2)
    half = Image.fromarray(breast.astype(np.uint8) * 255).resize(half, Image.BILINEAR, box=box)
    outline = np.asarray(half.resize((width, height), Image.NEAREST)) > 127
    masks = {"brighter than its threshold": bright, "without rims and bridges": core}
    return {**masks, "fullest at the chest wall": piece, "outline": outline}


class Geometry(typing.NamedTuple):
    """How a film came to its canvas; enough to carry a point either way."""

    film_height: int  # px
    film_width: int  # px
    crop_top: int  # px of the film
    crop_left: int  # px of the film
    crop_height: int  # px of the film
    crop_width: int  # px of the film
    mirrored: bool  # films with the chest wall at the right are, so that it is always at the left
    scale: float  # canvas px for one film px


def geometry_of(row):
    """Return the Geometry in a row of films.csv."""
    return Geometry(*(row[name] for name in Geometry._fields))


def film_to_canvas(x, y, geometry):
    """Carry film pixels (x from the left, y from the top; numbers or arrays) to canvas pixels."""
    x = x - geometry.crop_left
    if geometry.mirrored:
        x = geometry.crop_width - 1 - x
    y = y - geometry.crop_top
    return (x + 0.5) * geometry.scale - 0.5, (y + 0.5) * geometry.scale - 0.5


def canvas_on_film(values, g, size):
    """Carry an array over the canvas (h, w) back to the film, float32 (film_height, film_width)."""
    tensor = torch.as_tensor(np.asarray(values, np.float32))[None, None]
    sides = [max(round(side / g.scale), 1) for side in size]
    crop = F.interpolate(tensor, sides, mode="bilinear")[0, 0, : g.crop_height, : g.crop_width]
    film = np.zeros((g.film_height, g.film_width), np.float32)
    box = film[g.crop_top :, g.crop_left :][: g.crop_height, : g.crop_width]
    box = box[:, ::-1] if g.mirrored else box
    box[: crop.shape[0], : crop.shape[1]] = crop.numpy()
    return film


def place_film(film, laterality, size, crop="breast"):
    """Place the breast of a film (uint8) on a black canvas of `size` (height, width), px.

    Returns canvas (uint8, chest wall on the left, breast at the top left corner), Geometry and the
    mask on the film (bool). `laterality` may be "". ValueError if there is no breast. With
    `crop` "none" the film is placed whole and unmirrored.
    """
    wall_at = chest_wall(film, laterality)
    mirrored, mask = wall_at == "right" and crop == "breast", np.ones(film.shape, bool)
    if crop == "breast":
        mask = find_breast(film, wall_at)["outline"]
    # Some circles of MIAS reach up to 45 px of 1024 behind the chest wall (mdb110).
    margin, wall = round(max(film.shape) / 128), round(max(film.shape) * 0.047)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    before, after = (margin, wall) if mirrored else (wall, margin)
    top, left = max(0, int(rows[0]) - margin), max(0, int(columns[0]) - before)
    box = np.s_[top : int(rows[-1]) + 1 + margin, left : int(columns[-1]) + 1 + after]
    cut = (film[box] * mask[box])[:, :: -1 if mirrored else 1]
    height, width = cut.shape
    scale = min(size[0] / height, size[1] / width)
    # whole canvas pixels: at most half of one is lost, and points keep the exact scale
    shape = [min(max(round(side * scale), 1), most) for side, most in zip(cut.shape, size)]
    extent = (0, 0, min(shape[1] / scale, width), min(shape[0] / scale, height))
    canvas = np.zeros(size, np.uint8)
    shrunk = Image.fromarray(cut).resize(shape[::-1], Image.BILINEAR, box=extent)
    canvas[: shape[0], : shape[1]] = shrunk
    return canvas, Geometry(*film.shape, top, left, height, width, mirrored, scale), mask


def canvas_size(text, source):
    """Read a size such as "512x288" as (height, width) in px; "auto" is chosen by the source.

    1024 x 576 px has the shape of a cropped breast (about 1 : 2); half of MIAS's films are not
    reduced, most others to 0.8 or more. 512x288 takes a third of the time and leaves the median
    lesion 38 px wide; with 224 rows, the usual size, half are smaller than a place of the map.
    """
    text = "x".join(map(str, np.ravel(text)))  # (512, 288), typed in a cell
    if text == "auto":
        text = {"mias": "1024x576", "phantom": "160x90"}.get(source, "512x288")
    match = re.fullmatch(r"(\d+)x(\d+)", text.strip().lower())
    size = (int(match[1]), int(match[2])) if match else (0, 0)
    if not all(64 <= side <= 4096 for side in size):
        raise UserError(f"--size {text} is no canvas; expected HEIGHTxWIDTH, 64 to 4096 px each")
    return size


def oddities(film):
    """Return what looks wrong about a film (uint8), a list of phrases."""
    cell = max(1, round(max(film.shape) / 128))
    coarse = np.asarray(Image.fromarray(film).reduce(cell))
    lit = coarse > tissue_threshold(coarse)
    said = ["less than 64 px high or wide"] if min(film.shape) < 64 else []
    said += ["fewer than 32 grey levels"] if len(np.unique(film)) < 32 else []
    columns, rows = (np.flatnonzero(lit.mean(axis=axis) > 0.02) for axis in (0, 1))
    if not (len(columns) and len(rows)) or min(coarse.shape) < 8:
        return said
    height, width = coarse.shape
    top, bottom = coarse[: height // 2].mean(), coarse[-(height // 2) :].mean()
    left, right = coarse[:, : width // 2].mean(), coarse[:, -(width // 2) :].mean()
    across = min(left, right) / max(left, right)
    if min(top, bottom) / max(top, bottom) < min(0.5, 0.6 * across):
        said.append("looks turned by 90 degrees")
    profile = lit[:, columns[0] : columns[-1] + 1].mean(axis=0)  # how high it is, along the film
    parts = np.array([part.mean() if part.size else 0 for part in np.array_split(profile, 8)])
    middle, ends = parts[3:5].mean(), min(parts[:2].mean(), parts[6:].mean())
    if middle > max(0.2, 2 * parts[[0, 7]].max()) or ends > max(0.25, 2.5 * middle):
        said.append("looks like both breasts on one film")
    return said


def say_oddities(films):
    """Warn of what was noted of films (a DataFrame with image and note), a line for each kind."""
    notes = films.set_index("image")["note"].str.split("; ").explode()
    notes = notes[notes != ""]
    for note, part in notes.groupby(notes.to_numpy()):
        warn_of(part.index, f"of {len(films)} films, {note}")


STATISTICS = ["breast", "mean", "sd"]  # what a film is like, 0 to 1


def film_statistics(film, canvas):
    """Measure a film and its canvas (uint8); return a dict of numbers.

    What STATISTICS names: how much of the canvas is breast, and the mean and standard deviation of
    its grey values, 0 to 1. How the film lies: `side` is 1 if its right half is lighter and -1 if
    its left; `orientation` is 0 where the light lies at either side, -90 above and 90 (degrees)
    below; `rim` is the mean grey value of the outermost pixels, 0 to 1; `aspect` is width / height.
    """
    breast = canvas[canvas > 0] / 255
    values = (breast.size / canvas.size, breast.mean(), breast.std()) if breast.size else (0, 0, 0)
    x, y = (np.diff([h.mean() for h in np.array_split(film.mean(a), 2)])[0] for a in (0, 1))
    rim = np.concatenate([film[0], film[-1], film[:, 0], film[:, -1]]).mean() / 255
    values += (film.shape[1] / film.shape[0], np.sign(x), np.degrees(np.arctan2(y, abs(x))), rim)
    return dict(zip([*STATISTICS, "aspect", "side", "orientation", "rim"], map(float, values)))


def usual_range(statistics):
    """Return what is usual in a set of films: low and high lie 2.5 spans of the middle half off.

    A film beyond is unlike its set: step 1 names it, and step 5 warns of one of your own.
    """
    low, high = (statistics[STATISTICS].quantile(share) for share in (0.25, 0.75))
    span = 2.5 * (high - low).clip(lower=0.02)  # no film of MIAS, one of 1,592 of CBIS-DDSM
    return pd.DataFrame({"low": low - span, "high": high + span})


def unlike(statistics, usual):
    """Return which films lie outside of their `usual_range`, bool (n,)."""
    low, high = (usual[name] for name in ("low", "high"))
    return ((statistics < low) | (statistics > high)).any(axis=1).to_numpy()


def prepare_film(path, laterality, size, crop="breast", bits=None, shape=None):
    """Read a film and place it; return its canvas and its row of films.csv.

    `problem` says why a film cannot be used, one of another `shape` too; `note` says what is odd.
    """
    row, notes = {"file": str(path.resolve()), "digest": "", "problem": ""}, []
    try:
        film = read_film(path, bits, notes, crop)
        row["digest"] = hashlib.sha256(np.ascontiguousarray(film)).hexdigest()[:16]
        if shape and film.shape != shape:
            found, expected = (f"{height} x {width}" for height, width in (film.shape, shape))
            raise ValueError(f"{found} px, expected {expected}")
        notes += oddities(film) if crop == "breast" else []
        canvas, geometry, _ = place_film(film, laterality, size, crop)
        row.update(geometry._asdict(), bits=bits or 8, **film_statistics(film, canvas))
        return canvas, {**row, "note": "; ".join(notes)}
    except (UserError, ValueError, OSError) as error:
        problem = explain(error) if isinstance(error, OSError) else str(error)
        row["problem"] = problem.replace(str(path), "the file")  # alike for all: one line
        return np.zeros(size, np.uint8), {**row, "note": ""}


def scratch_array(shape, folder):
    """Return a writable uint8 array in a nameless file: memory stays flat, a kill leaves nothing.

    Written out, for on a full disk a map of a file with holes would crash.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with in_words(folder), tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(shape[0]):
            file.write(bytes(shape[1] * shape[2]))
        file.flush()
        return np.memmap(file, np.uint8, "r+", shape=shape)


# %% Patients


def worst(labels, groups):
    """Return for every row the worst label (a Series of codes) of its group."""
    other = labels[~labels.isin(SEVERITY)].unique()
    refuse(other, "labels are 0 (benign), 1 (normal) or 2 (malignant); found")
    severity = labels.map(SEVERITY.index)
    return severity.groupby(groups).transform("max").map(dict(enumerate(SEVERITY)))


def deal_patients(labels, parts, seed, fewest):
    """Deal patients into parts; return the part (0 to parts - 1) of each film, a Series.

    `labels` has patient and label; the order of its rows does not count. UserError if a class has
    fewer patients than `fewest`.
    """
    from sklearn.model_selection import StratifiedKFold  # most of a second to import

    # sorted by name, a row each; StratifiedGroupKFold deals otherwise from scikit-learn 1.8 on
    worse = worst(labels["label"], labels["patient"]).groupby(labels["patient"]).first()
    counts = worse.value_counts()
    if parts < 2 or len(counts) < 2 or counts.min() < fewest or counts.max() < parts:
        found = ", ".join(f"{CLASS_NAMES[code]} {n}" for code, n in counts.sort_index().items())
        need = f"{parts} folds or parts need {max(parts, 2)} patients or more, of two classes"
        hint = "choose fewer --folds (in step 4 a larger --validation) or add films"
        raise UserError(f"{need}; found patients by worse label: {found}; {hint}")
    part = pd.Series(-1, index=worse.index)
    dealer = StratifiedKFold(n_splits=parts, shuffle=True, random_state=seed)
    with warnings.catch_warnings():  # of classes with fewer patients than parts, judged above
        warnings.simplefilter("ignore", UserWarning)
        for number, (_, held_out) in enumerate(dealer.split(worse, worse)):
            part.iloc[held_out] = number
    return labels["patient"].map(part)


def labels_of(films, labels):
    """Return the rows of `labels` of those films that have one, in the films' order; R is right."""
    rows = films[["image"]].merge(labels, on="image")[list(labels)]
    return rows.assign(laterality=sides_of(rows["laterality"]))


def near_copies(canvases, films, labels):
    """Return the pairs of films, "a and b", of different patients that show nearly the same.

    Row n of `films` (image, its index the row in `canvases`) may have a row in `labels`. Compared
    are thumbnails of 32 x 18 px, of mean 0 and length 1: films of different patients of MIAS lie
    0.148 or more apart, a film and its copy as JPEG, or a little brighter, 0.04 or less.
    """
    from sklearn.neighbors import NearestNeighbors

    patient = films["image"].map(labels.set_index("image")["patient"]).dropna()
    small = [Image.fromarray(canvases[n]).resize((18, 32), Image.BOX) for n in patient.index]
    small = np.stack([np.asarray(film, np.float32).ravel() for film in small])
    small -= small.mean(axis=1, keepdims=True)
    small /= np.linalg.norm(small, axis=1, keepdims=True).clip(1e-6)
    near = NearestNeighbors(radius=0.07).fit(small).radius_neighbors_graph()
    pairs = [(patient.index[n], patient.index[m]) for n, m in zip(*near.nonzero()) if n < m]
    pairs = [films["image"][[*pair]] for pair in pairs if patient[[*pair]].nunique() > 1]
    return [" and ".join(pair) for pair in pairs]


# of what a child could tell classes by, that which the network sees
SEEN = ["width", "height", "aspect", "side", "orientation", "mean grey", "sd of grey", "rim"]


def find_shortcuts(plain, labels):
    """Return a row for each property and question: AUC, its lower 95 % bound, z against chance.

    A property (a column of numbers or text) is ranked, and the films of other patients that lie
    nearest guess each film's class, the same values before all others. Patients weigh alike, and
    the error is that of chance with as many of them (Mann and Whitney, 1947).
    """
    from sklearn.metrics import roc_auc_score
    from sklearn.neighbors import NearestNeighbors

    label, rows = labels["label"], []
    asked = pd.DataFrame({"malignant": label == MALIGNANT, "abnormal": label != NORMAL})
    asked["malignant, not benign"] = asked["malignant"].where(asked["abnormal"])
    asked = asked.loc[:, asked.nunique() > 1].T.drop_duplicates().T  # two are one without a class
    for question in asked:
        positive = asked[question].dropna().astype(bool)
        patients = labels["patient"][positive.index]
        films, who = patients.map(patients.value_counts()), patients.to_numpy()
        count = min(15 + films.max(), len(films))  # neighbours, with a patient's own films
        error = (1 / patients.groupby(positive).nunique() / 12).sum() ** 0.5
        for name in plain.columns[plain.nunique() > 1]:
            rank = np.unique(plain.loc[positive.index, name], return_inverse=True)[1][:, None]
            gap, near = NearestNeighbors(n_neighbors=count).fit(rank).kneighbors(rank)
            weight = (who[near] != who[:, None]) / (gap + 1e-9)
            guess = (weight * positive.to_numpy()[near]).sum(1) / weight.sum(1).clip(1e-9)
            auc = roc_auc_score(positive, guess, sample_weight=1 / films)
            rows.append((name, question, auc, auc - 1.645 * error, (auc - 0.5) / error))
    return pd.DataFrame(rows, columns=["property", "tells", "auc", "low", "z"])


# %% What was prepared


class Prepared(typing.NamedTuple):
    """What step 1 leaves for the next ones; all tables have the films' order."""

    source: str  # "mias", "phantom" or "own"
    folder: Path  # data/<source>
    films: np.ndarray  # uint8 memory map, (n_films, height, width)
    table: pd.DataFrame  # films.csv: image, file, digest and the geometry
    labels: pd.DataFrame  # labels.csv
    findings: pd.DataFrame  # findings.csv, in film and in canvas pixels
    splits: pd.DataFrame  # splits.csv: image, patient, fold
    fingerprint: str  # of pixels, labels and findings
    crop: str  # "breast", or "none": whole films
    split_seed: int  # that dealt the patients into folds
    note: str  # in what the labels, films or folds differ from the database's; "" if in nothing

    def identity(self):
        """Return what a run notes of its data and split, and what must be the same on resume."""
        first = {"source": self.source, "films": len(self.films), "crop": self.crop}
        first["size"] = list(self.films.shape[1:])
        first["pixels_and_labels"] = self.fingerprint
        first["split"] = fingerprint(self.splits.to_csv(index=False, lineterminator="\n"))
        return {**first, "folds": int(self.splits["fold"].max()) + 1}


FILES = ("films.npy", "films.csv", "labels.csv", "findings.csv", "splits.csv", "prepared.json")


def save_prepared(films, tables, state):
    """Write films (an iterable of canvases), tables {name: DataFrame} and the state, or nothing.

    All files are made in a new folder first, then moved into place, prepared.json last, so that a
    crash leaves no mixture. What is the same stays as it is; a table that was edited by hand is
    kept under another name.
    """
    folder, pixels, before = data_dir(state["source"]), hashlib.sha256(), {}
    new = folder / ".new"
    with contextlib.suppress(UserError):  # nothing is there yet, or it is not whole
        before = read_json(folder / "prepared.json")
    discard(new)  # of a run that was killed
    with in_words(folder):
        try:
            with replacing(new / "films.npy") as temporary, open(temporary, "wb") as file:
                shape = (state["films"], *state["size"])
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for film in films:
                    pixels.update(film.tobytes())
                    file.write(film.tobytes())
            for name, part in tables.items():
                write_csv(part, new / name)
            digests = {name: file_digest(new / name) for name in tables}
            state = {**state, "pixels": pixels.hexdigest(), "digests": digests}
            write_json(state, new / "prepared.json")
            for name, digest in before.get("digests", {}).items():
                if (folder / name).is_file() and file_digest(folder / name) != digest:
                    keep_edited(folder / name)
            same, *_ = filecmp.cmpfiles(folder, new, FILES[:-1], shallow=False)
            if "films.npy" not in same and (folder / "films.npy").exists():
                os.replace(folder / "films.npy", new / "old.npy")  # on Windows not if it is mapped
            discard(folder / "prepared.json")  # what follows is not whole until the end
            for name in FILES:
                if name not in same:
                    os.replace(new / name, folder / name)
        finally:
            discard(new)


def keep_edited(path):
    """Copy a table that was edited by hand to a free name beside it."""
    names = (f"{path.stem}.edited-{n}.csv" for n in range(1, 10**6))
    kept = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    shutil.copy2(str(path), str(kept))
    warn(f"{path} was edited by hand; it is kept as {kept.name}, and made anew")


def edits(labels, database, used, same):
    """Say in what labels, and what else, differ from the database's; "" if in nothing.

    `used` is the number of films that are used; `same` tells of other things whether they are.
    """
    both = labels.astype(str), database.astype(str)  # numbers may have been typed for text
    changed, said = pd.merge(*both, how="left", indicator=True)["_merge"] != "both", []
    if changed.any() or len(labels) != len(database):
        said.append(f"labels edited, {used} of {len(database)}")
        said += [f"{changed.sum()} changed"] if changed.any() else []
    elif used < len(labels):
        said.append(f"films left out, {used} of {len(labels)}")
    return ", ".join(said + [f"{name} edited" for name, is_same in same.items() if not is_same])


def load_prepared(source):
    """Open what step 1 prepared; the films are a read-only memory map.

    A labels.csv or splits.csv that was edited by hand is used as it is, and named in `note`.

    Raises
    ------
    UserError
        If the files are not whole or contradict one another, or a patient is in two folds.
    """
    folder = data_dir(source)
    state = read_json(folder / "prepared.json")
    try:
        films = np.load(folder / "films.npy", mmap_mode="r")
        table, findings = (read_table(folder / f"{name}.csv") for name in ("films", "findings"))
        labels, splits = (edited_table(folder / f"{n}.csv", table) for n in ("labels", "splits"))
        edited = [n for n, digest in state["digests"].items() if file_digest(folder / n) != digest]
        note = "; ".join(filter(None, [state["note"], *(f"{n} edited by hand" for n in edited)]))
        if "films.csv" in edited:  # its rows are those of films.npy
            raise ValueError("films.csv was edited")
        if not len(films) == len(table) == len(labels) == len(splits):
            raise ValueError("films and tables differ in length")
        pixels, *facts = (state[name] for name in ("pixels", "crop", "split_seed"))
        check_tables(labels, splits)
        label = findings["image"].map(labels.set_index("image")["label"])
        denied = (label == NORMAL) | (label == BENIGN) & (findings["severity"] == "M")
    except (OSError, ValueError, EOFError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{folder} is not whole ({error}); run 01_prepare_data.py again") from None
    names = findings["image"][denied].unique()
    warn_of(names, "films have findings that their edited labels deny, and that are not taught")
    findings = findings[~denied].reset_index(drop=True)
    texts = (part.to_csv(lineterminator="\n") for part in (labels, findings.round(3)))
    content = fingerprint(pixels, *texts)  # as on other systems
    return Prepared(source, folder, films, table, labels, findings, splits, content, *facts, note)


def check_tables(labels, splits):
    """Refuse tables that contradict themselves, and a split with a patient on both sides."""
    name = labels["label"].map(dict(enumerate(CLASS_NAMES)))
    patients = splits.drop_duplicates("image").set_index("image")["patient"]
    patients = patients.reindex(labels["image"]).to_numpy()
    folds = splits.groupby("patient")["fold"].nunique()
    sides = labels["laterality"].isin(["right", "left", ""])
    numbers = {0, 1, *splits["fold"]} ^ {*range(splits["fold"].nunique())}
    for wrong, what in [
        (labels["image"][labels["image"].duplicated()], "twice in labels"),
        (splits["image"][splits["image"].duplicated()], "twice in splits"),
        (labels["image"][name != labels["label_name"]], "label and label_name contradict"),
        (labels["image"][~sides], "laterality other than right, left or nothing"),
        (labels["image"][labels["patient"] != patients], "another patient in splits.csv"),
        (folds.index[folds > 1], "patients in two folds of splits.csv; their films must share one"),
        (numbers, "folds are not 0, 1, 2, ..."),
    ]:
        mend = "mend labels.csv or splits.csv (in step 1: the tables), or run step 1 again"
        refuse(wrong, f"{mend}: {what}")


def open_prepared(source="auto"):
    """Open what was prepared last, or that of one source; if there is nothing, run step 1."""
    with first_process_first():
        pattern = f"{'*' if source == 'auto' else source}/prepared.json"
        if not any(data_dir().glob(pattern)):
            print("nothing is prepared yet: running 01_prepare_data.py as it is", flush=True)
            run_step("01_prepare_data.py", "--source", source)
    newest = max(data_dir().glob(pattern), key=lambda state: state.stat().st_mtime)
    prepared = load_prepared(newest.parent.name)
    announce(prepared)
    return prepared


def announce(prepared):
    """Say so where figures on these films are not figures on a database as it is."""
    if prepared.source == "phantom":
        print("SYNTHETIC PHANTOMS: figures from here on say nothing about mammograms.", flush=True)
    if prepared.note:
        warn(f"{prepared.folder}: {prepared.note}; figures are not the database's")


def edited_table(path, films):
    """Read labels.csv or splits.csv, maybe edited by hand; return its rows in the films' order."""
    table = read_own_table(path)
    for name in {"label", "fold", "findings"} & {*table}:
        number = pd.to_numeric(table[name], errors="coerce")
        refuse(table.index[number % 1 != 0], f"{path}: {name} is no whole number in line")
        table[name] = number.astype(int)
    for found, what in [
        (table.index[table["image"].duplicated()], "a film that is there twice, in line"),
        ({*films["image"]} - {*table["image"]}, "no row for the films"),
        ({*table["image"]} - {*films["image"]}, "films that were not prepared"),
    ]:
        refuse(sorted(found), f"{path} has {what}")
    return table.set_index("image").loc[films["image"]].reset_index()[[*table]]


def read_table(path):
    """Read a CSV of ours; names stay text, even 001 and NA."""
    text = dict.fromkeys(("image", "patient", "digest", "note"), str)
    empty = dict.fromkeys(("x", "y", "radius", "canvas_x", "canvas_y", "canvas_radius"), [""])
    return pd.read_csv(path, dtype=text, keep_default_na=False, na_values=empty)


# %% Runs


def weights_file(name, fold=0, look=LOOKS[0]):
    """Return the file that is meant by a path, a pattern, a run or its folder; of a run, best.pt.

    That of the fold, if the run has it, since it saw no test patient of the same fold; else of the
    first. Of a fold the network of the look, if it has one.
    """
    path, *others = matching(name)
    refuse(others, f"name one file or folder; {name} stands for {path} and also")
    if path.is_file():
        return path
    found = [*path.glob("fold-*/best.pt")] or [*runs_dir(str(name)).glob("fold-*/best.pt")]
    if not found:
        expected = f"a state dict FILE, or a run in {runs_dir()} that has a fold-K/best.pt"
        raise UserError(f"{name} is not there; expected {expected}; check the name and the folder")

    def unlike(path):
        number, window, _ = path.parent.name.partition("-window")
        return number != fold_name(fold, LOOKS[0]), number, bool(window) != (look == "window")

    return min(found, key=unlike)


def find_run(name=""):
    """Return the folder of a run; by default of the one begun or resumed last."""
    found = [path.parent for path in runs_dir().glob("*/settings.json")]
    if not found or name and runs_dir(name) not in found:
        there = f"there are: {listing(sorted(p.name for p in found))}" if found else "there is none"
        raise UserError(f"no run {name!r} in {runs_dir()}; {there}; python 04_train.py makes one")
    newest = max(found, key=lambda folder: (folder / "settings.json").stat().st_mtime)
    return runs_dir(name) if name else newest


def open_run(name=""):
    """Return the folder and the settings.json of a run: the named, the newest, or a first one."""
    if not name and not any(runs_dir().glob("*/settings.json")):
        print("there is no run yet; running 04_train.py", flush=True)
        run_step("04_train.py")
    folder = find_run(name)
    return folder, record_in(folder)


def record_in(folder):
    """Return the settings.json of a run, or end with a message if an earlier version wrote it."""
    record = read_json(folder / "settings.json")
    needed = {"source_used", "looks", "data", "film_statistics", "weights_used", "schedule"}
    lacking = needed - set(record)
    refuse(sorted(lacking), f"{folder} is of an earlier version, train again; its record lacks")
    return record


def folder_of_run(settings, record):
    """Return the folder of the run that goes on, or of a new one; the same in all processes.

    Without a name a new one gets the next free number. UserError if the name leads elsewhere.
    """
    name, stem = str(settings.run or ""), f"{record['source_used']}-{record['recipe']}"
    if settings.resume:
        return find_run(name)
    if name.strip(". ") != name or not all(c.isalnum() or c in "-_. " for c in name):
        raise UserError(f"--run {name!r}: letters, digits, and inside also blank, '-', '_' and '.'")
    taken = [int(p.name[-3:]) for p in runs_dir().glob(f"{stem}-[0-9][0-9][0-9]")]
    return collect(runs_dir(name or f"{stem}-{max(taken, default=0) + 1:03d}"))[0]


# when a run goes on
MAY_CHANGE = "run resume overwrite fold epochs patience device precision".split()


def taken_up(settings, prepared):
    """Return settings as they are or, where `resume` is set, filled with those of their run.

    Only values that differ from the defaults count as changed. UserError if other settings, films,
    labels or folds than the run began with would be gone on with.
    """
    if not settings.resume:
        return settings
    folder = find_run(settings.run)
    record = record_in(folder)
    noted, now, values = record["data"], prepared.identity(), {}
    changed = [f"{n} {noted.get(n)} -> {now[n]}" for n in now if noted.get(n) != now[n]]
    for name, mine in dataclasses.asdict(settings).items():
        default = getattr(type(settings), name)
        old = record.get(name, default)
        old = tuple(old) if isinstance(old, list) else old  # JSON knows no tuples
        if mine == default and name not in ("run", "resume", "overwrite"):
            values[name] = old
        elif mine not in (old, record.get(f"{name}_used")) and name not in MAY_CHANGE:
            changed.append(f"{name} {old} -> {mine}")
    refuse(changed, f"put back what {folder.name} began with, or begin a new run; changed are")
    taken = [f"{n} {value}" for n, value in values.items() if value != getattr(settings, n)]
    if taken:
        print(f"taken from {folder.name}, until the Settings cell is run: {listing(taken, 99)}")
    return dataclasses.replace(settings, **values)


def record_of(values, prepared):
    """Return settings.json of a run: its settings, and what its films are like.

    Enough to repeat the run, and to refuse going on with it on other data.
    """
    record = {**values, "source_used": prepared.source, "synthetic": prepared.source == "phantom"}
    record.update(class_names=list(CLASS_NAMES), film_bits=int(prepared.table["bits"].max()))
    notes = ["labels SHUFFLED for a leak test" if values["shuffle_labels"] else "", prepared.note]
    record.update(split_seed=prepared.split_seed, note="; ".join(filter(None, notes)))
    record["data"] = prepared.identity()
    record["film_statistics"] = usual_range(prepared.table).T.to_dict("list")
    return {**record, "torch": str(torch.__version__), "disclaimer": DISCLAIMER}


SHOWN = "run source_used note split_seed recipe looks weights_used device_used precision_used"


@contextlib.contextmanager
def recorded(folder, record, settings):
    """Hold a run's folder while it is trained, and write its settings.json, as the first process.

    A run that goes on must have begun with the same weights.
    """
    first = processes()[0] == 0
    with locked(folder) if first else contextlib.nullcontext():
        if first:
            left = [p for p in folder.iterdir() if p.name != ".lock" and not settings.resume]
            if left and not settings.overwrite:
                raise UserError(f"{folder} exists; choose another --run, --resume or --overwrite")
            # parts are a killed run's; the folder is locked, so nobody writes them now
            discard(*left, *folder.rglob(".*.part"))
            began = read_json(folder / "settings.json") if settings.resume else record
            if began["weights_used"] != record["weights_used"]:
                other = f"{began['weights_used']}, not {record['weights_used']}"
                raise UserError(f"{folder.name} began with other --weights: {other}; name the same")
            if began["torch"] != record["torch"]:  # dropout draws other numbers
                warn(f"{folder.name} began with torch {began['torch']}: not bit for bit any more")
            write_json({**record, "torch": began["torch"]}, folder / "settings.json")
            print(", ".join(f"{name} {record[name]}" for name in SHOWN.split() if record[name]))
        collect(None)  # nobody writes before the run is begun
        yield


def read_checkpoint(path):
    """Read tensors and plain values onto the CPU, a dict; refuse a file that would run code."""
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError):
        raise
    except pickle.UnpicklingError:
        holds = "holds more than tensors and plain values, which could run code (or is damaged)"
        raise UserError(f"{path} {holds}; it was not loaded. Save a state_dict instead") from None
    except Exception as error:  # damage shows as IndexError, struct.error, EOFError, ...
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is damaged or no torch file ({reason}); get it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, expected a state dict")
    return values


def save_checkpoint(values, path):
    """Save tensors and plain values, whole or not at all."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save(values, file)  # given a name, torch would not say that the disk is full


def history_line(row, epochs, better):
    """Return a row of history.csv in words, of at most so many epochs."""
    words = "epoch {epoch:2d}/{0}  loss {train_loss:.3f}  val loss {val_loss:.3f}  accuracy "
    words += "{val_accuracy:.2f}  macro-F1 {val_macro_f1:.2f}  malignant recall "
    words += "{val_malignant_recall:.2f}  lr {lr:.0e}  {films_per_second:.1f} films/s  {1} left{2}"
    left = clock((epochs - row["epoch"]) * row["seconds"])
    name = fold_name(row["fold"], row["look"]).replace("-", " ")
    return f"{name} " + words.format(epochs, left, "  best" if better else "", **row)


def write_history(rows, folder):
    """Write history.csv of a fold (a folder of the run), and with it the run's."""
    try:
        write_csv(pd.DataFrame(rows), folder / "history.csv")
        merge_histories(folder.parent)
    except UserError as error:  # Excel may hold one open: no reason to end a training
        warn(f"{error}; it is written again after the next epoch")


def merge_histories(folder, write=True):
    """Put the histories of a run's folds together, in the run's own too if `write`; return it.

    Each fold has its own, so that folds can be trained by several processes.
    """
    parts = [pd.read_csv(path) for path in sorted(folder.glob("fold-*/history.csv"))]
    history = pd.concat(parts) if parts else pd.DataFrame()
    if parts and write:  # none if every fold failed in its first epoch
        write_csv(history, folder / "history.csv")
    return history.reset_index(drop=True)


# %% Phantoms: synthetic films in the format of MIAS
# They let everything run without the database, and the tests know what is on them. Lengths are
# shares of the film size: u runs from the chest wall to the nipple, v from the top down. Every
# breast is drawn as a left one; right ones are mirrored at the end.

# One breast | the other, for 10 of 12 patients: as in MIAS, 1/3 N+N, 1/3 N+B, the rest with M.
PHANTOM_PLAN = ["|"] * 4 + ["|CIRC B", "|CIRC B", "|CIRC B,CIRC B", "|MISC B", "|SPIC M", "|SPIC M"]
PHANTOM_HEADER = """SYNTHETIC PHANTOMS IN THE FORMAT OF THE MINI-MIAS DATABASE, with rows as
    mdb001 G CIRC B 535 425 197: x, y and radius in pixels from the bottom left"""


def phantom_findings(seed, number):
    """Tissue class ("F", "G" or "D") and list of findings ("CIRC B", ...) of one film."""
    (dozen, place), is_left = divmod((number - 1) // 2, 12), (number - 1) % 2
    # CALC and B+M are as rare as in MIAS. B before M catches readers of a film's first row only.
    plan = [*PHANTOM_PLAN, "|MISC M" if dozen % 5 else "|CALC M"]
    plan.append("|CIRC B,SPIC M" if dozen % 2 else "CIRC B|SPIC M")
    rng = np.random.default_rng([seed, 0, dozen])  # so a film stays the same in a larger set
    breasts = plan[rng.permutation(12)[place]].split("|")
    tissue = "FGD"[rng.permutation(12)[place] % 3]
    findings = breasts[is_left ^ int(rng.integers(0, 2, 12)[place])]
    return tissue, findings.split(",") if findings else []


def phantom_texture(rng, size):
    """Noise that is coarse more than fine, as parenchyma is; mean 0, about 1 wide, (size, size)."""
    octaves = (rng.standard_normal((n, n), "f4") * 6 / n for n in (6, 12, 24, 48))
    return sum(np.array(Image.fromarray(o).resize((size, size), Image.BICUBIC)) for o in octaves)


def phantom_mass(rng, malignant, radius):
    """Density that a mass adds, (2 radius + 1, 2 radius + 1); radius in pixels.

    Only the margin tells a benign mass (smooth, sharp) from a malignant one (blurred, spiculated).
    """
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1] / radius
    angle, turn = np.arctan2(y, x), rng.uniform(0, 2 * np.pi)
    edge, blur = 0.8 + 0.05 * np.cos(2 * angle + turn), 0.03
    if malignant:
        edge, blur = 0.5 + 0.4 * np.cos(rng.integers(5, 9) * angle + turn) ** 8, 0.08
    mass = 1 / (1 + np.exp(np.clip((np.hypot(x, y) - edge) / blur, -50, 50)))
    return rng.uniform(0.4, 1.0) * mass


def phantom_film(seed, number, size):
    """One film, uint8 (size, size), and its rows of Info.txt."""
    tissue, findings = phantom_findings(seed, number)
    rng, rows = np.random.default_rng([seed, number]), []
    outline = np.random.default_rng([seed, 0, (number + 1) // 2, 1])  # one for both breasts
    low, high = [0.38, 0.32, 0.5, 0.45, 0.18, 0.4], [0.6, 0.4, 0.6, 0.75, 0.28, 0.6]
    width, height, nipple, armpit, muscle_u, muscle_v = outline.uniform(low, high).tolist()
    # A coarse grid takes a tenth of the time; only lesions need sharper edges.
    v, u = (np.mgrid[: size // 3, : size // 3].astype("f4") + 0.5) / (size // 3)
    above, below = np.clip((nipple - v) / nipple, 0, 1), np.clip((v - nipple) / height, 0, None)
    reach = width * (armpit + (1 - armpit) * (1 + np.cos(np.pi * above)) / 2)
    skin = width * (1 - np.hypot(u / reach, below))
    muscle = (u / muscle_u + v / muscle_v - 1) / float(np.hypot(1 / muscle_u, 1 / muscle_v))
    texture = phantom_texture(rng, size // 3)
    centred = 1.2 - np.hypot((u - 0.6 * width) / (0.5 * width), (v - nipple) / (0.75 * height))
    gland = {"F": 0.15, "G": 0.4, "D": 0.75}[tissue] / (1 + np.exp(-5 * centred - 1.75 * texture))
    density = np.clip(0.5 + 0.1 * texture + gland + 0.9 * (muscle < 0), 0.1, None)
    density = density * (1 - np.exp(-np.clip(skin, 0, None) / 0.045))
    density = np.array(Image.fromarray(density).resize((size, size), Image.BICUBIC))
    # A lesion of a smaller radius fits where there is room to skin, muscle and film edge.
    room = np.minimum.reduce([skin, muscle, u, v, 1 - u, 1 - v])
    for finding in findings:
        if finding == "CALC M":
            density[tuple(3 * rng.choice(np.argwhere(room > 0.03), 150).T)] += rng.uniform(0.4, 1.2)
            rows.append(f"mdb{number:03d} {tissue} {finding} *NOTE 3*")
            continue
        radius = math.ceil(size * min(rng.uniform(0.04, 0.08), room.max() - 4 / size))
        row, column = 3 * rng.choice(np.argwhere(room * size > radius + 2))
        y, x = 3 * np.indices(room.shape)
        room = np.minimum(room, (np.hypot(y - row, x - column) - radius) / size)  # no overlaps
        inside = np.s_[row - radius : row + radius + 1, column - radius : column + radius + 1]
        density[inside] += phantom_mass(rng, finding.endswith("M"), radius)
        x = size - 1 - column if number % 2 else column
        rows.append(f"mdb{number:03d} {tissue} {finding} {x} {size - 1 - row} {radius}")
    # The film's response saturates, so dense tissue hides lesions, as it does in life.
    grey = 245 * (1 - np.exp(-density)) + 3 * np.abs(rng.standard_normal((size, size), "f4"))
    if rng.random() < 0.6:  # a label beside the breast
        grey[size // 16 : size // 6, -size // 5 : -size // 9] = rng.integers(225, 256)
    film = grey.clip(0, 255).astype("u1")
    return film[:, ::-1] if number % 2 else film, rows or [f"mdb{number:03d} {tissue} NORM "]


def make_phantoms(folder, n_patients=60, seed=0, film_size=1024):
    """Write films ``mdb001.pgm`` ... (two a patient) and their ``Info.txt`` as MIAS has them.

    Parameters
    ----------
    folder : str or Path
        An existing folder.
    n_patients, seed, film_size : int
        12 patients include 4 malignant, 4 benign and every quirk of ``Info.txt``. A film depends on
        the seed, its number and its size (pixels; 128 at least), not on ``n_patients``.
    """

    def write(number):
        film, rows = phantom_film(seed, number, film_size)
        Image.fromarray(film).save(Path(folder) / f"mdb{number:03d}.pgm")
        return rows

    rows = sum(in_threads(write, range(1, 2 * n_patients + 1), "drawing phantoms"), [])
    (Path(folder) / "Info.txt").write_text("\n".join([PHANTOM_HEADER, *rows, "", "=" * 65, ""]))


# %% Digests of MIAS: six hex digits a film, of its pixels, from mdb001 on

DIGESTS = """
<3ufTML<w;yRdxI^F@Up(xwsfTmb{>Bn>`nDwTzgoED;^uVcv<Son%Ma$O~V=u`X>LXbZoNtDtOaC4oXow9?-KeshHS&boY!?8
SWvL8*hnrqHi(y&<qo;L6j*$dy}LuwNf#afJ}l_f;)Grt3IRsNJnk(TeTWCI1|%p|pGai%N%#qhbiNddjM776MYN9~uJk&3!#J
HlPb$Fix?s83L}E;5iDetn|l`=UA7qhYhuMP@uv${^G-x2wAWM2S|zNseU5kex;N#-Zi}9g<JWoGm`>=r+D7Wz!4q+}hOr*jv!
Htz75{_>Qn_oAc!Y;7~wpn35A*9)`&X(-1F`32!CU1vH(?D+G`Z&}6%~*L;Cvga+50c^zepA>`}MVT_cx(;emP%H0a8q5EDo=G
E5)(T5jq8MA+rdMADrjHnGs$UXGw)<F}$R<YBqLpZ?g0F38DC#wDnqXOkLqoVcOsaxVhGkO3QYt39QP30I3dj(bG5Gqt7ng^^@
T#hEk5~+rS1xt(TYbHv(l*O&5@OigQN!O`K|EWWpCL2qj7_7uVi+oJ(yJf3|v+I~FNLA_S=&H{cZ?Do<ivGAvHLQ7%F!D^bh(+
on>W`D66%qHFqeHu(RDZ?iF&BghY6KnG-gF2Ydl5Lv{I{EEH7+iS>0B4<O|*ofP6m%o$2Nzgb!o1A7wd)`Va}!RGr<hlo&+hnE
vqHT<n783Q#)n{Mm<ThWIHs3FTLsqlulZ#EV_M$t95?`uCS?Yo1BKV-m)~b3H<s+0&praujA8`s8*&NVgT@#wo0f9O?p_U+a=N
U2&3@%%cmU}QGUL2_!FyH;qx!>Oo|f(P3oWVGuWS+DCiy{6aiCzM`q@K3rql8`GBk49VAnqZZs{47X<Y(E;n34MOmNpdt4ten$
;3TIK}1CHF{U!#Sr*LhR!9&Cb7jV2e578S^x@+H@<6CVPF%8YFh$xa2h;eh>b*aONA8kQrn+|_B7TpqpPY*G}Dyi&{O1$y`)_-
`G{u6oFmmlq4aa<0`*H!Ld3RY+meds+WhBzry1~`oVkqak}OXlQ0q1VNl>y{?02wGpZ=E1-<L2{R;&qd<1VmgO0DQ(XJOTZ`jx
EK0{A_(1ZMTo1Ds0BPhtT$fxBoyrI{X>V1BqUqqX2C!vEhIh`$B=+62kwA%#68!3@^ubr9MP%tHpc3Ww<>^H}Vdde<z_bd8@`j
-Ov=U9m^!-V_}A=(wbieQ&QF)@T8C>MZ
"""


def known_digests():
    """Return the distributed films' digests as {digest: image}."""
    digits = base64.b85decode("".join(DIGESTS.split())).hex()
    return {digits[6 * n : 6 * n + 6]: f"mdb{n + 1:03d}" for n in range(len(digits) // 6)}


def check_films(source, films, missing, allow_partial):
    """Return which films can be used, bool (n,); `films` has image, digest and problem.

    UserError if two names hold the same pixels, or one those of another MIAS film, and, unless
    `allow_partial`, if films are missing or unusable. What is left out is named.
    """
    usable = films["problem"] == ""
    twice = films["image"][films["digest"].duplicated(keep=False) & usable]
    refuse(twice, "the same pixels under several names; delete all rows but one of each")
    if source == "mias":
        belongs = films["digest"].str[:6].map(known_digests())
        renamed = films["image"][belongs.notna() & (belongs != films["image"])]
        pairs = [f"{a} holds {b}" for a, b in zip(renamed, belongs[renamed.index])]
        refuse(pairs, "renamed films, their labels would be wrong")
        other = films["image"][belongs.isna() & usable]
        warn_of(other, "films differ from the distributed database; results cannot be compared")
    problems = [f"{len(missing)} films are missing: {listing(missing)}"] if missing else []
    for why, part in films[~usable].groupby("problem", sort=False):
        problems.append(f"{listing(part['image'])}: {why}")
    if problems and not allow_partial:
        raise UserError(f"{listing(problems)}. Get them again, or use --allow-partial")
    if problems:
        warn("left out, as --allow-partial says: " + "; ".join(problems))
    if not usable.any():
        raise UserError("no film is left to work with")
    return usable.to_numpy()
