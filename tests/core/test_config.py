"""The configuration of a run: round trips, pages, the schedule, what cannot work."""

from __future__ import annotations

from pathlib import Path

import pytest

from btnet_core.errors import ConfigError
from btnet_core.images import Resize
from btnet_core.kinds import what_is
from btnet_core.models.backbone import BackboneConfig
from btnet_core.training import config as module
from btnet_core.training import methods
from btnet_core.training.config import TrainConfig

FACES = {"kind": "synthetic", "identities": 6, "images": 6, "seed": 0}


def test_schedule_of_a2() -> None:
    config = TrainConfig(data=FACES)
    assert (
        config.lr,
        config.epochs,
        config.warmup_epochs,
        config.momentum,
        config.weight_decay,
    ) == (
        0.2,
        25,
        2,
        0.9,
        5e-4,
    )
    rates = [config.lr_at(step, 10) for step in range(250)]
    assert rates[:20] == sorted(rates[:20])
    assert max(rates) == pytest.approx(0.2, rel=0.06)
    assert rates[20] == pytest.approx(0.2)
    assert rates[135] == pytest.approx(0.2 * 0.5**2)
    assert config.replace(batch=128).peak_lr == pytest.approx(0.05)
    bt = methods.phi_bt(FACES, 14, "t", "k")
    assert (bt.lr, bt.epochs, bt.warmup_epochs, bt.branch_weight, bt.fix_classifier) == (
        0.02,
        10,
        0.0,
        0.5,
        True,
    )


def test_the_first_and_last_steps_of_the_schedule() -> None:
    """Warm-up rises by equal steps to its peak; the last step before the end is a small square."""
    config = TrainConfig(data=FACES, warmup_epochs=2, epochs=10, lr=0.3)
    rates = [config.lr_at(step, 5) for step in range(50)]
    assert rates[:11] == pytest.approx([0.3 * k / 11 for k in range(1, 11)] + [0.3])
    assert rates[-1] == pytest.approx(0.3 * (1 / 40) ** 2)
    stopped = config.replace(stop_epoch=4)
    assert (stopped.last_epoch, config.last_epoch) == (4, 10)
    assert [stopped.lr_at(step, 5) for step in range(20)] == rates[:20]


def test_configuration_round_trip_and_errors() -> None:
    config = methods.phi_bt(FACES, 14, "trunk", couple_at="S4U1")
    assert TrainConfig.from_json(config.to_json()) == config
    with pytest.raises(ConfigError, match="learning_rate"):
        TrainConfig.from_json('{"data": "x", "learning_rate": 1}')
    for wrong in (
        {"loss": "l2"},
        {"epochs": 0},
        {"branch_weight": 1.0},
        {"size_weights": (1.0, 1.0)},
    ):
        with pytest.raises(ConfigError):
            TrainConfig(data=FACES, **wrong)


@pytest.mark.parametrize("wrong", [
    {"resolution": -1}, {"stop_epoch": 26}, {"sizes": ()}, {"sample_rate": 1.5}, {"momentum": 1.0},
    {"warmup_epochs": 25}, {"influence_weight": 0.0}, {"fix_classifier": True}, {"shift": 1.0},
    {"couple_at": "S3U1"}, {"branch_weight": 0.5, "resolution": 14}, {"batch": "many"},
    {"branch_weight": 0.5, "init": "t"}, {"accumulate": 2, "loss": "triplet"}, {"matmul": "tf32"},
])  # fmt: skip
def test_what_cannot_work_names_the_field(wrong: dict) -> None:
    with pytest.raises(ConfigError, match="|".join(wrong)):
        TrainConfig(data=FACES, **wrong)


