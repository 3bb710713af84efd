"""The one resize, and the checks at the boundary."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from btnet_core import images
from btnet_core.errors import ConfigError, DataError
from btnet_core.images import Resize, check_pixels, decode, degrade, encode, resize

PIL_KERNELS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "area": Image.Resampling.BOX,
}


def face(rows: int = 112, columns: int = 112, seed: int = 0) -> torch.Tensor:
    """Noise at several scales: harder than any face."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.uniform(0, 255, (3, rows // 8, columns // 8))).float()
    fine = torch.from_numpy(rng.normal(0, 20, (3, rows, columns))).float()
    return (resize(coarse, (rows, columns)) + fine).clamp(0, 255).round().to(torch.uint8)


def pil_resize(
    image: torch.Tensor, size: tuple[int, int], kernel: Image.Resampling
) -> torch.Tensor:
    """PIL in float, channel by channel."""
    planes = [
        Image.fromarray(plane.float().numpy(), mode="F").resize(size[::-1], kernel)
        for plane in image
    ]
    return torch.from_numpy(np.stack([np.asarray(plane) for plane in planes])).clamp(0, 255)


@pytest.mark.parametrize("kernel", ["bilinear", "bicubic", "area"])
@pytest.mark.parametrize(
    "size", [(7, 7), (14, 14), (28, 24), (33, 41), (56, 56), (112, 112), (150, 131), (224, 224)]
)
def test_equals_pil_in_float_to_one_level(kernel: str, size: tuple[int, int]) -> None:
    image = face()
    with torch.autocast("cpu", torch.bfloat16):  # as the embedders call it
        ours = resize(image, size, Resize(kernel=kernel))
    assert (ours - pil_resize(image, size, PIL_KERNELS[kernel])).abs().max() <= 0.01


@pytest.mark.parametrize("size", [7, 14, 50])
def test_rounding_equals_pil_on_uint8(size: int) -> None:
    image = face()
    theirs = np.asarray(
        Image.fromarray(image.permute(1, 2, 0).numpy()).resize(
            (size, size), Image.Resampling.BILINEAR
        )
    )
    ours = resize(image, size, Resize(round_uint8=True))
    assert torch.equal(ours, ours.round())
    assert (ours.permute(1, 2, 0) - torch.from_numpy(theirs.copy()).float()).abs().max() <= 1


def test_without_antialias_it_samples_points() -> None:
    """OpenCV's INTER_LINEAR: at half size the value between two pixels of each row and column."""
    image = face()
    plain = resize(image, 56, Resize(antialias=False))
    by_hand = image.float().unfold(1, 2, 2).unfold(2, 2, 2).mean((-1, -2))
    torch.testing.assert_close(plain, by_hand)
    quarter = resize(image, 28, Resize(antialias=False))
    torch.testing.assert_close(
        quarter, image.float()[:, 1:].unfold(1, 2, 4)[:, :, 1:].unfold(2, 2, 4).mean((-1, -2))
    )
    assert (quarter - resize(image, 28)).abs().mean() > 3


def test_batches_single_images_and_nothing() -> None:
    images = torch.stack([face(seed=0), face(seed=1)])
    torch.testing.assert_close(resize(images, 14)[1], resize(images[1], 14))
    assert resize(images[:0], 14).shape == (0, 3, 14, 14)
    assert resize(images, 112).dtype == torch.float32
    with pytest.raises(ConfigError, match="0x5"):
        resize(images, (0, 5))
    with pytest.raises(ConfigError, match="lanczos"):
        Resize(kernel="lanczos")


def test_degrade_goes_down_and_up_and_keeps_the_shape() -> None:
    image = face()
    torch.testing.assert_close(degrade(image, 14), resize(resize(image, 14), 112))
    torch.testing.assert_close(degrade(image, 112), image.float())
    assert degrade(image[:, :, 8:104], 28).shape == (3, 112, 96)


def test_names_tell_kernels_apart() -> None:
    options = [Resize(), Resize(antialias=False), Resize(round_uint8=True), Resize(kernel="area")]
    assert len({how.name for how in options}) == 4
    assert Resize().name == "bilinear+antialias, float"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(1, 5, 5), "shape"),
        (torch.zeros(3, 0, 5), "shape"),
        (torch.zeros(3, 5, 5, dtype=torch.int32), "int32"),
        (torch.full((3, 5, 5), 300.0), "300"),
        (torch.full((3, 5, 5), float("nan")), "nan"),
        (torch.rand(3, 5, 5), r"not \[0, 1\]"),
    ],
)
def test_check_pixels_names_what_is_wrong(bad: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=f"gallery.*{message}"):
        check_pixels(bad, "gallery")


