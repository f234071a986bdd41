"""The five scripts run as notebooks from another folder, with no network and from nothing.

A notebook knows no file: the scripts are found in its working directory or on PYTHONPATH.
"""

import kernels
from conftest import PROJECT, copy_scripts
from test_cells import environment, replace


def test_the_last_step_makes_from_nothing_what_it_needs_and_the_others_go_on_with_it(tmp_path):
    """In one kernel, from a folder that is not the scripts': phantoms and a run, then 01 to 04."""
    folder, elsewhere = copy_scripts(tmp_path / "eine Epoche ä"), tmp_path / "woanders"
    elsewhere.mkdir()
    replace(folder / "04_train.py", "epochs: int = 0", "epochs: int = 1")
    replace(folder / "01_prepare_data.py", "phantom_size: int = 1024", "phantom_size: int = 256")
    replace(folder / "01_prepare_data.py", "patients: int = 60", "patients: int = 24")
    *others, last = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("0*.py"))]
    notebook = elsewhere / "all.py"
    notebook.write_text("\n".join([last, *others]), encoding="utf-8")
    env = {**environment(tmp_path), "PYTHONPATH": str(folder)}
    assert kernels.run_as_notebook(notebook, elsewhere, env) == ""
    assert len(list(tmp_path.glob("runs/*/settings.json"))) == 2  # of step 5, and of step 4
    assert len(list(tmp_path.glob("runs/*/report.html"))) == 1
    assert {path.name for path in folder.glob("*.py")} == {p.name for p in PROJECT.glob("*.py")}
