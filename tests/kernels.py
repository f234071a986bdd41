"""Run ``# %%``-celled scripts in tests as Spyder does: cell by cell, in a real Spyder kernel.

The test plays the editor: ``%runcell -i N FILE`` makes the kernel ask for the code of that cell
over a comm named ``spyder_api``. The answer must come on the control channel, because the shell
channel is busy with the magic. Needs spyder-kernels 3.1.
"""

import contextlib
import json
import os
import queue
import re
import shlex
import sys
import tempfile
import textwrap
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager

KERNEL = "test-kernel"  # a name of our own: "python3" may belong to another interpreter
COLOUR = re.compile(r"\x1b\[[\d;]*m")
# Spyder removes these; MPLBACKEND as well, since MPLBACKEND=Agg would swallow every figure.
DROPPED = ("MPLBACKEND", "PYTEST_CURRENT_TEST", "PYTHONPATH", "PYTHONEXECUTABLE", "VIRTUAL_ENV")
# Spyder's default filter of the Variable Explorer; it hides callables, so every `nn.Module` too.
VIEW = {
    "exclude_private": True,
    "exclude_callables_and_modules": True,
    "filter_on": True,
    "check_all": False,
    "exclude_uppercase": False,
    "exclude_capitalized": False,
    "exclude_unsupported": False,
    "excluded_names": [],
    "minmax": False,
}


@dataclass
class CellResult:
    """What a cell left in the console and in the Plots pane."""

    stdout: str = ""  # with the carriage returns of progress lines
    stderr: str = ""
    figures: int = 0  # number of PNG images that the Plots pane got
    error: str = ""  # "ENAME: EVALUE" and the traceback; "" if the cell ran through
    title: str = ""  # "" for cell 0 and for plain code
    value: str = ""  # text of the last expression, as after Out[n]


def split_cells(path):
    """Split a script into ``(title, code)`` pairs; the codes, joined, are the file.

    Cell 0 is the text above the first marker. Unlike in Spyder, a marker in a string counts.
    """
    first, *cells = re.split(r"(?m)^(?=[ \t]*# ?%%)", Path(path).read_text(encoding="utf-8"))
    return [("", first)] + [(c.split("\n")[0].strip().lstrip("#% "), c) for c in cells]


def _as_sent(code, lines_above):
    """Return a cell as the editor sends it: dedented, and blank above, to keep line numbers."""
    code = textwrap.dedent(code)
    head = re.match(r"(?:[ \t]*(?:#.*)?(?:\n|\Z))*", code).group()
    return "\n" * (lines_above + head.count("\n")) + code[len(head) :]


def _environment(folder, added):
    """Return ``os.environ`` with `added`, without the user's IPython profile and `DROPPED`."""
    environ = {name: value for name, value in os.environ.items() if name not in DROPPED}
    return {**environ, "IPYTHONDIR": str(Path(folder, "ipython")), **added}


