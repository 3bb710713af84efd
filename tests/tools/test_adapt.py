"""btnet adapt: held-out people, forecast, branches with and without labels, going on, a network of the user's own."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from btnet_core.data.faces import open_faces
from btnet_core.data.pairs import draw_pairs
from btnet_core.errors import CheckpointError, ConfigError, DataError
from btnet_core.images import encode
from btnet_core.models.backbone import ADAPTERS, BackboneConfig, build_backbone
from btnet_core.models.btnet import BTNet, weights_digest
from btnet_core.models.costs import route_cost
from btnet_core.models.weights import load_backbone, save_backbone
from btnet_core.training import checkpoint
from btnet_core.training.loop import train
from btnet_tools import adapt as module
from btnet_tools.adapt import AdaptOptions, adapt, forecast, parts, plan
from btnet_tools.adapter import Adapter, find_adapter
from btnet_tools.cli import main

FACES = {"kind": "synthetic", "identities": 24, "images": 4, "seed": 0}
SMALL = {"epochs": 1, "batch": 16}
TINY = BackboneConfig(name="iresnet18", width=0.125, embedding=16)
DOC = Path(__file__).resolve().parents[2] / "docs" / "own-recogniser.md"


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("trunk") / "trunk.safetensors"
    save_backbone(build_backbone(TINY), path)
    return path


def test_held_out_identities_are_not_learnt_from() -> None:
    part = {"kind": "part", "faces": FACES, "percent": 25}
    whole, held, rest = (
        open_faces(spec) for spec in (FACES, {**part, "held": True}, {**part, "held": False})
    )
    assert (held.num_identities, rest.num_identities, len(held) + len(rest)) == (6, 18, len(whole))
    assert not set(whole.labels[held.indices].tolist()) & set(whole.labels[rest.indices].tolist())  # type: ignore[attr-defined]
    assert torch.equal(held.images([3, 0])[1], held[0][0])
    assert torch.equal(held[3][0], whole[int(held.indices[3])][0])  # type: ignore[attr-defined]
    assert held.checksum != rest.checksum
    with pytest.raises(ConfigError, match="percent"):
        open_faces({**part, "held": True, "percent": 100})
    for percent, people in ((99, 23), (1, 1)):  # at least one in each part
        held = open_faces({**part, "held": True, "percent": percent})
        assert held.num_identities == people


def test_adapt_trains_branches_and_compares(
    trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    options = AdaptOptions(resolutions=(7, 14), percent=25, changes=SMALL)
    found = adapt(trunk, FACES, tmp_path / "net", options, said.append)
    keys = {"112&112", "112&14", "112&7", "14&14", "14&7", "7&7"}
    assert found["before"].keys() == keys == found["after"].keys()
    assert found["before"]["112&112"] == found["after"]["112&112"]
    assert "branch 14: stores" in said[0]
    assert re.search(r"branch 7: .* 4 steps of 16, 0 % done, about \d+ s", said[0])
    net = BTNet.load(tmp_path / "net")
    assert net.resolutions == (7, 14, 112)
    assert weights_digest(net.trunk) == weights_digest(load_backbone(trunk))
    fresh = BTNet(net.trunk, (14,)).route(14).branch.state_dict()
    assert any(
        not torch.equal(fresh[name], value)
        for name, value in net.route(14).branch.state_dict().items()
    )

    # again: nothing is trained or embedded for class means
    monkeypatch.setattr(module, "class_means", None)
    said.clear()
    adapt(trunk, FACES, tmp_path / "net", options, said.append)
    assert said[0].count("100 % done, about 0 s") == 2

    # another recipe, or other faces: refused before anything is trained, and what is there stays
    monkeypatch.setattr(module, "train", None)
    before = (tmp_path / "net" / "branch_7.safetensors").read_bytes()
    longer = replace(options, changes={**SMALL, "epochs": 2})
    with pytest.raises(ConfigError, match=r"branch_14: .*epochs 1 -> 2.*--fresh"):
        adapt(trunk, FACES, tmp_path / "net", longer, said.append)
    with pytest.raises(ConfigError, match=r"data .*'seed': 1"):
        adapt(trunk, {**FACES, "seed": 1}, tmp_path / "net", options, said.append)
    assert (tmp_path / "net" / "branch_7.safetensors").read_bytes() == before

    # moved, and called from another folder: the same files by their content are the same
    (tmp_path / "net").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "train", train)
    said.clear()
    adapt(trunk, FACES, "moved", options, said.append)
    assert said[0].count("100 % done, about 0 s") == 2
    branch = tmp_path / "moved" / "branch_7.safetensors"
    branch.write_bytes(branch.read_bytes()[:-1])  # no longer the one that was trained
    with pytest.raises(ConfigError, match=r"btnet .*net' -> 'moved'"):
        adapt(trunk, FACES, "moved", options, said.append)
    (tmp_path / "moved").rename(tmp_path / "net")

    other = tmp_path / "other.safetensors"
    save_backbone(build_backbone(TINY), other)
    with pytest.raises(CheckpointError, match="another trunk"):
        adapt(other, FACES, tmp_path / "net", options, said.append)


def test_before_is_the_trunk_and_after_the_branches_that_learnt(
    trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In what is returned, recorded and said; each measured on its own network."""
    asked: list[tuple[bool, list[str]]] = []
    found = {"before": {"14": {"cosine": 0.25}}, "after": {"14": {"cosine": 0.75}}}

    def compare(net: Any, sets: list, ways: list[str], device: str) -> dict[str, Any]:
        asked.append((net == "learnt", ways))
        return {"sets": ["held out"], **{way: found[way] for way in ways}}

    monkeypatch.setattr(module, "compare", compare)
    monkeypatch.setattr(module, "learn", lambda *arguments: "learnt")
    monkeypatch.setattr(module, "forecast", lambda *arguments: "")
    said: list[str] = []
    options = AdaptOptions(resolutions=(14,), percent=25, changes=SMALL)
    values = adapt(trunk, FACES, tmp_path / "net", options, said.append)
    assert asked == [(False, ["before"]), (True, ["after"])]
    record = json.loads((tmp_path / "net" / "results" / "adapt.json").read_text())["values"]
    for told in (values, record):
        assert {way: told[way] for way in found} == found
    lines = [line.split() for line in said[-1].splitlines()[-2:]]
    assert lines == [["14", "scaled", "up", "0.250"], ["14", "branch", "0.750"]]


