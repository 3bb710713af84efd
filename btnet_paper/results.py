"""What a run leaves behind: numbers as JSON and figures as PNG + PDF, each with what it was made from."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from btnet_core.device import machine
from btnet_core.errors import DataError
from btnet_core.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]


def record(
    run_dir: str | Path,
    name: str,
    values: dict[str, Any],
    *,
    config: Any = None,
    data: str = "",
    kernel: str = "",
    seed: int | None = None,
    seconds: float | None = None,
    scale: str = "",
    arrays: dict[str, Any] | None = None,
) -> Path:
    """Write `<run_dir>/results/<name>.json` atomically and return its path.

    `values` are the numbers; `config` a dataclass or dict; `data` the checksum of what they were measured on;
    `kernel` the name of the resize; `seconds` the duration; `arrays` small pictures that a figure needs (those of
    faces that may be shown), kept beside it as `<name>.npz`. Raises DataError for NaN, infinity or a value
    JSON does not have, naming its place: an undefined number is None.
    """
    body = {
        "name": name,
        "scale": scale,
        "values": values,
        "config": config,
        "data": data,
        "kernel": kernel,
    }
    body |= {
        "seed": seed,
        "seconds": None if seconds is None else round(seconds, 3),
    } | environment()
    path = Path(run_dir) / "results" / f"{name}.json"
    content = json.dumps(plain(body, name), indent=1, allow_nan=False).encode() + b"\n"
    if arrays is not None:
        packed = io.BytesIO()
        np.savez_compressed(packed, **arrays)
        write_atomically(path.with_suffix(".npz"), packed.getvalue())
    write_atomically(path, content)
    return path


def load(run_dir: str | Path, name: str) -> dict[str, Any]:
    """Read what `record` wrote. Raises DataError if it is missing or damaged."""
    path = Path(run_dir) / "results" / f"{name}.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist: no result {name!r} has been recorded there"
        ) from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error})") from None


def load_arrays(run_dir: str | Path, name: str) -> dict[str, np.ndarray]:
    """The arrays that `record` kept beside a result; none is {}."""
    path = Path(run_dir) / "results" / f"{name}.npz"
    if not path.is_file():
        return {}
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def save_figure(
    fig: Any,
    run_dir: str | Path,
    name: str,
    about: dict[str, Any] | None = None,
    *,
    folder: str = "figures",
) -> list[Path]:
    """Write `<run_dir>/<folder>/<name>.png` and .pdf, the same bytes for the same drawing and versions.

    Their checksums go to manifest.json beside them, with what `about` says of their origin.
    """
    import matplotlib

    paths = [Path(run_dir) / folder / f"{name}{suffix}" for suffix in (".png", ".pdf")]
    for path, metadata in zip(paths, ({"Software": None}, {"CreationDate": None}), strict=True):
        drawn = io.BytesIO()
        with matplotlib.rc_context({"pdf.fonttype": 42}):
            fig.savefig(
                drawn, format=path.suffix[1:], dpi=200, bbox_inches="tight", metadata=metadata
            )
        write_atomically(path, drawn.getvalue())
    sums = {f"{p.suffix[1:]}_sha256": hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}
    update_manifest(
        run_dir,
        {name: (about or {}) | {"matplotlib": matplotlib.__version__} | sums},
        folder=folder,
    )
    return paths


def update_manifest(
    run_dir: str | Path, entries: dict[str, dict[str, Any]], *, folder: str = "figures"
) -> None:
    """Merge what is known about figures into `<run_dir>/<folder>/manifest.json`."""
    path = Path(run_dir) / folder / "manifest.json"
    manifest: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name, entry in entries.items():
        manifest[name] = manifest.get(name, {}) | plain(entry, name)
    write_atomically(path, json.dumps(manifest, indent=1, sort_keys=True).encode() + b"\n")


def environment() -> dict[str, Any]:
    """Versions, commit, what it runs on (device.machine), and the date in UTC."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "numpy", "scipy", "btnet-core"):
        try:
            versions[package.replace("-", "_")] = version(package)
        except PackageNotFoundError:
            versions[package.replace("-", "_")] = None
    return {
        "versions": versions,
        "commit": commit(),
        **machine(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def commit() -> str | None:
    """The git commit of this package's source, with `-dirty` for uncommitted changes; None outside git."""
    git = ("git", "-C", str(Path(__file__).parent))
    try:
        subprocess.run(
            [*git, "ls-files", "--error-unmatch", "errors.py"], capture_output=True, check=True
        )
        described = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(described, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def plain(value: Any, where: str) -> Any:
    """`value` as JSON's own types. Raises DataError naming the place of what has no JSON form."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if hasattr(value, "tolist"):  # NumPy and torch, scalars and arrays
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(
            f"{where} is {value}: a recorded number must be finite; record None where it is undefined"
        )
    if isinstance(value, str | Path):  # results are committed: no path of one machine
        return str(value).replace(f"{ROOT}{os.sep}", "")
    if value is None or isinstance(value, bool | int | float):
        return value
    raise DataError(f"{where} is a {type(value).__name__}, which JSON has no form for")
