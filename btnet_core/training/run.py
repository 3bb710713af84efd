"""Training in a process of its own, so that a notebook's dead kernel loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from btnet_core.errors import ConfigError, TrainingError
from btnet_core.training import checkpoint
from btnet_core.training.config import TrainConfig


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
    config: TrainConfig, out: Path | str, *, device: str = "auto", fresh: bool = False, command: Sequence[str] = ()
) -> dict[str, Any]:
    """As ``train``, in another process that outlives this one; its lines are shown as they come.

    They are also in ``out/train.log``. Interrupting the cell stops the process, which saves a checkpoint first; calling
    again goes on. ``command`` replaces ``python`` in front of ``-m btnet_core train``, e.g. ("torchrun",
    "--nproc-per-node=4"). Environment variable BTNET_FRESH=1 (``btnet reproduce --fresh``) acts as ``fresh``.

    Raises:
        TrainingError: the process failed; its last lines are in the message.
        KeyboardInterrupt: after the checkpoint.
    """
    out, fresh = Path(out), fresh or os.environ.get("BTNET_FRESH") == "1"
    out.mkdir(parents=True, exist_ok=True)
    file, log = out / "config.json", out / "train.log"
    file.write_text(config.to_json())
    arguments = [*(command or (sys.executable,)), "-m", "btnet_core", "train", "--config", str(file), "--out", str(out)]
    arguments += ["--device", device, *(["--fresh"] if fresh else [])]
    with log.open("wb") as sink, log.open(encoding="utf-8", errors="replace") as source:
        process = subprocess.Popen(arguments, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while process.poll() is None:
                time.sleep(0.2)
                print(source.read(), end="", flush=True)
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            process.wait()
            print(source.read(), end="", flush=True)
            raise
        print(source.read(), end="", flush=True)
    if process.returncode:
        tail = "\n".join(log.read_text("utf-8", errors="replace").splitlines()[-8:])
        raise TrainingError(f"training in {out} ended with status {process.returncode}:\n{tail}")
    record = checkpoint.read_record(out)
    return json.loads(json.dumps(record["metrics"])) if record else {}
