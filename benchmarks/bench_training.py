"""Branch training with the teacher's features cached, against running teacher and student in full at every step.

    python benchmarks/bench_training.py [--out figures/results/bench_training.json] [--cases demo-14,demo-7]

Three loops over the same batches, with the same losses, gradient clipping and optimiser, in turns, so that other work on
the machine slows all alike; the median step counts. Decoding of images is left out for all.

- plain: what the authors do, in plain PyTorch: each step shrinks the faces, embeds the 112x112 ones with the whole
  frozen trunk without gradient, and runs and trains the whole student; float32, channels first.
- full: the same in this project's precision and memory format, which is also the cached loop's: what caching alone gives.
- cached: ours.

The operations of a step (multiply-accumulates; backward: once for inputs, once for weights that learn) bound what
caching can give: full / cached. Small channel counts at 112x112 run far below the processor's speed, so that small
trunks gain more than the bound. "losses differ by" is of the first step; later ones differ by what training makes of it.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import harness as bench
import torch
from torch import nn

from btnet_core.data.faces import open_faces
from btnet_core.device import autocast
from btnet_core.models.backbone import BackboneConfig, build_backbone, embed_features
from btnet_core.models.btnet import NORMS
from btnet_core.models.costs import count_macs
from btnet_core.models.weights import save_backbone
from btnet_core.training import methods
from btnet_core.training.loop import unscale_and_clip
from btnet_core.training.run import Run, prepare
from btnet_core.training.step import branch_inputs, branch_losses, losses_of, to_keep
from btnet_core.training.teacher import Teacher, TeacherCache

LOOPS = ("plain", "full", "cached")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A trunk with random weights, a resolution and the size of a step."""

    trunk: BackboneConfig
    r: int
    batch: int = 32
    steps: int = 16
    influence: bool = (
        True  # False: distillation alone; the cached student then ends at the coupling layer
    )


DEMO = BackboneConfig(name="iresnet18", width=0.25, embedding=128)
MOBILE = BackboneConfig(name="mobilefacenet", size=(112, 96), embedding=512, std=128.0)
LARGE = BackboneConfig(name="iresnet50")
CASES = {
    **{f"demo-{r}": Case(trunk=DEMO, r=r) for r in (28, 14, 7)},
    "demo-14-no-labels": Case(trunk=DEMO, r=14, influence=False),
    **{f"mobilefacenet-{r}": Case(trunk=MOBILE, r=r, batch=64, steps=8) for r in (14, 7)},
    **{f"iresnet50-{r}": Case(trunk=LARGE, r=r, batch=16, steps=6) for r in (14, 7)},
}


def train_step(run: Run, step: int, *, full: bool) -> tuple[float, float]:
    """Seconds and loss of a training step."""
    began = time.perf_counter()
    batch = run.sampler.batch(step % run.sampler.steps)
    pixels = run.pixels.get(batch.records) if full else None
    if not run.config.resolution:  # a trunk (bench_growth.py)
        loss, _ = losses_of(run, batch, pixels)
    else:
        x, teacher = branch_inputs(run, batch, pixels)
        if full:
            finish_teacher(run, teacher.z_s)
        if full and run.precision == "fp32":
            x, teacher = x.contiguous(), Teacher(teacher.z_s.contiguous())
        loss, _ = branch_losses(run, x, teacher, batch.labels)
        if full and not run.config.influence_weight:  # the student in full, too
            with torch.no_grad(), autocast(run.device, run.precision):
                run.network(x)
    run.optimiser.zero_grad(set_to_none=True)
    loss.backward()
    unscale_and_clip(run, list(run.trainable.values()))
    run.optimiser.step()
    value = loss.item()  # waits for the device
    return time.perf_counter() - began, value


@torch.no_grad()
def finish_teacher(run: Run, z: torch.Tensor) -> None:
    """From the coupling layer, where the teacher stops, to the embedding: each unit of the teacher runs once a step."""
    units = run.trunk.units()
    after = [name for name, _ in units].index(run.network.couple_at) + 1
    with autocast(run.device, run.precision):
        for _, unit in units[after:]:
            z = unit(z)
        embed_features(run.trunk.head, z)


