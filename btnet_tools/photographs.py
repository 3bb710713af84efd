"""`btnet align`: cut the faces out of photographs, turned and scaled to ArcFace's five points.

A face keeps its own detail: one that spans less than 112 pixels becomes a smaller crop, never a
scaled-up one, so that its size still tells which branch it belongs to.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from btnet_core.data.folders import find_images, warn_of
from btnet_core.data.ijbc import ARCFACE, similarity_transform
from btnet_core.errors import ConfigError, DataError
from btnet_core.files import write_atomically
from btnet_core.images import decode, encode, read
from btnet_tools.align import SIZE, crop

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime, under uniface, reports use
try:
    from uniface import RetinaFace
except ImportError:  # told where a detector is asked for
    RetinaFace = None

SEEN = 640  # pixels of the longer side at which the detector looks at a photograph
SMALLEST = 16  # its smallest anchor, in those pixels: of smaller faces it finds few


@dataclass(frozen=True, kw_only=True)
class Detection:
    """One face, in pixels: ``box`` x0, y0, x1, y1; ``points`` (5, 2) eyes, nose, mouth corners."""

    box: tuple[float, ...]
    points: np.ndarray

    @property
    def side(self) -> float:
        """The longer side of the box."""
        return max(self.box[2] - self.box[0], self.box[3] - self.box[1])


Detector = Callable[[Tensor], Sequence[Detection]]  # of a uint8 RGB picture (3, H, W)


def retinaface() -> Detector:
    """uniface's RetinaFace on the CPU; its weights are downloaded at the first use (docs).

    Raises:
        ConfigError: uniface is not installed, or its weights are neither there nor to be had.
    """
    if RetinaFace is None:
        raise ConfigError("align needs a face detector: pip install 'btnet-core[align]'")
    try:
        found = RetinaFace(input_size=(SEEN, SEEN), providers=["CPUExecutionProvider"])
    except (ConnectionError, RuntimeError, OSError) as error:
        raise ConfigError(
            "the detector's weights cannot be had; put retinaface_mnet_v2.onnx into "
            f"~/.uniface/models, or the folder UNIFACE_CACHE_DIR names ({type(error).__name__})"
        ) from error

    def detect(picture: Tensor) -> list[Detection]:
        bgr = np.ascontiguousarray(picture.permute(1, 2, 0).numpy()[:, :, ::-1])
        faces = found.detect(bgr)
        return [Detection(box=tuple(map(float, f.bbox)), points=f.landmarks) for f in faces]

    return detect


def align_photos(
    source: Path, out: Path, detect: Detector, largest: bool = False
) -> dict[str, dict[str, Any]]:
    """Write ``out/PHOTO_0.png``, ``_1.png``, … for the faces of each photograph, largest first.

    ``largest`` takes the first alone. Sub-folders stay. ``OUT.json`` lists each crop with its box,
    and why a photograph gave none.

    Returns:
        ``crops`` {name: box, side, note} and ``without`` {photograph: reason}.

    Raises:
        DataError: no pictures in ``source``, or it is inside ``out``.
    """
    if out.resolve() in (source.resolve(), *source.resolve().parents):
        raise DataError(f"{out}: holds the photographs; expected another folder")
    photos, left_out = ([source], []) if source.is_file() else find_images(source)
    if not photos:
        raise DataError(f"{source}: no images")
    warn_of(source, left_out)
    found: dict[str, dict[str, Any]] = {"crops": {}, "without": {}}
    for photo in sorted(photos):
        name = photo.relative_to(source) if photo != source else Path(photo.name)
        try:
            picture = decode(read(photo), where=str(photo))
            faces = sorted(detect(picture), key=lambda face: -face.side)
            for i, face in enumerate(faces[:1] if largest else faces):
                face_crop = cut(picture, face.points)
                target = out / name.parent / f"{name.name}_{i}.png"
                write_atomically(target, encode(face_crop))
                facts = {"box": face.box, "side": face_crop.shape[-1], "note": note(face, picture)}
                found["crops"][str(target.relative_to(out))] = facts
            if not faces:
                found["without"][str(name)] = f"no face of {limit(picture):.0f} pixels or more"
        except DataError as error:
            found["without"][str(name)] = str(error)
    write_atomically(out.with_name(f"{out.name}.json"), json.dumps(found, indent=1))
    return found


def limit(picture: Tensor) -> float:
    """Pixels of the picture below which its detector finds few faces."""
    return SMALLEST * max(1.0, max(picture.shape[-2:]) / SEEN)


def note(face: Detection, picture: Tensor) -> str:
    """What to know of a detection: "" or that it is smaller than the detector's limit."""
    least = limit(picture)
    return f"{face.side:.0f} pixels, below the detector's {least:.0f}" if face.side < least else ""


def cut(picture: Tensor, points: np.ndarray) -> Tensor:
    """The face (3, s, s) whose ``points`` (5, 2) lie as ArcFace's do in 112x112; s <= 112, uint8.

    A face that spans more is shrunk; one that spans less is not scaled up.
    """
    moves = similarity_transform(np.asarray(points, np.float64), ARCFACE)
    factor = float(np.hypot(*moves[:, 0]))  # crop pixels for each of the picture's
    side = int(np.clip(round(SIZE / max(factor, 1.0)), 1, SIZE))
    shift = np.array([0, 0, 0.5])  # pixel centres lie at whole numbers
    return crop(picture, (moves + shift) * side / SIZE - shift, side)
