"""The one resize, and the checks at the boundary."""

from __future__ import annotations

import contextlib
import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

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


def test_an_image_that_pillow_has_opened_and_not_read() -> None:
    whole = encode(face())
    assert torch.equal(images.from_pil(Image.open(io.BytesIO(whole)), "x"), face())
    with pytest.raises(DataError, match="x: cannot decode image"):
        images.from_pil(Image.open(io.BytesIO(whole[: len(whole) // 2])), "x")


# ---- what people's files are really like ----

# The eight orientations of EXIF 2.32: how the stored picture must be turned to be upright.
TURNS = {
    1: lambda x: x,
    2: lambda x: x.flip(2),
    3: lambda x: x.flip(1).flip(2),
    4: lambda x: x.flip(1),
    5: lambda x: x.transpose(1, 2),
    6: lambda x: x.transpose(1, 2).flip(2),  # a quarter clockwise
    7: lambda x: x.transpose(1, 2).flip(1).flip(2),
    8: lambda x: x.transpose(1, 2).flip(1),  # a quarter anticlockwise
}
FORMATS = [
    kind
    for kind in ("JPEG", "PNG", "TIFF", "WEBP", "AVIF", "MPO")
    if kind.lower() != "avif" or features.check("avif")
]


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def tagged(pixels: torch.Tensor, kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    best = {
        "JPEG": {"quality": 100},
        "MPO": {"quality": 100},
        "WEBP": {"lossless": True},
        "AVIF": {"quality": 100},
    }
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    return saved(image, kind, exif=exif, **best.get(kind, {}))


def smooth_face() -> torch.Tensor:
    """16 x 24, no symmetry: every wrong turn is far from right."""
    rows, columns = torch.arange(16.0)[:, None], torch.arange(24.0)
    grey = 40 + 7 * rows + 3 * columns
    return torch.stack([grey, grey.flip(1) / 2, 255 - grey]).round().to(torch.uint8)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("orientation", TURNS)
def test_pictures_are_turned_as_their_tag_says(kind: str, orientation: int, tmp_path: Path) -> None:
    stored = smooth_face()
    upright, data = TURNS[orientation](stored), tagged(stored, kind, orientation)
    got = decode(data, where="x")
    assert got.shape == upright.shape
    assert (got.float() - upright.float()).abs().mean() < 4
    (tmp_path / "face").write_bytes(data)
    opened = images.to_pixels(Image.open(io.BytesIO(data)), "x")
    assert torch.equal(opened, got)
    assert torch.equal(images.to_pixels(tmp_path / "face", "x"), got)


@pytest.mark.parametrize("tag", [0, 9, 77])
def test_a_tag_that_means_nothing_turns_nothing(tag: int) -> None:
    assert torch.equal(decode(tagged(smooth_face(), "PNG", tag), where="x"), smooth_face())


def test_a_damaged_tag_turns_nothing() -> None:
    stored = tagged(smooth_face(), "JPEG", 6)
    at = stored.index(b"Exif\0\0") + 6
    broken = stored[:at] + b"\xff" * 12 + stored[at + 12 :]
    assert decode(broken, where="x").shape == (3, 16, 24)


GREY = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)  # level k of 8 bits is 257 k of 16
LEVELS = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, -1, -1)


def pgm(values: np.ndarray, most: int) -> bytes:
    rows, columns = values.shape
    return f"P5 {columns} {rows} {most}\n".encode() + values.astype(">u2").tobytes()


SIXTEEN_BITS = {
    "PNG": lambda: saved(Image.fromarray(GREY), "PNG"),
    "TIFF": lambda: saved(Image.fromarray(GREY), "TIFF"),
    "TIFF, big-endian": lambda: saved(Image.fromarray(GREY.astype(">u2")), "TIFF"),
    "TIFF, white is zero": lambda: saved(Image.fromarray(65535 - GREY), "TIFF").replace(
        b"\x06\x01\x03\x00\x01\x00\x00\x00\x01", b"\x06\x01\x03\x00\x01\x00\x00\x00\x00"
    ),
    "PGM": lambda: pgm(GREY, 65535),
    "PGM of 10 bits": lambda: pgm(np.rint(np.arange(256) * 1023 / 255).reshape(16, 16), 1023),
}  # fmt: skip


@pytest.mark.parametrize("kind", SIXTEEN_BITS)
def test_greys_of_more_bits_keep_their_brightness(kind: str) -> None:
    got = decode(SIXTEEN_BITS[kind](), where="x")
    assert (got.int() - LEVELS.int()).abs().max() <= (1 if "10" in kind else 0)


def test_sixteen_bits_in_memory_and_turned() -> None:
    assert torch.equal(images.to_pixels(Image.fromarray(GREY), "x"), LEVELS)
    exif = Image.Exif()
    exif[274] = 6
    turned = decode(saved(Image.fromarray(GREY), "PNG", exif=exif), where="x")
    assert torch.equal(turned, TURNS[6](LEVELS))


@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.int16])
def test_greys_without_a_white_are_refused(dtype: type) -> None:
    values = np.linspace(0, 200, 64).reshape(8, 8).astype(dtype)
    image = Image.fromarray(values.astype(np.int32) if dtype == np.int16 else values)
    with pytest.raises(DataError, match=r"record 3: greys are .*save the image with 8 or 16 bits"):
        decode(saved(image, "TIFF"), where="record 3")
    with pytest.raises(DataError, match="which of them is white"):
        images.to_pixels(image, "x")


def tiff_by_hand(order: str, content: bytes, size: int, **tags: int | tuple[int, ...]) -> bytes:
    """A TIFF of one strip a plane; Pillow and libtiff write none of those tested with it."""
    planes = 3 if tags["t277"] == 3 and tags.get("t284") == 2 else 1
    offsets = tuple(8 + k * (len(content) // planes) for k in range(planes))
    whole = {256: size, 257: size, 259: 1, 273: offsets, 278: size,
             279: (len(content) // planes,) * planes}  # fmt: skip
    whole |= {int(name[1:]): value for name, value in tags.items()}
    entries, more = b"", b""
    behind = 8 + len(content) + 2 + 12 * len(whole) + 4
    for tag, value in sorted(whole.items()):
        values = value if isinstance(value, tuple) else (value,)
        packed = struct.pack(f"{order}{len(values)}I", *values)
        if len(values) > 1:
            packed, more = struct.pack(f"{order}I", behind + len(more)), more + packed
        entries += struct.pack(f"{order}HHI", tag, 4, len(values)) + packed
    start = b"II*\0" if order == "<" else b"MM\0*"
    head = start + struct.pack(f"{order}I", 8 + len(content)) + content
    return head + struct.pack(f"{order}H", len(whole)) + entries + bytes(4) + more


GREY_TAGS = {"t258": 8, "t262": 1, "t277": 1}


def test_twelve_bits_in_three_bytes_for_two_pixels() -> None:
    values = np.rint(np.arange(256) * 4095 / 255).astype(int)
    pairs = [(a << 12 | b).to_bytes(3, "big") for a, b in values.reshape(-1, 2).tolist()]
    little, big = (
        tiff_by_hand(order, b"".join(pairs), 16, **GREY_TAGS | {"t258": 12}) for order in "<>"
    )
    assert torch.equal(decode(little, where="x"), LEVELS)
    with pytest.raises(DataError, match="a TIFF picture, damaged or of a kind that is not read"):
        decode(big, where="x")


@pytest.mark.parametrize("order", "<>")
def test_what_pillow_would_show_wrong_is_refused(order: str) -> None:
    """Signed greys of 8 bits become white where they are dark; of planes of 16 bits half is shown."""
    grey = np.arange(256, dtype=np.uint8)
    plain = tiff_by_hand(order, grey.tobytes(), 16, **GREY_TAGS)
    assert torch.equal(decode(plain, where="x"), LEVELS)
    signed = tiff_by_hand(order, grey.tobytes(), 16, **GREY_TAGS, t339=2)
    with pytest.raises(DataError, match="with a sign"):
        decode(signed, where="x")
    colour = {"t262": 2, "t277": 3, "t284": 2}
    planes = tiff_by_hand(order, grey.tobytes() * 3, 16, **colour, t258=(8, 8, 8))
    assert torch.equal(decode(planes, where="x"), LEVELS)
    wide = (grey.astype(f"{order}u2") * 257).tobytes() * 3
    with pytest.raises(DataError, match="of 16 bits, each in a plane of its own"):
        decode(tiff_by_hand(order, wide, 16, **colour, t258=(16, 16, 16)), where="x")


def test_sixteen_bits_of_a_format_that_has_a_sign_are_refused() -> None:
    cards = ["SIMPLE  = T", "BITPIX  = 16", "NAXIS   = 2", "NAXIS1  = 16", "NAXIS2  = 16", "END"]
    header = "".join(card.ljust(80) for card in cards).ljust(2880).encode()
    with pytest.raises(DataError, match="which of them is white"):
        decode(header + GREY.astype(">i2").tobytes().ljust(2880, b"\0"), where="x")


def test_grey_over_black_however_its_transparency_is_written() -> None:
    """An associated alpha (extra sample 1) has darkened the grey already."""
    content = bytes([90, 255] * 255 + [45, 128])
    tags = {"t258": (8, 8), "t262": 1, "t277": 2, "t338": 1}
    got = decode(tiff_by_hand("<", content, 16, **tags), where="x")[0]
    assert (got.flatten()[:255] == 90).all()
    assert abs(int(got[15, 15]) - 45) <= 1


def test_palettes_transparency_and_one_bit() -> None:
    rgb = Image.fromarray(smooth_face().permute(1, 2, 0).numpy())
    palette = rgb.quantize(256)
    assert torch.equal(
        decode(saved(palette, "PNG"), where="x"), images.from_pil(palette.convert("RGB"), "x")
    )
    opaque = rgb.copy()
    opaque.putalpha(255)
    assert torch.equal(decode(saved(opaque, "PNG"), where="x"), smooth_face())
    half = rgb.copy()
    half.putalpha(Image.new("L", rgb.size, 0))
    half.putpixel((3, 2), (200, 100, 50, 128))
    black = decode(saved(half, "PNG"), where="x")
    assert black.sum() == black[:, 2, 3].sum()
    assert (black[:, 2, 3].int() - torch.tensor([100, 50, 25])).abs().max() <= 1
    for mode in ("L", "P", "RGB"):  # one colour that is transparent
        cut = Image.new(mode, (4, 4), 7 if mode != "RGB" else (7, 7, 7))
        assert (
            decode(
                saved(cut, "PNG", transparency=7 if mode != "RGB" else (7, 7, 7)), where="x"
            ).sum()
            == 0
        )
    grey = Image.new("LA", (4, 4), (90, 255))
    assert (decode(saved(grey, "PNG"), where="x") == 90).all()
    bits = Image.fromarray(np.eye(8, dtype=bool))
    for kind in ("PNG", "TIFF"):
        assert torch.equal(
            decode(saved(bits, kind), where="x")[0], 255 * torch.eye(8, dtype=torch.uint8)
        )


def test_cmyk_is_converted() -> None:
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # red
    for kind in ("JPEG", "TIFF"):
        red = decode(saved(image, kind), where="x").float().mean((1, 2))
        assert red[0] > 250
        assert red[1:].max() < 5


def test_the_first_frame_is_taken() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("white", "black")]
    for kind in ("GIF", "TIFF"):
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
        assert (decode(data, where="x") == 255).all()


def test_plain_files_are_those_that_any_reader_shows_alike() -> None:
    assert images.is_plain(encode(face()))
    assert images.is_plain(encode(face(), "JPEG"))
    for orientation in (1, 6):
        assert not images.is_plain(tagged(smooth_face(), "JPEG", orientation))
    assert not images.is_plain(saved(Image.fromarray(GREY), "PNG"))
    assert not images.is_plain(saved(Image.new("LA", (4, 4)), "PNG"))
    assert not images.is_plain(saved(Image.new("RGB", (4, 4)), "BMP"))
    assert not images.is_plain(b"")


def test_what_is_no_picture_is_named() -> None:
    for content, words in ((b"", "an empty file"), (b"<html>404", "an HTML page"),
                           (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer")):  # fmt: skip
        with pytest.raises(DataError, match=f"a.jpg: cannot decode image \\({words}"):
            decode(content, where="a.jpg")


@pytest.mark.parametrize("size", [(112, 112), (112, 96), (13, 7), (500, 333)])
@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 2}, {"quality": 30, "optimize": True}]
)
def test_a_jpeg_has_pillows_pixels(size: tuple[int, int], options: dict[str, object]) -> None:
    rows, columns = (8 * -(-n // 8) for n in size)
    whole = face(rows, columns)[:, : size[0], : size[1]].permute(1, 2, 0).numpy()
    data = saved(Image.fromarray(whole), "JPEG", **options)
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert torch.equal(decode(data, where="x"), torch.from_numpy(pixels.copy()).permute(2, 0, 1))
    for end in (3, 20, len(data) // 2, len(data) - 20):
        with pytest.raises(DataError, match="cannot decode"):
            decode(data[:end], where="x")


def test_an_absurd_size_is_refused() -> None:
    data = encode(face(16, 16), "JPEG")
    frame = data.index(b"\xff\xc0")
    with pytest.raises(DataError, match="65535x16"):
        decode(data[: frame + 5] + b"\x00\x10\xff\xff" + data[frame + 9 :], where="x")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((5, 5), np.uint8), r"array \(5, 5\)"),
        (np.zeros((5, 5, 3), np.uint16), "uint16"),
        (torch.zeros(5, 5), "Tensor"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_image_at_all(bad: object, message: str) -> None:
    with pytest.raises(DataError, match=rf"images\[1\]: got .*{message}"):
        images.to_pixels(bad, "images[1]")
