"""How small is too small? Accuracy and TAR at FAR 1e-3 against the native size of a face, for each trunk that was trained.

    btnet reproduce --scale lfw --only 03,04 && python benchmarks/how_small.py --scale lfw
    python benchmarks/how_small.py --scale lfw-edgeface --adapter docs/edgeface.py --models runs/lfw-edgeface-seeds/0/models
    python benchmarks/how_small.py --draw                  # the figure again, from the records

A face is shrunk to its native size and then meets phi_hr or phi_mr (scaled up to 112 px) or phi_bt (the branch that max+ceil chooses,
scaled to its resolution): against faces of 112 px, and against faces as small. On the scale's first two pair sets, frontal faces (LFW and
CFP-FF). Writes figures/results/<scale>_how_small.json and figures/how_small.png and .pdf. A quarter of an hour of one core.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn

from btnet_core.data.pairs import open_pairs
from btnet_core.evaluation.embedders import BranchEmbedder
from btnet_core.evaluation.verification import (
    pair_similarities,
    tar_at_far,
    ten_fold_accuracy,
)
from btnet_core.images import resize, scaled_size
from btnet_core.models.btnet import BTNet, select_branch
from btnet_paper import plans, results
from btnet_paper.figures import save_figure
from btnet_paper.plots.style import PAGE, label, of_method, paper_ready
from btnet_paper.scales import get_scale
from btnet_tools.adapter import find_adapter

NATIVE = (5, 7, 10, 14, 20, 28, 40, 112)  # rows, px
METHODS = ("phi_hr", "phi_mr", "phi_bt")
TRUNKS = {
    "lfw": "MobileFaceNet, CASIA",
    "lfw-ms1m": "MobileFaceNet, MS1M",
    "lfw-edgeface": "EdgeFace-XS",
}


class NativeBranches(BranchEmbedder):
    """phi_bt on faces of any native size: the branch that max+ceil chooses."""

    def __init__(self, btnet: BTNet, **options: Any) -> None:
        super().__init__(btnet, **options)
        self.resolutions = btnet.resolutions

    def chosen(self, native: int) -> int:
        return select_branch(native, native, resolutions=self.resolutions)

    def network(self, r: int) -> nn.Module:
        return self.btnet.route(self.chosen(r))

    def fingerprint(self, r: int) -> str:
        return f"{super().fingerprint(r)} native {r}"

    def _embed(self, pixels: Tensor, r: int) -> Tensor:
        trunk, branch = self.btnet.trunk, self.chosen(r)
        face = resize(trunk.crop(pixels), scaled_size(r, trunk.config.size), self.how)
        face = resize(face, self.btnet.input_size(branch), self.how)
        return self.btnet(
            trunk.normalise(face).contiguous(memory_format=torch.channels_last), branch
        )


def measure(embedder: Any, pairs: Any, keep: Path) -> dict[str, dict[str, float]]:
    """{"112&n" or "n&n": {accuracy, tar}} in %; across sizes the mean of both directions."""
    found = {}
    for first in ("112", "n"):
        for n in NATIVE:
            ways = {(112, n), (n, 112)} if first == "112" else {(n, n)}
            scores = pair_similarities(embedder, pairs, ways, keep=keep).values()
            found[f"{first if first == '112' else n}&{n}"] = {
                "accuracy": 100
                * float(np.mean([ten_fold_accuracy(s, pairs.same).mean for s in scores])),
                "tar": 100 * float(np.mean([tar_at_far(s, pairs.same, 1e-3).rate for s in scores])),
            }
    return found


def record(scale_name: str, models: str, adapter: str | None) -> None:
    """Measure one trunk's methods and write the record."""
    scale, began = get_scale(scale_name), time.monotonic()
    if adapter:
        find_adapter(adapter)  # its class is then known by name
    models = Path(models or scale.run_dir() / "models")
    methods = plans.load_methods(models)
    methods["phi_bt"] = NativeBranches(methods["phi_bt"].btnet)
    sets = [open_pairs(spec) for spec in scale.pairs[:2]]
    keep = models.parent / "embeddings"
    values = {
        one.name: {name: measure(methods[name], one, keep) for name in METHODS} for one in sets
    }
    for name in METHODS:
        print(
            scale_name, name, {k: round(v["tar"], 1) for k, v in values[sets[0].name][name].items()}
        )
    results.record(
        results.ROOT / "figures",
        f"{scale.name}_how_small",
        values,
        config={"native": NATIVE},
        data=" ".join(one.checksum for one in sets),
        kernel="bilinear+antialias, float",
        seconds=time.monotonic() - began,
        scale=scale.name,
    )


@paper_ready
def curves(found: dict[str, dict[str, Any]]) -> plt.Figure:
    """Rows: TAR at FAR 1e-3 against 112 px, and among faces as small. Columns: trunks; a line for each method and set."""
    figure, grid = plt.subplots(
        2,
        len(found),
        figsize=(PAGE, 4.2),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for column, (scale, sets) in enumerate(found.items()):
        for row, first in enumerate(("112", "n")):
            axes = grid[row, column]
            for style, one in zip(("-", ":"), sets.values(), strict=True):
                for name in METHODS:
                    cells = [
                        one[name][f"{first if first == '112' else n}&{n}"]["tar"] for n in NATIVE
                    ]
                    axes.plot(
                        NATIVE,
                        cells,
                        style,
                        label=label(name) if style == "-" else None,
                        **of_method(name),
                    )
            axes.set_xscale("log", base=2)
            axes.set_xticks(NATIVE, [str(n) for n in NATIVE])
            axes.minorticks_off()
            axes.set_ylim(-2, 102)
            if row == 0:
                axes.set_title(TRUNKS[scale])
            else:
                axes.set_xlabel("native rows (px)")
            if column == 0:
                axes.set_ylabel(
                    "TAR (%) at FAR 1e-3,\n" + ("against 112 px" if row == 0 else "both as small")
                )
    lines = [
        *grid[0, 0].get_legend_handles_labels()[0],
        plt.Line2D([], [], color="#444444"),
        plt.Line2D([], [], color="#444444", linestyle=":"),
    ]
    names = [*(label(name) for name in METHODS), "LFW", "CFP-FF"]
    figure.legend(lines, names, loc="outside lower center", ncols=5)
    return figure


def draw() -> None:
    """The figure from what is recorded."""
    folder = results.ROOT / "figures"
    names = [
        name
        for name in (f"{scale}_how_small" for scale in TRUNKS)
        if (folder / "results" / f"{name}.json").is_file()
    ]
    found = {record["scale"]: record for record in (results.load(folder, name) for name in names)}
    about = {"notebook": "benchmarks/how_small.py", "parameters": {"scale": "lfw", "seed": 0}}
    about |= {"results": [f"results/{name}.json" for name in names], "commit": results.commit()}
    about["seconds"] = sum(record["seconds"] for record in found.values())
    drawn = curves({scale: record["values"] for scale, record in found.items()})
    save_figure(drawn, folder / "lfw", "how_small", about, folder="")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", default="lfw", choices=[*TRUNKS])
    parser.add_argument("--models", default="", help="default: runs/<scale>/models")
    parser.add_argument("--adapter", help="FILE.py with the class of the trunk")
    parser.add_argument("--draw", action="store_true", help="the figure alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.draw:
        record(options.scale, options.models, options.adapter)
    draw()


if __name__ == "__main__":
    main()
