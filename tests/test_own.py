"""A database of one's own is read right, refused with its film or line, or named in a warning."""

import importlib
import os
import re
import struct
import subprocess
import sys
import zlib

import conftest
import numpy as np
import pandas as pd
import pytest
import scripts
import torch
from conftest import prepare, prepare_data, run_main
from PIL import Image
from test_prepare import _made, breast, refused
from torchvision.models.resnet import BasicBlock, ResNet

import common
from common import MALIGNANT, NORMAL

network, training = importlib.import_module("03_model"), scripts.definitions("04_train")


def film(seed=0, side="left", size=128):
    """Draw a breast on black with a bright muscle at the top of the chest wall, uint8."""
    y, x = np.mgrid[:size, :size] / size
    picture = np.where(breast(seed, "left", size) > 30, breast(seed, "left", size), 0)
    picture = np.where((x / 0.2 + y / 0.35 < 1) & (picture > 0), 180, picture).astype(np.uint8)
    return picture[:, ::-1].copy() if side == "right" else picture


def table(home, text, encoding="utf-8", name="mine.csv"):
    """Write a table; return its path."""
    (home / name).write_bytes(text.encode(encoding))
    return home / name


def labels_of(home, text, classes="", **options):
    """Read a table of labels, without a folder."""
    return common.read_own_labels(table(home, text, **options), None, classes)


def saved(home, films, header="image,label,patient", rows=None):
    """Write films {name: array} as files, and a table; return the settings."""
    for name, pixels in films.items():
        (home / "scans" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(home / "scans" / name)
    names = dict(enumerate(common.CLASS_NAMES))
    rows = rows or [f"{name},{names[n % 3]},p{n}" for n, name in enumerate(films)]
    path = table(home, "\n".join([header, *rows]))
    return {"images": str(home / "scans"), "labels": str(path), "size": "64x64", "folds": 2}


def many(**changed):
    """Return 12 films by name, some of them changed."""
    return {**{f"f{n:02d}.png": film(n) for n in range(12)}, **changed}


# ---------------------------------------------------------------------- A. labels and patients


def test_1_digits_count_only_as_0_1_and_2_or_as_classes_says(home, capsys):
    text = "image,label,patient\na,0,p1\nb,1,p1\nc,1,p2\n"
    assert '--classes "0=normal' in refused(labels_of, home, text)
    found = labels_of(home, text, "0=normal,1=malignant")
    assert found["label"].tolist() == [NORMAL, MALIGNANT, MALIGNANT]
    assert found["label_name"].tolist() == ["normal", "malignant", "malignant"]
    words = labels_of(home, text.replace("0", "healthy"), "healthy=Normal, 1=malignant")
    assert words["label"].equals(found["label"])
    all_three = labels_of(home, "image,label,patient\na,0.0,p1\nb,1.0,p1\nc,2.0,p2\n")
    assert all_three["label"].tolist() == [0, 1, 2]
    assert "0 is taken for benign, 1 for normal, 2 for malignant" in capsys.readouterr().err
    assert "BI-RADS" in refused(labels_of, home, "image,label\na,1\nb,2\nc,5\n")
    assert "--classes" in refused(labels_of, home, "image,label\na,cancer\n")
    assert '"0=normal' in refused(labels_of, home, text, "0=healthy")
    for twice in ("0=normal,1=malignant,1=benign", "benign=malignant"):
        assert "has two meanings" in refused(labels_of, home, text, twice)


def test_1_a_second_column_that_names_the_class_may_not_contradict(home):
    text = "image,label,pathology,patient\na,{},BENIGN,p1\nb,{},MALIGNANT,p1\nc,{},x,p2\n"
    ours, theirs = (text.format(*codes) for codes in ("021", "120"))
    assert labels_of(home, ours)["label"].tolist() == [0, 2, 1]
    assert '"pathology" contradict in line: 2' in refused(labels_of, home, theirs)
    text = "image,class,pathology,age\na,0,cancer,1\nb,1,cancer,0\n"
    refusal = refused(labels_of, home, text, "0=normal,1=malignant,cancer=malignant")
    assert '"pathology" contradict in line: 2' in refusal


def test_1_two_classes_are_enough_and_the_third_is_said_to_be_absent(home, monkeypatch, capsys):
    conftest.small_network(monkeypatch)
    rows = [f"f{n:02d}.png,{n % 2},p{n}" for n in range(12)]
    choice = saved(home, many(), rows=rows)
    run_main("01_prepare_data.py", **choice, classes="0=normal,1=malignant")
    run_main("04_train.py", weights="none", epochs=1, freeze=5, validation=0.5, fold="all")
    done = run_main("05_evaluate.py", resamples=20)
    said = capsys.readouterr()
    assert "1 classes have no film to train on, and are not learned: benign" in said.out + said.err
    assert re.search(r"benign recall +-  ", said.out) and not re.search(
        r"\bnan\b", said.out.lower()
    )
    assert "RuntimeWarning" not in said.err
    assert done.metrics["value"]["macro F1"] > 0


def test_1_words_of_mias_may_be_labels_and_other_questions_answered_with_yes(home):
    found = labels_of(home, "image,label,patient\na,NORM,1\nb,b,2\nc,M,3\n")
    assert found["label"].tolist() == [1, 0, 2]
    text = "image,cancer,implant,patient\na,yes,no,1\nb,no,yes,2\n"
    assert labels_of(home, text, "yes=malignant,no=normal")["label"].tolist() == [2, 1]


def test_3_a_number_in_a_folders_name_makes_no_copies(home, capsys):
    rows = [f"set2/{c} ({n}),{c},," for n in range(4) for c in common.CLASS_NAMES]
    found = labels_of(home, "\n".join(["image,label,tissue,age", *rows]))
    assert found["patient"].nunique() == 12 and "copies" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["patient_id", "PatientID", "Patient", "subject", "case", "id", "Patient ID"]
)
def test_2_a_patient_column_is_known_by_its_usual_names(home, name, capsys):
    found = labels_of(
        home, f"File Name,Class,{name},View,Age\na.png,benign,7,L,50\nb,normal,7,R,50"
    )
    assert found["patient"].tolist() == ["7", "7"]
    assert found["laterality"].tolist() == ["left", "right"]
    said = capsys.readouterr().out
    assert '"File Name" is taken for image' in said and "not used: Age" in said
    assert name == "Patient" or f'"{name}" is taken for patient' in said


def test_3_a_patient_written_in_two_ways_is_one_and_said(home, capsys):
    names = ["P01", "p01", "P1", " P1 ", "P10", "007", "7"]
    rows = "\n".join(f"f{n},normal,{name}" for n, name in enumerate(names))
    found = labels_of(home, f"image,label,patient\n{rows}")
    assert found["patient"].tolist() == ["P01"] * 4 + ["P10"] + ["007"] * 2
    assert "same patients" in capsys.readouterr().err
    labels_of(home, "image,label,patient\na,benign,NA\nb,normal,NA\nc,normal,2.0\nd,normal,2")
    assert "2 films of patient NA count as one" in capsys.readouterr().err
    text = "image;label;patient\na;benign;1,2345E+11\nb;normal;ANONYMOUS\nc;normal;-1\nd;normal;3"
    labels_of(home, text)
    assert "patient 1,2345E+11, ANONYMOUS, -1 count as one" in capsys.readouterr().err
    found = labels_of(home, "image,label,patient\na,benign,P1\nb,normal,P-1\nc,normal,p_01\n")
    assert found["patient"].nunique() == 1 and "P-1, P1, p_01" in capsys.readouterr().err


