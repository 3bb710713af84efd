"""Weights: this project's own files, and those that others publish, however wrapped."""

from __future__ import annotations

import pickle
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from btnet_core.errors import CheckpointError, ConfigError
from btnet_core.files import read_safetensors, write_safetensors
from btnet_core.models.backbone import Backbone, BackboneConfig, build_backbone
from btnet_core.models.weights import load_backbone, load_wrapped, save_backbone


def small(**changes: object) -> Backbone:
    torch.manual_seed(0)
    config = {"name": "iresnet18", "width": 0.125, "embedding": 16} | changes
    return build_backbone(BackboneConfig(**config)).eval()


def arcface_torch_names(backbone: Backbone) -> dict[str, torch.Tensor]:
    """The state dict under the names that InsightFace's arcface_torch gives it (written here independently)."""
    renamed = {}
    for name, tensor in backbone.state_dict().items():
        part, rest = name.split(".", 1)
        if part == "head":
            rest = rest.replace("bn.", "bn2.", 1) if rest.startswith("bn.") else rest
        elif rest.startswith("stem."):
            rest = rest.removeprefix("stem.").replace("conv.", "conv1.").replace("bn.", "bn1.")
        else:
            unit, leaf = rest.split(".", 1)
            stage, index = unit[1:].split("U")
            leaf = leaf.replace("shortcut.conv", "downsample.0").replace(
                "shortcut.bn", "downsample.1"
            )
            rest = f"layer{stage}.{int(index) - 1}.{leaf}"
        renamed[rest] = tensor
    return renamed


@pytest.mark.parametrize("prefix", ["", "module."])
def test_loads_insightface_backbone_pth(prefix: str, tmp_path: Path) -> None:
    backbone = small()
    state = {prefix + name: tensor for name, tensor in arcface_torch_names(backbone).items()}
    torch.save(state, tmp_path / "backbone.pth")
    loaded = load_backbone(tmp_path / "backbone.pth").eval()
    assert loaded.config == backbone.config
    x = torch.randn(2, 3, 112, 112)
    torch.testing.assert_close(loaded(x), backbone(x), rtol=0, atol=0)


