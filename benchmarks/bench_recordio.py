"""Records a second and decoded images a second of this project's RecordIO reader, against MXNet's readers and PIL.

    BTNET_DATA=data python benchmarks/bench_recordio.py [--mxnet PYTHON] [--out figures/results/bench_recordio.json]

Single process, single thread, the same images in the same random order, files in the page cache, in turns; medians, and
ratios within a round. Ours checks each record's label and gives uint8 tensors (3, 112, 112).

- loose files: `open().read()`; PIL: `numpy.asarray(Image.open(file).convert("RGB"))` of the same images as files.
- plain: seek, read and unpack by hand, without index checks and split records: what any reader in Python must do.
- MXNet: MXIndexedRecordIO with recordio.unpack and image.imdecode, as the training scripts of face recognition use it,
  and its C++ pipeline ImageRecordUInt8Iter with one thread. mxnet 1.9.1, the last version, needs numpy < 1.24, so it
  lives in an environment of its own: `python3.11 -m venv mx && mx/bin/pip install mxnet 'numpy<1.24'`, and
  `--mxnet mx/bin/python`. Without --mxnet it is left out.

Then the scaling of ours: batches of 64 by data-loader worker processes, and by the threads of `FaceSet.images`.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import harness as bench
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset

from btnet_core.data.faces import StoredFaces, open_faces
from btnet_core.data.recordio import RecordFile, RecordWriter

MXNET = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
import mxnet as mx
rec, images, order = sys.argv[1], sys.argv[2], json.load(open(sys.argv[3]))
record = mx.recordio.MXIndexedRecordIO(rec[:-3] + "idx", rec, "r")
def read(): return [len(mx.recordio.unpack(record.read_idx(i + 1))[1]) for i in order]
def decode(): return [mx.image.imdecode(mx.recordio.unpack(record.read_idx(i + 1))[1]).asnumpy().shape for i in order]
pipeline = mx.io.ImageRecordUInt8Iter(path_imgrec=images, data_shape=(3, 112, 112), batch_size=64, preprocess_threads=1)
def iterate():
    pipeline.reset()
    for batch in pipeline: batch.data[0].wait_to_read()
iterate()
for line in sys.stdin:
    took = {}
    for name, task in (("MXNet", read), ("MXNet imdecode", decode), ("MXNet iterator", iterate)):
        start = time.perf_counter(); task(); took[name] = time.perf_counter() - start
    print(json.dumps(took), flush=True)
"""


def plain_reader(path: Path, offsets: Iterable[int]) -> None:
    """What a reader cannot do without: seek, two heads, the bytes."""
    with open(path, "rb") as file:
        for offset in offsets:
            file.seek(offset)
            _, word = struct.unpack("<II", file.read(8))
            payload = file.read(word & (1 << 29) - 1)
            struct.unpack_from("<IfQQ", payload)
            payload[24:]


def seconds(task: Callable[[], object]) -> float:
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def read_all(read: Callable[[int], object], order: list[int]) -> None:
    for i in order:
        read(i)


def by_workers(faces: StoredFaces, order: list[int], workers: int) -> float:
    """Images a second of ``workers`` data-loader processes, from the first batch to the last."""
    batches = iter(
        DataLoader(Subset(faces, order), batch_size=64, num_workers=workers, prefetch_factor=4)
    )
    next(batches)
    start, count = time.perf_counter(), 0
    for images, _ in batches:
        count += len(images)
    return count / (time.perf_counter() - start)


