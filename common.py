"""The tool drawer of the five scripts; nothing in here knows a network, a loss or a metric.

Sections: names and folders; errors; settings and the command line; files that are never half
written; reading films; what was prepared; what a session shows; device and processes; phantoms.
"""

import atexit
import contextlib
import dataclasses
import datetime
import difflib
import errno
import hashlib
import http.client
import inspect
import json
import os
import pickle
import re
import runpy
import shutil
import sys
import threading
import time
import typing
import urllib.request
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageOps, ImageSequence, UnidentifiedImageError

# ---------------------------------------------------------------------- names and folders

CLASS_NAMES = ("benign", "normal", "malignant")
BENIGN, NORMAL, MALIGNANT = range(3)
SEVERITY = (NORMAL, BENIGN, MALIGNANT)  # from harmless to worst
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


# ---------------------------------------------------------------------- errors


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
        return f"no permission for {error.filename}; change its rights or choose another folder"
    if isinstance(error, OSError):
        return f"{error.strerror or error}: {error.filename or 'no file name known'}"
    return f"unexpected {type(error).__name__}: {error} (--debug shows where; please report it)"


@contextlib.contextmanager
def in_words(path=None):
    """Turn a full disk and a missing permission into a UserError; a failed write names no file."""
    try:
        yield
    except OSError as error:
        if error.errno not in (*FULL, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        error.filename = error.filename or path
        raise UserError(explain(error)) from None


def quiet_excepthook(kind, error, trace):
    """End a command-line run with one message on stderr instead of a traceback."""
    if "--debug" in sys.argv:
        sys.__excepthook__(kind, error, trace)
    else:
        sys.stdout.flush()
        print(f"\nerror: {explain(error)}", file=sys.stderr)


# ---------------------------------------------------------------------- settings, command line


@dataclasses.dataclass
class SeedSettings:
    """What every script has."""

    seed: int = 0  # of every random choice in this script


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


def check_settings(settings, script):
    """Refuse the settings of another script: in one console all are called `settings`."""
    if getattr(settings, "script", "") != script:
        raise UserError(f"run the Settings cell of {script} first")


def in_ipython():
    """Tell whether the code runs in IPython: Spyder's console, VS Code or a notebook."""
    return "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None


class _Parser(ArgumentParser):
    """An ArgumentParser that suggests the nearest flag when one is mistyped (status 2)."""

    def error(self, message):
        flags = [flag for action in self._actions for flag in action.option_strings]
        unknown = re.findall(r"unrecognized arguments: (--\S+)", message)
        near = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1) if unknown else []
        hint = f" - did you mean {near[0]}?" if near else " - --help lists the options"
        self.exit(2, f"{self.prog}: {message}{hint}\n")


def command_line(settings_class, description):
    """Return the settings of a script: the values in its settings cell, changed by flags.

    Every field of the dataclass is a flag of the same name (``batch_size`` is ``--batch-size``);
    the comment on its line is the help. In a cell run by an IDE no flag is read.

    Parameters
    ----------
    settings_class : type
        A dataclass whose fields are bool, int, float, str, a Literal or a tuple of str; its
        attribute `script` is the file's name.
    description : str
        The script's docstring, shown by ``--help``.

    Returns
    -------
    settings : object
        An instance of `settings_class`.
    """
    if in_ipython():
        shell = sys.modules["IPython"].get_ipython()
        shell.extension_manager.load_extension("autoreload")  # an edited step is used next time
        shell.run_line_magic("autoreload", "2")
        main_file = getattr(sys.modules["__main__"], "__file__", None)
        if not (main_file and sys.argv[0] and os.path.samefile(main_file, sys.argv[0])):
            return settings_class()
    else:
        sys.excepthook = quiet_excepthook
    parser = _Parser(
        description=description, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False
    )
    classes = filter(dataclasses.is_dataclass, reversed(settings_class.__mro__))
    for_help = {"-h", "--help"} & set(sys.argv)  # reading the comments takes a while
    source = "".join(map(inspect.getsource, classes if for_help else ()))
    comments = dict(re.findall(r"^\s+(\w+): .*?  # (.*)$", source, flags=re.MULTILINE))
    for field in dataclasses.fields(settings_class):
        flag = "--" + field.name.replace("_", "-")
        options = {
            "help": comments.get(field.name, "").replace("%", "%%"),
            "default": field.default,
        }
        if field.type is bool and field.default:
            flag, options = "--no" + flag[1:], {**options, "action": "store_false"}
            options["dest"] = field.name
        elif field.type is bool:
            options["action"] = "store_true"
        elif typing.get_origin(field.type) is tuple:
            options.update(nargs="+", metavar=field.name.upper())
        elif typing.get_origin(field.type) is typing.Literal:
            options["choices"] = typing.get_args(field.type)
        else:
            options.update(type=field.type, metavar=field.type.__name__.upper())
        parser.add_argument(flag, **options)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    values = vars(parser.parse_args())
    values.pop("debug")
    return settings_class(**values)


