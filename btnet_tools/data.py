"""Which data sets there are, where they are looked for, and what each scale needs (``btnet data``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from btnet_core.data.faces import open_faces
from btnet_core.data.folders import identity_folders
from btnet_core.data.pairs import parse_bin, parse_pairs, write_bin
from btnet_core.data.recordio import write_face_records
from btnet_core.data.sources import spec_text
from btnet_core.errors import ConfigError, DataError
from btnet_core.files import checksum, find
from btnet_core.images import decode, encode, read, resize

RESEARCH = "research only; faces of real people, do not redistribute"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One data set of the project."""

    name: str
    path: str  # under the data root
    kind: str  # faces, pairs, open set, templates, weights
    scales: str  # which need it
    licence: str
    source: str  # how to get it


ENTRIES = tuple(
    Entry(name=name, path=path, kind=kind, scales=scales, licence=licence, source=source)
    for name, path, kind, scales, licence, source in (
        (
            "faces_train",
            "faces_train",
            "faces",
            "lfw",
            RESEARCH,
            "LFW peopleDevTrain and CelebA crops, RecordIO",
        ),
        (
            "lfw_devtest",
            "lfw_devtest",
            "faces",
            "lfw",
            RESEARCH,
            "LFW peopleDevTest crops, RecordIO",
        ),
        (
            "lfw_devtest_6000",
            "lfw_devtest_6000.bin",
            "pairs",
            "lfw",
            RESEARCH,
            "6,000 pairs of the same people",
        ),
        (
            "mobilefacenet",
            "mobilefacenet_casia.safetensors",
            "weights",
            "lfw",
            RESEARCH,
            "trained on CASIA-WebFace",
        ),
        ("lfw", "lfw", "faces", "paper", RESEARCH, "btnet data get lfw (through scikit-learn)"),
        (
            "ms1mv3",
            "ms1m-retinaface-t1",
            "faces",
            "paper",
            RESEARCH,
            "InsightFace's data set zoo: MS1M-RetinaFace",
        ),
        *(
            (name, f"{name}.bin", "pairs", "paper", RESEARCH, "in the same archive as MS1Mv3")
            for name in ("lfw", "cfp_ff", "cfp_fp", "agedb_30", "calfw", "cplfw")
        ),
        ("survface", "QMUL-SurvFace", "open set", "paper", RESEARCH, "on request from QMUL"),
        (
            "ijbc",
            "IJBC",
            "templates",
            "paper",
            RESEARCH,
            "on request from NIST; InsightFace's meta files",
        ),
    )
)


def describe(entry: Entry) -> dict[str, Any]:
    """Where an entry is looked for, whether it is there and sound, its counts and checksum."""
    path = find(entry.path)
    row: dict[str, Any] = {"path": str(path), "found": path.exists(), "counts": "", "checksum": ""}
    if not row["found"]:
        return row
    try:
        if entry.kind == "faces":
            faces = open_faces(entry.path)
            row["counts"] = f"{len(faces):,} images, {faces.num_identities:,} identities"
            row["checksum"] = faces.checksum
        elif entry.kind == "pairs":
            _, same = parse_bin(path.read_bytes(), where=str(path))
            row["counts"] = f"{len(same):,} pairs, {int(same.sum()):,} same"
            row["checksum"] = checksum([path])
        elif entry.kind == "open set":
            from btnet_core.data.survface import read_open_set

            test = read_open_set(path)
            row["counts"] = (
                f"{int(test.in_gallery.sum()):,} gallery images, {int((~test.in_gallery).sum()):,} probes"
            )
            row["checksum"] = test.checksum
        elif entry.kind == "templates":
            from btnet_core.data.ijbc import read_templates

            templates = read_templates(path)
            row["counts"] = (
                f"{len(np.unique(templates.template)):,} templates, {len(templates.same):,} pairs"
            )
            row["checksum"] = templates.checksum
        else:
            row["counts"], row["checksum"] = f"{path.stat().st_size:,} bytes", checksum([path])
    except DataError as error:
        row["counts"] = f"damaged: {error}"
    return row


