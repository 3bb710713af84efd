"""Face images at the boundary: decode them, check them, and the one resize that everything uses.

Pixels are RGB, channels first, ``(B, 3, H, W)`` or ``(3, H, W)``, in [0, 255], uint8 or float32.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from btnet_core.errors import ConfigError, DataError

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # it is to leave torchvision some day after 0.29
    decode_jpeg = None  # type: ignore[assignment]

KERNELS = ("bilinear", "bicubic", "area", "nearest")
MAX_BYTES = 2**28  # of an image file
MAX_SIDE = 8192  # pixels; a larger "face" is a mistake or a decompression bomb


@dataclass(frozen=True, kw_only=True)
class Resize:
    """How images change size; recorded with every result (paper-and-code: resize kernel, float pixels).

    ``bilinear`` with ``antialias`` is PIL's BILINEAR in float; without it, OpenCV's INTER_LINEAR.
    ``area`` is PIL's BOX.
    """

    kernel: str = "bilinear"  # one of KERNELS
    antialias: bool = True  # low-pass before shrinking; only for bilinear and bicubic
    round_uint8: bool = (
        False  # round and clip to whole levels after each resize, as uint8 pipelines do
    )

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS:
            raise ConfigError(f"kernel: got {self.kernel!r}, expected one of {', '.join(KERNELS)}")

    @property
    def name(self) -> str:
        smooth = "+antialias" if self.antialias and self.kernel in ("bilinear", "bicubic") else ""
        return f"{self.kernel}{smooth}, {'uint8' if self.round_uint8 else 'float'}"


def check_pixels(pixels: Tensor, name: str = "pixels") -> Tensor:
    """Return ``pixels`` if it is ``(..., 3, H, W)`` with values in [0, 255].

    Raises:
        DataError: another shape or dtype, a value out of range or not finite. Float images with no value
            above 1.0 are refused too when any is fractional: they are almost surely scaled to [0, 1].
    """
    if pixels.ndim not in (3, 4) or pixels.shape[-3] != 3 or 0 in pixels.shape[-2:]:
        raise DataError(
            f"{name}: got shape {tuple(pixels.shape)}, expected (B, 3, H, W) or (3, H, W), RGB"
        )
    if pixels.dtype == torch.uint8 or pixels.numel() == 0:
        return pixels
    if not pixels.is_floating_point():
        raise DataError(f"{name}: got dtype {pixels.dtype}, expected uint8 or float in [0, 255]")
    low, high = (value.item() for value in torch.aminmax(pixels))
    if not (
        low >= -0.5 and high <= 255.5
    ):  # also true for NaN; bicubic overshoot is clipped by resize
        raise DataError(f"{name}: values span [{low:.4g}, {high:.4g}], expected [0, 255]")
    if 0 < high <= 1.0 and bool((pixels != pixels.round()).any()):
        raise DataError(
            f"{name}: values span [{low:.4g}, {high:.4g}]: scale images to [0, 255], not [0, 1]"
        )
    return pixels


def resize(pixels: Tensor, size: int | tuple[int, int], how: Resize | None = None) -> Tensor:
    """Resize ``(B, 3, H, W)`` or ``(3, H, W)`` pixels to ``size`` (rows, columns), on their device, to float32.

    The aspect ratio is stretched when it differs (paper-and-code: branch selection). A no-op when the size is the same.
    """
    how = how or Resize()
    rows, columns = (size, size) if isinstance(size, int) else size
    if rows < 1 or columns < 1:
        raise ConfigError(f"size: got {rows}x{columns}, expected at least 1x1")
    images = pixels.float()
    if images.shape[-2:] == (rows, columns):
        return images
    batch = images if images.ndim == 4 else images[None]
    smooth = how.antialias and how.kernel in ("bilinear", "bicubic")
    if how.kernel == "area":
        with torch.autocast(
            batch.device.type, enabled=False
        ):  # bfloat16 holds 8 bits: a level or more is lost
            batch = (
                _box(batch.shape[-2], rows).to(batch)
                @ batch
                @ _box(batch.shape[-1], columns).to(batch).T
            )
    elif batch.shape[0]:
        batch = F.interpolate(
            batch, (rows, columns), mode=how.kernel, **({"antialias": True} if smooth else {})
        )
    else:
        batch = batch.new_empty(0, batch.shape[1], rows, columns)
    batch = batch.clamp(0, 255)
    if how.round_uint8:
        batch = batch.round()
    return batch if images.ndim == 4 else batch[0]


def _box(size: int, out: int) -> Tensor:
    """PIL's BOX along one axis, ``(out, size)``: the mean of the pixels whose centres lie in each new pixel."""
    scale = size / out
    centre = (torch.arange(out, dtype=torch.float64) + 0.5) * scale
    offset = (torch.arange(size, dtype=torch.float64) + 0.5 - centre[:, None]) / max(scale, 1.0)
    weight = ((offset > -0.5) & (offset <= 0.5)).double()
    return weight / weight.sum(1, keepdim=True)


