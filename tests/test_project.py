"""What the project promises as a whole: its folder, its syntax, its cells and its commands."""

import ast
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
import tokenize

import conftest
import matplotlib.pyplot as plt
import pandas as pd
import pytest
import scripts
from conftest import PROJECT
from kernels import split_cells
from PIL import Image
from test_cells import environment
from test_torchrun import LAUNCHED

import common

SCRIPTS = sorted(path.name for path in PROJECT.glob("0*.py"))
README = (PROJECT / "README.md").read_text(encoding="utf-8")
FILES = [*SCRIPTS, "common.py"]
RUN_TIME = {"torch", "torchvision", "pandas", "numpy", "matplotlib", "seaborn", "sklearn", "PIL"}


def test_top_level_is_exactly_the_card():
    card = {*FILES, "requirements.txt", "tests", "README.md"}
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=PROJECT, capture_output=True, text=True,
    )  # fmt: skip
    if tracked.returncode:
        pytest.skip("no git checkout")
    top = {name.split("/")[0] for name in tracked.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} - {"findings"} == card
    assert SCRIPTS == [
        "01_prepare_data.py", "02_dataset.py", "03_model.py", "04_train.py", "05_evaluate.py",
    ]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_script_is_python_3_8_and_imports_nothing_beyond_the_eight_packages(name):
    tree = ast.parse((PROJECT / name).read_text(encoding="utf-8"), feature_version=(3, 8))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    known = getattr(sys, "stdlib_module_names", found)
    optional = {"pydicom"}  # read only when it happens to be installed
    assert found - set(known) - RUN_TIME - optional <= {"common"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_cells_are_titled_and_each_title_is_there_once(name):
    titles = [title for title, _ in split_cells(PROJECT / name)][1:]
    assert len(titles) >= 5
    assert all(titles) and len(set(titles)) == len(titles)
    assert titles[0].startswith("Imports") and titles[1].startswith("Settings")


def test_the_cells_are_60_at_most():
    assert sum(len(split_cells(PROJECT / name)) - 1 for name in SCRIPTS) <= 60


def source(name):
    """Return the lines of a file of ours and its statements."""
    text = (PROJECT / name).read_text(encoding="utf-8")
    return text.splitlines(), ast.parse(text)


def is_plain(part):
    """Tell whether a statement imports or defines, or assigns a literal or to a constant."""
    if not isinstance(part, (ast.Assign, ast.AnnAssign)):
        return isinstance(part, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))
    targets = part.targets if isinstance(part, ast.Assign) else [part.target]
    return isinstance(part.value, ast.Constant) or all(
        isinstance(target, ast.Name) and target.id.isupper() for target in targets
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_runs_is_guarded_where_a_script_is_imported_and_nowhere_else(name):
    """Steps 2 and 3 are imported by those that follow; the others are read from top to bottom."""
    runs = [ast.unparse(part) for part in source(name)[1].body[1:] if not is_plain(part)]
    guarded = [text for text in runs if text.startswith("if __name__ == '__main__':")]
    if name in ("02_dataset.py", "03_model.py"):
        finds = ("sys.path.insert(0,", "data = importlib.import_module(")
        assert all(text.startswith(finds) for text in runs if text not in guarded)
    else:
        assert not guarded and "if __name__" not in "\n".join(source(name)[0])


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_first_action_is_40_lines_below_the_settings_at_most(name):
    lines, tree = source(name)
    begin = [n for n, line in enumerate(lines, 1) if line.startswith("# %%")][2]
    action = next(n.lineno for n in tree.body if n.lineno > begin and not is_plain(n))
    assert action - begin <= 40, lines[action - 1]


def test_the_definitions_of_a_cell_take_90_lines_at_most():
    for title, text in [cell for name in SCRIPTS for cell in split_cells(PROJECT / name)]:
        kinds = (ast.FunctionDef, ast.ClassDef)
        defined = [part for part in ast.parse(text).body if isinstance(part, kinds)]
        assert sum(part.end_lineno - part.lineno + 1 for part in defined) <= 90, title


def code_lines(text):
    """Return the numbers of the lines that are not blank, comment or docstring."""
    found, layout = set(), {getattr(tokenize, name) for name in LAYOUT}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in layout:
            found.update(range(token.start[0], token.end[0] + 1))
    for part in ast.walk(ast.parse(text)):
        if isinstance(part, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(
            part
        ):
            found -= {*range(part.body[0].lineno, part.body[0].end_lineno + 1)}
    return found


LAYOUT = "COMMENT NL NEWLINE INDENT DEDENT ENDMARKER".split()


def test_the_code_is_short_and_formatted_throughout():
    texts = [(PROJECT / name).read_text(encoding="utf-8") for name in FILES]
    assert sum(len(code_lines(text)) for text in texts) <= 3600
    assert not any("fmt: skip" in text for text in texts)


def depth(part):
    """Return how deep compound statements are nested; elif and else are no deeper than their if."""
    inner = [depth(child) for child in ast.iter_child_nodes(part)]
    compound = (ast.With, ast.For, ast.While, ast.Try, ast.If, ast.FunctionDef, ast.ClassDef)
    return isinstance(part, compound) + max(inner, default=0)


def test_the_training_cell_is_short_and_flat():
    (text,) = (t for title, t in split_cells(PROJECT / "04_train.py") if title.startswith("Train"))
    assert len(code_lines(text)) <= 45
    assert depth(ast.parse(text)) <= 4


def test_the_settings_are_50_at_most():
    fields = 0
    for name in FILES:
        for part in ast.parse((PROJECT / name).read_text(encoding="utf-8")).body:
            if isinstance(part, ast.ClassDef) and part.name.endswith("Settings"):
                fields += sum(isinstance(line, ast.AnnAssign) for line in part.body)
    assert fields <= 50


def test_importing_what_others_import_prints_and_writes_nothing(tmp_path):
    code = "import importlib; importlib.import_module('03_model')"  # which imports 02_dataset
    folders = {"BCD_DATA_DIR": str(tmp_path / "data"), "BCD_RUNS_DIR": str(tmp_path / "runs")}
    env = {**os.environ, "PYTHONPATH": str(PROJECT), **folders}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=env
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_ci_runs_the_test_command_of_the_readme_and_asks_for_ruffs_format():
    command = re.search(r"^python -m pip install .*pytest.*$", README, re.MULTILINE)[0]
    lines = (PROJECT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert {command, "ruff check .", "ruff format --check ."} <= set(lines)


def commands():
    """Return README's commands that call a script of ours, as lists of words."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    found = [part for block in blocks for line in block.splitlines() for part in line.split("&&")]
    found += re.findall(r"`((?:python|torchrun) [^`]+)`", README)
    found = (tuple(shlex.split(text, comments=True)) for text in found)
    return list(dict.fromkeys(c for c in found if any(word.endswith(".py") for word in c)))


# What makes a command quick, and the file that it leaves.
FEW = "--patients 24 --phantom-size 128 --size 64x64 --folds 3 --allow-partial"
QUICK = {
    "01_prepare_data.py": (FEW, "data/*/prepared.json"),
    "04_train.py": ("--epochs 1 --freeze 5", "runs/*/fold-*/last.pt"),
    "05_evaluate.py": ("--resamples 20", "runs/*/metrics.json"),
}
LEFT = {"--image": "runs/*/own-films/predictions.csv", "--compare": ""}


def call(script, *arguments):
    """Run a script in this process as the shell would, with a small network and no figures."""
    with pytest.MonkeyPatch.context() as patch:
        conftest.small_network(patch)
        patch.setattr(common, "show", lambda figure, path=None, title="": plt.close(figure))
        scripts.run(PROJECT / script, *arguments)


def learn_from_others(folder):
    """Train the run "cbis" on all films of another database, which is prepared elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BCD_DATA_DIR", str(folder / "others"))
        call("01_prepare_data.py", "--source", "phantom", "--seed", "1", *FEW.split())
        films = folder / "others" / "phantom"
        labels = pd.read_csv(films / "labels.csv")[["image", "label", "patient"]]
        labels.to_csv("others.csv", index=False)
        flags = ["--images", str(films / "raw"), "--labels", "others.csv", *FEW.split()]
        call("01_prepare_data.py", *flags)
        call("04_train.py", "--fold", "none", "--run", "cbis", "--epochs", "1", "--freeze", "5")
        for path in (folder / "runs" / "cbis").rglob("*"):
            os.utime(path, (0, 0))  # not the newest run


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """Make a folder with the files that README names: films, an archive, a CSV, three runs."""
    folder = tmp_path_factory.mktemp("user")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(folder).items():
            patch.setenv(name, value)
        patch.chdir(folder)
        call("01_prepare_data.py", "--source", "phantom", *FEW.split())
        call("04_train.py", "--run", "RUN1", "--epochs", "1", "--freeze", "5")
        call("05_evaluate.py", "--resamples", "20")
        for name in ("RUN2", "RUN3"):
            for path in (folder / "runs" / "RUN1").glob("[ps]*.*"):
                copy = folder / "runs" / name / path.name
                copy.parent.mkdir(exist_ok=True)
                os.utime(shutil.copy(path, copy), (0, 0))  # not the newest run
        mine = pd.read_csv(folder / "data" / "phantom" / "labels.csv")
        mine[["image", "label", "patient", "laterality"]].to_csv("mine.csv", index=False)
        cancer = mine.assign(label=(mine["label"] == common.MALIGNANT).astype(int))
        cancer[["image", "label", "patient"]].to_csv("cancer.csv", index=False)
        boxes = pd.read_csv(folder / "data" / "phantom" / "findings.csv").dropna()
        for side, sign in {"0": -1, "1": 1}.items():
            boxes["x" + side] = boxes["x"] + sign * boxes["radius"]
            boxes["y" + side] = boxes["y"] + sign * boxes["radius"]
        boxes[["image", "x0", "y0", "x1", "y1"]].to_csv("boxes.csv", index=False)
        shutil.copytree(folder / "data" / "phantom" / "raw", "scans")
        for name, number in {"film": 2, "left": 2, "right": 1}.items():
            Image.open(folder / "scans" / f"mdb{number:03d}.pgm").save(f"{name}.png")
        learn_from_others(folder)
        (folder / "big").mkdir()
        common.make_phantoms(folder / "big", 12)
        with tarfile.open("all-mias.tar.gz", "w:gz", compresslevel=1) as archive:
            archive.add("big", "all-mias")
        yield folder


LAUNCH = (*LAUNCHED, "04_train.py", "--fold")  # what test_torchrun starts


def test_readme_shows_how_to_run_each_of_them():
    shown = {word for command in commands() for word in command}
    assert {"tests/benchmarks/benchmarks.py", *QUICK} <= shown
    rest = {command[:-1] for command in commands() if command not in RUN_HERE}
    assert rest == {LAUNCH, ("python", "tests/benchmarks/benchmarks.py", "--source")}
    assert {c[-1] for c in commands() if c[:-1] == LAUNCH} == {"0", "all"}


# The others are run by test_benchmarks and test_torchrun.
RUN_HERE = [c for c in commands() if c[0] == "python" and c[1] in SCRIPTS]


@pytest.mark.parametrize("command", RUN_HERE, ids=" ".join)
def test_a_command_of_the_readme_runs(command, user, tmp_path, monkeypatch):
    """On tiny phantoms, and with the flags that make it quick."""
    _, script, *arguments = command
    quick, left = QUICK[script]
    arguments += quick.split() + (["--epochs", "2"] if "--resume" in arguments else [])
    left = next((LEFT[word] for word in arguments if word in LEFT), left)
    if script == "01_prepare_data.py":  # the others go on with what is prepared
        monkeypatch.setenv("BCD_DATA_DIR", str(tmp_path / "data"))
    elif script == "04_train.py" and not {"--resume", "--weights"} & {*arguments}:
        monkeypatch.setenv("BCD_RUNS_DIR", str(tmp_path / "runs"))
    start = time.time_ns()
    if "--compare" in arguments:
        (user / "runs" / "RUN1" / "predictions.csv").touch()  # another command has resumed it
    call(script, *arguments)
    found = [*user.glob(left or "*"), *tmp_path.glob(left or "*")]
    assert not left or any(path.stat().st_mtime_ns > start for path in found)
