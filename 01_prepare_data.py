"""Step 1: from an archive of mammograms to checked, cropped and split films.

In:  the MIAS database (folder, archive or download), your own films with a labels CSV, or the
     built-in synthetic phantoms.
Out: data/<source>/labels.csv, findings.csv, films.npy, films.csv and splits.csv.

    python 01_prepare_data.py                                   finds or downloads MIAS
    python 01_prepare_data.py --archive all-mias.tar.gz         an archive that you have
    python 01_prepare_data.py --source phantom                  synthetic films, no download
    python 01_prepare_data.py --images scans --labels mine.csv  your own films
"""

# %% Imports: this script finds its own folder first, whatever the working directory is
import contextlib
import hashlib
import http.client
import os
import re
import shutil
import socket
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(globals().get("__file__", "cell")).resolve().parent))

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from PIL import Image, ImageFilter
from sklearn.model_selection import StratifiedGroupKFold
from torchvision.datasets.utils import download_url

import common
from common import BENIGN, CLASS_NAMES, MALIGNANT, NORMAL, UserError


# %% Settings: change a value and run the cells below again; each name is a command-line flag
@dataclass
class Settings:
    """What to prepare, and how."""

    source: Literal["auto", "mias", "phantom", "own"] = "auto"  # auto: MIAS if it can be had
    images: str = ""  # folder with films, in place of an archive or a download
    archive: str = ""  # all-mias.tar.gz, .tar or .zip, with any folders inside
    labels: str = ""  # CSV of your own films: image,label[,patient][,laterality]
    size: str = "auto"  # canvas, height x width in px; auto: 512x288, phantoms 160x90
    folds: int = 5  # parts of the cross-validation; each is the test set once
    seed: int = 0  # of the split into folds, and of the phantoms
    patients: int = 60  # phantom patients, two films each
    phantom_size: int = 1024  # px, sides of a phantom film; MIAS has 1024
    allow_partial: bool = False  # go on without films that are missing or broken


if __name__ == "__main__":
    settings = common.command_line(Settings, __doc__)


# %% Find the films: a folder, an archive, an earlier download, the public mirror, or phantoms
MIRROR = "http://peipa.essex.ac.uk/pix/mias/all-mias.tar.gz"
LICENCE = """The MIAS database is free for research purposes only; it may not be rented, leased or
sold. Publications must cite: J Suckling et al (1994), "The Mammographic Image Analysis Society
Digital Mammogram Database", Exerpta Medica, International Congress Series 1069, pp 375-378."""


@common.in_words()
def find_films(settings):
    """Find the folder of raw films, or make one; who calls it holds the lock of the data folder.

    Parameters
    ----------
    settings : Settings
        `images`, `archive`, `labels` and `source` decide, in this order; then comes
        data/mias/raw, then MIAS_ARCHIVE and MIAS_URL from the environment, then the mirror.

    Returns
    -------
    source : str
        "mias", "phantom" or "own".
    folder : Path
        Where the films lie.

    Raises
    ------
    UserError
        If a named place does not exist, or `source` is "mias" and it cannot be had.
    """
    source = "own" if settings.labels else "mias" if settings.source == "auto" else settings.source
    if settings.source == "phantom":
        return "phantom", phantom_films(settings)
    if source == "own" and not (settings.labels and (settings.images or settings.archive)):
        raise UserError("own films need both --labels FILE and --images DIR (or --archive FILE)")
    raw = common.data_dir(source) / "raw"
    if settings.images:
        folder = Path(settings.images).expanduser()
        if not folder.is_dir() or not film_paths(folder):
            raise UserError(f"--images {settings.images} is no folder of films; check the name")
        return source, folder
    if settings.archive:
        return source, extract(Path(settings.archive).expanduser(), raw)
    if raw.is_dir() and film_paths(raw):
        return source, raw
    if os.environ.get("MIAS_ARCHIVE"):
        return source, extract(Path(os.environ["MIAS_ARCHIVE"]), raw)
    url = os.environ.get("MIAS_URL", MIRROR)
    try:
        archive = download(url, raw.parent / "all-mias.tar.gz")
    except ConnectionError as error:
        if settings.source == "mias":
            raise UserError(
                f"the database could not be downloaded from {url} ({error}); download it "
                "elsewhere and name it with --archive FILE, or try --source phantom"
            ) from None
        common.banner(
            "NO MIAS DATABASE: it was not found here and could not be downloaded",
            f"({url}: {error}).",
            "Going on with SYNTHETIC PHANTOMS. Figures from phantoms say nothing about mammograms.",
            "Have the database? python 01_prepare_data.py --archive all-mias.tar.gz",
        )
        return "phantom", phantom_films(settings)
    return source, extract(archive, raw, downloaded=True)


def download(url, path):
    """Download a file with torchvision, completely or not at all, and retry once.

    Parameters
    ----------
    url : str
        Address of the archive.
    path : Path
        Where it goes; a file that is there is taken as it is.

    Raises
    ------
    ConnectionError
        If the server cannot be reached or the transfer breaks off twice.
    """
    if path.is_file():
        return path
    print(f"looking for the database at {url} ...", flush=True)
    size = common.contact(url)
    print(LICENCE)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        for attempt in (1, 2):
            try:
                with common.replacing(path) as temporary:
                    download_url(url, str(temporary.parent), temporary.name)
                    got = temporary.stat().st_size  # a server that hangs up early raises nothing
                    if size and got != size:
                        raise OSError(f"{got} of {size} bytes came")
                return path
            except (OSError, RuntimeError, http.client.HTTPException) as error:
                if attempt == 2:
                    raise ConnectionError(str(getattr(error, "reason", error))) from None
                common.warn(f"the download broke off ({error}); trying once more")
    finally:
        socket.setdefaulttimeout(before)


