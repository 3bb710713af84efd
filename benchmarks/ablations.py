"""Do rows of notebook 07 stay as they are with other seeds, with a longer training, at another resolution?

    python benchmarks/ablations.py --scale lfw --seeds 0 1 --tables table3 table4 figure7    # the paper's rows again
    python benchmarks/ablations.py --scale lfw --epochs 6 --tables table3 table4 figure7     # three times as long
    python benchmarks/ablations.py --scale lfw --resolution 14 --tables table3 table4 beyond \\
        --rows alone moved fine-tuned Scratch Pretraining Face
    python benchmarks/ablations.py --scale lfw --resolution 28 --tables beyond --rows fine-tuned
    python benchmarks/ablations.py --scale lfw --resolution 56 --epochs 1 --tables beyond --rows moved fine-tuned

Run the scale first: its phi_hr (and phi_mr, where that is the teacher) is what every row starts from. Resumable, under
runs/<scale>-seeds; what notebook 07 has trained is not trained again. Writes
figures/results/<scale>_ablations_<r>px_<epochs>_epochs.json: each seed, mean and standard deviation of each row.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from btnet_core.data.pairs import open_pairs
from btnet_core.evaluation.verification import evaluate_pairs, summarise
from btnet_core.models.weights import load_backbone, save_backbone
from btnet_core.training.launch import train_in_subprocess
from btnet_paper import plans, results
from btnet_paper.scales import get_scale

ROOT = Path(__file__).resolve().parents[1]
TABLES = ("table3", "table4", "figure7", "beyond")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", default="demo", choices=("demo", "lfw"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--epochs", type=int, default=0, help="passes over the faces (default: notebook 07's)"
    )
    parser.add_argument("--tables", nargs="+", default=TABLES, choices=TABLES)
    parser.add_argument(
        "--rows", nargs="+", default=[""], help="parts of the names of rows (default: all)"
    )
    parser.add_argument(
        "--resolution", type=int, default=0, help="of the branch (default: notebook 07's)"
    )
    options = parser.parse_args()
    scale, began = get_scale(options.scale), time.monotonic()
    usual = (scale.ablated, scale.ablation["epochs"])
    r, epochs = options.resolution or usual[0], options.epochs or usual[1]
    changed = replace(scale, ablated=r, ablation={**scale.ablation, "epochs": epochs})
    source, keep = scale.run_dir() / "models", scale.run_dir() / "embeddings"
    trunk = load_backbone(source / scale.teacher / "trunk.safetensors")
    sets = [open_pairs(spec) for spec in scale.pairs]
    rows, used = dict[str, dict[str, dict[str, dict[str, float]]]](), {}
    for seed in options.seeds:
        name = f"{seed}-{r}px-{epochs}-epochs"
        models = (
            source
            if (seed, r, epochs) == (0, *usual)
            else ROOT / "runs" / f"{scale.name}-seeds" / name / "models"
        )
        if models != source:
            for method in {"phi_hr", scale.teacher}:
                path = f"{method}/trunk.safetensors"
                save_backbone(load_backbone(source / path), models / path)
        every = plans.ablations(changed, models, seed=seed)
        plan = {
            t: {row: c for row, c in every[t].items() if any(part in row for part in options.rows)}
            for t in options.tables
        }
        accuracy = {}
        for config in {c.name: c for configs in plan.values() for c in configs.values()}.values():
            out = models / "ablations" / config.name
            shared = str(source / "teacher") if r < 56 else ""  # gigabytes at 56
            train_in_subprocess(config.replace(cache_dir=shared), out)
            embedder = plans.load_run(trunk, out, how=config.resize)
            how = {"keep": keep, "how": config.resize}
            report = summarise(
                [evaluate_pairs(embedder, one, [(112, r), (r, r)], **how) for one in sets]
            )
            accuracy[config.name] = {setting: cell["accuracy"] for setting, cell in report.items()}
            used[config.name] = {**asdict(config), "seed": options.seeds}
            print(seed, config.name, accuracy[config.name], flush=True)
        rows[str(seed)] = {
            t: {row: accuracy[c.name] for row, c in configs.items()} for t, configs in plan.items()
        }
    values = {"by_seed": rows, "resolution": r, "epochs": epochs}
    for key, take in (
        ("mean", np.mean),
        ("std", lambda x: np.std(x, ddof=1) if len(x) > 1 else 0.0),
    ):
        values[key] = {
            table: {row: {s: float(take([of[table][row][s] for of in rows.values()])) for s in cells}
                    for row, cells in configs.items()}
            for table, configs in rows[str(options.seeds[0])].items()
        }  # fmt: skip
    results.record(ROOT / "figures", f"{scale.name}_ablations_{r}px_{epochs}_epochs", values, config=used,
                   data=" ".join(one.checksum for one in sets), kernel=config.resize.name, seconds=time.monotonic() - began, scale=scale.name)  # fmt: skip


if __name__ == "__main__":
    main()
