"""Face images at the boundary: decode them, check them, and the one resize that everything uses.

Pixels are RGB, channels first, ``(B, 3, H, W)`` or ``(3, H, W)``, in [0, 255], uint8 or float32.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from btnet_core.errors import ConfigError, DataError, check_types
from btnet_core.files import reason
from btnet_core.kinds import what_is

KERNELS = ("bilinear", "bicubic", "area", "nearest")
MAX_BYTES = 2**28  # of an image file
MAX_SIDE = 8192  # pixels; a larger "face" is a mistake or a decompression bomb
# tags of EXIF and TIFF
ORIENTATION, TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_PLANES, TIFF_SAMPLES = 274, 258, 262, 284, 339
SIXTEEN = (None, "JPEG2000", "PNG", "PPM", "TIFF")  # where 16 bits are from 0 to white


@dataclass(frozen=True, kw_only=True)
class Resize:
    """How images change size; recorded with every result (paper-and-code: resize kernel).

    "bilinear" with ``antialias`` is PIL's BILINEAR in float; without it, OpenCV's INTER_LINEAR.
    "area" is PIL's BOX.
    """

    kernel: str = "bilinear"  # one of KERNELS
    antialias: bool = True  # low-pass before shrinking; only for bilinear and bicubic
    round_uint8: bool = False  # to whole levels after each resize (paper-and-code: float pixels)

    def __post_init__(self) -> None:
        check_types(self)
        if self.kernel not in KERNELS:
            raise ConfigError(f"kernel: got {self.kernel!r}, expected one of {', '.join(KERNELS)}")

    @property
    def smooth(self) -> bool:
        """Whether there is a low-pass that the kernel's name does not imply."""
        return self.antialias and self.kernel in ("bilinear", "bicubic")

    @property
    def name(self) -> str:
        levels = "uint8" if self.round_uint8 else "float"
        return f"{self.kernel}{'+antialias' if self.smooth else ''}, {levels}"


def check_pixels(pixels: Tensor, name: str = "pixels") -> Tensor:
    """Returns ``pixels`` if they are ``(..., 3, H, W)`` with values in [0, 255].

    Raises:
        DataError: another shape or dtype, a value out of range or not finite. Float images with no
            value above 1.0 are refused too when any is fractional: they were scaled to [0, 1].
    """
    if pixels.ndim not in (3, 4) or pixels.shape[-3] != 3 or 0 in pixels.shape[-2:]:
        shape = tuple(pixels.shape)
        raise DataError(f"{name}: got shape {shape}, expected (B, 3, H, W) or (3, H, W), RGB")
    if pixels.dtype == torch.uint8 or pixels.numel() == 0:
        return pixels
    if not pixels.is_floating_point():
        raise DataError(f"{name}: got dtype {pixels.dtype}, expected uint8 or float in [0, 255]")
    low, high = (value.item() for value in torch.aminmax(pixels))
    span = f"{name}: values span [{low:.4g}, {high:.4g}]"
    if not (low >= -0.5 and high <= 255.5):  # NaN, too; resize clips the overshoot of bicubic
        raise DataError(f"{span}, expected [0, 255]")
    if 0 < high <= 1.0 and bool((pixels != pixels.round()).any()):
        raise DataError(f"{span}: scale images to [0, 255], not [0, 1]")
    return pixels


def resize(pixels: Tensor, size: int | tuple[int, int], how: Resize | None = None) -> Tensor:
    """``(B, 3, H, W)`` or ``(3, H, W)`` pixels at ``size`` (rows, columns), float32.

    Computed on their device. The aspect ratio is stretched when it differs (paper-and-code: branch
    selection). Images of that size already are returned as they are.
    """
    how = how or Resize()
    rows, columns = (size, size) if isinstance(size, int) else size
    if rows < 1 or columns < 1:
        raise ConfigError(f"size: got {rows}x{columns}, expected at least 1x1")
    images = pixels.float()
    if images.shape[-2:] == (rows, columns):
        return images
    batch = images if images.ndim == 4 else images[None]
    if len(batch) == 0:
        return batch.new_empty(0, batch.shape[1], rows, columns)
    if how.kernel == "area":
        batch = _area(batch, rows, columns)
    elif how.smooth:
        batch = F.interpolate(batch, (rows, columns), mode=how.kernel, antialias=True)
    else:
        batch = F.interpolate(batch, (rows, columns), mode=how.kernel)
    batch = batch.clamp(0, 255)
    if how.round_uint8:
        batch = batch.round()
    return batch if images.ndim == 4 else batch[0]


