"""Does phi_bt beat phi_mr, and phi_mr phi_hr, whatever the seed? A scale's headline comparison over several seeds.

    btnet reproduce && python benchmarks/seeds.py --resolutions 28 14 7 --threads 1 2        # the demo: 5 minutes a run
    python benchmarks/seeds.py --scale lfw-mr --resolutions 28 14 7 --selection       # real faces: run that scale first
    python benchmarks/seeds.py --scale lfw-ms1m --resolutions 28 14 7                 # another trunk, nothing to run first
    python benchmarks/seeds.py --scale lfw-edgeface --resolutions 28 14 7 --adapter docs/edgeface.py

Seed 0 is the scale's own run in runs/<scale>, if there; the others train what it has trained anew (resumable, under runs/<scale>-seeds). With
--threads every seed is trained with each number of threads, whose rounding grows into another run. Every run is
verified on the scale's pairs, with --selection also on Table 2's stand-in, whose sizes are drawn anew. Writes
figures/results/<scale>_seeds.json: each run, mean over sets and folds, each set, the later folds, mean and standard
deviation over runs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from btnet_core.data.faces import open_faces
from btnet_core.data.pairs import open_pairs
from btnet_core.evaluation.identification import evaluate_strategies, native_embedder
from btnet_core.evaluation.verification import evaluate_pairs, summarise
from btnet_core.files import find
from btnet_core.images import Resize
from btnet_core.models.weights import load_backbone, save_backbone
from btnet_core.training.loop import train
from btnet_paper import plans, results
from btnet_paper.beyond import fitted_lengths, with_lengths
from btnet_paper.plans import load_methods
from btnet_paper.records import FITTED
from btnet_paper.scales import Scale, get_scale
from btnet_paper.standins import survface_standin
from btnet_tools.adapter import find_adapter

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("phi_hr", "phi_mr", "phi_bt")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", default="demo", help="a page of configs/ (default: demo)")
    parser.add_argument("--adapter", help="FILE.py with the class of a pretrained trunk")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--resolutions", type=int, nargs="+", default=[14], help="of the branches (default: 14)"
    )
    parser.add_argument("--threads", type=int, nargs="+", help="default: the scale's number")
    parser.add_argument("--selection", action="store_true", help="Table 2's strategies, too")
    options = parser.parse_args()
    scale, began = get_scale(options.scale), time.monotonic()
    settings = [pair for r in options.resolutions for pair in ((112, r), (r, r))] + [(112, 112)]
    adapter = find_adapter(options.adapter) if options.adapter else None
    selection, rows, measured = {}, {}, {}
    sets, keep = [open_pairs(spec) for spec in scale.pairs], scale.run_dir() / "embeddings"
    if scale.threads:
        torch.set_num_threads(scale.threads)
    for seed, threads in product(options.seeds, options.threads or [scale.threads]):
        there = (ROOT / "runs" / scale.name / "models" / "phi_mr").is_dir()
        own = there and not seed and threads == scale.threads
        run = f"{seed}, {threads} threads" if threads != scale.threads else str(seed)
        folder = f"{scale.name}-seeds/{run.replace(', ', '-').replace(' ', '-')}"
        run_dir = ROOT / "runs" / (scale.name if own else folder)
        models = run_dir / "models"
        if scale.pretrained:
            save_backbone(
                load_backbone(find(scale.pretrained), adapter),
                models / "phi_hr" / "trunk.safetensors",
            )
        plan = plans.plan(scale, models, seed=seed)
        for name in ("phi_hr", "phi_mr", *(f"phi_bt_{r}" for r in options.resolutions)):
            if not own and name in plan:
                shared = (
                    ROOT / "runs" / scale.name / "models" / "teacher" if scale.pretrained else ""
                )
                machine: dict[str, Any] = {"cache_dir": str(shared), "threads": threads}
                train(plan[name].replace(validation=(), **machine), models / name)
        found = load_methods(models)
        reports = {
            name: summarise([evaluate_pairs(found[name], one, settings, keep=keep) for one in sets])
            for name in METHODS
        }
        measured[run] = reports
        rows[run] = {
            name: {s: row["accuracy"] for s, row in report.items()}
            for name, report in reports.items()
        }
        print(run, rows[run], flush=True)
        if options.selection:
            selection[run] = table2(scale, run_dir, found, seed, options.resolutions)
            print(run, selection[run], flush=True)
    values: dict[str, Any] = {
        "by_seed": rows,
        "measured": measured,
        "pairs": [one.name for one in sets],
        "mean": {},
        "std": {},
    }
    for key, take in (("mean", np.mean), ("std", spread)):
        values[key] = {
            n: {s: take([row[n][s] for row in rows.values()]) for s in report}
            for n, report in reports.items()
        }
    if selection:
        values["selection"] = selection  # TPIR20 in % at FPIR 0.3
    name = f"{scale.name}_seeds"
    results.record(ROOT / "figures", name, values, config={"seeds": options.seeds, "threads": options.threads or [scale.threads], "settings": settings},
                   data=" ".join(one.checksum for one in sets), kernel=Resize().name, seconds=time.monotonic() - began, scale=scale.name)  # fmt: skip


def spread(found: list[float]) -> float | None:
    """Standard deviation over runs; of a single one there is none."""
    return float(np.std(found, ddof=1)) if len(found) > 1 else None


def table2(
    scale: Scale, run_dir: Path, found: Mapping[str, Any], seed: int, resolutions: list[int]
) -> dict[str, float]:
    """TPIR20 in % at FPIR 0.3 of each way to choose a branch of ``resolutions``, as notebook 06."""
    test = survface_standin(open_faces(scale.others), run_dir / "data", seed=seed)
    trunk = found["phi_bt"].btnet.trunk
    options: dict[str, Any] = {
        "sizes": test.images.sizes,
        "labels": test.labels,
        "in_gallery": test.in_gallery,
    }
    place = {"how": Resize(), "crop": trunk.crop, "size": trunk.config.size}
    embed = native_embedder(found["phi_bt"], test.images.__getitem__, **place)
    kept: dict[tuple[int, bytes], Any] = {}

    def once(indices: Any, r: int) -> Any:
        key = (r, indices.tobytes())
        kept[key] = kept[key] if key in kept else embed(indices, r)
        return kept[key]

    lengths = fitted_lengths(found["phi_bt"], open_faces(scale.faces), resolutions)
    options["resolutions"] = (*sorted(resolutions), 112)
    reports = evaluate_strategies(once, **options)
    fitted = evaluate_strategies(with_lengths(once, lengths), **options)
    reports |= {f"{name}{FITTED}": report for name, report in fitted.items()}
    for name in ("phi_hr", "phi_mr"):
        up = native_embedder(found[name], test.images.__getitem__, upsample=True, **place)
        (reports[name],) = evaluate_strategies(up, **options, strategies=[("max", "ceil")]).values()
    return {name: report["tpir"]["0.3"] for name, report in reports.items()}


if __name__ == "__main__":
    main()