def run_step(name, *arguments):
    """Run an earlier script as a file, in this process, with its default settings."""
    path, before = str(PROJECT / name), sys.argv
    try:
        sys.argv = [path, *arguments]
        runpy.run_path(path, run_name="__main__")
    finally:
        sys.argv = before


# ---------------------------------------------------------------------- files, never half written


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
    """Write plain values as indented JSON, completely or not at all."""
    with replacing(path) as temporary:
        text = json.dumps(values, default=_plain)
        values = json.loads(text, parse_constant=lambda name: None)  # JSON knows no NaN
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
        except OSError:
            raise UserError(
                f"another process is writing to {folder}; wait until it has finished, or choose "
                "another run name or BCD_DATA_DIR"
            ) from None
        yield


def fingerprint(*parts):
    """Return a short sha256 (16 hex digits) of values, for telling whether two things differ."""
    text = json.dumps(parts, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(path):
    """Return a file's sha256, 64 hex digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def read_checkpoint(path):
    """Read tensors and plain values, and refuse a file that would run code.

    Parameters
    ----------
    path : str or Path
        A file written by torch.save.

    Returns
    -------
    values : dict
        On the CPU.
    """
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} is not there; check the name and the folder") from None
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds more than tensors and plain values (or is damaged); it was not loaded, "
            "since such a file can run code. Save a state_dict instead"
        ) from None
    except PermissionError:
        raise
    except Exception as error:  # damage shows as IndexError, struct.error, EOFError, ...
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is damaged or no torch file ({reason}); get it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}, expected a state dict")
    return values


def contact(url, patience=12.0):
    """Ask a server for the head of a file, or give up soon.

    Resolving a name has no timeout of its own, so this is done in a thread that can be left.

    Returns
    -------
    size : int
        Its bytes, 0 if the server does not say.

    Raises
    ------
    ConnectionError
        If there is no good answer within `patience` seconds.
    """
    outcome = [TimeoutError(f"no answer within {patience:.0f} s")]

    def ask():
        try:
            request = urllib.request.Request(url, method="HEAD")
            with urllib.request.urlopen(request, timeout=patience) as answer:
                outcome[0] = int(answer.headers.get("Content-Length") or 0)
        except (OSError, ValueError, http.client.HTTPException) as error:
            outcome[0] = error

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(patience)
    if isinstance(outcome[0], Exception):
        raise ConnectionError(str(getattr(outcome[0], "reason", outcome[0])))
    return outcome[0]


# ---------------------------------------------------------------------- reading films

FILM_SUFFIXES = (".pgm", ".png", ".bmp", ".jpg", ".jpeg", ".tif", ".tiff", ".dcm")
SIDE_FILES = ".txt .csv .tsv .json .xml .md .pdf .html .xls .xlsx .doc .docx .ini .db .log".split()
MASK = r"(^|[\W_])(masks?|gt|ground[\W_]?truths?|segmentations?|annotations?)([\W_\d]|$)"


def read_film(path, bits=None, notes=None):
    """Read a film as grey values.

    Parameters
    ----------
    path : str or Path
        A PGM (binary or ASCII), PNG, BMP, JPEG or TIFF; ``.dcm`` when pydicom is there.
    bits : int, optional
        A film of more than 8 bits is divided by ``2**bits - 1``, unless its header says more; by
        default by the depth that holds 99.99 % of its own pixels. What lies above is clipped.
    notes : list, optional
        Takes what was guessed or is odd, in place of a warning.

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
    said = [] if notes is None else notes
    try:
        pixels, depth = (read_dicom if path.suffix.lower() == ".dcm" else read_image)(path, said)
    except FileNotFoundError:
        raise UserError(f"{path} is not there; check the name and the folder") from None
    except UnidentifiedImageError:
        raise UserError(
            f"{path} ({path.stat().st_size} bytes) is no film that can be read; expected a PGM, "
            "PNG, JPEG or TIFF; copy it again from the source"
        ) from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, (PermissionError, IsADirectoryError)):
            raise
        raise UserError(f"{path} cannot be decoded ({error}); copy it from the source") from None
    if pixels.dtype != np.uint8:
        used = bits_in_use(bit_lengths(pixels))
        of_header, depth = bool(depth), depth or bits or used
        if used <= depth - 2:
            whose = "its header" if of_header else "the set"
            said.append(f"has only {used} of the {depth} bits of {whose}, so that it is dark")
        white = 2**depth - 1
        pixels = (pixels.clip(0, white) * (255 / white) + 0.5).astype(np.uint8)
    bright = (pixels >= 195).mean()
    rim = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    light_rim = np.quantile(rim, 0.62) >= 195  # at most 153 on MIAS
    if light_rim and 0.2 < bright < 0.95 and bright > 2 * (pixels <= 15).mean():
        pixels = 255 - pixels
        said.append("taken for a negative, since its background is white, and inverted")
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
            raise ValueError("16 bits in several channels, of which 8 would be lost: save it grey")
        # Pillow stretches a PGM to 16 bits, unless it is said to have them, true or not
        stretched = image.format == "PPM" and not re.search("65535|I;16", layout)
        image = ImageOps.exif_transpose(image)
        deep, clear = image.mode.startswith(("I", "F")), image.info.get("transparency")
        if image.mode in ("LA", "PA", "RGBA") or clear is not None and not deep:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
        if image.mode in ("1", "P") or len(image.getbands()) > 1:
            colours = np.array(image.convert("RGB"))
            if np.ptp(colours, axis=2).max() > 32:  # JPEG alone tints a grey film a little
                said.append("has colours: marks on a film may give its label away")
            image = image.convert("L")  # a grey film that was saved in colour
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


