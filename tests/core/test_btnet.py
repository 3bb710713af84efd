"""Branches, routes, selection, embedding of mixed sizes, storage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from btnet_core.device import resolve_device
from btnet_core.errors import CheckpointError, ConfigError, DataError
from btnet_core.evaluation.embedders import BranchEmbedder, MultiModelEmbedder, UpsamplingEmbedder
from btnet_core.files import read_safetensors, write_safetensors
from btnet_core.images import degrade, resize
from btnet_core.models.backbone import Backbone, BackboneConfig, build_backbone
from btnet_core.models.btnet import BTNet, Route, coupling_layer, select_branch, weights_digest


def trunk(name: str = "iresnet18", size: tuple[int, int] = (112, 112)) -> Backbone:
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name=name, width=0.125, embedding=16, size=size))
    for (
        module
    ) in backbone.modules():  # statistics that are not the identity, so that mixing them up shows
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    return backbone.eval()


@pytest.fixture
def btnet() -> BTNet:
    return BTNet(trunk(), (28, 14, 7)).eval()


def test_the_coupling_layer_is_the_first_unit_of_that_resolution() -> None:
    assert [coupling_layer(trunk(), r) for r in (56, 28, 14, 7)] == ["S1U1", "S2U1", "S3U1", "S4U1"]
    assert coupling_layer(trunk(size=(64, 64)), 8) == "S3U1"
    for r in (112, 30, 3):
        with pytest.raises(ConfigError, match=r"\[56, 28, 14, 7\]"):
            coupling_layer(trunk(), r)


@pytest.mark.parametrize(
    ("name", "size"), [("iresnet18", (112, 112)), ("mobilefacenet", (112, 96))]
)
@pytest.mark.parametrize("r", [56, 28, 14, 7])
def test_a_branch_keeps_its_resolution_throughout(name: str, size: tuple[int, int], r: int) -> None:
    route = Route(trunk(name, size), r).eval()
    x = torch.randn(2, 3, r, r * size[1] // size[0])
    z = x
    for unit in route.branch:
        z = unit(z)
        assert z.shape[-2:] == x.shape[-2:]
    assert route(x).shape == (2, 16)
    with pytest.raises(DataError, match=str(r)):
        route(torch.randn(2, 3, 112, 112))


def test_the_route_equals_the_trunk_from_the_coupling_layer_on() -> None:
    """A fresh T_r is the trunk's own rest: fed with the trunk's feature map it gives the trunk's embedding."""
    backbone = trunk()
    x = torch.randn(2, 3, 112, 112)
    for r in (56, 28, 14, 7):
        route = Route(backbone, r).eval()
        *_, (_, z) = backbone.features(x, upto=coupling_layer(backbone, r))
        torch.testing.assert_close(route.finish(z), backbone(x), rtol=0, atol=0)


def test_convolutions_are_shared_and_batch_norms_are_not(btnet: BTNet) -> None:
    route = btnet.route(14)
    assert route.shared.S4U1.conv1.weight is btnet.trunk.body.S4U1.conv1.weight
    assert route.head.fc.weight is btnet.trunk.head.fc.weight
    assert route.branch.S1U1.conv1.weight is not btnet.trunk.body.S1U1.conv1.weight
    before = weights_digest(btnet.trunk)
    for norm in (norm for _, norm in route.shared_norms()):
        norm.running_mean.add_(1)
        with torch.no_grad():
            norm.bias.add_(1)
    assert weights_digest(btnet.trunk) == before
    assert torch.equal(btnet.route(7).head.bn.bias, btnet.trunk.head.bn.bias)


def test_parameter_objects_stay_shared_after_moving_dtype_and_device(btnet: BTNet) -> None:
    btnet.to(torch.float64).to(memory_format=torch.channels_last)
    assert btnet.route(7).head.fc.weight is btnet.trunk.head.fc.weight


def test_shortcut_that_only_downsampled_is_dropped_and_named() -> None:
    assert "S1U1.shortcut.conv.weight" in Route(trunk(), 28).dropped
    assert Route(trunk(), 28).branch.S1U1.shortcut is None
    assert Route(trunk(), 28).branch.S2U1.shortcut is not None


def test_training_a_branch_leaves_the_trunk_alone(btnet: BTNet) -> None:
    before, route = weights_digest(btnet.trunk), btnet.route(14).train()
    chosen = route.trainable()
    for name, parameter in route.named_parameters():
        parameter.requires_grad_(name in chosen)
    optimiser = torch.optim.SGD(chosen.values(), lr=0.1)
    route(torch.randn(4, 3, 14, 14)).square().sum().backward()
    optimiser.step()
    assert weights_digest(btnet.trunk) == before
    assert all(parameter.grad is not None for parameter in chosen.values())


