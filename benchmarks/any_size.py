"""Faces between two branches: is ceil the better choice where a branch has seen faces smaller than its own resolution?

    btnet reproduce --scale lfw --only 03,04 && python benchmarks/any_size.py

Trains the branches of 28 and 14 px of the scale lfw once more, half of their faces shrunk first to a size drawn above the next
branch (15 to 27, 8 to 13 rows), and takes that of 7 px, below which there is none, as it is. Resumable, in runs/lfw/any-size. Writes
figures/results/lfw_any_size.json: for the scale's own BTNet and for this one accuracies on the first pair set, folds 1 to 5 and all, and
TPIR20 in % at FPIR 0.3 of each way to choose a branch on Table 2's stand-in, beside phi_mr's. About 25 minutes on one core.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from btnet_core.evaluation.embedders import BranchEmbedder
from btnet_core.evaluation.identification import evaluate_strategies, native_embedder
from btnet_core.evaluation.verification import evaluate_pairs
from btnet_core.models.btnet import BTNet
from btnet_core.training.loop import train
from btnet_paper import plans, results
from btnet_paper.study import Study

LOWEST = {28: 15, 14: 8}  # rows: above the next branch
SHARE = 0.5  # of the faces, shrunk below r


def train_on_any_size(study: Study, folder: Path) -> tuple[BTNet, dict[str, Any]]:
    """The BTNet of branches that have seen smaller faces, and how they were trained."""
    runs = plans.plan(study.scale, study.models)
    used, net = {}, folder / "btnet"
    for r, low in LOWEST.items():
        sizes = range(low, r + 1)
        each = SHARE / (len(sizes) - 1)
        weights = (*(each for _ in sizes[:-1]), 1 - SHARE)
        changes = {"sizes": tuple(sizes), "size_weights": weights, "btnet": str(net)}
        used[str(r)] = runs[f"phi_bt_{r}"].replace(validation=(), threads=1, **changes)
        train(used[str(r)], folder / f"phi_bt_{r}")
    shutil.copy(study.models / "phi_bt" / "branch_7.safetensors", net)
    return BTNet.load(net), {r: config.to_dict() for r, config in used.items()}


def measure(study: Study, embedder: Any, *, strategies: Any = None) -> dict[str, Any]:
    """Accuracies and TPIRs of one embedder."""
    cells = [(112, r) for r in (7, 14, 28)] + [(r, r) for r in (7, 14, 28)]
    found = evaluate_pairs(embedder, study.pairs[0], cells, keep=study.embeddings)
    test, net = study.survface(), embedder.network(112)
    place = {"crop": net.crop, "size": net.config.size, "upsample": bool(strategies)}
    embed = native_embedder(embedder, test.images.__getitem__, **place)
    options = {"strategies": strategies} if strategies else {}
    reports = evaluate_strategies(
        embed, test.images.sizes, labels=test.labels, in_gallery=test.in_gallery,
        resolutions=(7, 14, 28, 112), **options,
    )  # fmt: skip
    return {
        "accuracy": {s: row["accuracy"] for s, row in found.items()},
        "first_half": {s: float(sum(row["folds"][:5]) / 5) for s, row in found.items()},
        "tpir": {name: report["tpir"]["0.3"] for name, report in reports.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", default="", help="folder of the scale's run (default: runs/lfw)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began, study = time.monotonic(), Study("any_size", scale="lfw", run_dir=options.run)
    net, used = train_on_any_size(study, study.run_dir / "any-size")
    methods = plans.load_methods(study.models)
    values = {
        "phi_bt": measure(study, methods["phi_bt"]),
        "phi_bt, faces of any size": measure(study, BranchEmbedder(net)),
        "phi_mr": measure(study, methods["phi_mr"], strategies=[("max", "ceil")]),
    }
    data = f"{study.faces.checksum} {study.pairs[0].checksum}"
    results.record(results.ROOT / "figures", "lfw_any_size", values, config=used, data=data,
                   kernel="bilinear+antialias, float", seconds=time.monotonic() - began, scale="lfw")  # fmt: skip
    for name, row in values.items():
        print(name, row)


if __name__ == "__main__":
    main()
