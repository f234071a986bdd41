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
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(globals().get("__file__", "cell")).resolve().parent))

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

import common
from common import UserError


# %% Settings: change a value and run the cells below again; each name is a command-line flag
@dataclass
class Settings(common.SeedSettings):
    """What to prepare, and how."""

    script = "01_prepare_data.py"
    source: str = "auto"  # mias, phantom, own; auto: MIAS if it can be had
    images: str = ""  # folder with films, in place of an archive or a download
    archive: str = ""  # all-mias.tar.gz, .tar or .zip, with any folders inside
    labels: str = ""  # CSV of your own films: image,label[,patient][,laterality], or a pattern
    findings: str = ""  # CSV: image, and x,y,radius or x0,y0,x1,y1 (film px, y from the top)
    classes: str = ""  # what your labels mean, such as "0=normal,1=malignant"
    patient_from: str = ""  # regular expression whose (group) in a film's name is its patient
    crop: Literal["breast", "none"] = "breast"  # none: whole images, unmirrored; ultrasound, MRI
    size: str = "auto"  # canvas, height x width; auto: MIAS 1024x576, own 512x288, phantoms 160x90
    folds: int = 5  # parts of the cross-validation; each is the test set once
    patients: int = 60  # phantom patients, two films each
    phantom_size: int = 1024  # px, sides of a phantom film; MIAS has 1024
    allow_partial: bool = False  # go on without films that are missing or broken


settings = common.command_line(Settings, __doc__)

# %% Find the films: a folder, an archive, an earlier download, the public mirror, or phantoms
# The first of these that there is. The folder is looked through once, and what is found stands in
# `files`: films are read, masks and files of other kinds are left out and named.
part = common.canvas_size(settings.size, settings.source)  # a mistyped one ends here
if settings.crop == "breast" and part[0] < part[1]:
    common.warn(f"--size {settings.size} is HEIGHTxWIDTH: wider than high, as no breast is")
with common.locked(common.data_dir()):  # two processes must not unpack into the same folder
    source, folder, files = common.find_films(settings)
common.table(files["kind"].value_counts().to_frame("files"), f"{source}: {folder}")
common.say_left_out(files)

# %% Read the labels: filter or correct them below this cell, and that is what is prepared
# Every row of MIAS's Info.txt is a finding, and the worst one labels its film. Films 2k-1 and 2k
# are the right and the left breast of patient k. The file counts y from the bottom; here it runs
# from the top. A row that is not understood is refused, never skipped. A database of your own is
# one function that returns its labels and findings, and one name in READERS.