def prepare_loops(case: Case, folder: Path, device: torch.device) -> tuple[dict[str, Run], float]:
    """The three loops at step 0, and the seconds that filling the cache took."""
    torch.manual_seed(0)
    data = {"kind": "synthetic", "identities": case.batch // 2, "images": 8, "seed": 0}
    trunk = build_backbone(case.trunk).train()
    norms = [module for module in trunk.modules() if isinstance(module, NORMS)]
    for momentum in (
        1.0,
        0.1,
    ):  # running statistics of some faces, so that the features have a sensible size
        for norm in norms:
            norm.momentum = momentum
        if momentum == 1.0:
            with torch.no_grad():
                trunk(trunk.preprocess(open_faces(data).images(range(8))))
    save_backbone(trunk, folder / "trunk.safetensors")
    method = methods.phi_bt if case.influence else methods.distillation_only
    config = method(data, case.r, str(folder / "trunk.safetensors"), batch=case.batch, lr=0.02)
    runs = {
        name: prepare(
            config.replace(precision="fp32" if name == "plain" else "auto"), folder, device
        )
        for name in LOOPS
    }
    plain: nn.Module
    for plain in (runs["plain"].trunk, runs["plain"].network):
        plain.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    run, began = runs["cached"], time.perf_counter()
    run.cache = TeacherCache(
        run.pixels, lambda faces: to_keep(run, faces), folder / "cache", device
    )
    filled = time.perf_counter() - began
    for run in runs.values():
        run.modes(training=True)
    return runs, filled


def operations(run: Run) -> dict[str, float]:
    """GMACs of a step for one face: forward, and backward once for inputs and once for weights that learn."""
    route, size = run.network, run.trunk.config.size
    teacher = count_macs(run.trunk, size)
    student, branch = count_macs(route, route.size), count_macs(route.branch, route.size)
    seen = student if run.config.influence_weight else branch
    cached = 2 * seen + branch  # the frozen trunk's weights have no gradient
    return {"full": (teacher + cached + student - seen) / 1e9, "cached": cached / 1e9}


def measure(case: Case, device: torch.device) -> dict[str, Any]:
    """Images a second of each loop, the ratios, and how far the losses are apart."""
    with tempfile.TemporaryDirectory() as folder:
        runs, filled = prepare_loops(case, Path(folder), device)
        timed: dict[str, list[tuple[float, float]]] = {name: [] for name in LOOPS}
        for step in range(case.steps):
            for name, run in runs.items():
                timed[name].append(train_step(run, step, full=name != "cached"))
        row: dict[str, Any] = {"precision": runs["cached"].precision, "batch": case.batch}
        for name, pairs in timed.items():
            row[name] = case.batch / statistics.median(seconds for seconds, _ in pairs[2:])
        losses = {name: [loss for _, loss in pairs] for name, pairs in timed.items()}
        for name in ("plain", "full"):
            row[f"times_{name}"] = row["cached"] / row[name]
            apart = [
                abs(a - b) / abs(a) for a, b in zip(losses[name], losses["cached"], strict=True)
            ]
            row[f"loss_difference_{name}"] = {"first": apart[0], "largest": max(apart)}
        row["gmacs"] = operations(runs["full"])
        return {**row, "bound_full": row["gmacs"]["full"] / row["gmacs"]["cached"], "cache_seconds": filled,
                "losses": losses}  # fmt: skip


def main() -> None:
    began, parser = time.monotonic(), bench.options(__doc__)
    parser.add_argument(
        "--cases", help=f"of {','.join(CASES)} (default: all); --out keeps its others"
    )
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    names, rows = (
        (options.cases or "demo-7" if options.quick else options.cases or ",".join(CASES)).split(
            ","
        ),
        {},
    )
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"unknown cases {', '.join(unknown)}; known: {', '.join(CASES)}")
    print(
        f"{'images/s':<20}{'plain':>8}{'full':>8}{'cached':>8}   x plain  x full  (bound)  losses differ by: plain, full"
    )
    if options.cases and options.out and options.out.is_file():
        rows = json.loads(options.out.read_text())["values"]["cases"]
    for name in names:
        case = replace(CASES[name], batch=4, steps=4) if options.quick else CASES[name]
        row = rows[name] = measure(case, torch.device(options.device))
        print(
            f"{name:<20}{row['plain']:8.1f}{row['full']:8.1f}{row['cached']:8.1f}{row['times_plain']:9.2f}"
            f"{row['times_full']:8.2f}   ({row['bound_full']:.2f})  {row['loss_difference_plain']['first']:.1e}, "
            f"{row['loss_difference_full']['first']:.1e}", flush=True)  # fmt: skip
    bench.write(options, goals(rows), {"cases": rows}, began)


def goals(rows: dict[str, Any]) -> list[dict[str, Any]]:
    """At least three times the full loop in plain PyTorch, in each case."""
    return [
        bench.goal(
            f"branch training, {name}: times faster than plain, full",
            row["times_plain"],
            3,
            at_least=True,
        )
        for name, row in rows.items()
    ]


if __name__ == "__main__":
    main()
