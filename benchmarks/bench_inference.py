"""Quick inference on a CPU (btnet_core/models/openvino.py) against onnxruntime in fp32, by route, batch and threads.

    BTNET_DATA=data python benchmarks/bench_inference.py --out figures/results/bench_inference.json

IResNet-50 with random weights; MobileFaceNet with those of BTNET_DATA, and int8 on its faces. Milliseconds a face:
medians of rounds in which all contenders take turns. Beside OUT.json a small figure, bench_inference.png.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import harness
import matplotlib.pyplot as plt
import onnxruntime
import torch
from torch.nn import functional as F

from btnet_core import BTNet
from btnet_core.data.faces import open_faces
from btnet_core.device import autocast, instruction_sets
from btnet_core.errors import ConfigError
from btnet_core.files import data_root, find
from btnet_core.models.backbone import BackboneConfig, build_backbone
from btnet_core.models.openvino import PRECISIONS, OpenVinoBTNet
from btnet_core.models.weights import load_backbone
from btnet_tools.export import PixelRoute, program

ROUTES = (112, 28, 14, 7)
CPU = torch.device("cpu")
Contender = Callable[[torch.Tensor, int], Any]


def networks(quick: bool) -> dict[str, BTNet]:
    """The networks that there are here, by name."""
    name = "iresnet18" if quick else "iresnet50"
    found = {name: BTNet(build_backbone(BackboneConfig(name=name)), ROUTES[1:])}
    weights = find("mobilefacenet_casia.safetensors")
    if weights.is_file():
        found["mobilefacenet"] = BTNet(load_backbone(weights), ROUTES[1:])
    return {name: btnet.eval() for name, btnet in found.items()}


@torch.no_grad()
def onnx_file(btnet: BTNet, r: int, folder: Path) -> Path:
    """One route in a file of its own, as quick as ONNX can have it."""
    path = folder / f"btnet_{r}.onnx"
    names = {"input_names": ["pixels"], "output_names": ["embedding", "norm"]}
    one = program(PixelRoute(btnet, r))
    torch.onnx.export(one, f=path, dynamo=True, optimize=True, verbose=False, **names)
    return path


def contenders(
    btnet: BTNet, folder: Path, routes: tuple[int, ...], threads: int
) -> tuple[dict[str, Contender], dict[str, str]]:
    """What takes turns, and why a precision is not among them."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    sessions = {
        r: onnxruntime.InferenceSession(
            str(onnx_file(btnet, r, folder)), options, providers=["CPUExecutionProvider"]
        )
        for r in routes
    }
    mean, std = btnet.trunk.config.mean, btnet.trunk.config.std

    def in_bf16(x: torch.Tensor, r: int) -> torch.Tensor:
        with autocast(CPU, "bf16"):
            return btnet(x.contiguous(memory_format=torch.channels_last), r)

    found: dict[str, Contender] = {
        "onnxruntime fp32": lambda x, r: sessions[r].run(
            ["embedding"], {"pixels": (x * std + mean).numpy()}
        ),
        "PyTorch fp32": btnet,
        "PyTorch bf16": in_bf16,
    }
    reasons = {}
    faces = data_root() / "faces_train"
    for precision in PRECISIONS:
        try:
            some = open_faces(str(faces)).images(range(64)) if precision == "int8" else ()
            found[f"OpenVINO {precision}"] = OpenVinoBTNet(btnet, precision, some)
        except (ConfigError, ValueError) as error:
            reasons[precision] = str(error)
    return found, reasons


@torch.inference_mode()
def measure(
    btnet: BTNet, rivals: dict[str, Contender], r: int, batch: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Of each contender: milliseconds a face, and the lowest cosine to PyTorch fp32."""
    x = btnet.trunk.normalise(torch.randint(0, 256, (batch, 3, *btnet.input_size(r))))
    expected = F.normalize(btnet(x, r))
    times: dict[str, list[float]] = {name: [] for name in rivals}
    cosines = {}
    for name, rival in rivals.items():  # which warms up, too
        z = rival(x, r)
        z = torch.from_numpy(z[0]) if isinstance(z, list) else z
        cosines[name] = float(F.cosine_similarity(z.float(), expected).min())
    for _ in range(rounds):
        for name, rival in rivals.items():
            start = time.perf_counter()
            rival(x, r)
            times[name].append(1e3 * (time.perf_counter() - start) / batch)
    return {name: {"ms": median(times[name]), "cosine": cosines[name]} for name in rivals}


def limit(batch: int, threads: int) -> float:
    """How many times as fast as onnxruntime bf16 has to be on this processor."""
    if "amx_bf16" not in instruction_sets():
        return 2.0
    if threads > 1:
        return 3.0
    return 5.0 if batch > 1 else 2.5


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Times as fast as onnxruntime fp32, one thread, batch 32 (or the largest)."""
    most = max(row["batch"] for row in rows)
    shown = [row for row in rows if row["threads"] == 1 and row["batch"] == most]
    names = [name for name in shown[0]["contenders"] if name.startswith(("OpenVINO", "PyTorch"))]
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    for index, name in enumerate(names):
        times = [
            (row["contenders"]["onnxruntime fp32"], row["contenders"].get(name)) for row in shown
        ]
        ratios = [base["ms"] / one["ms"] if one else 0 for base, one in times]
        places = [place + index / (len(names) + 1) for place in range(len(shown))]
        axes.bar(places, ratios, 1 / (len(names) + 1), label=name)
    axes.set_xticks(
        range(len(shown)), [f"{row['network']}\n{row['r']} px" for row in shown], fontsize=6
    )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylabel("times onnxruntime fp32")
    axes.legend(fontsize=6)
    figure.savefig(path, dpi=150)


def main() -> None:
    began, options = time.monotonic(), harness.options(__doc__).parse_args()
    routes, batches = ((7,), (1, 8)) if options.quick else (ROUTES, (1, 32))
    rounds = 3 if options.quick else 15
    rows, goals, reasons = [], [], {}
    for network, btnet in networks(options.quick).items():
        for threads in (1,) if options.quick else (1, 2):
            torch.set_num_threads(threads)
            with tempfile.TemporaryDirectory() as folder:
                rivals, why = contenders(btnet, Path(folder), routes, threads)
                reasons |= {f"{network}, {precision}": reason for precision, reason in why.items()}
                for r in routes:
                    for batch in batches:
                        found = measure(btnet, rivals, r, batch, rounds)
                        about = {"network": network, "r": r, "batch": batch, "threads": threads}
                        print(
                            about,
                            {name: round(one["ms"], 2) for name, one in found.items()},
                            flush=True,
                        )
                        rows.append(about | {"contenders": found})
                        if "OpenVINO bf16" in found:
                            name = f"{network}, {r} px, batch {batch}, {threads} threads: bf16"
                            ratio = found["onnxruntime fp32"]["ms"] / found["OpenVINO bf16"]["ms"]
                            goals += [
                                harness.goal(
                                    f"{name} / onnxruntime fp32",
                                    ratio,
                                    limit(batch, threads),
                                    at_least=True,
                                ),
                                harness.goal(
                                    f"{name}, cosine",
                                    found["OpenVINO bf16"]["cosine"],
                                    0.999,
                                    at_least=True,
                                ),
                            ]
    if options.out:
        draw(rows, options.out.with_suffix(".png"))
    harness.write(options, goals, {"rows": rows, "not offered": reasons}, began)


if __name__ == "__main__":
    main()
