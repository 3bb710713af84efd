"""Runs the notebooks through papermill, not repeating those whose inputs have not changed.

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
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import papermill
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbconvert.filters import strip_ansi
from papermill.exceptions import PapermillExecutionError

from btnet_core.device import cores, idle_cores, resolve_device
from btnet_core.errors import ReproduceError
from btnet_core.files import lock
from btnet_paper import results
from btnet_paper.needs import data_checksum, require
from btnet_paper.notebooks import PACKAGE, Notebook, assign, code_checksum, load_notebooks, select
from btnet_paper.scales import get_scale
from btnet_paper.state import MADE, State

GRACE = 30.0  # seconds that an interrupted cell has to stop by itself, e.g. to write a checkpoint
START = 300  # seconds that a kernel has to start: a busy machine imports slowly
LONGEST_SOCKET = 80  # characters of the folder of a socket, whose whole path may have 107
LOG = logging.getLogger("btnet.kernel")
LOG.setLevel(logging.ERROR)  # its warnings are of no use to a reader
ADDED = {"injected-parameters", "papermill-error-cell-tag"}  # tags of cells that papermill adds
OWN = ("scale", "run_dir", "device", "processes")  # parameters that options of the command give


def reproduce(
    scale: str = "demo", *, only: Sequence[str] = (), parameters: dict[str, Any] | None = None,
    resume: bool = True, device: str | None = None, processes: str | None = None,
    jobs: str | None = None, runs: str | Path = "runs", notebooks: str | Path | None = None,
    data: str | None = None,
) -> Path:  # fmt: skip
    """Runs a folder's notebooks (default: the repository's); returns ``runs/<scale>``.

    Args:
        only: numbers or names; default all.
        parameters: values, or text as on a command line, for the notebooks that know them.
        resume: False repeats unchanged ones, too.
        jobs: how many run at once; "auto": as cores are idle where the scale gives its threads.
        data: checksum of the data; by default of what the scale uses.

    Raises:
        ReproduceError: unknown names, data that lacks, a notebook failed. BusyError: see `lock`.
        KeyboardInterrupt: it leaves a state from which the same command goes on.
    """
    chosen, began, page = select(load_notebooks(notebooks), only), time.time(), get_scale(scale)
    own = {"scale": scale, "device": device, "processes": processes}
    values = assign(chosen, _checked(own, jobs, parameters or {}), optional=OWN)
    if data is None:
        require(page, [notebook.number for notebook in chosen])
        data = data_checksum(scale)
    run_dir = Path(runs, page.name).resolve()
    beside = page.threads and resolve_device(device or "auto").type == "cpu"
    with lock(run_dir):
        work = Work(chosen, values, [code_checksum(), data], State(run_dir), scale, resume)
        ran = _run_all(work, int(not beside) if jobs in (None, "auto") else int(jobs))
    took = clock(time.time() - began)
    print(f"Scale {scale}: {ran} run, {len(chosen) - ran} unchanged, in {took}: {run_dir}")
    return run_dir


def _checked(own: dict[str, Any], jobs: str | None, parameters: dict[str, Any]) -> dict[str, Any]:
    """Returns options and parameters; ReproduceError for a wrong value, or one given twice."""
    if wrong := set(OWN) & set(parameters):
        names = ", ".join(sorted(wrong))
        options = "--scale, --runs, --device, --processes"
        raise ReproduceError(f"{names} cannot be a -p parameter: use {options}")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", own["device"] or "auto"):
        raise ReproduceError(f"device is {own['device']!r}, expected auto, cpu, cuda or cuda:N")
    for name, number in {"processes": own["processes"], "jobs": jobs}.items():
        if not re.fullmatch(r"auto|[1-9]\d*", number or "auto"):
            raise ReproduceError(f"{name} is {number!r}, expected auto or a number from 1 on")
    return {name: value for name, value in own.items() if value} | parameters


@dataclass(frozen=True)
class Work:
    """The notebooks that a command runs, and what with."""

    chosen: Sequence[Notebook]
    values: dict[str, dict[str, Any]]
    depends_on: list[str]
    state: State
    scale: str
    resume: bool

    def begin(self, notebook: Notebook) -> Running | None:
        """Returns it, ready to run, or None where its inputs have not changed; says which."""
        name = notebook.name
        inputs = [notebook.source_checksum, self.values[name], *self.depends_on]
        inputs.append(self.state.fingerprints(notebook.depends))
        fingerprint = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        took = self.state.seconds(name) or notebook.expected.get(self.scale)
        title = f"[{self.chosen.index(notebook) + 1}/{len(self.chosen)}] {name}"
        if self.resume and not notebook.always and self.state.is_current(name, fingerprint):
            print(f"{title}: unchanged, not run again (it took {clock(took or 0)})")
            return None
        print(f"{title}: of about {clock(took)}" if took else title, flush=True)
        return Running(notebook, title, fingerprint, self)


def _run_all(work: Work, jobs: int) -> int:
    """Runs those whose inputs have changed since the state was written; returns how many.

    ``jobs`` run at once, side by side; 0: as many as cores are idle.
    """
    waiting, running, ran = [*work.chosen], dict[Future[None], Running](), 0
    with ThreadPoolExecutor(jobs or len(cores())) as pool:
        try:
            while waiting or running:
                for notebook in ready(waiting, [*running.values()], jobs)[:1]:
                    waiting.remove(notebook)
                    if one := work.begin(notebook):
                        running[pool.submit(one.run)] = one
                        ran += 1
                for future in wait(running, 0.5, FIRST_COMPLETED).done:
                    running.pop(future).finish(future.exception())
        except BaseException:
            _stop(running)
            raise
    return ran


def ready(waiting: Sequence[Notebook], running: Sequence[Running], jobs: int) -> list[Notebook]:
    """Returns those that may start now: side by side, what others wait for, then the longest."""
    if len(running) >= (jobs or len(cores())) or (running and not jobs and not idle_cores(least=0)):
        return []
    before = [*(one.notebook for one in running)]
    able = []
    for notebook in waiting:
        missing = {one.number for one in before}
        if not (missing if notebook.always else missing & {*notebook.depends}):
            able.append(notebook)
        before.append(notebook)
    needed = {number for one in waiting for number in one.depends}
    longest = sorted(able, key=lambda one: -max(one.expected.values(), default=0))
    return able if jobs == 1 else sorted(longest, key=lambda one: one.number not in needed)


def _stop(running: dict[Future[None], Running]) -> None:
    """As Ctrl-C in each kernel, and again after GRACE; at last it is shut down."""
    try:
        for _ in range(2):
            for future, one in running.items():
                one.interrupt(future.done())
            wait(running, GRACE)
    finally:
        for future, one in running.items():
            one.interrupt(future.done(), now=True)
            spent = clock(time.time() - one.began)
            print(f"{one.notebook.name}: interrupted after {spent}; {one.again}")


class Running:
    """A notebook in a kernel of its own; `run` in a thread, all else in the main one."""

    def __init__(self, notebook: Notebook, title: str, fingerprint: str, work: Work) -> None:
        self.notebook, self.title, self.fingerprint = notebook, title, fingerprint
        self.values, self.state = work.values[notebook.name], work.state
        self.fresh, run_dir = not work.resume, work.state.run_dir
        self.log = run_dir / "logs" / f"{notebook.name}.log"
        self.executed = run_dir / "notebooks" / notebook.path.name
        self.kernel: AsyncKernelManager | None = None
        self.again = (
            f"the same command {'without --fresh ' * self.fresh}goes on from {notebook.name}"
        )
        for folder in ("results", "figures", "models", "notebooks", "logs"):
            (run_dir / folder).mkdir(parents=True, exist_ok=True)
        Path(run_dir, MADE.format(notebook.name)).unlink(missing_ok=True)
        self.state.forget(notebook.name)
        self.began = time.time()

    def run(self) -> None:
        """Runs it in a kernel of this very Python; what it prints goes to the log.

        BTNET_FRESH=1 (``fresh``) makes training start over there.
        """
        path, values = self.notebook.path, dict(self.values)
        if "run_dir" in self.notebook.parameters:
            values["run_dir"] = str(self.state.run_dir)
        code = filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH")))
        os.environ |= {"PYTHONPATH": os.pathsep.join(code), "BTNET_FRESH": str(int(self.fresh))}
        os.environ |= {"BTNET_REPRODUCE": "1", "TQDM_MININTERVAL": "30"}
        with _kernel() as self.kernel, open(self.log, "w", encoding="utf-8") as sink:
            try:
                papermill.execute_notebook(
                    path, self.executed, values, kernel_name="python3", language="python",
                    km=self.kernel, cwd=Path.cwd(), start_timeout=START,
                    stdout_file=sink, stderr_file=sink,
                )  # fmt: skip
            finally:
                if self.kernel.has_kernel:
                    run_sync(self.kernel.shutdown_kernel)()

    def interrupt(self, done: bool, now: bool = False) -> None:
        """As Ctrl-C in the kernel, or the end of it ``now``, unless it is ``done``."""
        if not done and self.kernel is not None and self.kernel.has_kernel:
            if now:
                run_sync(self.kernel.shutdown_kernel)(now=True)
            else:
                run_sync(self.kernel.interrupt_kernel)()

    def finish(self, error: BaseException | None) -> None:
        """Writes into state and manifest what it left; ReproduceError if it failed."""
        if error is not None:
            told = f"{explain(error, self.notebook, self.executed)}\n  log: {self.log}"
            raise ReproduceError(f"{told}\n  once mended, {self.again}") from error
        name, run_dir = self.notebook.name, self.state.run_dir
        about: dict[str, Any] = {"notebook": name, "parameters": self.values}
        about |= {"commit": results.commit(), "seconds": round(time.time() - self.began, 1)}
        made = outputs(run_dir, name)
        figures = [Path(file).stem for file in made if re.fullmatch(r"figures/[^/]+\.png", file)]
        results.update_manifest(run_dir, dict.fromkeys(figures, about))
        self.state.finish(name, about | {"outputs": made, "fingerprint": self.fingerprint})
        print(f"{self.title}: done in {clock(about['seconds'])}", flush=True)


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


def explain(error: BaseException, notebook: Notebook, executed: Path) -> str:
    """Returns an error with its place: the cell, counted from 1 in the source notebook."""
    where = f"{notebook.path.name}, cell {_reached(executed)} of {len(notebook.cells)}"
    if not isinstance(error, PapermillExecutionError):  # the kernel died, the disk is full, ...
        return f"{where}: {type(error).__name__}: {error}".splitlines()[0]
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


def outputs(run_dir: Path, name: str) -> list[str]:
    """Returns the files, by their paths in the run, that a notebook says it has made."""
    told = run_dir / MADE.format(name)
    made = [run_dir / line for line in told.read_text().splitlines()] if told.is_file() else []
    files = {file for path in made for file in (path, *path.rglob("*")) if file.is_file()}
    seen = [file for file in files if file.name[0] != "." and file.is_relative_to(run_dir)]
    return sorted(file.relative_to(run_dir).as_posix() for file in seen)
