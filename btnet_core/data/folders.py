"""Which files of a folder are faces: one walk for every reader and every command.

Links are followed. Hidden entries and those that systems leave behind are passed over without a
word; any other file that the decoder does not read is reported as left out.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from btnet_core import images as pixels
from btnet_core.errors import DataError
from btnet_core.files import reason
from btnet_core.kinds import what_is

# Files so named are images, readable or not. Of others the decoder decides.
FORMATS = "jpg jpeg jfif png bmp webp gif tif tiff pgm ppm pbm pnm pfm jp2 j2k avif heic heif jxl"
SUFFIXES = frozenset(f".{name}" for name in FORMATS.split())
LEFTOVERS = "__macosx @eadir #recycle #snapshot $recycle.bin lost+found"
LEFTOVERS += " thumbs.db ehthumbs.db desktop.ini picasa.ini"
FOREIGN = frozenset((*LEFTOVERS.split(), "system volume information", "icon\r"))


def is_image(path: Path) -> bool:
    """Whether ``path`` is taken for an image: by its name, or because the decoder reads it."""
    if path.suffix.lower() in SUFFIXES:
        return True
    try:
        pixels.decode(pixels.read(path), where=str(path))
    except DataError:
        return False
    return True


def entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """(folders, files) directly in ``folder``, sorted by name. Raises DataError if it is none."""
    folders: list[Path] = []
    files: list[Path] = []
    try:
        with os.scandir(folder) as found:
            for entry in found:
                if entry.name.startswith(".") or entry.name.lower() in FOREIGN:
                    continue
                (folders if entry.is_dir() else files).append(folder / entry.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be read as a folder ({reason(error)})") from error
    return sorted(folders), sorted(files)


def walk(folder: Path, above: Sequence[tuple[int, int]] = ()) -> Iterator[tuple[Path, list[Path]]]:
    """``folder`` and all folders under it with their files; no link to one above is followed."""
    here = _identity(folder)
    if here in above:
        return
    folders, files = entries(folder)
    yield folder, files
    for inner in folders:
        yield from walk(inner, (*above, here))


def _identity(folder: Path) -> tuple[int, int]:
    """Equal for two paths of one folder."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def split_images(files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """(images, the others)."""
    images = [file for file in files if is_image(file)]
    taken = set(images)
    return images, [file for file in files if file not in taken]


def find_images(folder: Path) -> tuple[list[Path], list[Path]]:
    """All images under ``folder``, at any depth, and the files that are none."""
    return split_images([file for _, files in walk(folder) for file in files])


def identity_folders(root: Path) -> list[list[Path]]:
    """The images of each person: of each sub-folder, or one by one where none has images.

    Warns of files that were left out.

    Raises:
        DataError: no images; images beside folders of images; images deeper than
            ``<identity>/<image>``.
    """
    people, files = entries(root)
    loose, left_out = split_images(files)
    groups = []
    for person in people:
        images: list[Path] = []
        for folder, files in walk(person, [_identity(root)]):
            found, others = split_images(files)
            left_out += others
            if found and folder != person:
                raise DataError(
                    f"{root}: expected <identity>/<image>, found {len(found)} images in {folder}"
                )
            images += found
        if images:
            groups.append(images)
    if loose and groups:
        raise DataError(
            f"{root}: {len(loose)} images, first {loose[0].name}, beside {len(groups)} folders "
            f"with images, first {groups[0][0].parent.name}; expected one or the other"
        )
    if not loose and not groups:
        names = [path.name for path in (*people, *left_out)][:5]
        raise DataError(
            f"{root}: no images; expected <identity>/<image>, found {', '.join(names) or 'nothing'}"
        )
    warn_of(root, left_out)
    return groups or [[file] for file in loose]


def warn_of(root: Path, left_out: Sequence[Path]) -> None:
    """Say how many files were left out, and the first of them by name."""
    if left_out:
        names = [str(file.relative_to(root)) for file in left_out[:5]]
        names += ["…"] * (len(left_out) > 5)
        text = f"left out {len(left_out)} files that are no images: {', '.join(names)}"
        warnings.warn(f"{root}: {text}", stacklevel=2)


def _no_text(data: bytes, line: int) -> str:
    """What ``data`` is instead of text in UTF-8, whose first fault is in ``line``."""
    kind = what_is(data)
    if kind in ("in no known format", "a text file"):
        return f"other bytes in line {line}"
    return kind


def read_lines(path: Path) -> list[str]:
    """Lines of a UTF-8 (or marked UTF-16) text file, without mark and line ends; or DataError."""
    try:
        data = path.read_bytes()
        code = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
        return data.decode(code).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({reason(error)})") from error
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: expected text in UTF-8, got {_no_text(data, line)}") from error
