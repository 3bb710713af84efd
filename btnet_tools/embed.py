"""What the commands `btnet embed` and `btnet verify` do."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from btnet_core.data.folders import SUFFIXES
from btnet_core.errors import DataError
from btnet_core.files import write_atomically
from btnet_core.models.btnet import BTNet
from btnet_paper import results


def embed_folder(
    net: BTNet, source: str, out: str, *, keep_going: bool = False, **selection: Any
) -> tuple[int, dict[str, str]]:
    """Embed every image under ``source`` into the .npz ``out``: one row an image in each array.

    ``names`` (relative to ``source``), ``embeddings`` (n, D) of unit length, ``branch`` (n,), ``size`` and ``scale``
    (n, 2: rows, columns), ``reliability`` (n,: rows of detail, see quality.py), and ``failed``, the names of those left out.

    Returns:
        The number of embeddings, and {name: reason} of the images left out (with ``keep_going``).

    Raises:
        DataError: no image there, or one that cannot be read; ``out`` cannot be written.
    """
    root = Path(source)
    files = (
        [root]
        if root.is_file()
        else sorted(file for file in root.rglob("*") if file.suffix.lower() in SUFFIXES)
    )
    if not files:
        raise DataError(
            f"{source}: {'no images' if root.is_dir() else 'no such folder or image'} ({', '.join(SUFFIXES)})"
        )
    if not Path(out).absolute().parent.is_dir() or Path(out).is_dir():
        raise DataError(f"--out {out}: expected a file in a folder that is there")
    names = np.array([str(file.relative_to(root)) if file != root else file.name for file in files])
    try:
        embeddings, info = net.embed(files, return_info=True, keep_going=keep_going, **selection)
    except DataError as error:
        raise DataError(f"{error}; --keep-going leaves such images out") from error
    failed = {
        name: entry["error"]
        for name, entry in zip(names.tolist(), info, strict=True)
        if "error" in entry
    }
    good = np.array(["error" not in entry for entry in info])
    table: dict[str, Any] = {
        key: np.array([entry[key] for entry in info if key in entry])
        for key in ("size", "scale", "reliability")
    }
    buffer = io.BytesIO()
    np.savez(
        buffer, names=names[good], embeddings=embeddings.numpy()[good], failed=np.array(list(failed), dtype=np.str_),
        branch=np.array([entry["r"] for entry in info if "r" in entry], np.int64), **table,
    )  # fmt: skip
    write_atomically(Path(out), buffer.getvalue())
    return int(good.sum()), failed


def verify(
    net: BTNet,
    first: str,
    second: str,
    model: str,
    threshold: float | None = None,
    **selection: Any,
) -> str:
    """Two lines on the images and one with their cosine and the verdict.

    The threshold is the given one, or what ``btnet adapt`` found for the two branches on its comparison pairs.
    """
    embeddings, info = net.embed([first, second], return_info=True, **selection)
    cosine = float(embeddings[0] @ embeddings[1])
    lines = [
        f"{name}: {entry['size'][1]}x{entry['size'][0]} through branch {entry['r']}, scaled by {entry['scale'][0]:.2f}"
        for name, entry in zip((first, second), info, strict=True)
    ]
    pair = "&".join(str(r) for r in sorted((entry["r"] for entry in info), reverse=True))
    source = "given"
    if threshold is None and (Path(model) / "results" / "adapt.json").is_file():
        known = results.load(model, "adapt")["values"]
        threshold, source = known["thresholds"].get(pair), f"{pair} on {', '.join(known['pairs'])}"
    if threshold is None:
        return "\n".join(
            [*lines, f"cosine {cosine:.3f}; no threshold is known for this model: give --threshold"]
        )
    verdict = "one person" if cosine > threshold else "two people"
    return "\n".join(
        [*lines, f"cosine {cosine:.3f}: {verdict} (threshold {threshold:.3f}, {source})"]
    )
