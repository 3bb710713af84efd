"""MATLAB files read by scipy in a process of its own: its reader can crash on a damaged file, and then only that ends.

Found by fuzzing (scripts/fuzz.py): scipy 1.17's ``loadmat`` reads through a null pointer for some damaged arrays.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

MEMORY, SECONDS = 4 << 30, 120  # more than any list of the benchmarks needs


def read(path: str, names: list[str]) -> list[list[Any]]:
    """The named variables as flat lists of text and numbers. Raises whatever scipy does, or KeyError."""
    import numpy as np
    from scipy.io import loadmat

    content = loadmat(path, squeeze_me=True, variable_names=names)
    return [np.atleast_1d(content[name]).tolist() for name in names]


def read_apart(path: Path, names: list[str]) -> list[list[Any]]:
    """`read` in another process with bounded memory and time. Raises ValueError with the reason when it fails."""
    command = [sys.executable, __file__, str(path), *names]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise ValueError(f"not read within {SECONDS} s") from None
    if done.returncode < 0:
        raise ValueError(f"the reader crashed with signal {-done.returncode}")
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise ValueError(lines[-1] if lines else f"the reader ended with status {done.returncode}")
    return json.loads(done.stdout)


def main() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    json.dump(read(sys.argv[1], sys.argv[2:]), sys.stdout)


if __name__ == "__main__":
    main()