def _area(batch: Tensor, rows: int, columns: int) -> Tensor:
    """PIL's BOX along both axes; never in bfloat16, whose 8 bits lose a level or more."""
    with torch.autocast(batch.device.type, enabled=False):
        down = _box(batch.shape[-2], rows).to(batch)
        across = _box(batch.shape[-1], columns).to(batch)
        return down @ batch @ across.T


def _box(size: int, out: int) -> Tensor:
    """``(out, size)``: the mean of the pixels whose centres lie in each new pixel."""
    ratio = size / out
    centre = (torch.arange(out, dtype=torch.float64) + 0.5) * ratio
    offset = (torch.arange(size, dtype=torch.float64) + 0.5 - centre[:, None]) / max(ratio, 1.0)
    weight = ((offset > -0.5) & (offset <= 0.5)).double()
    return weight / weight.sum(1, keepdim=True)


def degrade(pixels: Tensor, r: int, how: Resize | None = None) -> Tensor:
    """Shrunk to ``r`` rows and scaled back up: what an up-sampling recogniser sees. float32.

    Columns shrink in proportion: 96 columns of 112 rows become 24 of 28.
    """
    rows, columns = pixels.shape[-2:]
    return resize(resize(pixels, scaled_size(r, (rows, columns)), how), (rows, columns), how)