def test_bn_modes_select_what_moves_in_the_trunk(btnet: BTNet) -> None:
    route = btnet.route(14)
    sets = {mode: set(route.trainable(bn=mode)) for mode in ("all", "authors", "frozen_bn")}
    assert sets["frozen_bn"] < sets["authors"] < sets["all"] < set(route.trainable(fix_trunk=False))
    assert {"shared.S4U1.shortcut.bn.weight", "head.features.bias"} <= sets["all"] - sets["authors"]
    with pytest.raises(ConfigError):
        route.trainable(bn="none")


def test_allocation_moves_the_end_of_the_branch() -> None:
    backbone = trunk()
    x = torch.randn(2, 3, 14, 14)
    sizes = {}
    for unit in ("S1U1", "S2U2", "S3U1", "S4U1", "S4U2"):
        route = Route(backbone, 14, couple_at=unit).eval()
        assert route(x).shape == (2, 16)
        sizes[unit] = sum(p.numel() for p in route.branch.parameters())
    assert list(sizes.values()) == sorted(sizes.values())
    with pytest.raises(ConfigError, match="S9U9"):
        Route(backbone, 14, couple_at="S9U9")


# ---- branch selection ----


@pytest.mark.parametrize(
    ("size", "strategy", "expected"),
    [
        ((20, 24), "max+ceil", 28),
        ((20, 24), "max+floor", 14),
        ((20, 24), "min+near", 14),  # 20 < 21
        ((21, 30), "min+near", 28),  # half-way goes up
        ((10, 11), "avg+near", 7),  # integer mean 10 < 10.5
        ((11, 11), "avg+near", 14),
        ((70, 70), "avg+near", 112),
        ((69, 69), "avg+near", 28),
        ((28, 28), "max+ceil", 28),
        ((29, 5), "max+ceil", 112),
        ((29, 5), "min+ceil", 7),
        ((3, 3), "max+floor", 7),
        ((500, 500), "max+ceil", 112),
    ],
)
def test_selection_by_hand(size: tuple[int, int], strategy: str, expected: int) -> None:
    indicator, rounding = strategy.split("+")
    assert select_branch(*size, indicator=indicator, rounding=rounding) == expected


def test_selection_on_arrays_equals_one_by_one_and_brute_force() -> None:
    rng = np.random.default_rng(0)
    w, h = rng.integers(1, 200, (2, 500))
    branches = (7, 14, 28, 112)
    for indicator, side in (
        ("min", np.minimum(w, h)),
        ("max", np.maximum(w, h)),
        ("avg", (w + h) // 2),
    ):
        for rounding in ("floor", "near", "ceil"):
            got = select_branch(w, h, indicator=indicator, rounding=rounding)
            for value, r in zip(side.tolist(), got.tolist(), strict=True):
                if rounding == "near":
                    assert abs(value - r) == min(abs(value - b) for b in branches)
                elif rounding == "ceil":
                    assert r == min((b for b in branches if b >= value), default=112)
                else:
                    assert r == max((b for b in branches if b <= value), default=7)


def test_selection_errors() -> None:
    with pytest.raises(ConfigError, match="mean"):
        select_branch(3, 3, indicator="mean")
    with pytest.raises(ConfigError):
        select_branch(0, 3)


# ---- embed ----


def random_face(rows: int, columns: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), dtype=np.uint8)


def test_embed_takes_any_kind_and_size_and_keeps_the_order(btnet: BTNet, tmp_path: Path) -> None:
    sizes = [(112, 112), (9, 7), (28, 20), (13, 14), (200, 180), (6, 5), (28, 28)]
    arrays = [random_face(*size, seed=index) for index, size in enumerate(sizes)]
    Image.fromarray(arrays[1]).save(tmp_path / "face.png")
    images = list(arrays)
    images[1] = tmp_path / "face.png"
    images[2] = Image.fromarray(arrays[2])
    images[3] = torch.from_numpy(arrays[3]).permute(2, 0, 1)
    together, info = btnet.embed(images, return_info=True)
    assert [entry["r"] for entry in info] == [112, 14, 28, 14, 112, 7, 28]
    assert info[1]["resize_factor"] == pytest.approx((14 / 9, 2.0))
    torch.testing.assert_close(together.norm(dim=1), torch.ones(7))
    for index, image in enumerate(images):
        torch.testing.assert_close(btnet.embed([image])[0], together[index], atol=1e-5, rtol=1e-4)
    pixels = resize(torch.from_numpy(arrays[5]).permute(2, 0, 1), 7)
    by_hand = btnet(btnet.trunk.normalise(pixels[None]), 7)[0]
    torch.testing.assert_close(
        btnet.embed([arrays[5]], normalise=False)[0], by_hand, atol=1e-5, rtol=1e-4
    )


