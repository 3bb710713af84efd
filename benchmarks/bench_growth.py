"""How cost grows with images, identities, gallery and resolutions.

    python benchmarks/bench_growth.py [--out figures/results/bench_growth.json]

Images: a step of the demo trunk (batch 32) on faces in memory, and the epoch's draw of order, flips and sizes alone.
Identities: a step of the classifier, batch 64, D = 512: learned, learned with a tenth of the classes in each step
(PartialFC), fixed as for a branch. Gallery: 1:N search of 64 probes, D = 512. Resolutions: IResNet-50 with 0 to 4 branches.
Memory is the largest resident size of the process while the case runs, less that before it. At most 8 GiB are used:
a million learned classes with all taking part would need more.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness as bench
import numpy as np
import torch
from bench_evaluation import PeakMemory, seconds
from bench_training import DEMO, train_step

from btnet_core.evaluation.identification import search
from btnet_core.losses import build_margin
from btnet_core.models.backbone import BackboneConfig, build_backbone
from btnet_core.models.btnet import BTNet
from btnet_core.models.costs import measure_time
from btnet_core.training import methods
from btnet_core.training.batches import Sampler
from btnet_core.training.classifier import Classifier
from btnet_core.training.run import prepare

WIDTH, CPU = 512, torch.device("cpu")


def with_memory(task: Callable[[], Any]) -> tuple[Any, float]:
    """What ``task`` returns, and the MiB that the process grew by at most."""
    page = float(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
    with PeakMemory() as memory:
        done = task()
    return done, memory.peak - page


def images(counts: list[int], draws: list[int], steps: int) -> dict[str, Any]:
    """Milliseconds of a training step for ``counts`` images, and of the draw of an epoch for ``draws``."""
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        config = methods.phi_hr(
            {"kind": "synthetic", "identities": 16, "images": 4, "seed": 0},
            backbone=DEMO,
            batch=32,
            epochs=1,
            warmup_epochs=0.0,
        )
        run = prepare(config, Path(folder), CPU)
        for count in counts:
            run.pixels.all = torch.randint(0, 256, (count, 3, 112, 112), dtype=torch.uint8)
            run.sampler = Sampler(torch.arange(count) % 16, config)
            run.modes(training=True)
            took = [train_step(run, step, full=True)[0] for step in range(steps + 2)][2:]
            rows.append(
                {
                    "images": count,
                    "ms": 1e3 * statistics.median(took),
                    "MiB": run.pixels.all.numel() / 2**20,
                }
            )
    drawn = []
    for count in draws:
        sampler = Sampler(torch.zeros(count, dtype=torch.int64), config)
        took, memory = with_memory(lambda sampler=sampler: seconds(lambda: sampler.batch(0)))
        drawn.append(
            {
                "images": count,
                "seconds": took,
                "MiB": memory,
                "ms a step": 1e3 * took / sampler.steps,
            }
        )
    return {"steps": rows, "draws": drawn}


def classifier_step(kappa: Classifier, optimiser: torch.optim.Optimizer | None, batch: int) -> None:
    """Forward, backward and, where the classifier learns, a step; on its device."""
    where = kappa.weight.device
    z = torch.randn(batch, kappa.weight.shape[1], device=where, requires_grad=True)
    kappa(z, torch.randint(0, kappa.num_classes, (batch,), device=where)).backward()
    if optimiser:
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)


def identities(cases: list[tuple[str, int]], batch: int, repeats: int) -> list[dict[str, Any]]:
    """Milliseconds and MiB of the classifier's step."""
    rows = []
    for kind, count in cases:
        share = 0.1 if kind == "PartialFC 0.1" else 1.0

        def case(kind: str = kind, count: int = count, share: float = share) -> float:
            kappa = Classifier(
                torch.zeros(count, WIDTH), build_margin("arcface"), sample_rate=share
            ).train()
            torch.nn.init.normal_(kappa.weight, std=0.01)
            kappa.weight.requires_grad_(kind != "fixed")
            optimiser = (
                None
                if kind == "fixed"
                else torch.optim.SGD(kappa.parameters(), lr=0.1, momentum=0.9, fused=True)
            )
            classifier_step(kappa, optimiser, batch)
            times = [
                seconds(lambda: classifier_step(kappa, optimiser, batch)) for _ in range(repeats)
            ]
            return 1e3 * statistics.median(times)

        took, memory = with_memory(case)
        rows.append({"kind": kind, "classes": count, "ms": took, "MiB": memory})
        print(rows[-1], flush=True)
    return rows


