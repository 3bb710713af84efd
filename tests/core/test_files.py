"""Files: found, written whole or not at all, and one process a folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from btnet_core.errors import BusyError, WriteError
from btnet_core.files import HOLDER, find, lock, read_safetensors, write_atomically
from btnet_core.files import write_safetensors as write_tensors

ROOT = Path(__file__).resolve().parents[2]


def test_find_looks_among_the_committed_numbers_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BTNET_DATA", str(tmp_path))
    committed = ROOT / "data" / "alignment" / "train.npz"
    assert find("alignment/train.npz") == committed
    (tmp_path / "alignment").mkdir()
    (tmp_path / "alignment" / "train.npz").touch()
    assert find("alignment/train.npz") == tmp_path / "alignment" / "train.npz"


def test_find_takes_the_path_as_given_before_the_data_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, data = tmp_path / "here", tmp_path / "data"
    for folder in (here, data):
        folder.mkdir()
        (folder / "both.bin").touch()
    (data / "far.bin").touch()
    monkeypatch.chdir(here)
    monkeypatch.setenv("BTNET_DATA", str(data))
    assert find("both.bin") == Path("both.bin")
    assert find("far.bin") == data / "far.bin"
    assert find("nowhere.bin") == Path("nowhere.bin")
    assert find(data / "both.bin") == data / "both.bin"


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_the_umask_gives_the_mode_of_every_file(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "a", b"bytes")
        write_tensors(tmp_path / "b", {"x": torch.zeros(2)}, {})
        write_atomically(tmp_path / "c", lambda file: torch.save([1], file))
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in sorted(tmp_path.iterdir())] == [
        0o666 & ~umask
    ] * 3


def test_content_is_bytes_text_or_a_writer(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    for content in (b"\xc3\xa9", "é", lambda file: file.write(b"\xc3\xa9")):
        write_atomically(path, content)
        assert path.read_bytes() == b"\xc3\xa9"
    assert list(path.parent.iterdir()) == [path]


def _limited(code: str, folder: Path) -> subprocess.CompletedProcess:
    """Run ``code`` in a process whose files may not exceed 100 kB."""
    start = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5))\n"
    command = [sys.executable, "-c", start + code, str(folder / "file")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


WRITERS = {
    "bytes": "write_atomically(path, bytes(10**6))",
    "torch": "write_atomically(path, lambda f: torch.save(torch.zeros(10**6), f))",
    "safetensors": "write_safetensors(path, {'x': torch.zeros(10**6)}, {})",
}


@pytest.mark.skipif(os.name != "posix", reason="needs setrlimit")
@pytest.mark.parametrize("writer", WRITERS)
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, writer: str) -> None:
    (tmp_path / "file").write_bytes(b"old")
    code = (
        "import sys, torch\n"
        "from btnet_core.errors import WriteError\n"
        "from btnet_core.files import write_atomically, write_safetensors\n"
        "path = sys.argv[1]\n"
        f"try:\n    {WRITERS[writer]}\n"
        "except WriteError as error:\n    print(error)\n"
    )
    told = _limited(code, tmp_path)
    assert told.stdout.strip() == f"{tmp_path / 'file'}: cannot be written (File too large)", told
    assert (tmp_path / "file").read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_an_error_of_the_writer_is_its_own(tmp_path: Path) -> None:
    """Only what concerns the disk is a WriteError."""

    def refuse(file: object) -> None:
        raise RuntimeError("not about files")

    with pytest.raises(RuntimeError, match=r"^not about files$"):
        write_atomically(tmp_path / "file", refuse)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for call in (
        lambda: write_atomically(tmp_path / "file" / "x", b""),
        lambda: lock(tmp_path / "file" / "x").__enter__(),
    ):
        with pytest.raises(WriteError, match=r"file/x: cannot be written \("):
            call()


def test_a_second_lock_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    with lock(tmp_path / "run"):
        with (
            pytest.raises(BusyError, match=rf"run: process {os.getpid()} \(since 2.*\) works"),
            lock(tmp_path / "run"),
        ):
            pass
        with pytest.raises(BusyError, match=str(os.getpid())), lock(tmp_path / "run"):
            pass  # the refused one changed nothing
    with lock(tmp_path / "run"):
        pass


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    code = (
        "import os, sys; from btnet_core.files import lock\n"
        "with lock(sys.argv[1]): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    with lock(tmp_path):
        assert (tmp_path / HOLDER).read_text() == str(os.getpid())


def test_safetensors_round_trip(tmp_path: Path) -> None:
    tensors = {"x": torch.randn(3, 2).T, "n": torch.tensor(3)}
    write_tensors(tmp_path / "a.safetensors", tensors, {"who": "me"})
    read, metadata = read_safetensors(tmp_path / "a.safetensors")
    assert metadata == {"who": "me"}
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