def test_embed_nothing_and_training_mode(btnet: BTNet) -> None:
    assert btnet.embed([]).shape == (0, 16)
    btnet.train()
    btnet.embed([random_face(14, 14, 0)])
    assert btnet.training


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((5, 5), np.uint8), "array"),
        ("missing.png", r"missing\.png"),
        (torch.zeros(3, 5, 5) - 1, "span"),
        (torch.rand(3, 5, 5), "not"),
        (object(), "object"),
    ],
)
def test_embed_names_the_bad_image(btnet: BTNet, bad: object, message: str) -> None:
    with pytest.raises(DataError, match=rf"images\[1\].*{message}"):
        btnet.embed([random_face(14, 14, 0), bad])


# ---- storage ----


def test_save_and_load_the_trunk_once_and_each_branch(btnet: BTNet, tmp_path: Path) -> None:
    with torch.no_grad():
        for parameter in btnet.route(14).trainable().values():
            parameter.add_(0.01)
    btnet.route(14).head.bn.running_mean.add_(0.5)
    btnet.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "branch_14.safetensors",
        "branch_28.safetensors",
        "branch_7.safetensors",
        "trunk.safetensors",
    ]
    loaded = BTNet.load(tmp_path).eval()
    for r in (112, 28, 14, 7):
        x = torch.randn(2, 3, r, r)
        torch.testing.assert_close(loaded(x, r), btnet(x, r), rtol=0, atol=0)
    assert loaded.route(14).head.fc.weight is loaded.trunk.head.fc.weight
    own = sum(tensor.numel() for tensor in btnet.route(28).own_state().values())
    assert (tmp_path / "branch_28.safetensors").stat().st_size < 4 * own + 20_000
    assert BTNet.load(tmp_path, (7,)).resolutions == (7, 112)


def test_the_length_of_embeddings_is_stored_and_older_files_have_none(
    btnet: BTNet, tmp_path: Path
) -> None:
    btnet.route(14).length.fill_(0.25)
    btnet.save(tmp_path)
    assert BTNet.load(tmp_path).route(14).length == 0.25
    path = tmp_path / "branch_14.safetensors"
    state, metadata = read_safetensors(path)
    del state["length"]
    write_safetensors(path, state, metadata)
    assert BTNet.load(tmp_path).route(14).length == 1


def test_a_branch_of_another_trunk_is_refused(btnet: BTNet, tmp_path: Path) -> None:
    btnet.save(tmp_path)
    with torch.no_grad():
        btnet.trunk.body.S4U1.conv1.weight.add_(1)
    other = BTNet(btnet.trunk, (7,))
    other.save(tmp_path / "other")
    (tmp_path / "other" / "branch_7.safetensors").write_bytes(
        (tmp_path / "branch_7.safetensors").read_bytes()
    )
    with pytest.raises(CheckpointError, match="another trunk"):
        BTNet.load(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"branch_14\.safetensors"):
        BTNet.load(tmp_path / "other", (14,))
    write_safetensors(tmp_path / "bare" / "trunk.safetensors", {"a": torch.zeros(1)}, {})
    with pytest.raises(CheckpointError, match="configuration"):
        BTNet.load(tmp_path / "bare")


def test_unknown_resolution_is_an_error(btnet: BTNet) -> None:
    with pytest.raises(ConfigError, match="56"):
        btnet(torch.zeros(1, 3, 56, 56), 56)


# ---- embedders ----


def test_embedders_do_what_the_methods_say(btnet: BTNet) -> None:
    pixels = torch.randint(0, 256, (3, 3, 112, 112), dtype=torch.uint8)
    options = {"device": "cpu", "precision": "fp32", "batch_size": 2}
    backbone = btnet.trunk
    up, bt = UpsamplingEmbedder(backbone, **options), BranchEmbedder(btnet, **options)
    close = {"atol": 1e-4, "rtol": 1e-3}
    torch.testing.assert_close(
        up(pixels, 14), backbone(backbone.normalise(degrade(pixels, 14))), **close
    )
    torch.testing.assert_close(
        bt(pixels, 14), btnet(backbone.normalise(resize(pixels, 14)), 14), **close
    )
    torch.testing.assert_close(bt(pixels, 112), up(pixels, 112), **close)
    many = MultiModelEmbedder({112: up, 14: UpsamplingEmbedder(trunk("mobilefacenet"), **options)})
    torch.testing.assert_close(many(pixels, 112), up(pixels, 112), **close)
    with pytest.raises(ConfigError, match="7"):
        many(pixels, 7)


def test_a_device_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ConfigError, match="tpu9"):
        resolve_device("tpu9")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="CUDA"):
            resolve_device("cuda")
