"""Results: JSON with provenance, figures that are the same bytes for the same drawing."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from btnet_core.errors import DataError
from btnet_paper import figures, results


def test_record_and_load(tmp_path: Path) -> None:
    values = {"accuracy": np.float32(97.5), "folds": np.arange(3), "gain": None}
    results.record(
        tmp_path,
        "a",
        values,
        config={"lr": 0.1},
        data="sha",
        kernel="bilinear",
        seed=3,
        seconds=1.5,
        scale="demo",
    )
    found = results.load(tmp_path, "a")
    assert found["values"] == {"accuracy": 97.5, "folds": [0, 1, 2], "gain": None}
    assert (found["scale"], found["seed"], found["data"], found["kernel"]) == (
        "demo",
        3,
        "sha",
        "bilinear",
    )
    assert {"torch", "numpy", "python"} <= found["versions"].keys()


def test_nan_is_refused_and_its_place_named(tmp_path: Path) -> None:
    results.record(tmp_path, "a", {"x": 1})
    with pytest.raises(DataError, match=r"x.*1"):
        results.record(tmp_path, "a", {"x": [0.0, float("nan")]})
    assert results.load(tmp_path, "a")["values"] == {"x": 1}
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["a.json"]


def test_missing_and_damaged(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone"):
        results.load(tmp_path, "gone")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "half.json").write_text('{"a":')
    with pytest.raises(DataError, match="half"):
        results.load(tmp_path, "half")


def test_figures_are_byte_stable(tmp_path: Path) -> None:
    def draw() -> list[bytes]:
        figure, axes = plt.subplots()
        axes.plot([1, 2, 3], label="x")
        axes.legend()
        paths = figures.save_figure(figure, tmp_path, "figure")
        plt.close(figure)
        return [path.read_bytes() for path in paths]

    first = draw()
    assert first == draw()
    manifest = json.loads((tmp_path / "figures" / "manifest.json").read_text())
    assert set(manifest["figure"]) >= {"png_sha256", "pdf_sha256"}


def test_paths_of_the_machine_are_not_recorded(tmp_path: Path) -> None:
    results.record(
        tmp_path,
        "a",
        {"x": 1},
        config={"init": str(results.ROOT / "runs" / "demo"), "other": Path("b")},
    )
    assert results.load(tmp_path, "a")["config"] == {
        "init": str(Path("runs") / "demo"),
        "other": "b",
    }


def test_the_commit_of_the_source_is_recorded() -> None:
    if not (results.ROOT / ".git").exists():
        pytest.skip("not a repository")
    assert len(results.commit().removesuffix("-dirty")) == 40
