"""docs/costs.md: the formulas against numbers worked out by hand, its tables against what is recorded."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType

import pytest

from btnet_core import bench


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(bench.FOLDER)
    import cost_model

    return cost_model


def test_a_step_worked_out_by_hand(model: ModuleType) -> None:
    gpu = model.Device(name="x", half=1e12, single=1e12, memory=1e12, size=1e9, link=1e9, network=0.5e9, cores=2)
    task = model.Task(name="t", macs=1e9, learns=1_000_000, epochs=2, fixed=False)
    step = model.step_time(task, gpu, 4, 1e12, classes=1000, share=0.5, batch=10, decoded=100)
    assert step.network == pytest.approx(0.02)  # 10 faces, 2e9 operations each, at 1e12 a second
    # 40 faces x 125 rows x 512, three products of two operations, at 0.5e12; 8 x 5,000 scores and 8 x 64,000 numbers
    assert step.classifier == pytest.approx(15_360_000 / 0.5e12 + 4 * (40_000 + 512_000) / 1e12)
    # all-reduce of 4 MB of gradients and 81,920 bytes of those of z, all-gather of z: 3/4 of it over the link
    assert step.exchange == pytest.approx((2 * (4_000_000 + 81_920) + 81_920) * 0.75 / 1e9)
    assert step.loading == pytest.approx(0.05)  # 10 images by two cores of 100 a second
    assert step.total == step.loading  # the slowest here
    assert model.hours(task, step, 4, batch=10) == pytest.approx(2 * 129_487 * 0.05 / 3600)
    fixed = model.step_time(model.replace(task, fixed=True), gpu, 4, 1e12, classes=1000, share=0.5, batch=10)
    assert step.classifier - fixed.classifier == pytest.approx(5_120_000 / 0.5e12)  # two products instead of three
    assert fixed.total == pytest.approx(fixed.network + fixed.classifier + fixed.exchange)
    many = model.step_time(task, gpu, 16, 1e12, classes=1000, share=0.5, batch=10)  # two machines: the slower link
    assert many.exchange == pytest.approx((2 * (4_000_000 + 4 * 81_920) + 4 * 81_920) * 15 / 16 / 0.5e9)


def test_memory_of_the_classifier_worked_out_by_hand(model: ModuleType) -> None:
    # 250 rows a GPU of 2,048 bytes: weight, momentum, gradient; unit rows and their gradient; 3 x 250 x 512 scores
    assert model.classifier_bytes(1000, 4, fixed=False) == 250 * (3 * 2048 + 2 * 2048 + 3 * 4 * 512)
    assert model.classifier_bytes(1000, 4, fixed=True) == 250 * (2048 + 2048 + 3 * 4 * 512)
    assert model.classifier_bytes(1000, 4, fixed=False, share=0.1) == pytest.approx(250 * 3 * 2048 + 25 * (4096 + 6144))


def test_operations_are_those_of_the_modules(model: ModuleType) -> None:
    trunk, *branches = model.tasks()
    assert (trunk.macs / 3e9, trunk.learns) == (pytest.approx(6.31, abs=0.005), 43_590_848)
    assert [task.learns for task in branches] == [490_688, 2_293_568, 21_302_848]  # Figure 5
    for task, kept, r in zip(branches, model.tasks(cached=True)[1:], (28, 14, 7), strict=True):
        assert kept.macs < task.macs
        assert kept.cache == 2 * (2 * {28: 128, 14: 256, 7: 512}[r] + 4 * 3) * r * r
    assert model.reached() < model.V100.half
    published = model.step_time(trunk, model.V100, 8, model.reached(), classes=3_000_000, share=0.1)
    assert 1024 / published.total == pytest.approx(model.PUBLISHED)


def test_the_page_has_the_recorded_numbers(model: ModuleType, tmp_path: Path) -> None:
    import bench_growth

    page = bench.FOLDER.parent / "docs" / "costs.md"
    shutil.copyfile(page, tmp_path / "costs.md")
    bench_growth.page(tmp_path / "costs.md")
    assert (tmp_path / "costs.md").read_text("utf-8") == page.read_text("utf-8"), "bench_growth.py --page docs/costs.md"
