"""Phantoms of a small size, the scripts as modules, and a data folder of each test's own."""

import functools
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; pytest-xdist uses the other core

import kernels
import matplotlib
import numpy as np
import pytest
import scripts
import torch
from torchvision.models.resnet import BasicBlock, ResNet

PROJECT = scripts.PROJECT
sys.path.insert(0, str(PROJECT))
matplotlib.use("Agg")  # in the tests only; in the scripts it would empty the Plots pane
torch.set_num_threads(1)

common = importlib.import_module("common")
prepare = scripts.definitions("01_prepare_data")
SMALL = {"source": "phantom", "patients": 24, "phantom_size": 256, "size": "128x72"}


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest, so that both workers end together."""
    longest = ["test_cells.py", "test_train.py", "test_prepare.py", "test_benchmarks.py"]
    items.sort(key=lambda item: (*longest, item.path.name).index(item.path.name))


def small_network(patch):
    """Let networks have half of the depth of a ResNet18, for speed."""
    patch.setattr("torchvision.models.resnet18", lambda weights=None: ResNet(BasicBlock, [1] * 4))


def run_main(name, **settings):
    """Run a script in this process, as ``python name --flags`` does; return its variables.

    A UserError, or whatever else ends the script, is raised here. What the script takes from
    common and from earlier steps can be replaced with monkeypatch.
    """
    return scripts.run(PROJECT / name, *scripts.flags(**settings))


@functools.lru_cache(maxsize=None)
def compiled_cells(path):
    """Return (title, code object) of each cell of a script."""
    return [(t, compile(code, f"{path}: {t}", "exec")) for t, code in kernels.split_cells(path)]


def prepare_data(typed=None, path=PROJECT / "01_prepare_data.py", times=1, **settings):
    """Run step 1 cell by cell; return what it prepared.

    `typed` maps the start of a title to code that is typed after that cell. Nothing is drawn, which
    takes most of the time.
    """
    space, typed = {"__name__": "__main__", "__file__": str(path)}, dict(typed or {})
    drawn = mock.MagicMock(), [mock.MagicMock()] * 99
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(common, "command_line", lambda kind, description: kind(**settings))
        patch.setattr(common, "draw_films", lambda *arguments, **options: drawn)
        patch.setattr(common, "show", lambda figure, path=None, title="": None)
        for title, code in compiled_cells(path):
            for _ in range(0 if title.startswith(("Six films", "What was prepared")) else times):
                exec(code, space)
            exec(typed.pop(title.split(":")[0], ""), space)
    assert not typed, f"no such cells: {typed}"
    return space["prepared"]


@pytest.fixture(scope="session")
def prepared_once(tmp_path_factory):
    """Prepare 24 phantom patients (48 films of 256 px, canvas 128 x 72) once for all tests."""
    folder = tmp_path_factory.mktemp("once") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BCD_DATA_DIR", str(folder))
        prepare_data(**SMALL)
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Give a test an empty data/ and runs/ of its own; return their parent."""
    monkeypatch.setenv("BCD_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("BCD_RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("MIAS_ARCHIVE", "MIAS_URL"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def phantoms(home, prepared_once):
    """Return prepared phantoms in a data folder of the test's own."""
    shutil.copytree(prepared_once, home / "data")
    return common.load_prepared("phantom")


def copy_scripts(folder):
    """Copy the scripts to a new folder and return it."""
    folder.mkdir()
    for path in PROJECT.glob("*.py"):
        shutil.copy(path, folder)
    return folder


def run_script(name, *arguments, timeout=300, **environment):
    """Run a script as a user would; return the finished process with stdout and stderr."""
    return subprocess.run(
        [sys.executable, str(PROJECT / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **{k: str(v) for k, v in environment.items()}},
        cwd=str(Path(os.environ.get("BCD_DATA_DIR", ".")).parent),
    )


def beside(logits, patients, sides, weight=1):
    """Return logits judged beside the other breast, film by film as the words say."""
    logits, patients, sides = np.asarray(logits, float), list(patients), list(sides)
    result = logits.copy()
    for n, own in enumerate(logits):
        others = [
            logits[m]
            for m in range(len(logits))
            if patients[m] == patients[n] and {sides[m], sides[n]} == {"left", "right"}
        ]
        if others:
            result[n] = own + weight * (own - np.mean(others, axis=0))
    return result


def bayes(logits, temperature, prior):
    """Return posteriors (n, 3) of likelihoods exp(logits / temperature) and a prior."""
    logits = np.asarray(logits, float) / temperature
    joint = np.exp(logits - logits.max(1, keepdims=True)) * np.asarray(prior, float)
    return joint / joint.sum(1, keepdims=True)


def fitted(logits, labels, prior):
    """Return the temperature of the most likely labels, to half a per cent, and their loss."""
    candidates, rows = np.exp(np.arange(-3, 3.001, 0.005)), np.arange(len(labels))
    joint = [np.asarray(logits, float) / t + np.log(np.asarray(prior, float)) for t in candidates]
    losses = [(np.logaddexp.reduce(z, axis=1) - z[rows, labels]).mean() for z in joint]
    return candidates[int(np.argmin(losses))], min(losses)
