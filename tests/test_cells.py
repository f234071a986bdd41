"""Every cell of the five scripts does in Spyder's console what it says.

The scripts are copied to a folder with blanks and letters beyond ASCII, and run from another one,
on 24 phantom patients of 256 px; there is no network.
"""

import contextlib
import dis
import inspect
import random
import re

import kernels
import pandas as pd
import pytest
from conftest import PROJECT, copy_scripts

CLOSED = "http://127.0.0.1:9"  # nobody listens there, so contact fails at once
TINY = "settings.patients = 24; settings.phantom_size = 256; settings.size = '128x72'"
CONSOLE = {  # what a user in a hurry types after running the settings cell
    "01_prepare_data.py": "settings.source = 'phantom'; " + TINY,
    "02_dataset.py": "",
    "03_model.py": "",
    "04_train.py": "settings.epochs = 1",
    "05_evaluate.py": "settings.resamples = 100",
}
FIGURES = {  # of the cells that draw, by the start of their title
    "01_prepare_data.py": {"One film": 1, "Six films": 1, "Circles": 1, "What was prepared": 1},
    "02_dataset.py": {
        "The Dataset": 1,
        "Batches": 1,
        "Augmentation": 1,
        "Two looks": 1,
    },
    "03_model.py": {"What it says": 1},
    "04_train.py": {"The curves": 1},
    "05_evaluate.py": {
        "Confusion": 1,
        "ROC": 1,
        "Calibration": 1,
        "By group": 1,
        "Hits": 2,
    },
}
RESULTS = {  # and their types, DataFrame where none is given; they stay until the end
    "01_prepare_data.py": "labels findings splits prepared:Prepared",
    "02_dataset.py": "dataset:MammogramDataset parts:dict parts_mix",
    "03_model.py": "layers output",
    "04_train.py": f"history schedule run_folder:{type(PROJECT).__name__}",
    "05_evaluate.py": "predictions metrics report groups thresholds calibration points",
}
each_step = pytest.mark.parametrize("step", CONSOLE)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Copy the scripts to a folder whose name is no plain word; data and runs go beside it."""
    return copy_scripts(tmp_path_factory.mktemp("cells") / "Mein Projekt Grüße")


def environment(place):
    """Return variables that lead data and runs to `place`, and every download nowhere."""
    return {
        "BCD_DATA_DIR": str(place / "data"),
        "BCD_RUNS_DIR": str(place / "runs"),
        "TORCH_HOME": str(place / "torch"),
        "MIAS_ARCHIVE": "",
        "MIAS_URL": CLOSED + "/all-mias.tar.gz",
        "OMP_NUM_THREADS": "1",  # test files run side by side
        **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), CLOSED),
        **dict.fromkeys(("no_proxy", "NO_PROXY"), ""),
    }


@pytest.fixture(scope="module")
def kernel(project):
    """Start one console for all tests of this file."""
    cwd = project.with_name("woanders ä")
    cwd.mkdir()
    with kernels.SpyderKernel(cwd, env=environment(project.parent), timeout=180) as kernel:
        yield kernel


def run_cells(kernel, path, times=1, console="", first=0, last=None):
    """Run cells `first` to before `last`, each `times` times, and `console` after the settings."""
    results = []
    for number, (title, _) in list(enumerate(kernels.split_cells(path)))[first:last]:
        results.append([kernel.run_cell(path, number) for _ in range(times)])
        if title.startswith("Settings"):
            assert kernel.execute(console).error == ""
    return results


@contextlib.contextmanager
def undrawn(kernel, project, place):
    """Draw no figures for a while, which takes most of the time; `place` is for data and runs."""
    env = "import os; os.environ.update({!r}); import common; common.show = {}"
    try:
        kernel.execute("import common; common.shown = common.show")
        shut = "lambda figure, path=None, title='': plt.close(figure)"
        assert kernel.execute(env.format(environment(place), shut)).error == ""
        yield
    finally:
        kernel.execute(env.format(environment(project.parent), "common.shown"))


def cell(path, title):
    """Return the number of the first cell whose title starts so."""
    return [name.startswith(title) for name, _ in kernels.split_cells(path)].index(True)


def replace(path, old, new):
    """Change a text in a script, which must be there."""
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def failures(results):
    """Name the cells that raised."""
    return [f"{run.title}: {run.error}" for runs in results for run in runs if run.error]


@pytest.fixture(scope="module")
def session(kernel, project):
    """Run every cell of the five scripts twice, in one console; return results and variables."""
    return {
        step: (run_cells(kernel, project / step, 2, console), kernel.variables())
        for step, console in CONSOLE.items()
    }


@each_step
def test_the_outline_tells_the_cells_apart(step):
    titles = [title for title, _ in kernels.split_cells(PROJECT / step)]
    assert titles[0] == "" and all(titles[1:]) and len(set(titles)) == len(titles)
    assert titles[1].startswith("Imports") and titles[2].startswith("Settings")


@each_step
def test_every_cell_runs_and_runs_again(session, step):
    """Each shows something, and says nothing on stderr; every figure reaches the Plots pane."""
    results, _ = session[step]
    assert failures(results) == []
    assert [run.stderr for runs in results for run in runs if run.stderr] == []
    runs = [run for runs in results[2:] for run in runs]
    assert [run.title for run in runs if not run.stdout and not run.figures] == []
    expected = [0] * len(results)
    for title, number in FIGURES[step].items():
        expected[cell(PROJECT / step, title)] = number
    assert [[run.figures for run in runs] for runs in results] == [[n, n] for n in expected]


@each_step
def test_results_stay_in_the_variable_explorer(session, step):
    """From step to step, in one console."""
    types = {name: kind.rsplit(".")[-1] for name, kind in session[step][1].items()}
    steps = list(CONSOLE)[: list(CONSOLE).index(step) + 1]
    wanted = [word.partition(":") for name in steps for word in RESULTS[name].split()]
    wanted = {name: kind or "DataFrame" for name, _, kind in wanted}
    assert {name: types.get(name) for name in wanted} == wanted


@pytest.mark.parametrize("step, most", [("01_prepare_data.py", 40), ("05_evaluate.py", 120)])
def test_few_names_stay_beside_them(session, step, most):
    """Constants count; modules, functions, classes and networks are not shown."""
    variables = session[step][1]
    assert len(variables) <= most, f"{len(variables)}: {' '.join(sorted(variables))}"


def test_the_networks_are_there(session, kernel):
    """As it began, and as it was trained; they differ."""
    code = "[type(m).__name__ for m in (model, trained_model)]"
    assert kernel.get(code) == ["MammogramNet"] * 2
    weight = "head.weight.detach().cpu().numpy()"
    assert kernel.get(f"model.{weight}") != kernel.get(f"trained_model.{weight}")


def test_what_was_said(session, project):
    """Phantoms and a random start are named as such; a progress line stays on one line."""
    said = {step: "".join(runs[0].stdout for runs in session[step][0]) for step in CONSOLE}
    assert all("SYNTHETIC PHANTOMS" in said[step] for step in CONSOLE)
    assert "NO IMAGENET WEIGHTS" in said["03_model.py"] and "NO IMAGENET" in said["04_train.py"]
    assert "already loaded" not in "".join(said.values())
    (line,) = [line for line in said["04_train.py"].split("\n") if "\rfold" in line]
    bars = line.strip("\r").split("\r")
    assert len(bars) > 2 and all(bar.startswith("fold 0 epoch 1 [") for bar in bars[:-1])
    assert bars[-1].startswith("fold 0 epoch  1/1 ")
    assert len(list(project.parent.glob("runs/*/metrics.json"))) == 1


def test_a_cell_run_twice_gives_the_same(session, project):
    """The training cell too: a new run, from the same beginning."""
    folders = sorted(project.parent.glob("runs/*"))[:2]
    clocks = ["seconds", "films_per_second"]
    first, second = (pd.read_csv(f / "history.csv").drop(columns=clocks) for f in folders)
    assert len(first) == 1 and first.equals(second)
    assert not list(project.parent.glob("data/phantom/*.edited-*"))


def test_any_cell_runs_again_in_any_order(session, kernel, project):
    """Or says in one line which cell comes first: all five scripts call their settings so."""
    cells = [(s, n) for s in CONSOLE for n in range(len(kernels.split_cells(project / s)))]
    wrong, refused, trail = [], set(), []
    with undrawn(kernel, project, project.parent):
        for step, number in random.Random(0).choices(cells, k=60):
            result = kernel.run_cell(project / step, number)
            trail.append(f"{step} {number} {result.title}")
            if result.title.startswith("Settings"):
                assert kernel.execute(CONSOLE[step]).error == ""
            one_line = re.fullmatch(r"UserError: (.*run the .*cell.*)\nerror: \1", result.error)
            if one_line:
                refused.add(one_line[1])
            elif result.error or result.stderr:
                wrong.append((trail[-3:], result.error or result.stderr))
    assert not wrong
    assert any("run the Settings cell of this cell's script" in line for line in refused)
    assert not list(project.parent.glob("data/phantom/*.edited-*"))


def names_of_cells(path):
    """Return for each cell the names that it takes from other cells, and those that it makes."""

    def inner(code):
        for part in filter(inspect.iscode, code.co_consts):
            yield part
            yield from inner(part)

    cells = []
    for _, text in kernels.split_cells(path):
        code, made, taken = compile(text, path.name, "exec"), set(), set()
        for do in dis.get_instructions(code):
            if do.opname == "STORE_NAME":
                made.add(do.argval)
            elif do.opname == "LOAD_NAME":
                taken |= {do.argval} - made
        steps = [do for part in inner(code) for do in dis.get_instructions(part)]
        taken |= {do.argval for do in steps if do.opname == "LOAD_GLOBAL"} - made
        cells.append((taken, made))
    return cells


def test_one_name_means_one_thing_in_all_scripts():
    """In one console a cell takes what its own script made; and it changes nothing that it takes.

    Apart from settings, which say themselves whose they are, and what is alike in all scripts.
    """
    alike = {"settings", "prepared", "model"}
    anew = {"settings", "schedule", "state", "record"}  # by step 4, when it trains or goes on
    cells = {step: names_of_cells(PROJECT / step) for step in CONSOLE}
    for step, own in cells.items():
        makers = [name for _, made in own[2:] for name in made]
        others = {n for s in CONSOLE if s != step for _, made in cells[s][2:] for n in made}
        for (title, _), (taken, made) in zip(kernels.split_cells(PROJECT / step), own):
            twice = {name for name in taken - made if makers.count(name) > 1}
            clash = (taken & others - alike) | (twice | taken & made) - anew
            assert not clash, (step, title, clash)


def test_nothing_is_written_beside_the_scripts(session, kernel, project):
    """Nor in the working directory: all goes to data and runs."""
    names = {path.name for path in project.iterdir()} - {"__pycache__"}
    assert names == {path.name for path in PROJECT.glob("*.py")}
    assert list(kernel.cwd.iterdir()) == []


def test_a_cell_run_too_early_names_what_it_misses(project, tmp_path):
    """In a new console, every fourth cell, from the last to the second."""
    with kernels.SpyderKernel(tmp_path) as kernel:
        for path in (project / step for step in CONSOLE):
            for number in range(len(kernels.split_cells(path)) - 1, 1, -4):
                error = kernel.run_cell(path, number).error
                assert error == "" or error.startswith("NameError: name '"), (path, error)


def test_a_broken_cell_is_seen(session, kernel, project):
    """These tests would notice: one that raises, and one that is no Python."""
    first, *codes = [code for _, code in kernels.split_cells(project / "03_model.py")]
    broken = project / "broken.py"
    broken.write_text("".join([first, *codes[:4], "1 / 0\n", *codes[4:]]), encoding="utf-8")
    failed = failures(run_cells(kernel, broken))
    broken.write_text("x = (\n# %% Next\n" + first, encoding="utf-8")
    failed += failures(run_cells(kernel, broken))
    broken.unlink()
    assert len(failed) == 2 and "SyntaxError" in failed[1]
    assert failed[0].startswith(codes[3].split("\n")[0].lstrip("# %") + ": ZeroDivisionError")


def test_an_edited_step_is_used_and_an_error_of_ours_is_one_line(session, kernel, project):
    """Without a restart, when the edited file is saved; and again when the edit is undone."""
    script, edited = project / "04_train.py", project / "02_dataset.py"
    kernel.run_cell(script, cell(script, "Settings"))
    text, films = edited.read_text(encoding="utf-8"), cell(script, "The films of")
    new = "\n\ndef fold_parts(*arguments):\n    raise UserError('edited just now')\n"
    edited.write_text(text + new, encoding="utf-8")
    error = kernel.run_cell(script, films).error
    edited.write_text(text, encoding="utf-8")
    assert error == "UserError: edited just now\nerror: edited just now"
    assert kernel.run_cell(script, films).error == ""


def begin(kernel, script, console):
    """Run what step 4 does before it trains; return the number of the cell that trains."""
    numbers = [cell(script, title) for title in ("Settings", "The films of", "The network, ")]
    for number in numbers:
        assert kernel.run_cell(script, number).error == ""
        assert kernel.execute(console).error == ""
    return cell(script, "Train:")


def test_a_stopped_training_is_kept_and_gone_on_with(session, kernel, project):
    """Stopped in its first epoch, then after it, then gone on with to its end."""
    script = project / "04_train.py"
    train = begin(kernel, script, "settings.epochs = 200; settings.patience = 99")
    stopped = kernel.run_cell(script, train, interrupt_after="epoch 1 [")
    assert (stopped.error, stopped.stderr) == ("", "") and "\nstopped" in stopped.stdout
    look = kernel.run_cell(script, train + 1)
    assert (look.error, look.figures, kernel.get("len(history)")) == ("", 0, 0)

    run = kernel.get("str(run_folder)")
    kernel.run_cell(script, cell(script, "Settings"))
    kernel.execute("settings.resume = True")
    stopped = kernel.run_cell(script, train, interrupt_after="epoch  1/200")
    assert (stopped.error, stopped.stderr) == ("", "") and "\nstopped" in stopped.stdout
    done = kernel.get("len(history)")
    assert done >= 1 and kernel.variables()["history"] == "DataFrame"
    assert kernel.get("type(trained_model).__name__") == "MammogramNet"
    files = kernel.get("sorted(path.name for path in (run_folder / 'fold-0').iterdir())")
    assert files == ["best.pt", "history.csv", "last.pt"]
    assert kernel.run_cell(script, train + 1).figures == 1

    kernel.execute(f"settings.epochs = {done + 1}")
    resumed = kernel.run_cell(script, train)
    assert resumed.error == "" and f"fold 0 epoch {done + 1:2d}/{done + 1} " in resumed.stdout
    assert f"fold 0 epoch {done} [" not in resumed.stdout
    assert kernel.get("history['epoch'].tolist()") == list(range(1, done + 2))
    assert kernel.get("str(run_folder)") == run


def test_a_changed_optimizer_is_what_trains(session, kernel, project):
    train = begin(kernel, project / "04_train.py", "settings.epochs = 1")
    kernel.execute("optimizer = torch.optim.SGD(model.parameters(), lr=0.0625)")
    assert kernel.run_cell(project / "04_train.py", train).error == ""
    assert kernel.get("[type(state.optimizer).__name__, *history['lr']]") == ["SGD", 0.0625]


def test_the_settings_of_another_script_are_refused_in_one_line(session, kernel, project):
    kernel.run_cell(project / "02_dataset.py", 2)
    error = kernel.run_cell(project / "04_train.py", cell(project / "04_train.py", "Train:")).error
    said = re.fullmatch(
        r"UserError: (.*those of 02_dataset.py.*run the Settings cell.*)\nerror: \1", error
    )
    assert said, error


def test_a_film_of_ones_own_is_read_in_its_cell(session, kernel, project):
    """Its path is typed into the console; no other cell runs again."""
    film = project.parent / "data" / "phantom" / "raw" / "mdb002.pgm"
    script = project / "05_evaluate.py"
    kernel.run_cell(script, cell(script, "Settings"))
    kernel.execute(f"settings.image = {str(film)!r}")
    result = kernel.run_cell(script, cell(script, "A film of your own"))
    assert (result.error, result.figures) == ("", 1)
    assert kernel.variables()["own"] == "DataFrame" and kernel.get("len(own)") == 1


def test_what_is_read_anew_is_placed_anew_before_it_is_saved(session, kernel, project):
    """And a cell that is refused leaves the films as they were."""
    script = project / "01_prepare_data.py"
    place, save = cell(script, "Place every film"), cell(script, "Save")
    kernel.run_cell(project / "02_dataset.py", 2)
    assert "run the Settings cell" in kernel.run_cell(script, place).error
    assert kernel.get("bool(canvases.any())") is True
    assert failures(run_cells(kernel, script, console=CONSOLE[script.name], last=place)) == []
    error = kernel.run_cell(script, save).error
    assert re.match(r"UserError: first run the cells 'Place every film'.*\n", error), error
    for name in ("Check", "Split", "Circles"):  # and each of them is needed
        assert kernel.run_cell(script, cell(script, name)).error == ""
    assert kernel.run_cell(script, place).error == ""
    error = kernel.run_cell(script, save).error
    assert all(name in error for name in ("usable", "splits", "placed_findings")), error


def test_a_size_that_one_film_was_looked_at_in_is_not_that_of_the_films(session, kernel, project):
    script = project / "01_prepare_data.py"
    save, console = cell(script, "Save"), CONSOLE["01_prepare_data.py"]
    assert failures(run_cells(kernel, script, console=console, last=save)) == []
    kernel.execute("settings.size = '200x100'")
    assert kernel.run_cell(script, cell(script, "One film")).error == ""
    assert kernel.run_cell(script, save).error == ""
    assert kernel.get("prepared.films.shape == canvases.shape != (len(canvases), 200, 100)") is True


def test_films_are_saved_under_the_source_they_came_from(session, kernel, project):
    script = project / "01_prepare_data.py"
    save, console = cell(script, "Save"), CONSOLE["01_prepare_data.py"]
    assert failures(run_cells(kernel, script, console=console, last=save)) == []
    kernel.execute("source = 'own'")  # as after a look for other films
    assert kernel.run_cell(script, save).error == ""
    assert kernel.get("prepared.source") == "phantom"


def prepare_fatty(kernel, script, console):
    """Type a filter between two cells of step 1; return how many films it left, and the note."""
    read = cell(script, "Read the labels") + 1
    assert failures(run_cells(kernel, script, console=console, last=read)) == []
    kernel.execute('labels = labels[labels["tissue"] == "F"]')
    assert failures(run_cells(kernel, script, first=read)) == []
    assert kernel.get("[*prepared.labels['tissue'].unique()]") == ["F"]
    return kernel.get("[len(prepared.films), prepared.note]")


def test_labels_filtered_between_two_cells_are_what_is_prepared_and_trained_on(
    session, kernel, project, tmp_path
):
    few = "settings.epochs = 1; settings.validation = 0.5"
    console = CONSOLE["01_prepare_data.py"] + "; settings.patients = 48; settings.folds = 2"
    with undrawn(kernel, project, tmp_path):
        left = prepare_fatty(kernel, project / "01_prepare_data.py", console)
        assert left == [32, "labels edited, 32 of 96"]
        for step, console in {**CONSOLE, "04_train.py": few}.items():
            if step < "04":
                continue
            assert failures(run_cells(kernel, project / step, console=console)) == []
        assert kernel.get("[len(predictions), judged_record['data']['films']]") == [16, 32]
        assert kernel.get("set(predictions['image']) <= set(prepared.labels['image'])") is True
    assert "labels edited, 32 of 96" in next(tmp_path.glob("runs/*/report.html")).read_text("utf-8")


def test_a_whole_file_runs_with_its_flags(session, kernel, project):
    """As F5 does, with options from Run > Configuration per file."""
    result = kernel.run_file(project / "02_dataset.py", "--batch-size 4")
    assert (result.error, result.figures) == ("", sum(FIGURES["02_dataset.py"].values()))
    assert kernel.get("settings.batch_size") == 4
