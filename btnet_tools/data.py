"""`btnet data`: which data sets are where; `btnet pack`: one's own faces as RecordIO."""

from __future__ import annotations

from pathlib import Path

import torch

from btnet_core.data.faces import FaceSet, image_folder, unreadable
from btnet_core.data.recordio import write_face_records
from btnet_core.data.sources import spec_text
from btnet_core.errors import DataError
from btnet_core.files import data_root, find
from btnet_core.images import decode, encode, is_plain, read, resize
from btnet_paper.openers import OPENERS
from btnet_paper.scales import get_scale, pages
from btnet_tools.catalogue import Entry, entries

LICENCE = "research only; faces of real people, do not redistribute"


# ---- what is there ---------------------------------------------------------------------------


def describe(entry: Entry) -> list[str]:
    """Where an entry is looked for and what it holds, or how to get it; who may know it."""
    path = find(entry.path)
    there = path.exists()
    lines = [
        f"{entry.name} ({entry.kind}, scale {entry.scale}): {'found' if there else 'NOT FOUND'}"
    ]
    if there:
        try:
            lines += [str(path), OPENERS[entry.kind](str(path))]
        except DataError as error:
            lines += [str(path), f"damaged: {error}"]
    else:
        how = f"{entry.command} ({entry.source})" if entry.get else entry.source
        lines += [str(data_root() / entry.path), f"get it: {how}"]
    first, *more = filter(None, [*lines, entry.trained_on, LICENCE])
    return [first, *(f"  {line}" for line in more)]


def describe_all() -> str:
    """What `btnet data` prints."""
    lines = []
    for one in map(get_scale, pages()):
        pairs = ", ".join(map(spec_text, one.pairs))
        lines.append(f"scale {one.name}: faces {spec_text(one.faces)}; pairs {pairs}")
    for entry in entries():
        lines += ["", *describe(entry)]
    return "\n".join(lines)


# ---- packing ---------------------------------------------------------------------------------


def bad_images(faces: FaceSet, skip: bool = False) -> dict[int, str]:
    """{index: why} of the images that cannot be read. Reads the whole set.

    Raises:
        DataError: there are some, unless ``skip``; or there is no other.
    """
    bad = unreadable(faces)
    if len(bad) == len(faces) or (bad and not skip):
        count = f"{len(bad):,} of {len(faces):,} images cannot be read"
        told = f"{faces.name}: {count}, the first: {next(iter(bad.values()), 'none')}"
        raise DataError(told if skip else f"{told}; --skip-bad leaves such images out")
    return bad


def pack_folder(folder: Path, out: Path, skip_bad: bool = False) -> tuple[int, list[str]]:
    """One sub-folder per identity -> RecordIO with property and index.

    Returns:
        The number of images, and why each of those left out was (with ``skip_bad``).

    Raises:
        DataError: before anything is written, an image cannot be read.
    """
    faces = image_folder(folder)
    bad = bad_images(faces, skip_bad)
    kept = [i for i in range(len(faces)) if i not in bad]
    _, labels = torch.unique(faces.labels[kept], return_inverse=True)  # without gaps
    images = (face_bytes(faces.files[i]) for i in kept)
    count = write_face_records(out, zip(images, labels.tolist(), strict=True), (112, 112))
    return count, list(bad.values())


def face_bytes(file: Path) -> bytes:
    """The file itself if a plain JPEG or PNG of 112x112, else the face at that size in PNG."""
    data = read(file)
    image = decode(data, where=str(file))
    if tuple(image.shape[1:]) == (112, 112) and is_plain(data):
        return data
    return encode(resize(image, 112).round().to(torch.uint8))
