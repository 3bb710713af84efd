"""What training BTNet on MS1Mv3 costs, on paper: time and memory on n GPUs, from counted operations and named assumptions.

    python benchmarks/bench_growth.py --page docs/costs.md     # writes the tables of that page from here

A step of n GPUs, each with b faces (B = n b in all), takes

    step     = max(network + classifier + exchange, loading)
    network  = b * 2 * MACs / R                                    R: operations a second that training reaches
    classifier = 2 * k * B * (s C / n) * D / (0.5 R32) + bytes / W       k: 3 products if it learns, 2 if it is fixed
    exchange = 2 (n - 1) / n * (4 P + 4 B D) / L  +  (n - 1) / n * 4 B D / L
    loading  = b / (cores * decoded images a second and core)

P: numbers that learn; C classes cut over the GPUs, of which the share s takes part in a step; D = 512; W: bytes a second
of memory, L: of the slowest link. Nothing overlaps, as in this project's loop, but for loading.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from btnet_core.backbones import BackboneConfig, build_backbone
from btnet_core.btnet import BTNet
from btnet_core.costs import count_macs

IMAGES, CLASSES, WIDTH = 5_179_510, 93_431, 512  # MS1Mv3 (paper, Section 4.1); numbers of an embedding
EPOCHS = {"trunk": 25, "branch": 10}  # paper, A.2
BATCH = 128  # faces on each GPU: paper A.2 and the authors' configuration
RESOLUTIONS = (28, 14, 7)
SINGLE = 0.5  # assumed: share of the published fp32 speed that the classifier's products reach
PASSES = {"scores": 8, "rows": 8}  # assumed: times that a step reads or writes each score, and each row that takes part


@dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU as its maker publishes it, and the machine around it as assumed."""

    name: str
    half: float  # FLOP/s of fp16 or bf16 products that add up in fp32
    single: float  # FLOP/s of fp32
    memory: float  # bytes/s
    size: float  # bytes of memory
    link: float  # bytes/s that one GPU of a machine exchanges with the others; assumed
    network: float = 25e9  # bytes/s that a machine of eight exchanges with other machines (200 Gbit/s); assumed
    cores: int = 8  # CPU cores for each GPU; assumed


V100 = Device(name="V100", half=125e12, single=15.7e12, memory=900e9, size=32e9, link=100e9)
RTX = Device(name="RTX 2080 Ti", half=53.8e12, single=13.4e12, memory=616e9, size=11e9, link=8e9)
A100 = Device(name="A100 80 GB", half=312e12, single=19.5e12, memory=2039e9, size=80e9, link=200e9)
PUBLISHED = (
    5299.56  # images/s: IResNet-50, 3 million classes, PartialFC 0.1, batch 1024, eight V100 (InsightFace's log)
)
PUBLISHED_ALL = 2271.33  # the same with every class in every step


@dataclass(frozen=True, kw_only=True)
class Task:
    """One training: of the trunk or of a branch."""

    name: str
    macs: float  # multiply-accumulates of a step for one face, forward and backward
    learns: int  # numbers that learn, without the classifier
    epochs: int
    fixed: bool  # the classifier is fixed
    cache: int = 0  # bytes for one face and its mirror image when the teacher's features are kept


@dataclass(frozen=True, kw_only=True)
class Step:
    """Seconds of the parts of a step."""

    network: float
    classifier: float
    exchange: float
    loading: float

    @property
    def total(self) -> float:
        return max(self.network + self.classifier + self.exchange, self.loading)


def step_time(
    task: Task, device: Device, gpus: int, rate: float, *, classes: int = CLASSES, share: float = 1.0,
    batch: int = BATCH, decoded: float = float("inf"),
) -> Step:  # fmt: skip
    """A step on ``gpus``; ``rate``: FLOP/s that training reaches on one; ``decoded``: images a second and CPU core."""
    total, rows = batch * gpus, share * classes / gpus
    products = 2 if task.fixed else 3
    touched = 4 * (PASSES["scores"] * total * rows + PASSES["rows"] * rows * WIDTH)
    link = device.link if gpus <= 8 else min(device.link, device.network)
    gradients = 4 * task.learns + 4 * total * WIDTH
    return Step(
        network=batch * 2 * task.macs / rate,
        classifier=2 * products * total * rows * WIDTH / (SINGLE * device.single) + touched / device.memory,
        exchange=(2 * gradients + 4 * total * WIDTH) * (gpus - 1) / gpus / link,
        loading=batch / (device.cores * decoded),
    )


