"""Training in processes of its own: `python -m btnet_core.training.launch`, also under torchrun."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from btnet_core.data.sources import register, registered
from btnet_core.device import resolve_device
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
INTERRUPTED = 130  # status of a process that was stopped by Ctrl-C and saved a checkpoint


def train_from_file(
    config: Path | str, out: Path | str, *, device: str = "auto", fresh: bool = False,
    show: str = "auto",
) -> dict[str, Any]:  # fmt: skip
    """``train`` what a page (JSON or YAML) says; leaves torchrun's group at the end."""
    try:
        metrics = train(TrainConfig.read(config), out, device=device, fresh=fresh, show=show)
        distributed.wait()  # who leaves while others still work takes their connections along
        return metrics
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
    out, fresh = Path(out), fresh or os.environ.get("BTNET_FRESH") == "1"
    page, log = out / "config.json", out / "train.log"
    write_atomically(page, config.to_json())
    arguments = [*command(count(processes, device)), "--config", str(page), "--out", str(out)]
    arguments += ["--device", device, "--show", "bar" if watched() else "lines"]
    arguments += ["--fresh"] if fresh else []
    for kind, opener in registered().items():
        arguments += ["--source", f"{kind}={opener}"]
    with log.open("wb") as sink:
        process = subprocess.Popen(
            arguments, env=MALLOC | os.environ, stdout=sink, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    _follow(process, log)
    if process.returncode:
        status = f"training in {out} ended with status {process.returncode}"
        raise TrainingError(f"{status}:\n{_told(log)}")
    record = checkpoint.read_record(out)
    return record["metrics"] if record else {}


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


def _follow(process: subprocess.Popen, log: Path) -> None:
    """Print what is logged until the training ends; Ctrl-C stops it, and is raised then."""
    stopped, alive = False, True
    # A bar returns to the start of its line: line ends stay as they are.
    with log.open(encoding="utf-8", errors="replace", newline="") as told:
        while alive:
            try:
                alive = process.poll() is None
                print(told.read(), end="", flush=True)
                time.sleep(0.2 if alive else 0)
            except KeyboardInterrupt:
                process.send_signal(signal.SIGINT)
                stopped = True
    if stopped:
        raise KeyboardInterrupt


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
