"""Branch training with the teacher's features cached, against running teacher and student in full at every step.

    python benchmarks/bench_training.py [--out FILE.json] [--trunk iresnet18 --width 0.25 --r 14 --images 512]

The full loop is what the authors do: each step embeds the 112x112 face with the whole frozen trunk, keeps its feature
map at the coupling layer, and trains the branch. Prints a table; losses must agree to rounding, the aim is 3x.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from btnet_core.backbones import BackboneConfig, build_backbone, embed_features, save_backbone
from btnet_core.embedders import autocast
from btnet_core.results import environment
from btnet_core.training import methods
from btnet_core.training.data import TeacherCache
from btnet_core.training.problem import Run, prepare


def train_step(run: Run, step: int, *, full: bool) -> tuple[float, float]:
    """Seconds and loss of a training step."""
    began = time.perf_counter()
    batch = run.sampler.batch(step % run.sampler.steps)
    pixels = run.pixels.get(batch.records) if full else None
    x, teacher = run.inputs(batch, pixels)
    if full:
        finish_teacher(run, teacher[0])
    loss = sum(run.losses(batch, x, teacher).values())
    run.optimiser.zero_grad(set_to_none=True)
    loss.backward()
    run.optimiser.step()
    value = loss.item()  # waits for the device
    return time.perf_counter() - began, value


@torch.no_grad()
def finish_teacher(run: Run, z: torch.Tensor) -> None:
    """From the coupling layer, where branch_rows stops, to the embedding: each unit of the teacher runs once a step."""
    units = run.trunk.units()
    after = [name for name, _ in units].index(run.network.couple_at) + 1
    with autocast(run.device, run.precision):
        for _, unit in units[after:]:
            z = unit(z)
        embed_features(run.trunk.head, z)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--trunk", default="iresnet18")
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--r", type=int, default=14)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--distillation-only", action="store_true", help="without L_influence: T_r does not run")
    options = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        trunk = Path(folder) / "trunk.safetensors"
        torch.manual_seed(0)
        save_backbone(build_backbone(BackboneConfig(name=options.trunk, width=options.width, embedding=128)), trunk)
        data = f"synthetic:identities={options.images // 8},images=8,seed=0"
        method = methods.distillation_only if options.distillation_only else methods.phi_bt
        config = method(data, options.r, str(trunk), batch=options.batch, lr=0.02)
        names = ("full teacher + student", "cached teacher")
        runs = {name: prepare(config, Path(folder), torch.device("cpu")) for name in names}
        run, began = runs[names[1]], time.perf_counter()
        run.cache = TeacherCache(run.pixels, len(run.pixels.faces.labels), run.branch_rows, None, run.device)
        filled = time.perf_counter() - began
        timed: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for run in runs.values():
            run.modes(training=True)
        for step in range(options.steps):  # in turns, so that other work on the machine slows both alike
            for name in names:
                timed[name].append(train_step(runs[name], step, full=name == names[0]))
        for name, pairs in timed.items():
            rate = options.batch / statistics.median(seconds for seconds, _ in pairs[2:])
            rows[name] = {"images_per_second": rate, "losses": [loss for _, loss in pairs], "fill_seconds": filled}
    full, cached = rows.values()
    worst = max(abs(a - b) / abs(a) for a, b in zip(full["losses"], cached["losses"], strict=True))
    report = {
        **vars(options), "out": None, "rows": rows, "times_faster": cached["images_per_second"] / full["images_per_second"],
        "largest_relative_difference_of_the_losses": worst, **environment(),
    }  # fmt: skip
    for name, row in rows.items():
        print(f"{name:<24}{row['images_per_second']:8.1f} images/s")
    print(f"{'times faster':<24}{report['times_faster']:8.2f}   losses differ by at most {worst:.2%}")
    print(f"filling the cache once: {cached['fill_seconds']:.1f} s for {options.images} faces and their mirror images")
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
