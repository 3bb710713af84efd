"""Every figure from recorded results alone: each curve and bar is the record's, files are stable and tied to it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from btnet_core.errors import ConfigError, DataError
from btnet_paper import figures, published, results
from btnet_paper.plots import style
from btnet_tools.cli import main

COMMITTED = Path(__file__).resolve().parents[2] / "figures"
CROSS, SAME = figures.CROSS, figures.SAME


def draw(name: str, prefix: str = "") -> tuple[mpl.figure.Figure, dict[str, Any], dict[str, Any]]:
    """A figure of the committed records, with its record and arrays."""
    notebook = prefix + figures.FIGURES[name].notebook
    record = results.load(COMMITTED, notebook)
    arrays = results.load_arrays(COMMITTED, notebook)
    return figures.draw(name, record, arrays), record, arrays


def panel(figure: mpl.figure.Figure, title: str) -> mpl.axes.Axes:
    (axes,) = (one for one in figure.axes if one.get_title() == title)
    return axes


def points(axes: mpl.axes.Axes, method: str) -> tuple[list[float], list[float]]:
    """(values, lengths of the error bars on one side) of a method's curve, by rising x."""
    (found,) = (one for one in axes.containers if one.get_label() == style.label(method))
    line, _, (bars,) = found.lines
    order = np.argsort(line.get_xdata())
    halves = [(segment[1, 1] - segment[0, 1]) / 2 for segment in bars.get_segments()]
    return np.asarray(line.get_ydata(), float)[order].tolist(), np.array(halves)[order].tolist()


def hollow(axes: mpl.axes.Axes, method: str) -> list[float]:
    """The paper's values in a method's colour and marker."""
    own = style.of_method(method)
    for line in axes.lines:
        same = line.get_color() == own["color"] and line.get_marker() == own["marker"]
        if same and line.get_markerfacecolor() == "none":
            return list(line.get_ydata())
    raise AssertionError(f"no printed values of {method}")


def settings_of(title: str, row: dict[str, Any]) -> list[str]:
    """The settings of a panel, r rising."""
    found = [(*map(int, setting.split("&")), setting) for setting in row]
    return [s for a, r, s in sorted(found) if (a == 112 if title.endswith(CROSS) else a == r)]


@pytest.mark.parametrize("prefix", ["", "lfw_", "lfw-mr_"])
def test_accuracy_curves_are_table_1_and_its_errors(prefix: str) -> None:
    figure, record, _ = draw("table1_accuracy", prefix)
    for title in (CROSS, SAME):
        axes = panel(figure, title)
        assert len([one for one in axes.containers if one.get_label()[0] != "_"]) == len(
            record["values"]["accuracy"]
        )
        for method, row in record["values"]["accuracy"].items():
            wanted = settings_of(title, row)
            value, error = points(axes, method)
            assert value == [row[s]["accuracy"] for s in wanted], (title, method)
            deviation = np.array([row[s]["std"] for s in wanted]) * np.sqrt(10 / 9)  # n - 1
            np.testing.assert_allclose(error, deviation / np.sqrt(10), rtol=1e-9)
        printed = published.table("table1")["phi_bt"]
        assert hollow(axes, "phi_bt") == [printed[s] for s in settings_of(title, printed)]


@pytest.mark.parametrize("prefix", ["", "lfw_"])
def test_template_curves_are_tables_5_to_8_and_their_errors(prefix: str) -> None:
    figure, record, _ = draw("tables5to8_templates", prefix)
    values, far = record["values"], record["config"]["far"]
    tables = iter(("table5", "table6", "table7", "table8"))
    for key, metric in (("tar", f"TAR at FAR {far:g}"), ("tpir", "TPIR at FPIR 0.1")):
        recorded = values.get("fitted", {}).get(key, {})  # records before notebook 12 had it
        fitted = {"phi_bt, lengths fitted": recorded["phi_bt"]} if recorded else {}
        for setting in (CROSS, SAME):
            axes = panel(figure, f"{metric}, {setting}")
            rows = values[key] | (fitted if setting == CROSS else {})
            for method, row in rows.items():
                percent = np.array([row[s] for s in settings_of(setting, row)])
                value, error = points(axes, method)
                np.testing.assert_array_equal(value, percent)
                variance = percent * (100 - percent) / values["trials"][key]
                np.testing.assert_allclose(error, np.sqrt(variance), rtol=1e-9, atol=1e-12)
            printed = published.table(next(tables))["phi_mr"]
            assert hollow(axes, "phi_mr") == [printed[s] for s in settings_of(setting, printed)]
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert (style.label("phi_bt, lengths fitted") in texts) == ("fitted" in values)