def table() -> str:
    """What ``btnet data`` prints."""
    from btnet_paper.scales import get_scale, pages

    lines = []
    for scale in map(get_scale, pages()):
        pairs = ", ".join(map(spec_text, scale.pairs))
        lines.append(f"scale {scale.name}: faces {spec_text(scale.faces)}; pairs {pairs}")
    for entry in ENTRIES:
        row = describe(entry)
        lines += [
            f"\n{entry.name} ({entry.kind}, scale {entry.scales}): {'found' if row['found'] else 'NOT FOUND'}",
            f"  {row['path']}",
            *(
                [f"  {row['counts']}", f"  {row['checksum']}"]
                if row["found"]
                else [f"  get it: {entry.source}"]
            ),
            f"  {entry.licence}",
        ]
    return "\n".join(lines)


def crop_lfw(file: Path) -> bytes:
    """The face of a funneled 250x250 LFW picture as JPEG, 112x112.

    The centred square of 140 pixels, a little above the middle: LFW's faces all lie there. It is no five-point
    alignment: accuracies are lower than on aligned crops.
    """
    picture = decode(read(file), where=str(file))
    if tuple(picture.shape) != (3, 250, 250):
        raise DataError(f"{file}: got {tuple(picture.shape)}, expected a picture of (3, 250, 250)")
    return encode(resize(picture[:, 50:190, 55:195], 112).round().to(torch.uint8), "JPEG")


def get_lfw(out: Path, fetch: Callable[..., Any] | None = None) -> int:
    """Download LFW through scikit-learn, crop it, and write RecordIO and ``pairs.bin`` (LFW's 6,000 pairs) to ``out``.

    The fetcher would hold every picture as float32, about 10 GB; it is asked for the one person with 500 pictures, and
    the files that it leaves in scikit-learn's data folder are read one by one. Returns the number of images.

    Raises:
        DataError: it could not be downloaded.
    """
    from sklearn.datasets import fetch_lfw_people, get_data_home

    try:
        (fetch or fetch_lfw_people)(color=True, resize=0.1, funneled=True, min_faces_per_person=500)
    except Exception as error:  # urllib, ssl, checksum and disk errors alike
        raise DataError(
            f"LFW could not be downloaded ({type(error).__name__}: {error}); is the machine online?"
        ) from error
    home = Path(get_data_home()) / "lfw_home"
    count = _write_folders(home / "lfw_funneled", out, crop_lfw)
    files, same = parse_pairs(home / "pairs.txt", home / "lfw_funneled")
    crops = {file: crop_lfw(file) for file in files}
    write_bin(out / "pairs.bin", [crops[file] for file in files], same)
    return count


def _write_folders(folder: Path, out: Path, read: Callable[[Path], bytes]) -> int:
    groups = identity_folders(folder)
    faces = ((read(file), label) for label, group in enumerate(groups) for file in group)
    return write_face_records(out, faces, (112, 112))


def pack_folder(folder: Path, out: Path) -> int:
    """One sub-folder per identity -> RecordIO with property and index (:func:`face_bytes`); the number of images."""
    return _write_folders(folder, out, face_bytes)


def pack_pairs(pairs: Path, out: Path, folder: Path | None = None) -> int:
    """LFW-style pairs.txt -> a verification ``.bin``; returns the number of pairs."""
    if out.suffix != ".bin":
        raise ConfigError(f"{out}: a verification set is written to a .bin file")
    files, same = parse_pairs(pairs, folder)
    write_bin(out, [face_bytes(file) for file in files], same)
    return len(same)


def face_bytes(file: Path) -> bytes:
    """The file's own bytes if it is a JPEG or PNG of 112x112, else the face resized to that, as PNG."""
    data = read(file)
    image = decode(data, where=str(file))
    if tuple(image.shape[1:]) == (112, 112) and data.startswith((b"\xff\xd8\xff", b"\x89PNG")):
        return data
    return encode(resize(image, 112).round().to(torch.uint8))
