"""Synthetic faces: deterministic, independent of the batch, and one person stays one person."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from btnet_core.errors import ConfigError
from btnet_paper import synthetic_faces as synthetic
from btnet_paper.synthetic_faces import SyntheticFaces, render


@pytest.fixture(scope="module")
def faces() -> SyntheticFaces:
    return SyntheticFaces(6, 8, seed=3)


def test_shape_range_and_labels(faces: SyntheticFaces) -> None:
    pixels = faces.images(range(len(faces)))
    assert pixels.shape == (48, 3, 112, 112)
    assert pixels.dtype == torch.uint8
    assert faces.labels.tolist() == [k for k in range(6) for _ in range(8)]
    assert faces.labels.dtype == torch.int64
    assert faces.num_identities == 6
    levels = pixels.float()
    assert (levels.std((1, 2, 3)) > 15).all(), "an image is nearly blank"
    assert ((levels.mean((1, 2, 3)) > 30) & (levels.mean((1, 2, 3)) < 225)).all()
    assert ((pixels == 255).float().mean((1, 2, 3)) < 0.1).all(), "an image is burnt out"


def test_same_seed_same_bytes(faces: SyntheticFaces) -> None:
    again = SyntheticFaces(6, 8, seed=3)
    assert torch.equal(again.images([17, 5]), faces.images([17, 5]))
    assert again.checksum == faces.checksum
    assert len({SyntheticFaces(6, 8, seed=3, first=k).checksum for k in range(3)}) == 3
    other = SyntheticFaces(6, 8, seed=4)
    assert other.checksum != faces.checksum
    assert (other.images([5]).float() - faces.images([5]).float()).abs().mean() > 5


def test_an_image_does_not_depend_on_the_others(faces: SyntheticFaces) -> None:
    alone = render(np.array([2]), np.array([5]), 3)
    difference = (alone.int() - faces.images([2 * 8 + 5]).int()).abs()
    assert difference.max() <= 1  # rounding of vectorised arithmetic
    assert (difference > 0).float().mean() < 1e-3
    shifted = SyntheticFaces(2, 8, seed=3, first=2).images([5])
    assert (shifted.int() - alone.int()).abs().max() <= 1
    fewer = SyntheticFaces(6, 4, seed=3).images([1])
    assert (fewer.int() - faces.images([1]).int()).abs().max() <= 1


def test_item_is_image_and_label(faces: SyntheticFaces) -> None:
    pixels, label = faces[-1]
    assert label == 5
    assert torch.equal(pixels, faces.images([47])[0])
    with pytest.raises(IndexError, match="48"):
        faces[48]


def test_bad_arguments() -> None:
    with pytest.raises(ConfigError, match="images: got 0"):
        SyntheticFaces(3, 0)
    with pytest.raises(ConfigError, match="seed"):
        SyntheticFaces(3, 2, seed=-1)


def test_hash_is_uniform_and_keyed() -> None:
    values = synthetic._uniform(64, 7, np.arange(500))
    assert abs(values.mean() - 0.5) < 0.01
    assert abs(values.std() - 12**-0.5) < 0.01
    assert abs(np.corrcoef(values[:-1].ravel(), values[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(values[:, :-1].ravel(), values[:, 1:].ravel())[0, 1]) < 0.02
    assert np.array_equal(values[7], synthetic._uniform(64, 7, 7)[0])


def test_a_large_set_is_kept_and_a_damaged_cache_is_drawn_again(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(synthetic, "CACHED_FROM", 6)
    first = SyntheticFaces(2, 3, seed=1).images(range(6))
    (file,) = (tmp_path / "btnet").iterdir()
    monkeypatch.setattr(
        synthetic, "render", lambda *arguments: pytest.fail("drawn although it is in the cache")
    )
    assert torch.equal(SyntheticFaces(2, 3, seed=1).images([4]), first[4:5])
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(synthetic, "CACHED_FROM", 6)
    file.write_bytes(file.read_bytes()[:500])
    assert torch.equal(SyntheticFaces(2, 3, seed=1).images(range(6)), first)
    assert torch.equal(SyntheticFaces(2, 3, seed=1).images(range(6)), first)


def test_a_person_stays_the_same_whatever_the_image_does(monkeypatch: pytest.MonkeyPatch) -> None:
    still = {name: ((low + high) / 2,) * 2 for name, (low, high) in synthetic.IMAGE.items()}
    monkeypatch.setattr(synthetic, "IMAGE", still)
    people, pictures = np.repeat([4, 5, 6], 3), np.array([0, 1, 9] * 3)
    pixels = render(people, pictures, 3).float()
    difference = (pixels[:, None] - pixels[None]).abs().mean((2, 3, 4))
    same = torch.from_numpy(people[:, None] == people[None])
    assert difference[same].max() < 0.01, "an identity factor changes from image to image"
    assert difference[~same].min() > 1.5, "two people look the same"


def test_a_change_of_the_picture_needs_a_new_version() -> None:
    """Means of 28x28 tiles of green, as VERSION 2 draws them: rounding moves them by far less than a level."""
    assert synthetic.VERSION == 2, "record the new tiles here"
    expected = [
        [165, 161, 172, 181],
        [154, 191, 195, 168],
        [156, 192, 194, 168],
        [157, 164, 166, 164],
    ]
    tiles = torch.nn.functional.avg_pool2d(
        render(np.array([0]), np.array([4]), 3)[0, 1:2].float(), 28
    )[0]
    assert (tiles - torch.tensor(expected)).abs().max() <= 0.75
