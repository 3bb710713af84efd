"""A run in progress as a checkpoint for any number of processes; a finished one as a record."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from btnet_core.errors import CheckpointError, ConfigError, TrainingError, WriteError
from btnet_core.files import load_torch, reason, write_atomically
from btnet_core.training import distributed
from btnet_core.training.config import TrainConfig
from btnet_core.training.run import OPTIMISERS, Run

FORMAT = 3
STATE = "checkpoint/state.pt"
RECORD = "run.json"
# Fields that change no weight: free to differ when a run goes on, and in part when it is finished.
MACHINE = frozenset({"workers", "threads", "checkpoint_seconds", "cache", "cache_dir"})
SHOWN = frozenset({"name", "validation", "validation_resolutions", "validate_epochs"})
RESUMED = MACHINE | SHOWN | {"btnet"}


# ---- a run in progress --------------------------------------------------------------------------


def state_of(run: Run) -> dict[str, Any]:
    """Everything a later process, or another number of them, needs to go on (all must call it)."""
    distributed.average_statistics(run.network)
    momentum = {
        name: {buffer: run.optimiser.state[parameter][buffer] for buffer in buffers_of(run)}
        for name, parameter in run.learns.items()
    }
    for buffer, mine in momentum.get("kappa", {}).items():
        momentum["kappa"][buffer] = run.kappa.whole(mine)
    on_gpu = run.device.type == "cuda"
    return {
        "identity": json.dumps(run.identity),
        "versions": versions(),
        "step": run.step,
        "seconds": time.monotonic() - run.began,
        "network": run.network.state_dict(),
        "momentum": momentum,
        "kappa": run.kappa.whole() if run.kappa is not None else None,
        "margin": run.kappa.margin.state_dict() if run.kappa is not None else {},
        "metric": run.metric.state_dict() if run.metric is not None else {},
        "grad_scaler": run.grad_scaler.state_dict(),
        "skipped": run.skipped,
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state() if on_gpu else None,
        "threads": torch.get_num_threads(),
        "validation": json.dumps(run.validation),
    }


def buffers_of(run: Run) -> tuple[str, ...]:
    """What the optimiser keeps of each parameter, by its names for it."""
    return OPTIMISERS[run.config.optimiser][1]


def identity_in(state: dict[str, Any]) -> dict[str, Any]:
    """What ``identity_of`` gave when the state was saved."""
    return json.loads(state["identity"])


def resumable(out: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The state to go on from, if there is one; raises as ``load_state`` and ``check_same``."""
    state = load_state(out)
    if state is not None:
        check_same(identity_in(state), identity, out, RESUMED)
    return state


def restore(run: Run, state: dict[str, Any]) -> None:
    """Inverse of ``state_of``."""
    run.network.load_state_dict(state["network"])
    for name, buffers in state["momentum"].items():
        parameter = run.learns[name]
        for buffer, whole in buffers.items():
            mine = run.kappa.part(whole) if name == "kappa" else whole
            run.optimiser.state[parameter][buffer] = mine.to(parameter, copy=True)
        if "step" in run.optimiser.state[parameter]:
            run.optimiser.state[parameter]["step"].fill_(state["step"] - state["skipped"])
    if run.kappa is not None:
        with torch.no_grad():
            run.kappa.weight.copy_(run.kappa.part(state["kappa"]))
        run.kappa.margin.load_state_dict(state["margin"])
    if run.metric is not None:
        run.metric.load_state_dict(state["metric"])
    run.grad_scaler.load_state_dict(state["grad_scaler"])
    run.step, run.skipped = state["step"], state["skipped"]
    run.validation = json.loads(state["validation"])
    run.began = time.monotonic() - state["seconds"]
    torch.set_rng_state(state["rng"])
    if state["cuda_rng"] is not None and run.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda_rng"])


def save(run: Run) -> None:
    """Write a checkpoint (all processes must call it)."""
    state = state_of(run)
    if distributed.rank() == 0:
        save_state(run.out, state)


def save_state(out: Path, state: dict[str, Any]) -> None:
    """Write a state of tensors, numbers and texts to ``out/checkpoint/state.pt``; or WriteError."""
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
    except CheckpointError as error:
        raise CheckpointError(f"{error}; --fresh starts over") from error
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        other = f"format {found}, expected {FORMAT}: of another version"
        raise CheckpointError(f"{path}: {other}; --fresh starts over")
    return state


