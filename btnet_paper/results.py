"""What a run leaves behind: numbers as JSON with their origin, arrays, manifests of figures."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from btnet_core.device import describe_precision, machine, resolve_device
from btnet_core.errors import DataError
from btnet_core.files import lock, reason, write_atomically

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "numpy", "scipy", "btnet-core")  # whose versions are recorded


def record(
    run_dir: str | Path, name: str, values: dict[str, Any], *, config: Any = None, data: str = "",
    kernel: str = "", seed: int | None = None, seconds: float | None = None, scale: str = "",
    device: str = "auto", arrays: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Writes ``run_dir/results/NAME.json`` with the environment, and returns its path.

    Args:
        values: the numbers; None where one is undefined.
        config: options that they depend on; a dataclass or dict.
        data: checksum of what they were measured on.
        kernel: name of the resize.
        seconds: that it took.
        device: on which; it and the precision of the networks are recorded as resolved.
        arrays: small pictures of faces that may be shown; they are kept as ``NAME.npz``.

    Raises:
        DataError: a number is not finite, or a value has no JSON form; the message has its place.
    """
    where = resolve_device(device)
    body = {"name": name, "scale": scale, "values": values, "config": config, "data": data}
    body |= {"kernel": kernel, "seed": seed}
    body["seconds"] = None if seconds is None else round(seconds, 3)
    body |= {"device": str(where), "precision": describe_precision("auto", where), **environment()}
    path = Path(run_dir) / "results" / f"{name}.json"
    text = json.dumps(plain(body, name), indent=1, allow_nan=False) + "\n"
    if arrays is not None:
        write_atomically(path.with_suffix(".npz"), lambda file: np.savez_compressed(file, **arrays))
    write_atomically(path, text)
    return path


def load(run_dir: str | Path, name: str) -> dict[str, Any]:
    """Returns what `record` wrote. Raises DataError if it is missing or damaged."""
    path = Path(run_dir) / "results" / f"{name}.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: no result {name!r} is recorded there") from None
    except ValueError as error:
        raise DataError(f"{path} cannot be read ({reason(error)})") from None


def load_arrays(run_dir: str | Path, name: str) -> dict[str, np.ndarray]:
    """Returns the arrays that `record` kept beside a result; {} where there are none."""
    path = Path(run_dir) / "results" / f"{name}.npz"
    if not path.is_file():
        return {}
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def update_manifest(
    run_dir: str | Path, entries: dict[str, dict[str, Any]], *, folder: str = "figures"
) -> None:
    """Merges what is known about figures into ``run_dir/FOLDER/manifest.json``."""
    path = Path(run_dir) / folder / "manifest.json"
    with lock(path.parent, wait=True):
        manifest: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        for name, entry in entries.items():
            manifest[name] = manifest.get(name, {}) | plain(entry, name)
        write_atomically(path, json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def environment() -> dict[str, Any]:
    """Returns versions, commit, what it runs on (device.machine), and the date in UTC."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package.replace("-", "_")] = version(package)
        except PackageNotFoundError:
            versions[package.replace("-", "_")] = None
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"versions": versions, "commit": commit(), **machine(), "date": date}


def commit() -> str | None:
    """Returns the commit of this source, "-dirty" where changed; None outside a repository."""
    git = ("git", "-C", str(ROOT))
    known = (*git, "ls-files", "--error-unmatch", str(Path(__file__)))
    described = (*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    try:
        subprocess.run(known, capture_output=True, check=True)
        return subprocess.run(described, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def plain(value: Any, where: str) -> Any:
    """Returns ``value`` in JSON's own types.

    Raises:
        DataError: something is not finite, or has no JSON form; the message names its place.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if hasattr(value, "tolist"):  # NumPy and torch, scalars and arrays
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{where} is {value}, expected a finite number, or None: undefined")
    if isinstance(value, str | Path):  # results are committed: no path of one machine
        return str(value).replace(f"{ROOT}{os.sep}", "")
    if value is None or isinstance(value, bool | int | float):
        return value
    raise DataError(f"{where} is a {type(value).__name__}, which JSON has no form for")
