"""Step 1 keeps its promises: parsing, geometry, reading, checking, downloading, splitting.

The tests of the real database need its archive: ``MIAS_ARCHIVE=all-mias.tar.gz pytest``.
"""

import contextlib
import errno
import hashlib
import http.server
import importlib
import io
import itertools
import os
import shutil
import socket
import tarfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import scripts
from conftest import PROJECT, copy_scripts, prepare, prepare_data, run_main, run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import common
from common import UserError

dataset = importlib.import_module("02_dataset")
ARCHIVE = os.environ.get("MIAS_ARCHIVE", "")  # read here, since `home` takes it away
TINY = {"source": "phantom", "patients": 12, "phantom_size": 128, "size": "64x64", "folds": 3}
some = settings(max_examples=50, deadline=None, database=None)


def breast(seed=0, side="left", size=128):
    """Draw a half ellipse of grey noise 60 to 99 against the film's edge, uint8."""
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[:size, :size] / size
    inside = np.hypot(x / 0.55, (y - 0.5) / 0.4) < 1
    film = np.where(inside, rng.integers(60, 100, inside.shape), rng.integers(0, 4, inside.shape))
    return (film[:, ::-1] if side == "right" else film).astype(np.uint8)


def own_films(home, rows=None, header="image,label,patient"):
    """Write 12 films of 6 patients, two of each class, and their CSV; return the settings."""
    images, csv = home / "scans", home / "mine.csv"
    images.mkdir(exist_ok=True)
    for n in range(12):
        Image.fromarray(breast(n)).save(images / f"{n:03d}.png")
    rows = rows or [f"{n:03d}.png,{n // 2 % 3},p{n // 2}" for n in range(12)]
    csv.write_text("\n".join([header, *rows, ""]), encoding="utf-8")
    return {"images": str(images), "labels": str(csv), "size": "64x64", "folds": 2}


def refused(function, *arguments, **keywords):
    """Return the message with which a UserError refuses a call."""
    with pytest.raises(UserError) as error:
        function(*arguments, **keywords)
    return str(error.value)


def patched(name, error):
    """Return the arguments with which monkeypatch lets ``module.attribute`` raise an error."""
    module, attribute = name.rsplit(".", 1)

    def fail(*arguments, **keywords):
        raise error

    return importlib.import_module(module), attribute, fail


def brightness_inside(film, x, y, radius):
    """Return by how much the disc of a circle is brighter than the ring of the same width."""
    v, u = np.indices(film.shape)
    distance = np.hypot(u - x, v - y) / radius
    return film[distance <= 1].mean() - film[(distance > 1) & (distance <= 2)].mean()


# ---------------------------------------------------------------------- (a) the real database


@pytest.fixture(scope="module")
def mias(tmp_path_factory):
    """Prepare all films of MIAS once, at the size that is trained on."""
    if not ARCHIVE:
        pytest.skip("MIAS_ARCHIVE names no archive of the database")
    data = tmp_path_factory.mktemp("mias")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BCD_DATA_DIR", str(data))
        yield prepare_data(source="mias", archive=ARCHIVE, size="512x288")
    shutil.rmtree(str(data))  # 370 MB


@pytest.fixture(scope="module")
def info(mias):
    """Return labels and findings of Info.txt as parsed, before any circle is put aside."""
    return prepare.parse_info((mias.folder / "raw" / "Info.txt").read_text(encoding="utf-8"))


def test_mias_labels_are_counted_by_the_worst_row_and_patients_are_pairs_of_films(info):
    labels, findings = info
    assert np.bincount(labels["label"]).tolist() == [63, 207, 52]
    several = labels[labels["findings"] > 1].set_index("image")["findings"].to_dict()
    twice = ("mdb005", "mdb132", "mdb144", "mdb223", "mdb239", "mdb249")
    assert several == {**dict.fromkeys(twice, 2), "mdb226": 3}
    assert labels.set_index("image")["label_name"]["mdb144"] == "malignant"
    by_tissue = pd.crosstab(labels["label"], labels["tissue"]).to_dict("list")  # B, N, M
    assert by_tissue == {"F": [21, 66, 19], "G": [22, 65, 17], "D": [20, 76, 16]}
    letters = labels["label_name"].str[0].str.upper()
    pairs = letters.groupby(labels["patient"]).agg(lambda pair: "".join(sorted(pair)))
    assert pairs.value_counts().to_dict() == {"NN": 53, "BN": 55, "MN": 46, "BM": 6, "BB": 1}
    both = sorted(2 * int(patient) - 1 for patient in pairs.index[pairs == "BM"])
    assert both == [91, 125, 141, 211, 213, 239]
    assert (labels["laterality"] == ["right", "left"] * 161).all()
    assert (labels.groupby("patient")["tissue"].nunique() == 1).all()


def test_mias_findings_are_counted_by_type_and_radius(info):
    labels, findings = info
    assert len(findings) + (labels["label"] == common.NORMAL).sum() == 330
    counts = pd.crosstab(findings["severity"], findings["type"]).to_dict("list")  # B, M
    masses = {"CALC": [15, 15], "CIRC": [21, 4], "SPIC": [11, 8], "MISC": [7, 8]}
    assert counts == {**masses, "ARCH": [9, 10], "ASYM": [6, 9]}
    without = findings[findings["x"].isna()]
    assert sorted(without["image"]) == ["mdb059", "mdb216", "mdb233", "mdb245"]
    assert findings["radius"].describe()[["min", "50%", "max"]].tolist() == [3, 41, 197]
    assert findings.groupby("severity")["radius"].median().tolist() == [33.5, 49]


def test_every_mias_film_is_the_distributed_one_and_lies_as_its_number_says(mias):
    known = {image: digest for digest, image in common.known_digests().items()}
    assert len(known) == len(mias.table) == mias.table["digest"].nunique() == 322
    assert (mias.table["digest"].str[:6] == mias.table["image"].map(known)).all()
    assert (mias.table["mirrored"] == (mias.labels["laterality"] == "right")).all()
    wrong = []
    for path, laterality in zip(common.film_paths(mias.folder / "raw"), mias.labels["laterality"]):
        if common.chest_wall(common.read_film(path)) != laterality:
            wrong.append(path.stem)
    assert wrong == ["mdb151", "mdb152"]  # the breast fills the film


def test_every_usable_mias_circle_lies_in_its_crop(mias, info):
    circles = mias.findings.dropna(subset=["canvas_radius"]).merge(mias.table, on="image")
    unusable = set(info[1].dropna()["image"]) - set(circles["image"])
    assert len(circles) == 117 and unusable == {"mdb212", "mdb214"}
    for axis, side in (("x", "width"), ("y", "height")):
        start = circles["crop_left" if axis == "x" else "crop_top"]
        assert ((circles[axis] - circles["radius"]).clip(0) >= start).all()
        end = (circles[axis] + circles["radius"]).clip(upper=1023)
        assert (end < start + circles[f"crop_{side}"]).all()
    width, height = mias.table["crop_width"].median(), mias.table["crop_height"].median()
    assert 496 <= width <= 600 and 950 <= height <= 1024, (width, height)


def test_mias_y_is_turned_over_so_that_masses_are_brighter_inside(mias):
    masses = mias.findings[mias.findings["type"] == "CIRC"].dropna(subset=["radius"])
    right_way, wrong_way = [], []
    for m in masses.itertuples():
        film = common.read_film(mias.folder / "raw" / f"{m.image}.pgm")
        right_way.append(brightness_inside(film, m.x, m.y, m.radius))
        wrong_way.append(brightness_inside(film, m.x, 1023 - m.y, m.radius))
    assert len(masses) == 24 and np.mean(right_way) > 20 > np.mean(wrong_way)
    assert np.greater(right_way, wrong_way).sum() >= 22


