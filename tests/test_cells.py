"""Every cell of the five scripts does in Spyder's console and in a notebook what it says.

The scripts are copied to a folder with blanks and letters beyond ASCII, and run from another one,
on 24 phantom patients of 256 px; there is no network. About 90 seconds.
"""

import shutil
from concurrent.futures import ThreadPoolExecutor

import kernels
import pytest
from conftest import PROJECT

CLOSED = "http://127.0.0.1:9"  # nobody listens there, so contact fails at once
STEPS = ["01_prepare_data.py", "02_dataset.py", "03_model.py", "04_train.py", "05_evaluate.py"]
# What a user in a hurry types in the console after running the settings cell.
SHORTER = {
    "01_prepare_data.py": "settings.source = 'phantom'; settings.patients = 24; "
    "settings.phantom_size = 256; settings.size = '128x72'",
    "04_train.py": "settings.epochs = 1",
}
FIGURES = {
    "01_prepare_data.py": 3,  # crops, counts, films
    "02_dataset.py": 3,  # batch, augmentation, sampler
    "03_model.py": 0,
    "04_train.py": 1,  # history
    "05_evaluate.py": 7,  # history, confusion, claim, ROC, calibration, groups, Grad-CAM
}
FRAME = "DataFrame"
VARIABLES = {
    "01_prepare_data.py": {"labels": FRAME, "findings": FRAME, "splits": FRAME, "fold_mix": FRAME},
    "02_dataset.py": {"parts": "dict", "parts_mix": FRAME, "statistics": FRAME, "films": "Tensor"},
    "03_model.py": {"layers": FRAME, "output": FRAME, "weights_name": "str"},
    "04_train.py": {"history": FRAME, "run_folder": "PosixPath", "settings": "Settings"},
    "05_evaluate.py": dict.fromkeys(
        "predictions thresholds metrics report claim calibration groups pointing".split(), FRAME
    ),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Copy the scripts to a folder whose name is no plain word."""
    folder = tmp_path_factory.mktemp("copy") / "Mein Projekt Grüße"
    folder.mkdir()
    for path in PROJECT.glob("*.py"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return the folder that data and runs go to."""
    return tmp_path_factory.mktemp("store")


def environment(place):
    """Return variables that lead data and runs to `place`, and every download nowhere."""
    proxies = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
    return {
        "BCD_DATA_DIR": str(place / "data"),
        "BCD_RUNS_DIR": str(place / "runs"),
        "TORCH_HOME": str(place / "torch"),
        "MIAS_ARCHIVE": "",
        "MIAS_URL": CLOSED + "/all-mias.tar.gz",
        **dict.fromkeys(proxies, CLOSED),
    }


@pytest.fixture(scope="module")
def kernel(tmp_path_factory, place):
    """Start one console for all tests of this file."""
    cwd = tmp_path_factory.mktemp("woanders ä")
    with kernels.SpyderKernel(cwd, env=environment(place), timeout=180) as kernel:
        yield kernel


def cell(path, title):
    """Return the number of the first cell whose title starts so."""
    return [name.startswith(title) for name, _ in kernels.split_cells(path)].index(True)


def run_cells(kernel, path, last=None, times=1, console=""):
    """Run the cells of a script in order, each `times` times; return the results, cell by cell."""
    results = []
    for number, (title, _) in enumerate(kernels.split_cells(path)[:last]):
        results.append([kernel.run_cell(path, number) for _ in range(times)])
        if title.startswith("Settings"):
            assert kernel.execute(console).error == ""
    return results


def failures(results):
    """Name the cells that raised."""
    return [f"{run.title}: {run.error}" for runs in results for run in runs if run.error]


@pytest.fixture(scope="module")
def session(kernel, project, place):
    """Run every cell of the five scripts twice, in one console; return what came of it."""
    session = {}
    for step in STEPS:
        before = set(kernel.variables())
        results = run_cells(kernel, project / step, times=2, console=SHORTER.get(step, ""))
        session[step] = results, before, kernel.variables()
    return session


@pytest.mark.parametrize("step", STEPS)
def test_the_outline_tells_the_cells_apart(step):
    titles = [title for title, _ in kernels.split_cells(PROJECT / step)]
    assert titles[0] == "" and all(titles[1:])
    assert len(set(titles)) == len(titles)
    assert titles[1].startswith("Imports") and titles[2].startswith("Settings")


@pytest.mark.parametrize("step", STEPS)
def test_every_cell_runs_and_runs_again(session, step):
    """In order, each cell twice; nothing is said on stderr."""
    results, _, _ = session[step]
    assert failures(results) == []
    assert [run.stderr for runs in results for run in runs if run.stderr] == []


@pytest.mark.parametrize("step", STEPS)
def test_every_figure_reaches_the_plots_pane(session, step):
    """Once for each run of its cell, and none stays open."""
    for runs in zip(*session[step][0]):
        assert sum(run.figures for run in runs) == FIGURES[step]


@pytest.mark.parametrize("step", STEPS)
def test_results_stay_in_the_variable_explorer(session, step):
    """With few other names beside them: 40 more at most, for any script."""
    _, before, variables = session[step]
    assert {name: variables.get(name) for name in VARIABLES[step]} == VARIABLES[step]
    added = set(variables) - before
    assert len(added) <= 40, sorted(added)


def test_what_was_said(session, place):
    """Phantoms and a random start are named as such; a progress line stays on one line."""
    said = {step: "".join(runs[0].stdout for runs in session[step][0]) for step in STEPS}
    assert all("SYNTHETIC PHANTOMS" in said[step] for step in STEPS)
    assert "NO IMAGENET WEIGHTS" in said["03_model.py"] and "NO IMAGENET" in said["04_train.py"]
    assert "already loaded" not in "".join(said.values())
    (line,) = [line for line in said["04_train.py"].split("\n") if "epoch" in line and "\r" in line]
    bars = line.strip("\r").split("\r")
    assert len(bars) > 3 and all(bar.startswith("fold 0 epoch 1 [") for bar in bars[:-1])
    assert bars[-1].startswith("fold 0 epoch  1/1 ")
    assert len(list((place / "runs").glob("*/metrics.json"))) == 1


def test_nothing_is_written_beside_the_scripts(session, kernel, project):
    """Nor in the working directory: all goes to data and runs."""
    names = {path.name for path in project.iterdir()} - {"__pycache__"}
    assert names == {path.name for path in PROJECT.glob("*.py")}
    assert list(kernel.cwd.iterdir()) == []


def test_a_cell_run_too_early_names_what_it_misses(kernel, project):
    """In an emptied console, the cells run from the last to the second."""
    kernel.execute("%reset -f")
    outcomes = {}
    for step in STEPS:
        for number in range(len(kernels.split_cells(project / step)) - 1, 1, -1):
            result = kernel.run_cell(project / step, number)
            outcomes[step, result.title] = result.error.split("\n")[0]
    assert {error[:17] for error in outcomes.values()} <= {"", "NameError: name '"}, outcomes


def test_a_broken_cell_is_seen(session, kernel, project, tmp_path):
    """These tests would notice: one that raises, and one that is no Python."""
    codes = [code for _, code in kernels.split_cells(project / "02_dataset.py")]
    broken = project / "broken.py"
    broken.write_text("".join([*codes[:4], "1 / 0\n", *codes[4:]]), encoding="utf-8")
    failed = failures(run_cells(kernel, broken))
    broken.write_text("".join([*codes[:4], "x = (\n"]), encoding="utf-8")
    result = kernel.run_cell(broken, 3)
    broken.unlink()
    assert len(failed) == 1 and failed[0].startswith("Open what step 1 prepared")
    assert "ZeroDivisionError" in failed[0] and result.error.startswith("SyntaxError")


def test_an_edited_step_is_used_and_an_error_of_ours_is_one_line(session, kernel, project):
    """Without a restart, when the edited file is saved; and again when the edit is undone."""
    script, edited = project / "03_model.py", project / "02_dataset.py"
    assert failures(run_cells(kernel, script)) == []
    text = edited.read_text(encoding="utf-8")
    new = "\n\ndef prepared_source(source):\n    raise UserError('edited just now')\n"
    edited.write_text(text + new, encoding="utf-8")
    look = cell(script, "Look: the stages")
    error = kernel.run_cell(script, look).error
    edited.write_text(text, encoding="utf-8")
    assert error == "UserError: edited just now\nerror: edited just now"
    assert kernel.run_cell(script, look).error == ""


def test_a_stopped_training_is_kept_and_gone_on_with(session, kernel, project):
    script = project / "04_train.py"
    train = cell(script, "A run")
    longer = "settings.epochs = 200; settings.patience = 99"
    assert failures(run_cells(kernel, script, last=train, console=longer)) == []
    stopped = kernel.run_cell(script, train, interrupt_after="epoch  1/200")
    assert (stopped.error, stopped.stderr) == ("", "") and "stopped in epoch" in stopped.stdout
    assert kernel.variables()["history"] == "DataFrame"
    assert kernel.get("type(model).__name__") == "MammogramNet"
    done, run = kernel.get("len(history)"), kernel.get("str(run_folder)")
    assert done >= 1
    for name in ("best.pt", "last.pt"):
        assert kernel.get(f"(run_folder / 'fold-0' / '{name}').is_file()")
    assert kernel.run_cell(script, train + 1).figures == 1

    kernel.execute(f"settings.resume = True; settings.epochs = {done + 1}")
    resumed = kernel.run_cell(script, train)
    assert resumed.error == "" and f"fold 0 epoch {done + 1:2d}/{done + 1} " in resumed.stdout
    assert f"fold 0 epoch {done} [" not in resumed.stdout
    assert kernel.get("history['epoch'].tolist()") == list(range(1, done + 2))
    assert kernel.get("str(run_folder)") == run


def test_a_film_of_ones_own_is_read_in_its_cell(session, kernel, project, place):
    """Its path between the quotes, and the cells above it run."""
    film = place / "data" / "phantom" / "raw" / "mdb002.pgm"
    script = project / "own.py"
    text = (project / "05_evaluate.py").read_text(encoding="utf-8")
    assert 'own_film = ""' in text
    script.write_text(text.replace('own_film = ""', f"own_film = {str(film)!r}"), encoding="utf-8")
    assert failures(run_cells(kernel, script, last=cell(script, "Metrics"))) == []
    result = kernel.run_cell(script, cell(script, "Your own film"))
    script.unlink()
    assert (result.error, result.figures) == ("", 1)
    assert kernel.variables()["own"] == "DataFrame" and kernel.get("len(own)") == 1


def test_a_whole_file_runs_with_its_flags(session, kernel, project):
    """As F5 does, with options from Run > Configuration per file."""
    result = kernel.run_file(project / "02_dataset.py", "--batch-size 4")
    assert (result.error, result.figures) == ("", FIGURES["02_dataset.py"])
    assert kernel.get("settings.batch_size") == 4


def test_all_five_run_as_notebooks(project, tmp_path):
    """Without settings or network; step 2 first, which makes what it needs from nothing."""
    env = {**environment(tmp_path), "PYTHONPATH": str(project)}
    quick = tmp_path / "quick.py"
    text = (project / "04_train.py").read_text(encoding="utf-8")
    assert "epochs: int = 0" in text
    quick.write_text(text.replace("epochs: int = 0", "epochs: int = 1"), encoding="utf-8")

    def run(path):
        return kernels.run_as_notebook(path, tmp_path, env)

    done = [run(project / "02_dataset.py")]
    with ThreadPoolExecutor(2) as pool:
        done += pool.map(run, [quick, project / "01_prepare_data.py", project / "03_model.py"])
    done.append(run(project / "05_evaluate.py"))
    assert [notebook.stderr for notebook in done if notebook.returncode] == []
    (run_folder,) = (tmp_path / "runs").iterdir()
    assert (run_folder / "report.html").is_file()
