"""Every figure of the paper from one recorded result: notebooks save them, `btnet figures` remakes.

Drawing is in plots/; here each figure is tied to the record that it needs, and published with its
origin. Nothing is trained or embedded: a record (JSON, and for pictures the arrays beside it) is
all that a figure needs; Figures 2 and 3 are of the model itself.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from matplotlib.figure import Figure
from PIL import Image

from btnet_core.errors import ConfigError, DataError
from btnet_core.files import write_atomically
from btnet_core.models.backbone import BackboneConfig, build_backbone
from btnet_core.models.btnet import BTNet
from btnet_paper import plots, published, records, results
from btnet_paper.plots.style import binomial
from btnet_paper.records import FITTED
from btnet_paper.scales import get_scale

Record = Mapping[str, Any]
Arrays = Mapping[str, Any]
CROSS, SAME = "112 & r", "r & r"
FOLDS = 3.0  # sqrt(10 - 1): from the (population) deviation of ten folds to their mean's error
FACELESS = ("03", "04", "05", "06", "07", "08", "12")  # notebooks that record no picture of a face


class Entry(NamedTuple):
    notebook: str  # whose record it is drawn from
    draw: Callable[[Record, Arrays], Figure]


def draw(name: str, record: Record, arrays: Arrays | None = None) -> Figure:
    """One of FIGURES from its record (results.load) and the arrays beside it (load_arrays).

    Raises DataError where the record lacks something, as one of an older version does.
    """
    if name not in FIGURES:
        raise ConfigError(f"figure: got {name!r}, expected one of {', '.join(FIGURES)}")
    try:
        return FIGURES[name].draw(record, arrays or {})
    except KeyError as error:
        where = record.get("path", FIGURES[name].notebook)
        raise DataError(f"{where} lacks {error}, which {name} needs: run it again") from None


def save(run_dir: str | Path, notebook: str) -> list[str]:
    """Draw the figures of one notebook's record into ``run_dir/figures``; return their names."""
    record, arrays = results.load(run_dir, notebook), results.load_arrays(run_dir, notebook)
    made = [name for name, entry in FIGURES.items() if entry.notebook == notebook]
    for name in made:
        about = _about(record, notebook)
        save_figure(draw(name, record, arrays), run_dir, name, about)
    return made


def publish(
    run_dir: str | Path, out: str | Path, *, scale: str = "demo"
) -> tuple[list[str], list[str]]:
    """Draw all figures of a scale from ``run_dir/results`` into ``out``, with their manifest.

    Results go along, to ``out/results``, and so do figures that notebook 10 draws from its models.
    Of a scale whose faces may not be shown only what holds no face goes: figures to ``out/<scale>``
    and results to ``out/results/<scale>_*``. Returns the names of those made and not recorded.
    """
    run_dir, out = Path(run_dir), Path(out)
    page = get_scale(scale)
    shown = page.pictures
    folder, prefix = (out, "") if shown else (out / page.name, f"{page.name}_")
    found = records.collect([run_dir])
    made, missing = [], []
    for name, (notebook, _) in FIGURES.items():
        record = found.get((page.name, notebook))
        if record is None:
            missing.append(name)
        elif shown or notebook[:2] in FACELESS:
            arrays = results.load_arrays(run_dir, record["path"].stem)
            about = _about(record, prefix + notebook)
            save_figure(draw(name, record, arrays), folder, name, about, folder="")
            made.append(name)
    if out.resolve() != run_dir.resolve():
        _copy_results(run_dir, out, prefix, every=shown)
        if shown:
            _copy_drawn(run_dir, out)
    return made, missing


def save_figure(
    fig: Figure, run_dir: str | Path, name: str, about: Mapping[str, Any] | None = None, *,
    folder: str = "figures",
) -> list[Path]:  # fmt: skip
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


def shown_width(file: Any) -> int:
    """Pixels on a page, 130 to the inch, so that the text of all figures has one size."""
    with Image.open(file) as image:
        return min(900, round(image.width * 130 / image.info.get("dpi", (150,))[0]))


def _about(record: Record, name: str) -> dict[str, Any]:
    """Where a figure comes from, for the manifest."""
    return {
        "notebook": record["name"],
        "parameters": {"scale": record["scale"], "seed": record["seed"]},
        "results": f"results/{name}.json", "commit": record["commit"], "seconds": record["seconds"],
    }  # fmt: skip


def _copy_results(run_dir: Path, out: Path, prefix: str, *, every: bool) -> None:
    (out / "results").mkdir(parents=True, exist_ok=True)
    for path in sorted((run_dir / "results").iterdir()):
        kept = path.suffix == ".json" and path.name[:2] in FACELESS
        if kept or (every and path.suffix in (".json", ".npz")):
            shutil.copyfile(path, out / "results" / f"{prefix}{path.name}")


def _copy_drawn(run_dir: Path, out: Path) -> None:
    """Figures of the run that no record gives: notebook 10 draws them from its models."""
    manifest = run_dir / "figures" / "manifest.json"
    entries = json.loads(manifest.read_text()) if manifest.is_file() else {}
    known = {entry.notebook for entry in FIGURES.values()} | {None}
    for name, about in entries.items():
        if about.get("notebook") not in known:
            for suffix in ("png", "pdf"):
                shutil.copyfile(manifest.with_name(f"{name}.{suffix}"), out / f"{name}.{suffix}")
            results.update_manifest(out, {name: about}, folder="")


def _paper_net() -> BTNet:
    with torch.device("meta"):  # shapes, no memory
        return BTNet(build_backbone(BackboneConfig(name="iresnet50")), (28, 14, 7))


