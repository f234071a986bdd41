"""The kernel driver tells the truth about a celled script: output, figures, errors, stop button."""

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import kernels
import pytest

SCRIPT = '''"""Docstring: cell 0."""
# %% Settings
import sys
from pathlib import Path

n_films = 4
_private = 1
here = Path(__file__).parent
print("Größe", n_films, __name__, sys.argv)

# %% Figures
import matplotlib.pyplot as plt
import numpy as np

values = np.arange(n_films) / 2
fig, ax = plt.subplots()
fig2, ax2 = plt.subplots()
plt.show()
#%%Raises
def divide():
    """Divide by nothing."""

    return 1 / 0


print("before", file=sys.stderr)
divide()
# %% Long loop
import time

for epoch in range(10_000):
    print(f"\\repoch {epoch}", end="", flush=True)
    time.sleep(0.02)
'''
DOC, SETTINGS, FIGURES, RAISES, LOOP = range(5)


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """Return a script whose path has blanks, a quote and an umlaut."""
    folder = tmp_path_factory.mktemp("project") / "it's schön  here"
    folder.mkdir()
    path = folder / "01 größe.py"
    path.write_text(SCRIPT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """Start one kernel for the tests of this file, which run in order."""
    cwd = tmp_path_factory.mktemp("elsewhere")
    with kernels.SpyderKernel(cwd, env={"FILMS": "7"}, timeout=20) as kernel:
        yield kernel


def test_cells_are_split_as_in_spyder(script):
    """Titles are the rest of the marker line; no text is lost."""
    cells = kernels.split_cells(script)
    titles = ["", "Settings", "Figures", "Raises", "Long loop"]
    assert [title for title, _ in cells] == titles
    assert "".join(code for _, code in cells) == SCRIPT
    assert cells[DOC][1] == '"""Docstring: cell 0."""\n'


def test_a_cell_runs_where_and_as_it_should(kernel, script):
    """Cell 0, blanks and letters in the path, environment and working directory are as given."""
    assert kernel.run_cell(script, DOC) == kernels.CellResult(value="'Docstring: cell 0.'")
    result = kernel.run_cell(script, SETTINGS)
    assert result.stdout == "Größe 4 __main__ ['']\n"
    assert (result.error, result.stderr, result.title) == ("", "", "Settings")
    assert kernel.get("str(here)") == str(script.parent)
    assert kernel.get("'__file__' in globals()") is False
    assert kernel.get("__import__('os').environ['FILMS']") == "7"
    assert kernel.get("str(Path.cwd())") == str(kernel.cwd)


def test_open_figures_are_counted(kernel, script):
    """Both figures reach the Plots pane; a closed one does not."""
    result = kernel.run_cell(script, FIGURES)
    assert (result.figures, result.error) == (2, "")
    assert kernel.execute("plt.plot(values);").figures == 1
    assert kernel.execute("plt.plot(values); plt.close()").figures == 0


def test_a_raising_cell_is_an_error(kernel, script):
    """The traceback names the line of the file; the output before it is kept."""
    result = kernel.run_cell(script, RAISES)
    assert result.error.startswith("ZeroDivisionError: division by zero\n")
    line = SCRIPT.split("\n").index("    return 1 / 0") + 1
    assert f"{line}     return 1 / 0" in result.error and "\x1b" not in result.error
    assert result.stderr == "before\n"


def test_the_variables_are_those_of_the_variable_explorer(kernel):
    """No private name, module, function or class."""
    variables = kernel.variables()
    assert variables["n_films"] == "int" and variables["values"] == "NDArray"
    assert not {"_private", "np", "divide", "Path", "In", "__name__"} & set(variables)
    assert kernel.get("values") == [0.0, 0.5, 1.0, 1.5]
    with pytest.raises(RuntimeError, match="NameError"):
        kernel.get("nothing")


def test_a_long_loop_is_stopped(kernel, script):
    """After an output, from a thread, and at the timeout; the variables are still there."""
    result = kernel.run_cell(script, LOOP, interrupt_after="epoch 3")
    assert result.error.startswith("KeyboardInterrupt") and 3 <= kernel.get("epoch") < 100
    timer = threading.Timer(0.3, kernel.interrupt)
    timer.start()
    assert kernel.run_cell(script, LOOP).error.startswith("KeyboardInterrupt")
    timer.join()
    with pytest.raises(TimeoutError, match="epoch 1"):
        kernel.run_cell(script, LOOP, timeout=0.5)
    assert kernel.get("n_films") == 4


def test_a_whole_file_runs_with_arguments(kernel, script):
    result = kernel.run_file(script, "--films 2")
    assert f"['{script}', '--films', '2']" in result.stdout.replace('"', "'")
    assert result.error.startswith("ZeroDivisionError")


def test_a_dead_kernel_is_said_and_its_children_are_killed(kernel, tmp_path):
    """The last test of this kernel: no endless wait, and nothing goes on after the test."""
    beats = tmp_path / "beats"
    child = f"import time\nwhile 1: open({str(beats)!r}, 'a').write('x'); time.sleep(0.05)"
    kernel.execute(f"import os, subprocess; subprocess.Popen([sys.executable, '-c', {child!r}])")
    while not beats.exists():
        time.sleep(0.05)
    with pytest.raises(RuntimeError, match="died"):
        kernel.execute("os._exit(3)")
    kernel.__exit__(None, None, None)
    size = beats.stat().st_size
    time.sleep(0.3)
    assert beats.stat().st_size == size


def test_a_notebook_run_fails_only_if_a_cell_raises(tmp_path):
    """Two runs at a time: the kernel is that of this interpreter, and no file is left."""
    start = "# %% Größe\nimport sys\nfrom pathlib import Path\n"
    good, bad = tmp_path / "gutes heft.py", tmp_path / "bad.py"
    good.write_text(start + "Path('python.txt').write_text(sys.executable)\n", encoding="utf-8")
    raising = start + "# %% Bad\nraise ValueError('schön')\n# %%\nopen('later.txt', 'w')\n"
    bad.write_text(raising, encoding="utf-8")
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    with ThreadPoolExecutor() as pool:
        done, failed = pool.map(lambda path: kernels.run_as_notebook(path, cwd), [good, bad])
    assert done == ""
    assert (cwd / "python.txt").read_text(encoding="utf-8") == sys.executable
    assert "ValueError: schön" in failed and not (cwd / "later.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.py", "cwd", "gutes heft.py"]