def bit_lengths(pixels):
    """Count the pixels that need 0, 1, 2, ... bits; returns int (65,)."""
    return np.bincount(np.frexp(pixels.clip(0).astype(np.float64))[1].ravel(), minlength=65)


def bits_in_use(counts):
    """Return the fewest bits, 8 at least, that hold 99.99 % of the pixels that were counted."""
    return max(int((counts.cumsum() >= 0.9999 * counts.sum()).argmax()), 8)


@contextlib.contextmanager
def opened_dicom(path, **options):
    """Yield pydicom and its reading of a file; what goes wrong with it becomes a UserError.

    pydicom is no requirement of this project.
    """
    try:
        import pydicom
    except ImportError:
        raise UserError(f"{path} needs pydicom: pip install pydicom, or export a PNG") from None
    try:
        yield pydicom, pydicom.dcmread(path, **options)
    except FileNotFoundError:
        raise
    except Exception as error:  # pydicom's are of all kinds: no decoder, no pixels, no DICOM
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{path} cannot be read as a DICOM film ({reason}); for compressed ones pip install "
            "pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg, or export a PNG of it"
        ) from None


def dicom_header(path):
    """Return patient and laterality of a DICOM film, a dict of text, "" where it has none."""
    with opened_dicom(path, stop_before_pixels=True) as (_, film):
        side = str(film.get("ImageLaterality") or film.get("Laterality"))
        side = side if side in ("R", "L") else ""  # B: both, U: unpaired
        return {"patient": str(film.get("PatientID") or ""), "laterality": side}


