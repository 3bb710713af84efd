"""btnet evaluate and verify: rates, intervals and thresholds against counts by hand."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from btnet_core.data.pairs import PairSet
from btnet_core.errors import DataError
from btnet_core.models.backbone import BackboneConfig, build_backbone
from btnet_core.models.btnet import BTNet
from btnet_tools import evaluate as module
from btnet_tools.cli import main
from btnet_tools.evaluate import compare, operating_points, table, verify, wilson


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("net")
    backbone = build_backbone(BackboneConfig(name="iresnet18", width=0.125, embedding=16))
    BTNet(backbone, (28, 7)).save(folder)
    return folder


def test_wilsons_interval() -> None:
    """Both ends solve (rate - p)^2 = z^2 p (1 - p) / n; a rate of 0 has the upper end z^2 / (n + z^2)."""
    for rate, n in ((0.9, 100), (0.5, 7), (0.999, 6000)):
        for p in wilson(rate, n):
            assert (rate - p) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / n, rel=1e-9)
    assert wilson(0, 10) == pytest.approx((0, 1.96**2 / (10 + 1.96**2)))
    assert wilson(1, 10)[1] == 1


def test_operating_points_of_two_sets_and_directions() -> None:
    """Ten folds of ten pairs in each part; at FAR 0.01 one of a hundred different pairs may be accepted."""
    rng = np.random.default_rng(0)
    same = np.tile([True, False], 50)
    parts = []
    for _ in range(4):
        parts.append((np.where(same, 0.6, 0.2) + rng.normal(0, 0.15, 100), same))
    found = operating_points(parts, pairs=200, ways=2)
    scores = np.concatenate([scores for scores, _ in parts])
    different = np.sort(scores[~np.tile(same, 4)])
    point = found["tar"]["0.01"]
    assert found["tar"].keys() == {"0.01"}  # 100 different pairs allow no FAR of 0.001
    assert point["threshold"] == different[-3]  # of 200 scores two lie above it
    assert point["rate"] == np.mean(scores[np.tile(same, 4)] > different[-3])
    assert point["interval"] == wilson(point["rate"], 100)  # each same pair counts once
    assert found["interval"] == wilson(found["accuracy"], 200)
    assert found["far"] == np.mean(different > found["threshold"])
    assert 0.85 < found["accuracy"] < 1


def test_thresholds_are_those_of_the_way_they_stand_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of the branches lie 1 above those of scaling up; each way has its own threshold."""

    def fake(name: str):
        return lambda *args, **options: name

    same = np.tile([True, False], 200)
    scores = {"branches": np.where(same, 1.9, 1.1), "scaled": np.where(same, 0.9, 0.1)}
    monkeypatch.setattr(module, "BranchEmbedder", fake("branches"))
    monkeypatch.setattr(module, "UpsamplingEmbedder", fake("scaled"))
    monkeypatch.setattr(
        module,
        "pair_similarities",
        lambda embedder, pairs, ways: dict.fromkeys(ways, scores[embedder]),
    )
    monkeypatch.setattr(module, "PairSet", SimpleNamespace)
    pairs = SimpleNamespace(name="a set", same=same)
    net = SimpleNamespace(resolutions=(14, 112), trunk=None)
    found = compare(net, [pairs])
    assert found["after"]["112&14"]["threshold"] == pytest.approx(1.5)
    assert found["before"]["112&14"]["threshold"] == pytest.approx(0.5)
    assert found["after"]["14&14"]["tar"]["0.01"]["threshold"] == 1.1
    assert "before" not in compare(net, [pairs], ["after"])
    lines = table(found).splitlines()
    assert lines[0].startswith("on a set: 400 pairs")
    assert lines[2].split()[:3] == ["112&112", "scaled", "up"]
    assert lines[3].split()[1:] == [
        *("branch", "100.00", "[99.0,", "100.0]", ">", "1.500"),
        *("100.00", "[98.1,", "100.0]", ">", "1.100"),
    ]