def parse_info(text, film_height=1024):
    """Return the tables of labels and findings (px, x and y from the top left) of Info.txt."""
    # mdb001 G CIRC B 535 425 197, or mdb003 D NORM; fatty, fatty-glandular, dense-glandular
    types = "|".join(common.TYPES[:-1])
    pattern = rf"^\s*(?P<image>MDB\d+)\s+(?P<tissue>[FGD])\s+(?:NORM|(?P<type>{types})"
    pattern += r"\s+(?P<severity>[BM])(?:\s+(?P<x>\d+)\s+(?P<y>\d+)\s+(?P<radius>0*[1-9]\d*)|"
    pattern += r"\s+\*NOTE\s+3\*)?)\s*$"
    lines = pd.Series(text.lstrip("\ufeff").upper().splitlines(), dtype=object)
    lines.index += 1
    named = lines.str.contains(r"MDB\d") & lines.str.match(r"MDB\d").cummax()  # first comes prose
    rows = lines[named].str.extract(pattern)
    problems = [f"line {n}: {lines[n].strip()!r}" for n in rows.index[rows["image"].isna()]]
    rows["image"] = rows["image"].str.lower()
    code = rows["severity"].map({"B": common.BENIGN, "M": common.MALIGNANT})
    rows["label"] = common.worst(code.fillna(common.NORMAL).astype(int), rows["image"])
    for name, part in rows.groupby("image"):
        if part["tissue"].nunique() > 1:
            problems.append(f"{name} has several tissues")
        if part["severity"].isna().any() and part["severity"].notna().any():
            problems.append(f"{name} is called normal in one row and not in another")
    if problems or rows.empty:
        found = "; ".join(problems[:8]) or "no row that starts with mdbNNN"
        what = "Expected rows as 'mdb001 G CIRC B 535 425 197' or 'mdb003 D NORM'"
        raise UserError(f"Info.txt cannot be trusted: {found}. {what}; get the distributed one")
    findings = rows[rows["severity"].notna()].reset_index(drop=True)[common.FINDINGS]
    findings[["x", "y", "radius"]] = findings[["x", "y", "radius"]].astype(float)
    findings["y"] = film_height - 1 - findings["y"]
    rows["findings"] = rows.groupby("image")["severity"].transform("count")
    labels = rows.drop_duplicates("image").sort_values("image")
    number = labels["image"].str[3:].astype(int)
    labels["patient"] = ((number + 1) // 2).astype(str)
    labels["laterality"] = np.where(number % 2, "right", "left")
    labels["label_name"] = labels["label"].map(dict(enumerate(common.CLASS_NAMES)))
    return labels.reset_index(drop=True)[common.LABELS], findings


def read_mias(folder, files, settings):
    """Read Info.txt; y is turned over at the height of the first film that can be read."""
    info = files["path"][files["name"].str.lower() == "info.txt"]
    if info.empty:
        hint = f"--labels FILE, or folders called {', '.join(common.CLASS_NAMES)}, or --classes"
        raise UserError(f"no Info.txt in {folder}; copy it there. Films of your own need {hint}")
    height = 1024
    for path in files["path"][files["kind"] == "film"]:
        with contextlib.suppress(UserError, OSError):  # a broken film is named later
            height = common.read_film(path, notes=[]).shape[0]
            break
    return parse_info(info.iloc[0].read_text(encoding="utf-8", errors="replace"), height)


def read_own(folder, files, settings):
    """Read your own tables, or the names of the folders that the films lie in."""
    classes = settings.classes
    labels = common.read_own_labels(settings.labels, files, classes, settings.patient_from)
    path, given = settings.findings or settings.labels, bool(settings.findings)
    findings = pd.DataFrame(columns=common.FINDINGS)
    if path:  # a table of labels may have them too
        findings = common.read_own_findings(path, labels, classes, needed=given)
    labels["findings"] = labels["image"].map(findings["image"].value_counts()).fillna(0).astype(int)
    return labels, findings


READERS = {"mias": read_mias, "phantom": read_mias, "own": read_own}
if source not in READERS:
    raise UserError(f"--source {source}: expected auto, {', '.join(READERS)}")
with common.in_words(folder):
    labels, findings = READERS[source](folder, files, settings)
as_made = {"labels": labels.copy(), "findings": findings.copy()}  # what is edited below is noted
common.table(labels[["label", "label_name"]].value_counts().to_frame("films"), "films per class")
common.table(findings.head(8), "the first findings; x and y in px from the top left")


# %% One film, from the scan to the canvas
# Labels, tape and frames are as bright as the breast. A grey level parts tissue from background;
# two cells shaved off every rim cut the bridges to labels; of the pieces left, the fullest near the
# chest wall is the breast, and a rim is added since the skin is nearly black. Cropping to it about
# doubles the pixels that show tissue; one scale for both directions keeps a round mass round.
def scan_to_canvas(row, files, size, crop):
    """Return pictures [(title, array, ...)] of the way of a film (a row of labels) to its canvas.

    None of a film that cannot be read; it is named further down.
    """
    with contextlib.suppress(UserError, ValueError, OSError):
        found, _ = common.match_films(row.to_frame().T, files)
        film = common.read_film(found[row["image"]], notes=[], crop=crop)
        side = common.chest_wall(film, common.sides_of(pd.Series([row["laterality"]]))[0])
        canvas, _, outline = common.place_film(film, side, size, crop)
        steps = common.find_breast(film, side) if crop == "breast" else {}
        pictures = [(name, mask * 255) for name, mask in steps.items() if name != "outline"]
        title = f"{row['image']}, {row['label_name']}"
        return [(title, film, outline), *pictures, (f"canvas, {size[0]} x {size[1]} px", canvas)]
    return []


size = common.canvas_size(settings.size, source)  # (height, width), px
if labels.empty:
    raise UserError("no row is left in `labels`; run the cell 'Read the labels' again")
pictures = scan_to_canvas(labels.head(2).iloc[-1], files, size, settings.crop)
figure, axes = common.draw_films(pictures, "One film, from the scan to the canvas")
common.show(figure, common.data_dir(source) / "figures" / "one-film.png")

# %% Six films before and after: two of each class
# Is the outline on the skin, is nothing of the breast cut off, is the label in the corner gone? A
# look at six films shows more than any number. Those with the wall at the right are mirrored.
shown = labels.groupby("label").head(2).sort_values("label")
rows = [scan_to_canvas(row, files, size, settings.crop) for _, row in shown.iterrows()]
rows = [pictures for pictures in rows if pictures]
pictures = [pictures[0] for pictures in rows] + [("", pictures[-1][1]) for pictures in rows]
title = "Above the scan with the breast outlined, below the canvas"
figure, axes = common.draw_films(pictures, title, rows=2, size=(9, 5))
common.show(figure, common.data_dir(source) / "figures" / "crops.png")

# %% Place every film: on all cores, into one array that lies on the disk
# Row n of `films` tells how canvas n came about, and what is odd about it. Films of more than 8
# bits are brought to 8 on one scale for the whole set, DICOM by each film's own window or table.
options = {"crop": settings.crop, "shape": (1024, 1024) if source == "mias" else None}
paths, part = common.match_films(labels, files)
common.warn_of(part, "films have no label and are left out")
sides = dict(zip(labels["image"], common.sides_of(labels["laterality"])))
options["bits"] = common.bits_of_set(list(paths.values()))
for part in {*as_made} - {"labels", "findings"}:
    del as_made[part]  # it came of other canvases
canvases = common.scratch_array((len(paths), *size), common.data_dir(source))


def place(item):
    """Fill the canvas of a number and {image: path}; return its row of films.csv."""
    number, (image, path) = item
    canvases[number], row = common.prepare_film(path, sides[image], size, **options)
    return {"image": image, **row}


films = pd.DataFrame(common.in_threads(place, [*enumerate(paths.items())], "preparing films"))
as_made.update(source=source, crop=settings.crop, canvases=[zlib.crc32(c) for c in canvases])
common.say_oddities(films)
print(f"{len(paths)} films for {len(labels)} labels, canvas {size[0]} x {size[1]} px")

# %% Check every film: a digest of its pixels tells a wrong, damaged or renamed one
# No film is used under another's name, and none twice: either would leak. Missing and broken films
# end the run, unless --allow-partial says that they may be left out. A film that was saved
# as JPEG, made brighter or, but for --crop none, mirrored has another digest, and nearly the same
# thumbnail.
missing = {*labels["image"]} - {*paths}
if source == "mias":
    missing |= {*common.known_digests().values()} - {path.stem.lower() for path in files["path"]}
usable = films[common.check_films(source, films, sorted(missing), settings.allow_partial)]
as_made["usable"] = True
part = usable["image"].map(sides).map({"left": True, "right": False}) == usable["mirrored"]
if part.any() and settings.crop == "breast":
    print(f"{part.sum()} films have the chest wall at the other side than their laterality says")
part = common.unlike(usable[common.STATISTICS], common.usual_range(usable))
common.warn_of(usable["image"][part], "films are unlike the others of their set")
title = "pairs of films look alike, but are called different patients'; copies would leak"
common.warn_of(common.near_copies(canvases, usable, labels), title)
common.table(usable[common.STATISTICS].describe().round(3), f"{len(usable)} films can be used")


# %% Split patients, never films: no patient is on both sides
# Two breasts of one woman are alike; a model that saw one in training may know the other. Patients
# are dealt out by the worse label of their films, so that every part has its share of each class.
# How many test films would have their patient among the training films, were films dealt out?
def known_share(patients, fold):
    """Return the share of the films of fold 0 whose patient has films in other folds."""
    tested = np.asarray(fold) == 0
    return patients[tested].isin(patients[~tested]).mean()


used_labels = common.labels_of(usable, labels)
part = common.deal_patients(used_labels, settings.folds, settings.seed, fewest=settings.folds)
splits = used_labels[["image", "patient"]].assign(fold=part)
as_made["splits"], as_made["seed"] = splits.copy(), settings.seed
common.table(splits.groupby("fold")["patient"].agg(["nunique", "size"]), "patients and films")
print(f"test films whose patient trains: {known_share(splits['patient'], part):.0%};", end=" ")
part = part.sample(frac=1, random_state=0)
print(f"were films dealt out: {known_share(splits['patient'], part):.0%}")


# %% Shortcuts: what a child could tell the classes by
# If malignant films are turned, or brighter than others, a network learns that in place of cancer.
# For each plain property of films and files, the films of other patients that are nearest in it
# guess the class. Named is what is clearly better than chance: a lower 95 % bound above 0.6, and
# 3.5 standard errors, since that is a chance of 1 % in 13 properties and 3 questions (Bonferroni).
# Where folders gave the label, they and their order are left out.
part = {"film_width": "width", "film_height": "height", "mean": "mean grey", "sd": "sd of grey"}
rows = usable.merge(used_labels[["image"]]).rename(columns=part)
part = rows.assign(path=rows["image"].map(paths)).merge(files, on="path")
rows = rows[common.SEEN].assign(bytes=part["bytes"], suffix=part["name"].str.rpartition(".")[2])
rows["bits a pixel"] = 8 * rows["bytes"] / (rows["width"] * rows["height"])  # of the file
if settings.labels or source != "own":
    rows["folder"] = part["name"].str.rpartition("/")[0]
    rows["row in the table"] = part["image"].map(dict(zip(labels["image"], labels.index)))
shown = common.find_shortcuts(rows, used_labels)
common.table(shown.pivot(index="property", columns="tells")["auc"].round(2), "AUC, 0.5 is chance")
shown = shown[(shown["low"] > 0.6) & (shown["z"] > 3.5)].sort_values("auc", ascending=False)
as_made["shortcuts"] = shown.round(3).to_dict("records")
for row in shown.drop_duplicates("property").itertuples():
    title = f"the {row.property} alone: AUC {row.auc:.2f}, {row.tells} (at least {row.low:.2f})"
    if row.property in common.SEEN:
        common.warn(f"{title}; a network may learn that instead: make films alike in it")
    else:
        print(f"{title}; never shown to the network")


# %% Circles, from film to canvas: the films with what the radiologists marked
# A circle beside its lesion would mean that y was read upside down. Lesions are brighter than the
# ring round them, so both ways are tried. A circle whose centre lies on background is unusable
# (mdb212 and mdb214 of MIAS). One that the crop cuts is used as far as it goes: on MIAS that would
# be a fault of the crop, of a box near the skin it is not.
def contrast(findings, films, canvases):
    """Return by how much each circle is brighter than its ring, float (n,), NaN off the canvas."""
    values, number = [], dict(zip(films["image"], films.index))
    ys, xs = np.ogrid[: canvases.shape[1] : 2, : canvases.shape[2] : 2]  # every second will do
    for row in findings.itertuples():
        g = common.geometry_of(films.loc[number[row.image]])
        x, y = common.film_to_canvas(row.x, row.y, g)
        distance = np.hypot(ys - y, xs - x) / (row.radius * g.scale)
        part = canvases[number[row.image], ::2, ::2]
        inside, ring = part[distance <= 1], part[(distance > 1) & (distance <= 1.5)]
        values.append(inside.mean() - ring.mean() if inside.size and ring.size else np.nan)
    return np.array(values)


def place_findings(findings, films, canvases, crop="breast"):
    """Add canvas_x, canvas_y and canvas_radius (px), empty for a circle that is unusable.

    `films` has image and geometry, its index the row in `canvases`. What is unusable is named in a
    warning; a centre outside of its film is refused.
    """
    findings = findings.reset_index(drop=True)
    placed, off, outside = np.full((len(findings), 3), np.nan), [], []
    number = dict(zip(films["image"], films.index))
    for row in findings.dropna(subset=["radius"]).itertuples():
        n = number[row.image]
        g = common.geometry_of(films.loc[n])
        if not (0 <= row.x < g.film_width and 0 <= row.y < g.film_height):
            outside.append(row.image)
        x, y = common.film_to_canvas(row.x, row.y, g)
        inside = 0 <= x < canvases.shape[2] and 0 <= y < canvases.shape[1]
        level = common.tissue_threshold(canvases[n]) if crop == "breast" else -1
        if not inside or canvases[n, int(y), int(x)] <= level:
            off.append(row.image)
            findings.loc[row.Index, ["x", "y", "radius"]] = np.nan
            continue
        placed[row.Index] = x, y, row.radius * g.scale
    findings[["canvas_x", "canvas_y", "canvas_radius"]] = placed
    common.refuse(outside, "findings lie outside; scale them, or take the films they are px of")
    common.warn_of(off, "circles have their centre off the breast, and are not used")
    return findings


part = findings[findings["image"].isin(used_labels["image"])]
height = part["image"].map(films.set_index("image")["film_height"])
turned = part.assign(y=height - 1 - part["y"])  # from the other end
better = contrast(turned, films, canvases) - contrast(part, films, canvases)
better = better[~np.isnan(better)]
if len(better) > 4 and better.mean() > 2.5 * better.std() / len(better) ** 0.5:
    title = f"{(better > 0).sum()} of {len(better)} circles fit their lesions better upside down"
    if as_made.get("crop") == "breast":  # on ultrasound and MRI lesions may be dark
        common.warn(f"{title}: y is taken to run from the bottom, as in MIAS, and turned over")
        part = turned
placed_findings = place_findings(part, usable, canvases, as_made.get("crop"))
as_made["placed_findings"] = placed_findings.copy()
as_made["placed_of"] = [table.copy() for table in (used_labels, used_labels, findings)]
title = f"{placed_findings['canvas_radius'].notna().sum()} of {len(part)} findings have a circle"
print(f"{title}, {part['radius'].isna().sum()} have none in the database")
shown = used_labels.groupby("label").sample(frac=1, random_state=0).groupby("label").head(7)
rows = dict(zip(films["image"], films.index))  # of the canvases
shown = dict(zip(shown["image"], shown["label_name"]))
pictures = [(f"{name}\n{shown[name]}", canvases[rows[name]]) for name in shown]
title = f"{source}: films on the canvas; circles blue benign, orange malignant"
figure, axes = common.draw_films(pictures, title, rows=len(set(shown.values())), size=(9, 7.5))
for axis, name in zip(axes, shown):
    common.draw_circles(axis, placed_findings[placed_findings["image"] == name], "canvas_")
common.show(figure, common.data_dir(source) / "figures" / "films.png")

# %% Save: all files in a new folder first, then moved into place, prepared.json last
# Tables that were edited in the cells above are used as they are, and that is noted in
# prepared.json, settings.json and every title: figures on edited labels are not figures on the
# database. A labels.csv or splits.csv that was edited by hand is kept under another name.
part = {"canvases", "usable", "splits", "shortcuts", "placed_findings"} - {*as_made}
common.refuse(part, "first run the cells 'Place every film' to 'Circles' without an error; missing")
common.check_tables(used_labels, splits)
if (used_labels["laterality"] != used_labels["image"].map(sides)).any():
    raise UserError("laterality changed: run the cell 'Place every film' and the next first")
part = common.labels_of(usable, labels), used_labels, findings
if not all(map(pd.DataFrame.equals, part, as_made["placed_of"])):
    raise UserError("labels or findings changed: run the cell 'Split patients' and the next two")
rows = usable.index[usable["image"].isin(used_labels["image"])]  # of the canvases
part = {"findings": findings, "placed_findings": placed_findings, "splits": splits}
same = {name: table.equals(as_made[name]) for name, table in part.items()}
same["films"] = all(zlib.crc32(canvases[n]) == as_made["canvases"][n] for n in rows)
options = {"source": as_made["source"], "size": canvases.shape[1:], "crop": as_made["crop"]}
options.update(films=len(rows), note=common.edits(labels, as_made["labels"], len(rows), same))
options.update(split_seed=as_made["seed"], shortcuts=as_made["shortcuts"])
tables = {"films.csv": usable.loc[rows].drop(columns="problem"), "labels.csv": used_labels}
tables.update({"findings.csv": placed_findings, "splits.csv": splits})
with common.locked(common.data_dir()):
    if not common.list_files(folder).equals(files):
        raise UserError(f"files in {folder} changed meanwhile; run 01_prepare_data.py again")
    common.save_prepared((canvases[n] for n in rows), tables, options)
    prepared = common.load_prepared(as_made["source"])  # under the lock, before another changes it
print(f"{len(prepared.films)} films in {prepared.folder}")
common.announce(prepared)

# %% What was prepared: classes by tissue, findings by type, classes in each fold
# Tissue and class show no clear association in MIAS; calcifications are as often malignant
# as benign; and every fold has its share of each class.
shown = [name for name in common.CLASS_NAMES if name in set(prepared.labels["label_name"])]
fold_mix = pd.crosstab(prepared.splits["fold"], prepared.labels["label_name"])[shown]
common.table(fold_mix, f"films per class in each fold (n = {len(prepared.labels)})")
part = prepared.findings["severity"].map({"B": "benign", "M": "malignant"})
rows = {"tissue": pd.crosstab(prepared.labels["tissue"], prepared.labels["label_name"])[shown]}
rows.update(type=pd.crosstab(prepared.findings["type"], part), fold=fold_mix)
figure, axes = plt.subplots(1, 3, figsize=(10, 3.8), layout="constrained")
options = {"color": common.COLOURS, "legend": False, "rot": 0}
for axis, (name, part) in zip(axes, rows.items()):
    if len(part):
        part.plot.bar(ax=axis, stacked=name == "fold", **options)
    title = f"{'findings' if name == 'type' else 'films'} (n = {int(part.to_numpy().sum())})"
    axis.set(xlabel=name, ylabel=title)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
figure.legend(axes[2].containers, shown, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=3)
common.show(figure, prepared.folder / "figures" / "counts.png")
print(f"prepared {len(prepared.labels)} films in {prepared.folder}. Next: python 04_train.py")
