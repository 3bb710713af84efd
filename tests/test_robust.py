"""Files of weights, checkpoints and configurations that are damaged or made up: named errors, nothing else."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from btnet_core.backbones import BackboneConfig, build_backbone, load_backbone, save_backbone
from btnet_core.btnet import BTNet
from btnet_core.errors import BTNetError, CheckpointError, ConfigError
from btnet_core.training import checkpoint
from btnet_core.training.classifier import load_classifier, save_classifier
from btnet_core.training.config import TrainConfig

TINY = BackboneConfig(name="iresnet18", width=0.0625, embedding=4)
QUIET = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
# What is put in the place of a stretch of the file: at the front is its structure, at the end its numbers.
damage = st.tuples(st.floats(0, 1), st.sampled_from([1, 8, 200]), st.binary(min_size=1, max_size=8))


class Files(dict[str, bytes]):
    """Shown by hypothesis when a test fails: names are enough."""

    def __repr__(self) -> str:
        return str(list(self))


def damaged(data: bytes, harm: tuple[float, int, bytes], within: int) -> bytes:
    at = int(harm[0] * (min(within, len(data)) - 1))
    return data[:at] + harm[2] + data[at + harm[1] :]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A good one of each kind."""
    folder = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    trunk = build_backbone(TINY)
    save_backbone(trunk, folder / "trunk.safetensors")
    save_classifier(folder / "classifier.safetensors", torch.zeros(3, 4))
    BTNet(trunk, (7,)).save(folder / "btnet")
    foreign = {"dw_conv1.conv.weight": torch.zeros(2), "linear7.conv.weight": torch.zeros(1, 1, 7, 6)}
    buffer = io.BytesIO()
    torch.save(foreign, buffer)
    checkpoint.save_state(folder, {"step": 3, "network": {"a": torch.zeros(4)}})
    names = ("trunk.safetensors", "classifier.safetensors", "btnet/branch_7.safetensors", checkpoint.STATE)
    return Files({name: (folder / name).read_bytes() for name in names} | {"foreign.pth": buffer.getvalue()})


@given(harm=damage)
@QUIET
def test_a_damaged_trunk(files: Files, tmp_path: Path, harm: tuple[float, int, bytes]) -> None:
    for name, within in (("trunk.safetensors", 600), ("trunk.safetensors", 10**9), ("foreign.pth", 10**9)):
        path = tmp_path / name
        path.write_bytes(damaged(files[name], harm, within))
        with contextlib.suppress(BTNetError):
            load_backbone(path)


@given(harm=damage)
@QUIET
def test_a_damaged_branch_or_classifier(files: Files, tmp_path: Path, harm: tuple[float, int, bytes]) -> None:
    (tmp_path / "trunk.safetensors").write_bytes(files["trunk.safetensors"])
    (tmp_path / "branch_7.safetensors").write_bytes(damaged(files["btnet/branch_7.safetensors"], harm, 600))
    with contextlib.suppress(BTNetError):
        BTNet.load(tmp_path)
    (tmp_path / "classifier.safetensors").write_bytes(damaged(files["classifier.safetensors"], harm, 10**9))
    with contextlib.suppress(BTNetError):
        load_classifier(tmp_path / "classifier.safetensors", 3, 4)


@pytest.mark.parametrize(
    "metadata",
    ["{", "[]", "5", '{"nme": 1}', '{"name": []}', '{"width": "wide"}', '{"width": NaN}', '{"size": 3}',
     '{"embedding": 1e300}', '{"width": 1e18}', "[" * 100_000],
)  # fmt: skip
def test_a_trunk_with_an_impossible_configuration(tmp_path: Path, metadata: str) -> None:
    from btnet_core.backbones import write_safetensors

    write_safetensors(tmp_path / "trunk.safetensors", {"a": torch.zeros(1)}, {"btnet_backbone": metadata, "digest": ""})
    for load in (lambda: load_backbone(tmp_path / "trunk.safetensors"), lambda: BTNet.load(tmp_path)):
        with pytest.raises((CheckpointError, ConfigError)):
            load()


@given(data=st.binary(max_size=120), harm=damage)
@QUIET
def test_a_damaged_checkpoint_or_record(
    files: Files, tmp_path: Path, data: bytes, harm: tuple[float, int, bytes]
) -> None:
    (tmp_path / "checkpoint").mkdir(exist_ok=True)
    for content in (data, damaged(files[checkpoint.STATE], harm, 10**9)):
        (tmp_path / checkpoint.STATE).write_bytes(content)
        with contextlib.suppress(CheckpointError):
            checkpoint.load_state(tmp_path)
    for content in (data, b'"text"', b"[1]", b"{}", b'{"config": {}}'):
        (tmp_path / checkpoint.RECORD).write_bytes(content)
        record = checkpoint.read_record(tmp_path)
        assert record is None or {"config", "inputs", "metrics"} <= record.keys()


def test_weights_that_would_run_code_are_refused(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "checkpoint").mkdir()
    for path, load in (
        (tmp_path / "backbone.pth", lambda: load_backbone(tmp_path / "backbone.pth")),
        (tmp_path / checkpoint.STATE, lambda: checkpoint.load_state(tmp_path)),
    ):
        for write in (
            lambda path: torch.save({"a": Harm()}, path),
            lambda path: path.write_bytes(pickle.dumps(Harm())),
        ):
            write(path)
            with pytest.raises(CheckpointError):
                load()
    assert not (tmp_path / "ran").exists()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(name=st.sampled_from(sorted(asdict(TrainConfig(data="x")))), value=json_values)
@settings(max_examples=400, deadline=None)
def test_any_value_of_any_field_is_taken_or_named(name: str, value: Any) -> None:
    text = json.dumps({**asdict(TrainConfig(data="x")), name: value})
    with contextlib.suppress(ConfigError):
        config = TrainConfig.from_json(text)
        config.lr_at(3, 10)
        assert TrainConfig.from_json(config.to_json()) == config or "NaN" in config.to_json()


@given(text=st.text(max_size=40) | json_values.map(json.dumps))
@QUIET
def test_any_text_as_configuration(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert isinstance(TrainConfig.from_json(text), TrainConfig)