def scaled_size(r: int, size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of an image of ``size`` when it has ``r`` rows and keeps its shape."""
    return r, max(1, round(r * size[1] / size[0]))


def read(path: str | Path, where: str = "") -> bytes:
    """The content of an image file.

    Raises:
        DataError: it cannot be read, is no plain file (a pipe would be waited for), or has more
            than 256 MB. The message names ``where``, by default the path.
    """
    where = where or str(path)
    try:
        about = os.stat(path)
        if stat.S_ISREG(about.st_mode) and about.st_size <= MAX_BYTES:
            return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({reason(error)})") from error
    except ValueError:
        raise DataError(f"{where}: cannot be read (a NUL in its name)") from None
    raise DataError(f"{where}: no plain file of at most {MAX_BYTES:,} bytes")


def to_pixels(image: Any, where: str) -> Tensor:
    """RGB pixels ``(3, H, W)`` of a path, a PIL image, an ``(H, W, 3)`` array or such a tensor.

    Raises:
        DataError: it is no image; the message names ``where``.
    """
    if isinstance(image, (str, Path)):
        return decode(read(image, f"{where} ({image})"), where=f"{where} ({image})")
    if isinstance(image, Image.Image):
        return from_pil(image, where)
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3:
            raise DataError(f"{where}: got an array {image.shape}, expected (H, W, 3), RGB")
        image = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    if not isinstance(image, Tensor) or image.ndim != 3:
        got = type(image).__name__
        raise DataError(f"{where}: got {got}, expected a path, an image, an array or a tensor")
    return check_pixels(image, where)


def decode(data: bytes, *, where: str) -> Tensor:
    """Pixels of an image file, see :func:`from_pil`, whatever format Pillow reads.

    Raises:
        DataError: the bytes are no image, are cut short, or are of more than 8192 pixels a side.
            The message names ``where`` (file, record).
    """
    return from_pil(_opened(data, where), where)


def from_pil(image: Image.Image, where: str) -> Tensor:
    """uint8 RGB ``(3, H, W)`` of a PIL image, turned as its orientation tag says.

    Greys of 16 bits are scaled by the white of their format; what is transparent becomes black,
    like the border of an aligned crop; of several frames or pages the first is taken.

    Raises:
        DataError: as ``decode``; or the format does not say which value is white.
    """
    if max(image.size) > MAX_SIDE:
        size = f"{image.size[0]}x{image.size[1]}"
        raise DataError(f"{where}: image of {size}, the limit is {MAX_SIDE} a side")
    white = _white(image, where)
    inverted = white and image.format == "TIFF" and image.tag_v2.get(TIFF_PHOTOMETRIC) == 0
    try:
        image.load()
        with contextlib.suppress(Exception):  # a damaged tag turns nothing
            image = ImageOps.exif_transpose(image)
        values = np.asarray(image if white else _without_transparency(image).convert("RGB"))
    except Exception as error:  # Pillow raises many types for damaged files
        raise DataError(f"{where}: cannot decode image (cut short or damaged)") from error
    if not white:
        return torch.from_numpy(values.transpose(2, 0, 1).copy())
    grey = values.astype(np.float64) * (255 / white)
    grey = (255 - grey if inverted else grey).clip(0, 255).round().astype(np.uint8)
    return torch.from_numpy(grey).expand(3, -1, -1).clone()


def is_plain(data: bytes) -> bool:
    """Whether any reader shows a JPEG or PNG as ``decode`` does: 8 bits, opaque, upright."""
    try:
        image = Image.open(io.BytesIO(data))
        tagged = ORIENTATION in image.getexif()
    except Exception:
        return False
    opaque = image.mode in ("L", "RGB") and "transparency" not in image.info
    return image.format in ("JPEG", "PNG") and opaque and not tagged


def _opened(data: bytes, where: str) -> Image.Image:
    """Pillow's image, its header read."""
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        kind = what_is(data)
        if kind.endswith(" picture"):
            kind += ", damaged or of a kind that is not read; save it as PNG of 8 bits"
        raise DataError(f"{where}: cannot decode image ({kind})") from None
    except Image.DecompressionBombError:
        raise DataError(f"{where}: image too large, the limit is {MAX_SIDE} a side") from None
    except Exception as error:
        raise DataError(f"{where}: cannot decode image (cut short or damaged)") from error


def _white(image: Image.Image, where: str) -> int:
    """The value of white in greys of more than 8 bits; 0 for all other images."""
    tags = image.tag_v2 if image.format == "TIFF" else {}
    bits = max(tags.get(TIFF_BITS, (16,)))
    if tags.get(TIFF_PLANES) == 2 and tags.get(TIFF_BITS, (8,))[0] > 8:
        raise DataError(  # Pillow shows half of each value
            f"{where}: colours of {bits} bits, each in a plane of its own; save the image with 8"
        )
    signed = 2 in tags.get(TIFF_SAMPLES, ())
    if image.mode[0] not in "IF" and not signed:
        return 0
    if image.mode.startswith("I;16") and image.format in SIXTEEN:
        return 2**bits - 1
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # Pillow's name for their 16 bits
        return 65535
    kind = "floats" if image.mode == "F" else "integers of 32 bits or with a sign"
    raise DataError(
        f"{where}: greys are {kind}, and nothing says which of them is white; "
        "save the image with 8 or 16 bits"
    )


def _without_transparency(image: Image.Image) -> Image.Image:
    """``image`` over black where it has an alpha channel or a transparent colour."""
    if image.mode not in ("LA", "La", "PA", "RGBA", "RGBa") and "transparency" not in image.info:
        return image
    image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)


def encode(pixels: Tensor, kind: str = "PNG") -> bytes:
    """uint8 RGB ``(3, H, W)`` as PNG (lossless) or JPEG (quality 95, colour unsampled)."""
    if pixels.dtype != torch.uint8 or pixels.ndim != 3:
        shape = f"{pixels.dtype} {tuple(pixels.shape)}"
        raise DataError(f"encode: got {shape}, expected uint8 (3, H, W)")
    out = io.BytesIO()
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    Image.fromarray(check_pixels(pixels).permute(1, 2, 0).cpu().numpy()).save(out, kind, **options)
    return out.getvalue()