@pytest.mark.parametrize("same", [[True, False] * 4, [True] * 12])
def test_pairs_without_an_answer_are_refused(
    same: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    index = torch.zeros(len(same), dtype=torch.int64)
    pairs = PairSet(
        name="a set",
        checksum="",
        first=index,
        second=index,
        same=torch.tensor(same),
        images=lambda indices: pytest.fail("embedded"),
        num_images=1,
    )
    monkeypatch.setattr(module, "BranchEmbedder", lambda *args, **options: pytest.fail("too late"))
    net = SimpleNamespace(resolutions=(14, 112), trunk=None)
    with pytest.raises(DataError, match=r"a set: .* expected both kinds, and 10 pairs or more"):
        compare(net, [pairs])


def test_both_directions_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only the first image at 112 tells people apart, accuracy is the mean of 100 and 50 %."""
    same = np.tile([True, False], 200)
    told = {True: np.where(same, 0.9, 0.1), False: np.zeros(400)}
    monkeypatch.setattr(
        module,
        "pair_similarities",
        lambda embedder, pairs, ways: {(a, b): told[a >= b] for a, b in ways},
    )
    sets = [SimpleNamespace(same=same), SimpleNamespace(same=same)]
    found = module.measure(None, sets, (14, 112))
    assert found["112&14"]["accuracy"] == 0.75
    assert found["112&112"]["accuracy"] == found["14&14"]["accuracy"] == 1
    assert found["112&14"]["tar"]["0.01"]["rate"] == 0.5
    assert found["112&14"]["pairs"] == 800


def test_the_command_prints_every_pair_of_resolutions(
    model: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(24):
        (tmp_path / f"p{i // 2}").mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (112, 112, 3), dtype=np.uint8)
        name = f"p{i // 2}/p{i // 2}_{i % 2 + 1:04d}.png"
        Image.fromarray(pixels).save(tmp_path / name)
    lines = [f"p{i} 1 2\np{i} 1 p{(i + 1) % 12} 2\n" for i in range(12)]
    (tmp_path / "pairs.txt").write_text("".join(lines))
    command = ["evaluate", "--model", str(model), "--pairs", str(tmp_path / "pairs.txt")]
    assert main(command) == 0
    out = capsys.readouterr().out.splitlines()
    keys = ["112&112", "112&28", "112&7", "28&28", "28&7", "7&7"]
    assert [line.split()[0] for line in out[2:]] == keys
    assert "TAR" not in out[1]  # 12 different pairs allow none
    assert main([*command, "--baseline"]) == 0
    assert capsys.readouterr().out.count("scaled up") == 6
    # a name that is not in the current folder, but under the data root: said so
    monkeypatch.setenv("BTNET_DATA", str(tmp_path))
    assert main([*command[:-1], "pairs.txt"]) == 0
    told = f"pairs.txt: not in this folder, taken from {tmp_path / 'pairs.txt'}\n"
    assert capsys.readouterr().err == told
    monkeypatch.chdir(tmp_path)
    assert main([*command[:-1], "pairs.txt"]) == 0
    assert capsys.readouterr().err == ""
    if find_spec("openvino"):
        assert main([*command, "--precision", "fp32"]) == 0
        assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == keys


def test_verify_says_at_which_far_it_accepts(model: Path, tmp_path: Path) -> None:
    net, files = BTNet.load(model), [str(tmp_path / name) for name in ("big.png", "small.jpg")]
    for i, (file, side) in enumerate(zip(files, (112, 20), strict=True)):
        pixels = np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
    cosine = float(torch.prod(net.eval().embed(files), 0).sum())

    def say(threshold: float | None = None) -> str:
        return verify(net, *reversed(files), "max+ceil", str(tmp_path), threshold)

    assert "no threshold of 112&28 is known" in say()
    assert "one person" in say(cosine - 0.01)
    assert "its FAR at 112&28 is not known)" in say(cosine - 0.01)
    tar = {"0.01": {"threshold": cosine - 0.02}, "0.001": {"threshold": cosine + 0.03}}
    point = {"threshold": cosine + 0.01, "far": 0.004, "tar": tar}
    before = {"112&28": {"threshold": cosine - 0.1, "far": 0.5, "tar": {}}}  # not the branches'
    after = {"112&28": point, "112&112": {"threshold": -1.0}}
    values = {"sets": ["held"], "before": before, "after": after}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "adapt.json").write_text(json.dumps({"values": values}))
    assert f"cosine {cosine:.3f}: two people" in say()
    assert "accepts at FAR 0.004: 112&28 on held" in say()
    assert "small.jpg: 20x20 through branch 28, resized by 1.40" in say()
    assert "one person" in say(cosine - 0.01)
    assert "at FAR 0.01 or less" in say(cosine - 0.01)
    assert "at FAR 0.001 or less" in say(cosine + 0.04)
    assert "at FAR above 0.01" in say(cosine - 0.03)
    point["tar"] = {}  # too few pairs for any FAR
    (tmp_path / "results" / "adapt.json").write_text(json.dumps({"values": values}))
    assert "its FAR at 112&28 is not known)" in say(cosine - 0.03)
    values["after"] = {"112&28": 71.0}  # as an earlier version recorded it
    (tmp_path / "results" / "adapt.json").write_text(json.dumps({"values": values}))
    assert "no threshold of 112&28 is known" in say()
