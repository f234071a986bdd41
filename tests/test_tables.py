"""Tables of public databases, in their real forms: read right, or refused with what to do next."""

import re
import shlex

import numpy as np
import pytest
from conftest import prepare_data
from PIL import Image
from test_own import dicom, film, table
from test_prepare import prepare, refused

import common

# the flags of step 1 that README has for databases, {database: {flag: value}}
README = (common.PROJECT / "README.md").read_text(encoding="utf-8")
README = dict(re.findall(r"^\| ([\w-]+) \| `(--images .*?)`", README, re.MULTILINE))
README = {name: shlex.split(flags) for name, flags in README.items()}
README = {name: dict(zip(flags[::2], flags[1::2])) for name, flags in README.items()}
UID = "1.3.6.1.4.1.9590.100.1.2.{}"


def scans(home, names):
    """Save a film under each name; return the listing of their folder."""
    for n, name in enumerate(names):
        path = home / "scans" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in (".dcm", ".dicom"):
            dicom(path, film(n).astype(np.uint16), 8)
        else:
            Image.fromarray(film(n)).save(path)
    return common.list_files(home / "scans")


def cbis(home, path):
    """Write the mass and the calcification table of CBIS-DDSM, with files named by `path`."""
    header = "patient_id,breast{}density,left or right breast,image view,abnormality id,pathology"
    header += ",image file path,cropped image file path"
    row = "P_0000{},3,{},CC,{},{},{kind}-Training_P_0000{}_{}_CC/{}/{}/000000.dcm,x/y/z/000001.dcm"
    rows = {"Mass": [(1, "LEFT", 1, "BENIGN"), (1, "LEFT", 2, "MALIGNANT"),
                     (2, "RIGHT", 1, "BENIGN_WITHOUT_CALLBACK")],
            "Calc": [(1, "RIGHT", 1, "BENIGN"), (3, "LEFT", 1, "MALIGNANT")]}  # fmt: skip
    names = []
    for kind, lines in rows.items():
        text = [header.format("_" if kind == "Mass" else " ")]
        for n, side, number, pathology in lines:
            uids = [UID.format(f"{n}{len(side)}{len(kind) + k}{kind == 'Mass':d}") for k in (7, 8)]
            text.append(row.format(n, side, number, pathology, n, side, *uids, kind=kind) + '\n"')
            text[-1] = text[-1].replace("x/y", '"x/y')  # a line end in the last quoted field
            names.append(path.format(f"{kind}-Training_P_0000{n}_{side}_CC", *uids))
        table(home, "\r\n".join(text), name=f"{kind.lower()}_case_description_train_set.csv")
    return str(home / "*_case_description_*.csv"), sorted(set(names))


@pytest.mark.parametrize("path", ["{0}/07-20-2016-DDSM/1.000000-full/1-1.dcm", "jpeg/{2}/1-7.jpg"])
def test_cbis_ddsm_four_tables_by_a_pattern(home, capsys, path):
    pattern, names = cbis(home, path)
    files = scans(home, [*names, "Mass-Training_P_00001_LEFT_CC_1/crop/1-1.png"])
    found = common.read_own_labels(pattern, files)
    paths, extra = common.match_films(found, files)
    assert len(found) == len(paths) == 4 and extra == ["Mass-Training_P_00001_LEFT_CC_1/crop/1-1"]
    assert found["label_name"].tolist() == ["benign", "malignant", "malignant", "benign"]
    assert found["patient"].tolist() == ["P_00001", "P_00003", "P_00001", "P_00002"]
    assert found["laterality"].tolist() == ["right", "left", "left", "right"]
    for image, file in paths.items():
        assert image.split("/")[0] in str(file) or image.split("/")[2] in str(file)
    assert "1 films have several rows, 1 of them several labels; the worst counts" in (
        capsys.readouterr().out
    )
    masses = home / README["CBIS-DDSM"]["--labels"].split("/")[1]
    found = common.read_own_labels(str(masses), files)["image"]
    assert len(found) == 2 and found.str.startswith("Mass-").all()


