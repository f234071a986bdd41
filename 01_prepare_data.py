"""Step 1: from an archive of mammograms to checked, cropped and split films.

In:  the MIAS database (folder, archive or download), your own films with a labels CSV, or the
     built-in synthetic phantoms.
Out: data/<source>/labels.csv, findings.csv, films.npy, films.csv and splits.csv.

    python 01_prepare_data.py                                   finds or downloads MIAS
    python 01_prepare_data.py --archive all-mias.tar.gz         an archive that you have
    python 01_prepare_data.py --source phantom                  synthetic films, no download
    python 01_prepare_data.py --images scans --labels mine.csv  your own films
    python 01_prepare_data.py --images scans                    in folders benign, normal, malignant
"""

# %% Imports: this script finds its own folder first, whatever the working directory is
import contextlib
import hashlib
import http.client
import io
import itertools
import os
import re
import shutil
import socket
import sys
import tarfile
import tempfile
import unicodedata
import warnings
import zipfile
import zlib
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
from sklearn.neighbors import NearestNeighbors
from torchvision.datasets.utils import download_url

import common
from common import BENIGN, CLASS_NAMES, MALIGNANT, NORMAL, SEVERITY, UserError


# %% Settings: change a value and run the cells below again; each name is a command-line flag
@dataclass
class Settings(common.SeedSettings):
    """What to prepare, and how."""

    script = "01_prepare_data.py"
    source: str = "auto"  # mias, phantom, own; auto: MIAS if it can be had
    images: str = ""  # folder with films, in place of an archive or a download
    archive: str = ""  # all-mias.tar.gz, .tar or .zip, with any folders inside
    labels: str = ""  # CSV of your own films: image,label[,patient][,laterality]
    findings: str = ""  # CSV of their findings: image, and x,y,radius or x0,y0,x1,y1 in film px
    classes: str = ""  # what your labels mean, such as "0=normal,1=malignant"
    crop: Literal["breast", "none"] = "breast"  # none: whole images, unmirrored; ultrasound, MRI
    size: str = "auto"  # canvas, height x width; auto: MIAS 1024x576, own 512x288, phantoms 160x90
    folds: int = 5  # parts of the cross-validation; each is the test set once
    patients: int = 60  # phantom patients, two films each
    phantom_size: int = 1024  # px, sides of a phantom film; MIAS has 1024
    allow_partial: bool = False  # go on without films that are missing or broken


if __name__ == "__main__":
    settings = common.command_line(Settings, __doc__)


# %% Folders that are filled whole or not at all
# Films are unpacked or drawn once into data/<source>/raw. A killed run leaves no half of a folder
# there, and a stamp in the folder tells whether it holds what is wanted now.
def filled(folder, stamp, fill):
    """Return a folder after `fill(temporary)`; one with the same stamp is kept as it is."""
    mark = folder / ".stamp.json"
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


# %% Archives: what a tar or a zip holds
# One loop for tar and zip: the name, the size, and how to open each member. What is no regular file
# (a link, a device) cannot be opened, and is refused below.
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


# %% Unpack: flat, and only what is a film or a text
# An archive from the internet may lead outside of its folder, or unpack to more than the disk
# holds. Films and texts are written under their base names, other files are skipped; links and
# names with ".." are refused.
def unpack(archive, folder):
    """Write the films and texts of an archive, flat; ValueError says what is not allowed.

    More than 1 GiB and more than 30 times the archive's own size is taken for a bomb.
    """
    limit = max(1 << 30, 30 * archive.stat().st_size)
    for name, length, stream in members(archive):
        if ".." in Path(name).parts or name.startswith(("/", "\\")) or stream is None:
            raise ValueError(f"it has a member that is not allowed: {name!r}")
        limit -= length
        if limit < 0:
            raise ValueError("it unpacks to far more than its size")
        path = folder / Path(name).name
        if path.name.startswith(".") or path.suffix.lower() not in (*common.FILM_SUFFIXES, ".txt"):
            continue  # macOS adds ._mdb001.pgm
        if path.exists():
            raise ValueError(f"it holds {path.name} twice; unpack it, and name that with --images")
        with open(path, "wb") as file, stream() as data:
            shutil.copyfileobj(data, file)
    if not common.film_paths(folder):
        raise ValueError("it holds no film")


# %% From an archive, or from the mirror
# An archive is unpacked once; its name, size and time in the folder's stamp tell whether it
# changed. The licence of the database is shown before it is downloaded.
MIRROR = "http://peipa.essex.ac.uk/pix/mias/all-mias.tar.gz"
LICENCE = """The MIAS database is free for research purposes only; it may not be rented, leased or
sold. Publications must cite: J Suckling et al (1994), "The Mammographic Image Analysis Society
Digital Mammogram Database", Exerpta Medica, International Congress Series 1069, pp 375-378."""


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


# %% Download: whole or not at all, with one more try
# The server is asked for the size first, so that a silent one is given up within seconds, and a
# transfer that breaks off is noticed.
def download(url, path):
    """Download a file, once; ConnectionError if it cannot be had."""
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


# %% Phantoms: synthetic films in the format of the database
# They let everything run without the database, and the tests know what is on them. What a network
# learns from them says nothing about mammograms.
def phantom_films(settings):
    """Draw the synthetic films, once for a number of patients and a seed; return their folder."""
    if settings.patients < 12 or not 128 <= settings.phantom_size <= 4096:
        raise UserError("phantoms need at least 12 --patients and a --phantom-size of 128 to 4096")
    stamp = {"patients": settings.patients, "seed": settings.seed, "size": settings.phantom_size}

    def draw(temporary):
        print(f"making phantoms of {settings.patients} patients ...", flush=True)
        common.make_phantoms(temporary, *stamp.values())

    return filled(common.data_dir("phantom") / "raw", stamp, draw)


# %% Find the films: a folder, an archive, an earlier download, the public mirror, or phantoms
# The first of these that there is. Phantoms take over under --source auto only, and say so in a
# banner; whatever is named with a flag and is not there ends with a message.
@common.in_words()
def find_films(settings):
    """Return the source ("mias", "phantom" or "own") and the folder of its films."""
    auto = settings.source == "auto"
    images = Path(settings.images).expanduser() if settings.images else None
    own = settings.labels or images and in_class_folders(images, settings.classes)
    source = ("own" if own else "mias") if auto else settings.source
    if source not in READERS:
        raise UserError(f"--source {source}: expected auto, {', '.join(READERS)}")
    if source == "phantom":
        return source, phantom_films(settings)
    if source == "own" and not own:
        raise UserError(
            "own films need --labels FILE and --images DIR (or --archive FILE), or --images DIR "
            "with a folder for each class: benign, normal, malignant, or as --classes names them"
        )
    raw = common.data_dir(source) / "raw"
    if source != "mias" and not (images or settings.archive):
        raise UserError(f"--source {source} needs --images DIR or --archive FILE")
    if images:
        if not images.is_dir() or not common.film_paths(images):
            # none if it is not there
            found = common.listing(sorted(path.name for path in images.glob("*"))) or "nothing"
            raise UserError(
                f"--images {images} is no folder of films; it holds {found}; read are "
                f"{', '.join(common.FILM_SUFFIXES)}, in folders below it too"
            )
        return source, images
    if settings.archive:
        return source, extract(Path(settings.archive).expanduser(), raw)
    if raw.is_dir() and common.film_paths(raw):
        return source, raw
    if os.environ.get("MIAS_ARCHIVE"):
        return source, extract(Path(os.environ["MIAS_ARCHIVE"]), raw)
    url = os.environ.get("MIAS_URL", MIRROR)
    try:
        return source, extract(download(url, raw.parent / "all-mias.tar.gz"), raw, downloaded=True)
    except ConnectionError as error:
        if not auto:
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


