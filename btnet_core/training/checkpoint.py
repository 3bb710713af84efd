"""Checkpoints of a run in progress: atomic, complete, readable by any number of processes; and the record of a finished one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from btnet_core.errors import CheckpointError, TrainingError
from btnet_core.files import load_torch
from btnet_core.training import distributed

FORMAT = 1
STATE = "checkpoint/state.pt"
RECORD = "run.json"
HOLDER = "running.pid"


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "format": str(FORMAT),
    }


def write_atomically(path: Path, write) -> None:
    """Call ``write(file)`` on a temporary neighbour, bring it to the disk, and put it in the place of ``path``.

    Raises:
        TrainingError: the disk is full or the folder read-only; ``path`` is then what it was.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save wraps a failed write into a RuntimeError
        temporary.unlink(missing_ok=True)
        raise unwritten(path, error, path) from error


def unwritten(path: Path, error: Exception, good: Path) -> TrainingError:
    """What to tell when ``path`` could not be written: why, and what is left."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    full = full or "No space left" in str(error) or "file write failed" in str(error)
    kept = f"; the last good one is kept in {good}" if good.exists() else ""
    return TrainingError(
        f"{path}: cannot be written ({'the disk is full' if full else error}){kept}"
    )


def save_state(out: Path, state: dict[str, Any]) -> None:
    """Write a state of tensors, numbers and strings to ``out/checkpoint/state.pt``."""
    write_atomically(out / STATE, lambda file: torch.save({"format": FORMAT, **state}, file))


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
    write_atomically(out / RECORD, lambda file: file.write(json.dumps(record, indent=1).encode()))


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


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold ``out`` for one run; the system lets go of it when the process ends, however that happens.

    Raises:
        TrainingError: another process trains there.
    """
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise TrainingError(
            f"{out}: process {holder(out)} trains there; wait for it, stop it, or choose another folder"
        ) from None
    try:
        (out / HOLDER).write_text(str(os.getpid()))
        yield
    finally:
        (out / HOLDER).unlink(missing_ok=True)
        lock.release()


def holder(out: Path) -> int:
    """The process that trains in ``out``; 0: none, -1: one that has not said its number yet."""
    try:
        with FileLock(out / ".lock", timeout=0):
            return 0
    except Timeout:
        with suppress(OSError, ValueError):
            return int((out / HOLDER).read_text())
        return -1


def forget(out: Path) -> None:
    """Remove the checkpoint and the record of an earlier run (first process; the others wait)."""
    if distributed.rank() == 0:
        for name in (STATE, RECORD):
            (out / name).unlink(missing_ok=True)
    distributed.wait()