def test_how_phi_hr_falls_is_its_own_column() -> None:
    figure, record, _ = draw("accuracy_by_resolution")
    value, error = points(panel(figure, SAME), "phi_hr")
    wanted = sorted(record["values"]["phi_hr"], key=int)
    assert value == [record["values"]["phi_hr"][r] for r in wanted]
    std = np.array([record["values"]["phi_hr_std"][r] for r in wanted])
    np.testing.assert_allclose(error, std / 3, rtol=1e-9)
    printed = [published.value("table1", "phi_hr", f"{r}&{r}") for r in wanted]
    assert sorted(hollow(panel(figure, SAME), "phi_hr")) == sorted(printed)


@pytest.mark.parametrize(
    ("name", "key", "axis"),
    [("loss_trunks", "loss", "loss"), ("loss_influence", "influence", "influence loss"),
     ("loss_branch", "branch", "0.5 x branch loss")],
)  # fmt: skip
def test_loss_curves_are_the_recorded_history(name: str, key: str, axis: str) -> None:
    figure, record, _ = draw(name)
    (axes,) = figure.axes
    assert axes.get_ylabel() == axis
    lines = {line.get_label(): line for line in axes.lines}
    for run, history in record["values"]["history"].items():
        line = lines.pop(style.label(run))
        np.testing.assert_array_equal(line.get_xdata(), history["step"])
        np.testing.assert_array_equal(line.get_ydata(), history[key])
    assert not lines