class Harmful:
    """Unpickling this creates a file: proof that code ran."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"conv1.weight": Harmful(tmp_path / "ran")}, tmp_path / "bad.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Harmful(tmp_path / "ran")))
    for name in ("bad.pth", "raw.pth"):
        with pytest.raises(CheckpointError, match=name):
            load_backbone(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_checkpoint_errors_name_the_file_and_the_tensor(tmp_path: Path) -> None:
    state = arcface_torch_names(small())
    del state["layer2.0.bn1.weight"]
    torch.save(state, tmp_path / "cut.pth")
    with pytest.raises(CheckpointError, match=r"cut\.pth.*missing body\.S2U1\.bn1\.weight"):
        load_backbone(tmp_path / "cut.pth")
    torch.save({"some.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"some\.weight"):
        load_backbone(tmp_path / "other.pth")
    (tmp_path / "half.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(CheckpointError, match=r"half\.safetensors"):
        load_backbone(tmp_path / "half.safetensors")
    with pytest.raises(CheckpointError, match="absent"):
        load_backbone(tmp_path / "absent.safetensors")


# ---- as others save them ----


def same(a: Backbone, b: Backbone) -> bool:
    states = a.state_dict(), b.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][name], states[1][name]) for name in states[0]
    )


def prefixed(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {prefix + name: tensor for name, tensor in state.items()}


PREFIXES = ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "backbone.", "model.", "net.", "encoder.",
            "model.backbone.", "module.model.net._orig_mod.", "student.features.")  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_in_any_order(prefix: str, tmp_path: Path) -> None:
    torch.save(prefixed(prefix, arcface_torch_names(small())), tmp_path / "b.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is left out
        assert same(load_backbone(tmp_path / "b.pth"), small())


def test_parts_that_were_compiled_alone(tmp_path: Path) -> None:
    state = arcface_torch_names(small())
    names = {name.replace("layer2.", "layer2._orig_mod."): tensor for name, tensor in state.items()}
    torch.save(names, tmp_path / "b.pth")
    assert same(load_backbone(tmp_path / "b.pth"), small())


def wrappings(state: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """By name: what a program saves, and what of it is left out."""
    head = torch.zeros(16, 10)
    sgd = {"state": {0: {"momentum_buffer": head}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    return {
        "state_dict": ({"state_dict": state}, ""),
        "model": ({"model": prefixed("module.", state), "epoch": 3}, ""),
        "net_state_dict": ({"iters": 1, "net_state_dict": state}, ""),
        "AdaFace": ({"epoch": 1, "state_dict": prefixed("model.", state) | {"head.kernel": head},
                     "optimizer_states": [sgd]}, "head.kernel"),
        "arcface_torch": ({"epoch": 1, "global_step": 9, "state_dict_backbone": state,
                           "state_dict_softmax_fc": {"weight": head}, "state_optimizer": sgd,
                           "state_lr_scheduler": {"last_epoch": 3}}, "state_dict_softmax_fc"),
        "a classifier beside it": (state | {"classifier.weight": head}, "classifier.weight"),
        "deep": ({"a": {"b": {"model": prefixed("net.", state)}}}, ""),
        "ordered": (OrderedDict(state_dict=OrderedDict(state)), ""),
    }  # fmt: skip


@pytest.mark.parametrize("name", wrappings({}))
def test_wrapped_state_dicts(name: str, tmp_path: Path) -> None:
    content, left_out = wrappings(arcface_torch_names(small()))[name]
    torch.save(content, tmp_path / "checkpoint_gpu_0.pt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert same(load_backbone(tmp_path / "checkpoint_gpu_0.pt"), small())
    told = [str(one.message) for one in caught if "left out" in str(one.message)]
    assert len(told) == bool(left_out)
    assert all(left_out in text and "checkpoint_gpu_0.pt" in text for text in told)


def test_two_networks_in_one_file_are_named(tmp_path: Path) -> None:
    state = arcface_torch_names(small())
    for content, places in (({"model": state, "model_ema": state}, "model, model_ema"),
                            (prefixed("student.", state) | prefixed("teacher.", state), "student, teacher")):  # fmt: skip
        torch.save(content, tmp_path / "two.pth")
        with pytest.raises(CheckpointError, match=rf"two\.pth: holds several.*\({places}\)"):
            load_backbone(tmp_path / "two.pth")


def test_safetensors_of_others_under_any_name(tmp_path: Path) -> None:
    state = {
        k: v.contiguous() for k, v in prefixed("module.", arcface_torch_names(small())).items()
    }
    for name in ("model.safetensors", "backbone.pth"):
        save_file(state, tmp_path / name)
        assert same(load_backbone(tmp_path / name), small())


def test_a_torch_file_under_safetensors_name(tmp_path: Path) -> None:
    torch.save(arcface_torch_names(small()), tmp_path / "model.safetensors")
    assert same(load_backbone(tmp_path / "model.safetensors"), small())


def mbf_names(backbone: Backbone) -> dict[str, torch.Tensor]:
    """arcface_torch's names of its MobileFaceNet, layer by layer (written here independently)."""
    renamed, layers = {}, {"conv": 0, "bn": 1, "prelu": 2}
    places = ["2", *(f"3.layers.{i}" for i in range(4)), "4", *(f"5.layers.{i}" for i in range(6)), "6",
              *(f"7.layers.{i}" for i in range(2))]  # fmt: skip
    for name, tensor in backbone.state_dict().items():
        _, unit, *rest = name.split(".")
        if unit.startswith("block"):
            step, layer = divmod(int(rest[1]), 3)
            new = f"layers.{places[int(unit[5:])]}.layers.{step}.layers.{layer}.{rest[2]}"
        elif unit in ("fc", "features"):
            new = f"features.layers.{2 if unit == 'fc' else 3}.{rest[0]}"
        else:
            where = {
                "conv1": "layers.0",
                "dw_conv1": "layers.1",
                "conv2": "conv_sep",
                "linear7": "features.layers.0",
            }
            new = f"{where[unit]}.layers.{layers[rest[0]]}.{rest[1]}"
        renamed[new] = tensor
    return renamed


def test_arcface_torchs_mobilefacenet(tmp_path: Path) -> None:
    backbone = small(name="mbf")
    state = mbf_names(backbone)
    shapes = {"layers.1.layers.0.weight": (16, 2, 3, 3), "layers.6.layers.1.layers.0.weight": (64, 1, 3, 3),
              "features.layers.2.weight": (16, 64)}  # fmt: skip
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    torch.save(prefixed("module.", state), tmp_path / "mbf.pth")
    loaded = load_backbone(tmp_path / "mbf.pth").eval()
    assert loaded.config == backbone.config
    assert same(loaded, backbone)