def extract(archive, folder, downloaded=False):
    """Unpack the films and Info.txt of an archive, flat, into a new folder.

    Only regular files with a film's or a text file's suffix are written, under their base name,
    so no member can land outside; links, devices and upward paths are refused. More than 1 GiB
    and more than 30 times the archive's own size is taken for a bomb. A `downloaded` archive
    that is refused is deleted, or it would be taken for the database next time.

    Returns
    -------
    folder : Path
        The folder, whole. One that this archive filled before is used again.
    """
    if not archive.is_file():
        raise UserError(f"the archive {archive} is not there; check the name and the folder")
    size, changed = archive.stat().st_size, archive.stat().st_mtime_ns

    def unpack(temporary):
        limit = max(1 << 30, 30 * size)
        for name, length, stream in _members(archive):
            if ".." in Path(name).parts or name.startswith(("/", "\\")) or stream is None:
                raise ValueError(f"it has a member that is not allowed: {name!r}")
            limit -= length
            if limit < 0:
                raise ValueError("it unpacks to far more than its size")
            path = temporary / Path(name).name  # macOS adds ._mdb001.pgm
            kept = path.suffix.lower() in (*common.FILM_SUFFIXES, ".txt")
            if kept and not path.name.startswith("."):
                if path.exists():
                    raise ValueError(f"it holds {path.name} twice")
                with open(path, "wb") as file, stream() as data:
                    shutil.copyfileobj(data, file)
        if not film_paths(temporary):
            raise ValueError("it holds no film")

    stamp = {"archive": archive.name, "bytes": size, "changed": changed}
    try:
        return _filled(folder, ".archive.json", stamp, unpack)
    except UserError:  # a full disk, files in the way: not the archive's fault
        raise
    except Exception as error:  # damage shows as TarError, BadZipFile, zlib.error, EOFError, ...
        if downloaded:
            archive.unlink()
        raise UserError(f"{archive} is damaged or not safe: {error}; get it again") from None


def _filled(folder, mark, stamp, fill):
    """Return a folder after `fill(temporary)`, all or nothing; with the same stamp it is kept."""
    mark = folder / mark
    if mark.is_file() and common.read_json(mark) == stamp:
        return folder
    if folder.is_dir() and not mark.is_file() and any(folder.iterdir()):
        raise UserError(f"{folder} holds files that are not ours; move them or use --images")
    common.discard(*folder.parent.glob(".*.part"), *folder.parent.glob(".*.old"))  # of killed runs
    with common.replacing(folder) as temporary:
        temporary.mkdir()
        fill(temporary)
        common.write_json(stamp, temporary / mark.name)
    return folder


def _members(archive):
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


def phantom_films(settings):
    """Make the synthetic films, once for a number of patients and a seed; return their folder."""
    folder = common.data_dir("phantom") / "raw"
    if settings.patients < 12 or not 128 <= settings.phantom_size <= 4096:
        raise UserError("phantoms need at least 12 --patients and a --phantom-size of 128 to 4096")
    stamp = {"patients": settings.patients, "seed": settings.seed, "size": settings.phantom_size}

    def draw(temporary):
        print(f"making phantoms of {settings.patients} patients ...", flush=True)
        common.make_phantoms(temporary, *stamp.values())

    return _filled(folder, ".phantoms.json", stamp, draw)


def film_paths(folder):
    """Return the film files of a folder, sorted by name."""
    paths = (path for path in Path(folder).iterdir() if not path.name.startswith("."))
    return sorted(path for path in paths if path.suffix.lower() in common.FILM_SUFFIXES)


if __name__ == "__main__":
    with common.locked(common.data_dir()):  # two processes must not unpack into the same folder
        source, folder = find_films(settings)
    print(f"{source}: {len(film_paths(folder))} films in {folder}")


# %% Read the labels: every row of Info.txt is a finding, and the worst one labels the film
TISSUES = {"F": "fatty", "G": "fatty-glandular", "D": "dense-glandular"}
TYPES = ("CALC", "CIRC", "SPIC", "MISC", "ARCH", "ASYM")