def hours(task: Task, step: Step, gpus: int, batch: int = BATCH) -> float:
    """Hours for all epochs over MS1Mv3."""
    return task.epochs * (IMAGES // (batch * gpus)) * step.total / 3600


def classifier_bytes(classes: int, gpus: int, *, fixed: bool, share: float = 1.0, batch: int = BATCH) -> float:
    """Bytes on each GPU: rows, and their unit copy; if they learn, momentum and two gradients; three sets of scores."""
    rows = classes / gpus
    held = rows * WIDTH * 4 * (1 if fixed else 3)  # weight; momentum, gradient
    step = share * rows * (WIDTH * 4 * (1 if fixed else 2) + 3 * batch * gpus * 4)  # unit rows, their gradient; scores
    return held + step


def reached(published: float = PUBLISHED, share: float = 0.1) -> float:
    """FLOP/s that training reaches on a V100, so that the model gives the published images a second."""
    seconds = 1024 / published
    rest = step_time(tasks()[0], V100, 8, 1.0, classes=3_000_000, share=share)
    return BATCH * 2 * tasks()[0].macs / (seconds - rest.classifier - rest.exchange)


def rate_of(device: Device) -> float:
    """FLOP/s that training reaches: the V100's times the smaller of the ratios of products and of memory; assumed."""
    return reached() * min(device.half / V100.half, device.memory / V100.memory)


@lru_cache
def tasks(cached: bool = False) -> tuple[Task, ...]:
    """Trunk and branches of IResNet-50, operations counted from the modules; with or without a cached teacher."""
    with torch.device("meta"):
        net = BTNet(build_backbone(BackboneConfig(name="iresnet50")), RESOLUTIONS)
    trunk, size = net.trunk, net.trunk.config.size
    learns = sum(p.numel() for p in trunk.parameters())
    found = [Task(name="trunk", macs=3 * count_macs(trunk, size), learns=learns, epochs=EPOCHS["trunk"], fixed=False)]
    for r in RESOLUTIONS:
        route = net.routes[str(r)]
        names = [name for name, _ in trunk.units()]
        teacher = nn.Sequential(*(unit for _, unit in trunk.units()[: names.index(route.couple_at) + 1]))
        student, branch = count_macs(route, route.size), count_macs(route.branch, route.size)
        task = Task(name=f"branch {r}", macs=2 * student + branch + count_macs(teacher, size), epochs=EPOCHS["branch"],
                    learns=sum(p.numel() for p in route.trainable().values()), fixed=True)  # fmt: skip
        if cached:
            channels = route.branch(torch.empty(1, 3, *route.size, device="meta")).shape[1]
            kept = 2 * (2 * channels + 4 * 3) * r * r  # z_r in half precision and the branch's input in single
            task = replace(task, macs=2 * student + branch, cache=kept)
        found.append(task)
    return tuple(found)


def tables(recordio: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The blocks of docs/costs.md, name and Markdown, with what bench_recordio.py has measured."""
    decoded, stored = recordio["decoded images"]["ours, decoded"], recordio["bytes"]
    speed = reached()
    published = [("PartialFC 0.1 (fitted)", 0.1, PUBLISHED), ("every class", 1.0, PUBLISHED_ALL)]
    lines = [
        "| eight V100, three million classes | published, images/s | model | model / published |",
        "|---|---:|---:|---:|",
    ]
    for name, share, value in published:
        own = 1024 / step_time(tasks()[0], V100, 8, speed, classes=3_000_000, share=share).total
        lines.append(f"| {name} | {value:,.0f} | {own:,.0f} | {own / value:.2f} |")
    lines.append(f"\nReached on a V100: {speed / 1e12:.1f} TFLOP/s, {speed / V100.half:.0%} of its peak.")
    yield "check", "\n".join(lines)
    lines = ["| | GMACs a step and face | the same, teacher cached | numbers that learn | all-reduce a step (n large), MB | "
             "cached features of MS1Mv3, TB |", "|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    for task, kept in zip(tasks(), tasks(cached=True), strict=True):
        cache = [f"{kept.macs / 1e9:.2f}", f"{kept.cache * IMAGES / 1e12:.2f}"] if kept.cache else ["–", "–"]
        lines.append(
            f"| {task.name} | {task.macs / 1e9:.2f} | {cache[0]} | {task.learns:,} | {8 * task.learns / 1e6:.0f} | {cache[1]} |"
        )
    yield "work", "\n".join(lines)
    for device in (RTX, A100):
        lines = ["| | GPUs | network, ms | classifier, ms | exchange, ms | loading, ms | images/s | hours | GPU hours | "
                 "hours, teacher cached |", "|---|---:|" + "---:|" * 8]  # fmt: skip
        for gpus in (1, 4, 32):
            whole = [0.0, 0.0]
            for task, kept in zip(tasks(), tasks(cached=True), strict=True):
                steps = [step_time(one, device, gpus, rate_of(device), decoded=decoded) for one in (task, kept)]
                took, less = (hours(task, step, gpus) for step in steps)
                whole = [whole[0] + took, whole[1] + less]
                parts = (steps[0].network, steps[0].classifier, steps[0].exchange, steps[0].loading)
                cells = " | ".join(f"{1e3 * part:.1f}" for part in parts)
                rate = BATCH * gpus / steps[0].total
                lines.append(f"| {task.name} | {gpus} | {cells} | {rate:,.0f} | {took:.1f} | {took * gpus:.0f} | "
                             f"{less:.1f} |")  # fmt: skip
            lines.append(
                f"| **all** | {gpus} | | | | | | **{whole[0]:.1f}** | **{whole[0] * gpus:.0f}** | **{whole[1]:.1f}** |"
            )
        yield device.name.split()[0], "\n".join(lines)
    lines = [
        "| classes | GPUs | trunk (learned), GB | PartialFC 0.1, GB | branch (fixed), GB |",
        "|---:|---:|---:|---:|---:|",
    ]
    for classes in (10_000, CLASSES, 1_000_000):
        for gpus in (1, 4, 32):
            cells = (classifier_bytes(classes, gpus, fixed=False), classifier_bytes(classes, gpus, fixed=False, share=0.1),
                     classifier_bytes(classes, gpus, fixed=True))  # fmt: skip
            lines.append(f"| {classes:,} | {gpus} | " + " | ".join(f"{cell / 1e9:.2f}" for cell in cells) + " |")
    yield "memory", "\n".join(lines)
    lines = ["| | images/s at 32 GPUs | CPU cores that decode them | MB/s read |", "|---|---:|---:|---:|"]
    for device in (RTX, A100):
        busiest = max(BATCH * 32 / step_time(task, device, 32, rate_of(device)).total for task in tasks())
        lines.append(f"| {device.name} | {busiest:,.0f} | {busiest / decoded:.0f} | {busiest * stored / 1e6:.0f} |")
    yield "loading", "\n".join(lines)