def test_a_mias_films_row_alone_tells_malignant_ones_and_nothing_else_does(mias):
    found = common.read_json(mias.folder / "prepared.json")["shortcuts"]
    found = {(row["property"], row["tells"]): row["auc"] for row in found}
    assert found == {
        ("row in the table", "malignant"): 0.689,
        ("row in the table", "abnormal"): 0.662,
    }


def test_every_mias_fold_has_its_share_of_each_class(mias):
    mix = pd.crosstab(mias.splits["fold"], mias.labels["label_name"])
    assert mix["malignant"].between(10, 11).all(), mix
    assert mix["benign"].between(10, 15).all() and mix["normal"].between(38, 45).all(), mix


# ---------------------------------------------------------------------- (b) Info.txt

INFO = """MIAS database: mdb001 is a film, and so is
    mdb007 G CIRC B 1 2 3
mdb001 G CIRC B 535 425 197
mdb002 G NORM
mdb003 D CIRC B 100 200 10
mdb003 D SPIC M 300 400 20
mdb004 D CALC M *NOTE 3*
"""


CHANGES = {
    "trailing blanks": lambda text: text.replace("\n", "  \n"),
    "tabs": lambda text: text.replace(" ", "\t"),
    "CRLF": lambda text: text.replace("\n", "\r\n"),
    "BOM": lambda text: "\ufeff" + text[text.index("mdb001 G") :],
    "blank lines": lambda text: text.replace("\n", "\n\n"),
    "lower case": str.lower,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_info_is_read_alike_whatever_its_blanks_line_ends_and_case(change):
    labels, findings = prepare.parse_info(change(INFO))
    assert labels["image"].tolist() == ["mdb001", "mdb002", "mdb003", "mdb004"]
    assert labels["label"].tolist() == [0, 1, 2, 2]  # B before M is malignant
    assert labels["findings"].tolist() == [1, 0, 2, 1]
    assert labels["patient"].tolist() == ["1", "1", "2", "2"]
    assert labels["laterality"].tolist() == ["right", "left"] * 2
    assert findings["y"].tolist()[:3] == [1023 - 425, 1023 - 200, 1023 - 400]
    assert findings["x"].isna().tolist() == [False, False, False, True]


@pytest.mark.parametrize(
    "row, complaint",
    [
        ("mdb002 G CIRC B 1 2 3", "mdb002 is called normal"),
        ("mdb003 F SPIC M 3 4 5", "mdb003 has several tissues"),
        (" mdb002 G SPIC M 3 4 5", "mdb002 is called normal"),
    ]
    + [
        (row, f"line 8: '{row.upper()}'")
        for row in (
            "mdb009 X NORM",
            "mdb009 G BLOB B 1 2 3",
            "mdb009 G CIRC",
            "mdb009 G CIRC 1 2 3",
            "mdb009 G CIRC B 1 2 -3",
            "mdb009 G CIRC B 1 2 0",
            "mdb009 G CIRC B 53S 425 19",
            "mdb009 G CIRC B 535 425",
            "mdb009",
            "mdb003b D SPIC M 3 4 5",
            "mdb003, D SPIC M 3 4 5",
            "* mdb009 G NORM",
            "film mdb009 is normal",
            "mdb009 G NORM mdb010 G NORM",
            "mdb009 G NORM B 1 2 3",
        )
    ],
)
def test_a_row_that_makes_no_sense_is_refused_and_named(row, complaint):
    message = refused(prepare.parse_info, INFO + row)
    assert complaint in message and "Expected rows as 'mdb001 G CIRC B 535 425 197'" in message


def test_a_text_without_films_is_refused_and_a_normal_film_named_twice_has_no_findings():
    for text in ("", "a text about mdb001\n", "m\0d\0b\x000\x000\x001\0 \0G\0"):  # UTF-16
        assert "no row" in refused(prepare.parse_info, text)
    labels, _ = prepare.parse_info("mdb001 G NORM\nmdb001 G NORM \n")
    assert labels["findings"].tolist() == [0] and labels["label"].tolist() == [common.NORMAL]


place = st.none() | st.tuples(st.integers(0, 1023), st.integers(0, 1023), st.integers(1, 300))
a_finding = st.tuples(st.sampled_from(common.TYPES[:-1]), st.sampled_from("BM"), place)
a_film = st.tuples(st.sampled_from("FGD"), st.lists(a_finding, max_size=3))


@some
@given(st.dictionaries(st.integers(1, 999), a_film, min_size=1), st.sampled_from([" ", "\t", "  "]))
def test_any_valid_table_comes_back_as_it_was_written(films, blank):
    lines, expected = [], []
    for number, (tissue, findings) in films.items():
        for kind, severity, where in findings:
            lines.append([f"mdb{number:03d}", tissue, kind, severity, *map(str, where or ())])
            x, y, radius = (where[0], 1023 - where[1], where[2]) if where else (None,) * 3
            expected.append((f"mdb{number:03d}", kind, severity, x, y, radius))
        lines += [] if findings else [[f"mdb{number:03d}", tissue, "NORM "]]
    labels, found = prepare.parse_info("\n".join(blank.join(line) for line in lines))
    found = found.astype(object).where(found.notna(), None)
    assert list(found.itertuples(index=False, name=None)) == expected
    for row in labels.itertuples():
        tissue, findings = films[int(row.image[3:])]
        severities = [severity for _, severity, _ in findings]
        worst = "M" in severities and "malignant" or "B" in severities and "benign" or "normal"
        assert (row.tissue, row.label_name, row.findings) == (tissue, worst, len(findings))
    assert len(labels) == len(films)


# ---------------------------------------------------------------------- (c) geometry


@some
@given(*[st.integers(1, 2000)] * 4, st.booleans(), st.floats(0.05, 4), *[st.floats(0, 1)] * 2)
def test_a_point_goes_to_the_canvas_and_back(top, left, height, width, mirrored, scale, u, v):
    geometry = common.Geometry(4000, 4000, top, left, height, width, mirrored, scale)
    x, y = left + u * (width - 1), top + v * (height - 1)
    on_canvas = common.film_to_canvas(x, y, geometry)
    back = [(side + 0.5) / scale - 0.5 for side in on_canvas]
    back[0] = width - 1 - back[0] if mirrored else back[0]
    assert np.allclose((back[0] + left, back[1] + top), (x, y), atol=1e-6)
    assert -0.5 <= on_canvas[0] <= width * scale - 0.5
    assert -0.5 <= on_canvas[1] <= height * scale - 0.5


@some
@given(st.integers(0, 70), st.integers(75, 180), st.sampled_from(["left", "right"]))
def test_a_bright_dot_turns_up_where_the_geometry_says(x, y, side):
    film = breast(side="left", size=256)
    film[y - 2 : y + 3, x + 3 : x + 8] = 255
    x += 5
    if side == "right":
        film, x = film[:, ::-1].copy(), 255 - x
    canvas, geometry, mask = common.place_film(film, side, (128, 72))
    assert geometry.mirrored == (side == "right") and mask[y, x]
    weight = np.maximum(canvas.astype(float) - 110, 0)
    rows, columns = np.indices(canvas.shape)
    found = (columns * weight).sum() / weight.sum(), (rows * weight).sum() / weight.sum()
    assert np.allclose(found, common.film_to_canvas(x, y, geometry), atol=0.5)


@pytest.mark.parametrize("film", [np.zeros((128, 128)), np.full((128, 128), 255)], ids=str)
def test_a_film_of_one_grey_has_no_breast(film):
    with pytest.raises(ValueError, match="no breast found"):
        common.place_film(film.astype(np.uint8), "left", (64, 64))


# ---------------------------------------------------------------------- (d) reading films

small_films = st.integers(1, 12).flatmap(
    lambda width: st.lists(st.binary(min_size=width, max_size=width), min_size=1, max_size=12)
)


@some
@given(small_films, st.booleans(), st.sampled_from([" ", "\n", "\t\n", " # a remark\n"]))
def test_any_pgm_is_read_as_it_was_written(tmp_path_factory, rows, ascii, blank):
    path = tmp_path_factory.getbasetemp() / "any.pgm"
    film = np.array([list(row) for row in rows], np.uint8)
    header = f"{'P2' if ascii else 'P5'}{blank}{film.shape[1]} {film.shape[0]}\n255\n".encode()
    path.write_bytes(header + (" ".join(map(str, film.ravel())).encode() if ascii else bytes(film)))
    notes = []
    found, said = common.read_film(path, notes=notes), " ".join(notes)
    if "inverted" in said:  # noise may look so; what was padding has one value
        sums = found.astype(int) + film
        assert sums.max() + 1 in 2 ** np.arange(9)
        assert len(np.unique(found[sums < sums.max()])) <= 1
    elif "made black" in said:
        assert ((found == film) | (found == 0)).all()
    else:
        assert np.array_equal(found, film)


@some
@given(st.binary(max_size=60), st.sampled_from([b"", b"P5 ", b"P5 4 4 255\n", b"P2 4 4 9\n"]))
def test_no_bytes_make_the_reader_fail_without_a_message(tmp_path_factory, data, start):
    path = tmp_path_factory.getbasetemp() / "bytes.pgm"
    path.write_bytes(start + data)
    try:
        assert common.read_film(path).dtype == np.uint8
    except UserError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("most", [100, 4095, 65535])
def test_a_pgm_of_another_maximum_is_scaled_to_it(tmp_path, most):
    values = np.linspace(0, most, 64).astype(int)
    raw = values.astype(">u2" if most > 255 else "u1").tobytes()
    (tmp_path / "film.pgm").write_bytes(b"P5\n8 8\n%d\n" % most + raw)
    film = common.read_film(tmp_path / "film.pgm")
    assert film.dtype == np.uint8 and film.shape == (8, 8)
    assert np.abs(film.ravel() - values * 255.0 / most).max() <= 1


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("bits", [12, 16])
def test_a_16_bit_film_keeps_its_contrast(tmp_path, suffix, bits):
    values = np.linspace(0, 2**bits - 1, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / f"film.{suffix}")
    film = common.read_film(tmp_path / f"film.{suffix}")
    assert film.dtype == np.uint8 and np.array_equal(film, np.rint(values / (2**bits - 1) * 255))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P"])
def test_a_film_saved_in_colour_is_the_same_grey_film(tmp_path, mode):
    Image.fromarray(breast()).convert(mode).save(tmp_path / "film.png")
    assert np.array_equal(common.read_film(tmp_path / "film.png"), breast())


@pytest.mark.parametrize("data", [None, b"", b"P5\n8 8\n255\n1234", b"P5\n8", b"P9\n1 1\n255\n1"])
@pytest.mark.parametrize("name", ["film.pgm", "film.png", "film.tif"])
def test_a_missing_empty_cut_or_foreign_film_is_named(tmp_path, data, name):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    assert str(tmp_path / name) in refused(common.read_film, tmp_path / name)


# ---------------------------------------------------------------------- (e) films of one's own


@pytest.mark.parametrize("labels", ["benign,Normal, malignant ", "0,1,2"])
def test_own_labels_are_names_or_numbers_and_no_patient_column_is_said(home, capsys, labels):
    text = "".join(f"{n}.png,{label}\n" for n, label in enumerate(labels.split(",")))
    (home / "mine.csv").write_text("Image, LABEL\n" + text, encoding="utf-8-sig")
    table = common.read_own_labels(home / "mine.csv")
    assert table["label"].tolist() == [0, 1, 2] and table["patient"].tolist() == ["0", "1", "2"]
    assert "no patient column" in capsys.readouterr().err


def test_that_there_is_no_patient_column_is_said_once(home, capsys):
    choice = own_films(home, [f"{n:03d}.png,{n % 3}" for n in range(12)], "image,label")
    assert prepare_data(**choice).labels["patient"].nunique() == 12
    assert capsys.readouterr().err.count("no patient column") == 1


@pytest.mark.parametrize(
    "text, complaints",
    [
        ("image,colour\na.png,0\n", ["lacks the column label", "colour"]),
        ("image,label\na.png,benign\nb.png,\n", ["line: 3"]),
        ("image,label\na.png,NaN\n", ["line: 2"]),
        ("image,label\n,normal\n", ["line: 2"]),
        ("image,label\na.png,cancer\n", ["line: 2", "cancer", "malignant"]),
        ("image,label\na.png,3\n", ["the numbers 3", "--classes"]),
        ("image,label,Label\na,0,1\n", ["has a column twice"]),
        ("image,label\na,0,p1\nb,1,p2\n", ["cannot be read", "line: 2, 3"]),
        ("image label\na 0\n", ["lacks the column image and label", "image label"]),
        ("image,label,patient\na.png,benign,\n", ["no patient in line: 2"]),
        ("image,label,laterality\na.png,benign,up\n", ["laterality", "up"]),
        ("image,label\n", ["mine.csv"]),
        ("", ["no rows", "mine.csv"]),
        ("\n", ["no rows", "mine.csv"]),
        ("image,label,-,-\na,benign,Normal,b\n", ['column "-" contradict in line: 2']),
    ],
)
def test_own_labels_that_make_no_sense_are_refused_and_named(home, text, complaints):
    (home / "mine.csv").write_text(text, encoding="utf-8")
    message = refused(common.read_own_labels, home / "mine.csv")
    assert all(complaint in message for complaint in complaints), message


def test_blanks_make_no_second_patient_and_capitals_no_other_side(home):
    rows = ["a,benign,p1 ,Right", "b,normal, P01,L"]
    (home / "mine.csv").write_text("image,label,patient,laterality\n" + "\n".join(rows))
    table = common.read_own_labels(home / "mine.csv")
    assert table["patient"].nunique() == 1
    assert table["laterality"].tolist() == ["right", "left"]


def test_own_films_are_prepared_under_their_own_names(home):
    prepared = prepare_data(**own_films(home))
    names = [f"{n:03d}" for n in range(12)]
    for table in (prepared.labels, prepared.table, prepared.splits):
        assert table["image"].tolist() == names
    assert prepared.films.shape == (12, 64, 64) and (prepared.films.max(axis=(1, 2)) > 0).all()
    assert (prepared.splits.groupby("patient")["fold"].nunique() == 1).all()


def test_another_seed_deals_other_folds_over_the_same_films_and_is_noted(home):
    seen, choice = {}, own_films(home)
    for seed in range(4):
        prepared = prepare_data(**choice, seed=seed)
        assert prepared.split_seed == seed
        seen[prepared.splits.to_csv()] = prepared.fingerprint
    assert len(seen) > 1 and len(set(seen.values())) == 1
    stamp = prepared.folder / "prepared.json"
    common.write_json({"fingerprint": prepared.fingerprint}, stamp)  # as an older version left it
    assert "not whole ('digests'); run 01_" in refused(common.load_prepared, "own")


def test_a_split_that_cannot_be_made_is_refused_and_the_old_one_stays_whole(home):
    old = contents(prepare_data(**own_films(home)).folder)
    few = own_films(home, [f"{n:03d},{min(n // 2, 2) % 3},p{n // 2}" for n in range(12)])
    message = refused(prepare_data, **few)
    assert "2 folds" in message and "benign 1" in message and "malignant 4" in message
    assert contents(common.load_prepared("own").folder) == old  # not new films with old folds
    one_class = own_films(home, [f"{n:03d},normal,p{n // 2}" for n in range(12)])
    assert "two classes" in refused(prepare_data, **one_class)


def test_the_fewest_patients_that_step_1_takes_are_split_or_refused_with_a_message(home):
    prepared = prepare_data(**own_films(home))
    try:
        parts = dataset.fold_parts(prepared, 0)
        assert min(map(len, parts.values())) > 0
    except UserError as error:
        assert "patients" in str(error)


def test_missing_extra_and_broken_films_are_named_and_left_out_if_allowed(home, capsys):
    rows = [f"{n:03d},{n // 2 % 3},p{n // 2}" for n in range(12)]
    choice = own_films(home, rows[1:] + ["lost,0,p9", "black,0,p7", "naked,1,p8"])
    Image.new("L", (128, 128)).save(home / "scans" / "black.png")
    label_only = np.zeros((128, 128), np.uint8)
    label_only[4:16, 100:120] = 230
    Image.fromarray(label_only).save(home / "scans" / "naked.png")
    message = refused(prepare_data, **choice)
    assert "lost" in message and "--allow-partial" in message and "001" not in message
    assert "black: no breast found" in message and "naked: no breast found" in message
    prepared = prepare_data(**choice, allow_partial=True)
    assert prepared.labels["image"].tolist() == [f"{n:03d}" for n in range(1, 12)]
    said = capsys.readouterr().err
    assert "1 films have no label and are left out: 000" in said and "lost" in said


def test_a_broken_first_film_is_left_out_if_allowed(home):
    common.make_phantoms(_made(home / "raw"), 12, 0, 128)
    (home / "raw" / "mdb001.pgm").write_bytes(b"")
    files = common.list_files(home / "raw")
    labels, findings = prepare.read_mias(home / "raw", files, prepare.Settings())
    assert len(labels) == 24 and findings["y"].dropna().between(0, 127).all()


# ---------------------------------------------------------------------- (f) checking


def checked(images, digests, allow_partial=False):
    """Run check_films on usable films that are all labelled."""
    films = pd.DataFrame({"image": images, "digest": digests, "problem": ""})
    missing = sorted({*common.known_digests().values()} - {*images})
    common.check_films("mias", films, missing, allow_partial)


def test_renamed_double_missing_and_foreign_films_are_named(capsys):
    digests, images = map(list, zip(*common.known_digests().items()))
    checked(images, digests)
    assert capsys.readouterr().err == ""
    swapped = [images[1], images[0], *images[2:]]
    message = refused(checked, swapped, digests, allow_partial=True)
    assert "mdb002 holds mdb001" in message and "mdb001 holds mdb002" in message
    message = refused(checked, images, digests[:1] + digests[:-1], allow_partial=True)
    assert "same pixels" in message and "mdb001, mdb002" in message
    assert "2 films are missing: mdb321, mdb322" in refused(checked, images[:320], digests[:320])
    checked(images[:320], digests[:320], allow_partial=True)
    assert "mdb321, mdb322" in capsys.readouterr().err
    checked(images, ["000000", *digests[1:]])
    assert "1 films differ" in capsys.readouterr().err


def test_a_circle_off_the_breast_is_put_aside_and_one_cut_by_the_crop_is_kept():
    canvas, geometry, _ = common.place_film(breast(), "left", (64, 64))
    table = pd.DataFrame([{"image": "mdb002", **geometry._asdict()}])
    columns = ["image", "type", "severity", "x", "y", "radius"]
    rows = [("mdb002", "CIRC", "B", 120, 5, 3), ("mdb002", "CIRC", "M", 30, 64, 9)]
    _, parsed = prepare.parse_info("mdb002 G CIRC B 120 122 3\nmdb002 G CIRC M 30 63 9", 128)
    assert list(parsed.itertuples(index=False, name=None)) == rows
    placed = prepare.place_findings(parsed, table, canvas[None])
    assert placed["canvas_radius"].isna().tolist() == [True, False]
    third = np.stack([0 * canvas, 0 * canvas, canvas])  # the index is the row in the canvases
    assert prepare.place_findings(parsed, table.set_axis([2]), third).equals(placed)
    big = pd.DataFrame([("mdb002", "CIRC", "B", 60, 64, 60)], columns=columns)
    assert prepare.place_findings(big, table, canvas[None])["canvas_radius"].notna().all()


# ---------------------------------------------------------------------- (g) archives


def _made(folder):
    folder.mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Make 12 phantom patients of 128 px once, as they lie in an archive."""
    folder = tmp_path_factory.mktemp("raw")
    common.make_phantoms(folder, 12, 0, 128)
    return folder


def packed(raw, path, inside=""):
    """Pack the phantoms as tar or zip, in a folder if one is named."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for film in sorted(raw.iterdir()):
                file.write(film, inside + film.name)
    else:
        kind = path.suffix[1:].replace("tar", "")  # none, gz, bz2 or xz
        with tarfile.open(path, f"w:{kind}") as file:
            for film in sorted(raw.iterdir()):
                file.add(film, inside + film.name)
    return path


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tar", "a.zip"])
@pytest.mark.parametrize("inside", ["", "MIAS/all films/"])
def test_an_archive_is_unpacked_whole_whatever_its_kind_and_folders(raw, home, name, inside):
    archive = packed(raw, home / name, inside)
    folder = common.extract(archive, home / "data" / "raw")
    for path in raw.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    before = folder.stat().st_mtime_ns
    assert common.extract(archive, folder).stat().st_mtime_ns == before
    assert [path.name for path in folder.parent.iterdir()] == ["raw"]


@pytest.mark.parametrize(
    "name, size, kind, complaint",
    [(name, 4, b"0", "not allowed") for name in ("../a.pgm", "a/../../a.pgm", "/tmp/a.pgm")]
    + [("a.pgm", 0, kind, "not allowed") for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, b"6")]
    + [(name, 2 << 30, b"0", "far more than its size") for name in ("a.pgm", "notes.doc")],
)
def test_a_member_that_leads_outside_or_is_a_bomb_is_refused(home, name, size, kind, complaint):
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, "/etc/hostname", size
    (home / "a.tar").write_bytes(member.tobuf() + b"film".ljust(512, b"\0") + bytes(1024))
    assert complaint in refused(common.extract, home / "a.tar", home / "data" / "raw")
    assert list((home / "data").iterdir()) == [] and not (home / "a.pgm").exists()