def test_iresnet200_is_known_by_its_units(tmp_path: Path) -> None:
    backbone = small(name="iresnet200", width=0.03125)
    torch.save(arcface_torch_names(backbone), tmp_path / "r200.pth")
    assert load_backbone(tmp_path / "r200.pth").config == backbone.config


def test_bgr_is_kept_with_the_trunk(tmp_path: Path) -> None:
    torch.save(arcface_torch_names(small()), tmp_path / "b.pth")
    assert load_backbone(tmp_path / "b.pth").config.channels == "rgb"
    loaded = load_backbone(tmp_path / "b.pth", bgr=True)
    assert loaded.config.channels == "bgr"
    save_backbone(loaded, tmp_path / "b.safetensors")
    for bgr in (True, False):  # the file says it
        assert load_backbone(tmp_path / "b.safetensors", bgr=bgr).config.channels == "bgr"
    save_backbone(small(), tmp_path / "rgb.safetensors")
    with pytest.raises(ConfigError, match=r"rgb\.safetensors: bgr was asked for"):
        load_backbone(tmp_path / "rgb.safetensors", bgr=True)


def test_a_network_of_the_users_own_is_found_among_several_like_names() -> None:
    """ "conv1.weight" also ends the names of inner layers: the prefix that fits best is meant."""
    own = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 4, 1), inner=nn.Sequential(OrderedDict(conv1=nn.Conv2d(4, 4, 1)))
        )
    )
    weights = {name: torch.randn_like(tensor) for name, tensor in own.state_dict().items()}
    load_wrapped(own, {"state_dict": prefixed("module.", weights), "epoch": 2}, "x.pth")
    assert all(torch.equal(own.state_dict()[name], weights[name]) for name in weights)
    with pytest.raises(CheckpointError, match=r"x\.pth: holds no conv1\.weight; tensors found: fc"):
        load_wrapped(own, {"fc": torch.zeros(1)}, "x.pth")


# ---- refused ----


def test_what_does_not_fit_is_named_missing_and_unexpected(tmp_path: Path) -> None:
    state = arcface_torch_names(small())
    state["layer3.0.extra.weight"] = state.pop("layer3.0.bn2.weight")
    state["layer4.0.prelu.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "wrong.pth")
    with pytest.raises(CheckpointError) as caught:
        load_backbone(tmp_path / "wrong.pth")
    said = str(caught.value)
    assert said.count("wrong.pth") == 1
    for words in ("missing body.S3U1.bn2.weight", "unexpected body.S3U1.extra.weight",
                  "of another shape: body.S4U1.prelu.weight (3,) for (64,)"):  # fmt: skip
        assert words in said


def test_files_of_our_own_may_lack_the_counters_of_batch_norms(tmp_path: Path) -> None:
    """As those of others may; and a name of one that was damaged is told."""
    trunk = build_backbone(BackboneConfig(name="iresnet18", width=0.0625, embedding=8))
    save_backbone(trunk, tmp_path / "trunk.safetensors")
    state, facts = read_safetensors(tmp_path / "trunk.safetensors")
    counter = next(name for name in state if name.endswith("num_batches_tracked"))
    count = state.pop(counter)
    write_safetensors(tmp_path / "less.safetensors", state, facts)
    assert load_backbone(tmp_path / "less.safetensors").config == trunk.config
    write_safetensors(tmp_path / "damaged.safetensors", {**state, f"{counter} ": count}, facts)
    with pytest.raises(CheckpointError, match=r"damaged\.safetensors: .*unexpected"):
        load_backbone(tmp_path / "damaged.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    state = arcface_torch_names(small())
    state["fc.bias"] = torch.full((16,), value)
    torch.save(state, tmp_path / "broken.pth")
    with pytest.raises(CheckpointError, match=r"broken\.pth: .*not finite: head\.fc\.bias$"):
        load_backbone(tmp_path / "broken.pth")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            {"a.weight": torch.zeros(1)},
            r"neither IResNet nor MobileFaceNet; tensors found: a\.weight\.",
        ),
        ({"model": {"b": torch.zeros(1)}}, r"tensors found: model\.b"),
        ({"epoch": 3, "lr": 0.1}, "no tensors, but epoch, lr"),
        ({}, "no tensors, but nothing"),
        ([1, 2], "no dictionary of tensors, but list"),
        (torch.zeros(3), "no dictionary of tensors, but Tensor"),
    ],
)
def test_nothing_that_fits(content: Any, words: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=rf"other\.pth: .*{words}"):
        load_backbone(tmp_path / "other.pth")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer4.2.bn1.weight": torch.zeros(64)}, r"units: got \(2, 2, 2, 3\)"),
        ({"fc.weight": None}, r"lacks the tensor fc\.weight"),
        ({"fc.weight": torch.zeros(3)}, "tensors of impossible shapes"),
        ({"fc.weight": torch.zeros(16, 1)}, r"size: got \(0, 0\)"),
        ({"layer4.0.conv2.weight": torch.zeros(0, 1)}, "tensors of impossible shapes"),
    ],
)
def test_shapes_that_are_no_trunks(change: dict, words: str, tmp_path: Path) -> None:
    """An own error is not wrapped into a false one; the path is named once."""
    state = {k: v for k, v in (arcface_torch_names(small()) | change).items() if v is not None}
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=words) as caught:
        load_backbone(tmp_path / "odd.pth")
    assert str(caught.value).count("odd.pth") == 1