def read_dicom(path, said):
    """Return the pixels of a DICOM film as its header wants them shown, and 16, their depth.

    With the window or lookup table, inverted and without padding.
    """
    with opened_dicom(path) as (pydicom, film):
        tools = getattr(pydicom, "pixels", None) or pydicom.pixel_data_handlers.util  # before 3.0
        photometric = str(film.get("PhotometricInterpretation") or "MONOCHROME2")
        if int(film.get("NumberOfFrames") or 1) > 1 or not photometric.startswith("MONOCHROME"):
            raise ValueError(f"it has several frames or colours ({photometric})")
        raw, half = film.pixel_array, film.PixelRepresentation * 2 ** (film.BitsStored - 1)
        plain = film.BitsAllocated == 16 and not film.file_meta.TransferSyntaxUID.is_compressed
        if plain and not half and (np.frombuffer(film.PixelData, "<u2") >> film.BitsStored).any():
            said.append(f"has bits above the {film.BitsStored} of its header, which are left out")
        every = np.linspace(-half, 2**film.BitsStored - 1 - half, 1 << 16).round().astype(raw.dtype)
        shown, every = (
            tools.apply_voi_lut(tools.apply_modality_lut(part, film), film).astype(np.float64)
            for part in (raw, every)
        )
    low, high = every.min(), every.max()
    pixels = np.rint((shown - low) / max(high - low, 1e-12) * 65535).astype(np.int64)
    if photometric == "MONOCHROME1" or film.get("PresentationLUTShape") == "INVERSE":
        pixels = 65535 - pixels
    padding, limit = film.get("PixelPaddingValue"), film.get("PixelPaddingRangeLimit")
    if padding is not None:
        ends = sorted([padding, padding if limit is None else limit])
        pixels[(raw >= ends[0]) & (raw <= ends[1])] = 0
    return pixels, 16


def files_below(folder):
    """Return all files in a folder and below, sorted, but for hidden ones; links are followed."""

    def refuse(error):
        raise error

    paths, seen = [], set()
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        seen.add(os.path.realpath(root))  # a link may lead back up
        real = {name: os.path.realpath(os.path.join(root, name)) for name in folders}
        folders[:] = [n for n in real if not n.startswith(".") and real[n] not in seen]
        paths += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(paths)


def is_mask(path):
    """Tell a mask by its own or its folders' names: film_mask.png, masks/film.png, gt/film.png."""
    return any(re.search(MASK, part, re.IGNORECASE) for part in [*path.parts[:-1], path.stem])


def film_paths(folder):
    """Return the film files in a folder and below, sorted, but for hidden ones and masks."""
    return [
        path
        for path in files_below(folder)
        if path.suffix.lower() in FILM_SUFFIXES and not is_mask(path.relative_to(folder))
    ]


def say_left_out(folder):
    """Name the masks in a folder and below, and the files of a kind that is not known.

    Of files without a suffix only DICOM, by its mark.
    """
    masks, others = [], []
    for path in files_below(folder):
        if path.suffix.lower() in FILM_SUFFIXES:
            masks += [path.name] if is_mask(path.relative_to(folder)) else []
        elif path.suffix:
            others += [path.name] if path.suffix.lower() not in SIDE_FILES else []
        else:
            with open(path, "rb") as file:
                others += [path.name] if file.read(132)[128:] == b"DICM" else []
    if masks:
        print(f"{len(masks)} masks are left out: {listing(masks)}")
    warn_of(others, f"files are left out, not being called {', '.join(FILM_SUFFIXES)}")


def matching(name):
    """Return the path that a name stands for or, if there is none, those of its pattern."""
    path = Path(name).expanduser()
    return [path] if path.exists() else sorted(path.parent.glob(path.name)) or [path]