@pytest.mark.parametrize("names", ["../a.pgm", "/a.pgm", "1/a.pgm 2/a.pgm"])
def test_a_zip_that_leads_outside_or_holds_a_film_twice_is_refused(home, names):
    with zipfile.ZipFile(home / "a.zip", "w") as file:
        for name in names.split():
            file.writestr(name, b"film")
    message = refused(common.extract, home / "a.zip", home / "data" / "raw")
    assert "not allowed" in message or "a.pgm twice" in message
    assert list((home / "data").iterdir()) == []


def test_an_archive_of_other_films_does_not_take_the_place_of_mias(raw, home):
    folder = common.extract(packed(raw, home / "a.tar"), home / "data" / "mias" / "raw")
    with zipfile.ZipFile(home / "own.zip", "w") as file:
        file.writestr("benign/a.png", b"film")
    assert "no Info.txt; films of your own" in refused(common.extract, home / "own.zip", folder)
    assert {path.name for path in raw.iterdir()} <= {path.name for path in folder.iterdir()}


def test_a_zip_made_on_a_mac_gives_the_films_alone(raw, home):
    packed(raw, home / "a.zip")
    with zipfile.ZipFile(home / "a.zip", "a") as file:
        file.writestr("__MACOSX/._mdb001.pgm", b"\0\5\x16\7")
    folder = common.extract(home / "a.zip", home / "data" / "raw")
    names = [path.stem for path in common.film_paths(folder)]
    assert names == [f"mdb{n:03d}" for n in range(1, 25)]


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tar.bz2", "a.tar.xz", "a.zip"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "empty"])
def test_a_damaged_archive_is_refused_and_named(raw, home, name, damage):
    archive = packed(raw, home / name)
    data = archive.read_bytes()
    half = len(data) // 2
    noise = bytes(255 - byte for byte in data[half : half + 99])
    changed = {"cut": data[:half], "flipped": data[:half] + noise + data[half + 99 :]}
    archive.write_bytes({**changed, "text": b"<html>404</html>" * 99, "empty": b""}[damage])
    message = refused(common.extract, archive, home / "data" / "raw")
    assert str(archive) in message and "damaged" in message
    assert list((home / "data").iterdir()) == []