@pytest.mark.parametrize("seed", [0, 3])
def test_nobody_is_both_learnt_from_and_compared_on(seed: int) -> None:
    """The two parts are drawn with one seed, and together they are all of the people."""
    options = AdaptOptions(percent=25, changes={"seed": seed})
    rest, (held,) = parts(FACES, options)
    learnt, everybody = open_faces(rest), open_faces(FACES)
    part = {"kind": "part", "faces": FACES, "held": True, "percent": 25, "seed": seed}
    compared = open_faces(part)
    assert held.checksum == draw_pairs(compared, len(held), seed).checksum
    assert rest == {**part, "held": False}
    assert not set(learnt.indices.tolist()) & set(compared.indices.tolist())  # type: ignore[attr-defined]
    assert learnt.num_identities + compared.num_identities == everybody.num_identities
    assert len(learnt) + len(compared) == len(everybody)


def test_the_plan_is_phi_bt_by_the_recipe(tmp_path: Path) -> None:
    net = BTNet(build_backbone(TINY), (28, 14))
    options = AdaptOptions(changes={"lr": 0.25, "seed": 4})
    large, small = plan(net, FACES, tmp_path, tmp_path / "kappa", options)
    assert [large.resolution, small.resolution] == [28, 14]
    assert [large.epochs, small.epochs] == [module.EPOCHS[28], module.EPOCHS[14]]
    assert (small.lr, small.seed, small.batch, small.margin, small.s) == (0.25, 4, 128, 0.2, 32)
    assert (small.embedding, small.embedding_weight, small.shift) == ("cosine", 60, 4)
    assert (small.influence_weight, small.branch_weight, small.fix_classifier) == (1, 0.5, True)
    assert small.classifier == str(tmp_path / "kappa")
    assert small.init == str(tmp_path / "trunk.safetensors")
    assert small.btnet == str(tmp_path)
    unlabelled = AdaptOptions(labels=False)
    assert plan(net, FACES, tmp_path, tmp_path, unlabelled)[0].influence_weight == 0


