"""Files: where data is, what it sums to, reading, writing, and who works in a folder."""

from __future__ import annotations

import codecs
import errno
import hashlib
import json
import os
import re
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from btnet_core.errors import BTNetError, BusyError, CheckpointError, DataError, WriteError
from btnet_core.kinds import what_is

COMMITTED = Path(__file__).resolve().parents[1] / "data"
SAMPLED_ABOVE = 2**30  # bytes; larger data gets the sampled checksum
_BLOCK, _BLOCKS = 2**20, 64


def data_root() -> Path:
    """Where the data is: environment variable BTNET_DATA, or the repository's ``data/``."""
    return Path(os.environ.get("BTNET_DATA") or COMMITTED)


def find(path: str | Path) -> Path:
    """Returns the first that is there: ``path`` as given, under :func:`data_root`, or under the
    repository's ``data/`` (committed numbers); else ``path`` as given."""
    path = Path(path).expanduser()
    places = (path, data_root() / path, COMMITTED / path)
    return next((place for place in places if os.path.exists(place)), path)


@lru_cache(maxsize=4096)
def _file_sha256(path: str, size: int, mtime_ns: int, sampled: bool) -> str:
    digest = hashlib.sha256(str(size).encode() if sampled else b"")
    with open(path, "rb") as file:
        if sampled:
            for position in np.linspace(0, max(0, size - _BLOCK), _BLOCKS).astype(int):
                file.seek(position)
                digest.update(file.read(_BLOCK))
        else:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()


def checksum(paths: Sequence[str | Path]) -> str:
    """``sha256:…`` of files, the same wherever they lie: of one's bytes, or of names and digests.

    Above 1 GiB in total it is ``sampled-sha256:…``: names, sizes, and 64 blocks of 1 MiB spread
    evenly over each file, or over 64 files spread evenly over the list when there are more. Kept
    in memory by path, size and time.

    Raises:
        DataError: a file is missing.
    """
    if not paths:
        return "sha256:" + hashlib.sha256(b"").hexdigest()
    files = [Path(path) for path in paths]
    try:
        stats = [file.stat() for file in files]
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from error
    sampled = sum(stat.st_size for stat in stats) > SAMPLED_ABOVE
    read = set(range(len(files)))
    if sampled and len(files) > _BLOCKS:
        read = set(np.linspace(0, len(files) - 1, _BLOCKS).astype(int).tolist())
    digests = {
        i: _file_sha256(str(files[i]), stats[i].st_size, stats[i].st_mtime_ns, sampled)
        for i in read
    }
    prefix = "sampled-sha256:" if sampled else "sha256:"
    if len(files) == 1:
        return prefix + digests[0]
    base = os.path.commonpath([file.parent for file in files])
    lines = (
        f"{file.relative_to(base).as_posix()} {stat.st_size} {digests.get(i, '')}\n"
        for i, (file, stat) in enumerate(zip(files, stats, strict=True))
    )
    return prefix + hashlib.sha256("".join(lines).encode()).hexdigest()


def integer_table(text: bytes, columns: int, *, where: str) -> np.ndarray:
    """Lines of ``columns`` non-negative integers between blanks or tabs, int64 ``(rows, columns)``.

    Raises:
        DataError: a line that is anything else; the message names ``where`` and the line.
    """
    text = text.removeprefix(codecs.BOM_UTF8).rstrip() + b"\n" if text.strip() else b""
    rows = re.compile(
        rb"(?:[0-9]{1,18}" + rb"[ \t]+[0-9]{1,18}" * (columns - 1) + rb"[ \t]*\r?\n)*"
    )
    tables, start = [np.empty((0, columns), np.int64)], 0
    while start < len(text):  # by blocks: the regular expression keeps a state for each line
        stop = text.find(b"\n", min(start + _BLOCK, len(text) - 1)) + 1
        match = rows.match(text, start, stop)
        if match is None or match.end() != stop:
            good = match.end() if match else start
            number, line = text.count(b"\n", 0, good) + 1, text[good : good + 80].split(b"\n")[0]
            raise DataError(f"{where}, line {number}: got {line!r}, expected {columns} integers")
        tables.append(np.fromstring(text[start:stop], dtype=np.int64, sep=" ").reshape(-1, columns))
        start = stop
    return np.concatenate(tables)


