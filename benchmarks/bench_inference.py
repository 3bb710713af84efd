"""The modes of quick inference (btnet_core/fast.py): time by route against MACs, against onnxruntime, and accuracy.

    BTNET_DATA=data python benchmarks/bench_inference.py [--out FILE.json] [--model my_btnet] [--only times|accuracy]

Times: IResNet-50 with random weights, milliseconds a face, medians of rounds in which all modes take turns, beside what
the processor can do at most. Accuracy: a trained BTNet on pairs of faces. ``--only`` keeps the other half of FILE.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import harness as bench
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from btnet_core import BTNet
from btnet_core.data.faces import open_faces
from btnet_core.data.pairs import open_pairs
from btnet_core.device import autocast
from btnet_core.errors import ConfigError
from btnet_core.evaluation.embedders import BranchEmbedder
from btnet_core.evaluation.verification import evaluate_pairs
from btnet_core.models import fast
from btnet_core.models.backbone import BackboneConfig, build_backbone
from btnet_core.models.costs import count_macs

ROWS, BATCHES = (112, 28, 14, 7), (32, 1)
FACTORS = {"bf16": 2.5, "int8": 3.5}  # against onnxruntime in fp32
COSINES = {"fp32": 0.9999, "bf16": 0.999, "int8": 0.99}
BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
PAIRS = "lfw_devtest_6000.bin"


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def available() -> list[str]:
    """The modes that run here."""
    found = []
    for mode in fast.MODES:
        try:
            fast.check_mode(mode)
            found.append(mode)
        except ConfigError as error:
            print(error)
    return found


def random_net(name: str) -> BTNet:
    """Random weights whose maps neither die out nor grow."""
    torch.manual_seed(0)
    net = BTNet(build_backbone(BackboneConfig(name=name))).eval()
    for conv in (module for module in net.modules() if isinstance(module, nn.Conv2d)):
        nn.init.kaiming_normal_(conv.weight)
    for unit in (unit for unit in net.modules() if hasattr(unit, "bn3")):
        nn.init.constant_(unit.bn3.weight, 0.3)
    return net


# ---- what the processor can do -----------------------------------------------------------------------------------


def ceilings() -> dict[str, float]:
    """Billions of MACs a second of matrix products by dtype, and GB/s of copying 256 MB."""
    rows, side = 4096, 1024
    a, b = torch.randn(rows, side), torch.randn(side, side)
    x, w = (
        torch.randn(1, side, 64, 64).to(memory_format=torch.channels_last),
        b.view(side, side, 1, 1),
    )
    a16, b16, x16, w16 = (t.bfloat16() for t in (a, b, x, w))
    a8, b8 = (t.clamp(-1, 1).mul(127).to(torch.int8) for t in (a, b))
    products: dict[
        str, list[Callable[[], object]]
    ] = {  # a 1 x 1 convolution is oneDNN's matrix product
        "fp32": [lambda: a @ b, lambda: F.conv2d(x, w)],
        "bf16": [lambda: a16 @ b16, lambda: F.conv2d(x16, w16)],
        "int8": [lambda: torch._int_mm(a8, b8)],
    }
    found = {mode: rows * side * side / min(min(seconds(p) for _ in range(9)) for p in ways) / 1e9
             for mode, ways in products.items()}  # fmt: skip
    source = torch.zeros(64 * 2**20)
    target = torch.empty_like(source)
    return found | {
        "bandwidth": 2
        * 4
        * source.numel()
        / min(seconds(lambda: target.copy_(source)) for _ in range(9))
        / 1e9
    }


def traffic(route: nn.Module, x: Tensor) -> tuple[int, int]:
    """Numbers that the convolutions and the head of a folded route read and write: (a face's maps, weights)."""
    maps = weights = 0

    def count(module: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal maps, weights
        maps += inputs[0].numel() + output.numel()
        weights += module.weight.numel()

    for module in route.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    route(x)
    return maps, weights


# ---- times -------------------------------------------------------------------------------------------------------


def runners(
    net: BTNet, modes: list[str], compiling: bool
) -> dict[str, Callable[[Tensor, int], object]]:
    """Everything that is compared: ``run(x, r)``. Routes are compiled at their first call."""
    import onnxruntime

    from btnet_core.models.fast import write_onnx

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    sessions: dict[int, Any] = {}

    def reference(x: Tensor, r: int) -> object:
        if r not in sessions:
            with tempfile.TemporaryDirectory() as folder:
                write_onnx(net.route(r), x[:1].repeat(2, 1, 1, 1), Path(folder) / "route.onnx")
                sessions[r] = onnxruntime.InferenceSession(Path(folder) / "route.onnx", options)
        return sessions[r].run(None, {"x": x.contiguous().numpy()})

    def autocasted(x: Tensor, r: int) -> Tensor:
        with autocast(torch.device("cpu"), "bf16"):
            return net(x.contiguous(memory_format=torch.channels_last), r)

    compiled: dict[int, Any] = {}

    def inductor(x: Tensor, r: int) -> Tensor:
        if r not in compiled:
            compiled[r] = torch.compile(net.route(r), options={"freezing": True})
        with torch.no_grad(), autocast(torch.device("cpu"), "bf16"):
            return compiled[r](x.contiguous(memory_format=torch.channels_last))

    quick = {mode: net.fast(mode, torch.rand(8, 3, 112, 112) * 255) for mode in modes}
    net.to(memory_format=torch.channels_last)
    return {
        "onnxruntime": reference,
        "PyTorch fp32": lambda x, r: net(x.contiguous(memory_format=torch.channels_last), r),
        **({"PyTorch bf16": autocasted} if "bf16" in modes else {}),
        **({"torch.compile bf16": inductor} if "bf16" in modes and compiling else {}),
        **quick,
    }


def by_unit(net: BTNet, x: Tensor, r: int) -> dict[str, float]:
    """Milliseconds a face of each unit in mode bf16, in the chunks of that mode."""
    laid = fast.Laid(fast.fold(net.route(r)), torch.bfloat16)
    x = x[: fast.CHUNK[r >= 28]].to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    names = [name for name, _ in net.trunk.units()]
    best = dict.fromkeys(names, float("inf"))
    for _ in range(5):
        y = x
        for name, unit in zip(names, laid.body, strict=True):
            start = time.perf_counter()
            y = unit(y)
            best[name] = min(best[name], (time.perf_counter() - start) * 1e3 / len(x))
    return best


def times(
    name: str, modes: list[str], batches: tuple[int, ...], rounds: int
) -> tuple[list[dict], dict[str, Any]]:
    net = random_net(name)
    run = runners(net, modes, compiling=rounds > 1)  # which takes a minute
    faces = {
        (b, r): torch.rand(b, 3, r, r, generator=torch.Generator().manual_seed(r)) * 2 - 1
        for b in batches
        for r in ROWS
    }
    taken: dict[tuple[str, int, int], list[float]] = {
        (one, *key): [] for one in run for key in faces
    }
    with torch.inference_mode():
        setup = dict.fromkeys(run, 0.0)
        for one in run:  # compiles
            for (_, r), x in faces.items():
                setup[one] += seconds(lambda one=one, x=x, r=r: run[one](x, r))
        print("measuring", flush=True)
        peaks = ceilings()
        for _ in range(rounds):
            for (b, r), x in faces.items():
                for one, call in run.items():
                    for _ in range(1 if b > 1 else 5):
                        taken[one, b, r].append(
                            seconds(lambda call=call, x=x, r=r: call(x, r)) * 1e3 / b
                        )
        units = (
            {r: by_unit(net, faces[max(batches), r], r) for r in ROWS} if "bf16" in modes else {}
        )
        moved = {r: traffic(fast.fold(net.route(r)), faces[1, r]) for r in ROWS}
    ms = {one: {b: {r: median(taken[one, b, r]) for r in ROWS} for b in batches} for one in run}
    macs = {r: count_macs(net.route(r), (r, r)) for r in ROWS}
    goals = []
    for mode in modes:
        for b in batches:
            for r in ROWS[1:]:
                ratio = ms[mode][b][r] / ms[mode][b][112] / (macs[r] / macs[112])
                goals.append(bench.goal(f"{mode}, batch {b}: time({r}) / time(112) : MACs({r}) / MACs(112)", ratio,
                                        0.9 if b > 1 else 1.3, at_least=False))  # fmt: skip
        for r in ROWS if mode in FACTORS else ():
            factor = ms["onnxruntime"][batches[0]][r] / ms[mode][batches[0]][r]
            goals.append(
                bench.goal(
                    f"{mode}, {r} px, batch {batches[0]}: times onnxruntime's fp32",
                    factor,
                    FACTORS[mode],
                    at_least=True,
                )
            )
    roof = {mode: {b: {r: roofline(mode, b, macs[r], ms[mode][b][r], *moved[r], peaks) for r in ROWS} for b in batches}
            for mode in modes}  # fmt: skip
    return goals, {"network": name, "ms": ms, "macs": macs, "peaks": peaks, "roofline": roof, "bf16_by_unit": units,
                   "first_calls_seconds": setup}  # fmt: skip


def roofline(
    mode: str, batch: int, macs: int, ms: float, maps: int, weights: int, peaks: dict[str, float]
) -> dict[str, float]:
    """Where a mode stands: MACs a byte, billions of MACs a second, their share of the peak and of the roof.

    Bytes are those of every layer's input, output and weights once, as if nothing stayed in a cache.
    """
    size = BYTES[mode] * (maps + weights / batch)
    intensity, speed = macs / size, macs / ms / 1e6
    roof = min(peaks[mode], intensity * peaks["bandwidth"])
    return {
        "intensity": intensity,
        "gmacs": speed,
        "of_peak": speed / peaks[mode],
        "of_roof": speed / roof,
    }


# ---- accuracy ----------------------------------------------------------------------------------------------------


def accuracy(
    model: str, data: Path, modes: list[str], quick: bool
) -> tuple[list[dict], dict[str, Any]]:
    """Cosine to plain fp32 on LFW faces, and accuracy on pairs, at canonical size and through every branch."""
    net = BTNet.load(model)
    calibration = fast.some_faces(str(data / "faces_train"))
    pixels = open_faces(str(data / "lfw_devtest")).images(range(16 if quick else 256))
    pairs = open_pairs(str(data / PAIRS))
    settings = [
        (112, 112),
        *((112, r) for r in net.resolutions[-2::-1]),
        *((r, r) for r in net.resolutions[-2::-1]),
    ]
    goals, found, reports = [], {}, {}
    for mode in ("plain", *modes):
        one = net if mode == "plain" else net.fast(mode, calibration)
        embedder = BranchEmbedder(one, device="cpu", precision="fp32")
        found[mode] = {r: embedder(pixels, r) for r in net.resolutions}
        if not quick:
            reports[mode] = {
                key: row["accuracy"]
                for key, row in evaluate_pairs(embedder, pairs, settings, flip=False).items()
            }
        print(mode, reports.get(mode, ""), flush=True)
    cosines = {
        mode: {
            r: float(F.cosine_similarity(z, found["plain"][r]).mean())
            for r, z in found[mode].items()
        }
        for mode in modes
    }
    for mode in modes:
        goals.append(
            bench.goal(
                f"{mode}: least mean cosine to fp32 of all routes",
                min(cosines[mode].values()),
                COSINES[mode],
                at_least=True,
            )
        )
        if not quick:
            lost = {key: reports["plain"][key] - value for key, value in reports[mode].items()}
            goals.append(
                bench.goal(
                    f"{mode}: points lost on {pairs.name} at 112&112",
                    lost["112&112"],
                    0.2,
                    at_least=False,
                )
            )
            worst = max(lost, key=lambda key: lost[key])
            goals.append(
                bench.goal(
                    f"{mode}: most points lost at any pair of resolutions ({worst})",
                    lost[worst],
                    0.2,
                    at_least=False,
                )
            )
    return goals, {
        "model": net.trunk.config.name,
        "pairs": pairs.name,
        "cosine": cosines,
        "accuracy": reports,
    }


def main() -> None:
    parser = bench.options(__doc__)
    parser.add_argument(
        "--model", default="runs/lfw-quick/models/phi_bt", help="a trained BTNet, for the accuracy"
    )
    parser.add_argument(
        "--only", choices=("times", "accuracy"), help="keep the other half of --out"
    )
    parser.add_argument("--rounds", type=int, default=5)
    given: argparse.Namespace = parser.parse_args()
    began, modes = time.monotonic(), available()
    old = (
        json.loads(given.out.read_text())
        if given.only and given.out and given.out.is_file()
        else {}
    )
    goals, values = [], dict(old.get("values", {}))
    goals += [
        row for row in old.get("goals", ()) if ("batch" in row["what"]) != (given.only == "times")
    ]
    if given.only != "accuracy":
        name = "iresnet18" if given.quick else "iresnet50"
        more, values["times"] = times(
            name, modes, (4, 1) if given.quick else BATCHES, 1 if given.quick else given.rounds
        )
        goals = more + goals
    if given.only != "times" and os.environ.get("BTNET_DATA") and Path(given.model).is_dir():
        more, values["accuracy"] = accuracy(
            given.model, Path(os.environ["BTNET_DATA"]), modes, given.quick
        )
        goals += more
    bench.write(given, goals, values, began)


if __name__ == "__main__":
    main()
