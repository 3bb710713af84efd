"""btnet data and btnet pack, tried as a user would."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from btnet_core.cli import main
from btnet_core.datasets.faces import open_faces, open_pairs
from btnet_core.datasets.registry import ENTRIES, crop_lfw, get_lfw
from btnet_core.errors import DataError
from btnet_core.images import encode

ROOT = Path(__file__).resolve().parents[1]


def picture(value: int, size: int = 112) -> bytes:
    return encode(torch.full((3, size, size), value, dtype=torch.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for value, (person, k, size) in enumerate([("ann", 1, 112), ("ann", 2, 60), ("bob", 1, 112)]):
        (tmp_path / "faces" / person).mkdir(parents=True, exist_ok=True)
        (tmp_path / "faces" / person / f"{person}_{k:04d}.png").write_bytes(picture(50 * value, size))
    return tmp_path / "faces"


def test_pack_a_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["pack", str(folder), str(tmp_path / "out")]) == 0
    assert "3 images" in capsys.readouterr().out
    packed, plain = open_faces(str(tmp_path / "out")), open_faces(str(folder))
    assert packed.labels.tolist() == plain.labels.tolist() == [0, 0, 1]
    assert torch.equal(packed.images(range(3)), plain.images(range(3)))


def test_pack_pairs(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.txt").write_text("ann 1 2\nann 1 bob 1\n")
    out = tmp_path / "set.bin"
    assert main(["pack", "--pairs", str(tmp_path / "pairs.txt"), "--images", str(folder), str(out)]) == 0
    packed, plain = open_pairs(str(out)), open_pairs(f"{tmp_path / 'pairs.txt'}@{folder}")
    assert packed.same.tolist() == plain.same.tolist() == [True, False]
    assert torch.equal(packed.images(packed.second), plain.images(plain.second))


def test_pack_errors(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for arguments, message in (
        ([str(tmp_path / "none"), str(tmp_path / "o")], "none"),
        ([str(tmp_path)], "OUT"),
        (["--pairs", str(tmp_path / "p.txt"), str(tmp_path / "o.rec")], r".bin"),
        (["--pairs", str(tmp_path / "p.txt"), str(tmp_path / "o.bin")], "p.txt"),
    ):
        assert main(["pack", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_data_lists_every_set_found_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("BTNET_DATA", str(tmp_path))
    (tmp_path / "lfw.bin").write_bytes(b"broken")
    assert main(["data"]) == 0
    out = capsys.readouterr().out
    assert all(entry.path in out for entry in ENTRIES)
    assert "damaged" in out
    assert "NOT FOUND" in out
    assert main(["data", "get", "msra"]) == 2


def test_the_readme_of_data_names_every_set() -> None:
    readme = (ROOT / "data" / "README.md").read_text()
    assert not [entry.path for entry in ENTRIES if entry.path not in readme]


def test_real_counts_are_listed(btnet_data: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["data"]) == 0
    out = capsys.readouterr().out
    assert "15,675 images, 4,336 identities" in out
    assert "6,000 pairs, 3,000 same" in out


def test_lfw_through_scikit_learns_fetcher(tmp_path: Path) -> None:
    """A fake of what fetch_lfw_people(color=True, resize=1.0, slice_=None) returns."""
    rng = np.random.default_rng(0)
    bunch = SimpleNamespace(images=rng.random((5, 250, 250, 3)).astype(np.float32), target=np.array([3, 0, 3, 1, 0]))
    asked = {}

    def fetch(**options):
        asked.update(options)
        return bunch

    assert get_lfw(tmp_path, fetch) == 5
    assert asked["color"] is True
    faces = open_faces(str(tmp_path))
    assert faces.labels.tolist() == [0, 0, 1, 2, 2]
    expected = crop_lfw(255 * bunch.images[1]).float()
    assert (faces[0][0].float() - expected).abs().mean() < 6  # JPEG of noise

    def offline(**options):
        raise OSError("no route to host")

    with pytest.raises(DataError, match="no route to host"):
        get_lfw(tmp_path, offline)
    with pytest.raises(DataError, match="250"):
        crop_lfw(np.zeros((100, 100, 3)))
