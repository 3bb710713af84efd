"""IJB-C's layout, written by hand: every field of the set is what the files say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from btnet_core.data.ijbc import ARCFACE, read_templates
from btnet_core.errors import DataError
from btnet_core.images import encode


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three images of templates 7, 7, 3; their landmarks are where ArcFace puts them, in a picture of 112."""
    for k in range(3):
        path = tmp_path / "loose_crop" / f"{k}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(torch.full((3, 112, 112), 40 * k + 9, dtype=torch.uint8)))
    points = " ".join(f"{value:.4f}" for value in ARCFACE.flatten())
    texts = {
        "face_tid_mid.txt": "2.png 7 5\n0.png 7 6\n1.png 3 5\n",
        "name_5pts_score.txt": "".join(f"{k}.png {points} 0.{k + 1}\n" for k in range(3)),
        "template_pair_label.txt": "7 3 0\n3 3 1\n",
        "1N_gallery_G1.csv": "TEMPLATE_ID,SUBJECT_ID,FILENAME\n7,70,a,b\n",
        "1N_gallery_G2.csv": "TEMPLATE_ID,SUBJECT_ID\n3,30\n3,30\n",
        "1N_probe_mixed.csv": "TEMPLATE_ID,SUBJECT_ID\n7,30\n3,70\n",
    }
    (tmp_path / "meta").mkdir()
    for name, text in texts.items():
        (tmp_path / "meta" / f"ijbc_{name}").write_text(text)
    return tmp_path


def test_every_field_is_what_the_files_say(root: Path) -> None:
    data = read_templates(root)
    assert data.name == "IJB-C"
    assert (data.template.tolist(), data.media.tolist()) == ([7, 7, 3], [5, 6, 5])
    np.testing.assert_allclose(data.score, [0.3, 0.1, 0.2])
    assert (data.first.tolist(), data.second.tolist()) == ([7, 3], [3, 3])
    assert data.same.tolist() == [False, True]
    lists = {**data.galleries, "probes": data.probes}
    as_lists = {name: tuple(column.tolist() for column in table) for name, table in lists.items()}
    assert as_lists == {"G1": ([7], [70]), "G2": ([3], [30]), "probes": ([3, 7], [70, 30])}
    assert data.images([2, 0])[:, 0, 56, 56].tolist() == [49, 89]


def test_a_lost_crop_changes_the_checksum_or_is_named(root: Path) -> None:
    before = read_templates(root).checksum
    (root / "loose_crop" / "1.png").write_bytes(encode(torch.zeros(3, 112, 112, dtype=torch.uint8)))
    assert read_templates(root).checksum != before
    (root / "loose_crop" / "1.png").unlink()
    with pytest.raises(DataError, match=r"1\.png"):
        read_templates(root)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("template_pair_label.txt", "7 3 2\n", "labels must be 0 or 1"),
        ("template_pair_label.txt", "7 4 0\n", "1 templates have no image, first 4"),
        ("1N_gallery_G1.csv", "a,b\n7,70\n7,71\n", "a template has two subjects"),
        ("1N_probe_mixed.csv", "a,b\n8,70\n", "1 templates have no image, first 8"),
        ("template_pair_label.txt", "", "no pairs in it"),
        (
            "face_tid_mid.txt",
            "0.png 7 1\n\n1.png 7\n",
            "line 3: got '1.png 7', expected a text, an",
        ),
        ("face_tid_mid.txt", "0.png 7 x\n", "line 1: got '0.png 7 x', expected a text, an integer"),
        ("face_tid_mid.txt", f"0.png {10**30} 1\n", "line 1: got '0.png 1000"),
        ("face_tid_mid.txt", "\n", "no lines in it, expected a text, an integer, an integer"),
        ("name_5pts_score.txt", "0.png 1 2 3\n", "line 1: got '0.png 1 2 3', expected a text, a n"),
        ("1N_gallery_G1.csv", "a,b\n7,seventy\n", "line 2: got '7,seventy', expected an integer"),
    ],
)
def test_what_is_wrong_is_named_with_its_file(
    root: Path, name: str, text: str, message: str
) -> None:
    (root / "meta" / f"ijbc_{name}").write_text(text)
    with pytest.raises(DataError, match=f"ijbc_{name}.*{message}"):
        read_templates(root)


def test_lists_as_windows_and_spreadsheets_write_them(root: Path) -> None:
    """A byte-order mark, line ends of two signs, blank lines at the end: the same set."""
    before = read_templates(root)
    for path in (root / "meta").iterdir():
        lines = path.read_bytes().replace(b"\n", b"\r\n")
        path.write_bytes(b"\xef\xbb\xbf" + lines + b"\r\n\r\n")
    after = read_templates(root)
    for name in ("template", "media", "score", "first", "second", "same"):
        assert getattr(after, name).tolist() == getattr(before, name).tolist()
    assert after.galleries["G1"][1].tolist() == [70]


def test_a_list_without_a_heading_keeps_its_first_line(root: Path) -> None:
    path = root / "meta" / "ijbc_1N_probe_mixed.csv"
    path.write_text("7,30\n3,70\n")
    assert read_templates(root).probes[0].tolist() == [3, 7]