def _by_setting(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, dict[int, Any]]]:
    """{method: {"112&14": cell}} -> {"112 & r": {method: {14: cell}}, "r & r": ...}."""
    panels: dict[str, dict[str, dict[int, Any]]] = {CROSS: {}, SAME: {}}
    for method, row in rows.items():
        for setting, cell in row.items():
            first, r = map(int, setting.split("&"))
            if first == 112:  # 112&112 is the end of both curves
                panels[CROSS].setdefault(method, {})[r] = cell
            if first == r:
                panels[SAME].setdefault(method, {})[r] = cell
    return panels


def _accuracy(record: Record, _: Arrays) -> Figure:
    points = {
        method: {s: (cell["accuracy"], cell["std"] / FOLDS) for s, cell in row.items()}
        for method, row in record["values"]["accuracy"].items()
    }
    return plots.accuracy_curves(
        _by_setting(points),
        ylabel="verification accuracy (%)",
        note=f"scale {record['scale']}, standard error of ten folds",
        paper=_by_setting(published.table("table1")),
    )


def _templates(record: Record, _: Arrays) -> Figure:
    values = record["values"]
    titles = {"tar": f"TAR at FAR {record['config']['far']:g}", "tpir": "TPIR at FPIR 0.1"}
    printed = {"tar": ("table5", "table6"), "tpir": ("table7", "table8")}
    panels: dict[str, Any] = {}
    paper: dict[str, Any] = {}
    for key, title in titles.items():
        rows = {method: dict(row) for method, row in values[key].items()}
        fitted = values.get("fitted", {}).get(key, {}).get("phi_bt", {})
        if across := {s: v for s, v in fitted.items() if s.startswith("112&")}:
            rows[f"phi_bt{FITTED}"] = across
        trials = values["trials"][key]
        points = {
            method: {s: (value, binomial(value, trials)) for s, value in row.items()}
            for method, row in rows.items()
        }
        ours = _by_setting(points)
        ours[SAME].pop(f"phi_bt{FITTED}", None)  # within a resolution lengths change nothing
        for setting, table in zip((CROSS, SAME), printed[key], strict=True):
            panels[f"{title}, {setting}"] = ours[setting]
            paper[f"{title}, {setting}"] = _by_setting(published.table(table))[setting]
    note = f"scale {record['scale']}, binomial standard error"
    return plots.accuracy_curves(panels, ylabel="rate (%)", note=note, paper=paper)


def _falls(record: Record, _: Arrays) -> Figure:
    """How phi_hr falls below 112 px."""
    values = record["values"]
    points = {
        int(r): (value, values["phi_hr_std"][r] / FOLDS) for r, value in values["phi_hr"].items()
    }
    printed = {r: published.value("table1", "phi_hr", f"{r}&{r}") for r in points}
    return plots.accuracy_curves(
        {SAME: {"phi_hr": points}},
        ylabel="verification accuracy (%)",
        note=f"scale {record['scale']}, standard error of ten folds",
        paper={SAME: {"phi_hr": printed}},
    )


def _loss(key: str, ylabel: str, *, log: bool) -> Callable[[Record, Arrays], Figure]:
    def drawing(record: Record, _: Arrays) -> Figure:
        history = record["values"]["history"]
        curves = {name: (log_of["step"], log_of[key]) for name, log_of in history.items()}
        return plots.loss_curves(curves, ylabel=ylabel, log=log)

    return drawing


def _strategies(record: Record, _: Arrays) -> Figure:
    return plots.figure8(record["values"]["reports"], scale=record["scale"])


def _risk(record: Record, _: Arrays) -> Figure:
    curves = record["values"]["worse"]["curves"]
    return plots.risk_coverage(curves, risk="wrong person first")


COSTS, SURVFACE = "02_architecture_and_cost", "06_survface_identification"
FIGURES: dict[str, Entry] = {
    "tour": Entry("00_tour", lambda r, a: plots.tour(r["values"], a)),
    "figure1_upsampling_error": Entry(
        "01_upsampling_error", lambda r, a: plots.figure1(r["values"])
    ),
    "figure1_error_maps": Entry("01_upsampling_error", lambda r, a: plots.error_maps(a)),
    "figure2_idea": Entry(COSTS, lambda r, a: plots.figure2(_paper_net())),
    "figure3_architecture": Entry(COSTS, lambda r, a: plots.figure3(_paper_net())),
    "figure4_pyramids": Entry("09_feature_maps", lambda r, a: plots.figure4(a)),
    "figure5_parameters": Entry(COSTS, lambda r, a: plots.figure5(r["values"])),
    "figure6_operations": Entry(COSTS, lambda r, a: plots.figure6(r["values"])),
    "figure7_allocation": Entry("07_ablations", lambda r, a: plots.figure7(r["values"]["figure7"])),
    "figure8_branch_selection": Entry(SURVFACE, _strategies),
    "risk_coverage": Entry("12_beyond_the_paper", _risk),
    "figure9_feature_maps": Entry("09_feature_maps", lambda r, a: plots.figure9(r["values"], a)),
    "accuracy_by_resolution": Entry("03_train_trunk", _falls),
    "loss_trunks": Entry("03_train_trunk", _loss("loss", "loss", log=True)),
    "loss_influence": Entry("04_train_branches", _loss("influence", "influence loss", log=False)),
    "loss_branch": Entry("04_train_branches", _loss("branch", "0.5 x branch loss", log=True)),
    "table1_accuracy": Entry("05_verification", _accuracy),
    "tables5to8_templates": Entry("08_template_aggregation", _templates),
}