@contextlib.contextmanager
def _started(module, cwd, env, timeout):
    """Start ``python -m module`` as a kernel; yield its manager and client, and kill it at last.

    They talk over socket files: a TCP port that was free when the kernel was started may be taken
    once it binds it.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        spec = Path(folder, "kernels", KERNEL, "kernel.json")
        spec.parent.mkdir(parents=True)
        argv = [sys.executable, "-m", module, "-f", "{connection_file}"]
        spec.write_text(json.dumps({"argv": argv, "display_name": KERNEL, "language": "python"}))
        manager = KernelManager(
            kernel_name=KERNEL,
            kernel_spec_manager=KernelSpecManager(kernel_dirs=[str(spec.parent.parent)]),
            connection_file=str(Path(folder, "connection.json")),
            transport="tcp" if os.name == "nt" else "ipc",
        )
        stack.callback(manager.shutdown_kernel, now=True)
        manager.start_kernel(cwd=str(cwd), env=_environment(folder, env))
        client = manager.blocking_client()
        stack.callback(client.stop_channels)
        client.start_channels()
        client.wait_for_ready(timeout=timeout)
        yield manager, client


class SpyderKernel:
    """A running Spyder console, as a context manager; killed with its children on leaving.

    Parameters
    ----------
    cwd : path
        Working directory; take one outside of the project.
    env : dict of str to str, optional
        Environment variables, added to ``os.environ``.
    timeout, start_timeout : float
        Seconds for a cell (it is then interrupted and raises `TimeoutError`) and for the start.
    """

    def __init__(self, cwd, env=None, timeout=60.0, start_timeout=60.0):
        self.cwd, self.env, self.timeout, self.start_timeout = cwd, env, timeout, start_timeout
        self._comm, self._replies, self._editor = uuid.uuid4().hex, {}, {}

    def __enter__(self):
        """Start the kernel, open the editor's comm and configure the kernel as Spyder does."""
        env = {"SPY_PARENT_PID": str(os.getpid()), "SPY_TESTING": "True", **(self.env or {})}
        with contextlib.ExitStack() as stack:
            kernel = _started("spyder_kernels.console", self.cwd, env, self.start_timeout)
            self._manager, self._client = stack.enter_context(kernel)
            self._send("shell", "comm_open", {}, target_name="spyder_api")
            conf = {"namespace_view_settings": VIEW, "autoreload_magic": True}
            self._call("set_configuration", conf)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info):
        """Kill the kernel and remove its files."""
        self._stack.close()

    def run_cell(self, path, index, interrupt_after="", timeout=None):
        """Run cell `index` (as in `split_cells`) of the saved script, as shift+Return does.

        The stop button is pressed once the cell has printed the text `interrupt_after`.
        """
        cells = split_cells(path)
        codes = [code for _, code in cells]
        above = "".join(codes[:index]).count("\n")
        self._editor = {"run_cell": _as_sent(codes[index], above), "get_file_code": "".join(codes)}
        magic = f"%runcell -i {index} {shlex.quote(os.path.abspath(path))}"
        return self.execute(magic, interrupt_after, timeout, cells[index][0])

    def run_file(self, path, args=""):
        """Run the whole saved script with command-line arguments, as F5 does."""
        self._editor = {"get_file_code": Path(path).read_text(encoding="utf-8")}
        magic = f"%runfile {shlex.quote(os.path.abspath(path))} --args {shlex.quote(args)} --wdir"
        return self.execute(magic)

    def execute(self, code, interrupt_after="", timeout=None, title=""):
        """Run plain code, as typed in the console."""
        request = self._client.execute(code, allow_stdin=False)
        try:
            return self._listen(request, interrupt_after, timeout, title)
        except TimeoutError:
            self.interrupt()
            self._listen(request, timeout=10)
            raise

    def interrupt(self):
        """Press the stop button: SIGINT to the kernel and its children; safe in any thread."""
        self._manager.interrupt_kernel()

    def variables(self):
        """Return ``{name: type name}`` of what the Variable Explorer lists."""
        view = self._call("get_namespace_view")
        return {name: entry["python_type"] for name, entry in view.items()}

    def get(self, expression):
        """Return the value of an expression, carried over as JSON (arrays become lists)."""
        dumps = f"__import__('json').dumps(({expression}), default=lambda value: value.tolist())"
        result = self.execute(f"print({dumps})")
        if result.error:
            raise RuntimeError(result.error)
        return json.loads(result.stdout.splitlines()[-1])

    def _listen(self, request, interrupt_after="", timeout=None, title=""):
        """Collect what the kernel sends until it has done the request or answered the call."""
        result, end = CellResult(title=title), time.monotonic() + (timeout or self.timeout)
        while request not in self._replies:
            if time.monotonic() > end:
                raise TimeoutError(f"the kernel is still busy; stdout:\n{result.stdout}")
            try:
                msg = self._client.get_iopub_msg(timeout=0.2)
            except queue.Empty:
                if not self._manager.is_alive():
                    raise RuntimeError(f"the kernel died; stdout:\n{result.stdout}") from None
                continue
            kind, content = msg["msg_type"], msg["content"]
            if kind == "stream":
                setattr(result, content["name"], getattr(result, content["name"]) + content["text"])
                if interrupt_after and interrupt_after in result.stdout:
                    interrupt_after = ""
                    self.interrupt()
            elif kind == "display_data":
                result.figures += "image/png" in content["data"]
            elif kind == "execute_result":
                result.value = content["data"].get("text/plain", "")
            elif kind == "error":
                lines = [f"{content['ename']}: {content['evalue']}", *content["traceback"]]
                result.error = COLOUR.sub("", "\n".join(lines))
            elif kind == "comm_msg" and content["comm_id"] == self._comm:
                self._answer(**content["data"])
            elif msg["parent_header"].get("msg_id") == request:
                if content.get("execution_state") == "idle":  # comes after all output
                    break
        return result

    def _send(self, channel, msg_type, data, **content):
        """Send a message of our comm to the kernel."""
        msg = self._client.session.msg(msg_type, dict(content, comm_id=self._comm, data=data))
        getattr(self._client, channel + "_channel").send(msg)

    def _call(self, name, *args):
        """Call a function of the kernel over the comm and return its value."""
        call = {
            "call_name": name,
            "call_id": uuid.uuid4().hex,
            "call_args": args,
            "call_kwargs": {},
            "settings": {"blocking": True, "send_reply": True},
        }
        self._send("shell", "comm_msg", {"spyder_msg_type": "remote_call", "content": call})
        self._listen(call["call_id"])
        reply = self._replies.pop(call["call_id"])
        if reply["is_error"]:
            raise RuntimeError(f"{name}: {reply['call_return_value']}")
        return reply["call_return_value"]

    def _answer(self, spyder_msg_type, content):
        """Keep the reply to our call, or answer the kernel's call as Spyder's editor does."""
        if spyder_msg_type == "remote_call_reply":
            self._replies[content["call_id"]] = content
        elif content["settings"].get("send_reply"):
            reply = {
                "call_id": content["call_id"],
                "call_name": content["call_name"],
                "is_error": False,
                "call_return_value": self._editor.get(content["call_name"]),
            }
            self._send(
                "control", "comm_msg", {"spyder_msg_type": "remote_call_reply", "content": reply}
            )


def run_as_notebook(path, cwd, env=None, timeout=300.0):
    """Run the cells in a notebook kernel of this interpreter, as VS Code would, up to an error.

    Returns the traceback of the cell that raised, or "".
    """
    with _started("ipykernel_launcher", cwd, env or {}, timeout) as (_, client):
        for _, code in split_cells(path):
            done = client.execute_interactive(
                code, allow_stdin=False, timeout=timeout, output_hook=lambda _: None
            )
            if done["content"]["status"] != "ok":
                return COLOUR.sub("", "\n".join(done["content"]["traceback"]))
    return ""