def main() -> None:
    began, parser = time.monotonic(), bench.options(__doc__)
    parser.add_argument(
        "--data", default="faces_train", help="a RecordIO set in InsightFace's layout"
    )
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mxnet", metavar="PYTHON", help="an interpreter that can import mxnet")
    options = parser.parse_args()
    count, rounds = (200, 2) if options.quick else (options.images, options.rounds)
    torch.set_num_threads(1)
    faces = open_faces(options.data)
    if not isinstance(faces, StoredFaces):
        parser.error(f"{options.data} is no RecordIO set")
    order = np.random.default_rng(0).permutation(len(faces))[:count].tolist()
    with tempfile.TemporaryDirectory() as folder:
        values = compare(faces, order, rounds, Path(folder), options.mxnet)
    values["workers"] = {str(n): by_workers(faces, order, n) for n in (1, 2)}
    values["threads"] = {
        str(os.cpu_count()): count / median(seconds(lambda: faces.images(order)) for _ in range(3))
    }
    values |= {"images": count, "bytes": sum(len(faces.encoded(i)) for i in order) / count}
    for name, rate in {**values["records"], **values["decoded images"]}.items():
        print(f"{name:<24}{rate:10.0f} a second")
    print("workers", values["workers"], "threads", values["threads"])
    goals = [
        bench.goal(f"RecordIO, {kind}/s, against the best other ({best})", ratio, 1, at_least=True)
        for kind, (best, ratio) in values["ratio"].items()
    ]
    bench.write(options, goals, values, began)


def compare(
    faces: StoredFaces, order: list[int], rounds: int, folder: Path, mxnet: str | None
) -> dict[str, Any]:
    """Rates of each reader in records and decoded images a second, and ours against the best other."""
    loose = [folder / f"{i}.jpg" for i in range(len(order))]
    with RecordWriter(
        folder / "images.rec"
    ) as writer:  # without header records, which the iterator would decode
        for key, i in enumerate(order):
            loose[key].write_bytes(faces.encoded(i))
            writer.write(key, struct.pack("<IfQQ", 0, 0.0, key, 0) + faces.encoded(i))
    rec = faces.files[0]
    file = RecordFile(rec)
    offsets = file.offsets[np.searchsorted(file.keys, np.array(order) + 1)].tolist()
    tasks: dict[str, tuple[str, Callable[[], object]]] = {
        "ours": ("records", lambda: read_all(faces.encoded, order)),
        "loose files": ("records", lambda: [path.open("rb").read() for path in loose]),
        "plain": ("records", lambda: plain_reader(rec, offsets)),
        "ours, decoded": ("decoded images", lambda: read_all(faces.image, order)),
        "PIL": (
            "decoded images",
            lambda: [np.asarray(Image.open(path).convert("RGB")) for path in loose],
        ),
    }
    child = None
    if mxnet:
        (folder / "order.json").write_text(json.dumps(order))
        command = [
            mxnet,
            "-c",
            MXNET,
            str(rec),
            str(folder / "images.rec"),
            str(folder / "order.json"),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                 text=True, env=environment)  # fmt: skip
    table: list[dict[str, float]] = []
    for _ in range(rounds + 1):
        row = {name: seconds(task) for name, (_, task) in tasks.items()}
        if child and child.stdin and child.stdout:
            child.stdin.write("go\n")
            child.stdin.flush()
            row |= json.loads(child.stdout.readline())
        table.append(row)
    if child:
        child.communicate()
    kinds = {name: kind for name, (kind, _) in tasks.items()}
    kinds |= (
        {"MXNet": "records", "MXNet imdecode": "decoded images", "MXNet iterator": "decoded images"}
        if child
        else {}
    )
    return summarise(table[1:], kinds, len(order))  # the first round warms up


def summarise(table: list[dict[str, float]], kinds: dict[str, str], count: int) -> dict[str, Any]:
    values: dict[str, Any] = {"records": {}, "decoded images": {}, "ratio": {}}
    for name, kind in kinds.items():
        values[kind][name] = count / median(row[name] for row in table)
    for kind, ours in (("records", "ours"), ("decoded images", "ours, decoded")):
        others = {name: rate for name, rate in values[kind].items() if name not in (ours, "plain")}
        best = max(others, key=lambda name: others[name])
        values["ratio"][kind] = (best, median(row[best] / row[ours] for row in table))
    return values


if __name__ == "__main__":
    main()