def unwritten(out: Path, error: OSError) -> TrainingError:
    """What to tell when something in ``out`` could not be written: why, and what is left."""
    good, told = out / STATE, f"{out}: cannot be written ({reason(error)})"
    told = str(error) if isinstance(error, WriteError) else told  # it names the file
    return TrainingError(f"{told}; the last good one is kept in {good}" if good.exists() else told)


def check_room(out: Path, needed: int) -> None:
    """Find out before the first step whether checkpoints of ``needed`` bytes can be written.

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
        why = reason(error)
        raise TrainingError(f"{out}: cannot be written ({why}); choose another folder") from error
    if free < 2 * needed + 2**20:
        two = f"{2 * needed / 1e6:.0f} MB (the last good and the next)"
        raise TrainingError(f"{out}: {free / 1e6:.0f} MB free, checkpoints need {two}")


# ---- what a run is, and the record of a finished one ---------------------------------------------


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": str(torch.__version__)}


def identity_of(config: TrainConfig, data: str) -> dict[str, Any]:
    """The configuration, and digests of what it names; ``data``: checksum of the faces."""
    named = (config.init, config.classifier)
    files = [path for path in named if path not in ("", "fresh", "class_means")]
    inputs = {"data": data, **{path: fingerprint(path) for path in files}}
    return {"config": config.to_dict(), "inputs": inputs}


def fingerprint(path: str | Path) -> str:
    """SHA-256 of an input file; CheckpointError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({reason(error)})") from error


def contents(identity: dict[str, Any]) -> dict[str, str | None]:
    """Digests of what a run reads, by the field that names it; None for what is no file."""
    config, inputs = identity["config"], identity["inputs"]
    files = {field: inputs.get(config.get(field)) for field in ("init", "classifier")}
    return {"data": inputs.get("data"), **files}


def check_same(old: dict[str, Any], new: dict[str, Any], out: Path, free: frozenset[str]) -> None:
    """What ``out`` holds is only gone on with, or returned, for the same recipe and inputs.

    A file or set of faces with the same content counts as the same, wherever it lies.

    Raises:
        ConfigError: naming every field and input that differs.
    """
    was, now = _complete(old["config"]), new["config"]
    read, given = contents(old), contents(new)
    same = {field for field in read if read[field] == given[field] is not None}
    changed = [
        f"{field} {was.get(field)!r} -> {now.get(field)!r}"
        for field in was | now
        if was.get(field) != now.get(field) and field not in free | same
    ]
    changed += [
        f"content of {now[field] if field != 'data' else field} {read[field]} -> {given[field]}"
        for field in read
        if read[field] != given[field]
    ]
    if changed:
        raise ConfigError(
            f"{out}: holds a run of another recipe ({'; '.join(sorted(changed))}); "
            "choose another folder, or start over with fresh=True (--fresh)"
        )


def check_finished(record: dict[str, Any], identity: dict[str, Any], out: Path) -> None:
    """As ``check_same`` of a finished run: its branch may have moved with the BTNet's folder."""
    r, folder = identity["config"]["resolution"], identity["config"]["btnet"]
    branch = Path(folder) / f"branch_{r}.safetensors"
    moved = folder and branch.is_file() and fingerprint(branch) == record.get("branch")
    check_same(record, identity, out, MACHINE | ({"btnet"} if moved else set()))


def _complete(config: dict[str, Any]) -> dict[str, Any]:
    """A recorded configuration with the fields that came after it, at their defaults."""
    try:
        return TrainConfig.from_dict(config).to_dict()
    except ConfigError:  # a field that is gone
        return config


def write_record(out: Path, record: dict[str, Any]) -> None:
    """``out/run.json``: the configuration, inputs and results of a finished run."""
    write_atomically(out / RECORD, json.dumps(record, indent=1))


def read_record(out: Path) -> dict[str, Any] | None:
    """What ``write_record`` wrote, or None."""
    try:
        record = json.loads((out / RECORD).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    whole = isinstance(record, dict) and {"config", "inputs", "metrics"} <= record.keys()
    return record if whole else None


def forget(out: Path) -> None:
    """Remove the checkpoint and the record of an earlier run (first process; the others wait)."""
    if distributed.rank() == 0:
        for name in (STATE, RECORD):
            (out / name).unlink(missing_ok=True)
    distributed.wait()
