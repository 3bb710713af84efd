"""Every figure and table of the paper, each from one recorded result: the notebooks save them, `btnet figures` remakes them.

The drawing itself is in plots.py. Nothing is trained or embedded here: a result (JSON, and for pictures the arrays
beside it) is all that a figure needs; Figures 2 and 3 are drawn from the model object.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from btnet_core.errors import DataError
from btnet_core.files import write_atomically
from btnet_paper import plots, published, results
from btnet_paper.records import FITTED
from btnet_paper.scales import get_scale

Arrays = dict[str, np.ndarray]
Drawing = Callable[[dict[str, Any], Arrays], Figure]  # of a record (results.load) and its arrays
CROSS, SAME, ACCURACY, BARS = (
    "112 & r",
    "r & r",
    "verification accuracy (%)",
    "standard error of ten folds",
)
FOLDS = 3.0  # sqrt(10 - 1): from the (population) standard deviation of ten folds to the error of their mean


def _paper_net() -> Any:
    import torch

    from btnet_core.models.backbone import BackboneConfig, build_backbone
    from btnet_core.models.btnet import BTNet

    with torch.device("meta"):  # shapes, no memory
        return BTNet(build_backbone(BackboneConfig(name="iresnet50")), (28, 14, 7))


def _curves(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """{"112 & r": {method: {r: cell}}, "r & r": ...} of {method: {"112&14": cell}}."""
    panels: dict[str, Any] = {CROSS: {}, SAME: {}}
    for method, row in rows.items():
        cells = {tuple(map(int, setting.split("&"))): cell for setting, cell in row.items()}
        panels[CROSS][method] = {r: cell for (first, r), cell in cells.items() if first == 112}
        panels[SAME][method] = {r: cell for (first, r), cell in cells.items() if first == r}
    return panels


def _accuracy(record: dict[str, Any], _: Arrays) -> Figure:
    rows = record["values"]["accuracy"].items()
    panels = _curves(
        {
            n: {s: (cell["accuracy"], cell["std"] / FOLDS) for s, cell in row.items()}
            for n, row in rows
        }
    )
    return plots.accuracy_curves(panels, ylabel=ACCURACY, note=f"scale {record['scale']}, {BARS}",
                                 paper=_curves(published.table("table1")))  # fmt: skip


def _templates(record: dict[str, Any], _: Arrays) -> Figure:
    panels: dict[str, Any] = {}
    paper: dict[str, Any] = {}
    values, far = record["values"], record["config"]["far"]
    for key, title, numbers in (
        ("tar", f"TAR at FAR {far:g}", "56"),
        ("tpir", "TPIR at FPIR 0.1", "78"),
    ):
        error, rows = partial(plots.binomial, n=values["trials"][key]), dict(values[key])
        if (
            fitted := values.get("fitted", {}).get(key, {}).get("phi_bt")
        ):  # the same as phi_bt at r&r
            rows[f"phi_bt{FITTED}"] = {
                setting: value for setting, value in fitted.items() if setting.startswith("112&")
            }
        found = _curves(
            {
                name: {s: (value, error(value)) for s, value in row.items()}
                for name, row in rows.items()
            }
        )
        found[SAME].pop(f"phi_bt{FITTED}", None)
        panels |= {f"{title}, {setting}": rows for setting, rows in found.items()}
        for setting, number in zip((CROSS, SAME), numbers, strict=True):
            paper[f"{title}, {setting}"] = _curves(published.table(f"table{number}"))[setting]
    note = f"scale {record['scale']}, binomial standard error"
    return plots.accuracy_curves(panels, ylabel="rate (%)", note=note, paper=paper)


LOSSES = {"loss": "loss", "influence": "influence loss", "branch": "0.5 x branch loss"}


def _history(key: str, record: dict[str, Any], _: Arrays) -> Figure:
    curves = {name: (log["step"], log[key]) for name, log in record["values"]["history"].items()}
    return plots.loss_curves(curves, ylabel=LOSSES[key], log=key != "influence")


def _falls(record: dict[str, Any], _: Arrays) -> Figure:
    values = record["values"]
    points = {
        int(r): (value, values["phi_hr_std"][r] / FOLDS) for r, value in values["phi_hr"].items()
    }
    paper = {SAME: {"phi_hr": {r: published.value("table1", "phi_hr", f"{r}&{r}") for r in points}}}
    note = f"scale {record['scale']}, {BARS}"
    return plots.accuracy_curves(
        {SAME: {"phi_hr": points}}, ylabel=ACCURACY, note=note, paper=paper
    )


FIGURES: dict[str, tuple[str, Drawing]] = {  # file -> (the result it is made from, how)
    "tour": ("00_tour", lambda r, a: plots.tour(r["values"], a)),
    "figure1_upsampling_error": ("01_upsampling_error", lambda r, a: plots.figure1(r["values"])),
    "figure1_error_maps": ("01_upsampling_error", lambda r, a: plots.error_maps(a)),
    "figure2_idea": ("02_architecture_and_cost", lambda r, a: plots.figure2(_paper_net())),
    "figure3_architecture": ("02_architecture_and_cost", lambda r, a: plots.figure3(_paper_net())),
    "figure4_pyramids": ("09_feature_maps", lambda r, a: plots.figure4(a)),
    "figure5_parameters": ("02_architecture_and_cost", lambda r, a: plots.figure5(r["values"])),
    "figure6_operations": ("02_architecture_and_cost", lambda r, a: plots.figure6(r["values"])),
    "figure7_allocation": ("07_ablations", lambda r, a: plots.figure7(r["values"]["figure7"])),
    "figure8_branch_selection": (
        "06_survface_identification",
        lambda r, a: plots.figure8(r["values"]["reports"], scale=r["scale"]),
    ),
    "risk_coverage": (
        "06_survface_identification",
        lambda r, a: plots.risk_coverage(r["values"]["worse"]["curves"], risk="wrong person first"),
    ),
    "figure9_feature_maps": ("09_feature_maps", lambda r, a: plots.figure9(r["values"], a)),
    "accuracy_by_resolution": ("03_train_trunk", _falls),
    "loss_trunks": ("03_train_trunk", partial(_history, "loss")),
    "loss_influence": ("04_train_branches", partial(_history, "influence")),
    "loss_branch": ("04_train_branches", partial(_history, "branch")),
    "table1_accuracy": ("05_verification", _accuracy),
    "tables5to8_templates": ("08_template_aggregation", _templates),
    "benchmarks": ("bench", lambda r, a: plots.benchmarks(r["values"])),
    "bench_inference": ("bench_inference", lambda r, a: plots.inference(r["values"])),
    "cost_growth": ("bench_growth", lambda r, a: plots.cost_growth(r["values"])),
}


FACELESS = ("03", "04", "05", "06", "07", "08")  # notebooks whose results hold no picture of a face


def draw(name: str, run_dir: str | Path, *, prefix: str = "") -> Figure:
    """One of FIGURES from ``run_dir/results/<prefix><result>``; DataError where that is missing or of an older version."""
    source, drawing = FIGURES[name]
    record, arrays = (
        results.load(run_dir, prefix + source),
        results.load_arrays(run_dir, prefix + source),
    )
    try:
        return drawing(record, arrays)
    except KeyError as error:
        raise DataError(
            f"{run_dir}/results/{prefix}{source} lacks {error}, which {name} needs: run the notebook again"
        ) from None


def remake(
    run_dir: str | Path, only: str = "", *, out: str | Path | None = None, scale: str = "demo"
) -> tuple[list[str], list[str]]:
    """Draw and save all figures for which ``run_dir/results`` has what they need, or those of the result ``only``.

    They go to ``run_dir/figures`` or, with the results and the pictures of other notebooks, to the folder ``out``. Of a
    ``scale`` whose faces may not be shown, those without a face go to ``out/<scale>`` and results to ``out/results/<scale>_*``.
    Returns the names of those made and of those not recorded. The manifest ties each to notebook, parameters, commit, duration.
    """
    made, missing, run_dir = [], [], Path(run_dir)
    hidden = out is not None and not get_scale(scale).pictures
    place, folder = (
        (run_dir, "figures") if out is None else (Path(out) / scale if hidden else Path(out), "")
    )
    kept = f"{scale}_" * hidden
    prefix = kept if any((run_dir / "results").glob(f"{kept}[0-9]*.json")) else ""
    for name, (source, _) in FIGURES.items():
        if (only and source != only) or (hidden and source[:2] not in FACELESS):
            continue
        try:
            record, figure = (
                results.load(run_dir, prefix + source),
                draw(name, run_dir, prefix=prefix),
            )
        except DataError:
            if only:
                raise
            if not source.startswith("bench"):  # of the machine, not of a run
                missing.append(name)
            continue
        about = {"notebook": source, "parameters": {"scale": record["scale"], "seed": record["seed"]},
                 "results": f"results/{kept}{source}.json", "commit": record["commit"], "seconds": record["seconds"]}  # fmt: skip
        save_figure(figure, place, name, about, folder=folder)
        made.append(name)
    if out and Path(out).resolve() != run_dir.resolve():
        _copy(run_dir, Path(out), kept)
    return made, missing


def _copy(run_dir: Path, out: Path, prefix: str) -> None:
    """The results, and the figures whose notebook draws them from its models (10); with a prefix only results without faces."""
    (out / "results").mkdir(parents=True, exist_ok=True)
    for path in sorted((run_dir / "results").glob("*.[jn][sp][oz]*")):
        if not prefix or (path.suffix == ".json" and path.name[:2] in FACELESS):
            shutil.copyfile(path, out / "results" / f"{prefix}{path.name}")
    manifest = run_dir / "figures" / "manifest.json"
    sources = {source for source, _ in FIGURES.values()}
    for name, entry in (
        json.loads(manifest.read_text()).items() if manifest.is_file() and not prefix else ()
    ):
        if entry.get("notebook") not in (*sources, None):
            for suffix in ("png", "pdf"):
                shutil.copyfile(manifest.with_name(f"{name}.{suffix}"), out / f"{name}.{suffix}")
            results.update_manifest(out, {name: entry}, folder="")


def save_figure(
    fig: Any,
    run_dir: str | Path,
    name: str,
    about: dict[str, Any] | None = None,
    *,
    folder: str = "figures",
) -> list[Path]:
    """Writes ``run_dir/FOLDER/NAME.png`` and ``.pdf``: equal bytes for equal drawing and versions.

    Their checksums go to manifest.json beside them, with what ``about`` says of their origin.
    """
    entry = {**(about or {}), "matplotlib": matplotlib.__version__}
    undated = {"png": {"Software": None}, "pdf": {"CreationDate": None}}
    paths = []
    for kind, metadata in undated.items():
        drawn = io.BytesIO()
        with matplotlib.rc_context({"pdf.fonttype": 42}):
            fig.savefig(drawn, format=kind, dpi=200, bbox_inches="tight", metadata=metadata)
        paths.append(Path(run_dir) / folder / f"{name}.{kind}")
        write_atomically(paths[-1], drawn.getvalue())
        entry[f"{kind}_sha256"] = hashlib.sha256(drawn.getvalue()).hexdigest()
    results.update_manifest(run_dir, {name: entry}, folder=folder)
    return paths