def named_films(names):
    """Return the paths that names, patterns such as scans/*.png, and folders stand for."""
    names = [names] if isinstance(names, (str, Path)) else names
    paths = []
    for path in sum(map(matching, names), []):
        films = film_paths(path) if path.is_dir() else [path]
        if not films:
            raise UserError(f"{path} holds no films; read are {', '.join(FILM_SUFFIXES)}")
        paths += films
    return paths


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


# ---------------------------------------------------------------------- what was prepared, runs


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
        return {
            "source": self.source,
            "films": len(self.films),
            "size": list(self.films.shape[1:]),
            "crop": self.crop,
            "pixels_and_labels": self.fingerprint,
            "split": fingerprint(self.splits.to_csv(index=False)),
            "folds": int(self.splits["fold"].max()) + 1,
        }


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
        names = ("films.csv", "labels.csv", "findings.csv", "splits.csv")
        table, labels, findings, splits = (read_table(folder / name) for name in names)
        edited = [n for n, digest in state["digests"].items() if file_digest(folder / n) != digest]
        note = "; ".join(filter(None, [state["note"], *(f"{n} edited by hand" for n in edited)]))
        labels, splits = (  # an editor may have sorted them
            part.set_index("image").loc[table["image"]].reset_index()[list(part)]
            for part in (labels, splits)
        )
        if not len(films) == len(table) == len(labels) == len(splits):
            raise ValueError("films and tables differ in length")
        pixels, crop, seed = state["pixels"], state["crop"], state["split_seed"]
        table["bits"]  # an earlier version noted none
        check_tables(labels, splits)
    except (OSError, ValueError, EOFError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{folder} is not whole ({error}); run 01_prepare_data.py again") from None
    content = fingerprint(pixels, labels.to_csv(), findings.round(3).to_csv())
    tables = table, labels, findings, splits
    return Prepared(source, folder, films, *tables, content, crop, seed, note)


def check_tables(labels, splits):
    """Refuse tables that contradict themselves, and a split with a patient on both sides."""
    for table in (labels, splits):
        if table["image"].duplicated().any():
            raise UserError(f"twice: {listing(table['image'][table['image'].duplicated()])}")
    name = labels["label"].map(dict(enumerate(CLASS_NAMES)))
    patients = splits.set_index("image")["patient"].reindex(labels["image"]).to_numpy()
    folds = splits.groupby("patient")["fold"].nunique()
    sides = labels["laterality"].isin(["right", "left", ""])
    for wrong, what in [
        (labels["image"][name != labels["label_name"]], "label and label_name contradict"),
        (labels["image"][~sides], "laterality other than right, left or nothing"),
        (labels["image"][labels["patient"] != patients], "another patient in splits.csv"),
        (folds.index[folds > 1], "patients in two folds of splits.csv; their films must share one"),
        (set(splits["fold"]) ^ set(range(splits["fold"].nunique())), "folds are not 0, 1, 2, ..."),
    ]:
        if len(wrong):
            raise UserError(
                f"{what}: {listing(wrong)}. Mend labels.csv or splits.csv (in step 1: the tables), "
                "or run 01_prepare_data.py again"
            )


def open_prepared(source="auto"):
    """Open what was prepared last, or that of one source; if there is nothing, run step 1."""
    with first_process_first():
        pattern = f"{'*' if source == 'auto' else source}/prepared.json"
        if not any(data_dir().glob(pattern)):
            print("nothing is prepared yet; running 01_prepare_data.py", flush=True)
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


def read_table(path):
    """Read a CSV of ours; names stay text, even 001 and NA."""
    text = dict.fromkeys(("image", "patient", "digest", "note"), str)
    empty = dict.fromkeys(("x", "y", "radius", "canvas_x", "canvas_y", "canvas_radius"), [""])
    return pd.read_csv(path, dtype=text, keep_default_na=False, na_values=empty)


def weights_file(name, fold=0):
    """Return the file that is meant by a path, a pattern, a run or its folder; of a run, best.pt.

    That of the fold, if the run has it, since it saw no test patient of the same fold; else the
    first. Of two looks the network of whole films, for either.
    """
    path, *others = matching(name)
    if path.is_file() and not others:
        return path
    folder = path if path.is_dir() and not others else runs_dir(str(name))
    found = {part.parent.name: part for part in sorted(folder.glob("fold-*/best.pt"))}
    if not found:
        raise UserError(
            f"{name} is not there; expected a state dict FILE, or a run in {runs_dir()} that has a "
            "fold-K/best.pt; check the name and the folder"
        )
    of_fold = (found.get(fold_name(fold, look)) for look in LOOKS)
    return next(filter(None, of_fold), next(iter(found.values())))


def find_run(name=""):
    """Return the folder of a run; by default of the one that was written to last."""
    found = [path.parent for path in runs_dir().glob("*/settings.json")]
    if not found or name and runs_dir(name) not in found:
        there = f"there are: {listing(sorted(p.name for p in found))}" if found else "there is none"
        raise UserError(f"no run {name!r} in {runs_dir()}; {there}; python 04_train.py makes one")
    newest = max(found, key=lambda folder: max(p.stat().st_mtime for p in folder.glob("*.*")))
    return runs_dir(name) if name else newest


def read_record(folder):
    """Read settings.json of a run; a run of an earlier version is refused."""
    record = read_json(folder / "settings.json")
    if "looks" not in record:
        raise UserError(f"the run {folder.name} was made by an earlier version; train again")
    return record


# ---------------------------------------------------------------------- what a session shows


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
        alone = "TORCHELASTIC_RUN_ID" not in os.environ  # lines of several would overwrite another
        self.live = alone and (in_ipython() or sys.stdout.isatty())
        self.width = 0

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
    """Return seconds as text: 0.8 s, 42 s, 3:05 min or 1:02:03 h."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, seconds = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d} h" if hours else f"{minutes}:{seconds:02d} min"


def banner(*lines):
    """Print lines in a frame that cannot be missed."""
    width = max(len(line) for line in lines)
    print("\n" + "!" * (width + 6))
    for line in lines:
        print(f"!! {line:<{width}} !!")
    print("!" * (width + 6) + "\n", flush=True)


def warn(message):
    """Print a warning on stderr and go on."""
    sys.stdout.flush()
    print(f"warning: {message}", file=sys.stderr, flush=True)


def warn_of(names, what):
    """Warn of names, if there are any: how many, what they are, and which."""
    if len(names):
        warn(f"{len(names)} {what}: {listing(names)}")


def table(frame, title):
    """Print a DataFrame under a title, whole and unwrapped; "-" stands for what is not defined."""
    print(f"\n{title}\n{frame.to_string(na_rep='-')}\n", flush=True)


def show(figure, path=None):
    """Save a figure, show it in the Plots pane where there is one, and close it.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
        The figure.
    path : Path, optional
        PNG file; its folder is made.
    """
    if path is not None:
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120, bbox_inches="tight")
        print(f"saved {path}")
    if in_ipython():
        plt.show()
    plt.close(figure)


def listing(names, most=8):
    """Return names as text, the first few and how many more there are."""
    names = [text if len(text := str(name)) < 120 else f"{text[:120]} ..." for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# ---------------------------------------------------------------------- device and processes


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
        reason = str(error).splitlines()[0]
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


# ---------------------------------------------------------------------- phantoms
# Lengths are shares of the film size: u runs from the chest wall to the nipple, v from the top
# down. Every breast is drawn as a left one; right ones are mirrored at the end.

# One breast | the other, for 10 of 12 patients: as in MIAS, 1/3 N+N, 1/3 N+B, the rest with M.
PHANTOM_PLAN = ["|"] * 4 + ["|CIRC B", "|CIRC B", "|CIRC B,CIRC B", "|MISC B", "|SPIC M", "|SPIC M"]
PHANTOM_HEADER = """SYNTHETIC PHANTOMS IN THE FORMAT OF THE MINI-MIAS DATABASE
Film, tissue, class, severity, x, y and radius in pixels from the bottom left, as mdb001 in
    mdb001 G CIRC B 535 425 197
NOTE 3) Widely distributed calcifications have no centre.
"""


def phantom_findings(seed, number):
    """Tissue class ("F", "G" or "D") and list of findings ("CIRC B", ...) of one film."""
    (dozen, place), is_left = divmod((number - 1) // 2, 12), (number - 1) % 2
    # CALC and B+M are as rare as in MIAS. B before M catches readers of a film's first row only.
    plan = PHANTOM_PLAN + [
        "|MISC M" if dozen % 5 else "|CALC M",
        "|CIRC B,SPIC M" if dozen % 2 else "CIRC B|SPIC M",
    ]
    rng = np.random.default_rng([seed, 0, dozen])  # so a film stays the same in a larger set
    breasts = plan[rng.permutation(12)[place]].split("|")
    tissue = "FGD"[rng.permutation(12)[place] % 3]
    findings = breasts[is_left ^ int(rng.integers(0, 2, 12)[place])]
    return tissue, findings.split(",") if findings else []


def power_law_texture(rng, size, exponent):
    """Noise of power spectrum 1/f**exponent, mean 0 and standard deviation 1, (size, size)."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)).astype("f4")
    frequency[0, 0] = np.inf  # no mean
    spectrum = np.fft.rfft2(rng.standard_normal((size, size), "f4")) / frequency ** (exponent / 2)
    texture = np.fft.irfft2(spectrum, (size, size)).astype("f4")
    return texture / texture.std()