def test_inbreast(home, capsys):
    names = [f"2058{n:04d}_{n // 2:016x}_MG_{'RL'[n % 2]}_CC_ANON.dcm" for n in range(12)]
    text = "Patient ID;Patient age;Laterality;View;Acquisition date;File Name;ACR;Bi-Rads\n"
    rates = "1 1 2 4a 5 6".split()
    text += "".join(f"removed;removed;{'RL'[n % 2]};CC;2008;2058{n:04d}.0;1;{rates[n // 2]}\n"
                    for n in range(12))  # fmt: skip
    files, path = scans(home, names), table(home, text)
    assert "--classes" in refused(common.read_own_labels, path, files)
    classes = README["INbreast"]["--classes"]
    found = common.read_own_labels(path, files, classes)
    said = capsys.readouterr().err
    assert '--patient-from "([^_/ -]+)([_/ -][^_/ -]*){4}$"' in said and found["patient"].is_unique
    pattern = said.split('--patient-from "')[1].split('"')[0]
    for expression in (pattern, README["INbreast"]["--patient-from"]):
        found = common.read_own_labels(path, files, classes, expression)
        assert found["patient"].tolist() == [f"{n // 2:016x}" for n in range(12)]
    assert "parted" not in capsys.readouterr().err  # "removed" is no patient
    assert found["label"].tolist() == [1] * 4 + [0] * 2 + [2] * 6
    assert len(common.match_films(found, files)[0]) == 12
    assert "finds no patient in" in refused(common.read_own_labels, path, files, classes, "(BC)")
    assert "(patient)" in refused(common.read_own_labels, path, files, classes, "_MG_")


