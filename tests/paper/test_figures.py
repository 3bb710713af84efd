"""Every figure and table from recorded results alone: complete, the same bytes each time, tied to what made it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from btnet_core.errors import DataError
from btnet_paper import figures
from btnet_tools.cli import main

COMMITTED = Path(__file__).resolve().parents[2] / "figures"


def test_every_figure_and_table_of_the_paper_is_committed() -> None:
    assert {f"figure{n}" for n in range(1, 10)} <= {name.split("_")[0] for name in figures.FIGURES}
    manifest = json.loads((COMMITTED / "manifest.json").read_text())
    assert manifest.keys() >= figures.FIGURES.keys()
    assert {path.stem for path in COMMITTED.glob("*.p??")} == manifest.keys()
    for name, entry in manifest.items():
        assert entry["notebook"] == figures.FIGURES.get(name, ["10_explore"])[0]
        scale = "" if "bench" in entry["notebook"] else "demo"  # synthetic faces only
        assert entry["parameters"]["scale"] == scale
        assert {"commit", "seconds", "matplotlib"} <= entry.keys()
        for suffix in ("png", "pdf"):
            content = (COMMITTED / f"{name}.{suffix}").read_bytes()
            assert entry[f"{suffix}_sha256"] == hashlib.sha256(content).hexdigest(), name
            assert b"CreationDate" not in content


@pytest.mark.parametrize("name", ["figure1_error_maps", "figure9_feature_maps", "table1_accuracy"])
def test_committed_figures_are_what_the_results_give(name: str, tmp_path: Path) -> None:
    """Twice the same bytes; and the committed picture, unless another matplotlib drew it."""
    source = figures.FIGURES[name][0]
    runs = [tmp_path / run for run in ("a", "b")]
    for run in runs:
        shutil.copytree(COMMITTED / "results", run / "results")
        made, missing = figures.remake(run, source)
        assert name in made
        assert not missing
    for suffix in (".png", ".pdf"):
        one, other = ((run / "figures" / name).with_suffix(suffix).read_bytes() for run in runs)
        assert one == other
    assert b"/Type3" not in one  # fonts stay fonts: TrueType
    if json.loads((COMMITTED / "manifest.json").read_text())[name]["matplotlib"] == mpl.__version__:
        ours, committed = (
            np.asarray(Image.open(folder / f"{name}.png").convert("RGB"), float)
            for folder in (runs[0] / "figures", COMMITTED)
        )
        assert ours.shape == committed.shape
        assert np.abs(ours - committed).mean() < 0.5  # grey levels


def test_btnet_figures_draws_what_is_recorded_and_says_what_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
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
    assert said.startswith("1 figures and tables in ")
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


def test_templates_with_fitted_lengths_are_a_curve_of_their_own() -> None:
    figure = figures.draw("tables5to8_templates", COMMITTED, prefix="lfw_")
    assert r"$\phi_{bt}$, lengths fitted" in [
        text.get_text() for text in figure.legends[0].get_texts()
    ]
    record = json.loads((COMMITTED / "results" / "lfw_08_template_aggregation.json").read_text())[
        "values"
    ]
    shown = {
        round(float(y), 9)
        for line in figure.axes[0].get_lines()
        for y in line.get_ydata()
        if y is not None
    }
    assert {
        round(record["fitted"]["tar"]["phi_bt"][s], 9) for s in ("112&7", "112&14", "112&28")
    } <= shown
    assert (
        len(figure.axes[0].containers) == len(figure.axes[1].containers) + 1
    )  # at r&r nothing changes


def test_a_result_of_an_older_version_is_named(tmp_path: Path) -> None:
    shutil.copytree(COMMITTED / "results", tmp_path / "results")
    path = tmp_path / "results" / "08_template_aggregation.json"
    record = json.loads(path.read_text())
    del record["values"]["trials"]
    path.write_text(json.dumps(record))
    with pytest.raises(
        DataError, match=r"08_template_aggregation lacks 'trials', which tables5to8_templates needs"
    ):
        figures.remake(tmp_path, "08_template_aggregation")
    path.write_text(path.read_text()[:-9])
    with pytest.raises(DataError, match="is not JSON"):
        figures.draw("tables5to8_templates", tmp_path)


def test_a_scale_of_real_faces_leaves_what_holds_no_face(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run, out = tmp_path / "runs" / "lfw", tmp_path / "figures"
    (run / "results").mkdir(parents=True)
    for name in ("01_upsampling_error", "05_verification"):
        record = json.loads((COMMITTED / "results" / f"{name}.json").read_text()) | {"scale": "lfw"}
        (run / "results" / f"{name}.json").write_text(json.dumps(record))
    shutil.copy(
        COMMITTED / "results" / "01_upsampling_error.npz", run / "results"
    )  # pictures of faces
    for folder in (tmp_path / "runs", out):  # from the run, then from what that has left
        assert main(["figures", "--scale", "lfw", "--runs", str(folder), "--out", str(out)]) == 0
        assert capsys.readouterr().out.startswith("1 figures and tables")
        assert {path.name for path in (out / "results").iterdir()} == {"lfw_05_verification.json"}
        assert {path.stem for path in out.glob("**/*.png")} == {"table1_accuracy"}
    entry = json.loads((out / "lfw" / "manifest.json").read_text())["table1_accuracy"]
    assert entry["results"] == "results/lfw_05_verification.json"
    assert entry["parameters"]["scale"] == "lfw"