def test_3_numbered_or_rounded_patients_stay_patients_and_a_constant_is_none(home, capsys):
    rows = [f"f{n},{common.CLASS_NAMES[n % 3]}," for n in range(12)]
    for name, asked in {"ANON{:04d}": False, "2.0190{}E+11": True, "removed": True}.items():
        lines = [row + name.format(n // 2) for n, row in enumerate(rows)]
        found = labels_of(home, "\n".join(["image,label,patient", *lines]))
        assert found["patient"].nunique() == (12 if name == "removed" else 6)
        said = capsys.readouterr().err
        assert ("missing values" in said or "no patient column" in said) is asked
        assert ("no patient column" in said) is (name == "removed")


def test_3_a_film_saved_again_under_another_patient_is_named(home, capsys):
    films = {f"f{n:02d}.png": common.phantom_film(0, n + 1, 256)[0] for n in range(12)}
    twelve = [f"{name},{('normal', 'malignant')[n // 2 % 2]}," for n, name in enumerate(films)]
    choice = saved(home, films, rows=[f"{row}p{n}" for n, row in enumerate(twelve)])
    prepare_data(**choice)
    assert "look alike" not in capsys.readouterr().err
    for n, copy in {1: films["f00.png"][:, ::-1], 3: np.minimum(films["f02.png"], 250) + 5}.items():
        Image.fromarray(copy).save(home / "scans" / f"f{n:02d}.png")
    prepare_data(**choice)
    said = capsys.readouterr().err
    assert "2 pairs of films look alike" in said and "f00 and f01, f02 and f03" in said
    table(
        home, "\n".join(["image,label,patient", *(f"{r}p{n // 2}" for n, r in enumerate(twelve))])
    )
    prepare_data(**choice)  # of one patient they may
    assert "look alike" not in capsys.readouterr().err


TABLE = "image,label,patient\na,benign,ä\nb,normal,ä\n"
WRITTEN = {
    "semicolons": (TABLE.replace(",", ";"), "utf-8"),
    "tabs": (TABLE.replace(",", "\t"), "utf-8"),
    "sep=;": ("sep=;\n" + TABLE.replace(",", ";"), "utf-8"),
    "BOM": (TABLE, "utf-8-sig"),
    "cp1252": (TABLE, "cp1252"),
    "UTF-16": (TABLE, "utf-16"),
    "CR": (TABLE.replace("\n", "\r"), "utf-8"),
    "CRLF": (TABLE.replace("\n", "\r\n"), "utf-8"),
    "blank rows and columns": ("\n" + TABLE.replace("\n", ",,\n") + ",,,,\n,,,,\n", "utf-8"),
    "commas at the end of rows": (TABLE.replace("ä\n", "ä,,\n"), "utf-8"),
    "quotes": (TABLE.replace("a,", '"a",'), "utf-8"),
    "row names of pandas": (",image,label,patient\n0,a,benign,ä\n1,b,normal,ä\n", "utf-8"),
}


@pytest.mark.parametrize("text, encoding", WRITTEN.values(), ids=WRITTEN)
def test_4_a_table_is_read_however_it_was_saved(home, text, encoding):
    found = labels_of(home, text, encoding=encoding)
    assert found["image"].tolist() == ["a", "b"] and found["patient"].tolist() == ["ä", "ä"]


def test_4_lines_are_counted_with_blank_ones_and_a_workbook_is_named(home):
    text = "\n\nimage,label\n\na,benign\n\nb,what\n"
    assert "In line: 7" in refused(labels_of, home, text)
    (home / "mine.xlsx").write_bytes(b"PK\3\4")
    assert "save it as CSV" in refused(common.read_own_labels, home / "mine.xlsx")


def test_5_films_lie_in_subfolders_and_only_a_known_suffix_is_cut_off(home):
    films = {
        "p1/L.png": film(0),
        "p2/L.png": film(1),
        "1.3.6.1.4.11.png": film(2),
        "P1.L.PNG": film(3),
    }
    rows = ["p1\\L.png,benign,1", "scans/p2/l,normal,2", "1.3.6.1.4.11,normal,3", "P1.L,benign,4"]
    choice = saved(home, films, rows=rows)
    files = common.list_files(home / "scans")
    found = common.read_own_labels(choice["labels"], files)
    assert found["image"].tolist() == ["p1/L", "scans/p2/l", "1.3.6.1.4.11", "P1.L"]
    paths, extra = common.match_films(found, files)
    assert {i: p.relative_to(home / "scans").as_posix() for i, p in paths.items()} == {
        "p1/L": "p1/L.png", "scans/p2/l": "p2/L.png", "1.3.6.1.4.11": "1.3.6.1.4.11.png",
        "P1.L": "P1.L.PNG",
    }  # fmt: skip
    vague = pd.DataFrame({"image": ["L"]})
    message = refused(common.match_films, vague, files)
    assert "several films could be meant" in message and message.endswith(" by: L")
    elsewhere = pd.DataFrame({"image": ["p3/L", "P1.L"]})  # p3/L is neither p1's nor p2's
    found, extra = common.match_films(elsewhere, files)
    assert set(found) == {"P1.L"} and extra == ["1.3.6.1.4.11", "p1/L", "p2/L"]


def test_5_films_below_linked_folders_are_found_and_accents_are_equal(home, capsys):
    saved(home, {"lë/a.png": film(0)})  # as macOS writes it, e and its dots apart
    saved(home, {"b.png": film(1)})
    (home / "elsewhere").mkdir()
    (home / "scans" / "b.png").rename(home / "elsewhere" / "b.png")
    (home / "scans" / "linked").symlink_to(home / "elsewhere")
    (home / "scans" / "linked" / "back").symlink_to(home / "scans")  # must not be walked for ever
    files = common.list_files(home / "scans")
    found, _ = common.match_films(pd.DataFrame({"image": ["l\u00eb/a", "linked/b"]}), files)
    assert len(found) == len(files) == 2 and set(files["kind"]) == {"film"}


def test_5_other_films_of_the_same_size_and_time_are_not_taken_for_the_old_ones(home):
    def written(first):
        choice = saved(home, {f"f{n:02d}.bmp": film(first + n) for n in range(12)})
        for path in (home / "scans").iterdir():
            os.utime(path, (10**9, 10**9))  # as some archives unpack them
        return choice

    before = np.array(prepare_data(**written(0)).films)
    assert np.array_equal(prepare_data(**written(0)).films, before)
    assert (prepare_data(**written(40)).films != before).any(axis=(1, 2)).all()


def test_5_a_missing_film_is_not_hidden_by_a_longer_name(home):
    choice = saved(home, {**many(), "b/late.png": film(30)})
    with open(choice["labels"], "a") as file:
        file.write("\nlate.png,normal,q1\n")
    assert "1 films are missing: late" in refused(prepare_data, **choice)


def test_5_images_that_are_not_read_and_masks_are_named(home, capsys):
    films = {f"{c}/{n}.png": film(n + 10 * k) for k, c in enumerate(("benign", "normal"))
             for n in range(6)}  # fmt: skip
    saved(home, films)
    scans = home / "scans"
    for name in ("benign/masks/0.png", "gt/1.png", "normal/2_mask_1.png", "Ground truth/3.png",
                 "normal/x_segmentation.tif"):  # fmt: skip
        saved(home, {name: film(3)})
    Image.fromarray(film(7)).save(scans / "benign" / "late.webp")
    for name in ("notes.txt", "a.LJPEG", "b.png.gz"):
        (scans / name).write_text("no image")
    prepared = prepare_data(images=str(scans), size="64x64", folds=2)
    said = capsys.readouterr()
    assert len(prepared.films) == 12 and "5 masks are left out" in said.out
    assert "3 files are left out, not being called .pgm" in said.err
    assert "a.LJPEG, b.png.gz, benign/late.webp" in said.err and "notes" not in said.err


def test_5_folders_of_classes_lie_at_any_depth_and_a_table_may_not_contradict_them(home, capsys):
    folders = ["train/benign", "test/benign", "train/normal"]
    films = {f"{name}/{n}.png": film(n + 10 * k) for k, name in enumerate(folders)
             for n in range(4)}  # fmt: skip
    rows = [f"{name},{'normal' if n < 2 else name.split('/')[1]},{n}"
            for n, name in enumerate(films)]  # fmt: skip
    choice = saved(home, films, rows=rows)
    prepared = prepare_data(images=choice["images"], size="64x64", folds=2)
    assert prepared.labels["label_name"].value_counts().to_dict() == {"benign": 8, "normal": 4}
    prepare_data(**choice)
    assert "contradicts the name of their folder: train/benign/0, train/benign/1" in (
        capsys.readouterr().err
    )
    saved(home, {"train/malig/1.png": film(30)})
    assert "no Info.txt" in refused(prepare_data, images=choice["images"])
    assert "but not train/malig/1; --classes" in capsys.readouterr().err


def test_5_a_folder_for_each_class_needs_no_table(home, capsys):
    films = {f"{c}/{n}.png": film(n + 10 * k) for k, c in enumerate(("cancer", "Normal"))
             for n in range(6)}  # fmt: skip
    saved(home, films)
    choice = {"images": str(home / "scans"), "size": "64x64", "folds": 2}
    prepared = prepare_data(**choice, classes="cancer=malignant")
    assert prepared.source == "own" and len(prepared.films) == 12
    names = prepared.labels.set_index("image")["label_name"]
    assert names["cancer/0"] == "malignant" and names["Normal/5"] == "normal"
    assert "each image counts as its own patient" in capsys.readouterr().err
    assert "no Info.txt" in refused(prepare_data, **choice)  # cancer is no class
    (home / "empty").mkdir()
    (home / "empty" / "thesis.docx").write_bytes(b"")
    message = refused(prepare_data, images=str(home / "empty"))
    assert "thesis.docx" in message and ".tiff" in message


def test_6_findings_are_circles_or_boxes_and_checked(home, capsys):
    choice = saved(home, many())
    boxes = "image;x0;y0;x1;y1;severity\nf00.png;20;50;40,0;80;benign\nf02;20;50;40;60;\n"
    findings = table(home, boxes, name="findings.csv")
    prepared = prepare_data(**choice, findings=str(findings))
    rows = prepared.findings[["image", "severity", "x", "y", "radius"]].values.tolist()
    assert rows == [["f00", "B", 30, 65, 15], ["f02", "M", 30, 55, 10]]
    assert prepared.findings["canvas_radius"].between(4, 16).all()
    assert prepared.labels["findings"].tolist() == [1, 0, 1] + [0] * 9
    for row, what in {"f01,30,60,5,": "contradicts in line: 2", "f00,30,60,5,M": "contradicts",
                      "lost,30,60,5,": "no label in line: 2", "f00,30,60,0,": "no circle",
                      "f00,x,60,3,": "no circle", "f00,30,60,5,4": "severity",
                      'f00,"1,020",60,3,': "no circle", "f00,30,60,inf,": "no circle",
                      'f00,1.040,"10,5",3,': "with commas and others with points",
                      "f00,.2,0.5,0.1,": "shares of the film"}.items():  # fmt: skip
        findings.write_text(f"image,x,y,radius,severity\n{row}\n")
        assert what in refused(prepare_data, **choice, findings=str(findings)), row
    findings.write_text("image,x,y,radius\nf02,12.125,60,5\n")
    prepare_data(**choice, findings=str(findings))
    assert "points are taken for decimal ones in 12.125" in capsys.readouterr().err
    findings.write_text("image,pathology,x,y,radius\nf02,BENIGN,30,60,5\n")
    assert prepare_data(**choice, findings=str(findings)).findings["severity"][0] == "B"
    capsys.readouterr()
    findings.write_text("image,x,y,radius\nf00,20,60,5\nf02,128,64,5\nf03,20,128,5\n")
    message = refused(prepare_data, **choice, findings=str(findings))
    assert "scale them, or take the films they are px of: f02, f03" in message
    findings.write_text("image,x,y,radius\nf00,127,60,5\nf02,120,2,5\nf03,10,64,40\n")
    prepared = prepare_data(**choice, findings=str(findings))
    assert prepared.findings["canvas_radius"].notna().tolist() == [False, False, True]
    said = capsys.readouterr().err
    assert "2 circles have their centre off the breast, and are not used: f00, f02" in said
    findings.write_text("image,Xmin,Ymin,Xmax,Ymax,reader\nf00,20,50,40,80,A\n")
    assert prepare_data(**choice, findings=str(findings)).findings["radius"][0] == 15
    assert "not used: reader" in capsys.readouterr().out


# ---------------------------------------------------------------------- B. orientation


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_7_exif_orientation_is_obeyed(home, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    Image.fromarray(np.rot90(film()).copy()).save(home / f"a.{suffix}", exif=exif)
    difference = common.read_film(home / f"a.{suffix}").astype(int) - film()
    assert np.abs(difference).max() <= (60 if suffix == "jpg" else 0)
    assert np.abs(difference).mean() < 3


def test_8_pixels_decide_what_is_mirrored_and_a_side_that_contradicts_them_is_counted(home, capsys):
    header, names = "image,label,patient,side", ("benign", "normal", "malignant")
    for wrong in (1, 12):
        rows = [f"f{n:02d},{names[n % 3]},p{n},{'R' if n < wrong else 'Left'}" for n in range(12)]
        prepared = prepare_data(**saved(home, many(), header, rows))
        assert not prepared.table["mirrored"].any()  # all lie as left breasts do
        said = f"{wrong} films have the chest wall at the other side than their laterality says"
        assert said in capsys.readouterr().out
    alike = np.tile(np.uint8([[90, 20, 20, 90]]), (8, 1))  # a breast that fills the frame
    assert [common.chest_wall(alike, side) for side in ("left", "right")] == ["left", "right"]
    changed = {"Read the labels": "labels['laterality'] = 'L'"}  # typed in a cell
    assert set(prepare_data(changed, **saved(home, many())).labels["laterality"]) == {"left"}
    table_of = common.data_dir("own") / "labels.csv"
    table_of.write_text(table_of.read_text().replace(",left,", ",L,"))  # by hand
    assert "laterality other than right, left" in refused(common.load_prepared, "own")
    changed = {"Read the labels": "labels['laterality'] = 'up'"}
    assert "laterality: up" in refused(prepare_data, changed, **saved(home, many()))
    lateral = "image,label,patient,view\na,benign,1,CC\nb,normal,2,LAT\n"
    assert "laterality: LAT" in refused(labels_of, home, lateral)


def test_9_what_is_turned_or_double_is_named():
    upright, right = common.phantom_film(0, 2, 256)[0], common.phantom_film(0, 1, 256)[0]
    assert common.oddities(upright) == common.oddities(right) == []
    for picture, what in [
        (np.rot90(upright), "turned by 90"), (np.rot90(upright, 3), "turned by 90"),
        (np.hstack([right, upright]), "both breasts"),
        (np.hstack([upright, right]), "both breasts"),
    ]:  # fmt: skip
        assert what in " ".join(common.oddities(np.ascontiguousarray(picture))), what
    line = np.zeros((128, 128), np.uint8)
    line[10:60, 64] = 255
    assert common.oddities(line) == ["fewer than 32 grey levels"]


def test_a_film_of_too_many_pixels_is_named_and_its_grey_levels_are_not_counted(home, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 128 * 128)
    message = refused(prepare_data, **saved(home, many(**{"f03.png": film(size=256)})))
    assert "f03: the file cannot be decoded" in message


# ---------------------------------------------------------------------- C. grey values


def deep(pixels, depth):
    """Return an 8-bit film in another depth, uint16."""
    return np.rint(pixels / 255 * (2**depth - 1)).astype(np.uint16)


def test_10_the_grey_scale_is_the_sets_and_hangs_on_no_pixel(home, capsys):
    films = {f"f{n:02d}.png": deep(film(n), 12) for n in range(12)}
    films["f01.png"][5, 120], films["f02.png"][5, 120] = 4096, 65535
    films["f03.png"] //= 4  # a faint film stays faint
    prepared = prepare_data(**saved(home, films))
    assert set(prepared.table["bits"]) == {12}
    for n in range(12):
        canvas, _, _ = common.place_film(film(n) // (4 if n == 3 else 1), "left", (64, 64))
        assert np.abs(canvas.astype(int) - prepared.films[n])[2:, 2:].mean() < 1.5, n
    films["f11.png"] = deep(film(11), 16)
    prepare_data(**saved(home, {name: films[name] for name in ("f00.png", "f04.png", "f11.png",
        "f05.png", "f06.png", "f07.png")}))  # fmt: skip
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if "has only 12 of the 16 bits of" in line]
    assert "5 of 6 films" in line and "f11" not in line
    for n in (4, 5, 6):
        films[f"f{n:02d}.png"] //= 4  # three of six scanned with 10 bits
    del films["f11.png"]
    prepare_data(**saved(home, films))
    (line,) = [n for n in capsys.readouterr().err.splitlines() if "10 of the 12 bits" in n]
    assert "4 of 11 films" in line  # with the faint one
    for top in (4095, 4096, 65535):  # one film alone, as step 5 reads it
        films["f00.png"][5, 120] = top
        Image.fromarray(films["f00.png"]).save(home / "a.png")
        assert np.abs(common.read_film(home / "a.png").astype(int) - film())[:, :100].max() <= 1


@pytest.mark.parametrize("equal", [True, False])
def test_11_equal_channels_of_16_bits_are_read_and_others_refused(home, equal):
    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    colours = np.repeat(deep(film(), 12)[..., None], 3, axis=2)
    colours[..., 2] += 0 if equal else 1
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colours)
    header = struct.pack(">IIBBBBB", 128, 128, 16, 2, 0, 0, 0)  # 16 bits, RGB
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
    (home / "a.png").write_bytes(png + chunk(b"IEND", b""))
    if equal:
        assert np.abs(common.read_film(home / "a.png").astype(int) - film()).max() <= 1
    else:
        message = refused(common.read_film, home / "a.png")
        assert "16 bits in channels" in message and "film[..., 0]" in message


def test_11_a_tiff_of_float64_is_called_what_it_is(home):
    bits = film().astype("<f8").tobytes()
    entries = [(256, 3, 1, 128), (257, 3, 1, 128), (258, 3, 1, 64), (259, 3, 1, 1),
               (262, 3, 1, 1), (273, 4, 1, 200), (277, 3, 1, 1), (278, 3, 1, 128),
               (279, 4, 1, len(bits)), (339, 3, 1, 3)]  # fmt: skip
    body = b"II*\0" + struct.pack("<IH", 8, len(entries))
    body += b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    (home / "a.tif").write_bytes(body.ljust(200, b"\0") + bits)
    message = refused(common.read_film, home / "a.tif")
    assert "of a kind that is not read" in message and "float32 (not float64)" in message


def test_3_a_set_of_dark_films_is_made_brighter_and_a_dark_film_named(home, capsys):
    films = {f"f{n:02d}.png": common.phantom_film(0, n + 1, 256)[0] for n in range(12)}
    dark = {name: pixels // 4 for name, pixels in films.items()}
    prepared = prepare_data(**saved(home, dark))
    assert set(prepared.table["bits"]) == {6}  # 14 bits, say, divided by 256
    said = capsys.readouterr().err
    assert "of 12 films, has only 6 of its 8 bits, as its whole set, and was made brighter" in said
    for n in range(12):
        canvas, _, _ = common.place_film(films[f"f{n:02d}.png"], "", (64, 64))
        assert np.abs(canvas.astype(int) - prepared.films[n])[2:, 2:].mean() < 6, n
    prepare_data(**saved(home, {**films, "f04.png": dark["f04.png"]}))
    said = capsys.readouterr().err
    assert "has only 6 of the 8 bits of its file or set, so that it is dark: f04" in said


@pytest.mark.parametrize("name", ["jet", "viridis", "hot"])
def test_6_false_colours_are_refused_or_named_in_one_line(home, name, capsys):
    colours = training.plt.get_cmap(name)
    films = {f"f{n:02d}.png": common.phantom_film(0, n + 1, 256)[0] for n in range(12)}
    films = {n: (255 * colours(p)[..., :3]).astype(np.uint8) for n, p in films.items()}
    choice = saved(home, films)
    if name == "jet":  # where the order of greys is lost
        message = refused(prepare_data, **choice)
        assert message.count("is in false colours, not in grey") == 1 and "f00, f01" in message
    else:
        prepare_data(**choice)
        assert "is in false colours, of which the brightness is taken: " in capsys.readouterr().err


def test_11_planar_tiffs_of_16_bits_are_refused_too(home):
    data = np.zeros((3, 8, 8), "<u2").tobytes()
    entries = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 3, 200), (259, 3, 1, 1), (262, 3, 1, 2),
               (273, 4, 3, 220), (277, 3, 1, 3), (278, 3, 1, 8), (279, 4, 3, 240),
               (284, 3, 1, 2)]  # fmt: skip
    body = b"II*\0" + struct.pack("<IH", 8, len(entries))
    body += b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    body = body.ljust(200, b"\0") + struct.pack("<3H", 16, 16, 16)
    body = body.ljust(220, b"\0") + struct.pack("<3I", 300, 428, 556)
    body = body.ljust(240, b"\0") + struct.pack("<3I", 128, 128, 128)
    (home / "a.tif").write_bytes(body.ljust(300, b"\0") + data)
    assert "16 bits in channels" in refused(common.read_film, home / "a.tif")


def test_12_a_transparent_level_of_16_bits_is_black(home):
    picture = deep(film(), 12)
    picture[:20, 100:] = 3000
    Image.fromarray(picture).save(home / "a.png", transparency=3000)
    found = common.read_film(home / "a.png")
    assert not found[:20, 100:].any()
    assert np.abs(found.astype(int) - film())[20:].max() <= 1


def test_13_unsigned_pixels_of_32_bits_are_not_taken_for_signed(home, capsys):
    wide = film().astype(np.uint32) * (2**32 // 256)
    Image.fromarray(wide.astype("<u4").view("<i4")).save(home / "a.tif")
    signed, unsigned = (struct.pack("<HHII", 339, 3, 1, n) for n in (2, 1))
    (home / "a.tif").write_bytes((home / "a.tif").read_bytes().replace(signed, unsigned))
    assert np.abs(common.read_film(home / "a.tif").astype(int) - film()).max() <= 1
    assert not capsys.readouterr().err


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_12_what_is_transparent_is_black(home, mode):
    picture = Image.fromarray(np.where(film() > 0, film(), 255).astype(np.uint8)).convert(mode)
    picture.putalpha(Image.fromarray((film() > 0).astype(np.uint8) * 255))
    picture.save(home / "a.png")
    assert np.array_equal(common.read_film(home / "a.png"), film())


def test_13_floats_slightly_over_1_are_of_0_to_1(home):
    Image.fromarray((film() / 250).astype(np.float32)).save(home / "a.tif")
    found = common.read_film(home / "a.tif").astype(int)
    assert film().max() == 180 and np.abs(found - film() * 1.02).max() <= 1
    Image.fromarray((film() / 170).astype(np.float32)).save(home / "a.tif")
    assert np.abs(common.read_film(home / "a.tif") - film() * 1.5).max() <= 15  # clipped at white


def test_13_white_is_zero_of_16_bits_is_inverted(home):
    Image.fromarray(4095 - deep(film(), 12)).save(home / "a.tif", tiffinfo={262: 0})
    assert np.abs(common.read_film(home / "a.tif").astype(int) - film()).max() <= 1


def test_13_signed_and_float_pixels_start_at_black(home, capsys):
    Image.fromarray(film().astype(np.int32) * 100 - 3000).save(home / "a.tif")
    found = common.read_film(home / "a.tif").astype(float)
    assert np.corrcoef(found.flat, film().flat)[0, 1] > 0.999 and found.min() == 0
    assert "below zero" in capsys.readouterr().err
    Image.fromarray((film() / 255).astype(np.float32)).save(home / "b.tif")
    assert np.abs(common.read_film(home / "b.tif").astype(int) - film()).max() <= 1


def test_14_a_negative_is_inverted_and_named(home, capsys):
    picture = common.phantom_film(0, 2, 256)[0]
    Image.fromarray(255 - picture).save(home / "a.png")
    assert np.array_equal(common.read_film(home / "a.png"), picture)
    assert "taken for a negative" in capsys.readouterr().err
    Image.fromarray((230 - picture * 0.9).astype(np.uint8)).save(home / "a.png")  # a grey one
    found = common.read_film(home / "a.png").astype(float)
    assert np.corrcoef(found.ravel(), picture.ravel())[0, 1] > 0.999
    assert "taken for a negative" in capsys.readouterr().err


POLARITY = {  # what becomes of a film and of its ground, and what is said
    "light on black": (lambda f: f, 0, ""),
    "light on white": (lambda f: f, 255, "has padding that is not black, and was made black"),
    "dark on white": (lambda f: 255 - f, 255, "taken for a negative"),
    "dark on black": (lambda f: 255 - f, 0, "taken for a negative"),
    "dark, 17 to 62": (lambda f: (62 - f * (45 / 255)).astype(np.uint8), 62, "for a negative"),
}


@pytest.mark.parametrize("change, ground, said", POLARITY.values(), ids=POLARITY)
@pytest.mark.parametrize("number", [2, 5, 8])
def test_4_a_breast_is_light_on_black_whatever_it_was(home, number, change, ground, said):
    picture = common.phantom_film(0, number, 256)[0]
    outside, notes = ~common.find_breast(picture, common.chest_wall(picture))["outline"], []
    picture[outside] = 0
    Image.fromarray(np.where(outside, ground, change(picture)).astype(np.uint8)).save(
        home / "a.png"
    )
    found = common.read_film(home / "a.png", notes=notes).astype(float)
    assert np.corrcoef(found.ravel(), picture.ravel())[0, 1] > 0.98
    assert said in " ".join(notes) and bool(notes) == bool(said)


def test_15_of_several_pages_the_largest_is_read_and_named(home, capsys):
    small = Image.fromarray(film()).resize((32, 32))
    small.save(home / "a.tif", save_all=True, append_images=[Image.fromarray(film())])
    assert np.array_equal(common.read_film(home / "a.tif"), film())
    assert "2 pages" in capsys.readouterr().err


def test_16_films_unlike_their_set_tiny_ones_and_few_grey_levels_are_named(home, capsys):
    tiny = np.asarray(Image.fromarray(film(6)).resize((48, 48)))
    films = many(**{"f05.png": film(5) // 4, "f06.png": tiny, "f07.png": film(7) // 16 * 16})
    prepare_data(**saved(home, films))
    said = capsys.readouterr().err
    assert "films are unlike the others of their set: f05" in said
    assert "less than 64 px high or wide: f06" in said and "fewer than 32 grey levels: " in said


@pytest.mark.parametrize("noise", [0, 3])
@pytest.mark.parametrize("radius", [0.12, 0.2, 0.3])
def test_17_an_implant_costs_no_tissue(noise, radius):
    y, x = np.mgrid[:256, :256] / 256
    inside = np.hypot(x / 0.55, (y - 0.5) / 0.4) < 1
    implant = np.hypot((x - 0.15) / radius, (y - 0.5) / radius) < 1
    picture = np.where(implant, 240, np.where(inside, 22, 0))
    picture += np.random.default_rng(0).integers(0, noise + 1, inside.shape)
    mask = common.find_breast(picture.clip(0, 255).astype(np.uint8), "left")["outline"]
    assert mask[inside].mean() > 0.97


# ---------------------------------------------------------------------- DICOM


def dicom(path, pixels, bits=12, syntax="ExplicitVRLittleEndian", **tags):
    """Write a DICOM film of its own making."""
    pydicom = pytest.importorskip("pydicom")
    header = pydicom.dataset.FileMetaDataset()
    header.TransferSyntaxUID = getattr(pydicom.uid, syntax)
    header.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.2"
    header.MediaStorageSOPInstanceUID = "1.2.3"
    data = pydicom.dataset.FileDataset(str(path), {}, file_meta=header, preamble=b"\0" * 128)
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = pixels.dtype.itemsize * 8
    data.BitsStored, data.HighBit = bits, bits - 1
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    data.PixelData = (pixels.byteswap() if "BigEndian" in syntax else pixels).tobytes()
    data["PixelData"].VR = "OW"
    for name, value in tags.items():
        setattr(data, name, value)
    pydicom.dcmwrite(str(path), data)
    return path


def item(**tags):
    """Return a DICOM sequence of one item."""
    data = pytest.importorskip("pydicom").Dataset()
    for name, value in tags.items():
        setattr(data, name, value)
    return [data]


def lookup(entries, first, bits, data, kind="US"):
    """Return a DICOM lookup table: numbers, or the bytes of an OW."""
    table = item()
    table[0].add_new("LUTDescriptor", kind, [entries, first, bits])
    table[0].add_new("LUTData", "OW" if isinstance(data, bytes) else "US", data)
    return table


STORED = np.arange(4096, dtype=np.uint16).reshape(64, 64)  # every value of 12 bits
CURVE = STORED.ravel().astype(int) ** 2 // 6000  # a lookup table that ends below white


def greys(path):
    """Return a DICOM film's grey values, 0 to 255 and not rounded, and what was said of it."""
    said = []
    return common.read_dicom(path, said)[0].ravel() / 257, said


WINDOWED = {
    "plain": (lambda p: p, {}),
    "window": (lambda p: p // 2 + 500, {"WindowCenter": 500 + 1024, "WindowWidth": 2048}),
    "MONOCHROME1": (lambda p: 4095 - p, {"PhotometricInterpretation": "MONOCHROME1"}),
    "INVERSE": (lambda p: 4095 - p, {"PresentationLUTShape": "INVERSE"}),
    "negative slope": (lambda p: 4095 - p, {"RescaleSlope": -1, "RescaleIntercept": 4095}),
    "padding": (lambda p: np.where(p == 0, 4095, p), {"PixelPaddingValue": 4095}),
    "signed": (lambda p: (p.astype(int) - 2048).astype(np.int16), {}),
}


@pytest.mark.parametrize("change, tags", WINDOWED.values(), ids=WINDOWED)
def test_13_and_18_a_dicom_film_is_read_as_its_header_says(home, change, tags):
    path = dicom(home / "a.dcm", np.asarray(change(deep(film(), 12))), **tags)
    assert np.abs(common.read_film(path).astype(int) - film()).max() <= 2


# By the formulas of PS3.3 C.11.2.1.2 and C.11.2.1.3; `x` is the value after slope and intercept.
SHOWN = {
    "linear": (lambda x: (x - 1999.5) / 999 + 0.5, {}),
    "wider than the range": (lambda x: (x - 1999.5) / 8191 + 0.5, {"WindowWidth": 8192}),
    "the first of several": (lambda x: (x - 1999.5) / 599 + 0.5, {"WindowWidth": [600, 50]}),
    "exact": (lambda x: (x - 2000) / 1000 + 0.5, {"VOILUTFunction": "LINEAR_EXACT"}),
    "sigmoid": (
        lambda x: 1 / (1 + np.exp(-4 * (x - 2000) / 1000)),
        {"VOILUTFunction": "SIGMOID"},
    ),
    "negative slope": (
        lambda x: (4000 - x - 1999.5) / 999 + 0.5,
        {"RescaleSlope": -1, "RescaleIntercept": 4000},
    ),
    "slope": (
        lambda x: (x / 2 + 1500 - 1999.5) / 999 + 0.5,
        {"RescaleSlope": 0.5, "RescaleIntercept": 1500},
    ),
    "MONOCHROME1": (
        lambda x: 0.5 - (x - 1999.5) / 999,
        {"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "INVERSE"},
    ),
}


@pytest.mark.parametrize("place, tags", SHOWN.values(), ids=SHOWN)
@pytest.mark.parametrize("groups", [None, "Shared", "PerFrame"])
def test_c7_a_window_has_the_output_range_of_the_standard(home, place, tags, groups):
    tags = {"WindowCenter": 2000, "WindowWidth": 1000, **tags}
    if groups:  # where one frame of a tomosynthesis keeps them
        window = {name: tags.pop(name) for name in list(tags) if name[0] in "WV"}
        slope = {name: tags.pop(name) for name in list(tags) if name[0] == "R"}
        found = item(FrameVOILUTSequence=item(**window))
        if slope:
            found[0].PixelValueTransformationSequence = item(**slope)
        tags.update({f"{groups}FunctionalGroupsSequence": found, "NumberOfFrames": 1})
    shown, said = greys(dicom(home / "a.dcm", STORED, **tags))
    expected = place(STORED.ravel().astype(float)).clip(0, 1) * 255
    assert np.abs(shown - expected).max() < 0.01 and said == []


TABLES = {
    "words": (12, CURVE.astype("<u2").tobytes()),
    "numbers": (12, CURVE.tolist()),
    "narrower than described": (16, CURVE.tolist()),
    "8 bits, two to a word": (8, (CURVE >> 4).astype("u1").tobytes()),
    "8 bits, one to a word": (8, (CURVE >> 4).astype("<u2").tobytes()),
}


@pytest.mark.parametrize("bits, data", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("kind", ["VOI", "Modality"])
def test_c8_a_lookup_table_is_read_as_it_is_packed(home, kind, bits, data):
    path = dicom(home / "a.dcm", STORED, **{f"{kind}LUTSequence": lookup(4096, 0, bits, data)})
    bits = min(bits, 12)
    expected = (CURVE >> 12 - bits) * (255 / (2**bits - 1))
    assert np.abs(greys(path)[0] - expected).max() < 0.01


@pytest.mark.parametrize("first, kind", [(-1000, "SS"), (64536, "US")])
def test_c8_a_lookup_table_may_begin_below_zero(home, first, kind):
    table = lookup(3000, first, 12, CURVE[:3000].tolist(), kind)
    tags = {"RescaleSlope": 1, "RescaleIntercept": -1000}
    shown, _ = greys(dicom(home / "a.dcm", STORED, VOILUTSequence=table, **tags))
    assert np.abs(shown - CURVE[STORED.ravel().clip(0, 2999)] * (255 / 4095)).max() < 0.01


@pytest.mark.parametrize("entries, bits", [(2048, 12), (4096, 8), (4097, 12)])
def test_c8_a_lookup_table_unlike_its_descriptor_is_refused(home, entries, bits):
    table = lookup(entries, 0, bits, CURVE.tolist())
    message = refused(common.read_film, dicom(home / "a.dcm", STORED, VOILUTSequence=table))
    assert f"is 4096 x 12 bits, not {entries} x {bits}" in message


@pytest.mark.parametrize("tags", [{"WindowWidth": 0}, {"VOILUTFunction": "CURVE"}, {"HighBit": 15}])
def test_c7_what_the_standard_does_not_know_is_refused(home, tags):
    tags = {"WindowCenter": 2000, "WindowWidth": 1000, **tags}
    message = refused(common.read_film, dicom(home / "a.dcm", STORED, **tags))
    assert "export a PNG" in message and "pip" not in message


def test_c7_two_polarities_in_a_header_are_named(home):
    shown, said = greys(dicom(home / "a.dcm", STORED, PresentationLUTShape="INVERSE"))
    assert shown[0] == 255 and said == [
        "has two polarities, of which PresentationLUTShape is taken"
    ]


@pytest.mark.parametrize("value, signed", [(4095, False), (-2048, True), (63488, True)])
def test_c8_padding_is_what_touches_the_border(home, value, signed):
    pixels = np.full((128, 128), 1000, np.int16 if signed else np.uint16)
    pixels[:, 90:] = pixels[40:50, 40:50] = -2048 if signed else 4095  # padding, and a lesion
    tags = {"PhotometricInterpretation": "MONOCHROME1"} if signed else {}
    path = dicom(home / "a.dcm", pixels, **tags)
    data = pytest.importorskip("pydicom").dcmread(path)
    data.add_new("PixelPaddingValue", "SS" if value < 0 else "US", value)
    data.save_as(path)
    shown = greys(path)[0].reshape(128, 128)
    assert (shown[:, 90:] == 0).all() and (shown[40:50, 40:50] == 255).all()
    data.add_new("PixelPaddingRangeLimit", "SS" if signed else "US", 1001)
    data.save_as(path)
    shown = greys(path)[0].reshape(128, 128)
    assert (shown[:, 90:] == 0).all() and (shown[0, 0] == 0) == signed


def test_c9_a_big_endian_film_is_the_same_film(home):
    table = lookup(4096, 0, 12, CURVE.astype(">u2").tobytes())
    tags = {"syntax": "ExplicitVRBigEndian", "VOILUTSequence": table}
    shown, said = greys(dicom(home / "a.dcm", STORED, **tags))
    assert np.abs(shown - CURVE * (255 / 4095)).max() < 0.01 and said == []
    notes = []
    common.read_film(dicom(home / "a.dcm", STORED, bits=10, syntax=tags["syntax"]), notes=notes)
    assert "has bits above the 10 of its header, which are left out" in notes


def test_c9_pydicom_warns_no_user(home):
    dicom(home / "a.dcm", STORED, PatientID="P" * 99, PixelData=STORED.tobytes() + b"\0" * 64)
    code = "import common; common.read_film('a.dcm'); print(common.dicom_header('a.dcm'))"
    where = {**os.environ, "PYTHONPATH": os.path.dirname(common.__file__)}
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, cwd=home, env=where, capture_output=True, text=True)
    assert "PPP" in done.stdout and done.stderr == ""


@pytest.mark.parametrize("name", ["{}.dicom", "{}.DCM", "IM{}", "1.2.840.{}", "a.b{}"])
def test_c9_dicom_films_are_known_by_what_is_inside(home, name):
    (home / "scans").mkdir()
    names = [name.format(n) for n in range(3)]
    for n, file in enumerate(names):
        dicom(home / "scans" / file, deep(film(n), 12), PatientID=f"P{n}", FrameLaterality="L")
    (home / "scans" / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    (home / "scans" / "README").write_text("scans")
    (home / "scans" / "1.5").write_text("no film")
    files = common.list_files(home / "scans")
    assert files["kind"].tolist().count("film") == 3
    for table in (names, [f"{common.film_name(file)}.dcm" for file in names]):
        paths, extra = common.match_films(pd.DataFrame({"image": table}), files)
        assert not extra and sorted(path.name for path in paths.values()) == names
    headers = common.headers_of(paths)
    assert headers["patient"].tolist() == ["P0", "P1", "P2"] and set(headers["laterality"]) == {
        "left"
    }
    assert np.abs(common.read_film(home / "scans" / names[0]).astype(int) - film()).max() <= 2


def test_18_what_cannot_be_read_of_a_dicom_film_is_one_message(home, monkeypatch):
    pixels = deep(film(), 12)
    (home / "text.dcm").write_text("no DICOM")
    frames = dicom(home / "frames.dcm", np.vstack([pixels, pixels]), Rows=128, NumberOfFrames=2)
    packed = pytest.importorskip("pydicom").encaps.encapsulate([b"\xff\xd8\xff\xd9"])
    lossless = dicom(home / "jpeg.dcm", pixels, syntax="JPEGLosslessSV1", PixelData=packed)
    two = dicom(home / "two.dcm", pixels, PixelData=pixels.tobytes() * 2)  # and one in the header
    nothing = dicom(home / "nothing.dcm", pixels, PixelData=b"")
    palette = dicom(home / "palette.dcm", pixels, PhotometricInterpretation="PALETTE COLOR")
    for path in (home / "text.dcm", frames, two, lossless, nothing, palette):
        message = refused(common.read_film, path)
        assert str(path) in message and "export a PNG" in message and len(message) < 700
        no_decoder = path == lossless and importlib.util.find_spec("pylibjpeg") is None
        assert ("pip install pylibjpeg" in message) == no_decoder
    notes = []
    common.read_film(dicom(home / "deeper.dcm", pixels, bits=10), notes=notes)
    assert "has bits above the 10 of its header, which are left out" in notes
    monkeypatch.setitem(sys.modules, "pydicom", None)
    assert "pip install pydicom" in refused(common.read_film, frames)


def test_18_patient_and_side_come_from_the_header_if_the_table_has_none(home, capsys):
    (home / "scans").mkdir()
    for n in range(12):
        header = {"PatientID": f"P{n // 2}", "ImageLaterality": "LR"[n % 2]}
        dicom(home / "scans" / f"{n}.dcm", deep(film(n, ("left", "right")[n % 2]), 12), **header)
    rows = [f"{n},{('normal', 'malignant')[n // 2 % 2]}" for n in range(12)]
    prepared = prepare_data(**saved(home, {}, "image,label", rows))
    assert prepared.labels.set_index("image")["patient"].to_dict() == {
        str(n): f"P{n // 2}" for n in range(12)
    }
    assert set(prepared.labels["laterality"]) == {"left", "right"}
    dicom(home / "scans" / "2.dcm", deep(film(2), 12), ImageLaterality="L")
    capsys.readouterr()
    prepare_data(**saved(home, {}, "image,label", rows))
    assert "1 films have no patient, one each is assumed: 2" in capsys.readouterr().err
    dicom(home / "scans" / "2.dcm", deep(film(2), 12), ImageLaterality="L", PatientID="P1")
    (home / "scans" / "3.dcm").write_text("no DICOM")
    assert "3: " in refused(prepare_data, **saved(home, {}, "image,label", rows))
    left = prepare_data(**saved(home, {}, "image,label", rows), allow_partial=True).labels
    assert left["patient"].tolist() == prepared.labels["patient"].drop(prepared.labels.index[
        prepared.labels["image"] == "3"]).tolist()  # fmt: skip


def test_18_a_table_that_contradicts_the_headers_is_named(home, capsys):
    (home / "scans").mkdir()
    for n in range(12):
        header = {"PatientID": f"P{n // 2}", "ImageLaterality": "LR"[n % 2]}
        dicom(home / "scans" / f"{n}.dcm", deep(film(n, ("left", "right")[n % 2]), 12), **header)
    rows = [f"{n},{('normal', 'malignant')[n // 2 % 2]},{n if n in (4, 5) else n // 2},L"
            for n in range(12)]  # fmt: skip
    prepare_data(**saved(home, {}, "image,label,patient,side", rows))
    said = capsys.readouterr().err
    assert "contradicts the laterality of their headers: 1, 11, 3, 5, 7, 9" in said
    assert "contradicts their headers, where they are the same patient's: 4, 5" in said


# ---------------------------------------------------------------------- D. weights of a run


@pytest.fixture
def small(monkeypatch):
    """Let the network be a small one."""
    conftest.small_network(monkeypatch)
    monkeypatch.setattr(
        common, "show", lambda figure, path=None, title="": training.plt.close(figure)
    )


def test_19_other_networks_are_refused_and_wrappers_taken_off(home, small):
    state = ResNet(BasicBlock, [1] * 4).state_dict()
    for wrapped in (
        {"state_dict": state}, {"model": {f"module.{k}": v for k, v in state.items()}},
        {f"backbone.{k}": v for k, v in state.items()},
        {"model_state_dict": {f"module._orig_mod.net.{k}": v for k, v in state.items()},
         "epoch": 3},
        {"state_dict": {**{f"encoder.{k}": v for k, v in state.items()},
                        "criterion.weight": torch.ones(3)}, "callbacks": {"best": 0.5}},
    ):  # fmt: skip
        torch.save(wrapped, home / "a.pth")
        model, _ = network.build_model(str(home / "a.pth"))
        assert torch.equal(model.backbone.conv1.weight, state["conv1.weight"])
    other = ResNet(BasicBlock, [2] * 4).state_dict()
    del other["conv1.weight"]
    torch.save(other, home / "a.pth")
    message = refused(network.build_model, str(home / "a.pth"))
    assert re.search(r'Missing key.*: "conv1.weight".*Unexpected.*"layer1.1.conv1.weight"', message)
    torch.save({"student": state, "teacher": state}, home / "a.pth")
    message = refused(network.build_model, str(home / "a.pth"))
    assert "several networks" in message and message.endswith("student., teacher.")


def test_20_a_run_begins_with_another_and_a_leak_is_refused(home, small, capsys):
    quick = {"epochs": 1, "freeze": 4}
    settings = {"patients": 24, "phantom_size": 128, "size": "64x64", "folds": 3}
    conftest.prepare_data(source="phantom", **settings)
    first = run_main("04_train.py", run="first", weights="none", **quick)
    own = prepare_data(**saved(home, many()))
    assert own.source == "own"
    second = run_main("04_train.py", run="second", source="own", weights="first", validation=0.5,
                      **quick)  # fmt: skip
    assert "fold 0 of run first (phantom; none" in capsys.readouterr().out
    begun = second.model.state_dict()
    before = first.trained_model.state_dict()
    assert all(torch.equal(begun[name].cpu(), before[name].cpu()) for name in before)
    record = common.read_json(second.run_folder / "settings.json")
    assert record["weights_used"].startswith("run first (phantom; none") and record["note"] == ""
    # back to the phantoms: fold 0 is the one that nothing saw, fold 1 was trained on
    back = run_main("04_train.py", run="back", source="phantom", weights="second", **quick)
    assert back.record["weights_used"].count("run ") == 2
    number = len(back.validation_films)
    what = f"warning: {number} validation films of fold 0 were seen by --weights, and will judge it"
    assert f"{what} too well: mdb" in capsys.readouterr().err
    with pytest.raises(common.UserError, match="test films of fold 1.*know the answers"):
        run_main("04_train.py", run="leak", source="phantom", weights="second", fold=1, **quick)
    file = str(common.runs_dir("first/fold-0/best.pt"))
    with pytest.raises(common.UserError, match="test films of fold 1"):
        run_main("04_train.py", run="leak", source="phantom", weights=file, fold="0,1", **quick)
    # the same films under other names and another source: told by their digests
    copies = {f"c{n}.png": np.asarray(Image.open(common.data_dir("phantom") / "raw" /
              f"mdb{n:03d}.pgm")) for n in range(1, 49)}  # fmt: skip
    labels = common.load_prepared("phantom").labels["label_name"]
    rows = [f"c{n},{labels[n - 1]},q{(n - 1) // 2}" for n in range(1, 49)]
    for path in (home / "scans").iterdir():
        path.unlink()
    prepare_data(**{**saved(home, copies, rows=rows), "folds": 3})
    with pytest.raises(common.UserError, match="know the answers"):
        run_main("04_train.py", run="leak", source="own", weights="first", fold=0, **quick)


def test_a_database_that_is_only_learned_from_trains_all_but_validation(home, small, capsys):
    """--fold none: both looks go on from it, each from its own, and what it saw is never tested."""
    quick, size = {"epochs": 1, "freeze": 4}, {"size": "1024x128", "folds": 3}
    conftest.prepare_data(source="phantom", patients=24, phantom_size=128, **size)
    large = run_main("04_train.py", run="large", weights="none", fold="none", **quick)
    assert (
        "Next: python 01_prepare_data.py, then 04_train.py --weights large"
        in capsys.readouterr().out
    )
    assert {path.name for path in large.run_folder.glob("fold-*")} == {"fold-3", "fold-3-window"}
    prepared, rows = large.prepared, [*large.train_films.rows, *large.validation_films.rows]
    assert sorted(rows) == list(range(len(prepared.films)))
    with pytest.raises(common.UserError, match="--fold none: no film is left.*--weights RUN"):
        run_main("05_evaluate.py", run="large")
    for itself in ("large", str(large.run_folder), f"{large.run_folder}/fold-3/best.pt"):
        with pytest.raises(common.UserError, match="run large cannot begin with itself"):
            run_main("04_train.py", run="large", weights=itself, overwrite=True, **quick)
    labels = [("malignant", "benign", "normal")[n % 3] for n in range(12)]
    boxes = [f"f{n:02d},20,50,40,70" for n in range(12) if labels[n] != "normal"]
    boxes = table(home, "\n".join(["image,x0,y0,x1,y1", *boxes]), name="boxes.csv")
    rows = [f"f{n:02d},{label},p{n}" for n, label in enumerate(labels)]
    prepare_data(**{**saved(home, many(), rows=rows), **size, "findings": str(boxes)})
    quick.update(source="own", weights="large", validation=0.5)
    begun = run_main("04_train.py", run="begun", fold=1, **quick)
    said = capsys.readouterr().out
    for look in common.LOOKS:
        best = common.read_checkpoint(begun.run_folder / common.fold_name(1, look) / "best.pt")
        assert set(best["seen"]["films"]) > set(prepared.table["digest"])
        assert set(best["seen"]["patients"]) > set("phantom/" + prepared.labels["patient"])
        start = common.weights_file("large", 1, look)
        assert start.parent.name == common.fold_name(3, look) and f"weights: {start}" in said
    # one film of the phantoms stands among the small database's, under another name
    copy = np.asarray(Image.open(common.data_dir("phantom") / "raw" / "mdb001.pgm"))
    prepare_data(**{**saved(home, many(**{"f03.png": copy}), rows=rows), "folds": 3})
    film = common.load_prepared("own").splits.set_index("image").loc["f03"]
    with pytest.raises(common.UserError, match="1 of the . test films of .* answers.*: f03$"):
        run_main("04_train.py", run="leak", fold=film["fold"], **quick)
    run_main("04_train.py", run="large", resume=True, fold="1")
    judged = run_main("05_evaluate.py", run="large", resamples=20)  # by the fold that has films
    tested = (prepared.splits["fold"] == 1).sum()
    assert f"n = {tested} films" in judged.scope and "1 of 3 folds" in judged.scope


# ---------------------------------------------------------------------- E. the rest


def test_21_and_22_values_typed_in_a_cell_patterns_and_folders(home, monkeypatch):
    assert common.canvas_size((512, 288), "own") == common.canvas_size("512x288", "own")
    folds = pd.DataFrame({"fold": [0, 1, 2]})
    assert training.data.named_folds(1, folds) == [1]
    assert training.data.named_folds("none", folds) == [3]
    monkeypatch.setenv("HOME", str(home))
    saved(home, {"a.png": film(), "b/c.png": film(1)})
    scans = home / "scans"
    assert common.named_films(str(scans / "a.png")) == common.named_films(scans / "a.png")
    assert common.named_films("~/scans") == [scans / "a.png", scans / "b" / "c.png"]
    assert common.named_films(["~/scans/*.png"]) == [scans / "a.png"]
    for name in ("f1.png", "f[1].png"):  # a name, not a pattern
        Image.fromarray(film()).save(scans / name)
    assert common.named_films(scans / "f[1].png") == [scans / "f[1].png"]
    (home / "empty").mkdir()
    assert ".tiff" in refused(common.named_films, str(home / "empty"))
    torch.save(ResNet(BasicBlock, [1] * 4).state_dict(), home / "net.pth")
    assert common.weights_file("~/*.pth") == common.weights_file("~/net.pth") == home / "net.pth"
    best = common.runs_dir("cbis/fold-0/best.pt")
    best.parent.mkdir(parents=True)
    best.touch()
    monkeypatch.chdir(home)
    (home / "cbis").mkdir()  # films, say, in the folder that one works in
    assert common.weights_file("cbis") == best
    (home / "other.pth").touch()
    assert "name one file or folder" in refused(common.weights_file, "~/*.pth")


def test_23_a_message_is_short_however_much_is_wrong(home):
    rows = "\n".join(f"f{n},what{n},p" for n in range(5000))
    assert len(refused(labels_of, home, f"image,label,patient\n{rows}")) < 700
    choice = saved(home, {"a.png": film()}, rows=[f"f{n},normal,p{n}" for n in range(5000)])
    assert len(refused(prepare_data, **choice)) < 700
    choice = saved(home, many(), rows=[f"f{n:02d},normal,p{n}" for n in range(12)])
    for path in (home / "scans").iterdir():
        path.write_bytes(b"")
    assert "4 more: the file (0 bytes) is damaged" in refused(prepare_data, **choice)


def test_24_own_films_are_read_and_drawn_one_by_one_and_it_says_what_it_does(
    home, small, monkeypatch, capsys
):
    choice = saved(home, many())
    prepare_data(**choice)
    run_main("04_train.py", weights="none", epochs=1, freeze=5, validation=0.5, fold="all")
    reads = {"read_film": [], "read_checkpoint": []}
    for name, read in [(name, getattr(common, name)) for name in reads]:
        monkeypatch.setattr(
            common,
            name,
            lambda path, *rest, n=name, f=read: (reads[n].append(path), f(path, *rest))[1],
        )
    capsys.readouterr()
    names = [str(home / "scans" / f"f{n:02d}.png") for n in range(3)]
    own = run_main("05_evaluate.py", image=str(home / "scans" / "f0[0-2].png")).own
    assert own["image"].tolist() == names
    assert sorted(map(str, reads["read_film"])) == sorted(2 * names)  # once more for its figure
    assert len(reads["read_checkpoint"]) == 2  # one a fold
    assert "reading: 3 in" in capsys.readouterr().out  # each by the model that never saw it


def test_25_whole_images_of_another_modality_and_masks_left_out(home, small, capsys):
    rng = np.random.default_rng(0)
    films = {f"s{n:02d}.png": rng.integers(20, 250, (90, 120), np.uint8) for n in range(12)}
    y, x = np.mgrid[-1:1:90j, -1:1:120j]  # darker inside, as a negative of a breast is
    films["s01.png"] = (40 + 90 * (x**2 + y**2)).astype(np.uint8)
    masks = {f"s{n:02d}_mask.png": np.eye(90, dtype=np.uint8) * 255 for n in range(3)}
    choice = saved(
        home,
        {**films, **masks},
        rows=[f"s{n:02d},{('benign', 'normal', 'malignant')[n % 3]},p{n}" for n in range(12)],
    )
    findings = table(home, "image,x,y,radius\ns00,100,10,4\n", name="findings.csv")
    prepared = prepare_data(**choice, crop="none", findings=str(findings))
    said = capsys.readouterr()
    assert "3 masks are left out" in said.out and "turned" not in said.err
    assert not prepared.table["mirrored"].any()
    shrunk = np.asarray(Image.fromarray(films["s00.png"]).resize((64, 48), Image.BILINEAR))
    assert np.abs(prepared.films[0][:48].astype(int) - shrunk).max() <= 1
    assert prepared.films[1][24, 32] < 42 and prepared.films[1][0, 0] > 200
    assert prepared.findings["canvas_x"].between(53, 54).all()
    run_main("04_train.py", weights="none", epochs=1, freeze=5, validation=0.5)
    own = run_main("05_evaluate.py", image=str(home / "scans" / "s00.png")).own
    assert own["p_benign"].between(0, 1).all()


def test_of_48_films_eight_bad_ones_are_read_right_or_named(home, capsys):
    common.make_phantoms(_made(home / "raw"), 24, 0, 256)
    labels, _ = prepare.read_mias(home / "raw", common.list_files(home / "raw"), None)
    scans = _made(home / "scans")
    right = {i: np.asarray(Image.open(home / "raw" / f"{i}.pgm")) for i in labels["image"]}
    for image, pixels in right.items():
        Image.fromarray(deep(pixels, 12)).save(scans / f"{image}.png")
    bad = [f"mdb{n:03d}" for n in range(1, 9)]
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(right[bad[0]][::-1, ::-1].copy()).save(scans / f"{bad[0]}.png", exif=exif)
    rgba = Image.fromarray(np.maximum(right[bad[1]], 1)).convert("RGBA")
    rgba.putalpha(Image.fromarray((right[bad[1]] > 12).astype(np.uint8) * 255))
    rgba.save(scans / f"{bad[1]}.png")
    Image.fromarray(255 - right[bad[2]]).save(scans / f"{bad[2]}.png")
    for image, top in ((bad[3], 65535), (bad[4], 4096)):
        hot = deep(right[image], 12)
        hot[100, 100] = top
        Image.fromarray(hot).save(scans / f"{image}.png")
    Image.fromarray(np.hstack([right[bad[5]], right[bad[4]]])).save(scans / f"{bad[5]}.png")
    Image.fromarray(right[bad[6]]).resize((40, 40)).save(scans / f"{bad[6]}.png")
    (scans / f"{bad[7]}.png").unlink()
    Image.fromarray(4095 - deep(right[bad[7]], 12)).save(scans / f"{bad[7]}.tif", tiffinfo={262: 0})
    common.write_csv(labels, home / "mine.csv")
    mine = {"images": str(scans), "labels": str(home / "mine.csv"), "size": "128x72"}
    prepared, said = prepare_data(**mine), capsys.readouterr().err
    index = {image: n for n, image in enumerate(prepared.labels["image"])}
    for image in set(right) - {bad[5], bad[6]}:
        side = labels.set_index("image")["laterality"][image]
        canvas = common.place_film(right[image], side, (128, 72))[0].astype(int)
        assert np.abs(canvas - prepared.films[index[image]]).mean() < 4, image
    for image, what in {bad[2]: "negative", bad[5]: "both breasts", bad[6]: "64 px"}.items():
        assert any(what in line and image in line for line in said.splitlines()), said


# ---------------------------------------------------------------------- shortcuts


def labelled_set(home, change=None, folder="", films=48):
    """Write films of two a patient, every third patient's malignant and changed; settings."""
    rows, pictures = [], {}
    for n in np.random.default_rng(0).permutation(films):
        label = common.CLASS_NAMES[n // 2 % 3]
        picture = film(n, ("left", "right")[n % 2])
        picture = change(picture, n) if change and label == "malignant" else picture
        name = folder.format(n % 4 + 4 * (label == "malignant")) + f"f{n:02d}.png"
        pictures[name] = picture
        rows.append(f"{name},{label},p{n // 2}")
    return saved(home, pictures, rows=rows)


def framed(picture, n):
    """Draw a white frame, six pixels wide."""
    return np.pad(picture[6:-6, 6:-6], 6, constant_values=250)


CHANGED = {  # of malignant films: the property that tells them by what is done to them
    "orientation": lambda picture, n: np.rot90(picture, 1 + 2 * (n % 2)),
    "mean grey": lambda picture, n: (picture * 1.35).astype(np.uint8),
    "height": lambda picture, n: np.pad(picture, ((0, 20 + n), (0, 0))),
    "width": lambda picture, n: np.pad(picture, ((0, 0), (0, 20 + n)))[:, :: 1 - 2 * (n % 2)],
    "rim": framed,
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_tells_malignant_films_without_a_look_is_a_warning_with_its_auc(home, name, capsys):
    options = {"crop": "none"} if name == "rim" else {}
    prepared = prepare_data(**labelled_set(home, CHANGED[name]), **options)
    err = capsys.readouterr().err
    assert re.search(rf"^warning: the {name} alone: AUC (0\.9\d|1\.00), mal", err, re.MULTILINE), (
        err
    )
    found = common.read_json(prepared.folder / "prepared.json")["shortcuts"]
    assert {"property", "tells", "auc", "low", "z"} == set(found[0]) and prepared.note == ""
    assert name in {row["property"] for row in found}


def test_folders_that_tell_the_class_are_told_and_never_a_warning(home, capsys):
    prepare_data(**labelled_set(home, folder="site{}/"))
    out, err = capsys.readouterr()
    assert "the folder alone: AUC 1.00, malignant" in out and "alone" not in err
    assert "alone: AUC" not in out.replace("the folder alone: AUC", "")


def test_folders_that_gave_the_label_and_their_order_are_no_shortcut(home, capsys):
    for n in range(48):
        saved(home, {f"{common.CLASS_NAMES[n // 16]}/f{n:02d}.png": film(n)})
    prepare_data(images=str(home / "scans"), size="64x64", folds=2)
    assert "alone: AUC" not in "".join(capsys.readouterr())


def test_a_table_that_is_sorted_by_class_is_told_for_what_it_is(home, capsys):
    choice = labelled_set(home)
    rows = pd.read_csv(choice["labels"]).sort_values(["label", "image"])
    rows.to_csv(choice["labels"], index=False)
    prepare_data(**choice)
    out, err = capsys.readouterr()
    assert re.search(r"the row in the table alone: AUC .* never shown to the network", out)
    assert "alone" not in err


@pytest.mark.parametrize("seed", range(20))
def test_small_sets_without_a_shortcut_have_none(seed):
    rng = np.random.default_rng(seed)
    patients, each = rng.integers(12, 31), rng.integers(1, 3)
    patients = np.repeat(np.arange(patients * (3 - each)), each)
    labels = pd.DataFrame({"patient": patients.astype(str)})
    labels["label"] = rng.permutation(np.arange(len(labels)) % (2 + seed % 2))
    own = (
        rng.normal(size=(len(labels), 14)) + 3 * rng.normal(size=(patients.max() + 1, 14))[patients]
    )
    plain = pd.DataFrame(own, columns=[*"abcdefghijklmn"]).assign(m=patients % 4, n=patients % 2)
    found = common.find_shortcuts(plain, labels)
    assert not ((found["low"] > 0.6) & (found["z"] > 3.5)).any(), found


def test_an_auc_weighs_patients_alike_and_asks_what_the_classes_allow():
    rng = np.random.default_rng(0)
    labels = pd.DataFrame({"patient": [*map(str, range(60)), *["0"] * 200]})
    labels["label"] = [MALIGNANT if n % 3 == 1 else NORMAL for n in range(60)] + [NORMAL] * 200
    told = pd.DataFrame({"text": np.where(labels["label"] == MALIGNANT, "x", "y")})
    told["noise"] = rng.random(260)
    found = common.find_shortcuts(told.assign(same=1), labels).set_index("property")
    assert found["tells"].tolist() == ["malignant"] * 2
    assert found["auc"]["text"] == 1 and abs(found["auc"]["noise"] - 0.5) < 0.2
    assert found["z"]["text"] == pytest.approx(
        0.5 / (41 / 12 / 20 / 40 + 20 / 12 / 800) ** 0.5, rel=0.02
    )


def test_findings_name_films_in_folders_by_the_file_alone_where_one_has_that_name(home):
    names = [f"{name}/{name[0]}{n}.png" for name in ("benign", "normal") for n in range(3)]
    films = {name: film(n) for n, name in enumerate([*names, "normal/b1.png"])}
    choice = {**saved(home, films), "labels": "", "crop": "none"}
    choice["findings"] = str(table(home, "image,x,y,radius\nb0.png,20,30,5\n", name="boxes.csv"))
    assert prepare_data(**choice).findings["image"].tolist() == ["benign/b0"]
    table(home, "image,x,y,radius\nb1.png,20,30,5\n", name="boxes.csv")
    assert "no label in line: 2" in refused(prepare_data, **choice)
    table(home, "image,x,y,radius\nbenign/b1.png,20,30,5\n", name="boxes.csv")
    assert prepare_data(**choice).findings["image"].tolist() == ["benign/b1"]


def test_files_of_windows_and_excel_may_come_and_go_while_films_are_placed(home):
    came = "[(folder / name).write_bytes(b'') for name in ('Thumbs.db', '~$mine.xlsx')]"
    choice = saved(home, many())
    assert len(prepare_data({"Shortcuts": came}, **choice).films) == 12
    other = "(folder / 'f03.png').write_bytes((folder / 'f04.png').read_bytes() + b' ')"
    assert "changed meanwhile" in refused(prepare_data, {"Shortcuts": other}, **choice)


def test_what_the_steps_make_is_no_film_where_all_lies_in_one_folder(home):
    figure = "common.data_dir('own') / 'figures' / 'films.png'"
    made = f"({figure}).parent.mkdir(parents=True, exist_ok=True); film.save({figure})"
    made = f"film = common.Image.open(folder / 'scans' / 'f03.png'); {made}"
    choice = {**saved(home, many()), "images": str(home)}
    assert len(prepare_data({"Shortcuts": made}, **choice).films) == 12
    names = common.list_files(home)["name"]
    assert not names.str.startswith(("data/", "runs/")).any() and len(names) == 13  # and the table