def test_pages_of_json_and_yaml(tmp_path: Path) -> None:
    config = methods.phi_mr(FACES, "v2", weight_decay=1e-5)
    (tmp_path / "a.json").write_text(config.to_json())
    (tmp_path / "a.yaml").write_text(
        "name: phi_mr_v2  # with comments\n"
        "data: {kind: synthetic, identities: 6, images: 6, seed: 0}\n"
        "sizes: [112, 56, 28, 14, 7]\n"
        "size_weights: [0.3, 0.25, 0.2, 0.15, 0.1]\n"
        "weight_decay: 1.0e-5\n"
    )
    for name in ("a.json", "a.yaml"):
        assert TrainConfig.read(tmp_path / name) == config
    for text, told in (("[1", "YAML"), ("3", "fields"), ("data: x\nweight_decay: 1e-5", "number"),
                       ("data: x\nlearning_rate: 1", "learning_rate")):  # fmt: skip
        (tmp_path / "wrong.yaml").write_text(text)
        with pytest.raises(ConfigError, match=told):
            TrainConfig.read(tmp_path / "wrong.yaml")
    with pytest.raises(ConfigError, match=r"nothing.json"):
        TrainConfig.read(tmp_path / "nothing.json")


@pytest.mark.parametrize(("wrong", "told"), [
    ({"loss": "l2"}, "loss: got 'l2', expected one of normface, sphereface, .*center, circle$"),
    ({"epochs": 0}, "epochs: got 0, expected > 0"),
    ({"epochs": "ten"}, "epochs: got 'ten', expected an integer"),
    ({"shift": -1}, "shift: got -1, expected >= 0"),
    ({"shift": None}, "shift: got None, expected a number"),
    ({"batch": 2.5}, "batch: got 2.5, expected an integer"),
    ({"flip": 1}, "flip: got 1, expected true or false"),
    ({"epochs": True}, "epochs: got True, expected an integer"),
    ({"margin": "0.5"}, "margin: got '0.5', expected a number"),
    ({"sizes": 5}, "sizes: got 5, expected a list of integers"),
    ({"sizes": [112, "x"]}, r"sizes: got \[112, 'x'\], expected a list of integers"),
    ({"validation": "two.bin"}, "validation: got 'two.bin', expected a list"),
    ({"sizes": (112, 0)}, r"^sizes: got \(112, 0\), expected one or more, each >= 1"),
    ({"size_weights": (1.0, 1.0)}, r"^size_weights: got \(1.0, 1.0\), expected 1 numbers >= 0, not all 0"),
    ({"sizes": (112, 7), "size_weights": (2.0, -1.0)}, "^size_weights"),
    ({"sizes": (112, 7), "size_weights": (0.0, 0.0)}, "^size_weights"),
    ({"sample_rate": 1.1}, "^expected sample_rate <= 1"), ({"momentum": 1.0}, "momentum < 1"),
    ({"warmup_epochs": 25}, "warmup_epochs < epochs"),
    ({"stop_epoch": 26}, "^stop_epoch: got 26, expected at most 25"),
    ({"branch_weight": 0.5, "resolution": 14}, "^branch_weight > 0: distillation needs a pretrained"),
    ({"branch_weight": 0.5, "init": "t"}, "^branch_weight > 0: set `resolution`, only a branch"),
    ({"influence_weight": 0.0}, "are both 0: nothing to learn"),
    ({"fix_classifier": True}, "^fix_classifier: a fresh classifier is nothing"),
    ({"shift": 1.0}, "^couple_at, shift: of a branch alone"),
    ({"couple_at": "S3U1"}, "^couple_at, shift: of a branch alone"),
    ({"accumulate": 2, "loss": "triplet"}, "^accumulate: triplet needs the pairs"),
])  # fmt: skip
def test_what_is_told(wrong: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        TrainConfig(data=FACES, **wrong)


def test_the_ends_of_what_is_allowed() -> None:
    """Each beside a limit, on the side that works."""
    for fine in ({"sample_rate": 1.0}, {"stop_epoch": 25}, {"momentum": 0.0}, {"sizes": (1,)},
                 {"sizes": (112, 7), "size_weights": (1.0, 0.0)}, {"warmup_epochs": 0.0},
                 {"accumulate": 2}, {"loss": "triplet"}, {"lr": 1e-9},
                 {"branch_weight": 0.5, "resolution": 14, "init": "t", "influence_weight": 0.0},
                 {"fix_classifier": True, "classifier": "class_means"},
                 {"resolution": 14, "couple_at": "S3U1", "shift": 1.0}):  # fmt: skip
        assert (
            TrainConfig(data=FACES, **fine) != TrainConfig(data=FACES) or fine["sample_rate"] == 1
        )
    lists = TrainConfig(data=FACES, sizes=[112, 7], validation=["a"], validation_resolutions=[7])
    assert (lists.sizes, lists.validation, lists.validation_resolutions) == ((112, 7), ("a",), (7,))


def test_which_losses_have_a_classifier() -> None:
    uses = {
        loss: TrainConfig(data=FACES, loss=loss).uses_classes
        for loss in ("curricularface", "center", "triplet", "circle")
    }
    assert uses == {"curricularface": True, "center": True, "triplet": False, "circle": False}
    alone = TrainConfig(
        data=FACES, init="t", resolution=14, branch_weight=0.5, influence_weight=0.0
    )
    assert not alone.uses_classes


def test_fields_that_cannot_be_read(tmp_path: Path) -> None:
    for values, told in (
        ([1], r"^training configuration: got \[1\], expected fields with their values$"),
        ({"data": "x", "b": 1, 2: 3}, r": unknown fields \['2', 'b'\]; known: \['name', 'data',"),
        ({}, "^training configuration: the field data is missing$"),
        ({"data": "x", "backbone": 3}, "^backbone: got 3, expected fields with their values$"),
        (
            {"data": "x", "backbone": {"depth": 3}},
            r"^backbone: unknown fields \['depth'\]; known: ",
        ),
        ({"data": "x", "backbone": {"width": "1"}}, "^width: got '1', expected a number$"),
        ({"data": "x", "backbone": {"size": 112}}, "^size: got 112, expected a list of two int"),
        ({"data": "x", "resize": "area"}, "^resize: got 'area', expected fields with"),
        ({"data": "x", "resize": {"kernel": "lanczos"}}, "kernel"),
    ):
        with pytest.raises(ConfigError, match=told):
            TrainConfig.from_dict(values)
    with pytest.raises(ConfigError, match=r"^training configuration: no JSON from line 1, col"):
        TrainConfig.from_json("{")
    with pytest.raises(ConfigError, match=r"none.yml: cannot be read"):
        TrainConfig.read(tmp_path / "none.yml")
    (tmp_path / "page.yml").write_text("data: [")
    with pytest.raises(ConfigError, match=r"^.*page.yml: no YAML \(line 1\)$"):
        TrainConfig.read(str(tmp_path / "page.yml"))
    (tmp_path / "page.yml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match=r"page.yml: cannot be read"):
        TrainConfig.read(tmp_path / "page.yml")


def test_a_whole_configuration_comes_back() -> None:
    config = TrainConfig(
        data=FACES, backbone=BackboneConfig(name="iresnet18"), resize=Resize(kernel="area")
    )
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert config.to_dict()["backbone"]["name"] == "iresnet18"
    assert "\n" in config.to_json()


def test_what_is_told_of_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {
        "a.json": ("{", "training configuration: no JSON from line 1, column 2 on"),
        "b.json": ("[" * 100_000, "training configuration: no JSON, nested too deep"),
        "c.yaml": ("a: 1\nb: [", "{}: no YAML (line 2)"),
        "d.yml": ("a: \x01", "{}: no YAML (a sign it does not admit)"),
    }
    for name, (text, told) in pages.items():
        page = tmp_path / name
        page.write_text(text)
        with pytest.raises(ConfigError) as refused:
            TrainConfig.read(page)
        assert str(refused.value) == told.format(page)
    (tmp_path / "e.json").write_bytes(b"\xff{}")
    with pytest.raises(ConfigError) as refused:
        TrainConfig.read(tmp_path / "e.json")
    what = what_is(tmp_path / "e.json")
    assert str(refused.value) == f"{tmp_path / 'e.json'}: cannot be read as a page ({what})"
    with pytest.raises(ConfigError, match=r"none\.json: cannot be read as a page \(No such file"):
        TrainConfig.read(tmp_path / "none.json")
    monkeypatch.setattr(module, "yaml", None)
    with pytest.raises(ConfigError) as refused:
        TrainConfig.read(tmp_path / "c.yaml")
    told = f"{tmp_path / 'c.yaml'}: pages in YAML need the package pyyaml"
    assert str(refused.value) == told