# %% Labels of MIAS: every row of Info.txt is a finding, and the worst one labels the film
# Films 2k-1 and 2k are the right and the left breast of patient k. The file counts y from the
# bottom; here it runs from the top. A row that is not understood is refused, never skipped.
TYPES = ("CALC", "CIRC", "SPIC", "MISC", "ARCH", "ASYM")
ROW = (  # mdb001 G CIRC B 535 425 197, or mdb003 D NORM; fatty, fatty-glandular, dense-glandular
    r"\s*(?P<image>MDB\d+)\s+(?P<tissue>[FGD])\s+(?:NORM|(?P<type>" + "|".join(TYPES) + ")"
    r"\s+(?P<severity>[BM])(?:\s+(?P<x>\d+)\s+(?P<y>\d+)\s+(?P<radius>0*[1-9]\d*)|\s+\*NOTE\s+3\*)?)"
    r"\s*$"
)
LABELS = ["image", "patient", "laterality", "tissue", "label", "label_name", "findings"]
FINDINGS = ["image", "type", "severity", "x", "y", "radius"]


def worst(labels, groups):
    """Return for every row the worst label (a Series of codes) of its group."""
    if not labels.isin(SEVERITY).all():
        found = common.listing(labels[~labels.isin(SEVERITY)].unique())
        raise UserError(f"labels are 0 (benign), 1 (normal) or 2 (malignant); found {found}")
    severity = labels.map(SEVERITY.index)
    return severity.groupby(groups).transform("max").map(dict(enumerate(SEVERITY)))


