"""Training in processes of its own: `python -m btnet_core.training.launch`, also under torchrun."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from btnet_core.data.faces import open_faces
from btnet_core.data.sources import register, registered
from btnet_core.device import cores, idle_cores, resolve_device
from btnet_core.errors import BTNetError, ConfigError, TrainingError
from btnet_core.files import write_atomically
from btnet_core.training import checkpoint, distributed
from btnet_core.training.config import TrainConfig
from btnet_core.training.loop import train

MALLOC = {  # of glibc: freed memory is kept, in huge pages, not asked for anew at every step
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_ARENA_MAX": "1",
}
Runs = dict[Path, TrainConfig]  # by folder
INTERRUPTED = 130  # status of a process that was stopped by Ctrl-C and saved a checkpoint


def train_from_file(
    config: Path | str, out: Path | str, *, device: str = "auto", fresh: bool = False,
    show: str = "auto",
) -> dict[str, Any]:  # fmt: skip
    """``train`` what a page (JSON or YAML) says; leaves torchrun's group at the end."""
    try:
        return train(TrainConfig.read(config), out, device=device, fresh=fresh, show=show)
    finally:
        distributed.stop()


def train_in_subprocess(
    config: TrainConfig, out: Path | str, *, device: str = "auto", fresh: bool = False,
    processes: int | str = 1,
) -> dict[str, Any]:  # fmt: skip
    """As ``train``, in other processes, with their progress as a bar or as lines.

    Their lines are also in ``out/train.log``. Interrupting the cell stops them, and a checkpoint is
    saved first; calling again goes on. BTNET_FRESH=1 (`btnet reproduce --fresh`) acts as ``fresh``.

    Args:
        processes: how many share each batch; "auto": one for each GPU.

    Raises:
        TrainingError: they failed; the last lines are in the message.
        KeyboardInterrupt: after the checkpoint.
    """
    (metrics,) = train_all({out: config}, device=device, fresh=fresh, processes=processes)
    return metrics


def train_all(
    runs: Mapping[Path | str, TrainConfig], *, device: str = "auto", fresh: bool = False,
    processes: int | str = 1,
) -> list[dict[str, Any]]:  # fmt: skip
    """As ``train_in_subprocess`` of each run, by its folder; returns their metrics.

    No process is started for a run that is finished, and its log stays.

    On a CPU, runs whose ``threads`` are given start side by side as long as a core is idle; each
    waits for those that make its files. An error of one stops all, with checkpoints.
    """
    fresh = fresh or os.environ.get("BTNET_FRESH") == "1"
    together = resolve_device(device).type == "cpu" and processes == 1
    show = "bar" if watched() and len(runs) == 1 else "lines"
    arguments = [*command(count(processes, device)), "--device", device, "--show", show]
    arguments += ["--fresh"] * fresh
    for kind, opener in registered().items():
        arguments += ["--source", f"{kind}={opener}"]
    waiting: Runs = {Path(out): one for out, one in runs.items() if fresh or not done(one, out)}
    running: dict[Path, Training] = {}
    try:
        while waiting or running:
            for out in ready(waiting, running, together)[:1]:
                running[out] = Training(waiting.pop(out), out, arguments)
            for out in [out for out, training in running.items() if not training.goes_on()]:
                running.pop(out).check()
            time.sleep(0.2)
    except BaseException:
        _stop(running.values())
        raise
    return [(checkpoint.read_record(Path(out)) or {"metrics": {}})["metrics"] for out in runs]


def done(config: TrainConfig, out: Path | str) -> bool:
    """Whether ``out`` holds the finished run; what is wrong with it the run itself tells."""
    if not (record := checkpoint.read_record(Path(out))):
        return False
    with suppress(BTNetError):
        identity = checkpoint.identity_of(config, open_faces(config.data).checksum)
        checkpoint.check_finished(record, identity, Path(out))
        return True
    return False


