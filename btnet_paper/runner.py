"""Run the notebooks in order through papermill, not repeating those whose inputs have not changed.

`runs/<scale>/` receives the executed notebooks, logs, results (JSON), figures and `state.json`: what each notebook
was last run with. It is written after every notebook, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from btnet_core.errors import ReproduceError
from btnet_core.files import lock, write_atomically
from btnet_paper import results
from btnet_paper.notebooks import (
    Notebook,
    assign,
    code_checksum,
    data_checksum,
    explain,
    load_notebooks,
    select,
)

PACKAGE = Path(__file__).parent
GRACE = 30.0  # seconds an interrupted cell has to stop by itself, e.g. to write a checkpoint
KEPT = (
    "results",
    "figures",
    "models",
)  # folders of a run whose files count as a notebook's outputs


def reproduce(
    scale: str = "demo",
    *,
    only: Sequence[str] = (),
    parameters: dict[str, Any] | None = None,
    resume: bool = True,
    device: str | None = None,
    runs: str | Path = "runs",
    notebooks: str | Path | None = None,
    data: str | None = None,
) -> Path:
    """Run the notebooks of the folder `notebooks` (default: the repository's) in order; return `runs/<scale>`.

    `only`: numbers or names, default all. `parameters`: values, or text as on a command line, for the selected
    notebooks that know them. `resume=False` repeats unchanged ones, training included. `data`: checksum of the
    data, by default of what the scale uses. Raises ReproduceError before anything runs for an unknown notebook or parameter and
    for a run folder in use, and later for a failed notebook. KeyboardInterrupt leaves a state that resumes.
    """
    chosen = select(load_notebooks(notebooks), only)
    if wrong := {"scale", "run_dir", "device"} & set(parameters or {}):
        raise ReproduceError(
            f"{', '.join(sorted(wrong))} cannot be a -p parameter: use --scale, --runs, --device"
        )
    if device and not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ReproduceError(f"device is {device!r}, expected auto, cpu, cuda or cuda:N")
    given = {"scale": scale} | ({"device": device} if device else {}) | (parameters or {})
    values = assign(chosen, given, optional=("scale", "device"))
    data = data_checksum(scale) if data is None else data
    run_dir, code, began, ran = (Path(runs) / scale).resolve(), code_checksum(), time.time(), 0
    with lock(run_dir):
        state = State(run_dir)
        for number, notebook in enumerate(chosen, 1):
            inputs = [
                notebook.source_checksum,
                values[notebook.name],
                code,
                data,
                state.prints(notebook.depends),
            ]
            print_ = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
            expected = state.seconds(notebook.name) or notebook.expected.get(scale)
            line = Progress(
                f"[{number}/{len(chosen)}] {notebook.name}", expected, len(notebook.cells)
            )
            if resume and not notebook.always and state.is_current(notebook, print_):
                line.end(f"unchanged, not run again (it took {clock(expected or 0)})")
            else:
                _run_one(notebook, values[notebook.name], print_, state, line, fresh=not resume)
                ran += 1
    print(
        f"Scale {scale}: {ran} run, {len(chosen) - ran} unchanged, in {clock(time.time() - began)}. Results:"
    )
    for folder in ("results", "figures", "notebooks", "logs"):
        print(f"  {folder:<10}{run_dir / folder}")
    print(f"  {'report':<10}{_report(scale, runs, notebooks)}")
    return run_dir


def _report(scale: str, runs: str | Path, notebooks: str | Path | None) -> str:
    """The path of the report, made now; without it the run is as good, so that a failure is only told."""
    try:
        from btnet_paper.report import report

        return str(report(scale, runs=runs, notebooks=notebooks))
    except Exception as error:
        again = f"btnet report --scale {scale} --runs {runs}"
        return f"not made ({type(error).__name__}: {error}); the results are complete, once mended: {again}"


def _run_one(
    notebook: Notebook,
    values: dict[str, Any],
    print_: str,
    state: State,
    line: Progress,
    *,
    fresh: bool,
) -> None:
    run_dir, log = state.run_dir, state.run_dir / "logs" / f"{notebook.name}.log"
    for folder in (*KEPT, "notebooks", "logs"):
        (run_dir / folder).mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    state.forget(notebook.name)  # what an earlier run of it left is overwritten from here on
    before, began = _outputs(run_dir), time.time()
    injected = values | ({"run_dir": str(run_dir)} if "run_dir" in notebook.parameters else {})
    again = f"the same command {'without --fresh ' if fresh else ''}goes on from {notebook.name}"
    try:
        execute(
            notebook, run_dir / "notebooks" / notebook.path.name, injected, log, line, fresh=fresh
        )
    except KeyboardInterrupt:
        line.end(f"interrupted after {clock(time.time() - began)}; {again}")
        raise
    except Exception as error:
        line.end(f"FAILED after {clock(time.time() - began)}")
        message = f"{explain(error, notebook, line.cell)}\n  log: {log}\n  once mended, {again}"
        raise ReproduceError(message) from error
    seconds = round(time.time() - began, 1)
    made = sorted(name for name, stamp in _outputs(run_dir).items() if before.get(name) != stamp)
    about = {
        "notebook": notebook.name,
        "parameters": values,
        "commit": results.commit(),
        "seconds": seconds,
    }
    figures = [Path(name).stem for name in made if re.fullmatch(r"figures/[^/]+\.png", name)]
    results.update_manifest(run_dir, dict.fromkeys(figures, about))
    state.finish(notebook.name, about | {"fingerprint": print_, "outputs": made})
    line.end(f"done in {clock(seconds)}")


def execute(
    notebook: Notebook,
    output: Path,
    values: dict[str, Any],
    log: Path,
    line: Progress,
    *,
    fresh: bool = False,
) -> None:
    """Run one notebook by papermill in a kernel of this very Python; what it prints goes to `log`.

    `fresh` sets BTNET_FRESH=1 there, on which training starts over instead of returning what is finished.

    papermill works in a thread, so that this one can show progress and pass Ctrl-C on to the cell that runs.
    """
    import papermill
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    env = {
        "PYTHONPATH": path,
        "BTNET_REPRODUCE": "1",
        "TQDM_MININTERVAL": "30",
        "BTNET_FRESH": str(int(fresh)),
    }
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernels: list[Any] = []
    failures: list[BaseException] = []

    class ThisPython(AsyncKernelManager):
        kernel_spec = KernelSpec(argv=command, env=env, display_name="Python 3", language="python")

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            kernels.append(self)

        async def _async_launch_kernel(self, kernel_cmd: list[str], **options: Any) -> None:
            with open(
                log, "ab"
            ) as errors:  # what does not go through Jupyter: warnings at start, a crash
                await super()._async_launch_kernel(kernel_cmd, **options | {"stderr": errors})

    def work() -> None:
        options = {
            "kernel_name": "python3",
            "language": "python",
            "kernel_manager_class": ThisPython,
        }
        options |= {"cwd": str(notebook.path.parent), "progress_bar": False, "log_output": True}
        try:
            papermill.execute_notebook(str(notebook.path), str(output), values, **options)
        except BaseException as error:
            failures.append(error)

    with _logging_to(log, line, notebook.parameters_cell if values else len(notebook.cells)):
        _attend(threading.Thread(target=work, daemon=True), kernels, line)
    if failures:
        raise failures[0]


def _attend(thread: threading.Thread, kernels: list[Any], line: Progress) -> None:
    """Wait for `thread`. Ctrl-C interrupts the running cell; the kernel is killed if that does not stop it."""
    thread.start()
    asked, deadline, cell = 0, 0.0, 0
    while thread.is_alive():
        try:
            thread.join(0.1)
            line.tick()
            if not asked or (time.time() < deadline and line.cell == cell):
                continue
            asked += 1  # the grace is over, or the notebook went on to its next cell
        except KeyboardInterrupt:
            asked += 1
            deadline, cell = time.time() + GRACE, line.cell
        process = kernels[0].provisioner.process if kernels and kernels[0].provisioner else None
        if process is not None and os.name == "posix":
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT if asked == 1 else signal.SIGKILL)
        elif process is not None:
            process.terminate()
        if process is None or asked > 1:
            thread.join(10)
            break
    if asked:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _logging_to(log: Path, line: Progress, injected_after: int) -> Iterator[None]:
    logger, handler = logging.getLogger("papermill"), logging.FileHandler(log, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))

    def watch(entry: logging.LogRecord) -> bool:
        if started := re.match(r"Executing Cell (\d+)-", entry.getMessage()):
            line.cell = int(started[1]) - (int(started[1]) > injected_after)
        return True

    handler.addFilter(watch)
    logger.propagate = False
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


class Progress:
    """One line about a running notebook: rewritten each second in a terminal, repeated each minute elsewhere."""

    def __init__(self, title: str, expected: float | None, cells: int) -> None:
        self.title, self.cells, self.cell = title, cells, 0
        self.expected = f"of about {clock(expected)}" if expected else "(expected time unknown)"
        self.terminal, self.began, self.shown = sys.stdout.isatty(), time.time(), -1e9

    def tick(self) -> None:
        now = time.time()
        if now - self.shown >= (1 if self.terminal else 60):
            self.shown = now
            text = f"cell {self.cell}/{self.cells}, {clock(now - self.began)} {self.expected}"
            self.end(text, "" if self.terminal else "\n")

    def end(self, text: str, end: str = "\n") -> None:
        print(
            f"\r\033[K{self.title}: {text}" if self.terminal else f"{self.title}: {text}",
            end=end,
            flush=True,
        )


def clock(seconds: float) -> str:
    """A duration as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
    )