def parse_info(text, film_height=1024):
    """Parse Info.txt of the MIAS database.

    Films 2k-1 and 2k are the right and the left breast of patient k. The file counts y from the
    bottom; here it runs from the top.

    Parameters
    ----------
    text : str
        The whole file. The first row starts with ``mdbNNN`` at column 0; before it comes prose.
    film_height : int
        Rows of a film, to turn y over.

    Returns
    -------
    labels : DataFrame
        One row a film: image, patient, laterality, tissue, label, label_name, findings (number).
    findings : DataFrame
        One row a finding: image, type, severity, x, y, radius (px, empty where not given).

    Raises
    ------
    UserError
        With every line that cannot be understood.
    """
    films, findings, problems = {}, [], []
    for number, line in enumerate(text.lstrip("\ufeff").splitlines(), start=1):
        if not re.match(r"\s*mdb\d" if films else r"mdb\d", line, flags=re.IGNORECASE):
            continue
        image, *tokens = line.lower().split()
        tissue, kind, severity, *place = [token.upper() for token in tokens] + [""] * 3
        if not re.fullmatch(r"mdb\d+", image):
            problems.append(f"line {number}: film {image!r}")
            continue
        film = films.setdefault(image, {"tissue": tissue, "severities": []})
        if tissue not in TISSUES or film["tissue"] != tissue:
            problems.append(f"line {number}: tissue {tissue!r} (F, G or D, alike for one film)")
        if (kind, severity) == ("NORM", ""):
            film["severities"].append("N")
            continue
        if kind not in TYPES or severity not in ("B", "M"):
            problems.append(f"line {number}: finding {kind!r}, severity {severity!r}")
            continue
        film["severities"].append(severity)
        place = " ".join(place).strip()
        known = re.fullmatch(r"(\d+) (\d+) (\d+)", place)
        x, y, radius = map(float, known.groups()) if known else (np.nan,) * 3
        if radius == 0 or not known and place not in ("", "*NOTE 3*"):
            problems.append(f"line {number}: place and radius {place!r}")
        findings.append((image, kind, severity, x, film_height - 1 - y, radius))
    labels = []
    for image, film in sorted(films.items()):
        severities = film["severities"]
        if "N" in severities and len(set(severities)) > 1:
            problems.append(f"{image} is called normal in one row and not in another")
        label = MALIGNANT if "M" in severities else BENIGN if "B" in severities else NORMAL
        number, count = int(image[3:]), len(severities) - severities.count("N")
        laterality = "right" if number % 2 else "left"
        labels.append((image, (number + 1) // 2, laterality, film["tissue"], label, count))
    if problems or not labels:
        found = "; ".join(problems[:10]) or "no row that starts with mdbNNN"
        raise UserError(f"Info.txt cannot be trusted: {found}. Compare it with the distributed one")
    columns = ["image", "patient", "laterality", "tissue", "label", "findings"]
    labels = pd.DataFrame(labels, columns=columns)
    labels.insert(5, "label_name", [CLASS_NAMES[label] for label in labels["label"]])
    columns = ["image", "type", "severity", "x", "y", "radius"]
    return labels, pd.DataFrame(findings, columns=columns)


def read_own_labels(path):
    """Read a user's labels CSV: image, label (0, 1, 2 or a name), maybe patient and laterality.

    Returns
    -------
    labels, findings : DataFrame
        As `parse_info` gives them; findings is empty.
    """
    try:
        given = pd.read_csv(path, dtype=str, skipinitialspace=True, header=None)
    except (OSError, ValueError) as error:
        raise UserError(f"--labels {path} cannot be read as CSV ({str(error).strip()})") from None
    names = given.iloc[0].fillna("").str.strip().str.lower()
    given = given.set_axis(names, axis=1)[1:].reset_index(drop=True)
    missing = [name for name in ("image", "label") if name not in given]
    if missing or names.duplicated().any():
        wrong = f"lacks the column {' and '.join(missing)}" if missing else "has a column twice"
        raise UserError(f"{path} {wrong}; found {', '.join(names)}")
    if given.empty:
        raise UserError(f"{path} has no rows below its header")
    codes = {name: code for code, name in enumerate(CLASS_NAMES)}
    codes.update({str(code): code for code in range(3)})
    label = given["label"].str.strip().str.lower().map(codes)
    image = given["image"].fillna("").str.strip().map(lambda name: Path(name).stem)
    bad = given.index[label.isna() | (image == "")]
    if len(bad):
        raise UserError(
            f"{path}: no valid image or label in line {common.listing(bad + 2)} (found "
            f"{common.listing(given.loc[bad, 'label'].unique())}); labels are benign, normal, "
            "malignant or 0, 1, 2"
        )
    twice = image.str.lower().duplicated()
    if twice.any():
        raise UserError(f"{path} names {common.listing(image[twice].unique())} twice")
    if "patient" in given and given["patient"].isna().any():
        raise UserError(f"{path}: some rows have no patient; fill the column or leave it out")
    if "patient" not in given:
        print("no patient column: each image counts as its own patient. If some patients have")
        print("several films, add the column, or films of one patient land on both sides.")
    sides = {"": "", "r": "right", "l": "left", "right": "right", "left": "left"}
    side = given.get("laterality", pd.Series("", given.index)).fillna("").str.strip().str.lower()
    if not side.isin(sides).all():
        found = common.listing(side[~side.isin(sides)].unique())
        raise UserError(f"{path}: laterality {found}; expected right, left or nothing")
    labels = pd.DataFrame({"image": image, "patient": given.get("patient", image).str.strip()})
    labels["laterality"] = side.map(sides)
    labels["tissue"] = ""
    labels["label"] = label.astype(int)
    labels["label_name"] = [CLASS_NAMES[code] for code in labels["label"]]
    labels["findings"] = 0
    return labels, pd.DataFrame(columns=["image", "type", "severity", "x", "y", "radius"])


@common.in_words()
def read_labels(source, folder, settings):
    """Read Info.txt of a folder, or the user's own CSV."""
    if source == "own":
        return read_own_labels(settings.labels)
    info = [path for path in Path(folder).iterdir() if path.name.lower() == "info.txt"]
    if not info:
        raise UserError(f"no Info.txt in {folder}; copy the database's there, or use --labels FILE")
    height = 1024
    for path in film_paths(folder):
        with contextlib.suppress(UserError, OSError):  # a broken film is named later
            height = common.read_film(path).shape[0]
            break
    return parse_info(info[0].read_text(encoding="utf-8", errors="replace"), height)


if __name__ == "__main__":
    labels, findings = read_labels(source, folder, settings)
    common.table(labels["label_name"].value_counts().to_frame("films"), "films per class")
    common.table(findings.head(8), "the first findings, y from the top")


# %% Find the breast: labels, tape and frames go, the breast and the muscle stay
def guess_laterality(film):
    """Return the brighter half, "right" or "left"; wrong if the breast fills the film (mdb151)."""
    columns = film.mean(axis=0)  # (width,)
    middle = len(columns) // 2
    return "right" if columns[-middle:].sum() > columns[:middle].sum() else "left"


def tissue_threshold(film):
    """Return the grey level that parts film from tissue: Otsu (1979), then two thirds back to film.

    Square roots of the grey levels, because the skin line is nearly as dark as the film; for the
    same reason Otsu's level alone would shave the skin off.
    """
    root = np.sqrt(np.arange(256))
    counts = np.bincount(film.ravel(), minlength=256)
    n, total = np.cumsum(counts), np.cumsum(counts * root)
    between = (total[-1] * n - n[-1] * total) ** 2 / np.maximum(n * (n[-1] - n), 1)
    otsu = between.argmax()
    # Level 0 is left out: it is the padding round the film rather than film.
    unlit = total[otsu] / max(n[otsu] - n[0], 1)
    return ((2 * unlit + root[otsu]) / 3) ** 2


def density(mask, radius):
    """Return how full (0 to 255) the square of `radius` pixels round each pixel of a mask is."""
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    return np.asarray(image.filter(ImageFilter.BoxBlur(radius)))


def connected(seed, mask):
    """Return the pixels of a bool mask that are joined to a bool seed, through 4 neighbours."""
    position = np.arange(1, max(mask.shape) + 1, dtype=np.int16)[:, None]
    walls = [np.rot90(~mask, turn) for turn in (1, 2, 3, 4)]
    walls = [np.maximum.accumulate(wall * position[: len(wall)], axis=0) for wall in walls]
    size = -1
    while seed.sum() > size:  # sweeps over whole columns: two or three rounds, not a hundred
        size = seed.sum()
        for wall in walls:
            seed = np.rot90(seed)
            seed = np.maximum.accumulate(seed * position[: len(seed)], axis=0) > wall
    return seed


def fill_holes(mask):
    """Return a bool mask with those pixels added that see it upwards, downwards, left and right."""
    seen = np.ones_like(mask)
    for _ in range(4):
        mask, seen = np.rot90(mask), np.rot90(seen)
        seen = seen & np.logical_or.accumulate(mask, axis=0)
    return seen


def find_breast(film, laterality):
    """Tell the breast from film, labels, tape and frames. The pectoral muscle stays.

    Parameters
    ----------
    film : ndarray of uint8, shape (height, width)
    laterality : {"right", "left", ""}
        The film edge that the chest wall lies against; "" to guess it.

    Returns
    -------
    ndarray of bool, shape (height, width)
        True on the breast and 1.5 % of the film size beyond all that is brighter than film.

    Raises
    ------
    ValueError
        If no single piece brighter than the film covers 3 to 98 % of it.
    """
    height, width = film.shape
    cell = max(1, round(max(film.shape) / 128))  # a coarse film is quick, and free of noise
    coarse = np.asarray(Image.fromarray(film).reduce(cell))  # (about 128, about 128)
    bright = coarse > tissue_threshold(coarse)
    # Two cells off every rim break the bridges to labels and tape, and remove scratches.
    core = density(bright, 2) == 255
    # Labels and frames are narrow and far from the chest wall: the fullest place near it is breast.
    wall_right = (laterality or guess_laterality(film)) == "right"
    nearness = np.linspace(*((0.5, 1) if wall_right else (1, 0.5)), num=coarse.shape[1])
    fullness = density(bright, 14) * nearness * core
    piece = density(connected(core & (fullness == fullness.max()), core), 2) > 0
    if not 0.03 < piece.mean() < 0.98:
        raise ValueError(
            f"no breast found: the main bright piece covers {piece.mean():.1%} of the "
            f"film (grey levels {film.min()} to {film.max()}), expected 3 to 98 %"
        )
    breast = fill_holes(density(piece, 2) > 0)
    # The skin may be darker than the threshold, but behind the chest wall there is only padding.
    columns = np.flatnonzero(piece.any(axis=0))
    breast[:, slice(columns[-1] + 1, None) if wall_right else slice(columns[0])] = False
    # Smoothed at half size only: a quarter of the time, and the last step is too small to see.
    half = Image.fromarray(breast.astype(np.uint8) * 255).resize(
        (width // 2, height // 2), Image.BILINEAR, box=(0, 0, width / cell, height / cell)
    )
    return np.asarray(half.resize((width, height), Image.NEAREST)) > 127


def breast_box(mask, margin, wall_margin, wall_right):
    """Return top, left, height and width of the box round a mask, wider by the margins (px)."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    before, after = (margin, wall_margin) if wall_right else (wall_margin, margin)
    top, left = max(0, int(rows[0]) - margin), max(0, int(columns[0]) - before)
    bottom = min(mask.shape[0], int(rows[-1]) + 1 + margin)
    right = min(mask.shape[1], int(columns[-1]) + 1 + after)
    return top, left, bottom - top, right - left


# %% Place it on the canvas: crop, mirror right breasts, shrink without distortion, pad with black
class Geometry(NamedTuple):
    """How a film came to its canvas; enough to carry a point either way."""

    film_height: int  # px
    film_width: int  # px
    crop_top: int  # px of the film
    crop_left: int  # px of the film
    crop_height: int  # px of the film
    crop_width: int  # px of the film
    mirrored: bool  # right breasts are, so that the chest wall is always on the left
    scale: float  # canvas px for one film px


def film_to_canvas(x, y, geometry):
    """Carry film pixels (x from the left, y from the top; numbers or arrays) to canvas pixels."""
    x = x - geometry.crop_left
    if geometry.mirrored:
        x = geometry.crop_width - 1 - x
    y = y - geometry.crop_top
    return (x + 0.5) * geometry.scale - 0.5, (y + 0.5) * geometry.scale - 0.5


def canvas_to_film(x, y, geometry):
    """Carry canvas pixels back to film pixels, the inverse of `film_to_canvas`."""
    x, y = (x + 0.5) / geometry.scale - 0.5, (y + 0.5) / geometry.scale - 0.5
    if geometry.mirrored:
        x = geometry.crop_width - 1 - x
    return x + geometry.crop_left, y + geometry.crop_top


def place_film(film, laterality, size):
    """Cut the breast out of a film and place it on a black canvas.

    Parameters
    ----------
    film : ndarray of uint8, shape (height, width)
        The film.
    laterality : str
        "right", "left", or "" to judge it from where the light is.
    size : tuple of int
        Canvas height and width, px.

    Returns
    -------
    canvas : ndarray of uint8, shape `size`
        Chest wall on the left, breast at the top left corner.
    geometry : Geometry
        The way here and back.
    mask : ndarray of bool, shape (height, width)
        The breast on the film.

    Raises
    ------
    ValueError
        If the film has no breast that can be found.
    """
    laterality = laterality or guess_laterality(film)
    mask = find_breast(film, laterality)
    mirrored = laterality == "right"
    # Some circles of MIAS reach up to 45 px of 1024 behind the chest wall (mdb110).
    margins = round(max(film.shape) / 128), round(max(film.shape) * 0.047)
    top, left, height, width = breast_box(mask, *margins, wall_right=mirrored)
    scale = min(size[0] / height, size[1] / width)
    box = (slice(top, top + height), slice(left, left + width))
    crop = film[box] * mask[box]
    if mirrored:
        crop = crop[:, ::-1]
    # whole canvas pixels: at most half of one is lost, and points keep the exact scale
    shape = [min(max(round(side * scale), 1), most) for side, most in zip(crop.shape, size)]
    extent = (0, 0, min(shape[1] / scale, width), min(shape[0] / scale, height))
    small = Image.fromarray(crop).resize(shape[::-1], Image.BILINEAR, box=extent)
    canvas = np.zeros(size, np.uint8)
    canvas[: shape[0], : shape[1]] = small
    geometry = Geometry(*film.shape, top, left, height, width, mirrored, scale)
    return canvas, geometry, mask


def plot_crops(labels, folder, size=(512, 288)):
    """Draw two films of each class before and after the crop, the breast outlined."""
    paths = {path.stem.lower(): path for path in film_paths(folder)}
    examples = labels[labels["image"].str.lower().isin(paths)]
    examples = examples.groupby("label").head(2).sort_values("label")
    figure, axes = plt.subplots(2, 6, figsize=(9, 5), layout="constrained", height_ratios=(2, 3))
    for (before, after), row in zip(axes.T, examples.itertuples()):
        try:
            film = common.read_film(paths[row.image.lower()])
            canvas, _, mask = place_film(film, row.laterality, size)
        except (UserError, ValueError, OSError):
            continue  # named below, where all films are checked
        before.imshow(film, cmap="gray", vmin=0, vmax=255)
        before.contour(mask, levels=[0.5], colors="#56B4E9", linewidths=1)
        before.set_title(f"{row.image}\n{row.label_name}", fontsize=9)
        after.imshow(canvas, cmap="gray", vmin=0, vmax=255)
    for axis in axes.flat:
        axis.axis("off")
    figure.suptitle("Before (breast outlined) and after the crop; right breasts are mirrored")
    return figure


if __name__ == "__main__":
    figure = plot_crops(labels, folder)
    common.show(figure, common.data_dir(source) / "figures" / "crops.png")


# %% Check every film: a digest of its pixels tells a wrong, damaged or renamed one
# The first 6 hex digits of the sha256 of the pixels of mdb001 to mdb322, one after the other
DIGESTS = """
e3442d7245405072bbb07cd3f345851fd2a611f35c0103ea240d3e6c2a95858f9c16a2a3af63c91758f88a3a725d257f
e853fc1242903f204994d21270739d9f9db283c83fb7353a598d216fc3b13c6eb21f4db69a6bce57d2b059029e36f012
d90bdfe3436a1313c55a8ca6952544ef33bf037155fe94489196efaf640305e5cc24b56971a62bfdc5f0b9bb4901bdb8
1609ea1847ed979b918aba683bc25dc9c7b2a9d2a84f50b52e32901c7e7da2e5fba239d9a361b3d445663c51ca20d432
b7abbb01448956c3498e64c8909d45f8c6a1e6041d924fcb9c2d3eede836be2965d30befdcdad4fdd85bd0b6ad5ce809
f88eb06c9bf3e502e050406c9892135c1e86c908d3102f92096f25d505349dca2b04900ed064bbb8d77c81638406d79d
791d658c21e4ebce618c94b8d31de5eccadd0aaaa1fb5e36e6d5d705d187176e19b37f937a277e158ca80d49c83df4e9
d64113bf56b1d3ad4338c0ed008ce74327aafe0ba302e534a3a2f5dba95be243337a00176bcd5c2f4de5180d7b0555e4
102a54239a07ac545c8e26c712a98684054b8beb6b264abc94c5ada7f079b74d49d7a949ffa9439b261b4ba018acc440
8b7c4ceebb65ab85b3eb982c4855e9e9e8aacf186fafd2578afeb84c35ac799030f24cb58845ea23ea8f93a21511f79b
a343bba0547fc5e7311784096a041dd9de74081c7b1138c9fcb79b68352e2e8ae95c17eb4db484a24e068f4ec73687a4
7569ae7c17eb861c61cea5ef33c10cd89e0429ba2dab25c9e4edca10533b6607463d49b3643b34842fbdea07944e5aac
2cba7d86ab757f05aeb0a96e9b9c86b5deb234b409fcfa4502702a32afe3d393a856a61c6200f096b64aa80a4d7a58a8
db25d1f508a3f0f9cba71d18517ebe73f813ab59e1f32ff04c8a13044dea9ff133d89f9a28e81e221401537f4766e67f
0b4c005bf980abdd1d24539f6e342d891704f5322e375c4245599ff47b5c1f319ad5124538c5e5d2357a57e1c510f846
86ce25c726b1c52c07b06de25a000a8c37be6b55616013886a5b0273701a3c61888d44744b8514f352db9f84f634d631
a3abaa4b34d394e4d053e48cbda45d32f98866c79c23d544a1f473e902f54b5042c4b664db928ae7dafce77da719f09e
9cb98ceb922c4f2150eb36024950b25aec77b0509ffe96cbdf97305456ac0970e32eb0674aade8626761d584fa95acd6
02f83db50466f5d1039c4acb4f62013881bb6841a5991e98607eb831a3b5e027c2ffdf1a88bf05fcda04c9e621853d24
c10cd6e87510da0ecc4306ba0a87e925f358ec987ad72cd0748d9f598e9f5f675db147e7de141cfae8b8a4907d6faf1d
d6680176ea2d
"""


def known_digests():
    """Return the distributed films' digests as {digest: image}."""
    digits = "".join(DIGESTS.split())
    return {digits[6 * n : 6 * n + 6]: f"mdb{n + 1:03d}" for n in range(len(digits) // 6)}


def check_films(source, films, labels, allow_partial):
    """Compare the films with the labels and, for MIAS, with the database as distributed.

    Parameters
    ----------
    source : str
        "mias", "phantom" or "own".
    films : DataFrame
        image, digest, problem ("" if the film can be used).
    labels : DataFrame
        One row a film.
    allow_partial : bool
        Warn of films that are missing or unusable instead of ending.

    Returns
    -------
    usable : ndarray of bool
        One value a film.

    Raises
    ------
    UserError
        If two names hold the same pixels, or one the pixels of another MIAS film; and, unless
        `allow_partial`, if films are missing or unusable. Every film is named.
    """
    twice = films[films["digest"].duplicated(keep=False) & (films["problem"] == "")]
    if len(twice):
        raise UserError(f"the same pixels under several names: {common.listing(twice['image'])}")
    if source == "mias":
        known = known_digests()
        belongs = films["digest"].str[:6].map(known)
        renamed = films[belongs.notna() & (belongs != films["image"])]
        if len(renamed):
            pairs = [f"{a} holds {b}" for a, b in zip(renamed["image"], belongs[renamed.index])]
            raise UserError(f"renamed films, their labels would be wrong: {common.listing(pairs)}")
        other = films[belongs.isna() & (films["problem"] == "")]
        if len(other):
            common.warn(
                f"{len(other)} films differ from the distributed database, so results cannot be "
                f"compared with others': {common.listing(other['image'])}"
            )
    expected = set(labels["image"]) | (set(known_digests().values()) if source == "mias" else set())
    missing = sorted(expected - set(films["image"]))
    broken = films[films["problem"] != ""]
    problems = [f"{len(missing)} films are missing: {common.listing(missing)}"] if missing else []
    problems += [f"{row.image}: {row.problem}" for row in broken.itertuples()]
    if problems and not allow_partial:
        raise UserError("; ".join(problems) + ". Get them again, or use --allow-partial")
    if problems:
        common.warn("left out, as --allow-partial says: " + "; ".join(problems))
    if len(broken) == len(films):
        raise UserError("no film is left to work with")
    return (films["problem"] == "").to_numpy()


# %% Split patients, never films: no patient is on both sides
def split_patients(labels, folds, seed):
    """Deal the patients into folds, stratified by the worse label of their films.

    Parameters
    ----------
    labels : DataFrame
        image, patient, label.
    folds : int
        How many parts.
    seed : int
        Of the shuffle.

    Returns
    -------
    splits : DataFrame
        image, patient, fold (0 to folds - 1).

    Raises
    ------
    UserError
        If a class has fewer patients than there are folds.
    """
    worse = worse_label(labels)
    counts = worse.groupby(labels["patient"]).first().value_counts()
    if folds < 2 or len(counts) < 2 or counts.min() < folds:
        found = ", ".join(f"{CLASS_NAMES[code]} {n}" for code, n in counts.sort_index().items())
        raise UserError(
            f"{folds} folds need at least {max(folds, 2)} patients of two classes or more; found "
            f"patients by worse label: {found}. Choose fewer --folds or add films"
        )
    splits = labels[["image", "patient"]].assign(fold=-1)
    dealer = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=seed)
    for fold, (_, held_out) in enumerate(dealer.split(labels, worse, labels["patient"])):
        splits.loc[splits.index[held_out], "fold"] = fold
    return splits


def worse_label(labels):
    """Return for every film the worst label of its patient: malignant, benign, then normal."""
    severity = labels["label"].map({NORMAL: 0, BENIGN: 1, MALIGNANT: 2})
    worst = severity.groupby(labels["patient"]).transform("max")
    return worst.map({0: NORMAL, 1: BENIGN, 2: MALIGNANT})


if __name__ == "__main__":
    splits = split_patients(labels, settings.folds, settings.seed)
    common.table(splits.groupby("fold")["patient"].agg(["nunique", "size"]), "patients and films")


# %% Prepare: all films on one canvas array, with all that the later steps need beside it
FILES = ("films.npy", "films.csv", "labels.csv", "findings.csv", "splits.csv", "prepared.json")
VERSION = 2  # of the preprocessing; a new one makes every array again


class Prepared(NamedTuple):
    """What this step leaves for the next ones."""

    source: str  # "mias", "phantom" or "own"
    folder: Path  # data/<source>
    films: np.ndarray  # uint8 memory map, (n_films, height, width)
    table: pd.DataFrame  # films.csv: image, file, digest, the geometry; same order as `films`
    labels: pd.DataFrame  # labels.csv, same order as `films`
    findings: pd.DataFrame  # findings.csv, in film and in canvas pixels
    splits: pd.DataFrame  # splits.csv: image, patient, fold
    fingerprint: str  # of pixels, labels and findings
    split_seed: int  # that dealt the patients into folds


def canvas_size(text, source):
    """Read a size such as "512x288" as (height, width) in px."""
    text = {"auto": "160x90" if source == "phantom" else "512x288"}.get(text, text)
    match = re.fullmatch(r"(\d+)x(\d+)", text.strip().lower())
    size = (int(match[1]), int(match[2])) if match else (0, 0)
    if not all(64 <= side <= 4096 for side in size):
        raise UserError(f"--size {text} is no canvas; expected HEIGHTxWIDTH, 64 to 4096 px each")
    return size


def prepare_film(path, image, laterality, size, source):
    """Read, check and place one film; one that cannot be used comes back as a problem.

    Returns
    -------
    canvas : ndarray of uint8, shape `size`
        Black if there is a problem.
    row : dict
        A row of films.csv, with problem.
    """
    row = {"image": image, "file": str(path.resolve()), "digest": "", "problem": ""}
    try:
        film = common.read_film(path)
        row["digest"] = hashlib.sha256(np.ascontiguousarray(film)).hexdigest()[:16]
        if source == "mias" and film.shape != (1024, 1024):
            raise ValueError(f"{film.shape[0]} x {film.shape[1]} px, expected 1024 x 1024")
        canvas, geometry, _ = place_film(film, laterality, size)
        row.update(geometry._asdict())
        return canvas, row
    except (UserError, ValueError, OSError) as error:
        row["problem"] = common.explain(error) if isinstance(error, OSError) else str(error)
        return np.zeros(size, np.uint8), row


def prepare_films(paths, labels, size, source, file):
    """Place films, {image: path}, in a new .npy file; return its map and films.csv with problem."""
    with open(file, "wb") as empty:  # not a file with holes: on a full disk its map would crash
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), *size)}
        np.lib.format.write_array_header_1_0(empty, header)
        for _ in paths:
            empty.write(bytes(size[0] * size[1]))
    films = np.load(file, mmap_mode="r+")
    sides = labels.set_index("image")["laterality"]

    def work(item):
        number, (image, path) = item
        films[number], row = prepare_film(path, image, sides[image], size, source)
        return row

    rows = common.in_threads(work, list(enumerate(paths.items())), "preparing films")
    films.flush()
    return films, pd.DataFrame(rows)


@common.in_words()
def prepare(settings):
    """Prepare a database for training: the whole of this script in one call.

    Parameters
    ----------
    settings : Settings
        See the settings cell.

    Returns
    -------
    prepared : Prepared
        Read from data/<source>; a second call with the same inputs and settings reuses it.

    Raises
    ------
    UserError
        If films, labels or settings cannot be used; what was prepared before stays.
    """
    with common.locked(common.data_dir()):
        source, folder = find_films(settings)
        target = common.data_dir(source)
        size = canvas_size(settings.size, source)
        paths = film_paths(folder)
        inputs = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
        labels, findings = read_labels(source, folder, settings)
        rows = [labels.to_csv(), findings.to_csv(), settings.allow_partial]
        key = common.fingerprint(VERSION, source, size, inputs, rows)
        state, stamp = target / "prepared.json", {}
        with contextlib.suppress(UserError):  # nothing is there yet, or it is not whole
            stamp = load_prepared(source) and common.read_json(state)
        if stamp.get("key") == key:
            print(f"{target} is up to date: {len(paths)} films on {size[0]} x {size[1]} px")
            splits = _split(target, settings)
            if not splits.equals(_read_table(target / "splits.csv")):
                common.discard(state)  # as below
                common.write_csv(splits, target / "splits.csv")
            stamp["split_seed"] = settings.seed
            common.write_json(stamp, state)  # newer, too: steps 2 to 5 take the last prepared
        else:
            new = target / ".new"
            common.discard(new)  # of a run that was killed
            with common.in_words(target):
                try:
                    new.mkdir(parents=True)
                    _build(source, paths, labels, findings, size, settings, new, key)
                    common.discard(state)  # what follows is not whole until the end
                    for name in FILES:
                        os.replace(new / name, target / name)
                finally:
                    common.discard(new)
        prepared = load_prepared(source)  # under the lock, before the next process changes it
    if source == "phantom":
        common.banner("SYNTHETIC PHANTOMS: figures from here on say nothing about mammograms.")
    return prepared


def _build(source, paths, labels, findings, size, settings, new, key):
    """Write all that is prepared into a new folder; names match whatever their case."""
    images = dict(zip(labels["image"].str.lower(), labels["image"]))
    extra = [path.stem for path in paths if path.stem.lower() not in images]
    if extra:
        common.warn(f"{len(extra)} films have no label and are left out: {common.listing(extra)}")
    found = [path for path in paths if path.stem.lower() in images]
    paths = {images[path.stem.lower()]: path for path in found}
    several = [path.stem for path in found if path not in paths.values()]
    if several:
        raise UserError(f"several files for {common.listing(several)}")
    if not paths:
        raise UserError(f"none of the labelled films was found; expected {labels['image'][0]}, ...")
    films, table = prepare_films(paths, labels, size, source, new / "films.npy")
    usable = check_films(source, table, labels, settings.allow_partial)
    if not usable.all():  # once more, without the ones that have just been named
        films = None  # Windows writes to no file that is mapped
        paths = {image: paths[image] for image in table["image"][usable]}
        films, table = prepare_films(paths, labels, size, source, new / "films.npy")
    labels = labels.set_index("image").loc[table["image"]].reset_index()
    findings = findings[findings["image"].isin(table["image"])].reset_index(drop=True)
    findings = place_findings(findings, table, films)
    common.write_csv(table.drop(columns="problem"), new / "films.csv")
    common.write_csv(labels, new / "labels.csv")
    common.write_csv(findings, new / "findings.csv")
    common.write_csv(_split(new, settings), new / "splits.csv")
    pixels = hashlib.sha256(films).hexdigest()
    content = common.fingerprint(pixels, labels.to_csv(), findings.round(3).to_csv())
    state = {
        "key": key,
        "source": source,
        "size": list(size),
        "films": len(paths),
        "fingerprint": content,
        "split_seed": settings.seed,
    }
    common.write_json(state, new / "prepared.json")


def _split(folder, settings):
    """Split the patients as labels.csv names them, for their order decides the folds."""
    return split_patients(_read_table(folder / "labels.csv"), settings.folds, settings.seed)


def place_findings(findings, table, films):
    """Add canvas_x, canvas_y and canvas_radius (px), and empty what is unusable.

    A circle whose centre lies on background is unusable (mdb212 and mdb214 of MIAS).

    Raises
    ------
    UserError
        If a usable circle, as far as it lies on the film, is not all inside the crop.
    """
    findings = findings.copy()
    canvas = np.full((len(findings), 3), np.nan)
    number = {image: n for n, image in enumerate(table["image"])}
    for row in findings[findings["radius"].notna()].itertuples():
        n = number[row.image]
        g = Geometry(*table.loc[n, list(Geometry._fields)])
        x, y = film_to_canvas(row.x, row.y, g)
        inside = 0 <= x < films.shape[2] and 0 <= y < films.shape[1]
        if not inside or films[n, int(y), int(x)] <= tissue_threshold(films[n]):
            common.warn(f"{row.image}: the circle's centre lies off the breast; not used")
            findings.loc[row.Index, ["x", "y", "radius"]] = np.nan
            continue
        centre, last = np.array([row.x, row.y]), (g.film_width - 1, g.film_height - 1)
        start, end = ((centre + side * row.radius).clip(0, last) for side in (-1, 1))
        crop = np.array([g.crop_left, g.crop_top])
        if (start < crop).any() or (end > crop + [g.crop_width - 1, g.crop_height - 1]).any():
            raise UserError(f"{row.image}: the crop cuts its circle at {row.x}, {row.y}")
        canvas[row.Index] = x, y, row.radius * g.scale
    findings[["canvas_x", "canvas_y", "canvas_radius"]] = canvas
    return findings


def load_prepared(source):
    """Open what was prepared.

    Parameters
    ----------
    source : str
        "mias", "phantom" or "own".

    Returns
    -------
    prepared : Prepared
        The films are a read-only memory map: only what is looked at is read.
    """
    folder = common.data_dir(source)
    state = common.read_json(folder / "prepared.json")
    try:
        films = np.load(folder / "films.npy", mmap_mode="r")
        names = ("films.csv", "labels.csv", "findings.csv", "splits.csv")
        table, labels, findings, splits = (_read_table(folder / name) for name in names)
        if not len(films) == len(table) == len(labels) == len(splits):
            raise ValueError("films and tables differ in length")
        stamp = state["fingerprint"], state["split_seed"]
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise UserError(f"{folder} is not whole ({error}); run 01_prepare_data.py again") from None
    return Prepared(source, folder, films, table, labels, findings, splits, *stamp)


def _read_table(path):
    """Read a CSV of ours; names stay text, even 001 and NA."""
    text = dict.fromkeys(("image", "patient", "digest"), str)
    numbers = ("x", "y", "radius", "canvas_x", "canvas_y", "canvas_radius")
    empty = dict.fromkeys(numbers, [""])
    return pd.read_csv(path, dtype=text, keep_default_na=False, na_values=empty)


if __name__ == "__main__":
    prepared = prepare(settings)
    labels, findings, splits = prepared.labels, prepared.findings, prepared.splits


# %% Look: how many films of each class and tissue, findings of each type, classes in each fold
def plot_counts(labels, findings, fold_mix):
    """Draw the films by tissue and class, the findings by type, and the class mix of the folds."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.6), layout="constrained")
    order = {"hue": "label_name", "hue_order": CLASS_NAMES, "palette": common.COLOURS}
    sns.countplot(data=labels, x="tissue", ax=axes[0], **order)
    axes[0].set(xlabel="tissue", ylabel="films", title=f"Tissue (n = {len(labels)} films)")
    axes[0].legend(title="", fontsize=8)
    if len(findings):
        colours = [common.COLOURS["benign"], common.COLOURS["malignant"]]
        order = {"hue": "severity", "hue_order": ["B", "M"], "palette": colours}
        sns.countplot(data=findings, x="type", ax=axes[1], **order)
    axes[1].set(xlabel="type", ylabel="findings", title=f"Findings (n = {len(findings)})")
    axes[1].tick_params(axis="x", labelsize=8)
    fold_mix.plot.bar(stacked=True, ax=axes[2], color=list(common.COLOURS.values()), legend=False)
    axes[2].set(ylabel="films", title="Class mix of the folds")
    axes[2].tick_params(axis="x", rotation=0)
    return figure


if __name__ == "__main__":
    classes = labels["label_name"].value_counts().reindex(CLASS_NAMES).to_frame("films")
    types = pd.crosstab(findings["type"], findings["severity"])
    fold_mix = pd.crosstab(splits["fold"], labels["label_name"])
    fold_mix = fold_mix.reindex(columns=CLASS_NAMES, fill_value=0)
    common.table(classes, f"films per class (n = {len(labels)})")
    common.table(types, f"findings per type, benign and malignant (n = {len(findings)})")
    common.table(fold_mix, "films per class in each fold")
    figure = plot_counts(labels, findings, fold_mix)
    common.show(figure, prepared.folder / "figures" / "counts.png")


# %% Look: films of each class on the canvas, with the radiologists' circles
def plot_films(prepared):
    """Draw seven films of each class, chosen at random, with their circles."""
    labels, findings = prepared.labels, prepared.findings.dropna(subset=["canvas_radius"])
    figure, axes = plt.subplots(3, 7, figsize=(9, 7.4), layout="constrained")
    for label, line in zip((NORMAL, BENIGN, MALIGNANT), axes):
        chosen = labels[labels["label"] == label].sample(frac=1, random_state=0).index
        line[0].set_ylabel(CLASS_NAMES[label])
        for axis, n in zip(line, chosen):
            axis.imshow(prepared.films[n], cmap="gray", vmin=0, vmax=255)
            axis.set_title(labels["image"][n], fontsize=8)
            for c in findings[findings["image"] == labels["image"][n]].itertuples():
                colour = common.COLOURS["malignant" if c.severity == "M" else "benign"]
                centre = (c.canvas_x, c.canvas_y)
                axis.add_patch(plt.Circle(centre, c.canvas_radius, fill=False, color=colour))
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.suptitle(
        f"{prepared.source}: films on the canvas; circles blue benign, orange malignant"
    )
    return figure


if __name__ == "__main__":
    common.show(plot_films(prepared), prepared.folder / "figures" / "films.png")
    print(f"\nprepared {len(labels)} films in {prepared.folder}. Next: python 04_train.py")