def gallery(counts: list[int], probes: int) -> list[dict[str, float]]:
    """Milliseconds a probe and MiB, gallery included, of a 1:N search."""
    rows = []
    faces, mates = (
        torch.randn(probes, WIDTH),
        np.where(np.arange(probes) % 2, -1, np.arange(probes)),
    )
    for count in counts:

        def case(count: int = count) -> float:
            entries = torch.randn(count, WIDTH)
            return seconds(lambda: search(faces, entries, mates), 2)

        took, memory = with_memory(case)
        rows.append({"gallery": count, "ms a probe": 1e3 * took / probes, "MiB": memory})
        print(rows[-1], flush=True)
    return rows


def resolutions(trunk: BackboneConfig, repeats: int) -> list[dict[str, Any]]:
    """Bytes on disk of a BTNet with 0 to 4 branches, of as many trunks, and milliseconds a face of each way in."""
    rows, chosen = [], (28, 14, 7, 56)
    net = BTNet(build_backbone(trunk), chosen).eval()
    for n in range(len(chosen) + 1):
        with tempfile.TemporaryDirectory() as folder:
            BTNet(net.trunk, chosen[:n]).save(folder)
            sizes = {path.stem: path.stat().st_size for path in Path(folder).glob("*.safetensors")}
        r = chosen[n - 1] if n else trunk.size[0]
        took = measure_time(net, r, device="cpu", batch_size=8, repeats=repeats, warmup=1)["median"]
        rows.append({"resolutions": n + 1, "added": r, "bytes": sum(sizes.values()),
                     "bytes as models of their own": (n + 1) * sizes["trunk"], "ms a face": took})  # fmt: skip
    return rows


def measured(values: dict[str, Any]) -> list[tuple[str, str]]:
    """What was measured as tables, by name."""
    blocks = []
    for name, rows in (("images", values["images"]["steps"]), ("draws", values["images"]["draws"]),
                       ("identities", values["identities"]), ("gallery", values["gallery"]),
                       ("resolutions", values["resolutions"])):  # fmt: skip
        head = "| " + " | ".join(rows[0]) + " |\n|" + "---:|" * len(rows[0])
        lines = ["| " + " | ".join(cell(v) for v in row.values()) + " |" for row in rows]
        blocks.append((name, "\n".join([head, *lines])))
    return blocks


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else value


def main() -> None:
    began, parser = time.monotonic(), bench.options(__doc__)
    options = parser.parse_args()
    torch.manual_seed(0)
    quick, kinds = options.quick, ("learned", "PartialFC 0.1", "fixed")
    counts = [100, 1000] if quick else [10_000, 93_431, 1_000_000]
    cases = [
        (kind, count)
        for kind in kinds
        for count in counts
        if quick or kind != "learned" or count < 1_000_000
    ]
    values = {
        "images": images([64, 128] if quick else [1_000, 10_000, 40_000],
                         [1_000, 10_000] if quick else [10_000, 100_000, 1_000_000, 5_179_510], 2 if quick else 8),
        "identities": identities(cases, 8 if quick else 64, 1 if quick else 3),
        "gallery": gallery([100, 1000] if quick else [10_000, 100_000, 1_000_000], 8 if quick else 64),
        "resolutions": resolutions(DEMO if quick else BackboneConfig(name="iresnet50"), 1 if quick else 3),
    }  # fmt: skip
    for name, block in measured(values):
        print(f"{name}\n{block}")
    bench.write(options, [], values, began)


if __name__ == "__main__":
    main()
