"""Coverage-guided fuzzing of every parser with atheris: only named errors, bounded memory and time, no code run.

    pip install atheris && python scripts/fuzz.py --seconds 600 [--parsers bin,mat] [--out FILE.json]

Each parser runs in a process of its own for that long, from small good files, on what libFuzzer makes of them. Anything
but this package's errors stops it and leaves the input beside the corpus; so does an input that takes over 10 s, or
memory over 2 GB. A pickle or checkpoint that ran code would be seen through Python's audit hook. With the same --corpus and --out a later run goes on
where the last one ended, and the counts add up.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HARMFUL = (
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "socket.connect",
    "os.remove",
    "shutil.rmtree",
)
COUNTS = re.compile(r"#(\d+)\s+\w+\s+cov: (\d+)")


def joined(*parts: bytes) -> bytes:
    """Several files as one input: the length of each but the last in two bytes before it."""
    return b"".join(len(part).to_bytes(2, "little") + part for part in parts[:-1]) + parts[-1]


def split(data: bytes, count: int) -> list[bytes]:
    """What `joined` joined, of any bytes."""
    parts = []
    for _ in range(count - 1):
        length = int.from_bytes(data[:2], "little")
        parts.append(data[2 : 2 + length])
        data = data[2 + length :]
    return [*parts, data]


def harnesses(place: Path) -> dict[str, tuple[list[bytes], Callable[[bytes], Any]]]:
    """{parser: (good inputs, what reads an input)}, with files in the empty folder ``place``."""
    import torch

    from btnet_core import images
    from btnet_core.data import ijbc, recordio, survface
    from btnet_core.data import pairs as verification
    from btnet_core.data.faces import list_file
    from btnet_core.models.backbone import BackboneConfig, build_backbone
    from btnet_core.models.weights import load_backbone, save_backbone
    from btnet_core.training import checkpoint
    from btnet_core.training.config import TrainConfig
    from btnet_paper import layouts

    torch.set_num_threads(1)
    face = torch.arange(3 * 8 * 8, dtype=torch.uint8).reshape(3, 8, 8)
    pictures = [images.encode(face, kind) for kind in ("PNG", "JPEG")]
    found: dict[str, tuple[list[bytes], Callable[[bytes], Any]]] = {}

    def folder(name: str) -> Path:
        (place / name).mkdir()
        return place / name

    def keep(file: Path, data: bytes) -> Path:
        file.write_bytes(data)
        return file

    # RecordIO with its index, and the index alone beside a good file
    sets, at = folder("rec"), folder("rec_in")
    recordio.write_face_records(sets, [(picture, i) for i, picture in enumerate(pictures)], (8, 8))
    rec, idx = ((sets / f"train.{suffix}").read_bytes() for suffix in ("rec", "idx"))

    def read_records(index: bytes, data: bytes) -> None:
        keep(at / "train.idx", index)
        faces = recordio.FaceRecords(keep(at / "train.rec", data))
        for i in range(min(4, faces.count)):
            images.decode(faces.image(i), where=faces.where(i))

    found["recordio"] = (
        [joined(idx, rec), joined(b"0\t0\n", rec)],
        lambda data: read_records(*split(data, 2)),
    )
    found["idx"] = ([idx, b"0\t0\n1\t60\n"], lambda data: read_records(data, rec))

    # verification sets: a pickle
    verification.write_bin(place / "good.bin", [pictures[0], pictures[1]] * 2, [True, False])
    bins = [(place / "good.bin").read_bytes()]
    import pickle

    import numpy as np

    for protocol in (0, 2, 4, 5):
        arrays = [np.frombuffer(picture, np.uint8) for picture in pictures]
        bins.append(pickle.dumps((arrays, [True]), protocol=protocol))
    found["bin"] = (
        bins,
        lambda data: verification.read_bin(keep(place / "in.bin", data)).images([0]),
    )

    # SurvFace's .mat lists
    layouts.write_survface(place / "surv", [(1, face), (2, face)], [(1, face)], [(0, face)])
    lists_of_faces = sorted((place / "surv").glob("*/*.mat"))
    found["mat"] = (
        [path.read_bytes() for path in lists_of_faces],
        lambda data: survface.read_mat(keep(place / "in.mat", data)),
    )

    # text: IJB-C's tables, pairs.txt, a list of faces
    points = np.array([[30.0, 50], [65, 50], [48, 70], [33, 90], [63, 90]], np.float32)
    lists = {name: [(1, 1)] for name in ijbc.LISTS}
    layouts.write_ijbc(place / "ijbc", [(face, points, 0.9, 1, 1)], np.array([[1, 1, 1]]), lists)
    tables = sorted((place / "ijbc" / "meta").iterdir())
    texts = [path.read_bytes() for path in tables]
    people = folder("people")
    for name in ("a", "b"):
        (people / name).mkdir()
        (people / name / f"{name}_0001.png").write_bytes(pictures[0])

    def read_lists(data: bytes) -> None:
        kind, rest = data[:1] or b"\0", data[1:]
        if kind[0] % 8 < len(tables):
            path, was = tables[kind[0] % 8], texts[kind[0] % 8]
            try:
                keep(path, rest)
                ijbc.read_templates(place / "ijbc").images([0])
            finally:
                keep(path, was)
        elif kind[0] % 8 == 6:
            verification.pairs_file(keep(people / "pairs.txt", rest))
        else:
            list_file(keep(people / "faces.txt", rest))

    found["lists"] = (
        [bytes([i]) + text for i, text in enumerate(texts)]
        + [b"\x06a\t1\tb\t1\na 1 1\n", b"\x07a/a_0001.png 0\nb/b_0001.png 1\n"],
        read_lists,
    )

    # weights, training state, configurations
    trunk = build_backbone(BackboneConfig(name="iresnet18", width=0.0625, embedding=4))
    save_backbone(trunk, place / "trunk.safetensors")
    buffer = io.BytesIO()
    torch.save(
        {"dw_conv1.conv.weight": torch.zeros(2), "linear7.conv.weight": torch.zeros(1, 1, 7, 6)},
        buffer,
    )
    run = folder("run")
    (run / "checkpoint").mkdir()
    checkpoint.save_state(run, {"step": 3, "network": {"a": torch.zeros(4)}})
    state, record = (
        (run / checkpoint.STATE).read_bytes(),
        b'{"config": {}, "inputs": {}, "metrics": {}}',
    )
    config = TrainConfig(data="x").to_json().encode()
    # A header alone: the numbers behind it are not parsed, and would fill the fuzzer's inputs.
    header = (place / "trunk.safetensors").read_bytes()
    header = header[: 8 + int.from_bytes(header[:8], "little")]

    # The pickles inside: mutated in their archive, its checksums would keep them out of reach.
    old = io.BytesIO()
    torch.save({"format": 1, "a": torch.zeros(2)}, old, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(buffer) as archive:
        inner = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))

    def packed(pickled: bytes) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            for name, content in (
                ("data.pkl", pickled),
                ("byteorder", b"little"),
                ("version", b"3\n"),
                ("data/0", bytes(24)),
            ):
                archive.writestr(f"archive/{name}", content)
        return out.getvalue()

    def read_weights(data: bytes) -> None:
        kind, rest = (data[0] if data else 0) % 7, data[1:]
        if kind < 2:
            load_backbone(keep(place / ("in.safetensors" if kind else "in.pth"), rest))
        elif kind in (5, 6):
            load_backbone(keep(place / "in.pth", packed(rest) if kind == 5 else rest))
        elif kind == 2:
            keep(run / checkpoint.STATE, rest)
            checkpoint.load_state(run)
        elif kind == 3:
            keep(run / checkpoint.RECORD, rest)
            checkpoint.read_record(run)
        else:
            TrainConfig.from_json(rest.decode("utf-8", "replace"))

    seeds = (buffer.getvalue(), header, state, record, config, inner, old.getvalue())
    found["checkpoint"] = ([bytes([i]) + seed for i, seed in enumerate(seeds)], read_weights)

    # images
    others = []
    from PIL import Image

    for kind in ("BMP", "GIF", "TIFF", "WEBP", "PPM"):
        out = io.BytesIO()
        with contextlib.suppress(OSError, KeyError):
            Image.fromarray(face.permute(1, 2, 0).numpy()).save(out, kind)
            others.append(out.getvalue())
    found["images"] = ([*pictures, *others], lambda data: images.decode(data, where="input"))
    return found


PARSERS = ("recordio", "idx", "bin", "mat", "lists", "checkpoint", "images")


def fuzz_one(name: str, corpus: Path, seconds: int) -> None:
    """Run one harness in this process until libFuzzer ends it."""
    import atheris
    import torch

    # All of torch would take minutes.
    atheris.instrument_func(torch._weights_only_unpickler.Unpickler.load)
    with atheris.instrument_imports(include=["btnet_core", "PIL", "scipy"]):
        from btnet_core.errors import BTNetError

        place = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        corpus.mkdir(parents=True, exist_ok=True)
        seeds, read = harnesses(place)[name]
    for i, seed in enumerate(seeds):
        (corpus / f"seed_{i}").write_bytes(seed)

    def harm(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(HARMFUL):
            raise SystemError(f"an input ran {event} {arguments}")

    def one(data: bytes) -> None:
        with contextlib.suppress(BTNetError):
            read(data)

    sys.addaudithook(harm)
    limits = [
        f"-max_total_time={seconds}",
        "-timeout=10",
        "-rss_limit_mb=2048",
        "-max_len=65536",
        "-verbosity=1",
    ]
    atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={corpus}/found_", str(corpus)], one)
    atheris.Fuzz()


def run(name: str, seconds: int, folder: Path) -> dict[str, Any]:
    """Fuzz a parser in another process for ``seconds``, or until it has found something."""
    corpus, began = folder / name, time.monotonic()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    executions, coverage, found = 0, 0, list[str]()
    while not found and (left := round(seconds - (time.monotonic() - began))) > 0:
        command = [
            sys.executable,
            __file__,
            "--one",
            name,
            "--corpus",
            str(corpus),
            "--seconds",
            str(left),
        ]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        counts = COUNTS.findall(done.stderr)
        if not counts:
            raise SystemExit(f"{name}: the fuzzer did not run:\n{done.stderr[-3000:]}")
        executions, coverage = executions + int(counts[-1][0]), max(coverage, int(counts[-1][1]))
        found = sorted(path.name for path in corpus.glob("found_*"))
        if found:
            print(done.stderr[-3000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    row = {"inputs": executions, "coverage": coverage, "seconds": round(time.monotonic() - began),
           "processor_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime),
           "found": len(found), "corpus": len(list(corpus.iterdir()))}  # fmt: skip
    print(f"{name}: {row}, {found or 'nothing found'}", flush=True)
    return row


def added(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Two runs on one corpus as one row."""
    return {
        key: max(old[key], new[key]) if key in ("coverage", "corpus") else old[key] + new[key]
        for key in new
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=600, help="of each parser (default: 600)")
    parser.add_argument("--parsers", default=",".join(PARSERS), help="default: %(default)s")
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--corpus", type=Path, help="where inputs are kept (default: a temporary folder)"
    )
    parser.add_argument("--one", choices=PARSERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        fuzz_one(options.one, options.corpus, options.seconds)
        return 0
    from importlib.metadata import version

    from btnet_paper.results import environment

    found = 0
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.parsers.split(","):
            row = run(name, options.seconds, options.corpus or Path(temporary))
            found += row["found"]
            if options.out:
                known = (
                    json.loads(options.out.read_text())["parsers"] if options.out.is_file() else {}
                )
                if options.corpus and name in known:
                    row = added(known[name], row)
                about = {
                    "command": f"python scripts/fuzz.py --seconds {options.seconds}",
                    "parsers": {**known, name: row},
                    "atheris": version("atheris"),
                }
                options.out.write_text(json.dumps({**about, **environment()}, indent=1) + "\n")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