def phantom_breast(outline_rng, rng, tissue, size):
    """Radiographic density of a left breast and the room round each pixel, both (size, size).

    Room is the distance to skin, muscle or film edge: a lesion of a smaller radius fits there.
    Parenchyma has a power spectrum of about 1/f**3 (Burgess 1999, Proc. SPIE 3661, 642-653;
    Burgess, Jacobson and Judy 2001, Med. Phys. 28, 419-437).
    """
    v, u = (np.mgrid[:size, :size].astype("f4") + 0.5) / size
    width, height, nipple, armpit, muscle_u, muscle_v = outline_rng.uniform(
        [0.38, 0.32, 0.5, 0.45, 0.18, 0.4], [0.6, 0.4, 0.6, 0.75, 0.28, 0.6]
    ).tolist()
    above, below = np.clip((nipple - v) / nipple, 0, 1), np.clip((v - nipple) / height, 0, None)
    reach = width * (armpit + (1 - armpit) * (1 + np.cos(np.pi * above)) / 2)
    skin = width * (1 - np.hypot(u / reach, below))
    bulge = 0.12 * np.sin(np.pi * np.clip(v / muscle_v, 0, 1))
    muscle = (u / muscle_u + v / muscle_v - 1 - bulge) / float(np.hypot(1 / muscle_u, 1 / muscle_v))
    texture, strands = power_law_texture(rng, size, 3), power_law_texture(rng, size, 4)
    centred = 1.2 - np.hypot((u - 0.6 * width) / (0.5 * width), (v - nipple) / (0.75 * height))
    gland = 1 / (1 + np.exp(-5 * (centred + 0.35 * texture)))
    # Zero crossings of a fractal field are long thin curves: a cartoon of ligaments and ducts.
    ligaments = np.exp(-((strands / 0.05) ** 2)) * (0.06 + 0.16 * gland)
    amount = {"F": 0.15, "G": 0.4, "D": 0.75}[tissue]
    density = 0.5 + 0.1 * texture + gland * (amount + 0.07 * texture) + ligaments
    density += 0.9 / (1 + np.exp(np.clip(muscle / 0.006, -50, 50)))
    thickness = 1 - np.exp(-np.clip(skin, 0, None) / 0.045)
    room = np.minimum.reduce([skin, muscle, u, v, 1 - u, 1 - v])
    return np.clip(density, 0.1, None) * thickness, room


