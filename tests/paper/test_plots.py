"""Figures say what they are given: data, labels and marks are looked up in the artists; no pixel is compared."""

from __future__ import annotations

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.collections import PolyCollection

from btnet_core.models.backbone import BackboneConfig, build_backbone
from btnet_core.models.btnet import BTNet, select_branch
from btnet_paper import plots, published
from btnet_paper.plots import style

METHODS = ("phi_hr", "phi_mm", "phi_mr", "phi_bt")


@pytest.fixture(scope="module")
def btnet() -> BTNet:
    with torch.device("meta"):
        return BTNet(build_backbone(BackboneConfig(name="iresnet50")), (28, 14, 7))


@pytest.fixture
def costs() -> dict:
    """What notebook 02 records."""
    rows = ((112, 40_000_000, 6e9), (28, 400_000, 5e9), (7, 20_000_000, 1.5e9))
    timed = [
        {"r": r, "stored": n, "macs": int(m), "ms": {"median": r, "low": r - 1, "high": r + 2}}
        for r, n, m in rows
    ]
    return {"iresnet50": timed, "device": "cpu"}


def _texts(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(mpl.text.Text) if text.get_text()]


def _lines(axes) -> dict[str, mpl.lines.Line2D]:
    return {line.get_label(): line for line in axes.lines}


def _hollow(axes) -> list[mpl.lines.Line2D]:
    return [
        x
        for x in axes.lines
        if x.get_markerfacecolor() == "none" and x.get_linestyle() == "None" and len(x.get_xdata())
    ]


def test_figure1_shows_means_spread_and_knees():
    r, values = [112, 56, 28, 14, 7], {}
    for name, scale in {
        "paper": 0.1,
        "complete": 2.0,
        "measured": 4.0,
        "interpolation": 1.0,
    }.items():
        mean = scale * np.array([0.5, 1, 2, 4, 8])
        values[name] = {
            "mean": mean.tolist(),
            "low": (0.9 * mean).tolist(),
            "high": (1.2 * mean).tolist(),
        }
    knees = {"paper": 28, "complete": 30, "measured": 14}
    left, right = plots.figure1(values | {"resolutions": r, "knee": knees}).axes
    labels = {
        "measured": "measured error",
        "paper": "paper's bound (Eq. 11)",
        "complete": "complete bound",
    }
    for name, label in labels.items():
        np.testing.assert_allclose(_lines(left)[label].get_ydata(), values[name]["mean"])
    bands = [band for band in left.collections if isinstance(band, PolyCollection)]
    assert len(bands) == 3
    low, high = bands[0].get_paths()[0].get_extents().intervaly
    assert (low, high) == (pytest.approx(0.9 * 4 * 0.5), pytest.approx(1.2 * 4 * 8))
    rise = right.lines[0].get_ydata()
    assert (rise[0], rise[-1]) == (0, 1)
    marks = [x for x in right.lines if list(x.get_xdata()) == [14]]
    assert marks[0].get_ydata()[0] == pytest.approx(rise[3])  # the knee lies on its curve
    assert _hollow(right)[0].get_xdata()[0] == published.text("figure1_knee")
    assert "grey levels" in left.get_ylabel()
    assert left.get_xlabel() == "resolution (px)"


def test_error_maps_state_their_means_on_one_colour_scale():
    face = torch.rand(3, 112, 112) * 255
    errors = torch.stack([torch.full((112, 112), 7.25), torch.full((112, 112), 21.5)]).half()
    arrays = {
        "face": face,
        "resolutions": (14, 7),
        "back": torch.stack([face, face]).byte(),
        "error": errors,
    }
    figure = plots.error_maps(arrays)
    assert {"mean 7.2", "mean 21.5", "14 px and back", "grey levels of 255"} <= set(_texts(figure))
    limits = {
        image.get_clim()
        for axes in figure.axes
        for image in axes.images
        if image.cmap.name == "magma"
    }
    assert limits == {(0, 21.5)}
    original = figure.axes[0].images[0].get_array()
    np.testing.assert_array_equal(original, face.permute(1, 2, 0).round().byte().numpy())


def test_figure2_joins_each_branch_at_its_own_resolution(btnet):
    figure = plots.figure2(btnet)
    texts = _texts(figure)
    for r in (28, 14, 7):
        assert f"branch $B_{{{r}}}$: {r} rows throughout" in texts
    assert "embedding\n512-d" in texts
    place = {
        t.get_text(): t.get_position()[0]
        for t in figure.axes[0].texts
        if t.get_position()[1] == 0 and t.get_position()[0] > 1
    }
    arrows = {
        round(t.xy[0], 6)
        for t in figure.axes[0].texts
        if isinstance(t, mpl.text.Annotation) and t.xy[1] < 0 and t.xy[0] > 2
    }
    assert {round(place[str(r)], 6) for r in (28, 14, 7)} == arrows


