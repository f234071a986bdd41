"""The benchmarks: what can be had here is measured, and nothing of the user's is touched."""

import re

import pandas as pd
import pytest
from conftest import PROJECT, run_script

CANNOT = ("not installed", "no native bf16", "not known on this system")  # and so it says


def test_a_quick_try_gives_every_figure_and_keeps_to_its_own_folder(home):
    mine = {
        folder / name: f"mine, and no {name}"
        for folder, name in [
            (home / "data" / "phantom", "prepared.json"),
            (home / "data" / "phantom" / "raw", "Info.txt"),
            (home / "runs" / "quality", "settings.json"),
        ]
    }
    for path, text in mine.items():
        path.parent.mkdir(parents=True)
        path.write_text(text, encoding="utf-8")
    done = run_script("tests/benchmarks/benchmarks.py", "--quick", timeout=900)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(home / "runs" / "benchmarks.csv")
    assert set(table["benchmark"]) == {"epoch", "ordinary", "preparation", "flat", "bf16"}
    without = table[table["value"].isna()]
    assert all(unit.endswith(CANNOT) for unit in without["unit"]), without
    assert {path: path.read_text(encoding="utf-8") for path in mine} == mine
    kept = {path.relative_to(home).parts[:2] for path in home.rglob("*") if path.is_file()}
    own = {("data", "benchmarks"), ("runs", "benchmarks.csv")}
    assert kept == {*own, ("data", "phantom"), ("runs", "quality")}
    assert set((home / "data" / "phantom").rglob("*.*")) == set(list(mine)[:2])


def test_a_quick_try_of_the_learning_curve_is_drawn(home):
    words = ["--quick", "--only", "curve", "--seeds", "1"]
    done = run_script("tests/benchmarks/benchmarks.py", *words, timeout=900)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(home / "runs" / "benchmarks.csv")
    assert len(table) == 9 and table["value"].between(0, 1).all()
    assert re.search(r"2\d% of the training patients, n = 48", done.stdout)
    assert (home / "runs" / "learning-curve.png").stat().st_size > 10000


def test_a_quick_try_beside_an_earlier_commit_times_whole_commands_of_both(home):
    if not (PROJECT / ".git").exists():
        pytest.skip("no history here")
    words = ["--quick", "--only", "earlier", "--earlier", "HEAD", "--weights", "none"]
    done = run_script("tests/benchmarks/benchmarks.py", *words, timeout=900)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(home / "runs" / "benchmarks.csv")
    assert len(table) == 6 and (table["value"] > 1).all()  # a start alone takes longer
    ratios = table["ratio"].dropna()
    assert len(ratios) == 3 and ratios.between(1 / 3, 3).all()  # the same commit, but for changes
    done = run_script("tests/benchmarks/benchmarks.py", *words[:4], "nowhere", timeout=900)
    assert "not in this copy's history" in done.stdout