def parse_info(text, film_height=1024):
    """Return the tables of labels and findings (px, x and y from the top left) of Info.txt."""
    lines = pd.Series(text.lstrip("\ufeff").upper().splitlines(), dtype=object)
    lines.index += 1
    named = lines.str.match(r"\s*MDB\d") & lines.str.match(r"MDB\d").cummax()  # first comes prose
    rows = lines[named].str.extract(ROW)
    problems = [f"line {n}: {lines[n].strip()!r}" for n in rows.index[rows["image"].isna()]]
    rows["image"] = rows["image"].str.lower()
    code = rows["severity"].map({"B": BENIGN, "M": MALIGNANT}).fillna(NORMAL).astype(int)
    for name, part in rows.groupby("image"):
        if part["tissue"].nunique() > 1:
            problems.append(f"{name} has several tissues")
        if part["severity"].isna().any() and part["severity"].notna().any():
            problems.append(f"{name} is called normal in one row and not in another")
    if problems or rows.empty:
        found = "; ".join(problems[:8]) or "no row that starts with mdbNNN"
        raise UserError(
            f"Info.txt cannot be trusted: {found}. Expected rows as 'mdb001 G CIRC B 535 425 197' "
            "or 'mdb003 D NORM'; compare it with the distributed one"
        )
    findings = rows[rows["severity"].notna()].reset_index(drop=True)[FINDINGS]
    findings[["x", "y", "radius"]] = findings[["x", "y", "radius"]].astype(float)
    findings["y"] = film_height - 1 - findings["y"]
    rows = rows.assign(label=worst(code, rows["image"]), findings=rows["severity"].notna())
    count = rows.groupby("image")["findings"].transform("sum")
    labels = rows.assign(findings=count).drop_duplicates("image").sort_values("image")
    number = labels["image"].str[3:].astype(int)
    labels["patient"] = ((number + 1) // 2).astype(str)
    labels["laterality"] = np.where(number % 2, "right", "left")
    labels["label_name"] = labels["label"].map(dict(enumerate(CLASS_NAMES)))
    return labels.reset_index(drop=True)[LABELS], findings


# %% Tables of your own: as Excel, R and text editors write them
# Separators, encodings and line ends differ from program to program. Every row keeps the number of
# its line, blank rows and columns are dropped, and all is text: 007 is no number here.
def read_own_table(path):
    """Return a CSV as a DataFrame of text, stripped; its index is the number of the line."""
    path = Path(path).expanduser()
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    if raw.startswith((b"PK", b"\xd0\xcf\x11\xe0")):
        raise UserError(f"{path} is an Excel workbook; save it as CSV there, and name that")
    try:
        wide = raw.startswith((b"\xff\xfe", b"\xfe\xff"))
        text = raw.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("cp1252", errors="replace")
        common.warn(f"{path} is not UTF-8; read as Windows-1252")
    lines = text.splitlines()
    first = next((n for n, line in enumerate(lines) if line.strip(" \t,;\"'")), 0)
    separator = re.fullmatch(r"\W*sep=(.)\W*", lines[first]) if lines else None
    first += bool(separator)  # Excel's own line
    if not any(lines[first:]):
        raise UserError(f"{path} has no rows")
    comma = separator[1] if separator else max(",;\t|", key=lines[first].count)
    most = max(line.count(comma) for line in lines[first:]) + 1
    try:
        table = pd.read_csv(
            io.StringIO("\n".join(lines[first:])),
            sep=comma,
            names=range(most),  # a row may have more than the header
            dtype=str,
            keep_default_na=False,
            skip_blank_lines=False,
            skipinitialspace=True,
        )
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
    if len(more):
        raise UserError(f"{path} cannot be read: more values than names of columns ("
                        f"{common.listing(names)}) in line {common.listing(more)}")  # fmt: skip
    table = table.loc[(table != "").any(axis=1), named]
    if table.empty:
        raise UserError(f"{path} has no rows below its header ({common.listing(names)})")
    return table


# %% Columns of your own: by their usual names
# A column may be called PatientID, patient or case. What is taken for what, and what is not used,
# is said: a patient column that is overlooked would put films of a patient on both sides.
COLUMNS = [  # in small letters, without blanks and signs; the first that is there is taken
    "image file filename filepath path film imageid imagename imagefile imagefilepath",
    "label labelname class classname pathology diagnosis",
    "patient patientid subject subjectid case caseid id",
    "laterality imagelaterality side breast leftorrightbreast view",
]


def own_columns(table, path, wanted=COLUMNS):
    """Return the columns of a table by the first names of `wanted`, and those that are left."""
    plain = [re.sub(r"[\W_]", "", str(name)).lower() for name in table]
    twice = sorted({str(n) for n, p in zip(table, plain) if p and plain.count(p) > 1})
    if twice:
        raise UserError(f"{path} has a column twice: {common.listing(twice)}")
    columns, found = dict(zip(plain, table)), {}
    for role, *others in map(str.split, wanted):
        name = next((name for name in (role, *others) if name in columns), None)
        if name:
            found[role] = columns[name]
            if name != role:
                print(f'{path}: its column "{columns[name]}" is taken for {role}')
    kept = list(found.values())
    return table[kept].set_axis(list(found), axis=1), table.drop(columns=kept)


# %% Labels of your own: words or numbers, with their meaning shown
# 1 means cancer in many tables and "normal" here, so numbers count only if they are exactly 0, 1
# and 2, or if --classes says what they mean.
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


# %% Labels of your own: a class for every row, and only one
# A second column that names the class, in words, must say the same.
def checked_labels(table, rest, classes, path):
    """Return the labels (codes) of a table; UserError names lines without one, or with two."""
    known = named_classes(classes)
    words = table["label"].str.lower().str.replace(r"\.0+$", "", regex=True)
    numbers = sorted(set(words[words.str.fullmatch(r"[-+]?\d+")]) - set(known))
    if numbers == ["0", "1", "2"]:
        known.update({"0": BENIGN, "1": NORMAL, "2": MALIGNANT})
        common.warn(f"{path}: label 0 is taken for benign, 1 for normal, 2 for malignant")
    elif numbers:
        raise UserError(
            f"{path}: labels are the numbers {common.listing(numbers)}; only exactly 0 (benign), 1 "
            '(normal) and 2 (malignant) are known. Say what yours mean: --classes "0=normal,...", '
            "or write names. BI-RADS numbers are no classes"
        )
    label = words.map(known)
    bad = table.index[label.isna() | (table["image"] == "")]
    if len(bad):
        raise UserError(
            f"{path}: no valid image or label in line {common.listing(bad)} (found "
            f"{common.listing(table.loc[bad, 'label'].unique())}); labels are benign, normal, "
            'malignant or 0, 1, 2; --classes "cancer=malignant,..." says what other words mean'
        )
    for name, words in rest.items():
        words = words[words != ""].str.lower()
        second = words[~words.str.fullmatch(r"[\d.]+")].map(known)
        other = second.index[second.notna() & (second != label[second.index])]
        if len(other):
            raise UserError(f'{path}: the label and the column "{name}" contradict in line '
                            f"{common.listing(other)}")  # fmt: skip
    return label.astype(int)


# %% Patients of your own: however they are written
# P01 and p1 are one patient: taken for two, films of one could lie on both sides of the split. Two
# patients taken for one would do no harm.
def same_patients(names):
    """Return patients' names (Series of text) in one spelling each; say what was merged."""
    small = names.str.lower().str.strip()
    key = small.str.replace(r"\.0+$|[\W_]|(?<!\d)0+(?=\d)", "", regex=True)
    key = key.where(small.str.contains(r"\w"), small)
    missing = small.str.fullmatch(
        r"n/?a|nan|none|null|unknown|\W+|-\d+|anon\w*|de-?identified|removed|x+|[\d.,]+e\+\d+"
    )
    if missing.any():
        common.warn(f"{missing.sum()} films of patient {common.listing(names[missing].unique())} "
                    "count as one patient each; are these missing values, or numbers that a "
                    "spreadsheet rounded?")  # fmt: skip
    merged = names.groupby(key).transform("first")
    several = sorted(set(names[merged != names]) | set(merged[merged != names]))
    if several:
        common.warn(f"taken for the same patients, but written differently: "
                    f"{common.listing(several)}")  # fmt: skip
    return merged


# %% Sides of your own: R, Left, L-MLO
# What else may stand there is refused, since a film on the wrong side is mirrored and cut wrongly.
VIEWS = "cc|mlo|ml|lm|lmo|xccl|xccm|xcc|sio|at|cv|fb|breast"


def sides_of(sides, path="`labels`"):
    """Return "right", "left" or "" for sides such as R, Left or L-MLO, a Series of text."""
    words = sides.str.strip().str.lower()
    found = words.str.extract(rf"^(?!lat$)(r|l|right|left|)(?:[ _-]*(?:{VIEWS}))?$", expand=False)
    if found.isna().any():
        wrong = common.listing(sides[found.isna()].unique())
        raise UserError(f"{path}: laterality {wrong}; expected right, left or nothing")
    return found.replace({"r": "right", "l": "left"})


# %% Names of films: a table's and a folder's need not be written alike
# scans\\P1.L.PNG in a table is scans/P1.L.png in a folder, and so is P1.L: capitals, slashes and a
# known suffix do not count, and either name may begin further up.
def film_name(name):
    """Return a film's name with slashes and without a known suffix; other dots stay."""
    name = unicodedata.normalize("NFC", str(name)).replace("\\", "/").strip("/ ")  # macOS: NFD
    suffix = next((end for end in common.FILM_SUFFIXES if name.lower().endswith(end)), "")
    return name[: len(name) - len(suffix)]


def film_key(name):
    """Return a film's name in small letters, for comparing."""
    return film_name(name).lower()


def tails(key):
    """Return a key and what is left of it without its first folder, its first two, ..."""
    parts = key.split("/")
    return ["/".join(parts[n:]) for n in range(len(parts))]


# %% Match films and labels by their names
# A label without a film and a film without a label are both said; what could be meant in two ways
# is refused.
def match_films(labels, folder, quiet=False):
    """Return {image: path} of the labelled films in a folder, in the order of the files."""
    twice = labels["image"][labels["image"].duplicated()]
    if len(twice):
        raise UserError(f"`labels` has films twice: {common.listing(twice)}")
    wanted = {film_key(image): image for image in labels["image"]}
    longer = {}  # names that begin further up than the folder
    for key, image in wanted.items():
        for tail in tails(key)[1:]:
            longer.setdefault(tail, []).append(image)
    found, extra, several = {}, [], []
    for path in common.film_paths(folder):
        name = film_name(path.relative_to(folder).as_posix())
        key = name.lower()
        named = next(([wanted[tail]] for tail in tails(key) if tail in wanted), longer.get(key, []))
        for image in named:
            found.setdefault(image, []).append(path)
        extra += [] if named else [name]
        several += [path] if len(named) > 1 else []
    several = [image for image, paths in found.items() if len(paths) > 1] + several
    if several:
        raise UserError(f"several films could be meant by {common.listing(several)}; give each "
                        "file a name of its own, or name its folder too")  # fmt: skip
    if not found:
        raise UserError(
            f"none of the labelled films was found in {folder}; expected "
            f"{common.listing(labels['image'], 3) or 'no film'}, found {common.listing(extra, 3)}"
        )
    if not quiet:
        common.warn_of(extra, "films have no label and are left out")
    return {image: paths[0] for image, paths in found.items()}


# %% The name of a folder can be a label
# As it is or as --classes says, at any depth: train/benign/a.png is benign. A part that is called
# train or test means nothing here; the folds take its place.
def class_of_folder(path, known):
    """Return the one word of `known` that a film's folders are called; "" if none or several."""
    words = {part.lower() for part in path.parts[:-1]} & set(known)
    return words.pop() if len(words) == 1 else ""


# %% A folder for each class: labels without any table
# Many databases come so. All films have to lie in such folders, or a misspelt one would be lost.
def in_class_folders(folder, classes=""):
    """Return (image, label) of the films if all lie in folders named as classes, else []."""
    if not folder.is_dir():
        return []
    known = named_classes(classes)
    paths = [path.relative_to(folder) for path in common.film_paths(folder)]
    found = [(film_name(path.as_posix()), class_of_folder(path, known)) for path in paths]
    unnamed = [image for image, word in found if not word]
    if unnamed and len(unnamed) < len(found):
        common.warn(
            f"{folder}: some films lie in folders called as classes, but not "
            f"{common.listing(unnamed, 3)}; --classes says what other names mean"
        )
    return [] if unnamed else found


# %% What the files say themselves: a table may contradict it
# A label, a patient or a side stands in a table, but also in the names of folders and in DICOM
# headers. Where they differ one of them is wrong; which one cannot be known, so it is said.
def say_contradictions(labels, paths, headers, folder, classes, path):
    """Warn of films whose folder or DICOM header says another thing than their row of labels.

    `paths` is {image: file}, `headers` a DataFrame by image with patient and laterality.
    """
    known, rows = named_classes(classes), labels.set_index("image")
    words = {i: class_of_folder(file.relative_to(folder), known) for i, file in paths.items()}
    wrong = {"the name of their folder": [i for i, word in words.items()
                                          if word and known[word] != rows["label"][i]]}  # fmt: skip
    if len(headers):
        rows = rows.loc[headers.index]
        sides = sides_of(headers["laterality"])
        differ = (sides != "") & (rows["laterality"] != "") & (sides != rows["laterality"])
        patients = rows["patient"].groupby(headers["patient"]).transform("nunique")
        mixed = (headers["patient"] != "") & (patients > 1)
        wrong["the laterality of their headers"] = rows.index[differ]
        wrong["their headers, where they are the same patient's"] = rows.index[mixed]
    for what, images in wrong.items():
        if len(images):
            common.warn(f"{path} contradicts {what}: {common.listing(images)}")


# %% Your own films: a table, or a folder for each class
# Whatever could be meant in two ways is refused, with its line. Without patients the split cannot
# keep a patient's films together, so that is said.
def read_own_labels(path, folder=None, classes=""):
    """Return labels of your own, from a CSV or ("") from folders named as classes."""
    if path:
        table, rest = own_columns(read_own_table(path), path)
        missing = [name for name in ("image", "label") if name not in table]
        if missing:
            found = common.listing([*table, *rest])
            raise UserError(f"{path} lacks the column {' and '.join(missing)}; found {found}")
    else:
        path = folder
        table = pd.DataFrame(in_class_folders(folder, classes), columns=["image", "label"])
        rest = pd.DataFrame()
    label = checked_labels(table, rest, classes, path)
    if len(rest.columns):
        print(f"{path}: not used: {common.listing(rest.columns)}")
    again = table["image"].map(film_key).duplicated()
    if again.any():
        named = common.listing(table["image"][again].unique())
        raise UserError(f"{path} names {named} twice (line {common.listing(table.index[again])}); "
                        "a film has one row, its findings go into --findings FILE")  # fmt: skip
    table["image"] = table["image"].map(film_name)
    paths = match_films(table, folder, quiet=True) if folder else {}
    dicom = {image: file for image, file in paths.items() if file.suffix.lower() == ".dcm"}
    read = {}
    for image, file in dicom.items():
        with contextlib.suppress(UserError):  # a broken film is named later
            read[image] = common.dicom_header(file)
    headers = pd.DataFrame(read).T
    for role in headers:
        own = table.get(role, pd.Series("", table.index))
        values = own.where(own != "", table["image"].map(headers[role]).fillna(""))
        if (values != own).any():
            print(f"{path}: {role} of {(values != own).sum()} films is taken from DICOM headers")
            if role == "patient":
                values = values.where(values != "", table["image"])
            table[role] = values
    if "patient" in table and (table["patient"] == "").any():
        lines = common.listing(table.index[table["patient"] == ""])
        raise UserError(f"{path}: no patient in line {lines}; fill the column or leave it out")
    if "patient" not in table or len(table) > 2 and table["patient"].is_unique:
        what = "all patients are different" if "patient" in table else "no patient column"
        common.warn(
            f"{path}: {what}, so each image counts as its own patient. If some have several films, "
            "name them in a column patient, or films of one land on both sides of the split"
        )
    patient = same_patients(table["patient"]) if "patient" in table else table["image"]
    side = sides_of(table.get("laterality", pd.Series("", table.index)), path)
    labels = table.assign(patient=patient, laterality=side, tissue="", label=label, findings=0)
    labels["label_name"] = labels["label"].map(dict(enumerate(CLASS_NAMES)))
    say_contradictions(labels, paths, headers, folder, classes, path)
    return labels.reset_index(drop=True)[LABELS]


# %% Findings of your own: circles or boxes
# With them the recipe learns where lesions are, as on MIAS. They are given in pixels of the film, y
# from the top; a box becomes the circle round its middle with half its longer side.
def read_own_findings(path, labels, classes=""):
    """Return the findings of a CSV (image and x,y,radius or x0,y0,x1,y1[, severity][, type])."""
    corners = ["x0 xmin left", "y0 ymin top", "x1 xmax right", "y1 ymax bottom"]
    wanted = [COLUMNS[0], "severity pathology", "type", "x", "y", "radius", *corners]
    table, rest = own_columns(read_own_table(path), path, wanted)
    box = "x0" in table
    numbers = ["x0", "y0", "x1", "y1"] if box else ["x", "y", "radius"]
    if not {"image", *numbers} <= set(table):
        raise UserError(f"{path}: expected image, and x, y, radius or the corners x0, y0, x1, y1; "
                        f"found {common.listing([*table, *rest])}")  # fmt: skip
    if len(rest.columns):
        print(f"{path}: not used: {common.listing(rest.columns)}")
    texts = pd.Series(table[numbers].to_numpy().ravel())
    if {",", "."} <= set("".join(texts)):
        raise UserError(f"{path}: numbers with commas and others with points; write 1040 and 12.5")
    thousands = texts[texts.str.fullmatch(r"\d+\.\d{3}")].unique()
    if len(thousands):
        common.warn(f"{path}: points are taken for decimal ones in {common.listing(thousands)}")
    points = table[numbers].replace(r",(?!\d{3}$)", ".", regex=True)  # 1,020 may be a thousand
    table[numbers] = points.apply(pd.to_numeric, errors="coerce")
    film = table["image"].map(film_key).map(dict(zip(labels["image"].map(film_key), labels.index)))
    label = film.map(labels["label"])
    word = table.get("severity", pd.Series("", table.index)).str.lower()
    named = word.map({"b": BENIGN, "m": MALIGNANT, **named_classes(classes)})
    severity = named.where(named != NORMAL).where(word != "", label)
    if box:
        low, high = table[["x0", "y0"]].to_numpy(), table[["x1", "y1"]].to_numpy()
        table["radius"] = np.where((high > low).all(1), (high - low).max(1) / 2, np.nan)
        table[["x", "y"]] = (low + high) / 2
    worse = (severity == MALIGNANT) & (label == BENIGN)
    vague = ~table["radius"].between(1e-9, 1e5) | table[["x", "y"]].isna().any(axis=1)
    for wrong, what in [
        (film.isna(), "a film that has no label"),
        (vague, "no circle or box in numbers such as 1040 and 12.5"),
        ((table[numbers] <= 1).all(axis=1), "shares of the film in place of its pixels"),
        (severity.isna(), "a severity other than benign (B) or malignant (M)"),
        (worse | (label == NORMAL), "a finding that its film's label contradicts"),
    ]:
        if wrong.any():
            raise UserError(f"{path}: {what} in line {common.listing(table.index[wrong])}")
    table["image"] = film.map(labels["image"])
    table["severity"] = severity.map({BENIGN: "B", MALIGNANT: "M"})
    table["type"] = table.get("type", "lesion")
    return table.reset_index(drop=True)[FINDINGS]


# %% Read the labels: filter or correct them below this cell, and that is what is prepared
# A database is one function that returns its labels and findings, and one name in READERS. From
# here on only the tables `labels` and `findings` count, whatever became of them in between.
def read_mias(folder, settings):
    """Read Info.txt; y is turned over at the height of the first film that can be read."""
    info = [path for path in Path(folder).iterdir() if path.name.lower() == "info.txt"]
    if not info:
        raise UserError(
            f"no Info.txt in {folder}; copy the database's there. Films of your own need --labels "
            f"FILE, or folders called {', '.join(CLASS_NAMES)}, or as --classes says"
        )
    height = 1024
    for path in common.film_paths(folder):
        with contextlib.suppress(UserError, OSError):  # a broken film is named later
            height = common.read_film(path, notes=[]).shape[0]
            break
    return parse_info(info[0].read_text(encoding="utf-8", errors="replace"), height)


def read_own(folder, settings):
    """Read the user's own tables, or the names of the folders that the films lie in."""
    labels = read_own_labels(settings.labels, folder, settings.classes)
    if not settings.findings:
        return labels, pd.DataFrame(columns=FINDINGS)
    findings = read_own_findings(settings.findings, labels, settings.classes)
    labels["findings"] = labels["image"].map(findings["image"].value_counts()).fillna(0).astype(int)
    return labels, findings


def stock_of(folder):
    """Return name, bytes, time and a checksum of 4 KiB in the middle of every file below a folder.

    They tell whether one changed; what an archive unpacks may all have one time and size.
    """
    stock = []
    for path in common.files_below(folder):
        status = path.stat()
        with open(path, "rb") as file:
            file.seek(status.st_size // 2)
            middle = zlib.crc32(file.read(4096))
        stock.append((path.relative_to(folder), status.st_size, status.st_mtime_ns, middle))
    return stock


READERS = {"mias": read_mias, "phantom": read_mias, "own": read_own}

if __name__ == "__main__":
    common.check_settings(settings, "01_prepare_data.py")
    with common.locked(common.data_dir()):  # two processes must not unpack into the same folder
        source, folder = find_films(settings)
        with common.in_words(folder):
            labels, findings = READERS[source](folder, settings)
            stock, database = stock_of(folder), (labels.copy(), findings.copy())
    print(f"{source}: {len(common.film_paths(folder))} films in {folder}")
    common.table(labels["label_name"].value_counts().to_frame("films"), "films per class")
    absent = sorted(set(CLASS_NAMES) - set(labels["label_name"]))
    if absent:
        print(f"No film is {' or '.join(absent)}: what follows knows the other classes only.")
    common.table(findings.head(8), "the first findings; x and y in px from the top left")


# %% Which breast: the chest wall lies at the film's brighter side
# A guess, for films whose laterality is not known: light is where tissue is. It fails where the
# breast fills the whole film (2 of 322).
def guess_laterality(film):
    """Return the brighter half, "right" or "left"; wrong if the breast fills the film (mdb151)."""
    columns = film.mean(axis=0)  # (width,)
    middle = len(columns) // 2
    return "right" if columns[-middle:].sum() > columns[:middle].sum() else "left"


# %% Tissue and background: the grey level that parts them
# Every film has its own grey levels, so the threshold is computed for each: background is nearly
# black, tissue is not, and the skin line lies between.
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


# %% Masks: the connected component of a seed
# Which bright pixels belong to the breast and which to a label? Those that are connected to it.
# Each sweep spreads the seed along the columns up to the next wall, in four directions, until
# nothing changes: two or three rounds, where pixel by pixel it would be a hundred.
def connected(seed, mask):
    """Return the pixels of a bool mask that are joined to a bool seed, through 4 neighbours."""
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


# %% Masks: their holes, and PIL's filters
# Dark spots inside a breast are breast. PIL's MinFilter and MaxFilter shave a rim off a mask and
# put one on, which is how narrow bridges to labels are cut below.
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


# %% Find the breast: labels, tape and frames go, the breast and the muscle stay
# Labels, tape and frames are as bright as the breast. What tells them apart is where they lie and
# how full they are: the breast is the fullest bright piece near the chest wall. On a coarse film,
# narrow bridges to labels are cut, the main piece is kept, its holes are filled, and a rim is
# added because the skin is nearly black.
def find_breast(film, laterality):
    """Return the breast with 1.5 % of the film's size round it, bool (height, width).

    `laterality`, "right" or "left", names the film's edge that the chest wall lies against.
    ValueError if no single piece brighter than the film covers 3 to 98 % of it.
    """
    height, width = film.shape
    cell = max(1, round(max(film.shape) / 128))
    coarse = np.asarray(Image.fromarray(film).reduce(cell))  # (about 128, about 128)
    bright = coarse > tissue_threshold(coarse)
    # Two cells off every rim break the bridges to labels and tape, and remove scratches.
    core = filtered(bright, ImageFilter.MinFilter(5)) > 0
    # Labels and frames are narrow and far from the chest wall: the fullest place near it is breast.
    wall_right = laterality == "right"
    nearness = np.linspace(*((0.5, 1) if wall_right else (1, 0.5)), num=coarse.shape[1])
    fullness = filtered(bright, ImageFilter.BoxBlur(14)) * nearness * core
    piece = connected(core & (fullness == fullness.max()), core)
    piece = filtered(piece, ImageFilter.MaxFilter(5)) > 0
    if not 0.03 < piece.mean() < 0.98:
        raise ValueError(
            f"no breast found: the main bright piece covers {piece.mean():.1%} of the "
            f"film (grey levels {film.min()} to {film.max()}), expected 3 to 98 %"
        )
    breast = fill_holes(filtered(piece, ImageFilter.MaxFilter(5)) > 0)
    # The skin may be darker than the threshold, but behind the chest wall there is only padding.
    columns = np.flatnonzero(piece.any(axis=0))
    breast[:, slice(columns[-1] + 1, None) if wall_right else slice(columns[0])] = False
    # Smoothed at half size only: a quarter of the time, and the last step is too small to see.
    half = Image.fromarray(breast.astype(np.uint8) * 255).resize(
        (width // 2, height // 2), Image.BILINEAR, box=(0, 0, width / cell, height / cell)
    )
    return np.asarray(half.resize((width, height), Image.NEAREST)) > 127


# %% From film to canvas: what is kept of each film, to carry circles along
# A radiologist's circle is given in pixels of the film, the network sees the canvas. The Geometry
# of each film carries points from one to the other.
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


# %% Place it on the canvas: crop, mirror right breasts, shrink without distortion, pad with black
# Cropping to the breast about doubles the pixels that show tissue; at one scale in both directions
# a round mass stays round.
def place_film(film, laterality, size, crop="breast"):
    """Place the breast of a film (uint8) on a black canvas of `size` (height, width), px.

    Returns canvas (uint8, chest wall on the left, breast at the top left corner), Geometry and the
    mask on the film (bool). `laterality` "" is guessed. ValueError if there is no breast. With
    `crop` "none" the film is placed whole and unmirrored.
    """
    laterality = laterality or guess_laterality(film)
    mirrored = laterality == "right" and crop == "breast"
    mask = find_breast(film, laterality) if crop == "breast" else np.ones(film.shape, bool)
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


# %% Look: two films of each class before and after the crop
# Is the outline on the skin, is nothing of the breast cut off, is the label in the corner gone? A
# look at six films shows more than any number.
if __name__ == "__main__":
    common.check_settings(settings, "01_prepare_data.py")
    examples = labels.groupby("label").head(2).sort_values("label")
    figure, axes = plt.subplots(2, 6, figsize=(9, 5), layout="constrained", height_ratios=(2, 3))
    file_of = match_films(examples, folder, quiet=True)
    for (above, below), row in zip(axes.T, examples.itertuples()):
        with contextlib.suppress(UserError, ValueError, OSError, KeyError):  # named further down
            film = common.read_film(file_of[row.image], notes=[])
            canvas, _, mask = place_film(film, row.laterality, (512, 288), settings.crop)
            above.imshow(film, cmap="gray", vmin=0, vmax=255)
            above.contour(mask, levels=[0.5], colors="#56B4E9", linewidths=1)
            above.set_title(f"{row.image}\n{row.label_name}", fontsize=9)
            below.imshow(canvas, cmap="gray", vmin=0, vmax=255)
    for axis in axes.flat:
        axis.axis("off")
    figure.suptitle("Before (breast outlined) and after the crop; right breasts are mirrored")
    common.show(figure, common.data_dir(source) / "figures" / "crops.png")


# %% The size of the canvas
# 1024 x 576 px has the shape of a cropped breast (about 1 : 2) and all that the films of MIAS have;
# step 4 sees it reduced by two, and windows of it. 512x288 takes a third of the time and leaves the
# median lesion 41 px wide; at 224 px, the usual size, 43 % are smaller than one place of the
# network's map.
def canvas_size(text, source):
    """Read a size such as "512x288" as (height, width) in px."""
    if not isinstance(text, str):
        text = "x".join(map(str, text))  # (512, 288), typed in a cell
    if text == "auto":
        text = {"mias": "1024x576", "phantom": "160x90"}.get(source, "512x288")
    match = re.fullmatch(r"(\d+)x(\d+)", text.strip().lower())
    size = (int(match[1]), int(match[2])) if match else (0, 0)
    if not all(64 <= side <= 4096 for side in size):
        raise UserError(f"--size {text} is no canvas; expected HEIGHTxWIDTH, 64 to 4096 px each")
    return size


if __name__ == "__main__":
    common.check_settings(settings, "01_prepare_data.py")
    size = canvas_size(settings.size, source)
    with common.in_words(folder):
        paths = match_films(labels, folder)
        common.say_left_out(folder)
    print(f"{len(paths)} films for {len(labels)} labels, canvas {size[0]} x {size[1]} px")


# %% What is odd about a film: said, since it can only be guessed
# Does the breast lie where the laterality says, upright, alone? Each bound is so wide that no film
# of MIAS is named, and most of its films that were turned or put side by side are.
def oddities(film, laterality):
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
    own, other = (right, left) if laterality == "right" else (left, right)
    if laterality and other > 1.3 * own:
        said.append(f"called {laterality}, but the breast lies on the other side")
    profile = lit[:, columns[0] : columns[-1] + 1].mean(axis=0)  # how high it is, along the film
    parts = np.array([part.mean() if part.size else 0 for part in np.array_split(profile, 8)])
    middle, ends = parts[3:5].mean(), min(parts[:2].mean(), parts[6:].mean())
    if middle > max(0.2, 2 * parts[[0, 7]].max()) or ends > max(0.25, 2.5 * middle):
        said.append("looks like both breasts on one film")
    turn = -1 if (laterality or guess_laterality(film)) == "right" else 1  # the wall to the left
    wall = np.flatnonzero(lit[:, ::turn].mean(axis=0) > 0.2)[:1].sum()  # behind it lies padding
    sixth = max(height // 6, 1)
    strip = coarse[rows[0] : rows[-1] + 1, ::turn][:, wall : wall + max(width // 6, 1)]
    if strip[-sixth:].mean() > 1.5 * max(strip[:sixth].mean(), 8):
        said.append("looks upside down (the muscle lies at the bottom)")
    return said


def say_oddities(films):
    """Warn of what was noted of films (a DataFrame with image and note), a line for each kind."""
    notes = films.set_index("image")["note"].str.split("; ").explode()
    notes = notes[notes != ""]
    for note, part in notes.groupby(notes.to_numpy()):
        swapped = "called" in note and len(part) > len(films) / 4  # of either side
        hint = "; the column laterality is probably swapped" if swapped else ""
        common.warn_of(part.index, f"of {len(films)} films, {note}{hint}")


# %% What films are like: by this a film is judged to be unlike the others
# Three numbers a film. A film far outside of the middle half of its own set is named; step 4 notes
# the range of all films, and step 5 warns of a film of yours that lies outside of it.
STATISTICS = ["breast", "mean", "sd"]


def film_statistics(canvas):
    """Measure a film on its canvas (uint8); return a dict of what STATISTICS names, 0 to 1.

    How much of the canvas is breast, and the mean and standard deviation of its grey values.
    """
    breast = canvas[canvas > 0] / 255
    values = (breast.size / canvas.size, breast.mean(), breast.std()) if breast.size else (0, 0, 0)
    return dict(zip(STATISTICS, map(float, values)))


def unlike_the_set(statistics):
    """Return which films lie over three spans of the middle half away from it, bool (n,)."""
    low, high = statistics.quantile(0.25), statistics.quantile(0.75)
    span = 3 * (high - low).clip(lower=0.02)
    return ((statistics < low - span) | (statistics > high + span)).any(axis=1).to_numpy()


# %% Grey levels: one scale for the whole set
# Films of more than 8 bits seldom use all of their range. They are divided by the fewest bits that
# hold 99.99 % of the set's pixels, so that the scale hangs on no single pixel.
def bits_of_set(paths):
    """Return the depth of the films of more than 8 bits whose headers tell none, else 8."""

    def count(path):
        """Count a film's pixels by their bits, if they are more than 8."""
        # a broken or a huge one is named when it is placed
        with contextlib.suppress(OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            if path.suffix.lower() != ".dcm":
                with Image.open(path) as image:
                    deep = image.mode.startswith(("I", "F"))
                pixels, depth = common.read_image(path, []) if deep else (None, 8)
                if not depth:
                    return common.bit_lengths(pixels)
        return np.zeros(65)

    return common.bits_in_use(sum(common.in_threads(count, paths, "looking at grey levels")))


# %% An array for all films: it lies in a file without a name
# So memory stays flat, and a killed run leaves nothing.
def scratch_array(shape, folder):
    """Return a writable uint8 array that lies in a nameless file."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(shape[0]):  # no holes: on a full disk a map of them would crash
            file.write(bytes(shape[1] * shape[2]))
        file.flush()
        return np.memmap(file, np.uint8, "r+", shape=shape)


# %% Place every film: on all cores, into that array
# Films that were placed before, from the same files with the same settings, are taken as they are.
VERSION = 4  # of reading films; a new one, or an edited function above, makes every array again


def prepare_film(path, image, laterality, size, source, crop="breast", bits=None):
    """Return one film's canvas and row of films.csv; `problem` says why one cannot be used."""
    row, notes = {"image": image, "file": str(path.resolve()), "digest": "", "problem": ""}, []
    try:
        film = common.read_film(path, bits, notes)
        row["digest"] = hashlib.sha256(np.ascontiguousarray(film)).hexdigest()[:16]
        if source == "mias" and film.shape != (1024, 1024):
            raise ValueError(f"{film.shape[0]} x {film.shape[1]} px, expected 1024 x 1024")
        notes += oddities(film, laterality) if crop == "breast" else []
        canvas, geometry, _ = place_film(film, laterality, size, crop)
        row.update(geometry._asdict(), bits=bits or 8, **film_statistics(canvas))
        return canvas, {**row, "note": "; ".join(notes)}
    except (UserError, ValueError, OSError) as error:
        row["problem"] = common.explain(error) if isinstance(error, OSError) else str(error)
        return np.zeros(size, np.uint8), {**row, "note": ""}


if __name__ == "__main__":
    common.check_settings(settings, "01_prepare_data.py")
    target = common.data_dir(source)
    sides = dict(zip(labels["image"], sides_of(labels["laterality"])))
    files = [(image, sides[image], path.name) for image, path in paths.items()]
    steps = (guess_laterality, tissue_threshold, connected, fill_holes, find_breast, place_film,
             oddities, film_statistics, prepare_film)  # fmt: skip
    code = [(f.__code__.co_code.hex(), f.__code__.co_names,
             [c for c in f.__code__.co_consts if isinstance(c, (int, float, str))])
            for f in steps]  # fmt: skip
    placed_key = common.fingerprint(VERSION, source, size, settings.crop, files, stock, code)
    before, known = {}, None
    with contextlib.suppress(UserError):  # nothing is there yet, or it is not whole
        before = common.read_json(target / "prepared.json")
        known = common.load_prepared(source)
    if known and before.get("placed") == placed_key and len(known.table) == len(paths):
        canvases, film_table = known.films, known.table.assign(problem="")
        if os.name == "nt":  # Windows replaces no file that is mapped
            canvases = np.array(canvases)
        print(f"{len(canvases)} films are up to date")
    else:
        known = None
        with common.in_words(target):
            canvases = scratch_array((len(paths), *size), target)
            bits = bits_of_set(list(paths.values()))

        def place(item):
            """Fill canvas `number` and return its row of films.csv."""
            number, (image, path) = item
            canvases[number], row = prepare_film(
                path, image, sides[image], size, source, settings.crop, bits
            )
            return row

        rows = common.in_threads(place, list(enumerate(paths.items())), "preparing films")
        film_table = pd.DataFrame(rows)  # row n is canvas n
    placed_pixels = hashlib.sha256(canvases).hexdigest()
    say_oddities(film_table)


# %% Check every film: a digest of its pixels tells a wrong, damaged or renamed one
# No film is used under another's name, and none twice: either would leak. Missing and broken films
# end the run, unless --allow-partial says that they may be left out.
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


def check_films(source, films, missing, allow_partial):
    """Return which films can be used, bool (n,); `films` has image, digest and problem.

    UserError if two names hold the same pixels, or one those of another MIAS film, and, unless
    `allow_partial`, if films are missing or unusable. What is left out is named.
    """
    twice = films[films["digest"].duplicated(keep=False) & (films["problem"] == "")]
    if len(twice):
        raise UserError(f"the same pixels under several names: {common.listing(twice['image'])}")
    belongs = films["digest"].str[:6].map(known_digests() if source == "mias" else {})
    renamed = films[belongs.notna() & (belongs != films["image"])]
    if len(renamed):
        pairs = [f"{a} holds {b}" for a, b in zip(renamed["image"], belongs[renamed.index])]
        raise UserError(f"renamed films, their labels would be wrong: {common.listing(pairs)}")
    other = films[belongs.isna() & (films["problem"] == "")]
    if source == "mias" and len(other):
        common.warn(
            f"{len(other)} films differ from the distributed database, so results cannot be "
            f"compared with others': {common.listing(other['image'])}"
        )
    broken = films[films["problem"] != ""]
    problems = [f"{len(missing)} films are missing: {common.listing(missing)}"] if missing else []
    problems += [f"{row.image}: {row.problem}" for row in broken.itertuples()]
    if problems and not allow_partial:
        first = "; ".join(problems[:8]) + (f"; {len(problems) - 8} more" if problems[8:] else "")
        raise UserError(f"{first}. Get them again, or use --allow-partial")
    if problems:
        common.warn("left out, as --allow-partial says: " + "; ".join(problems))
    if len(broken) == len(films):
        raise UserError("no film is left to work with")
    return (films["problem"] == "").to_numpy()


def rows_of(labels, films):
    """Return the labels of those films that have one, in the films' order; R becomes right."""
    rows = films[["image"]].merge(labels, on="image")[list(labels)]
    return rows.assign(laterality=sides_of(rows["laterality"]))


if __name__ == "__main__":
    common.check_settings(settings, "01_prepare_data.py")
    expected = {*labels["image"], *(known_digests().values() if source == "mias" else ())}
    there = {path.stem.lower() for path in common.film_paths(folder)} if source == "mias" else set()
    missing = sorted(expected - {*paths, *there})
    usable = film_table[check_films(source, film_table, missing, settings.allow_partial)]
    odd = usable["image"][unlike_the_set(usable[STATISTICS])]
    common.warn_of(odd, "films are unlike the others of their set")
    common.table(usable[STATISTICS].describe().round(3), f"{len(usable)} films can be used")


# %% Split patients, never films: no patient is on both sides
# Two breasts of one woman are alike; a model that saw one in training knows the other. Patients
# are dealt out by the worse label of their films, so that every part has its share of each class.
# Step 2 takes the validation patients with the same function.
def deal_patients(labels, parts, seed, fewest):
    """Deal patients into parts; return the part (0 to parts - 1) of each film, a Series.

    `labels` has patient and label; UserError if a class has fewer patients than `fewest`.
    """
    worse = worst(labels["label"], labels["patient"])
    counts = worse.groupby(labels["patient"]).first().value_counts()
    if parts < 2 or len(counts) < 2 or counts.min() < fewest or counts.max() < parts:
        found = ", ".join(f"{CLASS_NAMES[code]} {n}" for code, n in counts.sort_index().items())
        raise UserError(
            f"{parts} folds or parts need at least {max(parts, 2)} patients of two classes or "
            f"more; found patients by worse label: {found}. Choose fewer --folds (in step 4 a "
            "larger --validation) or add films"
        )
    part = pd.Series(-1, index=labels.index)
    dealer = StratifiedGroupKFold(n_splits=parts, shuffle=True, random_state=seed)
    with warnings.catch_warnings():  # of classes with fewer patients than parts, judged above
        warnings.simplefilter("ignore", UserWarning)
        for number, (_, held_out) in enumerate(dealer.split(labels, worse, labels["patient"])):
            part.iloc[held_out] = number
    return part


if __name__ == "__main__":
    common.check_settings(settings, "01_prepare_data.py")
    used_labels = rows_of(labels, usable)
    part = deal_patients(used_labels, settings.folds, settings.seed, fewest=settings.folds)
    splits_as_dealt = used_labels[["image", "patient"]].assign(fold=part)
    splits = splits_as_dealt.copy()
    common.table(splits.groupby("fold")["patient"].agg(["nunique", "size"]), "patients and films")


# %% Copies: one film under two patients' names would lie on both sides of the split
# Digests tell equal pixels only. A film that was mirrored, saved as JPEG or made brighter has
# others, but a thumbnail of its canvas hardly changes.
def near_copies(canvases, patients):
    """Return pairs (n, m) of canvases of different patients that show nearly the same.

    Compared are thumbnails of 32 x 18 px, of mean 0 and length 1: films of different patients of
    MIAS lie 0.148 or more apart, a film and its copy as JPEG, or a little brighter, 0.04 or less.
    """
    small = [Image.fromarray(canvas).resize((18, 32), Image.BOX) for canvas in canvases]
    small = np.stack([np.asarray(film, np.float32).ravel() for film in small])
    small -= small.mean(axis=1, keepdims=True)
    small /= np.linalg.norm(small, axis=1, keepdims=True).clip(1e-6)
    near = NearestNeighbors(radius=0.07).fit(small).radius_neighbors_graph()
    return [(n, m) for n, m in zip(*near.nonzero()) if n < m and patients[n] != patients[m]]


if __name__ == "__main__":
    common.check_settings(settings, "01_prepare_data.py")
    rows = usable.index[usable["image"].isin(used_labels["image"])]  # of the canvases
    copies = near_copies((canvases[n] for n in rows), list(used_labels["patient"]))
    copies = [" and ".join(used_labels["image"].iloc[list(pair)]) for pair in copies]
    common.warn_of(copies, "pairs of films look alike, but are called different patients'; "
                   "copies would leak")  # fmt: skip


# %% Circles: from film to canvas pixels
# A circle whose centre lies on background is unusable (mdb212 and mdb214 of MIAS). One that the
# crop cuts is used as far as it goes: on MIAS it would be a fault of the crop, of a box near the
# skin it is not.
def place_findings(findings, table, canvases, crop="breast"):
    """Add canvas_x, canvas_y and canvas_radius (px), empty for a circle that is unusable.

    `table` has image and geometry, its index the row in `canvases`. What is unusable, or is cut by
    the crop, is named in a warning.
    """
    findings = findings.reset_index(drop=True)
    placed, off, cut = np.full((len(findings), 3), np.nan), [], []
    number = dict(zip(table["image"], table.index))
    for row in findings.dropna(subset=["radius"]).itertuples():
        n = number[row.image]
        g = Geometry(*table.loc[n, list(Geometry._fields)])
        x, y = film_to_canvas(row.x, row.y, g)
        inside = 0 <= x < canvases.shape[2] and 0 <= y < canvases.shape[1]
        level = tissue_threshold(canvases[n]) if crop == "breast" else -1
        if not inside or canvases[n, int(y), int(x)] <= level:
            off.append(row.image)
            findings.loc[row.Index, ["x", "y", "radius"]] = np.nan
            continue
        centre, last = np.array([row.x, row.y]), (g.film_width - 1, g.film_height - 1)
        start, end = ((centre + side * row.radius).clip(0, last) for side in (-1, 1))
        first = np.array([g.crop_left, g.crop_top])
        if (start < first).any() or (end > first + [g.crop_width - 1, g.crop_height - 1]).any():
            cut.append(row.image)
        placed[row.Index] = x, y, row.radius * g.scale
    findings[["canvas_x", "canvas_y", "canvas_radius"]] = placed
    common.warn_of(off, "circles have their centre off the breast, and are not used")
    common.warn_of(cut, "circles reach out of the crop")
    given = findings[["x", "y", "radius"]].dropna()
    if len(given) and given.to_numpy().max() <= 100 < table["film_height"].min() / 4:
        common.warn("all findings lie within 100 px of the top left corner: are they per cent?")
    return findings


if __name__ == "__main__":
    common.check_settings(settings, "01_prepare_data.py")
    used_findings = findings[findings["image"].isin(used_labels["image"])]
    findings_as_placed = place_findings(used_findings, usable, canvases, settings.crop)
    placed_findings = findings_as_placed.copy()
    print(f"{placed_findings['canvas_radius'].notna().sum()} circles can be used")


# %% What was edited: tables in the cells above, or files by hand
# Both are fine, and both are noted in prepared.json, settings.json and every title: figures on
# edited labels are not figures on the database. A file edited by hand is kept under another name.
FILES = ("films.npy", "films.csv", "labels.csv", "findings.csv", "splits.csv", "prepared.json")


def edits(labels, database_labels, splits, same):
    """Say in what labels, and what else, differ from the database's; "" if in nothing."""
    changed = labels.merge(database_labels, how="left", indicator=True)["_merge"] != "both"
    said, used = [], len(splits)
    if changed.any() or len(labels) != len(database_labels):
        said.append(f"labels edited, {used} of {len(database_labels)}")
        said += [f"{changed.sum()} changed"] if changed.any() else []
    elif used < len(labels):
        said.append(f"films left out, {used} of {len(labels)}")
    return ", ".join(said + [f"{name} edited" for name, is_same in same.items() if not is_same])


def edited_by_hand(folder, state):
    """Return the paths of labels.csv and splits.csv that are not as step 1 left them."""
    digests = {folder / name: digest for name, digest in state.get("digests", {}).items()}
    return [p for p, digest in digests.items() if p.is_file() and common.file_digest(p) != digest]


# %% Save: all files in a new folder first, then moved into place, prepared.json last
# A crash leaves no prepared.json, so that half-replaced files are refused and made anew. The lock
# keeps a second process out until what was saved is read back.
def save(folder, films, tables, state, edited=()):
    """Write films (an iterable of canvases), tables {name: DataFrame} and the state, or nothing.

    Files that were `edited` by hand are kept under another name.
    """
    new, pixels = folder / ".new", hashlib.sha256()
    common.discard(new)  # of a run that was killed
    with common.in_words(folder):
        try:
            with common.replacing(new / "films.npy") as temporary, open(temporary, "wb") as file:
                shape = (state["films"], *state["size"])
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for film in films:
                    pixels.update(film.tobytes())
                    file.write(film.tobytes())
            for name, table in tables.items():
                common.write_csv(table, new / name)
            digests = {n: common.file_digest(new / n) for n in ("labels.csv", "splits.csv")}
            state = {**state, "pixels": pixels.hexdigest(), "digests": digests}
            common.write_json(state, new / "prepared.json")
            for path in edited:
                names = (f"{path.stem}.edited-{n}.csv" for n in itertools.count(1))
                kept = next(folder / name for name in names if not (folder / name).exists())
                shutil.copy2(str(path), str(kept))
                common.warn(f"{path} was edited by hand; it is kept as {kept.name}, and made anew")
            common.discard(folder / "prepared.json")  # what follows is not whole until the end
            for name in FILES:
                os.replace(new / name, folder / name)
        finally:
            common.discard(new)


if __name__ == "__main__":
    common.check_settings(settings, "01_prepare_data.py")
    common.check_tables(used_labels, splits)
    if (used_labels["laterality"] != used_labels["image"].map(sides)).any():
        raise UserError("laterality changed: run the cell 'Place every film' and the next first")
    if not rows_of(labels, usable).equals(used_labels):
        raise UserError("labels changed: run the cell 'Split patients' and the next ones first")
    with common.locked(common.data_dir()):
        if stock_of(folder) != stock:
            raise UserError(f"the files in {folder} changed meanwhile; run {settings.script} again")
        used = usable[usable["image"].isin(used_labels["image"])].drop(columns="problem")
        tables = {"films.csv": used, "labels.csv": used_labels,
                  "findings.csv": placed_findings, "splits.csv": splits}  # fmt: skip
        written = [table.drop(columns="file", errors="ignore") for table in tables.values()]
        pixels_now = hashlib.sha256(canvases).hexdigest()
        films_edited = pixels_now != placed_pixels
        key = common.fingerprint(placed_key, pixels_now, *(t.to_csv(index=False) for t in written))
        with contextlib.suppress(UserError):
            before = common.read_json(target / "prepared.json")  # another process may have saved
        edited = edited_by_hand(target, before)
        whole = known and not edited and all((target / name).is_file() for name in FILES)
        if whole and before.get("key") == key:
            os.utime(target / "prepared.json")  # steps 2 to 5 take what was prepared last
        else:
            prepared_json = {
                "key": key, "placed": "" if films_edited else placed_key, "source": source,
                "size": size, "crop": settings.crop, "films": len(used),
                "split_seed": settings.seed,
                "note": edits(labels, database[0], splits, {
                    "findings": findings.equals(database[1]) and
                    placed_findings.equals(findings_as_placed),
                    "films": not films_edited, "splits": splits.equals(splits_as_dealt)}),
            }  # fmt: skip
            save(target, (canvases[n] for n in used.index), tables, prepared_json, edited)
        prepared = common.load_prepared(source)  # under the lock, before another changes it
    print(f"{len(prepared.films)} films in {target}")
    common.announce(prepared)


# %% Look: how many films of each class and tissue, findings of each type, classes in each fold
# Tissue and class have nothing to do with each other in MIAS; calcifications are as often malignant
# as benign; and every fold has its share of each class.
if __name__ == "__main__":
    there = [c for c in CLASS_NAMES if c in set(prepared.labels["label_name"])]
    classes = prepared.labels["label_name"].value_counts().reindex(there).to_frame("films")
    types = pd.crosstab(prepared.findings["type"], prepared.findings["severity"])
    fold_mix = pd.crosstab(prepared.splits["fold"], prepared.labels["label_name"])[there]
    common.table(classes, f"films per class (n = {len(prepared.labels)})")
    common.table(types, f"findings per type, by severity (n = {len(prepared.findings)})")
    common.table(fold_mix, "films per class in each fold")
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.6), layout="constrained")
    sns.countplot(data=prepared.labels, x="tissue", ax=axes[0], hue="label_name",
                  hue_order=there, palette=common.COLOURS)  # fmt: skip
    axes[0].set(ylabel="films", title=f"Tissue (n = {len(prepared.labels)} films)")
    axes[0].legend(title="", fontsize=8)
    colours = {"B": common.COLOURS["benign"], "M": common.COLOURS["malignant"]}
    if len(prepared.findings):
        sns.countplot(data=prepared.findings, x="type", ax=axes[1], hue="severity",
                      hue_order=list(colours), palette=colours)  # fmt: skip
    axes[1].set(ylabel="findings", title=f"Findings (n = {len(prepared.findings)})")
    axes[1].tick_params(axis="x", labelsize=8)
    fold_mix.plot.bar(stacked=True, ax=axes[2], color=common.COLOURS, legend=False, rot=0)
    axes[2].set(ylabel="films", title="Class mix of the folds")
    common.show(figure, prepared.folder / "figures" / "counts.png")


# %% Look: films of each class on the canvas, with the radiologists' circles
# What the network will see, with the circles on it: a circle beside its lesion would mean that y
# was read upside down.
if __name__ == "__main__":
    circles = prepared.findings.dropna(subset=["canvas_radius"])
    rows = [label for label in SEVERITY if (prepared.labels["label"] == label).any()]
    figure, axes = plt.subplots(len(rows), 7, figsize=(9, 2.5 * len(rows)), layout="constrained")
    for label, line in zip(rows, axes):
        of_class = prepared.labels[prepared.labels["label"] == label]
        line[0].set_ylabel(CLASS_NAMES[label])
        for axis, n in zip(line, of_class.sample(frac=1, random_state=0).index):
            axis.imshow(prepared.films[n], cmap="gray", vmin=0, vmax=255)
            axis.set_title(prepared.labels["image"][n], fontsize=8)
            for c in circles[circles["image"] == prepared.labels["image"][n]].itertuples():
                colour = common.COLOURS["malignant" if c.severity == "M" else "benign"]
                centre = (c.canvas_x, c.canvas_y)
                axis.add_patch(plt.Circle(centre, c.canvas_radius, fill=False, color=colour))
    plt.setp(axes, xticks=[], yticks=[])
    figure.suptitle(
        f"{prepared.source}: films on the canvas; circles blue benign, orange malignant"
    )
    common.show(figure, prepared.folder / "figures" / "films.png")
    print(f"\nprepared {len(prepared.labels)} films in {prepared.folder}. Next: python 04_train.py")
