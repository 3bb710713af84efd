"""Runs the notebooks in order through papermill, not repeating those whose inputs have not changed.

``runs/<scale>/`` receives the executed notebooks, logs, results (JSON), figures and ``state.json``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import papermill
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbconvert.filters import strip_ansi
from papermill.exceptions import PapermillExecutionError

from btnet_core.errors import BusyError, ReproduceError
from btnet_core.files import lock
from btnet_paper import results
from btnet_paper.needs import data_checksum, require
from btnet_paper.notebooks import (
    PACKAGE,
    Notebook,
    assign,
    code_checksum,
    load_notebooks,
    select,
)
from btnet_paper.scales import get_scale
from btnet_paper.state import State

GRACE = 30.0  # seconds that an interrupted cell has to stop by itself, e.g. to write a checkpoint
START = 300  # seconds that a kernel has to start: a busy machine imports slowly
LONGEST_SOCKET = 80  # characters of the folder of a socket, whose whole path may have 107
KEPT = ("results", "figures", "models")  # folders of a run whose files are a notebook's outputs
LOG = logging.getLogger("btnet.kernel")
LOG.setLevel(logging.ERROR)  # its warnings are of no use to a reader
ADDED = {"injected-parameters", "papermill-error-cell-tag"}  # tags of cells that papermill adds
OWN = ("scale", "run_dir", "device", "processes")  # parameters that options of the command give


def reproduce(
    scale: str = "demo",
    *,
    only: Sequence[str] = (),
    parameters: dict[str, Any] | None = None,
    resume: bool = True,
    device: str | None = None,
    processes: str | None = None,
    runs: str | Path = "runs",
    notebooks: str | Path | None = None,
    data: str | None = None,
) -> Path:
    """Runs a folder's notebooks (default: the repository's) in order; returns ``runs/<scale>``.

    Args:
        only: numbers or names; default all.
        parameters: values, or text as on a command line, for the notebooks that know them.
        resume: False repeats unchanged ones, too.
        data: checksum of the data; by default of what the scale uses.

    Raises:
        ReproduceError: before anything runs an unknown notebook or parameter, data that lacks, or a
            run folder in use; later a notebook that failed.
        KeyboardInterrupt: it leaves a state from which the same command goes on.
    """
    chosen, began = select(load_notebooks(notebooks), only), time.time()
    own = {"scale": scale, "device": device, "processes": processes}
    given = {name: value for name, value in own.items() if value}
    _check_options(given, parameters or {})
    values = assign(chosen, given | (parameters or {}), optional=OWN)
    if data is None:
        require(get_scale(scale), [notebook.number for notebook in chosen])
        data = data_checksum(scale)
    run_dir = (Path(runs) / get_scale(scale).name).resolve()
    with _hold(run_dir):
        ran = _run_all(chosen, values, [code_checksum(), data], State(run_dir), scale, resume)
    took = clock(time.time() - began)
    print(f"Scale {scale}: {ran} run, {len(chosen) - ran} unchanged, in {took}: {run_dir}")
    return run_dir


def _check_options(given: dict[str, Any], parameters: dict[str, Any]) -> None:
    """Raises ReproduceError where an option has a wrong value, or is given as a parameter."""
    if wrong := set(OWN) & set(parameters):
        names = ", ".join(sorted(wrong))
        options = "--scale, --runs, --device, --processes"
        raise ReproduceError(f"{names} cannot be a -p parameter: use {options}")
    device, processes = given.get("device", "auto"), given.get("processes", "auto")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ReproduceError(f"device is {device!r}, expected auto, cpu, cuda or cuda:N")
    if not re.fullmatch(r"auto|[1-9]\d*", processes):
        raise ReproduceError(f"processes is {processes!r}, expected auto or a number from 1 on")


def _run_all(
    chosen: Sequence[Notebook],
    values: dict[str, dict[str, Any]],
    depends_on: list[str],
    state: State,
    scale: str,
    resume: bool,
) -> int:
    """Runs those whose inputs have changed since ``state`` was written; returns how many."""
    ran = 0
    for number, notebook in enumerate(chosen, 1):
        name = notebook.name
        inputs = [notebook.source_checksum, values[name], *depends_on]
        inputs.append(state.fingerprints(notebook.depends))
        fingerprint = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        took = state.seconds(name) or notebook.expected.get(scale)
        title = f"[{number}/{len(chosen)}] {name}"
        if resume and not notebook.always and state.is_current(name, fingerprint):
            print(f"{title}: unchanged, not run again (it took {clock(took or 0)})")
            continue
        print(f"{title}: of about {clock(took)}" if took else title, flush=True)
        entry = _run_one(notebook, values[name], state, fresh=not resume)
        state.finish(name, entry | {"fingerprint": fingerprint})
        print(f"{title}: done in {clock(entry['seconds'])}", flush=True)
        ran += 1
    return ran


@contextmanager
def _hold(run_dir: Path) -> Iterator[None]:
    """The one lock of a run folder."""
    try:
        with lock(run_dir):
            yield
    except BusyError as error:
        raise ReproduceError(f"{run_dir} is in use by another run: {error}") from None


def _run_one(
    notebook: Notebook, values: dict[str, Any], state: State, *, fresh: bool
) -> dict[str, Any]:
    """Runs one notebook and returns what the state keeps of it, without the fingerprint."""
    run_dir, log = state.run_dir, state.run_dir / "logs" / f"{notebook.name}.log"
    executed = run_dir / "notebooks" / notebook.path.name
    for folder in (*KEPT, "notebooks", "logs"):
        (run_dir / folder).mkdir(parents=True, exist_ok=True)
    state.forget(notebook.name)
    before, began = _outputs(run_dir), time.time()
    known = {"run_dir": str(run_dir)} if "run_dir" in notebook.parameters else {}
    again = f"the same command {'without --fresh ' * fresh}goes on from {notebook.name}"
    try:
        execute(notebook, executed, values | known, log, fresh=fresh)
    except KeyboardInterrupt:
        print(f"{notebook.name}: interrupted after {clock(time.time() - began)}; {again}")
        raise
    except Exception as error:
        message = f"{explain(error, notebook, executed)}\n  log: {log}\n  once mended, {again}"
        raise ReproduceError(message) from error
    made = sorted(name for name, stamp in _outputs(run_dir).items() if before.get(name) != stamp)
    about: dict[str, Any] = {
        "notebook": notebook.name,
        "parameters": values,
        "commit": results.commit(),
    }
    about["seconds"] = round(time.time() - began, 1)
    figures = [Path(name).stem for name in made if re.fullmatch(r"figures/[^/]+\.png", name)]
    results.update_manifest(run_dir, dict.fromkeys(figures, about))
    return about | {"outputs": made}


def execute(
    notebook: Notebook, output: Path, values: dict[str, Any], log: Path, *, fresh: bool = False
) -> None:
    """Runs one notebook in a kernel of this very Python; what it prints goes to ``log``.

    ``fresh`` sets BTNET_FRESH=1 there, on which training starts over.
    """
    path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    os.environ |= {"PYTHONPATH": path, "BTNET_REPRODUCE": "1", "BTNET_FRESH": str(int(fresh))}
    os.environ |= {"TQDM_MININTERVAL": "30"}
    with _kernel() as kernel, open(log, "w", encoding="utf-8") as sink:
        try:
            papermill.execute_notebook(
                notebook.path,
                output,
                values,
                kernel_name="python3",
                language="python",
                km=kernel,
                cwd=notebook.path.parent,
                start_timeout=START,
                stdout_file=sink,
                stderr_file=sink,
            )
        except KeyboardInterrupt:
            if kernel.has_kernel:
                run_sync(kernel.interrupt_kernel)()
            raise
        finally:
            if kernel.has_kernel:
                run_sync(kernel.shutdown_kernel)()


@contextmanager
def _kernel() -> Iterator[AsyncKernelManager]:
    """A kernel to be, of this very Python; its sockets lie in a folder of their own.

    By default they lie in the folder of the notebooks, where those of two runs would meet.
    """
    with tempfile.TemporaryDirectory(prefix="btnet-") as folder:
        short = os.name == "posix" and len(folder) < LONGEST_SOCKET
        # without folders of specs "python3" is ipykernel's own, whose command is sys.executable
        yield AsyncKernelManager(
            kernel_name="python3",
            kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),
            connection_file=str(Path(folder) / "kernel.json"),
            transport="ipc" if short else "tcp",
            log=LOG,
            shutdown_wait_time=2 * GRACE,  # half of it before the kernel is terminated
        )


def explain(error: Exception, notebook: Notebook, executed: Path) -> str:
    """Returns an error with its place: the cell, counted from 1 in the source notebook."""
    where = f"{notebook.path.name}, cell {_reached(executed)} of {len(notebook.cells)}"
    if not isinstance(error, PapermillExecutionError):  # the kernel died, the disk is full, ...
        return f"{where}: {type(error).__name__}: {error}"
    trace = strip_ansi("\n".join(error.traceback)).splitlines()
    return "\n    ".join([f"{where}: {error.ename}: {error.evalue}", *trace[-12:]])


def _reached(executed: Path) -> int:
    """Returns the last cell that was started; those that papermill adds do not count."""
    cells = json.loads(executed.read_text("utf-8"))["cells"] if executed.is_file() else []
    about = [cell["metadata"] for cell in cells]
    started = [i for i, one in enumerate(about) if one.get("papermill", {}).get("start_time")]
    last = max(started, default=0)
    added = [one for one in about[:last] if ADDED & set(one.get("tags", ()))]
    return last + 1 - len(added)


def clock(seconds: float) -> str:
    """Returns a duration as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _outputs(run_dir: Path) -> dict[str, tuple[int, int]]:
    """Returns (time, size) of every file in KEPT, by its path in the run."""
    files = [path for folder in KEPT for path in (run_dir / folder).rglob("*") if path.is_file()]
    kept = [path for path in files if path.name != "manifest.json" and path.name[0] != "."]
    stats = {path.relative_to(run_dir).as_posix(): path.stat() for path in kept}
    return {name: (stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()}