REFUSED = {
    "an empty file": b"",
    "an HTML page": b"<!DOCTYPE html><html>Google Drive - Quota exceeded</html>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2\n",
    "a gzip file": b"\x1f\x8b\x08" + bytes(40),
    "a JSON file": b'{"message": "Not Found"}',
    "an ONNX model": b"\x08\x08\x12\x07pytorch\x1a\x052.0.0" + bytes(range(200)),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("words", REFUSED)
def test_refused_files_are_named_in_one_line_of_our_own(
    words: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(REFUSED[words])
    with pytest.raises(CheckpointError) as caught:
        load_backbone(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: no weights of PyTorch, or damaged: {words}")
    assert "\n" not in said
    assert "weights_only" not in said


def test_a_pickled_model_is_refused_and_its_classes_named(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "model.pth")
    with pytest.raises(CheckpointError) as caught:
        load_backbone(tmp_path / "model.pth")
    said = str(caught.value)
    assert "holds Python objects (torch.nn.modules.linear.Linear)" in said
    assert "torch.save(network.state_dict(), …)" in said
    assert "\n" not in said
    assert "weights_only" not in said


def test_a_torchscript_program_is_refused_by_its_name(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"or damaged: a TorchScript program$"):
        load_backbone(tmp_path / "m.pt")


def test_cut_files_are_damaged(tmp_path: Path) -> None:
    torch.save(arcface_torch_names(small()), tmp_path / "b.pth")
    save_backbone(small(), tmp_path / "b.safetensors")
    for name in ("b.pth", "b.safetensors"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        kind = "a safetensors file, d" if name[2] == "s" else "or d"
        with pytest.raises(CheckpointError, match=f"{name}: .*{kind}amaged") as caught:
            load_backbone(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_file_that_announces_more_than_it_holds(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1).expand(10**6)}, tmp_path / "bomb.pth")
    with pytest.raises(CheckpointError, match="announces tensors of 4,000,000 bytes"):
        load_backbone(tmp_path / "bomb.pth")


def test_an_unusable_configuration_inside(tmp_path: Path) -> None:
    for inside, words in (("{", "no usable configuration inside; was it saved"), ('{"depth": 3}', "no usable"),
                          ('{"name": "iresnet99"}', "inside; name: got 'iresnet99'")):  # fmt: skip
        save_file({"x": torch.zeros(1)}, tmp_path / "t.safetensors", {"btnet_backbone": inside})
        with pytest.raises(CheckpointError, match=words):
            load_backbone(tmp_path / "t.safetensors")


def test_pretrained_mobilefacenet_loads(btnet_data: Path) -> None:
    backbone = load_backbone(btnet_data / "mobilefacenet_casia.safetensors").eval()
    assert sum(p.numel() for p in backbone.parameters()) == 999_552
    assert backbone.config.size == (112, 96)
    rows = backbone.resolutions()
    first = {r: next(name for name, value in rows.items() if value == r) for r in (56, 28, 14, 7)}
    assert first == {56: "conv1", 28: "block0", 14: "block5", 7: "block12"}
    assert backbone(torch.randn(2, 3, 112, 96)).shape == (2, 128)
