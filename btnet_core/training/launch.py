"""Training in a process of its own, so that a notebook's dead kernel loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from btnet_core.errors import ConfigError, TrainingError
from btnet_core.files import holder
from btnet_core.training import checkpoint
from btnet_core.training.config import TrainConfig
from btnet_core.training.progress import LIVE, STEP, watched

MALLOC = {  # of glibc: freed memory is kept, in huge pages, and not asked for anew at every step; elsewhere ignored
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_ARENA_MAX": "1",
}


def train_from_file(
    config: Path | str, out: Path | str, *, device: str = "auto", fresh: bool = False
) -> dict[str, Any]:
    """``train`` for the command line: the configuration is a JSON file."""
    from btnet_core.training import distributed
    from btnet_core.training.loop import train

    try:
        text = Path(config).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{config}: cannot be read ({error})") from error
    try:
        metrics = train(TrainConfig.from_json(text), out, device=device, fresh=fresh)
    finally:
        distributed.stop()
    return metrics


def train_in_subprocess(
    config: TrainConfig,
    out: Path | str,
    *,
    device: str = "auto",
    fresh: bool = False,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """As ``train``, in another process that outlives this one, with its progress as a bar or as lines.

    Its lines are also in ``out/train.log``. Interrupting the cell stops the process, which saves a checkpoint first;
    calling again goes on, after a kernel's death by watching the process that it left. ``command`` replaces ``python``
    in front of ``-m btnet_tools train``, e.g. ("torchrun", "--nproc-per-node=4"). Environment variable BTNET_FRESH=1
    (``btnet reproduce --fresh``) acts as ``fresh``.

    Raises:
        TrainingError: the process failed; its last lines are in the message.
        KeyboardInterrupt: after the checkpoint.
    """
    out, fresh = Path(out), fresh or os.environ.get("BTNET_FRESH") == "1"
    out.mkdir(parents=True, exist_ok=True)
    if pid := holder(out):
        print(f"{config.name}: process {pid} is training here, started earlier")
        _follow(out, config.name, lambda: holder(out) != 0, lambda: _interrupt(pid))
    file, log = out / "config.json", out / "train.log"
    file.write_text(config.to_json())
    (out / LIVE).unlink(missing_ok=True)
    arguments = [
        *(command or (sys.executable,)),
        "-m",
        "btnet_tools",
        "train",
        "--config",
        str(file),
        "--out",
        str(out),
    ]
    arguments += ["--device", device, *(["--fresh"] if fresh else [])]
    with log.open("wb") as sink:
        process = subprocess.Popen(
            arguments,
            env=MALLOC | os.environ,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    _follow(
        out, config.name, lambda: process.poll() is None, lambda: process.send_signal(signal.SIGINT)
    )
    if process.returncode:
        tail = "\n".join(log.read_text("utf-8", errors="replace").splitlines()[-8:])
        raise TrainingError(f"training in {out} ended with status {process.returncode}:\n{tail}")
    record = checkpoint.read_record(out)
    return json.loads(json.dumps(record["metrics"])) if record else {}


def _interrupt(pid: int) -> None:
    if pid > 0:  # known
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, signal.SIGINT)


def _follow(out: Path, name: str, runs: Callable[[], bool], stop: Callable[[], None]) -> None:
    """Show the training in ``out`` while it ``runs``; Ctrl-C calls ``stop``, and is raised when it has ended."""
    bar, live, stopped, alive = None, watched(), False, True
    with (out / "train.log").open(encoding="utf-8", errors="replace") as log:
        while alive:
            try:
                alive = runs()
                for line in log.read().splitlines():
                    if not (live and line.startswith(STEP.format(name=name))):
                        (print if bar is None else bar.write)(line)
                sys.stdout.flush()
                bar = _advance(bar, out, name) if live else None
                time.sleep(0.2 if alive else 0)
            except KeyboardInterrupt:
                stop()
                stopped = True
    if bar is not None:
        bar.close()
    if stopped:
        raise KeyboardInterrupt


def _advance(bar: tqdm | None, out: Path, name: str) -> tqdm | None:
    """The bar at the step where the training stands."""
    try:
        at = json.loads((out / LIVE).read_text())
    except (OSError, ValueError):  # not there yet
        return bar
    bar = (
        bar
        if bar is not None
        else tqdm(total=at["total"], initial=at["start"], desc=name, unit="step")
    )
    bar.set_postfix_str(at["text"], refresh=False)
    bar.update(at["step"] - bar.n)
    return bar