def phantom_lesion(rng, finding, core, radius):
    """Density that a mass adds, (2 radius + 1, 2 radius + 1); core and radius in pixels.

    Only the margin tells a benign mass (smooth, sharp) from a malignant one (blurred, spiculated).
    """
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    distance, angle = np.hypot(x, y) / core, np.arctan2(y, x)
    malignant, contrast = finding.endswith("M"), rng.uniform(0.4, 1.0)
    lobes, blur = 0.04 if finding == "CIRC B" else 0.12, 0.12 if malignant else 0.04
    outline = 1 + sum(
        lobes * rng.uniform(-1, 1) * np.cos(k * angle + rng.uniform(0, 2 * np.pi))
        for k in range(2, 8 if malignant else 4)
    )
    mass = 1 / (1 + np.exp(np.clip((distance - outline) / blur, -50, 50)))
    for direction in rng.uniform(0, 2 * np.pi, rng.integers(9, 18) if malignant else 0):
        off_axis = np.angle(np.exp(1j * (angle - direction))) * distance
        taper = np.clip(1 - distance / rng.uniform(1.45, radius / core), 0, 1)
        mass = np.maximum(mass, np.exp(-((off_axis / 0.17) ** 2)) * np.sqrt(taper))
    return contrast * mass


def phantom_artefacts(rng, size):
    """Label and frame strip beyond the nipple, on about 70 % of the films; uint8 (size, size)."""
    film = Image.new("L", (256, 256))  # the size at which the default font is right
    draw = ImageDraw.Draw(film)
    left, top, slant, grey = rng.integers([174, 0, -8, 225], [205, 26, 9, 256]).tolist()
    if rng.random() < 0.6:
        draw.rectangle([left, top, left + 22, top + 30], grey)
        draw.multiline_text((left + 4, top + 2), "R\nML", 30)
    if rng.random() < 0.25:
        draw.polygon([246 + slant, 0, 256, 0, 256, 256, 246 - slant, 256], grey)
    return np.asarray(film.resize((size, size), Image.BILINEAR))


