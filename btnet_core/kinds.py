"""What a file is, by its first bytes: for errors that say what was found."""

from __future__ import annotations

import codecs
import re
import zipfile
from pathlib import Path

HEAD = 1024  # bytes that are looked at

STARTS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer (`git lfs pull` fetches the file itself)"),
    (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "a PyTorch file of the old format"),
    (b"\x89HDF\r\n", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"PK\x03\x04", "a zip archive"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"\x1f\x8b", "a gzip file"),
    (b"BZh", "a bzip2 file"),
    (b"\xfd7zXZ", "an xz file"),
    (b"7z\xbc\xaf", "a 7-Zip archive"),
    (b"Rar!", "a RAR archive"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file"),
    (b"GGUF", "a GGUF model"),
    (b"%PDF", "a PDF document"),
    (b"\x7fELF", "a program"),
    (b"MZ", "a program"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"\x89PNG", "a PNG picture"),
    (b"GIF8", "a GIF picture"),
    (b"BM", "a BMP picture"),
    (b"II*\x00", "a TIFF picture"),
    (b"MM\x00*", "a TIFF picture"),
    (b"II+\x00", "a TIFF picture"),
    (b"MM\x00+", "a TIFF picture"),
    (b"\x0a\x23\xd7\xce", "a RecordIO file"),
    (b"\xff\x0a", "a JPEG XL picture"),
    (b"\x00\x00\x00\x0cJXL ", "a JPEG XL picture"),
)
# of ISO base media files
BRANDS = dict.fromkeys(("heic", "heix", "mif1", "msf1"), "a HEIC picture; save it as JPEG or PNG")
BRANDS |= {"avif": "an AVIF picture", "crx ": "a raw picture of a camera"}
# of text, after blanks and a byte-order mark, in small letters
TEXTS: tuple[tuple[str, str], ...] = (
    (r"<!doctype html|<html|<head|<script", "an HTML page, not the file it was to be"),
    (r"<svg", "an SVG drawing"),
    (r"<\?xml|<[a-z]+[ >]", "an XML file"),
    (r"[{\[]", "a JSON file"),
    (r"", "a text file"),
)


def what_is(content: bytes | Path | str) -> str:
    """Says in a few words what a file is, by its first bytes or its path; never an error."""
    if not isinstance(content, bytes):
        try:
            with open(content, "rb") as file:
                head = file.read(HEAD)
                if head.startswith(b"PK\x03\x04") and zipfile.is_zipfile(file):
                    return _archive(zipfile.ZipFile(file).namelist())
            content = head
        except (OSError, ValueError, zipfile.BadZipFile):
            return "a file that cannot be read"
    head = content[:HEAD]
    if not head.strip(b"\0"):
        return "a file of zeros" if head else "an empty file"
    for start, words in STARTS:
        if head.startswith(start):
            return words
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**30:
        return "a safetensors file"
    if re.match(rb"\x80[\x00-\x05]", head):
        return "a pickle, whose Python objects are not run"
    if head[4:8] == b"TFL3":
        return "a TensorFlow Lite model"
    if head[4:8] == b"ftyp":
        brand = head[8:12].decode("latin1")
        return BRANDS.get(brand, "a video")
    if head[257:262] == b"ustar":
        return "a tar archive"
    if re.match(rb"\x08[\x01-\x20][\x12\x1a\x22\x28\x32\x3a\x42]", head):
        return "an ONNX model"
    return _text(head) or "in no known format"


def _archive(names: list[str]) -> str:
    """What a zip archive with these entries is."""
    ends = {name.rsplit("/", 1)[-1] for name in names}
    if any("/code/" in name for name in names):
        return "a TorchScript program"
    if "archive_format" in ends:
        return "an exported PyTorch program (.pt2)"
    if "data.pkl" in ends:
        return "a PyTorch file"
    if ends and all(name.endswith(".npy") for name in ends):
        return "NumPy arrays (.npz)"
    return "a zip archive" if names else "an empty zip archive"


def _text(head: bytes) -> str | None:
    """What kind of text ``head`` is; None if it is none."""
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)  # the end may be cut
    except UnicodeDecodeError:
        return None
    text = text.strip().lower()
    if re.search(r"[\x00-\x08\x0e-\x1f]", text):
        return None
    return next(words for pattern, words in TEXTS if re.match(pattern, text))
