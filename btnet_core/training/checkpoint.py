"""Checkpoints of a run in progress: atomic, complete, readable by any number of processes; and the record of a finished one."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from pathlib import Path
from typing import Any

import torch

from btnet_core.errors import CheckpointError, TrainingError, WriteError
from btnet_core.files import load_torch, reason, write_atomically
from btnet_core.training import distributed

FORMAT = 1
STATE = "checkpoint/state.pt"
RECORD = "run.json"


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "format": str(FORMAT),
    }


def unwritten(path: Path, error: Exception, good: Path) -> TrainingError:
    """What to tell when ``path`` could not be written: why, and what is left."""
    kept = f"; the last good one is kept in {good}" if good.exists() else ""
    if isinstance(error, WriteError):
        return TrainingError(f"{error}{kept}")
    why = reason(error) if isinstance(error, OSError) else error
    return TrainingError(f"{path}: cannot be written ({why}){kept}")


def save_state(out: Path, state: dict[str, Any]) -> None:
    """Write a state of tensors, numbers and strings to ``out/checkpoint/state.pt``."""
    try:
        write_atomically(out / STATE, lambda file: torch.save({"format": FORMAT, **state}, file))
    except WriteError as error:
        raise unwritten(out / STATE, error, out / STATE) from error


def load_state(out: Path) -> dict[str, Any] | None:
    """The saved state (on the CPU, nothing in it is executed), or None where there is none.

    Raises:
        CheckpointError: damaged or of another format.
    """
    path = out / STATE
    if not path.is_file():
        return None
    try:
        state = load_torch(path)
    except Exception as error:  # torch raises many types for damaged or unsafe files
        raise CheckpointError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); --fresh starts over"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else None
        raise CheckpointError(
            f"{path}: format {found}, expected {FORMAT}: of another version; --fresh starts over"
        )
    return state


def check_room(out: Path, needed: int) -> None:
    """Find out before the first step whether checkpoints of ``needed`` bytes can be written to ``out``.

    Raises:
        TrainingError: the folder cannot be written, or has no room for two of them.
    """
    try:
        probe = out / "checkpoint" / f".probe_{distributed.rank()}"
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
        free = shutil.disk_usage(out).free
    except OSError as error:
        raise TrainingError(
            f"{out}: cannot be written ({error.strerror or error}); choose another folder"
        ) from error
    if free < 2 * needed + 2**20:
        raise TrainingError(
            f"{out}: {free / 1e6:.0f} MB free, checkpoints need {2 * needed / 1e6:.0f} MB (the last good and the next)"
        )


def fingerprint(path: str | Path) -> str:
    """SHA-256 of an input file; CheckpointError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else \
                hashlib.sha256(file.read()).hexdigest()  # fmt: skip
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error


def write_record(out: Path, record: dict[str, Any]) -> None:
    """``out/run.json``: the configuration, inputs and results of a finished run."""
    write_atomically(out / RECORD, json.dumps(record, indent=1))


def read_record(out: Path) -> dict[str, Any] | None:
    """What ``write_record`` wrote, or None."""
    try:
        record = json.loads((out / RECORD).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return (
        record
        if isinstance(record, dict) and {"config", "inputs", "metrics"} <= record.keys()
        else None
    )


def forget(out: Path) -> None:
    """Remove the checkpoint and the record of an earlier run (first process; the others wait)."""
    if distributed.rank() == 0:
        for name in (STATE, RECORD):
            (out / name).unlink(missing_ok=True)
    distributed.wait()