def phantom_film(seed, number, size):
    """One film, uint8 (size, size), and its rows of Info.txt."""
    tissue, findings = phantom_findings(seed, number)
    rng = np.random.default_rng([seed, number])
    patient_rng = np.random.default_rng([seed, 0, (number + 1) // 2, 1])  # one outline for both
    # A coarse grid takes a tenth of the time; only lesions need sharper edges.
    density, room = phantom_breast(patient_rng, rng, tissue, size // 3)
    density, rows = np.array(Image.fromarray(density).resize((size, size), Image.BICUBIC)), []
    for finding in findings:
        if finding == "CALC M":
            density[tuple(3 * rng.choice(np.argwhere(room > 0.03), 150).T)] += rng.uniform(0.4, 1.2)
            rows.append(f"mdb{number:03d} {tissue} {finding} *NOTE 3*")
            continue
        reach = 1.7 if finding.endswith("M") else 1.25
        core = size * min(rng.uniform(0.03, 0.055), room.max() / reach - 4 / size)
        radius = int(np.ceil(reach * core))
        row, column = 3 * rng.choice(np.argwhere(room * size > radius + 2))
        y, x = 3 * np.indices(room.shape)
        room = np.minimum(room, (np.hypot(y - row, x - column) - radius) / size)  # no overlaps
        inside = np.s_[row - radius : row + radius + 1, column - radius : column + radius + 1]
        density[inside] += phantom_lesion(rng, finding, core, radius)
        x = size - 1 - column if number % 2 else column
        rows.append(f"mdb{number:03d} {tissue} {finding} {x} {size - 1 - row} {radius}")
    # The film's response saturates, so dense tissue hides lesions, as it does in life.
    grey = 245 * (1 - np.exp(-density)) + 3 * np.abs(rng.standard_normal((size, size), "f4"))
    film = np.maximum(grey, phantom_artefacts(rng, size)).clip(0, 255).astype("u1")
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

    with ThreadPoolExecutor() as pool:
        rows = sum(pool.map(write, range(1, 2 * n_patients + 1)), [])
    (Path(folder) / "Info.txt").write_text("\n".join([PHANTOM_HEADER, *rows, "", "=" * 65, ""]))
