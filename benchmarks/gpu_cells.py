"""The measurements of benchmarks/gpu.py: one function a kind; each returns a value beside what the device could do at most.

Training goes through `btnet_core.training.loop.fit`, with its copies, clipping and reading of values; what is replaced is
the faces (noise in memory) and the number of steps. A roof is the smaller of two: operations of an image over the measured
rate of matrix products of that precision, and bytes of an image over the measured rate of copying. Both count only what
cannot be spared (activations: written and read forward, gradient written and read and activation read backward).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_growth import classifier_step
from harness import goal
from torch import Tensor, nn

from btnet_core.data.faces import FaceSet
from btnet_core.data.sources import register
from btnet_core.evaluation.identification import search
from btnet_core.losses import build_margin
from btnet_core.models.backbone import Backbone, BackboneConfig, build_backbone
from btnet_core.models.btnet import NORMS, BTNet
from btnet_core.models.costs import count_macs
from btnet_core.models.weights import save_backbone
from btnet_core.training import methods, step
from btnet_core.training.classifier import Classifier, fresh_weight, save_classifier
from btnet_core.training.loop import fill_cache, fit, torch_settings
from btnet_core.training.progress import Progress, memory_gb
from btnet_core.training.run import Run, prepare

SIDES = (112, 28, 14, 7)
BYTES = {"bf16": 2, "fp16": 2, "tf32": 4, "fp32": 4}  # of a number, in a precision


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured: the trunk, and images, steps, classes, gallery entries."""

    trunk: BackboneConfig = field(default_factory=lambda: BackboneConfig(name="iresnet50"))
    batches: tuple[int, ...] = (128, 256, 512, 1024)
    batch: int = 256  # where only one is measured
    images: int = 8192  # in memory, come again and again
    warm: int = 10  # steps that are not timed, and those that are; multiples of loop.READ_EVERY
    steps: int = 20
    identities: int = 93_431  # of MS1Mv3
    rows: tuple[int, ...] = (93_431, 1_000_000)
    embedded: int = 4096
    probes: int = 50_000
    gallery: int = 1_000_000


