"""What the project promises as a whole: its folder, its syntax, its cells and its commands."""

import ast
import os
import re
import subprocess
import sys

import pytest
from conftest import PROJECT
from kernels import split_cells

SCRIPTS = sorted(path.name for path in PROJECT.glob("0*.py"))
RUN_TIME = {"torch", "torchvision", "pandas", "numpy", "matplotlib", "seaborn", "sklearn", "PIL"}


def test_top_level_is_exactly_the_card():
    card = {*SCRIPTS, "common.py", "requirements.txt", "tests", "README.md"}
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=PROJECT, capture_output=True, text=True,
    )  # fmt: skip
    if tracked.returncode:
        pytest.skip("no git checkout")
    top = {name.split("/")[0] for name in tracked.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} == card
    assert SCRIPTS == [
        "01_prepare_data.py", "02_dataset.py", "03_model.py", "04_train.py", "05_evaluate.py",
    ]  # fmt: skip


@pytest.mark.parametrize("name", [*SCRIPTS, "common.py"])
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


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_statement_that_runs_something_is_guarded(name):
    tree = ast.parse((PROJECT / name).read_text(encoding="utf-8"))
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign)
    for node in tree.body[1:]:
        if isinstance(node, ast.If):
            assert '__name__ == "__main__"' in ast.unparse(node.test).replace("'", '"')
        elif isinstance(node, ast.Expr):
            assert ast.unparse(node).startswith("sys.path.insert")
        else:
            assert isinstance(node, allowed), ast.unparse(node)[:80]


def test_importing_the_steps_prints_and_writes_nothing(tmp_path):
    code = "import importlib; importlib.import_module('05_evaluate')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(PROJECT),
             "BCD_DATA_DIR": str(tmp_path / "data"), "BCD_RUNS_DIR": str(tmp_path / "runs")},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_ci_runs_the_test_command_of_the_readme():
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    command = re.search(r"^python -m pip install .*pytest.*$", readme, re.MULTILINE)[0]
    assert command in (PROJECT / ".ci" / "run").read_text(encoding="utf-8")
