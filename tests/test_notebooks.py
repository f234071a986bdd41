"""The five scripts run as notebooks from another folder, with no network and from nothing.

A notebook knows no file: the scripts are found in its working directory or on PYTHONPATH.
"""

import shutil

import kernels
import pytest
from conftest import PROJECT, copy_scripts
from test_cells import environment, replace


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """Copy the scripts; all settings stay as they are, but for epochs and phantoms: few, small."""
    folder = copy_scripts(tmp_path_factory.mktemp("notebooks") / "eine Epoche ä")
    replace(folder / "04_train.py", "epochs: int = 0", "epochs: int = 1")
    replace(folder / "01_prepare_data.py", "phantom_size: int = 1024", "phantom_size: int = 256")
    replace(folder / "01_prepare_data.py", "patients: int = 60", "patients: int = 24")
    return folder


@pytest.mark.parametrize("step", ["02_dataset.py", "03_model.py", "04_train.py"])
def test_a_step_runs_as_a_notebook(scripts, step, prepared_once, tmp_path):
    """From a folder that is not the scripts'."""
    shutil.copytree(prepared_once, tmp_path / "data")
    env = {**environment(tmp_path), "PYTHONPATH": str(scripts)}
    run = kernels.run_as_notebook(scripts / step, tmp_path, env)
    assert run.returncode == 0, run.stderr


def test_the_last_step_makes_from_nothing_what_it_needs(scripts, tmp_path):
    """Phantoms and a run; then step 1 finds them up to date."""
    for step in ("05_evaluate.py", "01_prepare_data.py"):
        run = kernels.run_as_notebook(scripts / step, scripts, environment(tmp_path))
        assert run.returncode == 0, run.stderr
    assert len(list(tmp_path.glob("runs/*/report.html"))) == 1
    assert {path.name for path in scripts.glob("*.py")} == {p.name for p in PROJECT.glob("*.py")}