def test_the_forecast_is_operations_at_the_timed_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 faces in batches of 10, 4 epochs: 400 branch passes of 3 MACs each, the teacher's 200 are kept."""
    net = BTNet(build_backbone(TINY), (28, 14))
    changes = {"batch": 10, "epochs": 4}
    runs = plan(net, FACES, tmp_path, tmp_path, AdaptOptions(changes=changes))
    seconds = []
    monkeypatch.setattr(module, "macs_per_second", lambda *_: 1e6)
    monkeypatch.setattr(module, "duration", lambda value: str(seconds.append(value)))
    trunk, large, small = (route_cost(net, r).macs for r in (112, 28, 14))
    text = forecast(runs, net, 100, tmp_path, AdaptOptions())
    expected = [(3 * 400 * macs + 200 * trunk) / 1e6 for macs in (large, small)]
    assert seconds == pytest.approx([*expected, sum(expected)])
    assert "40 steps of 10" in text
    (tmp_path / "train" / "branch_14").mkdir(parents=True)
    monkeypatch.setattr(
        checkpoint, "load_state", lambda out: {"step": 30} if out.name == "branch_14" else None
    )
    seconds.clear()
    assert "75 % done" in forecast(runs, net, 100, tmp_path, AdaptOptions())
    assert seconds[1] == pytest.approx(expected[1] / 4)
    seconds.clear()
    forecast(runs, net, 100, tmp_path, AdaptOptions(fresh=True))
    assert seconds[1] == pytest.approx(expected[1])
    short = runs[0].replace(
        epochs=2
    )  # too short to keep the teacher's features; both mirror images
    assert module.teacher_passes(short, 20, 100) == 400
    assert module.teacher_passes(short.replace(embedding_mirrored=False), 20, 100) == 200


def test_a_checkpoint_of_another_recipe_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, faces = BTNet(build_backbone(TINY), (14,)), open_faces(FACES)
    (run,) = plan(net, FACES, tmp_path, tmp_path, AdaptOptions(changes=SMALL))
    identity = {
        "config": run.to_dict(),
        "inputs": {"data": faces.checksum, run.init: "a", run.classifier: "b"},
    }
    monkeypatch.setattr(checkpoint, "load_state", lambda out: {"identity": json.dumps(identity)})
    module.check_unchanged([run], tmp_path, faces)
    module.check_unchanged([run.replace(workers=7)], tmp_path, faces)  # changes no result
    (moved,) = plan(net, "elsewhere", tmp_path / "x", tmp_path / "y", AdaptOptions(changes=SMALL))
    module.check_unchanged([moved], tmp_path, faces)  # the same contents
    with pytest.raises(ConfigError, match=r"lr 0\.5 -> 0.1"):
        module.check_unchanged([run.replace(lr=0.1)], tmp_path, faces)
    with pytest.raises(ConfigError, match="content of data"):
        module.check_unchanged([run], tmp_path, open_faces({**FACES, "seed": 1}))