def test_an_archive_with_a_password_or_without_films_is_refused_and_the_old_films_stay(raw, home):
    folder = common.extract(packed(raw, home / "good.tar"), home / "data" / "raw")
    old = sorted(folder.iterdir())
    data = bytearray(packed(raw, home / "secret.zip").read_bytes())
    data[6] = data[data.index(b"PK\1\2") + 8] = 1  # the flag of an encrypted member
    (home / "secret.zip").write_bytes(data)
    with zipfile.ZipFile(home / "empty.zip", "w"), tarfile.open(home / "empty.tar", "w"):
        pass
    with zipfile.ZipFile(home / "text.zip", "w") as file:
        file.writestr("Info.txt", "mdb001 G NORM")
    for name, reason in [
        ("secret.zip", "encrypted"),
        *[(f"{n}", "holds no film") for n in ("empty.zip", "empty.tar", "text.zip")],
    ]:
        message = refused(common.extract, home / name, folder)
        assert str(home / name) in message and reason in message
        assert sorted(folder.iterdir()) == old and list(folder.parent.iterdir()) == [folder]


def test_an_archive_that_changed_under_its_name_and_size_is_unpacked_again(raw, home):
    archive = packed(raw, home / "a.tar")
    folder = common.extract(archive, home / "data" / "raw")
    text = (folder / "Info.txt").read_bytes()
    other = text.replace(b"CIRC B", b"CIRC M")
    archive.write_bytes(archive.read_bytes().replace(text, other))
    os.utime(archive, ns=(0, 0))
    common.extract(archive, folder)
    assert (folder / "Info.txt").read_bytes() == other != text


