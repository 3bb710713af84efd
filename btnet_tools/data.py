"""`btnet data`: which data sets are where; `btnet pack`: one's own faces as RecordIO or .bin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from btnet_core.data.faces import FaceSet, image_folder, open_faces, unreadable
from btnet_core.data.ijbc import read_templates
from btnet_core.data.pairs import parse_bin, parse_pairs, write_bin
from btnet_core.data.recordio import write_face_records
from btnet_core.data.sources import spec_text
from btnet_core.data.survface import read_open_set
from btnet_core.errors import ConfigError, DataError
from btnet_core.files import checksum, data_root, find
from btnet_core.images import decode, encode, is_plain, read, resize
from btnet_paper.scales import get_scale, pages
from btnet_tools.catalogue import Entry, entries

LICENCE = "research only; faces of real people, do not redistribute"


# ---- what is there ---------------------------------------------------------------------------


def count_faces(path: Path) -> tuple[str, str]:
    """Counts and checksum of a face set."""
    faces = open_faces(str(path))
    return f"{len(faces):,} images, {faces.num_identities:,} identities", faces.checksum


def count_pairs(path: Path) -> tuple[str, str]:
    """Counts and checksum of a verification set."""
    _, same = parse_bin(path.read_bytes(), where=str(path))
    return f"{len(same):,} pairs, {int(same.sum()):,} same", checksum([path])


def count_open_set(path: Path) -> tuple[str, str]:
    """Counts and checksum of QMUL-SurvFace's test."""
    test = read_open_set(path)
    gallery = int(test.in_gallery.sum())
    return f"{gallery:,} gallery images, {len(test.in_gallery) - gallery:,} probes", test.checksum


def count_templates(path: Path) -> tuple[str, str]:
    """Counts and checksum of IJB-C."""
    found = read_templates(path)
    templates = len(np.unique(found.template))
    return f"{templates:,} templates, {len(found.same):,} pairs", found.checksum


def count_bytes(path: Path) -> tuple[str, str]:
    """Size and checksum of a file."""
    return f"{path.stat().st_size:,} bytes", checksum([path])


COUNTERS: dict[str, Callable[[Path], tuple[str, str]]] = {
    "faces": count_faces,
    "pairs": count_pairs,
    "open set": count_open_set,
    "templates": count_templates,
    "weights": count_bytes,
}


def describe(entry: Entry) -> list[str]:
    """Where an entry is looked for, its counts and checksum, or how to get it; who may know it."""
    path = find(entry.path)
    there = path.exists()
    lines = [
        f"{entry.name} ({entry.kind}, scale {entry.scale}): {'found' if there else 'NOT FOUND'}"
    ]
    if there:
        try:
            lines += [str(path), *COUNTERS[entry.kind](path)]
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


def pack_pairs(
    pairs: Path, out: Path, folder: Path | None = None, skip_bad: bool = False
) -> tuple[int, list[str]]:
    """LFW-style pairs.txt -> a verification ``.bin``; returns and raises as :func:`pack_folder`."""
    if out.suffix != ".bin":
        raise ConfigError(f"{out}: a verification set is written to a .bin file")
    files, same = parse_pairs(pairs, folder)
    packed, bad = {}, {}
    for file in dict.fromkeys(files):
        try:
            packed[file] = face_bytes(file)
        except DataError as error:
            bad[file] = str(error)
    if len(packed) == 0 or (bad and not skip_bad):
        raise DataError(f"{next(iter(bad.values()))}; --skip-bad leaves out pairs with such images")
    both = zip(files[::2], files[1::2], same, strict=True)
    kept = [
        (first, second, flag) for first, second, flag in both if {first, second} <= packed.keys()
    ]
    encoded = [packed[file] for first, second, _ in kept for file in (first, second)]
    write_bin(out, encoded, [flag for _, _, flag in kept])
    return len(kept), list(bad.values())


def face_bytes(file: Path) -> bytes:
    """The file itself if a plain JPEG or PNG of 112x112, else the face at that size in PNG."""
    data = read(file)
    image = decode(data, where=str(file))
    if tuple(image.shape[1:]) == (112, 112) and is_plain(data):
        return data
    return encode(resize(image, 112).round().to(torch.uint8))
