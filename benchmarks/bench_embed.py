"""Embedding: a mixed-size list against the sum of its groups, and how far reading overlaps with the model.

    python benchmarks/bench_embed.py [--model runs/demo/models/phi_bt] [--out figures/results/bench_embed.json]

Medians of interleaved rounds, ratios within a round. Without --model the trunk is the demo's with random weights, which
takes the same time. The photographs that are read have 500 x 500 pixels; the machine's cores are shared by the threads
that decode and the model, so that "both" gains what one of them leaves idle.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import harness
import numpy as np
from PIL import Image

from btnet_core import BTNet
from btnet_core.images import decode, read, resize
from btnet_core.models.backbone import BackboneConfig, build_backbone
from btnet_tools.embed import Reader, embed_files

SIDES = (112, 28, 14, 7)
DEMO = BackboneConfig(name="iresnet18", width=0.25, embedding=128)


def seconds(task: Callable[[], object]) -> float:
    """How long ``task`` takes."""
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def photographs(folder: Path, count: int) -> list[Path]:
    """Noise as JPEG files."""
    rng = np.random.default_rng(0)
    files = [folder / f"{i}.jpg" for i in range(count)]
    for file in files:
        pixels = rng.integers(0, 256, (500, 500, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, quality=90)
    return files


def tasks(net: BTNet, files: list[Path], count: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    rng = np.random.default_rng(0)
    noise = {side: rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for side in SIDES}
    mixed = [image for _ in range(count) for image in noise.values()]
    reader = Reader(net)
    shrunk = [resize(decode(read(file), where=str(file)), 112) for file in files]
    found: dict[str, Callable[[], object]] = {
        f"{side} px": lambda side=side: net.embed([noise[side]] * count) for side in SIDES
    }
    found["mixed"] = lambda: net.embed(mixed)
    found["read"] = lambda: [reader(file) for file in files]
    found["model"] = lambda: net.embed(shrunk)
    found["both"] = lambda: embed_files(net, files, reader)
    return found


def main() -> None:
    began, parser = time.monotonic(), harness.options(__doc__)
    parser.add_argument("--model", help="folder of a BTNet (default: random weights)")
    parser.add_argument("--images", type=int, default=96, help="of each size")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    count, rounds = (8, 2) if options.quick else (options.images, options.rounds)
    net = BTNet(build_backbone(DEMO), (28, 14, 7))
    if options.model:
        net = BTNet.load(options.model)
    with tempfile.TemporaryDirectory() as folder:
        timed = tasks(net.eval(), photographs(Path(folder), 2 * count), count)
        timed["mixed"]()  # warms up
        table = [{name: seconds(task) for name, task in timed.items()} for _ in range(rounds)]
    time_of = {name: median(row[name] for row in table) for name in timed}
    ratio = median(row["mixed"] / sum(row[f"{side} px"] for side in SIDES) for row in table)
    overlap = median(row["both"] / (row["read"] + row["model"]) for row in table)
    print(", ".join(f"{name} {value:.2f} s" for name, value in time_of.items()))
    what = "embed of a mixed-size list / the sum of its groups"
    goals = [
        harness.goal(what, ratio, 1.1, at_least=False),
        harness.goal("embed of files / reading, then the model", overlap, 1, at_least=False),
    ]
    values = {"seconds": time_of, "images of each size": count, "files": 2 * count}
    harness.write(options, goals, values, began)


if __name__ == "__main__":
    main()