NAMES = {  # of films, and the part that is the patient
    "KAU": [(f"20{n % 3}_BC{n // 4:04d}_{'CC' if n % 2 else 'MLO'}_R", f"BC{n // 4:04d}")
            for n in range(40)],
    "mini-DDSM": [(f"A_{n // 4:04d}_1.{'LR'[n % 2]}_CC{n % 4}", f"{n // 4:04d}")
                  for n in range(40)],
    "BUS-UCLM": [(f"{'ABCDEFGH'[n // 5] * 4}_{n % 5:03d}", "ABCDEFGH"[n // 5] * 4)
                 for n in range(40)],
    "RSNA": [(f"{10006 + n // 4}_{8862 + 31 * n}", str(10006 + n // 4)) for n in range(40)],
    "folders": [(f"case{n // 4}/{n % 4}", f"case{n // 4}") for n in range(40)],
}  # fmt: skip


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_where_names_look_as_if_they_held_patients_the_setting_is_shown(home, names, capsys):
    text = "image,label\n" + "".join(f"{name}.png,normal\n" for name, _ in names)
    common.read_own_labels(table(home, text))
    pattern = capsys.readouterr().err.split('try --patient-from "')[1].split('"')[0]
    found = common.read_own_labels(table(home, text), None, "", pattern)
    assert found["patient"].tolist() == [patient for _, patient in names]


@pytest.mark.parametrize("name", ["f{:03d}", "scan_{:03d}", "benign/{:03d}", "IMG{:03d}_L_CC"])
def test_names_that_hold_no_patient_show_none(home, name, capsys):
    text = "image,label\n" + "".join(f"{name.format(n)}.png,benign\n" for n in range(40))
    common.read_own_labels(table(home, text))
    said = capsys.readouterr().err
    assert "no patient column" in said and "--patient-from" not in said


def test_copies_are_named_and_are_one_patient(home, capsys):
    names = "20587 (1),20587 (2),x,x (1),m7_aug1,m7_aug2,y1_png.rf.0a1b,y1_png.rf.77ff".split(",")
    names += ["benign (1)", "benign (2)"]
    found = common.read_own_labels(table(home, "image,label\n" + ",benign\n".join([*names, ""])))
    assert found["patient"].nunique() == 6  # benign (n) of BUSI are films, not copies
    said = capsys.readouterr().err
    assert "7 films are copies by their names" in said and "benign (" not in said


def test_vindr_and_rsna(home, capsys):
    text = "study_id,series_id,image_id,laterality,view_position,height,width,breast_birads,"
    text += "breast_density,finding_categories,finding_birads,xmin,ymin,xmax,ymax,split\n"
    rows = [("s1,e1,i1,L", "BI-RADS 4", "['Mass']", "BI-RADS 4", "20,30,60,70"),
            ("s1,e1,i1,L", "BI-RADS 4", "['Mass', 'Nipple Retraction']", "BI-RADS 3", "-1,9,6,70"),
            ("s1,e2,i2,R", "BI-RADS 1", "['No Finding']", "", ",,,"),
            ("s2,e3,i3,L", "BI-RADS 3", "['Skin Thickening']", "", "20,30,60,70"),
            ("s2,e4,i4,R", "BI-RADS 3", "['Mass']", "BI-RADS 3", ",,,")]  # fmt: skip
    for film_, breast, kind, birads, corners in rows:
        text += f'{film_},CC,3518,2800,{breast},DENSITY C,"{kind}",{birads},{corners},training\n'
    files = scans(home, ["s1/i1.dcm", "s1/i2.dcm", "s2/i3.dcm", "s2/i4.dcm"])
    classes = README["VinDr-Mammo"]["--classes"]
    path = table(home, text)
    found = common.read_own_labels(path, files, classes)
    assert found["patient"].tolist() == ["s1", "s1", "s2", "s2"]
    assert found["label_name"].tolist() == ["malignant", "normal", "benign", "benign"]
    boxes = common.read_own_findings(path, found, classes, needed=False)
    assert boxes["severity"].tolist() == ["M", "B", "B", "B"]
    assert boxes["radius"].tolist()[:3] == [20, 30.5, 20] and np.isnan(boxes["radius"][3])
    assert "1 rows that say that there is no finding are left out" in capsys.readouterr().out
    text = "site_id,patient_id,image_id,laterality,view,age,cancer\n"
    text += "".join(f"2,100{n // 2},88{n},{'LR'[n % 2]},CC,50,{n // 4}\n" for n in range(8))
    files = scans(home, [f"png/100{n // 2}_88{n}.png" for n in range(8)])
    files = files[files["name"].str.startswith("png")]
    found = common.read_own_labels(table(home, text), files, README["RSNA"]["--classes"])
    assert found["label_name"].tolist() == ["normal"] * 4 + ["malignant"] * 4
    assert len(common.match_films(found, files)[0]) == 8 and found["patient"].nunique() == 4


def test_readme_names_flags_that_step_1_has():
    fields = {f"--{name.replace('_', '-')}" for name in prepare.Settings.__dataclass_fields__}
    assert len(README) == 5 and all({*flags} <= fields for flags in README.values())


def test_cmmd_a_row_is_a_breast_and_headers_tell_its_films(home, capsys):
    (home / "scans").mkdir()
    for n in range(8):  # D1-0000: L L R R
        tags = {"PatientID": f"D1-000{n // 4}", "ImageLaterality": "LLRR"[n % 4]}
        dicom(home / "scans" / f"{n}.dcm", film(n).astype(np.uint16), 8, **tags)
    text = "ID1,LeftRight,Age,number,abnormality,classification,subtype\n"
    text += "D1-0000,L,44,2,mass,Benign,\nD1-0001,R,50,2,both,Malignant,Luminal A\n"
    files = common.list_files(home / "scans")
    found = common.read_own_labels(table(home, text), files)
    assert found["image"].tolist() == ["0", "1", "6", "7"]
    assert found["label_name"].tolist() == ["benign"] * 2 + ["malignant"] * 2
    assert common.match_films(found, files)[1] == ["2", "3", "4", "5"]  # the other breast
    assert capsys.readouterr().err.count("no film") == 0
    common.read_own_labels(table(home, text + "D1-0002,L,50,2,both,Benign,\n"), files)
    assert "1 breasts of" in (said := capsys.readouterr().err) and "patients: D1-0002\n" in said
    only = files[:0]
    assert "pip install pydicom, or add the column image" in refused(
        common.read_own_labels, home / "mine.csv", only
    )


MIAS = "REFNUM,BG,CLASS,SEVERITY,X,Y,RADIUS,\nmdb001,G,CIRC,B,80,40,12,\nmdb001,G,CALC,M,70,40,9,\n"


def test_mias_tables_class_is_the_type_and_severity_the_label(home):
    text = MIAS + "mdb002,F,NORM,,,,,\nmdb003,D,SPIC,M,60,50,8,\nmdb004,D,MISC,M,,,,\n"
    found = common.read_own_labels(table(home, text))
    assert found["label_name"].tolist() == ["malignant", "normal", "malignant", "malignant"]
    boxes = common.read_own_findings(home / "mine.csv", found, needed=False)
    assert boxes["type"].tolist() == ["CIRC", "CALC", "SPIC", "MISC"]
    assert boxes["severity"].tolist() == ["B", "M", "M", "M"] and np.isnan(boxes["radius"][3])
    text = MIAS + "mdb002,F,NORM,,,,,\nmdb003,D,SPIC,,60,50,8,\n"
    assert "label" in (message := refused(common.read_own_labels, table(home, text)))
    assert message.endswith("line: 5")


def test_dmid_needs_a_header_and_is_read_with_one(home):
    rows = (
        "IMG001,CCLT,D,CIRC,B ,500,600,40\nIMG002,MLORT,F,NORM,N ,,,\nIMG003,CCRT,G,CLAC,M,9,9,9\n"
    )
    prose = "Details of the digital mammogram images\n1st column: number\n"
    for text in (prose + rows, rows):
        assert "column" in refused(common.read_own_labels, table(home, text))
    text = "image,view,tissue,type,severity,x,y,radius\n" + rows
    found = common.read_own_labels(table(home, text))
    assert found["laterality"].tolist() == ["left", "right", "right"]
    assert found["label_name"].tolist() == ["benign", "normal", "malignant"]
    assert len(common.read_own_findings(home / "mine.csv", found, needed=False)) == 2


def test_roboflow_a_column_a_class_and_boxes_with_their_class(home, capsys):
    text = "filename, Benign, Malignant, Normal\na.jpg,0,0,1\nb.jpg,1,1,0\nc.jpg,1,0,0\n"
    found = common.read_own_labels(table(home, text))
    assert found["label_name"].tolist() == ["normal", "malignant", "benign"]
    text = "filename,width,height,class,xmin,ymin,xmax,ymax\n"
    text += "a.jpg,640,640,benign,5,5,50,50\na.jpg,640,640,malignant,60,5,99,50\n"
    found = common.read_own_labels(table(home, text))
    assert found["label_name"].tolist() == ["malignant"]
    boxes = common.read_own_findings(home / "mine.csv", found, needed=False)
    assert boxes["severity"].tolist() == ["B", "M"]
    boxes = common.read_own_findings(home / "mine.csv", found)
    assert boxes["severity"].tolist() == ["B", "M"]
    text = text.replace("benign", "mass").replace("malignant", "mass")
    assert common.read_own_findings(table(home, text), found)["severity"].tolist() == ["M", "M"]


@pytest.mark.parametrize("text, what", [('{"images": [{"id": 1}]}', "COCO"),
                                        ("0 0.5 0.5 0.1 0.2\n", "YOLO")])  # fmt: skip
def test_coco_and_yolo_are_named(home, text, what):
    message = refused(common.read_own_labels, table(home, text, name="a.json"))
    assert what in message and "write a CSV" in message


def test_all_column_names_are_shown(home):
    text = ",".join(f"column{n}" for n in range(40)) + "\n" + ",".join("7" * 40)
    assert "column39" in refused(common.read_own_labels, table(home, text))


def test_rows_of_a_film_must_agree_on_its_patient(home):
    text = "image,label,patient\na,benign,p1\nb,normal,p2\na,malignant,p3\n"
    assert "more than one patient, in line: 2, 4" in refused(
        common.read_own_labels, table(home, text)
    )


def test_a_label_of_the_patient_is_named(home, capsys):
    def rows(labels):
        return "image,label,patient,side\n" + "".join(
            f"{n}{side},{label},p{n},{side}\n" for n, pair in enumerate(labels)
            for side, label in zip("LR", pair))  # fmt: skip

    normal, ill = ("normal", "normal"), ("malignant", "malignant")
    common.read_own_labels(table(home, rows([normal] * 9 + [ill] * 9)))
    assert "all 9 patients with an abnormal film have one label" in capsys.readouterr().err
    common.read_own_labels(table(home, rows([normal] * 9 + [ill] * 8 + [("benign", "normal")])))
    assert "one label" not in capsys.readouterr().err


def test_y_from_the_bottom_is_found_by_the_films_and_said(home, capsys):
    rng, films, rows = np.random.default_rng(0), {}, []
    for n in range(12):
        x, y = rng.integers(15, 40), rng.choice([35, 90])
        films[f"f{n:02d}.png"] = picture = film(n)
        inside = np.hypot(*np.ogrid[-y : 128 - y, -x : 128 - x]) < 8
        picture[inside] = np.clip(picture[inside] + 30.0, 0, 255)
        rows.append((f"f{n:02d}", x, y))
    for name, picture in films.items():
        (home / "scans").mkdir(exist_ok=True)
        Image.fromarray(picture).save(home / "scans" / name)
    labels = table(
        home,
        "image,label,patient\n"
        + "".join(
            f"{name},{('benign', 'malignant')[n % 2]},p{n}\n" for n, (name, _, _) in enumerate(rows)
        ),
    )
    for turned in (False, True):
        lines = [f"{name},{x},{127 - y if turned else y},8" for name, x, y in rows]
        path = table(home, "\n".join(["image,x,y,radius", *lines]), name="findings.csv")
        prepared = prepare_data(images=str(home / "scans"), labels=str(labels), size="64x64",
                                folds=2, findings=str(path))  # fmt: skip
        assert prepared.findings["y"].tolist() == [y for _, _, y in rows]
        assert ("y is taken to run from the bottom" in capsys.readouterr().err) == turned


def test_birads_0_to_2_are_no_classes(home):
    text = "image,patient,BIRADS\na,p1,0\nb,p2,1\nc,p3,2\n"
    assert "BI-RADS are none" in refused(common.read_own_labels, table(home, text))
    found = common.read_own_labels(home / "mine.csv", None, "0=normal,1=normal,2=benign")
    assert found["label"].tolist() == [1, 1, 0]


def test_a_patient_that_patient_from_parts_is_named(home, capsys):
    text = "image,label,Patient No,study_id\n" + "".join(
        f"W{n // 4}_{n // 2}_{n},benign,W{n // 4},{n // 2}\n" for n in range(8))  # fmt: skip
    assert common.read_own_labels(table(home, text))["patient"].nunique() == 2
    found = common.read_own_labels(home / "mine.csv", None, "", r"^(?P<exam>W\d+_\d+)_")
    assert found["patient"].nunique() == 4
    assert "2 patients of" in (said := capsys.readouterr().err) and "W0, W1" in said


def test_findings_without_a_place_as_pandas_writes_them(home):
    found = common.read_own_labels(table(home, "image,label\na,normal\nb,benign\n"))
    text = "image,x0,y0,x1,y1\na,NaN,NaN,NaN,NaN\nb,0,0,0,0\nb,5,6,9,9\n"
    boxes = common.read_own_findings(table(home, text, name="boxes.csv"), found)
    assert boxes["image"].tolist() == ["b", "b"] and boxes["radius"].isna().tolist() == [
        True,
        False,
    ]


def test_labels_of_ones_own_are_refused_with_phantoms(home):
    path = str(table(home, "image,label\na,normal\n"))
    assert "no: labels" in refused(prepare_data, source="phantom", labels=path)
