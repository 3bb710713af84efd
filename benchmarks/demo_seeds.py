"""Does phi_bt beat phi_mr, and phi_mr phi_hr, at 14 pixels whatever the seed? The demo's comparison over three seeds.

    make reproduce && python benchmarks/demo_seeds.py        # minutes a seed on two CPU cores

Seed 0 is the demo's own run; the others train phi_hr, phi_mr and the branch of 14 anew (resumable, under
runs/demo-seeds). Every seed is verified on the demo's pairs. Writes figures/results/demo_seeds.json.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from btnet_core import results
from btnet_core.datasets.faces import open_pairs
from btnet_core.embedders import load_methods
from btnet_core.evaluation.verification import evaluate_pairs
from btnet_core.images import Resize
from btnet_core.scales import get_scale
from btnet_core.training import methods
from btnet_core.training.loop import train

ROOT = Path(__file__).resolve().parents[1]
METHODS, SETTINGS, SEEDS = ("phi_hr", "phi_mr", "phi_bt"), [(112, 14), (14, 14)], (0, 1, 2)


def main() -> None:
    scale, began = get_scale("demo"), time.monotonic()
    (spec,) = scale.pairs
    pairs, rows = open_pairs(spec), {}
    for seed in SEEDS:
        models = ROOT / "runs" / ("demo" if seed == 0 else f"demo-seeds/{seed}") / "models"
        plan = methods.plan(scale, models, seed=seed)
        for name in ("phi_hr", "phi_mr", "phi_bt_14"):
            if seed:
                train(plan[name].replace(validation=()), models / name)
        found = load_methods(models)
        reports = {name: evaluate_pairs(found[name], pairs, SETTINGS) for name in METHODS}
        rows[seed] = {name: {s: row["accuracy"] for s, row in report.items()} for name, report in reports.items()}
        print(seed, rows[seed], flush=True)
    values = {"by_seed": {str(seed): row for seed, row in rows.items()}, "mean": {}, "std": {}}
    for key, take in (("mean", np.mean), ("std", lambda x: np.std(x, ddof=1))):
        values[key] = {n: {s: float(take([rows[seed][n][s] for seed in SEEDS])) for s in rows[0][n]} for n in METHODS}
    results.record(ROOT / "figures", "demo_seeds", values, config={"seeds": SEEDS, "settings": SETTINGS},
                   data=pairs.checksum, kernel=Resize().name, seconds=time.monotonic() - began, scale="demo")  # fmt: skip


if __name__ == "__main__":
    main()