def test_figure3_follows_the_model(btnet):
    texts = _texts(plots.figure3(btnet))
    assert (
        texts.count("S2U1 /2\n28") == 1
    )  # only the trunk halves there: all branches run at stride 1 up to S2U1
    assert texts.count("S3U1 /2\n14") == 2  # trunk and the route of 28
    assert texts.count("S4U1\n7") == 1  # the branch of 7
    assert texts.count("S4U1 /2\n7") == 3
    assert "S3U2-14\n14" in texts
    assert {"$z_{28}$", "$z_{14}$", "$z_{7}$", "112 px"} <= set(texts)
    with torch.device("meta"):
        other = BTNet(btnet.trunk, (14,), couple_at={14: "S2U1"})
    moved = plots.figure3(other)
    filled = [
        box
        for box in moved.axes[0].patches
        if box.get_facecolor()[:3] == mpl.colors.to_rgb(style.GREEN) and box.get_facecolor()[3] > 0
    ]
    assert len(filled) == 4  # stem, S1U1, S1U2-3, S2U1: what follows is shared


def test_figure4_pairs_images_with_maps():
    arrays = {f"face_{r}": torch.full((3, r, r), 100.0) for r in (28, 7)}
    axes = plots.figure4(
        arrays | {f"trunk_{r}": torch.arange(r * r).view(r, r) for r in (28, 7)}
    ).axes
    assert [a.images[0].get_array().shape[:2] for a in axes] == [(28, 28), (7, 7)] * 2
    assert [a.get_title() for a in axes[:2]] == ["28 px", "7 px"]


def test_figure5_bars_shares_and_the_paper(costs):
    axes = plots.figure5(costs).axes[0]
    full, ours = axes.containers
    assert [bar.get_height() for bar in full] == [40, 40]
    assert [bar.get_height() for bar in ours] == [20, 0.4]  # millions, 7 then 28
    assert {"50.0 %", "1.0 %"} <= {t.get_text() for t in axes.texts}
    assert list(_hollow(axes)[0].get_ydata()) == pytest.approx([0.489 * 40, 0.011 * 40])
    assert [t.get_text() for t in axes.get_xticklabels()] == ["7", "28"]


def test_figure6_compares_with_the_trunk_and_shows_quartiles(costs):
    macs, time = plots.figure6(costs).axes
    assert [bar.get_height() for bar in macs.containers[0]] == [6, 6, 6]
    assert [bar.get_height() for bar in macs.containers[1]] == [1.5, 5, 6]
    bars = next(c for c in time.containers if isinstance(c, mpl.container.ErrorbarContainer))
    segments = np.array(bars.lines[2][0].get_segments())[:, :, 1]
    np.testing.assert_allclose(segments, [[6, 9], [27, 30], [111, 114]])
    assert time.get_ylabel() == "time a face (ms, CPU)"
    assert "MAC" in macs.get_ylabel()


def test_figure7_marks_the_standard_allocation():
    points = [
        {
            "setting": "14&14",
            "couple_at": "S3U1",
            "stored": 2e6,
            "accuracy": 90.0,
            "spread": 0.5,
            "standard": True,
        },
        {"setting": "14&14", "couple_at": "S1U1", "stored": 1e5, "accuracy": 80.0},
    ]
    axes = plots.figure7(points).axes[0]
    line = axes.containers[0].lines[0]
    np.testing.assert_allclose(line.get_xydata(), [[0.1, 80], [2, 90]])  # millions, sorted
    star = next(x for x in axes.lines if x.get_marker() == "*" and len(x.get_xdata()))
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (2, 90)


def test_figure8_is_drawn_by_the_selection_itself():
    reports = {
        name: {"tpir": {"0.3": tpir}, "mated": 100}
        for name, tpir in (("max+ceil", 20.0), ("min+floor", 50.0))
    }
    left, right = plots.figure8(reports | {"phi_hr": {}}, scale="demo").axes
    side = np.arange(3, 131)
    for rounding in ("floor", "near", "ceil"):
        np.testing.assert_array_equal(
            _lines(left)[rounding].get_ydata(), select_branch(side, side, rounding=rounding)
        )
    points = {c.lines[0].get_ydata()[0]: c.lines[2][0].get_segments()[0][:, 1] for c in right.containers if c.has_yerr
              and len(c.lines[0].get_ydata())}  # fmt: skip
    np.testing.assert_allclose(points[20.0], [16, 24])  # 100 sqrt(0.2 * 0.8 / 100) = 4
    np.testing.assert_allclose(points[50.0], [45, 55])
    printed = {
        row["0.3"] for name, row in published.table("table2").items() if name.startswith("BTNet")
    }
    assert {x.get_ydata()[0] for x in _hollow(right)} == printed