def test_loose_images_without_labels(
    trunk: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    faces = open_faces(FACES)
    (tmp_path / "loose").mkdir()
    for i in range(40):
        (tmp_path / "loose" / f"{i:02d}.png").write_bytes(encode(faces[i][0]))
    line = ["adapt", "--trunk", str(trunk), "--faces", str(tmp_path / "loose")]
    line += [
        "--out",
        str(tmp_path / "net"),
        "--resolutions",
        "14",
        "--set",
        "epochs=1",
        "--set",
        "batch=16",
    ]
    assert main(line) == 1
    assert "--no-labels" in capsys.readouterr().err
    assert main([*line, "--no-labels"]) == 0
    out = capsys.readouterr().out
    assert "cosine to the face at full size" in out
    assert BTNet.load(tmp_path / "net").resolutions == (14, 112)


def test_bad_images_are_told_before_the_training(trunk: Path, tmp_path: Path, capsys) -> None:
    faces = open_faces(FACES)
    for i, label in enumerate(faces.labels.tolist()):
        (tmp_path / "faces" / str(label)).mkdir(parents=True, exist_ok=True)
        (tmp_path / "faces" / str(label) / f"{i}.png").write_bytes(encode(faces[i][0]))
    (tmp_path / "faces" / "3" / "14.png").write_bytes(b"<html>")
    line = ["adapt", "--trunk", str(trunk), "--faces", str(tmp_path / "faces")]
    line += ["--out", str(tmp_path / "net"), "--resolutions", "7", "--hold-out", "25"]
    line += ["--set", "epochs=1", "--set", "batch=16"]
    assert main(line) == 1
    assert "1 of 96 images cannot be read, the first: " in capsys.readouterr().err
    assert not (tmp_path / "net").exists()
    assert main([*line, "--skip-bad"]) == 0
    assert "left out 1 images" in capsys.readouterr().out
    record = json.loads((tmp_path / "net" / "results" / "adapt.json").read_text())
    (left_out,) = record["values"]["left_out"]
    assert "14.png" in left_out

    # pairs that cannot be read are told before the training, too
    pairs = [f"3 {i} {other} {i}" for other in (3, 4) for i in range(20)]
    (tmp_path / "pairs.txt").write_text("\n".join(pairs))
    for person in ("3", "4"):
        (tmp_path / person).mkdir()
        for i in range(20):
            content = b"" if (person, i) == ("3", 19) else encode(faces[i][0])
            (tmp_path / person / f"{person}_{i:04d}.png").write_bytes(content)
    line[line.index("--out") + 1] = str(tmp_path / "other")
    assert main([*line, "--skip-bad", "--pairs", str(tmp_path / "pairs.txt")]) == 1
    assert "3_0019.png" in capsys.readouterr().err
    assert not (tmp_path / "other" / "train").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (["--trunk", "none.pth"], "none.pth"),
        (["--faces", "nowhere"], "nowhere"),
        (["--resolutions", "13"], r"[56, 28, 14, 7]"),
        (["--set", "epochs=0"], "epochs"),
        (["--set", "batch=500"], "set batch to 88 or less"),
        (["--set", "batch=1"], "set batch to 2 or more"),
        (["--set", "colour=1"], "colour"),
        (["--set", "seed=x"], "seed: got 'x', expected an integer"),
        (["--set", "resize=area"], "resize: got 'area', expected fields with their values"),
        (["--set", "epochs"], "NAME=VALUE"),
        (["--adapter", "none.py"], "none.py"),
        (["--hold-out", "0"], "percent"),
        (["--pairs", "none.bin"], "none.bin"),
        (["--device", "cuda:99"], "device"),
        (["--out", __file__], "cannot be written"),
    ],
)
def test_wrong_input_is_named(
    change: list[str], told: str, trunk: Path, tmp_path: Path, capsys
) -> None:
    line = [
        "adapt",
        "--trunk",
        str(trunk),
        "--faces",
        json.dumps(FACES),
        "--out",
        str(tmp_path / "net"),
        "--set",
        "batch=16",
    ]
    assert main([*line, *change]) == (2 if told == "NAME=VALUE" else 1)
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not (tmp_path / "net" / "train").exists()


# ---- a network of the user's own ----


def test_the_documented_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The page's file, its command and its call, as printed there."""
    source, call = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    (tmp_path / "resnet_face.py").write_text(source)
    command = re.search(r"btnet (adapt .*--adapter .*)", DOC.read_text())[1].split()  # type: ignore[index]
    faces = open_faces({"kind": "synthetic", "identities": 12, "images": 3, "seed": 0})
    for i, label in enumerate(faces.labels.tolist()):
        (tmp_path / "my_faces" / str(label)).mkdir(parents=True, exist_ok=True)
        (tmp_path / "my_faces" / str(label) / f"{i}.png").write_bytes(encode(faces[i][0]))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(source, names)
    torch.save(names["ResNetFace"]().build().state_dict(), "resnet_face.pth")
    assert (
        main([*command, "--resolutions", "14", "7", "--set", "epochs=1", "--set", "batch=32"]) == 0
    )
    out = capsys.readouterr().out
    assert "1 steps of 32, 0 % done, about" in out
    assert "nan" not in out
    assert "branch      " in out
    exec(call.replace("(14, 7),", "(14, 7), changes={'epochs': 1, 'batch': 32},"), names)
    assert (
        capsys.readouterr().out.count("100 % done, about 0 s") == 2
    )  # the same call: nothing left to do