def test_round_trip_through_png_and_jpeg() -> None:
    image = face()
    assert torch.equal(decode(encode(image), where="x"), image)
    assert (decode(encode(image, "JPEG"), where="x").float() - image.float()).abs().mean() < 8


def test_grey_and_palette_images_become_rgb() -> None:
    out = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(out, "PNG")
    image = decode(out.getvalue(), where="grey")
    assert image.shape == (3, 8, 8)
    assert torch.equal(image[0], image[2])


def test_bombs_and_cut_images_are_refused() -> None:
    bomb = io.BytesIO()
    Image.new("1", (9000, 10)).save(bomb, "PNG")
    with pytest.raises(DataError, match=r"record 7.*9000"):
        decode(bomb.getvalue(), where="record 7")
    huge = io.BytesIO()
    Image.new("1", (20000, 20000)).save(huge, "PNG")
    with pytest.raises(DataError, match="record 8"):
        decode(huge.getvalue(), where="record 8")
    with pytest.raises(DataError, match="record 9"):
        decode(encode(face(), "JPEG")[:2000], where="record 9")


@given(st.binary(max_size=200), st.integers(0, 60), st.integers(0, 255))
@settings(max_examples=60, deadline=None)
def test_any_bytes_decode_or_raise_data_error(tail: bytes, at: int, value: int) -> None:
    good = bytearray(encode(torch.full((3, 4, 4), 7, dtype=torch.uint8)))
    good[min(at, len(good) - 1)] = value
    for data in (tail, bytes(good) + tail):
        with contextlib.suppress(DataError):
            assert decode(data, where="x").shape[0] == 3


def test_a_file_that_is_no_plain_file_of_an_images_size_is_refused(tmp_path: Path) -> None:
    (tmp_path / "whole.png").write_bytes(b"content")
    assert images.read(tmp_path / "whole.png") == b"content"
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")  # reading it would wait for a writer
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(images.MAX_BYTES + 1)
    for name in ("folder.png", "pipe.png", "huge.png"):
        with pytest.raises(DataError, match=f"{name}: no plain file of at most"):
            images.read(tmp_path / name)
    for name in ("none.png", "nul\0.png", "x" * 5000):
        with pytest.raises(DataError, match="cannot be read"):
            images.read(tmp_path / name)


def test_an_image_that_pillow_has_opened_and_not_read(tmp_path: Path) -> None:
    whole = encode(face())
    assert torch.equal(images.from_pil(lambda: Image.open(io.BytesIO(whole)), "x"), face())
    with pytest.raises(DataError, match="x: cannot decode image"):
        images.from_pil(lambda: Image.open(io.BytesIO(whole[: len(whole) // 2])), "x")


@pytest.mark.parametrize("size", [(112, 112), (112, 96), (13, 7), (500, 333)])
@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 2}, {"quality": 30, "optimize": True}]
)
def test_a_jpeg_has_pillows_pixels(size: tuple[int, int], options: dict[str, object]) -> None:
    stream = io.BytesIO()
    Image.fromarray(
        face(*[8 * -(-n // 8) for n in size])[:, : size[0], : size[1]].permute(1, 2, 0).numpy()
    ).save(stream, "JPEG", **options)
    data = stream.getvalue()
    assert images._jpeg_side(data) == max(size)  # by the quick way
    assert torch.equal(
        decode(data, where="x"), images.from_pil(lambda: Image.open(io.BytesIO(data)), "x")
    )
    for end in (3, 20, len(data) // 2, len(data) - 20):  # the same verdict on one that is cut short
        with pytest.raises(DataError, match="cannot decode"):
            decode(data[:end], where="x")


def test_a_jpeg_of_other_colours_or_an_absurd_size_goes_the_usual_way() -> None:
    for mode in ("L", "CMYK"):
        stream = io.BytesIO()
        Image.new(mode, (40, 20)).save(stream, "JPEG")
        assert images._jpeg_side(stream.getvalue()) == 0
        assert decode(stream.getvalue(), where="x").shape == (3, 20, 40)
    data = encode(face(16, 16), "JPEG")
    frame = data.index(b"\xff\xc0")
    with pytest.raises(DataError, match="16x65535"):
        decode(data[: frame + 5] + b"\xff\xff" + data[frame + 7 :], where="x")
