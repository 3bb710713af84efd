"""BTNet.embed: a mixed-size list against the sum of its groups, and how far reading overlaps with the model.

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

import harness as bench
import numpy as np
import torch
from PIL import Image

from btnet_core import BTNet
from btnet_core.images import resize, to_pixels
from btnet_core.models.backbone import BackboneConfig, build_backbone

SIDES = (112, 28, 14, 7)


def seconds(task: Callable[[], object]) -> float:
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def main() -> None:
    began, parser = time.monotonic(), bench.options(__doc__)
    parser.add_argument("--model", help="folder of a BTNet (default: random weights)")
    parser.add_argument("--images", type=int, default=96, help="of each size")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    count, rounds = (8, 2) if options.quick else (options.images, options.rounds)
    demo = BackboneConfig(name="iresnet18", width=0.25, embedding=128)
    net = (
        BTNet.load(options.model) if options.model else BTNet(build_backbone(demo), (28, 14, 7))
    ).eval()
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for side in SIDES]
    groups = {side: [image] * count for side, image in zip(SIDES, noise, strict=True)}
    mixed = [image for row in zip(*groups.values(), strict=True) for image in row]
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for i in range(2 * count):
            files.append(Path(folder) / f"{i}.jpg")
            Image.fromarray(rng.integers(0, 256, (500, 500, 3), dtype=np.uint8)).save(
                files[-1], quality=90
            )
        shrunk = [resize(to_pixels(file, ""), 112).to(torch.uint8) for file in files]
        tasks: dict[str, Callable[[], object]] = {
            **{f"{side} px": lambda side=side: net.embed(groups[side]) for side in SIDES},
            "mixed": lambda: net.embed(mixed),
            "read": lambda: [resize(to_pixels(file, ""), 112) for file in files],
            "model": lambda: net.embed(shrunk),
            "both": lambda: net.embed(files),
        }
        net.embed(mixed)
        table = [{name: seconds(task) for name, task in tasks.items()} for _ in range(rounds)]
    time_of = {name: median(row[name] for row in table) for name in tasks}
    ratio = median(row["mixed"] / sum(row[f"{side} px"] for side in SIDES) for row in table)
    overlap = median(row["both"] / (row["read"] + row["model"]) for row in table)
    print(", ".join(f"{name} {value:.2f} s" for name, value in time_of.items()))
    goals = [
        bench.goal(
            "embed of a mixed-size list / the sum of its groups", ratio, 1.1, at_least=False
        ),
        bench.goal("embed of files / reading, then the model", overlap, 1, at_least=False),
    ]
    bench.write(
        options,
        goals,
        {"seconds": time_of, "images of each size": count, "files": 2 * count},
        began,
    )


if __name__ == "__main__":
    main()