def test_a_missing_archive_or_foreign_files_in_the_way_are_named(raw, home):
    assert "nowhere.tar" in refused(common.extract, home / "nowhere.tar", home / "data" / "raw")
    folder = _made(home / "data" / "raw")
    (folder / "thesis.txt").write_text("mine")
    archive = packed(raw, home / "a.tar")
    assert "not ours" in refused(common.extract, archive, folder)
    assert (folder / "thesis.txt").read_text() == "mine"


# ---------------------------------------------------------------------- (h) downloading


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Do what takes long side by side: a script, for torch is slow to import, and a silent server.

    The server takes connections and never answers.
    """
    home = tmp_path_factory.mktemp("commands")
    wrong = ("01_prepare_data.py", "--images", home / "nowhere")
    auto, strict = prepare.Settings(**{**TINY, "source": "auto"}), prepare.Settings(source="mias")

    def find_mias():
        start = time.monotonic()
        return refused(common.find_films, strict), time.monotonic() - start

    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        url = f"http://127.0.0.1:{server.getsockname()[1]}/all-mias.tar.gz"
        variables = {"BCD_DATA_DIR": home / "data", "MIAS_URL": url, "no_proxy": "127.0.0.1"}
        for name, value in variables.items():
            patch.setenv(name, str(value))
        patch.delenv("MIAS_ARCHIVE", raising=False)
        said = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        pool = stack.enter_context(ThreadPoolExecutor(4))
        jobs = {"silent mias": pool.submit(find_mias)}
        jobs["silent auto"] = pool.submit(common.find_films, auto)
        jobs["bad path"] = pool.submit(run_script, *wrong, BCD_DATA_DIR=home / "scripts")
        jobs = {key: job.result() for key, job in jobs.items()}
        return {**jobs, "said": said.getvalue()}


class Mirror(http.server.ThreadingHTTPServer):
    """A server on loopback whose `data` arrives whole only while it is `healthy`."""

    daemon_threads = True
    data, healthy = b"", True


class Answer(http.server.BaseHTTPRequestHandler):
    """Answer GET whole or only by half."""

    def do_GET(self):  # noqa: D102
        data = self.server.data
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(OSError):  # a client may hang up
            self.wfile.write(data if self.server.healthy else data[: len(data) // 2])

    def log_message(self, *arguments):
        """Keep quiet."""


@pytest.fixture
def mirror(raw, home, monkeypatch):
    """Serve the phantoms as all-mias.tar.gz, under MIAS_URL."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Mirror(("127.0.0.1", 0), Answer) as server:
        server.data = packed(raw, home / "served.tar.gz").read_bytes()
        monkeypatch.setenv("MIAS_URL", f"http://127.0.0.1:{server.server_port}/all-mias.tar.gz")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_the_database_is_downloaded_once_and_its_licence_shown(mirror, raw, capsys):
    source, folder, files = common.find_films(prepare.Settings())
    assert source == "mias" and files["kind"].value_counts().to_dict() == {"film": 24, "text": 1}
    assert "research purposes only" in capsys.readouterr().out
    mirror.data = b""
    assert common.find_films(prepare.Settings())[:2] == ("mias", folder)
    assert "downloading" not in capsys.readouterr().out


def test_a_connection_that_breaks_off_leaves_nothing_in_the_way(mirror, home):
    mirror.healthy = False
    message = refused(common.find_films, prepare.Settings(source="mias"))
    assert "all-mias.tar.gz is damaged" in message and "get it again" in message
    assert list((home / "data" / "mias").glob("*")) == []
    mirror.healthy = True
    assert common.find_films(prepare.Settings(source="mias"))[0] == "mias"


def test_a_download_that_is_no_archive_is_not_kept(mirror, home):
    good, mirror.data = mirror.data, b"<html>please log in</html>" * 99
    refused(common.find_films, prepare.Settings(source="mias"))
    mirror.data = good
    assert common.find_films(prepare.Settings(source="mias"))[0] == "mias"


