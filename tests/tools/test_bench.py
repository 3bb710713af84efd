"""`btnet bench`: scripts are run, goals are held, what is recorded in the repository is whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from btnet_core.errors import ConfigError, DataError, ReproduceError
from btnet_paper import plots, results
from btnet_tools import bench
from btnet_tools.cli import main

SCRIPT = """
import time
from btnet_tools import bench
options = bench.options("A benchmark.").parse_args()
bench.write(options, [bench.goal("speed, times", 2.5, {goal}, at_least=True)], {{"fine": [1, 2]}}, time.monotonic())
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of benchmarks of its own: one reaches its goal, one does not, one fails."""
    (tmp_path / "bench_good.py").write_text(SCRIPT.format(goal=2))
    (tmp_path / "bench_low.py").write_text(SCRIPT.format(goal=3))
    (tmp_path / "bench_broken.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("value", "at_least", "met"),
    [(2, True, True), (1.9, True, False), (2, False, True), (2.1, False, False)],
)
def test_a_goal_is_a_limit_on_its_side(value: float, at_least: bool, met: bool) -> None:
    row = bench.goal("x", value, 2, at_least=at_least)
    assert bench.reached(row) is met
    line = bench.table([row | {"machine": "one core"}]).splitlines()
    assert line[0].startswith("one core")
    assert line[1].endswith("NOT reached" if not met else "2        reached")
    assert ("≥" in line[1]) is at_least


def test_runs_scripts_and_prints_one_table(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "good", "low", "--out", str(folder / "out")]) == 0
    record = results.load(folder / "out", "bench_good")
    assert (record["quick"], record["values"], record["goals"][0]["value"]) == (
        False,
        {"fine": [1, 2]},
        2.5,
    )
    table = capfd.readouterr().out.split("--- bench_low.py\n")[1]
    assert table.count("speed, times") == 3
    assert "≥ 2        reached" in table
    assert "≥ 3        NOT reached" in table
    assert bench.describe(record) in table


def test_recorded_goals_become_json_and_figure(folder: Path) -> None:
    assert (
        main(["bench", "good", "low", "--out", str(folder)]) == 0
    )  # names are given: no summary of all
    assert not (folder / "results" / "bench.json").exists()
    assert main(["bench", "--recorded", "--out", str(folder)]) == 0
    rows = results.load(folder, "bench")["values"]["rows"]
    assert [(row["benchmark"], row["reached"]) for row in rows] == [("good", True), ("low", False)]
    assert (folder / "benchmarks.png").is_file()
    assert (folder / "benchmarks.pdf").is_file()
    assert (
        json.loads((folder / "manifest.json").read_text())["benchmarks"]["results"]
        == "results/bench.json"
    )


def test_a_quick_run_is_no_measurement(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bench.measure(["good"], folder, quick=True)
    assert "not a measurement" in bench.report(folder)
    assert not (folder / "results" / "bench.json").exists()


def test_errors_say_what_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no benchmark fast; there are broken, good, low"):
        bench.measure(["fast"], folder)
    with pytest.raises(ReproduceError, match="failed: broken"):
        bench.measure(["broken", "good"], folder)
    assert (folder / "results" / "bench_good.json").is_file()  # the others have been run
    with pytest.raises(DataError, match=r"btnet bench --out .*none makes them"):
        bench.collect(folder / "none")
    (folder / "results" / "bench_old.json").write_text('{"rows": []}')
    with pytest.raises(DataError, match=r"bench_old.json: lacks .*run `btnet bench old` again"):
        bench.collect(folder)
    monkeypatch.setattr(bench, "FOLDER", folder / "site-packages")
    with pytest.raises(ConfigError, match="not of an installed package"):
        bench.measure([], folder)


def test_what_the_repository_has_recorded_is_whole() -> None:
    """Every benchmark has its JSON, made at full size, and the figure shows its goals."""
    recorded = {
        path.stem.removeprefix("bench_")
        for path in (bench.RECORDED / "results").glob("bench_*.json")
    }
    assert recorded == set(bench.names())
    rows = bench.collect(bench.RECORDED)
    assert not any(row["quick"] for row in rows)
    assert results.load(bench.RECORDED, "bench")["values"]["rows"] == rows, (
        "run `btnet bench --recorded`"
    )


def test_figure_tells_reached_from_not() -> None:
    rows = [
        {**bench.goal("fast", 4, 2, at_least=True), "benchmark": "a", "reached": True},
        {**bench.goal("large", 5, 2, at_least=False), "benchmark": "a", "reached": False},
    ]
    axes = plots.benchmarks({"rows": rows}).axes[0]
    points = [line for line in axes.lines if line.get_marker() == "o"]
    assert [float(line.get_xdata()[0]) for line in points] == [2.0, 0.4]
    assert [line.get_markerfacecolor() == "white" for line in points] == [False, True]
    assert {"≥ 2", "≤ 2", "4", "5"} <= {text.get_text() for text in axes.texts}