def reason(error: Exception) -> str:
    """Why the system refused, or where a text stops being JSON, in a few words of our own."""
    if isinstance(error, json.JSONDecodeError):
        return f"no JSON from line {error.lineno}, column {error.colno} on"
    if not isinstance(error, OSError):
        known = {UnicodeDecodeError: "no text", RecursionError: "no JSON, nested too deep"}
        return known.get(type(error), type(error).__name__)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "the disk is full" if full else error.strerror or str(error)


def write_atomically(path: Path | str, content: bytes | str | Callable[[BinaryIO], object]) -> None:
    """Put ``content`` in the place of ``path``: no reader, and no crash, leaves half of it there.

    Args:
        path: the file; its folder is made. The new file's mode is what the umask gives.
        content: bytes, text (written as UTF-8), or a function that writes to the open file.

    Raises:
        WriteError: the disk is full or the folder read-only; ``path`` is then what it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BTNetError:
        raise
    except (OSError, RuntimeError) as error:
        # torch.save turns a failed write into a RuntimeError whose context is the OSError
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise WriteError(f"{path}: cannot be written ({reason(cause)})") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


HOLDER = ".holder"  # beside the lock: the number of the process that has it


@contextmanager
def lock(folder: Path | str, *, wait: bool = False) -> Iterator[None]:
    """Hold ``folder`` for one process, which may ``wait``; the system lets go when that ends.

    Raises:
        BusyError: another process holds it; the message says which, and since when.
        WriteError: the folder cannot be written.
    """
    folder = Path(folder)
    file_lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file_lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise BusyError(f"{folder}: {_who(folder)} works there; wait for it or stop it") from None
    except OSError as error:
        raise WriteError(f"{folder}: cannot be written ({reason(error)})") from error
    try:
        (folder / HOLDER).write_text(str(os.getpid()))
        yield
    finally:
        (folder / HOLDER).unlink(missing_ok=True)
        file_lock.release()


def _who(folder: Path) -> str:
    """The holder of ``folder`` in words."""
    try:
        since = time.localtime((folder / HOLDER).stat().st_mtime)
        number = int((folder / HOLDER).read_text())
    except (OSError, ValueError):
        return "another process"
    return f"process {number} (since {time.strftime('%Y-%m-%d %H:%M:%S', since)})"


def write_safetensors(
    path: Path | str, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    """Write tensors (from any device) with ``metadata``, atomically."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(on_cpu, metadata))


def read_safetensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; CheckpointError if it is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({reason(error)})") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path}: {what_is(path)}, damaged or cut short") from error


def load_torch(path: Path | str) -> Any:
    """What ``torch.save`` wrote, on the CPU; nothing in the file is run.

    Raises:
        CheckpointError: it cannot be read, is damaged, holds Python objects, or unpacks to more
            than its own size: torch stores tensors without compression, a bomb does not.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if file.read(4) == b"PK\3\4":
                with zipfile.ZipFile(file) as archive:
                    size = sum(entry.file_size for entry in archive.infolist())
                    program = any("/code/" in name for name in archive.namelist())
                if size > path.stat().st_size and not program:
                    told = f"unpacks to {size:,} bytes, more than the file has"
                    raise CheckpointError(f"{path}: {told}")
            file.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # of the open file: from a path torch guesses the format by the suffix
                return torch.load(file, map_location="cpu", weights_only=True)
    except BTNetError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({reason(error)})") from error
    except Exception as error:  # torch raises many types for damaged or unsafe files
        raise CheckpointError(f"{path}: {_why_not_torch(path, str(error))}") from error


def _why_not_torch(path: Path, said: str) -> str:
    """In our words why ``torch.load`` refused a file, saying ``said``."""
    objects = dict.fromkeys(re.findall(r"(?:GLOBAL|class|type) ([A-Za-z_][\w.]*\.\w+)", said))
    if objects:
        return (
            f"holds Python objects ({', '.join(objects)}), which are not run; save the tensors "
            "alone: torch.save(network.state_dict(), …)"
        )
    kind = what_is(path)
    if kind.startswith("a PyTorch file"):
        return f"{kind}, damaged or cut short"
    return f"no weights of PyTorch, or damaged: {kind}"