def degrade(pixels: Tensor, r: int, how: Resize | None = None) -> Tensor:
    """Shrink to ``r`` rows and scale back up to the original size: what an up-sampling recogniser sees.

    Columns shrink in proportion (96 columns of 112 rows become 24 of 28). Returns float32 pixels.
    """
    rows, columns = pixels.shape[-2:]
    return resize(resize(pixels, scaled_size(r, (rows, columns)), how), (rows, columns), how)


def scaled_size(r: int, size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of an image of ``size`` when it has ``r`` rows and keeps its shape."""
    return r, max(1, round(r * size[1] / size[0]))


def read(path: str | Path, where: str = "") -> bytes:
    """The content of an image file.

    Raises:
        DataError: it cannot be read, is no plain file (a pipe would be waited for), or has more than 256 MB.
            ``where`` (the path, if not given) is named in the message.
    """
    where = where or str(path)
    try:
        about = os.stat(path)
        if stat.S_ISREG(about.st_mode) and about.st_size <= MAX_BYTES:
            return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise DataError(
            f"{where}: cannot be read ({getattr(error, 'strerror', None) or error})"
        ) from error
    raise DataError(f"{where}: no plain file of at most {MAX_BYTES:,} bytes")


def decode(data: bytes, *, where: str) -> Tensor:
    """Decode JPEG, PNG, … bytes to uint8 RGB ``(3, H, W)``.

    A plain colour JPEG goes to torchvision, which gives Pillow's pixels in two thirds of the time; what it refuses, and
    all else, to Pillow (as does every image where torchvision decodes none any more).

    Raises:
        DataError: the bytes are no image, are cut short, or decode to more than 8192 pixels a side.
            ``where`` (file, record) is named in the message.
    """
    if decode_jpeg and 0 < _jpeg_side(data) <= MAX_SIDE:
        with contextlib.suppress(RuntimeError):
            pixels = decode_jpeg(
                torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB
            )
            return torch.from_numpy(
                pixels.numpy().copy()
            )  # (3, H, W) in memory, too: NumPy is quicker at it
    return from_pil(lambda: Image.open(io.BytesIO(data)), where)


def _jpeg_side(data: bytes) -> int:
    """The longer side of a JPEG of three colours, from its header; 0 for anything else or unusual."""
    place = 2 if data[:2] == b"\xff\xd8" else len(data)
    while place + 10 <= len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if marker in (0xC0, 0xC1, 0xC2):  # start of frame: length, bits, rows, columns, components
            rows, columns = struct.unpack_from(">HH", data, place + 5)
            return max(rows, columns) if data[place + 9] == 3 else 0
        if not (marker in (0xC4, 0xDB, 0xDD, 0xFE) or 0xE0 <= marker <= 0xEF):
            break
        place += 2 + length
    return 0


def from_pil(opened: Callable[[], Image.Image], where: str) -> Tensor:
    """What ``opened`` returns as uint8 RGB ``(3, H, W)``; Pillow may read its pixels only now. Raises as ``decode`` does."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = opened()
            small = max(image.size) <= MAX_SIDE
            rows = (
                np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
                if small
                else None
            )
    except UnidentifiedImageError:  # whose own text is an address in memory
        raise DataError(f"{where}: cannot decode image (in no known format)") from None
    except Exception as error:  # Pillow raises many types for damaged files
        raise DataError(
            f"{where}: cannot decode image ({type(error).__name__}: {error})"
        ) from error
    if rows is None:
        raise DataError(
            f"{where}: image of {image.size[0]}x{image.size[1]}, the limit is {MAX_SIDE} a side"
        )
    return torch.from_numpy(rows.transpose(2, 0, 1).copy())


def encode(pixels: Tensor, kind: str = "PNG") -> bytes:
    """Encode uint8 RGB ``(3, H, W)`` as PNG (lossless) or JPEG (quality 95, colour at full resolution)."""
    if pixels.dtype != torch.uint8 or pixels.ndim != 3:
        raise DataError(
            f"encode: got {pixels.dtype} {tuple(pixels.shape)}, expected uint8 (3, H, W)"
        )
    out = io.BytesIO()
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    Image.fromarray(check_pixels(pixels).permute(1, 2, 0).cpu().numpy()).save(out, kind, **options)
    return out.getvalue()