def test_figure_1_and_its_maps_are_the_recorded_curves_and_errors() -> None:
    figure, record, _ = draw("figure1_upsampling_error")
    values, (left, right) = record["values"], figure.axes
    lines = {line.get_label(): line for line in left.lines}
    labels = {"measured": "measured error", "complete": "complete bound",
              "paper": "paper's bound (Eq. 11)", "interpolation": "interpolation alone"}  # fmt: skip
    for name, text in labels.items():
        mean = np.array(values[name]["mean"])
        np.testing.assert_array_equal(lines[text].get_ydata(), mean[mean > 0])
    knees = {line.get_label(): line.get_xdata()[0] for line in right.lines}
    assert [knees[f"{values['knee'][name]:.0f}"] for name in labels if name in values["knee"]] == [
        values["knee"][name] for name in labels if name in values["knee"]
    ]
    figure, _, arrays = draw("figure1_error_maps")
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    count = len(arrays["resolutions"])
    np.testing.assert_array_equal(shown[1 : 1 + count], arrays["back"].transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(shown[1 + count :], arrays["error"].astype(np.float32))


def test_figures_5_and_6_are_the_counted_and_measured_costs() -> None:
    figure, record, _ = draw("figure5_parameters")
    costs = {cost["r"]: cost for cost in record["values"]["iresnet50"]}
    rows = sorted(costs)
    full, own = figure.axes[0].containers
    assert [bar.get_height() for bar in own] == [costs[r]["stored"] / 1e6 for r in rows[:-1]]
    assert {bar.get_height() for bar in full} == {costs[112]["stored"] / 1e6}
    figure, _, _ = draw("figure6_operations")
    macs, time = figure.axes
    for axes, value in ((macs, lambda c: c["macs"] / 1e9), (time, lambda c: c["ms"]["median"])):
        bars = [one for one in axes.containers if isinstance(one, mpl.container.BarContainer)]
        assert [bar.get_height() for bar in bars[1]] == [value(costs[r]) for r in rows]
        assert {bar.get_height() for bar in bars[0]} == {value(costs[112])}
    (_, _, (lines,)) = time.containers[1].lines
    ends = [segment[:, 1].tolist() for segment in lines.get_segments()]
    np.testing.assert_allclose(
        ends, [[costs[r]["ms"]["low"], costs[r]["ms"]["high"]] for r in rows]
    )
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert r"$\phi_{bt}$, $\phi_{mm}$: own size" in texts  # 4.3.1: a cost same with phi_mm


@pytest.mark.parametrize("prefix", ["", "lfw_"])
def test_figure_7_is_accuracy_by_parameters(prefix: str) -> None:
    figure, record, _ = draw("figure7_allocation", prefix)
    (axes,) = figure.axes
    recorded = record["values"]["figure7"]
    for setting in {point["setting"] for point in recorded}:
        mine = sorted((p for p in recorded if p["setting"] == setting), key=lambda p: p["stored"])
        (curve,) = (one for one in axes.containers if one.get_label() == setting)
        line, _, (bars,) = curve.lines
        wanted = [[p["stored"] / 1e6, p["accuracy"]] for p in mine]
        np.testing.assert_allclose(line.get_xydata(), wanted)
        halves = [(s[1, 1] - s[0, 1]) / 2 for s in bars.get_segments()]
        np.testing.assert_allclose(halves, [p["spread"] for p in mine])
    stars = [line for line in axes.lines if line.get_marker() == "*" and len(line.get_xdata())]
    rule = [(p["stored"] / 1e6, p["accuracy"]) for p in recorded if p["standard"]]
    assert sorted((s.get_xdata()[0], s.get_ydata()[0]) for s in stars) == sorted(rule)


@pytest.mark.parametrize("prefix", ["", "lfw_"])
def test_figure_8_and_the_risk_are_the_strategies_own(prefix: str) -> None:
    figure, record, _ = draw("figure8_branch_selection", prefix)
    _, right = figure.axes
    colours = {"floor": style.ORANGE, "near": style.GREEN, "ceil": style.BLUE}
    found = {}
    for one in right.containers:
        line = one.lines[0]
        if len(line.get_xdata()):
            found[round(line.get_xdata()[0]), line.get_color()] = line.get_ydata()[0]
    ticks = [text.get_text() for text in right.get_xticklabels()]
    for key, report in record["values"]["reports"].items():
        if "+" in key:
            indicator, rounding = key.split("+")
            assert found.pop((ticks.index(indicator), colours[rounding])) == report["tpir"]["0.3"]
    assert not found
    figure, record, _ = draw("risk_coverage", prefix)
    for line in figure.axes[0].lines:
        coverage, risk = record["values"]["worse"]["curves"][line.get_label()]
        some = np.array(coverage) >= 0.05
        np.testing.assert_allclose(line.get_ydata(), 100 * np.array(risk)[some])
        np.testing.assert_allclose(line.get_xdata(), 100 * np.array(coverage)[some])


def test_figures_4_and_9_are_the_recorded_maps_and_likenesses() -> None:
    figure, _, arrays = draw("figure4_pyramids")
    shown = [axes.images[0].get_array().shape[:2] for axes in figure.axes]
    assert shown == [(r, r) for r in (56, 28, 14, 7)] * 2
    np.testing.assert_array_equal(
        figure.axes[1].images[0].get_array(), arrays["face_28"].transpose(1, 2, 0)
    )
    figure, record, arrays = draw("figure9_feature_maps")
    charts = [axes for axes in figure.axes if axes.lines]
    for axes, similarity in zip(charts, record["values"]["similarity"].values(), strict=True):
        for r, row in similarity.items():
            (curve,) = (one for one in axes.containers if one.get_label() == f"{r} px")
            line, _, (bars,) = curve.lines
            np.testing.assert_array_equal(line.get_ydata(), row["mean"])
            halves = [(s[1, 1] - s[0, 1]) / 2 for s in bars.get_segments()]
            np.testing.assert_allclose(halves, row["error"])
    maps = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    names = [f"{method}_{r}_{stage}" for method in record["values"]["similarity"]
             for r in record["values"]["resolutions"] for stage in (1, 2, 3, 4)]  # fmt: skip
    for name, shown in zip(names, maps, strict=True):
        low, high = np.percentile(arrays[name].astype(np.float32), (1, 99))
        wanted = ((arrays[name].astype(np.float32) - low) / (high - low)).clip(0, 1)
        np.testing.assert_allclose(shown, wanted, atol=1e-5, err_msg=name)


def test_the_tour_is_centred_on_zero() -> None:
    figure, record, arrays = draw("tour")
    faces = [axes for axes in figure.axes if axes.images][:-1]
    for index, axes in enumerate(faces):
        wanted = arrays[f"face_{index}"].astype(np.float32).transpose(1, 2, 0).round()
        np.testing.assert_array_equal(axes.images[0].get_array(), wanted.clip(0, 255))
        branch = style.colour(record["values"]["branch"][index])
        assert axes.spines["top"].get_edgecolor() == mpl.colors.to_rgba(branch)
    matrix = next(axes for axes in figure.axes if axes.get_title().startswith("cosine")).images[0]
    np.testing.assert_array_equal(matrix.get_array(), record["values"]["similarity"])
    assert matrix.get_clim() == (-1, 1)
    assert matrix.cmap(0.5)[:3] == pytest.approx((0.97, 0.97, 0.97), abs=0.01)  # 0 is white


def test_every_figure_is_committed_with_its_origin_and_checksum() -> None:
    assert {f"figure{n}" for n in range(1, 10)} <= {name.split("_")[0] for name in figures.FIGURES}
    manifest = json.loads((COMMITTED / "manifest.json").read_text())
    assert manifest.keys() >= figures.FIGURES.keys()
    assert {path.stem for path in COMMITTED.glob("*.p??")} == manifest.keys()
    for folder in (COMMITTED, *(path.parent for path in COMMITTED.glob("*/manifest.json"))):
        scale = "demo" if folder == COMMITTED else folder.name
        for name, entry in json.loads((folder / "manifest.json").read_text()).items():
            other = "benchmarks/how_small.py" if name == "how_small" else "10_explore"
            assert entry["notebook"] == figures.FIGURES.get(name, [other])[0]
            assert entry["parameters"]["scale"] == scale
            assert {"commit", "seconds", "matplotlib"} <= entry.keys()
            for suffix in ("png", "pdf"):
                content = (folder / f"{name}.{suffix}").read_bytes()
                assert entry[f"{suffix}_sha256"] == hashlib.sha256(content).hexdigest(), name
                assert b"CreationDate" not in content


@pytest.mark.parametrize("name", ["figure1_error_maps", "table1_accuracy"])
def test_committed_figures_are_what_the_results_give(name: str, tmp_path: Path) -> None:
    """Twice the same bytes; and the committed picture, unless another matplotlib drew it."""
    figure, _, _ = draw(name)
    again, _, _ = draw(name)
    for run, drawn in (("a", figure), ("b", again)):
        figures.save_figure(drawn, tmp_path / run, name)
    for suffix in (".png", ".pdf"):
        one, other = ((tmp_path / run / "figures" / f"{name}{suffix}").read_bytes() for run in "ab")
        assert one == other
    assert b"/Type3" not in one  # fonts stay fonts: TrueType
    if json.loads((COMMITTED / "manifest.json").read_text())[name]["matplotlib"] == mpl.__version__:
        ours, committed = (
            np.asarray(Image.open(folder / f"{name}.png").convert("RGB"), float)
            for folder in (tmp_path / "a" / "figures", COMMITTED)
        )
        assert ours.shape == committed.shape
        assert np.abs(ours - committed).mean() < 0.5  # grey levels


def fake_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty figure for each: what is published where does not depend on what is drawn."""
    for name, entry in figures.FIGURES.items():
        drawn = entry._replace(draw=lambda record, arrays: mpl.figure.Figure(figsize=(1, 1)))
        monkeypatch.setitem(figures.FIGURES, name, drawn)


def test_save_draws_the_figures_of_one_record(tmp_path, monkeypatch) -> None:
    fake_drawing(monkeypatch)
    results.record(tmp_path, "04_train_branches", {}, scale="demo", seed=2)
    assert figures.save(tmp_path, "04_train_branches") == ["loss_influence", "loss_branch"]
    entry = json.loads((tmp_path / "figures/manifest.json").read_text())["loss_branch"]
    assert entry["parameters"] == {"scale": "demo", "seed": 2}
    assert entry["results"] == "results/04_train_branches.json"
    with pytest.raises(ConfigError, match="table9"):
        figures.draw("table9", {})


def test_btnet_figures_publishes_what_is_recorded_and_says_what_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_drawing(monkeypatch)
    run = tmp_path / "runs" / "demo"
    (run / "results").mkdir(parents=True)
    others = {"explore_face": "10_explore", "of_an_older_version": "05_verification"}
    for name in others:  # drawn from models, so not from a result
        for suffix in (".png", ".pdf"):
            (run / "figures").mkdir(exist_ok=True)
            (run / "figures" / name).with_suffix(suffix).write_text(name)
    content = {name: {"notebook": notebook, "seconds": 1.5} for name, notebook in others.items()}
    (run / "figures" / "manifest.json").write_text(json.dumps(content))
    arguments = ["figures", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert "btnet reproduce --scale demo" in capsys.readouterr().err
    shutil.copy(COMMITTED / "results" / "05_verification.json", run / "results")
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert said.startswith("1 figures")
    assert "figure9_feature_maps" in said
    assert {path.name for path in (tmp_path / "out").glob("*.p??")} == {
        f"{name}.{suffix}"
        for name in ("table1_accuracy", "explore_face")
        for suffix in ("png", "pdf")
    }
    recorded = json.loads((tmp_path / "out" / "results" / "05_verification.json").read_text())
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    entry = manifest["table1_accuracy"]
    assert manifest["explore_face"]["seconds"] == 1.5
    assert (entry["commit"], entry["seconds"]) == (recorded["commit"], recorded["seconds"])


def test_a_record_of_an_older_version_is_named(tmp_path: Path) -> None:
    record = results.load(COMMITTED, "08_template_aggregation")
    del record["values"]["trials"]
    complaint = r"08_template_aggregation lacks 'trials', which tables5to8_templates needs"
    with pytest.raises(DataError, match=complaint):
        figures.draw("tables5to8_templates", record)


def test_a_scale_of_real_faces_leaves_what_holds_no_face(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_drawing(monkeypatch)
    run, out = tmp_path / "runs" / "lfw", tmp_path / "figures"
    (run / "results").mkdir(parents=True)
    for name in ("01_upsampling_error", "05_verification"):
        record = json.loads((COMMITTED / "results" / f"{name}.json").read_text()) | {"scale": "lfw"}
        (run / "results" / f"{name}.json").write_text(json.dumps(record))
    shutil.copy(COMMITTED / "results" / "01_upsampling_error.npz", run / "results")  # faces
    for folder in (tmp_path / "runs", out):  # from the run, then from what that has left
        assert main(["figures", "--scale", "lfw", "--runs", str(folder), "--out", str(out)]) == 0
        assert capsys.readouterr().out.startswith("1 figures")
        assert {path.name for path in (out / "results").iterdir()} == {"lfw_05_verification.json"}
        assert {path.stem for path in out.glob("**/*.png")} == {"table1_accuracy"}
    entry = json.loads((out / "lfw" / "manifest.json").read_text())["table1_accuracy"]
    assert entry["results"] == "results/lfw_05_verification.json"
    assert entry["parameters"]["scale"] == "lfw"