def ready(waiting: Runs, running: dict[Path, Training], together: bool) -> list[Path]:
    """The folders of runs that may start now; those that others wait for come first."""
    needs = {
        out: {Path(path).parent for path in (one.init, one.classifier) if path} - {out}
        for out, one in waiting.items()
    }
    able = [out for out, folders in needs.items() if not folders & {*waiting, *running}]
    if running:
        together &= all(one.config.threads for one in running.values())
        able = [out for out in able if together and waiting[out].threads]
        if not able or len(running) >= len(cores()) or not idle_cores(least=0):
            return []
    return sorted(able, key=lambda out: not any(out in folders for folders in needs.values()))


class Training:
    """A run in processes of its own, whose new lines ``goes_on`` prints."""

    def __init__(self, config: TrainConfig, out: Path, arguments: Sequence[str]) -> None:
        self.config, self.out, self.log = config, out, out / "train.log"
        write_atomically(out / "config.json", config.to_json())
        arguments = [*arguments, "--config", str(out / "config.json"), "--out", str(out)]
        with self.log.open("wb") as sink:
            self.process = subprocess.Popen(
                arguments, env=MALLOC | os.environ, stdout=sink, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        # A bar returns to the start of its line: line ends stay as they are.
        self.lines = self.log.open(encoding="utf-8", errors="replace", newline="")

    def goes_on(self) -> bool:
        alive = self.process.poll() is None
        print(self.lines.read(), end="", flush=True)
        return alive

    def check(self) -> None:
        """TrainingError if it failed."""
        self.lines.close()
        if status := self.process.returncode:
            text = f"training in {self.out} ended with status {status}"
            raise TrainingError(f"{text}:\n{_told(self.log)}")


def _stop(running: Iterable[Training]) -> None:
    """As Ctrl-C to each; waits for their checkpoints."""
    for training in running:
        training.process.send_signal(signal.SIGINT)
    for training in running:
        while training.goes_on():
            try:
                time.sleep(0.2)
            except KeyboardInterrupt:  # a second one stops at once
                training.process.send_signal(signal.SIGINT)
        training.lines.close()


def count(processes: int | str, device: str) -> int:
    """The number of processes; ConfigError if there are not as many GPUs."""
    gpus = torch.cuda.device_count() if resolve_device(device).type == "cuda" else 0
    if processes == "auto":
        return max(1, gpus)
    if not isinstance(processes, int) or processes < 1:
        raise ConfigError(f"processes: got {processes!r}, expected 'auto' or a number from 1 on")
    if gpus and processes > gpus:
        raise ConfigError(f"processes: got {processes}, the machine has {gpus} GPUs")
    return processes


def command(processes: int) -> list[str]:
    """How ``main`` is started in that many processes."""
    module = ["-m", "btnet_core.training.launch"]
    if processes == 1:
        return [sys.executable, *module]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *torchrun, *module]


def watched() -> bool:
    """True where somebody sees a bar: in a terminal, or a live notebook (not `btnet reproduce`)."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if getattr(shell, "kernel", None) is None:
        return sys.stderr.isatty()
    return "BTNET_REPRODUCE" not in os.environ


def _told(log: Path) -> str:
    """The error that a process named (see ``main``); the last lines where none did."""
    lines = log.read_text("utf-8", errors="replace").splitlines()
    names = tuple(f"{kind.__name__}: " for kind in BTNetError.__subclasses__())
    named = [line for line in lines if line.startswith(names)]
    return named[0] if named else "\n".join(lines[-8:])


def main(arguments: Sequence[str] | None = None) -> int:
    """One process of a training; returns its status."""
    parser = argparse.ArgumentParser(prog="python -m btnet_core.training.launch")
    parser.add_argument("--config", required=True, metavar="FILE", help="page of a TrainConfig")
    parser.add_argument("--out", required=True, metavar="DIR", help="for checkpoint and weights")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--show", default="auto", help="bar or lines; auto: as the terminal takes")
    parser.add_argument("--fresh", action="store_true", help="start over, whatever DIR holds")
    parser.add_argument("--source", action="append", default=[], metavar="KIND=MODULE:NAME",
                        help="what opens face sets of that kind")  # fmt: skip
    options = parser.parse_args(arguments)
    for source in options.source:
        register(*source.split("=", 1))
    try:
        train_from_file(
            options.config, options.out, device=options.device, fresh=options.fresh,
            show=options.show,
        )  # fmt: skip
    except BTNetError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