TINY = Sizes(
    trunk=BackboneConfig(name="iresnet18", width=0.125, embedding=16), batches=(4, 8), batch=4,
    images=16, warm=1, steps=2, identities=10, rows=(40, 80), embedded=8, probes=16, gallery=64,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a cell runs, and the measured rates: operations a second by precision, bytes a second."""

    device: torch.device
    folder: Path
    sizes: Sizes
    matrix: dict[str, float]
    copy: float


class Noise(FaceSet):
    """Faces that cost nothing to draw."""

    def __init__(self, count: int, identities: int) -> None:
        self.name = self.checksum = f"noise, {count} images, {identities} identities"
        self.labels, self.num_identities = torch.arange(count) % identities, identities

    def native(self, index: int) -> Tensor:
        return self.images([index])[0]

    def images(self, indices: Any) -> Tensor:
        return torch.randint(0, 256, (len(indices), 3, 112, 112), dtype=torch.uint8)


register("noise", Noise)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def row(
    place: Place, value: float, unit: str, precision: str, operations: float, bytes_: float
) -> dict[str, Any]:
    """A result: `value` in `unit` a second, what each roof allows, and the fraction of the lower one."""
    roofs = {"operations": place.matrix[precision] / operations, "bytes": place.copy / bytes_}
    return {"value": value, "unit": f"{unit}/s", "precision": precision, "roofs": roofs,
            "share": value / min(roofs.values()), "memory_gb": memory_gb()}  # fmt: skip


def activations(network: nn.Module, size: tuple[int, int]) -> float:
    """Numbers that the layers of a network write for one image."""
    seen: list[int] = []
    layers = [
        m for m in network.modules() if not list(m.children()) and not isinstance(m, nn.Identity)
    ]
    hooks = [m.register_forward_hook(lambda m, i, out: seen.append(out.numel())) for m in layers]
    count_macs(network, size)  # two images, shapes alone
    for hook in hooks:
        hook.remove()
    return sum(seen) / 2


# ---- training ------------------------------------------------------------------------------------


def images_per_second(place: Place, run: Run) -> float:
    """Of `fit`, after its first steps; the run then ends without a checkpoint."""
    sampler, sizes, times = run.sampler, place.sizes, []
    sampler.batch = partial(_again, sampler.batch, sampler.steps)  # type: ignore[method-assign]
    sampler.steps = 10**6  # no end of an epoch, which would be saved
    batches = run.batches

    def counted() -> Iterator[tuple[Any, Tensor | None]]:
        for index, item in enumerate(batches()):
            if index in (sizes.warm, sizes.warm + sizes.steps):
                wait(place.device)
                times.append(time.perf_counter())
            if len(times) == 2:
                return
            yield item

    run.batches = counted  # type: ignore[method-assign]
    progress = Progress(
        run.out, run.config.name, run.total, 0, sampler.steps, show="none", speak=False
    )
    fit(run, progress)
    return sizes.steps * run.config.batch / (times[1] - times[0])


def _again(batch: Callable[[int], Any], steps: int, index: int) -> Any:
    return batch(index % steps)


def trunk(
    place: Place, *, precision: str, batch: int, compile: bool = False, channels_last: bool = True
) -> dict[str, Any]:
    """A trunk from random weights at 112 px, with its classifier."""
    sizes = place.sizes
    machine = (
        {"precision": "fp32", "matmul": "high"} if precision == "tf32" else {"precision": precision}
    )
    config = methods.phi_hr(
        _faces(sizes), backbone=sizes.trunk, batch=batch, compile=compile, **machine
    )
    torch_settings(config, place.device)
    run = prepare(config, place.folder, place.device)
    if not channels_last:
        run.network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        finish = run.finish
        run.finish = lambda x: finish(x.contiguous())
    rate, size = images_per_second(place, run), sizes.trunk.size
    classes = sizes.identities * sizes.trunk.embedding
    operations = 3 * 2 * (count_macs(run.network, size) + classes)
    kappa = 7 * 4 * classes / batch  # see `classifier`
    moved = 5 * activations(run.network, size) * BYTES[precision] + kappa
    return row(place, rate, "images", precision, operations, moved)


def branch(place: Place, *, r: int, teacher: str) -> dict[str, Any]:
    """phi_bt of r; the teacher's answers `cached` in files, computed (`uncached`), or `two streams`."""
    sizes, files = place.sizes, _pretrained(place)
    precision = "bf16" if place.device.type == "cuda" else "fp32"
    config = methods.phi_bt(
        _faces(sizes), r, *files, batch=sizes.batch, precision=precision,
        cache_dir=str(place.folder) if teacher == "cached" else "",
    )  # fmt: skip
    torch_settings(config, place.device)
    run = prepare(config, place.folder, place.device)
    if teacher == "cached":
        fill_cache(run, Progress(place.folder, "", 1, 0, 1, show="none", speak=False))
        if run.cache is None:
            raise RuntimeError("no room on the disk for the teacher's answers")
    with two_streams(place.device) if teacher == "two streams" else _nothing():
        rate = images_per_second(place, run)
    route, size = run.network, sizes.trunk.size
    own, student = count_macs(route.branch, route.size), count_macs(route, route.size)
    asked = 0.0 if teacher == "cached" else count_macs(run.trunk, size) - (student - own)
    kappa = 2 * sizes.identities * sizes.trunk.embedding  # fixed: forward, and backward for z
    operations = 2 * (asked + 2 * student + own + kappa)  # T_r's convolutions are fixed
    moved = 5 * activations(route, route.size) * BYTES[precision]
    moved += 0 if teacher == "cached" else 2 * activations(run.trunk, size) * BYTES[precision]
    return row(place, rate, "images", precision, operations, moved)


@contextmanager
def two_streams(device: torch.device) -> Iterator[None]:
    """The teacher's pass on a stream of its own, beside the student's, until the loss compares them."""
    streams = torch.cuda if device.type == "cuda" else torch.cpu
    side, ask, distillation = streams.Stream(), step.ask, step.distillation

    def asked(trunk: nn.Module, faces: Tensor, *arguments: Any) -> Any:
        side.wait_stream(streams.current_stream())
        with streams.stream(side):
            teacher = ask(trunk, faces, *arguments)
        _used_on(side, [faces])
        return teacher

    def compared(run: Run, z_r: Tensor, teacher: Any) -> Any:
        streams.current_stream().wait_stream(side)
        _used_on(streams.current_stream(), teacher)
        return distillation(run, z_r, teacher)

    step.ask, step.distillation = asked, compared
    try:
        yield
    finally:
        step.ask, step.distillation = ask, distillation


def _used_on(stream: Any, tensors: Any) -> None:
    """Their memory is not given to others before `stream` is done with it."""
    for tensor in tensors:
        if tensor is not None and tensor.is_cuda:
            tensor.record_stream(stream)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _faces(sizes: Sizes) -> dict[str, Any]:
    return {"kind": "noise", "count": sizes.images, "identities": sizes.identities}


def _pretrained(place: Place) -> tuple[str, str]:
    """Files of a trunk with random weights, whose features have a sensible size, and a classifier."""
    files = place.folder / "trunk.safetensors", place.folder / "classifier.safetensors"
    if not files[1].is_file():
        save_backbone(_random_trunk(place), files[0])
        weight = fresh_weight(place.sizes.identities, place.sizes.trunk.embedding, 0)
        save_classifier(files[1], weight)
    return str(files[0]), str(files[1])


@torch.no_grad()
def _random_trunk(place: Place) -> Backbone:
    """Batch norms know the statistics of some noise: else 50 layers end in infinity."""
    net = build_backbone(place.sizes.trunk).to(place.device).train()
    norms = [module for module in net.modules() if isinstance(module, NORMS)]
    for momentum in (1.0, 0.1):
        for norm in norms:
            norm.momentum = momentum
        if momentum == 1.0:
            net(net.preprocess(Noise(8, 8).images(range(8)).to(place.device)))
    return net


# ---- beside the networks -------------------------------------------------------------------------


def classifier(place: Place, *, rows: int, sample_rate: float) -> dict[str, Any]:
    """Steps of kappa alone on one device: forward, backward, optimiser.

    Bytes: weight, gradient and momentum, each written and read, and the weight read once more; momentum and decay
    take all rows, also those that PartialFC leaves out.
    """
    sizes, width = place.sizes, place.sizes.trunk.embedding
    weight = torch.zeros(rows, width)
    kappa = Classifier(weight, build_margin("curricularface"), sample_rate=sample_rate)
    kappa = kappa.to(place.device).train()
    nn.init.normal_(kappa.weight, std=0.01)
    optimiser = torch.optim.SGD(kappa.parameters(), lr=0.1, momentum=0.9, fused=True)
    rate = _repeated(place, lambda: classifier_step(kappa, optimiser, sizes.batch), sizes.batch)
    operations = 3 * 2 * rows * sample_rate * width
    moved = 4 * (7 * rows * width / sizes.batch + 5 * rows * sample_rate)
    return row(place, rate, "images", "fp32", operations, moved)


def embed(place: Place) -> dict[str, Any]:
    """`BTNet.embed` of faces in memory, of four sizes in turn."""
    sizes = place.sizes
    net = BTNet(_random_trunk(place), SIDES[1:]).to(place.device).eval()
    faces = [
        torch.randint(0, 256, (3, SIDES[i % 4], SIDES[i % 4]), dtype=torch.uint8)
        for i in range(sizes.embedded)
    ]
    precision = "bf16" if place.device.type == "cuda" else "fp32"
    rate = _repeated(
        place, lambda: net.embed(faces, precision=precision, batch_size=sizes.batch), len(faces), 3
    )
    ways = [(net.route(r), net.input_size(r)) for r in SIDES]
    operations = 2 * sum(count_macs(*way) for way in ways) / len(ways)
    moved = 2 * BYTES[precision] * sum(activations(*way) for way in ways) / len(ways)
    return row(place, rate, "faces", precision, operations, moved)


def identification(place: Place) -> dict[str, Any]:
    """1:N `search`, two of three probes mated; a score is written and read once."""
    sizes, width = place.sizes, place.sizes.trunk.embedding
    gallery, probes = torch.randn(sizes.gallery, width), torch.randn(sizes.probes, width)
    mates = torch.arange(sizes.probes).numpy() % sizes.gallery
    mates[::3] = -1
    rate = _repeated(
        place, lambda: search(probes, gallery, mates, device=place.device), sizes.probes, 2
    )
    operations, moved = 2 * sizes.gallery * width, 8 * sizes.gallery
    return row(place, rate, "probes", "fp32", operations, moved)


def _repeated(place: Place, task: Callable[[], Any], count: int, times: int = 0) -> float:
    """How many of `count` things a second, after a first time that is not counted."""
    times = times or place.sizes.steps
    task()
    wait(place.device)
    began = time.perf_counter()
    for _ in range(times):
        task()
    wait(place.device)
    return times * count / (time.perf_counter() - began)


# ---- which ---------------------------------------------------------------------------------------


def cells(sizes: Sizes, quick: bool) -> dict[str, Callable[[Place], dict[str, Any]]]:
    """What is measured, by name, the most wanted first; ``quick``: a part of it."""
    found: dict[str, Callable] = {}
    for precision in ("bf16", "fp16", "tf32"):
        found[f"trunk {precision} {sizes.batch}"] = partial(
            trunk, precision=precision, batch=sizes.batch
        )
    for teacher in ("cached", "uncached", "two streams"):
        for r in (14,) if quick else (14, 28, 7):
            found[f"branch {r} {teacher}"] = partial(branch, r=r, teacher=teacher)
    for rows in sizes.rows[: 1 if quick else None]:
        for share in (1.0, 0.1):
            name = f"classifier {rows:,} rows" + f", PartialFC {share}" * (share < 1)
            found[name] = partial(classifier, rows=rows, sample_rate=share)
    found["embed, mixed sizes"] = embed
    found[f"1:N, {sizes.gallery:,} entries"] = identification
    bf16 = partial(trunk, precision="bf16")
    found |= {f"trunk bf16 {batch}": partial(bf16, batch=batch) for batch in sizes.batches}
    if quick:
        return {
            name: cell for name, cell in found.items() if name != f"trunk bf16 {sizes.batches[-1]}"
        }
    found[f"trunk bf16 {sizes.batch}, channels first"] = partial(
        bf16, batch=sizes.batch, channels_last=False
    )
    found[f"trunk bf16 {sizes.batch}, compiled"] = partial(bf16, batch=sizes.batch, compile=True)
    return found


def aims(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """What one H100 should reach: images/s of a trunk, and how much faster a branch with kept answers is."""
    values = {name: cell["value"] for name, cell in measured.items() if "value" in cell}
    trunks = [value for name, value in values.items() if name.startswith("trunk")]
    if not trunks or "branch 14 cached" not in values:
        return []
    return [
        goal("IResNet-50 training at 112 px, images/s", max(trunks), 3500, at_least=True),
        goal("branch 14 cached / the trunk's best", values["branch 14 cached"] / max(trunks), 4, at_least=True),
    ]  # fmt: skip