@pytest.mark.parametrize(
    "writer", ["shutil.copyfileobj", "os.fsync", "torch.hub.download_url_to_file"]
)
def test_a_full_disk_is_no_failed_download_and_no_reason_for_phantoms(mirror, home, writer):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*patched(writer, OSError(errno.ENOSPC, "No space left on device")))
        message = refused(common.find_films, prepare.Settings())
    assert "the disk is full" in message and str(home / "data" / "mias") in message
    left = [path.name for path in (home / "data" / "mias").iterdir()]
    assert left in ([], ["all-mias.tar.gz"])  # the archive whole, or nothing
    assert common.find_films(prepare.Settings())[0] == "mias"


def test_a_silent_server_is_known_within_15_seconds_and_phantoms_take_over_under_auto(finished):
    message, seconds = finished["silent mias"]
    assert "could not be downloaded" in message and seconds < 15
    assert "no answer" in message or "timed out" in message
    source, _, files = finished["silent auto"]
    assert source == "phantom" and (files["kind"] == "film").sum() == 24
    assert "!! NO MIAS DATABASE" in finished["said"] and "SYNTHETIC PHANTOMS" in finished["said"]


# ---------------------------------------------------------------------- (i) again, and crashes


def contents(folder):
    """Return {name: digest} of a folder's files, apart from the raw films and the lock."""
    files = [path for path in folder.iterdir() if path.is_file() and path.name != ".lock"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_second_run_replaces_nothing_and_a_changed_setting_what_it_must(home):
    first = prepare_data(**TINY)
    files = [path for path in first.folder.glob("*.*") if path.name != "prepared.json"]
    times = {path: path.stat().st_mtime_ns for path in files}
    start = time.perf_counter()
    again = prepare_data(**TINY)
    assert time.perf_counter() - start < 2 and len(files) == 5
    assert times == {path: path.stat().st_mtime_ns for path in files}
    assert again.fingerprint == first.fingerprint
    old = contents(first.folder)
    prepare_data(**{**TINY, "folds": 2})
    assert {path for path in files if path.stat().st_mtime_ns != times[path]} == {
        first.folder / "splits.csv"
    }
    new = contents(first.folder)
    assert {name for name in new if new[name] != old[name]} == {"splits.csv", "prepared.json"}
    wider = prepare_data(**{**TINY, "size": "64x96"})
    assert wider.films.shape == (24, 64, 96) and wider.fingerprint != first.fingerprint


def test_patients_typed_as_numbers_are_the_same_labels():
    labels = pd.DataFrame({"image": ["a", "b"], "patient": ["1", "2"], "label": [0, 1]})
    assert common.edits(labels.assign(patient=[1, 2]), labels, 2, {}) == ""
    assert "1 changed" in common.edits(labels.assign(label=[0, 2]), labels, 2, {})


def test_a_crash_at_any_moment_leaves_no_half_state_and_the_next_run_repairs_it(home, monkeypatch):
    folder, replace = common.data_dir("phantom"), os.replace
    choices = [{**TINY, "size": f"{64 + n}x64", "folds": 2 + n} for n in (0, 1)]
    whole = []
    for choice in choices:
        prepare_data(**choice)
        whole.append(contents(folder))
    for moment in range(99):
        moves = itertools.count()

        def crash(old, new, moves=moves, moment=moment):
            if next(moves) == moment:
                raise KeyboardInterrupt
            replace(old, new)

        monkeypatch.setattr(os, "replace", crash)
        with contextlib.suppress(KeyboardInterrupt):
            prepare_data(**choices[moment % 2])
        monkeypatch.setattr(os, "replace", replace)
        if next(moves) <= moment:
            break
        assert not list(folder.glob(".*.part"))
        with contextlib.suppress(UserError):  # "was the step before this one run?"
            common.load_prepared("phantom")
            assert contents(folder) in whole
        prepare_data(**choices[moment % 2])
        assert contents(folder) == whole[moment % 2]
    assert moment >= 6  # films.npy, films.csv, labels.csv, findings.csv, the state, the folds


# ---------------------------------------------------------------------- (j) edited data

FATTY = 'labels = labels[labels["tissue"] == "F"]'
MIDDLE = {**TINY, "patients": 24, "folds": 2}
MALIGNANT = "labels.loc[labels.index[labels['label'] == 1][:2], {columns}] = {values}"


@pytest.mark.parametrize("cell", ["Read the labels", "Check every film"])
def test_labels_filtered_between_two_cells_are_what_is_prepared(home, cell):
    prepared = prepare_data({cell: FATTY}, **MIDDLE)
    films = np.array(prepared.films)
    labels, splits, stamp = (
        common.read_table(prepared.folder / "labels.csv"),
        common.read_table(prepared.folder / "splits.csv"),
        common.read_json(prepared.folder / "prepared.json"),
    )
    assert len(labels) == 16 and set(labels["tissue"]) == {"F"}
    assert splits["image"].equals(labels["image"]) and set(splits["fold"]) == {0, 1}
    assert prepared.note == stamp["note"] == "labels edited, 16 of 48"
    whole = prepare_data(**MIDDLE)
    assert len(whole.films) == 48 and whole.note == ""
    assert np.array_equal(films, np.load(whole.folder / "films.npy")[whole.labels["tissue"] == "F"])
    circles = whole.findings[whole.findings["image"].isin(labels["image"])].reset_index(drop=True)
    assert len(circles) > 2 and prepared.findings.equals(circles)


def test_the_fatty_films_of_mias_are_106_of_322(mias, home):
    choice = {"source": "mias", "images": str(mias.folder / "raw"), "size": "64x64"}
    prepared = prepare_data({"Read the labels": FATTY}, **choice)
    fatty = mias.labels["tissue"] == "F"
    assert len(prepared.films) == len(prepared.splits) == 106
    assert prepared.labels.equals(mias.labels[fatty].reset_index(drop=True))
    assert prepared.note == "labels edited, 106 of 322"


SPLIT = "Split patients, never films"


def test_labels_filtered_to_nothing_or_too_late_are_refused_with_a_message(home):
    nothing = 'labels = labels[labels["tissue"] == "X"]'
    assert "label" in refused(prepare_data, {"Read the labels": nothing}, **TINY)
    assert "run the cell 'Split patients'" in refused(prepare_data, {SPLIT: FATTY}, **MIDDLE)


def test_findings_edited_after_their_circles_were_placed_are_refused(home):
    circles = "Circles, from film to canvas"
    late = [FATTY, "used_labels = common.labels_of(usable, labels)"]
    late.append(
        "splits = splits[splits['image'].isin(used_labels['image'])].reset_index(drop=True)"
    )
    for code in ("findings = findings[1:]", "\n".join(late)):
        message = refused(prepare_data, {circles: code}, **MIDDLE)
        assert "labels or findings changed: run the cell 'Split patients'" in message


def test_splits_edited_between_two_cells_are_used_and_noted_or_refused(home):
    first = prepare_data(**TINY).splits
    one = "splits.loc[0, 'fold'] = (splits['fold'][0] + 1) % 3"
    assert "patients in two folds" in refused(prepare_data, {SPLIT: one}, **TINY)
    prepared = prepare_data({SPLIT: "splits['fold'] = 2 - splits['fold']"}, **TINY)
    assert prepared.splits["fold"].equals(2 - first["fold"]) and "edited" in prepared.note


def test_relabelled_rows_are_counted_and_half_a_correction_is_refused(home, capsys):
    half = MALIGNANT.format(columns="'label'", values=2)
    message = refused(prepare_data, {"Read the labels": half}, **TINY)
    assert "label and label_name contradict" in message
    assert "prepared.json is not there" in refused(common.load_prepared, "phantom")
    whole = MALIGNANT.format(columns="['label', 'label_name']", values="[2, 'malignant']")
    prepared = prepare_data({"Read the labels": whole}, **TINY)
    assert prepared.note == "labels edited, 24 of 24, 2 changed"
    capsys.readouterr()
    assert common.open_prepared().note == prepared.note
    assert "2 changed; figures are not the database's" in capsys.readouterr().err
    assert prepare_data({"Read the labels": "findings = findings[1:]"}, **TINY).note == (
        "findings edited"
    )


def test_every_cell_that_works_run_twice_gives_the_same_and_says_no_more(home, capsys):
    prepare_data(**{**TINY, "folds": 2})  # there is something to replace
    once = contents(prepare_data(**TINY).folder)
    prepare_data(**{**TINY, "folds": 2})
    capsys.readouterr()
    assert contents(prepare_data(times=2, **TINY).folder) == once
    assert capsys.readouterr().err == ""


def moved(splits, seed, films=2):
    """Return the splits in another order, a patient's films (or one of them) in another fold."""
    splits = splits.sample(frac=1, random_state=seed)
    chosen = splits.index[splits["patient"] == splits["patient"].iloc[0]][:films]
    splits.loc[chosen, "fold"] = (splits["fold"].iloc[0] + 1) % 3
    return splits


def test_splits_edited_by_hand_are_used_and_named_and_the_next_run_keeps_them(home, capsys):
    first = prepare_data(**TINY)
    for number in (1, 2):
        edited = moved(first.splits, seed=number)
        edited.to_csv(first.folder / "splits.csv", index=False)
        prepared = common.load_prepared("phantom")
        assert prepared.note == "splits.csv edited by hand"
        assert prepared.splits.equals(edited.sort_index())
        assert prepared.identity()["split"] != first.identity()["split"]
        text = (first.folder / "splits.csv").read_bytes()
        capsys.readouterr()
        again = prepare_data(**TINY)
        assert again.note == "" and again.splits.equals(first.splits)
        kept = first.folder / f"splits.edited-{number}.csv"
        assert kept.read_bytes() == text
        said = capsys.readouterr().err
        assert "was edited by hand" in said and kept.name in said
    (first.folder / "splits.edited-1.csv").unlink()
    moved(first.splits, seed=3).to_csv(first.folder / "splits.csv", index=False)
    prepare_data(**TINY)
    assert kept.read_bytes() == text  # edited-2 is not replaced by the third


def test_splits_with_a_patient_on_both_sides_are_refused_and_kept_all_the_same(home):
    first = prepare_data(**TINY)
    edited, path = moved(first.splits, seed=1, films=1), first.folder / "splits.csv"
    edited.to_csv(path, index=False)
    text, patient = path.read_bytes(), edited["patient"].iloc[0]
    message = refused(common.load_prepared, "phantom")
    said = f"patients in two folds of splits.csv; their films must share one: {patient}"
    assert said in message
    assert prepare_data(**TINY).splits.equals(first.splits)
    assert (first.folder / "splits.edited-1.csv").read_bytes() == text


def test_labels_edited_by_hand_are_used_and_kept_or_refused_where_they_contradict(home):
    first = prepare_data(**TINY)
    path, labels = first.folder / "labels.csv", first.labels.copy()
    n = labels.index[labels["label"] == common.NORMAL][0]
    labels.loc[n, "label"] = common.MALIGNANT
    labels.to_csv(path, index=False)
    assert f"contradict: {labels['image'][n]}" in refused(common.load_prepared, "phantom")
    labels.drop(columns="laterality").to_csv(path, index=False)
    assert "not whole ('laterality')" in refused(common.load_prepared, "phantom")
    labels.loc[n, "label_name"] = "malignant"
    labels.to_csv(path, index=False)
    prepared = common.load_prepared("phantom")
    assert prepared.labels.equals(labels) and prepared.note == "labels.csv edited by hand"
    assert prepared.fingerprint != first.fingerprint
    labels.astype({"label": float}).to_csv(path, index=False, sep=";")  # as Excel saves it
    assert common.load_prepared("phantom").labels.equals(labels)
    text = labels.to_csv(index=False)
    for old, new, what in [
        (text[text.index("mdb003") :].split("\n")[0] + "\n", "", "no row for the films: mdb003"),
        ("2,malignant", ",malignant", "label is no whole number in line: "),
        ("mdb002", "mdb001", "a film that is there twice, in line: 3"),
    ]:
        path.write_text(text.replace(old, new))
        assert what in refused(common.load_prepared, "phantom")
    labels.to_csv(path, index=False)
    assert prepare_data(**TINY).fingerprint == first.fingerprint
    kept = first.folder / "labels.edited-1.csv"
    assert common.read_table(kept).equals(labels)


def test_an_edited_films_csv_is_refused(home):
    folder = prepare_data(**TINY).folder
    films = common.read_table(folder / "films.csv").sort_values("mean")
    films.to_csv(folder / "films.csv", index=False)
    assert "films.csv was edited" in refused(common.load_prepared, "phantom")


def test_a_circle_that_an_edited_label_denies_is_named_and_not_taught(home, capsys):
    first = prepare_data(**TINY)
    path, labels = first.folder / "labels.csv", first.labels.copy()
    image = first.findings["image"][0]
    labels.loc[labels["image"] == image, ["label", "label_name"]] = common.NORMAL, "normal"
    labels.to_csv(path, index=False)
    findings = common.load_prepared("phantom").findings
    assert image not in set(findings["image"]) and len(findings) < len(first.findings)
    assert f"labels deny, and that are not taught: {image}" in capsys.readouterr().err
    labels.loc[labels["label"] == common.MALIGNANT, ["label", "label_name"]] = 0, "benign"
    labels.to_csv(path, index=False)
    assert set(common.load_prepared("phantom").findings["severity"]) <= {"B"}


NEW = """def read_mine(folder, files, settings):
    names = [path.stem for path in files["path"]]
    label = pd.Series([0, 1, 2] * 4)
    labels = pd.DataFrame({"image": names, "patient": names, "laterality": "left", "tissue": "F"})
    labels = labels.assign(label=label, label_name=label.map(dict(enumerate(common.CLASS_NAMES))))
    findings = [(names[0], "CIRC", "B", 30, 64, 9)]
    findings = pd.DataFrame(findings, columns=common.FINDINGS)
    return labels.assign(findings=0)[common.LABELS], findings


READERS = {"mine": read_mine, """


def test_a_new_database_is_one_reading_function_and_one_name(home, raw, monkeypatch):
    script = copy_scripts(home / "copy") / "01_prepare_data.py"
    text = script.read_text(encoding="utf-8")
    assert text.count("READERS = {") == 1
    script.write_text(text.replace("READERS = {", NEW), encoding="utf-8")
    choice = {**own_films(home), "source": "mine", "labels": ""}
    prepared = prepare_data(path=script, **choice)
    assert prepared.folder == common.data_dir("mine") and prepared.note == ""
    assert prepared.films.shape == (12, 64, 64) and not prepared.table["mirrored"].any()
    assert prepared.findings["canvas_radius"].between(2, 9).tolist() == [True]
    assert common.open_prepared().labels.equals(prepared.labels)
    monkeypatch.setenv("MIAS_ARCHIVE", str(packed(raw, home / "a.tar")))
    assert "--images" in refused(prepare_data, path=script, **{**choice, "images": ""})


# ---------------------------------------------------------------------- (k) splits


a_patient = st.lists(st.integers(0, 2), min_size=1, max_size=3)


@some
@given(st.lists(a_patient, min_size=12), st.integers(2, 5))
def test_patients_are_never_split_and_every_fold_is_used(patients, folds):
    patients += [[label] for label in (0, 1, 2) for _ in range(folds)]
    rows = [
        (f"{n}-{k}", str(n), c) for n, films in enumerate(patients) for k, c in enumerate(films)
    ]
    labels = pd.DataFrame(rows, columns=["image", "patient", "label"])
    fold = common.deal_patients(labels, folds, 0, fewest=folds)
    assert fold.index.equals(labels.index)
    assert fold.groupby(labels["patient"]).nunique().max() == 1
    assert set(fold) == set(range(folds))


@pytest.fixture
def like_mias():
    """Return labels of 161 patients with the class mix of MIAS."""
    pairs = [(1, 1)] * 53 + [(1, 0)] * 55 + [(2, 1)] * 46 + [(2, 0)] * 6 + [(0, 0)]
    rows = [(f"{n}{k}", str(n), pair[k]) for n, pair in enumerate(pairs) for k in (0, 1)]
    return pd.DataFrame(rows, columns=["image", "patient", "label"])


def test_folds_are_stratified_and_the_seed_alone_decides_them(like_mias):
    fold = common.deal_patients(like_mias, 5, 0, fewest=5)
    mix = pd.crosstab(fold, common.worst(like_mias["label"], like_mias["patient"])) / 2
    assert (mix.max() - mix.min()).max() <= 1, mix
    assert fold.equals(common.deal_patients(like_mias, 5, 0, fewest=5))
    mixed = like_mias.sample(frac=1, random_state=0)
    assert common.deal_patients(mixed, 5, 0, fewest=5).sort_index().equals(fold)
    told = "".join(map(str, fold[::2]))  # the same with scikit-learn 1.2, 1.5, 1.7, 1.8 and 1.9
    assert hashlib.sha256(told.encode()).hexdigest()[:8] == "39d79e5d"
    assert not fold.equals(common.deal_patients(like_mias, 5, 1, fewest=5))


def test_the_parts_of_a_fold_share_no_patient_and_leave_no_film_out(like_mias):
    splits = like_mias.assign(fold=common.deal_patients(like_mias, 5, 0, fewest=5))
    prepared = SimpleNamespace(labels=like_mias, splits=splits)
    for fold in range(5):
        parts = dataset.fold_parts(prepared, fold)
        assert sorted(np.concatenate(list(parts.values()))) == list(range(322))
        patients = [set(splits["patient"].iloc[rows]) for rows in parts.values()]
        assert sum(map(len, patients)) == 161
        assert all(set(like_mias["label"].iloc[rows]) == {0, 1, 2} for rows in parts.values())
    assert dataset.named_folds("0, 4", splits) == [0, 4]
    assert "expected 0 to 4, all or none" in refused(dataset.named_folds, "5", splits)
    fold = splits["fold"][0]
    splits.loc[0, "fold"] = (fold + 1) % 5  # the patient's other film stays
    with pytest.raises(AssertionError, match="two parts"):
        dataset.fold_parts(prepared, fold)


# ---------------------------------------------------------------------- (l) the command line


@pytest.mark.parametrize("name", sorted(path.name for path in PROJECT.glob("0*.py")))
def test_all_five_scripts_explain_themselves(name, capsys):
    with pytest.raises(SystemExit) as end:
        run_main(name, help=True)
    out, err = capsys.readouterr()
    assert end.value.code == 0 and err == "" and "--debug" in out
    assert f"python {name}" in out
    if name.startswith("01"):
        assert "data/<source>/labels.csv" in out and "parts of the cross-validation" in out
        assert "of every random choice in this script" in out


def test_a_canvas_wider_than_high_is_named_and_one_of_no_size_refused_at_once(home, capsys):
    choice = own_films(home)
    prepare_data(**{**choice, "size": "64x96"})
    assert "--size 64x96 is HEIGHTxWIDTH: wider than high" in capsys.readouterr().err
    prepare_data(**{**choice, "size": "64x96", "crop": "none"})
    assert "HEIGHT" not in capsys.readouterr().err
    assert "--size 5 is no canvas" in refused(prepare_data, size="5", images=str(home / "no"))


def test_an_unknown_source_is_refused_with_those_there_are(home):
    message = refused(common.find_films, prepare.Settings(source="mia"))
    assert "--source mia: expected auto, mias, phantom or own" in message
    choice = {**own_films(home), "source": "mia"}
    assert "--source mia: expected auto, mias, phantom, own" in refused(prepare_data, **choice)


def test_a_mistake_ends_with_one_message_and_a_status(finished, home, capsys):
    done = finished["bad path"]
    assert done.returncode == 1 and "nowhere is no folder" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr
    with pytest.raises(SystemExit) as end:
        run_main("01_prepare_data.py", archve="a.zip")
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "did you mean --archive?" in line
    with common.locked(common.data_dir()):
        assert "another process is writing to" in refused(prepare_data, **TINY)


def test_a_name_that_the_console_cannot_show_and_a_backend_that_is_not_there_end_nothing(home):
    choice = own_films(_made(home / "\u6f22\u5b57"))
    done = run_script(
        "01_prepare_data.py", *scripts.flags(**choice), PYTHONIOENCODING="cp1252",
        MPLBACKEND="module://matplotlib_nowhere.backend_inline",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "\\u6f22\\u5b57" in done.stdout
    assert (home / "data" / "own" / "figures" / "one-film.png").stat().st_size > 1000


@pytest.mark.skipif(os.name == "nt", reason="Windows locks by another function")
@pytest.mark.parametrize("code", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_a_drive_without_locks_is_no_other_process(home, monkeypatch, capsys, code):
    error = OSError(getattr(errno, code), os.strerror(getattr(errno, code)))
    monkeypatch.setattr("fcntl.flock", mock.Mock(side_effect=error))
    with common.locked(home):
        assert f"{home} cannot be locked ({error.strerror})" in capsys.readouterr().err


# ---------------------------------------------------------------------- phantoms


def test_phantoms_are_the_same_for_a_seed_whatever_their_number(raw, home):
    for name, patients, seed in [("same", 12, 0), ("more", 13, 0), ("other", 12, 1)]:
        common.make_phantoms(_made(home / name), patients, seed, 128)
    for path in raw.iterdir():
        assert (home / "same" / path.name).read_bytes() == path.read_bytes()
        if path.suffix == ".pgm":
            assert (home / "more" / path.name).read_bytes() == path.read_bytes()
            assert (home / "other" / path.name).read_bytes() != path.read_bytes()


def test_phantoms_have_the_quirks_of_the_database_and_lesions_that_can_be_seen(raw):
    text = (raw / "Info.txt").read_text()
    assert "NORM \n" in text and "*NOTE 3*" in text and "    mdb001" in text
    labels, findings = prepare.parse_info(text, 128)
    worse = common.worst(labels["label"], labels["patient"])
    worse = worse.groupby(labels["patient"]).first().value_counts()
    assert worse.to_dict() == {0: 4, 1: 4, 2: 4} and (labels["findings"] > 1).any()
    assert findings["x"].isna().any()


def test_phantom_lesions_are_brighter_than_their_surroundings(phantoms):
    contrast = []
    raw, findings = phantoms.folder / "raw", phantoms.findings.dropna(subset=["radius"])
    for lesion in findings.itertuples():
        film = common.read_film(raw / f"{lesion.image}.pgm").astype(float)
        contrast.append(brightness_inside(film, lesion.x, lesion.y, lesion.radius))
    assert np.mean(contrast) > 8 and np.mean(np.array(contrast) > 0) > 0.8, contrast
