"""``btnet data get NAME``: the sets of the scale lfw from public archives and committed numbers.

The numbers lie in ``data/alignment/`` (data/README.md says how they were made): transforms, splits
and index pairs, no names. Pictures come from a download or from what the user has (``--from``).
"""

from __future__ import annotations

import hashlib
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from btnet_core.data.folders import read_lines
from btnet_core.data.ijbc import ARCFACE, similarity_transform
from btnet_core.data.pairs import write_bin
from btnet_core.data.recordio import FaceRecords, write_face_records
from btnet_core.errors import ConfigError, DataError
from btnet_core.files import (
    checksum,
    data_root,
    load_torch,
    read_safetensors,
    reason,
    write_atomically,
    write_safetensors,
)
from btnet_tools.align import SIZE, cut, members
from btnet_tools.catalogue import DATA, Download, downloads, entries


def get(name: str, source: str | Path | None = None, root: Path | None = None) -> list[str]:
    """Make the sets or weights ``name`` under ``root`` (the data root); returns what was written.

    Args:
        name: a key of ``downloads`` in data/sets.yaml.
        source: a folder, .tar, .tgz or .zip of raw pictures, or a file of weights; without it,
            they are downloaded.

    Raises:
        ConfigError: an unknown name, or something that is there already.
        DataError: the download failed, or ``source`` is not what the committed numbers are of.
    """
    if name not in downloads():
        raise ConfigError(f"got {name!r}, expected one of {', '.join(downloads())}")
    about, root = downloads()[name], root or data_root()
    makes = [root / entry.path for entry in entries() if entry.get == name]
    for path in filter(Path.exists, makes):
        raise ConfigError(f"{path} is there already; move it away to make it anew")
    raw = Path(source) if source else download(about, root / "downloads")
    if not raw.exists():
        raise DataError(f"{raw}: no such file or folder; expected {about.by_hand}")
    if about.tensors:
        return [get_weights(about, raw, makes[0])]
    made = {"lfw": get_lfw, "celeba": get_celeba, "cfp": get_cfp}[name](raw, root)
    return made if name == "cfp" else made + join_training(root)


# ---- downloading -----------------------------------------------------------------------------


def download(about: Download, folder: Path) -> Path:
    """The file of ``about.url`` in ``folder``, going on where an earlier call stopped.

    Raises:
        DataError: there is no plain download, it cannot be reached, stops early or has another MD5;
            the message says what to download by hand.
    """
    by_hand = f"download by hand: {about.by_hand}; then add --from and its path"
    if not about.url:
        raise DataError(f"there is no plain download; {by_hand}")
    path = folder / about.url.rsplit("/", 1)[1]
    part = path.with_name(f"{path.name}.part")
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _receive(about.url, part)
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{about.url}: cannot be downloaded ({why(error)}); {by_hand}") from error
    digest = hashlib.md5(part.read_bytes(), usedforsecurity=False).hexdigest()
    if about.md5 and digest != about.md5:
        part.unlink()
        raise DataError(f"{about.url}: MD5 {digest}, expected {about.md5}; {by_hand}")
    return part.replace(path)


def why(error: Exception) -> str:
    """In a few words why a download failed."""
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code}"
    inner = getattr(error, "reason", error)  # of a URLError
    return reason(inner) if isinstance(inner, Exception) else "the address is refused"


def _receive(url: str, part: Path) -> None:
    """Append to ``part`` what it lacks of ``url``."""
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        answer = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416 and done:  # it is complete
            return
        raise
    with answer, part.open("ab" if answer.status == 206 else "wb") as file:
        total = file.tell() + int(answer.headers.get("Content-Length") or 0)
        with tqdm(total=total, initial=file.tell(), unit="B", unit_scale=True) as bar:
            while block := answer.read(2**20):
                file.write(block)
                bar.update(len(block))
        if file.tell() < total:
            raise OSError(f"stopped at {file.tell():,} of {total:,} bytes; the next call goes on")


# ---- sets of faces and pairs -----------------------------------------------------------------


def get_lfw(source: Path, root: Path, numbers: Path = DATA / "alignment" / "lfw.npz") -> list[str]:
    """All of LFW, its DevTest people, and the pair sets of both views (View 2 is ``lfw.bin``)."""
    table = np.load(numbers)
    keys = sorted({key for key, _ in members(source, 2)})
    images = table["images"]
    if hashlib.sha256("\n".join(keys).encode()).hexdigest() != table["names_sha256"]:
        raise DataError(
            f"{source}: {len(keys):,} pictures of {len({key.split('/')[0] for key in keys}):,} "
            f"people, expected the {images.sum():,} of {len(images):,} in the complete archive"
        )
    crc32 = {keys[i]: int(crc) for i, crc in zip(table["probe"], table["probe_crc32"], strict=True)}
    crops = cut(source, keys, table["transform"], np.full((len(keys), 2), 250), crc32)
    people = np.repeat(np.arange(len(images)), images)
    test = np.flatnonzero(table["test"][people])
    made = [
        write_faces(root / "lfw", crops, people, source),
        write_faces(root / "lfw_devtest", [crops[i] for i in test], people[test], source),
    ]
    for name in ("lfw", "lfw_devtest", "lfw_devtest_6000"):
        made.append(write_pairs(root / f"{name}.bin", crops, table[name], people, source))
    return made