def test_figure9_outlines_the_coupling_layers_of_bt_alone():
    rng = np.random.default_rng(0)
    resolutions, stages = (112, 14), {1: 56, 2: 28, 3: 14, 4: 7}
    arrays = {
        f"{m}_{r}_{k}": rng.random((s, s))
        for m in METHODS
        for r in resolutions
        for k, s in stages.items()
    }
    row = {"14": {"mean": [0.1, 0.2, 0.3, 0.4], "error": [0.01, 0.02, 0.03, 0.04]}}
    values = {
        "resolutions": resolutions,
        "coupled": {"14": 3},
        "similarity": dict.fromkeys(METHODS, row),
    }
    figure = plots.figure9(values, arrays)
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == 2 * 4 * 4
    outlined = [i for i, axes in enumerate(shown) if axes.spines["top"].get_visible()]
    assert outlined == [3 * 8 + 2, 3 * 8 + 4 + 2]  # stage 3 of phi_bt, at 112 and at 14
    charts = [axes for axes in figure.axes if axes.lines]
    np.testing.assert_allclose(
        charts[0].containers[0].lines[0].get_ydata().astype(float), row["14"]["mean"]
    )
    np.testing.assert_allclose(
        charts[0].containers[0].lines[2][0].get_segments()[3][:, 1], [0.36, 0.44]
    )
    assert (_hollow(charts[3])[0].get_xdata()[0], _hollow(charts[3])[0].get_ydata()[0]) == (3, 0.3)


def test_tour_outlines_each_face_by_its_branch():
    branches, arrays = (
        [112, 7, 112, 7],
        {f"face_{i}": torch.full((3, 7, 7), 50.0) for i in range(4)},
    )
    values = {"people": 2, "branch": branches, "size": [(112, 112), (7, 7)] * 2}
    axes = plots.tour(values | {"similarity": np.eye(4).tolist()}, arrays).axes
    assert [a.spines["top"].get_edgecolor() for a in axes[:4]] == [
        mpl.colors.to_rgba(style.colour(r)) for r in branches
    ]
    np.testing.assert_array_equal(axes[4].images[0].get_array(), np.eye(4))


def test_the_tours_blocks_bear_their_means_without_a_face_and_itself():
    cosines = np.array([[1, 0.5, 0.2, 0], [0.5, 1, 0.4, 0], [0.2, 0.4, 1, 0.75], [0, 0, 0.75, 1]])
    values = {"people": 2, "branch": [7] * 4, "size": [(7, 7)] * 4, "similarity": cosines.tolist()}
    axes = plots.tour(values, {f"face_{i}": torch.full((3, 7, 7), 50.0) for i in range(4)}).axes
    assert [text.get_text() for text in axes[4].texts] == ["0.50", "0.15", "0.15", "0.75"]


def test_accuracy_curves_errors_and_paper():
    panels = {
        "r & r": {"phi_hr": {14: (72.0, 2.0), 112: (98.0, 0.5)}},
        "112 & r": {"phi_hr": {14: (60.0, 1.0)}},
    }
    paper = {"r & r": {"phi_hr": {14: 73.88, 112: None}}}
    figure = plots.accuracy_curves(panels, ylabel="accuracy (%)", note="scale demo", paper=paper)
    axes = figure.axes[0]
    line, _, (bars,) = axes.containers[0].lines
    np.testing.assert_allclose(line.get_xydata(), [[14, 72], [112, 98]])
    np.testing.assert_allclose([s[:, 1] for s in bars.get_segments()], [[70, 74], [97.5, 98.5]])
    assert list(_hollow(axes)[0].get_ydata()) == [73.88]
    assert line.get_color() == style.METHODS["phi_hr"][1]
    assert [a.get_title() for a in figure.axes] == ["r & r", "112 & r"]
    assert {"scale demo", "paper, as printed"} <= {
        t.get_text() for t in figure.legends[0].get_texts()
    }


def test_loss_curves_on_plain_numbers():
    axes = plots.loss_curves({"phi_bt_14": ([20, 40], [9.0, 3.0])}).axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[20, 9], [40, 3]])
    assert axes.lines[0].get_color() == style.colour(14)
    assert axes.figure.legends[0].get_texts()[0].get_text() == r"$\phi_{bt}$, 14 px"
    assert axes.get_yscale() == "log"
    assert [float(tick.get_text()) for tick in axes.get_yticklabels()]  # no powers of ten


def test_figures_leave_no_trace_and_keep_their_style(costs):
    before = dict(mpl.rcParams)
    figure = plots.figure5(costs)
    assert dict(mpl.rcParams) == before
    assert plt.get_fignums() == []
    assert figure.axes[0].xaxis.get_ticklabels()[0].get_fontsize() == style.STYLE["xtick.labelsize"]
    assert mpl.rcParams["xtick.labelsize"] != style.STYLE["xtick.labelsize"]


def test_pictures_stand_in_strips_under_their_titles() -> None:
    faces = torch.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
    figure = plots.pictures({"first": faces, "second": faces[:1]}, ["a", "b"])
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in shown] == ["a", "b", ""]
    assert [axes.get_ylabel() for axes in shown] == ["first", "", "second"]
    assert np.array_equal(shown[1].images[0].get_array(), faces[1].permute(1, 2, 0))
