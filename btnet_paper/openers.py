"""How each kind of data is opened, and what is counted in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from btnet_core.data.faces import open_faces
from btnet_core.data.ijbc import read_templates
from btnet_core.data.pairs import open_pairs
from btnet_core.data.survface import read_open_set
from btnet_core.files import find

OPENERS: dict[str, Callable[[Any], str]] = {
    "faces": lambda spec: _faces(open_faces(spec)),
    "pairs": lambda spec: f"{len(open_pairs(spec)):,} pairs",
    "open set": lambda spec: f"{len(read_open_set(find(spec)).labels):,} images",
    "templates": lambda spec: (
        f"{len(set(read_templates(find(spec)).template.tolist())):,} templates"
    ),
    "weights": lambda spec: f"{find(spec).stat().st_size:,} bytes",
}


def _faces(faces: Any) -> str:
    return f"{len(faces):,} images of {faces.num_identities:,} people"