def get_celeba(
    source: Path, root: Path, numbers: Path = DATA / "alignment" / "celeba.npz"
) -> list[str]:
    """298 identities of CelebA: in the wild, or aligned with the landmarks' list in the folder."""
    table = np.load(numbers)
    keys = [f"{number:06d}.jpg" for number in table["number"]]
    transforms, sizes = table["transform"], None
    lists = list(source.rglob("list_landmarks_align_celeba.txt")) if source.is_dir() else []
    if lists:
        rows = (line.split() for line in read_lines(lists[0])[2:])
        points = {row[0]: np.array(row[1:], float).reshape(5, 2) for row in rows}
        fits = np.stack([similarity_transform(points[key], ARCFACE) for key in keys])
        transforms = fits[:, [0, 1, 0, 1], [0, 0, 2, 2]]  # a, b, tx, ty
        sizes = np.full((len(keys), 2), (178, 218))
    crops = cut(source, keys, transforms, sizes)
    return [write_faces(root / "celeba", crops, table["identity"], source)]


def get_cfp(source: Path, root: Path, numbers: Path = DATA / "alignment" / "cfp.npz") -> list[str]:
    """CFP: 10 frontal, then 4 profile pictures of each person, and the pairs FF and FP."""
    table = np.load(numbers)
    people = np.arange(len(table["transform"])) // 14
    views = [f"frontal/{i:02d}" for i in range(1, 11)] + [f"profile/{i:02d}" for i in range(1, 5)]
    keys = [f"{person + 1:03d}/{views[i % 14]}.jpg" for i, person in enumerate(people)]
    crops = cut(source, keys, table["transform"], table["size"])
    return [
        write_faces(root / "cfp", crops, people, source),
        write_pairs(root / "cfp_ff.bin", crops, table["cfp_ff"], people, source),
        write_pairs(root / "cfp_fp.bin", crops, table["cfp_fp"], people, source),
    ]


def join_training(root: Path, numbers: Path = DATA / "alignment") -> list[str]:
    """``faces_train`` of lfw/ and celeba/ when both are there, without whoever is in a test set."""
    if not all((root / name / "train.rec").is_file() for name in ("lfw", "celeba")):
        return []
    if (root / "faces_train").exists():
        raise ConfigError(f"{root / 'faces_train'} is there already; move it away to make it anew")
    lfw, celeba = FaceRecords(root / "lfw"), FaceRecords(root / "celeba")
    train = np.flatnonzero(~np.load(numbers / "lfw.npz")["test"][lfw.labels])
    keep = np.flatnonzero(np.load(numbers / "train.npz")["left_out"] == 0)
    crops = [lfw.image(i) for i in train.tolist()] + [celeba.image(i) for i in range(celeba.count)]
    people = np.concatenate([lfw.labels[train], lfw.labels.max() + 1 + celeba.labels])
    return [write_faces(root / "faces_train", [crops[i] for i in keep], people[keep], root)]


def write_faces(folder: Path, crops: Sequence[bytes], people: np.ndarray, source: Path) -> str:
    """A RecordIO set with a .json beside it; people are numbered anew from 0, in their order."""
    _, labels = np.unique(people, return_inverse=True)
    write_face_records(folder, zip(crops, labels.tolist(), strict=True), (SIZE, SIZE))
    files = [folder / name for name in ("train.rec", "train.idx", "property")]
    counts = {"people": int(labels.max()) + 1, "pictures": len(crops)}
    return _write_about(folder, files, source, counts)


def write_pairs(
    path: Path, crops: Sequence[bytes], pairs: np.ndarray, people: np.ndarray, source: Path
) -> str:
    """A verification set of index pairs (P, 2) with a .json beside it."""
    same = people[pairs[:, 0]] == people[pairs[:, 1]]
    write_bin(path, [crops[i] for i in pairs.flatten()], same.tolist())
    used = np.unique(pairs)
    counts = {"people": len(np.unique(people[used])), "pictures": len(used), "pairs": len(pairs)}
    return _write_about(path, [path], source, counts)


def _write_about(path: Path, files: list[Path], source: Path, counts: dict[str, Any]) -> str:
    about = counts | {
        "source": source.name if source.is_file() else "a folder",
        "source_checksum": checksum([source]) if source.is_file() else "",
        "checksum": checksum(files),
        "crops": "btnet_tools/align.py: area-averaged bilinear warp, JPEG 95 4:4:4",
        "trained_on": next(entry.trained_on for entry in entries() if entry.path == path.name),
    }
    write_atomically(path.with_name(f"{path.name}.json"), json.dumps(about, indent=1) + "\n")
    return str(path)


# ---- weights of others -----------------------------------------------------------------------


def get_weights(about: Download, source: Path, path: Path) -> str:
    """Weights of others as safetensors, when their values are those that the results are of."""
    plain = source.suffix == ".safetensors"
    content: Any = read_safetensors(source)[0] if plain else load_torch(source)
    state = content.get("net_state_dict", content) if isinstance(content, dict) else {}
    tensors = {
        name: value
        for name, value in state.items()
        if isinstance(value, Tensor) and not name.endswith("num_batches_tracked")
    }
    if tensor_digest(tensors) != about.tensors:
        raise DataError(f"{source}: other weights than the results are of: {about.by_hand}")
    write_safetensors(path, tensors, {"source": about.url or about.by_hand})
    return str(path)


def tensor_digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes and float32 values, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