class State:
    """`state.json` of a run folder: for each finished notebook its fingerprint, duration and outputs."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.path = run_dir, run_dir / "state.json"
        try:
            self.notebooks: dict[str, dict[str, Any]] = json.loads(self.path.read_text())
        except FileNotFoundError:
            self.notebooks = {}
        except ValueError as error:
            raise ReproduceError(
                f"{self.path} is damaged ({error}); delete it to run everything again"
            ) from None

    def seconds(self, name: str) -> float | None:
        return self.notebooks.get(name, {}).get("seconds")

    def prints(self, depends: Sequence[str]) -> dict[str, str | None]:
        """The fingerprints that the outputs of other notebooks were made with."""
        found = {name: entry.get("fingerprint") for name, entry in self.notebooks.items()}
        return {
            key: next((p for n, p in found.items() if n.startswith(key)), None) for key in depends
        }

    def is_current(self, notebook: Notebook, print_: str) -> bool:
        entry = self.notebooks.get(notebook.name, {})
        files = [f"notebooks/{notebook.path.name}", *entry.get("outputs", ())]
        return entry.get("fingerprint") == print_ and all(
            (self.run_dir / file).is_file() for file in files
        )

    def forget(self, name: str) -> None:
        if self.notebooks.get(name, {}).pop("fingerprint", None):
            self.finish(name, self.notebooks[name])

    def finish(self, name: str, entry: dict[str, Any]) -> None:
        self.notebooks[name] = entry
        write_atomically(self.path, json.dumps(self.notebooks, indent=1).encode() + b"\n")


def _outputs(run_dir: Path) -> dict[str, tuple[int, int]]:
    files = [path for folder in KEPT for path in (run_dir / folder).rglob("*") if path.is_file()]
    files = [
        path for path in files if path.name != "manifest.json" and not path.name.startswith(".")
    ]
    return {
        path.relative_to(run_dir).as_posix(): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in files
    }
