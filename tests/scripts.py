"""Take definitions out of a celled script, or run it, in the process of the tests."""

import ast
import functools
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest

PROJECT = Path(__file__).resolve().parent.parent


def targets_of(part):
    """Return what an assignment assigns to."""
    return part.targets if isinstance(part, ast.Assign) else [part.target]


@functools.lru_cache(maxsize=None)
def definitions(name):
    """Return a module with the imports, definitions and constants of a script; no cell runs.

    Constants are what is assigned to names in capitals; `importlib.import_module` counts as an
    import. Importing a plain script would run it.
    """
    path = PROJECT / f"{name}.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    taken = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    tree.body = [
        part
        for part in tree.body
        if isinstance(part, taken)
        or isinstance(part, (ast.Assign, ast.AugAssign))
        and (
            all(getattr(target, "id", "").isupper() for target in targets_of(part))
            or ast.unparse(part.value).startswith("importlib.import_module(")
        )
    ]
    module = types.ModuleType(f"definitions_{name}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses and inspect look it up there
    exec(compile(tree, str(path), "exec"), vars(module))
    return module


@functools.lru_cache(maxsize=None)
def compiled(path):
    """Return the code of a script."""
    return compile(Path(path).read_text(encoding="utf-8"), str(path), "exec")


def flags(**settings):
    """Write settings as a command line; True is a flag alone."""
    words = []
    for name, value in settings.items():
        words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return words


def run(path, *arguments):
    """Run a script as ``python path arguments`` does; return its variables.

    A UserError, or whatever else ends the script, is raised here; a script that ends because its
    work is done gives the variables that it had.
    """
    module = types.ModuleType("__main__")
    module.__file__ = str(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), *arguments])
        patch.setattr(sys, "excepthook", sys.excepthook)  # the script sets its own
        patch.setitem(sys.modules, "__main__", module)
        try:
            exec(compiled(path), vars(module))
        except SystemExit as end:
            if end.code is not None:
                raise
    return SimpleNamespace(**vars(module))
