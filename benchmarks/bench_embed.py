"""BTNet.embed: a mixed-size list against the sum of its groups, and how far reading overlaps with the model.

python benchmarks/bench_embed.py [--model runs/demo/models/phi_bt] [--images 96]. Medians of interleaved rounds, one machine.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from btnet_core import BTNet
from btnet_core.btnet import to_pixels
from btnet_core.images import resize

SIDES = (112, 28, 14, 7)


def seconds(task: Callable[[], object]) -> float:
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="runs/demo/models/phi_bt")
    parser.add_argument("--images", type=int, default=256, help="of each size")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    net, rng = BTNet.load(options.model).eval(), np.random.default_rng(0)
    noise = [rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for side in SIDES]
    groups = {side: [image] * options.images for side, image in zip(SIDES, noise, strict=True)}
    mixed = [image for row in zip(*groups.values(), strict=True) for image in row]
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for i in range(2 * options.images):  # photographs of 500 x 500, as people keep them
            files.append(Path(folder) / f"{i}.jpg")
            Image.fromarray(rng.integers(0, 256, (500, 500, 3), dtype=np.uint8)).save(files[-1], quality=90)
        shrunk = [resize(to_pixels(file, ""), 112).to(torch.uint8) for file in files]
        tasks: dict[str, Callable[[], object]] = {
            **{f"{side} px": lambda side=side: net.embed(groups[side]) for side in SIDES},
            "mixed": lambda: net.embed(mixed),
            "read": lambda: [resize(to_pixels(file, ""), 112) for file in files],
            "model": lambda: net.embed(shrunk),
            "both": lambda: net.embed(files),
        }
        net.embed(mixed)
        rounds = [{name: seconds(task) for name, task in tasks.items()} for _ in range(options.rounds)]
    time_of = {name: median(row[name] for row in rounds) for name in tasks}
    ratio = median(row["mixed"] / sum(row[f"{side} px"] for side in SIDES) for row in rounds)
    overlap = median(row["both"] / (row["read"] + row["model"]) for row in rounds)
    print(
        f"{torch.get_num_threads()} threads; " + ", ".join(f"{name} {value:.2f} s" for name, value in time_of.items())
    )
    print(f"a mixed list takes {ratio:.3f} of the sum of its groups")
    print(f"reading and model together take {overlap:.3f} of one after the other")


if __name__ == "__main__":
    main()
