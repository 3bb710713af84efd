"""Who is looked for in notebook 10: people of a data set, some of them strangers to the gallery."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from torch import Tensor

from btnet_core.data.faces import FaceSet, open_faces
from btnet_core.data.sources import parse_spec
from btnet_core.errors import DataError


class People(NamedTuple):
    """Who is looked for: known people, then strangers, one image of each kept for probing."""

    gallery: Tensor  # (known, 3, S, S): one image of each known person
    entries: Tensor  # (n, 3, S, S): all their images but the probe, at most two each
    who: np.ndarray  # (n,): whose they are
    probes: Tensor  # (known + strangers, 3, S, S)


def choose_people(faces: FaceSet, known: int, strangers: int) -> People:
    """The first ``known`` people with two images (at most half of all), and others as strangers."""
    labels = faces.labels.numpy()
    images = [np.flatnonzero(labels == label)[:3] for label in range(faces.num_identities)]
    able = [own for own in images if len(own) > 1][: min(known, len(images) // 2)]
    taken = {own[0] for own in able}
    others = [own for own in images if len(own) and own[0] not in taken][:strangers]
    if not able or not others:
        raise DataError(
            f"{faces.name}: {len(images)} people; expected one with two images, and a stranger"
        )
    return People(
        gallery=faces.images([own[1] for own in able]),
        entries=faces.images(np.concatenate([own[1:] for own in able])),
        who=np.repeat(np.arange(len(able)), [len(own) - 1 for own in able]),
        probes=faces.images([own[0] for own in (*able, *others)]),
    )


@lru_cache(maxsize=4)
def open_once(spec: str) -> FaceSet:
    """The faces of a spec as text, kept open."""
    return open_faces(parse_spec(spec))