class Strange(Adapter):
    """A patch layer with an even kernel, pooling, and a list of settings that each break one promise."""

    embedding = 8
    broken = ""

    def build(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 4, 4),
            nn.BatchNorm2d(8),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8)),
        )

    def split(self, network: nn.Module) -> tuple[dict[str, nn.Module], nn.Module]:
        patch, norm, pool, conv, head = network
        body = {"patch.0": nn.Sequential(patch, norm), "pool": pool, "conv": conv}
        if self.broken == "order":
            body = {"patch.0": nn.Sequential(patch, norm), "conv": conv, "pool": pool}
        if self.broken == "forward":
            body["pool"] = Halve()
        return body, head[:2] if self.broken == "head" else head


class Halve(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.max_pool2d(x, 2)


def test_any_layer_becomes_a_branch() -> None:
    net = BTNet(Strange(), (28, 14))
    assert dict(net.trunk.resolutions()) == {"patch_0": 28, "pool": 14, "conv": 14}
    module.check_routes(net)
    assert net(torch.zeros(2, 3, 14, 14), 14).shape == (2, 8)
    with pytest.raises(ConfigError, match=r"\[28, 14\]"):
        BTNet(Strange(), (7,))


@pytest.mark.parametrize("broken", ["order", "forward"])
def test_a_wrong_split_is_found(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Strange, "broken", broken)
    with pytest.raises(
        ConfigError, match="something else" if broken == "order" else "abandon_stride"
    ):
        module.check_routes(BTNet(Strange(), (14,)))


class Tokens(nn.Module):
    """Attention over the positions of a map, with layer norms before it and a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.tokens = nn.LayerNorm(width), 0
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = x.flatten(2).transpose(1, 2)
        self.tokens, z = z.shape[1], self.norm(z)
        return x + self.attention(z, z, z)[0].transpose(1, 2).reshape(x.shape)


class Patches(Adapter):
    """A patch stem of stride 4, layer norms, attention: what EdgeFace has, in small."""

    embedding = 8

    def build(self) -> nn.Module:
        stem, down = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 16, 2, 2)
        head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 8)
        )
        return nn.Sequential(stem, Tokens(8), Tokens(8), down, Tokens(16), Tokens(16), head)

    def split(self, network: nn.Module) -> tuple[dict[str, nn.Module], nn.Module]:
        stem, a, b, down, c, d, head = network
        body = {
            "s0_0": nn.Sequential(stem, a),
            "s0_1": b,
            "s1_0": nn.Sequential(down, c),
            "s1_1": d,
        }
        return body, head


def test_the_rule_on_patches_layer_norms_and_attention() -> None:
    """Patches of 4 px become patches at every px; the rest of the trunk sees as many tokens as ever."""
    trunk = Patches()
    assert dict(trunk.resolutions()) == {"s0_0": 28, "s0_1": 28, "s1_0": 14, "s1_1": 14}
    with pytest.raises(ConfigError, match=r"resolution 56: .* offers \[28, 14\]"):
        BTNet(trunk, (56,))
    net = BTNet(trunk, (28, 14)).eval()
    for r, ends in ((28, "s0_0"), (14, "s1_0")):
        route = net.route(r)
        assert route.couple_at == ends
        stem = route.branch[0][0][0]
        assert (stem.kernel_size, stem.stride) == ((4, 4), (1, 1))
        assert torch.equal(stem.weight, trunk.body.s0_0[0][0].weight)
        assert net.eval()(torch.rand(2, 3, r, r), r).shape == (2, 8)
        assert route.shared[-1][0].tokens == 14 * 14
        own = {name for name in route.trainable() if not name.startswith("branch.")}
        assert {"head.2.weight", "shared.s1_1.0.norm.bias"} <= own  # layer norms of each resolution
        assert all("norm" in name or name.startswith("head.2.") for name in own)
        assert route.head[2].weight is not trunk.head[2].weight
        assert route.head[3].weight is trunk.head[3].weight
        assert own <= route.own_state().keys()
    assert net.route(14).branch[0][0][1].tokens == 14 * 14  # and 28 * 28 in the trunk


def test_a_trunk_with_layer_norms_learns_by_adamw(tmp_path: Path) -> None:
    net, place = BTNet(Patches(), (14,)), (tmp_path, tmp_path / "kappa")
    (run,) = plan(net, FACES, *place, AdaptOptions())
    assert (run.optimiser, run.lr, run.warmup_epochs) == ("adamw", 0.008, 0.2)
    (run,) = plan(net, FACES, *place, AdaptOptions(changes={"optimiser": "sgd", "lr": 0.1}))
    assert (run.optimiser, run.lr) == ("sgd", 0.1)
    (run,) = plan(BTNet(Strange(), (14,)), FACES, *place, AdaptOptions())
    assert (run.optimiser, run.lr) == ("sgd", 0.5)


def test_adapter_state_travels_with_the_btnet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    network = Strange().build()
    torch.save(network.state_dict(), tmp_path / "mine.pth")
    trunk = load_backbone(tmp_path / "mine.pth", Strange)
    x = torch.rand(2, 3, 112, 112)
    torch.testing.assert_close(trunk.eval()(x), network.eval()(x))
    BTNet(trunk, (14,)).save(tmp_path / "net")
    torch.testing.assert_close(BTNet.load(tmp_path / "net").eval()(x, 112), network(x))
    with pytest.raises(CheckpointError, match="--adapter"):
        load_backbone(tmp_path / "mine.pth")
    monkeypatch.delitem(ADAPTERS, "Strange")
    with pytest.raises(CheckpointError, match="--adapter"):
        BTNet.load(tmp_path / "net")


def test_find_adapter(tmp_path: Path) -> None:
    file = tmp_path / "two_nets.py"
    file.write_text(
        "from btnet_tools.adapter import Adapter\nclass A(Adapter): pass\nclass B(Adapter): pass\n"
    )
    assert find_adapter(f"{file}:B").__name__ == "B"
    for wrong in (str(file), f"{file}:C"):
        with pytest.raises(ConfigError, match=r"\['A', 'B'\]"):
            find_adapter(wrong)
    file.write_text("1 / 0")
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        find_adapter(str(file))
    with pytest.raises(ConfigError, match=r"Adapter: .* build\(\)"):
        Adapter()
    with pytest.raises(DataError):
        open_faces(str(tmp_path))


@pytest.mark.slow
def test_a_recogniser_trained_by_others_on_real_faces(btnet_data: Path, tmp_path: Path) -> None:
    """A MobileFaceNet of 112x96, real faces by RecordIO: its own accuracy stays, a branch for 7 px appears."""
    trunk = str(btnet_data / "mobilefacenet_casia.safetensors")
    some = {"kind": "part", "faces": "lfw_devtest", "held": True, "percent": 6, "seed": 2}
    options = AdaptOptions(resolutions=(7,), percent=40, changes={"epochs": 2, "batch": 64})
    found = adapt(trunk, some, tmp_path / "net", options)
    assert found["before"]["112&112"] == found["after"]["112&112"]
    assert found["after"]["112&112"]["accuracy"] > 0.85
    assert len(found["after"]) == 3
    net = BTNet.load(tmp_path / "net")
    assert net.route(7).size == (7, 6)
    assert net.embed(open_faces(some).images([0, 1]).unbind()).shape == (2, 128)


def test_bgr_reaches_the_trunk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[bool] = []

    def load(path: str, adapter: object, *, bgr: bool) -> None:
        asked.append(bgr)
        raise ConfigError("far enough")

    monkeypatch.setattr("btnet_tools.adapt.load_backbone", load)
    line = ["adapt", "--trunk", "t.pth", "--faces", "faces", "--out", str(tmp_path)]
    assert main(line) == 1
    assert main([*line, "--bgr"]) == 1
    assert asked == [False, True]
