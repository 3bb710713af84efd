"""Files of weights, checkpoints and configurations that are damaged or made up: named errors, nothing else."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import io
import json
import os
import pickle
import random
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from btnet_core.data.survface import read_mat
from btnet_core.errors import BTNetError, CheckpointError, ConfigError, DataError
from btnet_core.files import lock
from btnet_core.images import encode
from btnet_core.models.backbone import BackboneConfig, build_backbone
from btnet_core.models.btnet import BTNet
from btnet_core.models.weights import load_backbone, save_backbone
from btnet_core.training import checkpoint
from btnet_core.training.classifier import load_classifier, save_classifier
from btnet_core.training.config import TrainConfig
from btnet_tools.cli import main

TINY = BackboneConfig(name="iresnet18", width=0.0625, embedding=4)
QUIET = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
FACES = {"kind": "synthetic", "identities": 4, "images": 3, "seed": 0}
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
    foreign = {
        "dw_conv1.conv.weight": torch.zeros(2),
        "linear7.conv.weight": torch.zeros(1, 1, 7, 6),
    }
    buffer = io.BytesIO()
    torch.save(foreign, buffer)
    checkpoint.save_state(folder, {"step": 3, "network": {"a": torch.zeros(4)}})
    names = (
        "trunk.safetensors",
        "classifier.safetensors",
        "btnet/branch_7.safetensors",
        checkpoint.STATE,
    )
    return Files(
        {name: (folder / name).read_bytes() for name in names} | {"foreign.pth": buffer.getvalue()}
    )


@given(harm=damage)
@QUIET
def test_a_damaged_trunk(files: Files, tmp_path: Path, harm: tuple[float, int, bytes]) -> None:
    for name, within in (
        ("trunk.safetensors", 600),
        ("trunk.safetensors", 10**9),
        ("foreign.pth", 10**9),
    ):
        path = tmp_path / name
        path.write_bytes(damaged(files[name], harm, within))
        with contextlib.suppress(BTNetError):
            load_backbone(path)


@given(harm=damage)
@QUIET
def test_a_damaged_branch_or_classifier(
    files: Files, tmp_path: Path, harm: tuple[float, int, bytes]
) -> None:
    (tmp_path / "trunk.safetensors").write_bytes(files["trunk.safetensors"])
    (tmp_path / "branch_7.safetensors").write_bytes(
        damaged(files["btnet/branch_7.safetensors"], harm, 600)
    )
    with contextlib.suppress(BTNetError):
        BTNet.load(tmp_path)
    (tmp_path / "classifier.safetensors").write_bytes(
        damaged(files["classifier.safetensors"], harm, 10**9)
    )
    with contextlib.suppress(BTNetError):
        load_classifier(tmp_path / "classifier.safetensors", 3, 4)


@pytest.mark.parametrize(
    "metadata",
    ["{", "[]", "5", '{"nme": 1}', '{"name": []}', '{"width": "wide"}', '{"width": NaN}', '{"size": 3}',
     '{"embedding": 1e300}', '{"width": 1e18}', "[" * 100_000],
)  # fmt: skip
def test_a_trunk_with_an_impossible_configuration(tmp_path: Path, metadata: str) -> None:
    from btnet_core.files import write_safetensors

    write_safetensors(
        tmp_path / "trunk.safetensors",
        {"a": torch.zeros(1)},
        {"btnet_backbone": metadata, "digest": ""},
    )
    for load in (
        lambda: load_backbone(tmp_path / "trunk.safetensors"),
        lambda: BTNet.load(tmp_path),
    ):
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


def test_weights_that_unpack_to_more_than_the_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    for name, load in (
        ("foreign.pth", lambda: load_backbone(tmp_path / "foreign.pth")),
        (checkpoint.STATE, lambda: checkpoint.load_state(tmp_path)),
    ):
        plain, path = io.BytesIO(), tmp_path / name
        torch.save({"format": checkpoint.FORMAT, "a": torch.zeros(10**6)}, plain)
        with (
            zipfile.ZipFile(plain) as archive,
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb,
        ):
            for entry in archive.namelist():
                bomb.writestr(entry, archive.read(entry))
        assert path.stat().st_size < 10**5
        with pytest.raises(CheckpointError, match="unpacks to 4,"):
            load()


def test_weights_that_announce_more_than_the_file_holds_are_refused(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "backbone.pth")
    with pytest.raises(CheckpointError, match="announces tensors of 4,000,000,000,000 bytes"):
        load_backbone(tmp_path / "backbone.pth")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
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


# ---- the harnesses of scripts/fuzz.py, which atheris drives for hours ----

spec = importlib.util.spec_from_file_location(
    "fuzz", Path(__file__).resolve().parents[2] / "scripts" / "fuzz.py"
)
assert spec
fuzz = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fuzz)  # type: ignore[union-attr]
# Found by it: scipy's reader goes through a null pointer for this file.
CRASH = zlib.decompress(base64.b85decode(
    "c-r%I4DoSvQZUssQ1EpO(M`+DNmU5QNi0drFUqx2D9A6)tk6+#E=o--Nlj76&$ChpDNR-I%P&(fGEp!zvof}{GPO`JGB7e@zy}(z3p0B9@&Tz6K+Fcj"
    "93Ua66f2a^1Qi2eZXixi%*jbDs*EpAEdi?o>32ZV&w{2Oq>l&5TmdNGFg`gk*D&5dFRLIOmpL{>m}3Mn#}L_^03>txi1bfpN-@MhsM#=kn4mNO7wsyE"
))  # fmt: skip


@pytest.mark.parametrize("name", fuzz.PARSERS)
def test_every_parser_reads_its_good_files_and_names_what_is_wrong_with_others(
    name: str, tmp_path: Path
) -> None:
    seeds, read = fuzz.harnesses(tmp_path)[name]
    dice, refused = random.Random(0), 0
    if name != "checkpoint":  # whose seeds are too small to be networks
        read(seeds[0])
    for seed in seeds:
        for _ in range(40):
            data = bytearray(seed)
            for _ in range(dice.randint(1, 4)):
                at = dice.randrange(len(data))
                data[at : at + dice.choice((1, 1, 1, 4, 50))] = dice.randbytes(
                    dice.choice((0, 1, 1, 4))
                )
                data = data or bytearray(1)
            try:
                read(bytes(data))
            except BTNetError:
                refused += 1
    assert refused


def test_what_crashes_scipys_reader_is_a_named_error(tmp_path: Path) -> None:
    (tmp_path / "crash.mat").write_bytes(CRASH)
    with pytest.raises(DataError, match=r"crash\.mat: a list in MATLAB 5, damaged"):
        read_mat(tmp_path / "crash.mat")


def test_the_fuzzer_itself_runs(tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="pip install -e '.[fuzz]'")
    script = Path(fuzz.__file__)
    command = [
        sys.executable,
        script,
        "--parsers",
        "idx",
        "--seconds",
        "3",
        "--out",
        tmp_path / "seen.json",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads((tmp_path / "seen.json").read_text())["parsers"]["idx"]
    assert seen["inputs"] > 100
    assert seen["found"] == 0


# ---- nowhere to write ----


@pytest.fixture(params=["ro", "size=4k"])
def no_room(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder on a disk that is read-only, or full."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", request.param, "tmpfs", str(place)]
    if (
        not hasattr(os, "geteuid")
        or os.geteuid()
        or subprocess.run(mount, capture_output=True).returncode
    ):
        pytest.skip("mounting a small tmpfs needs a Linux root")
    if request.param != "ro":
        (place / "full").write_bytes(bytes(4096))
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def settled(folder: Path) -> Path:
    """The file of a configuration."""
    (folder / "c.json").write_text(
        TrainConfig(data=FACES, backbone=TINY, batch=4, epochs=1, warmup_epochs=0).to_json()
    )
    return folder / "c.json"


def test_a_disk_without_room_is_named_by_every_command(
    no_room: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model, faces = str(tmp_path / "model"), tmp_path / "faces"
    BTNet(build_backbone(TINY), (7,)).save(model)
    faces.mkdir()
    (faces / "a.png").write_bytes(encode(torch.zeros(3, 9, 9, dtype=torch.uint8)))
    (tmp_path / "people" / "one").mkdir(parents=True)
    (tmp_path / "people" / "one" / "a.png").write_bytes((faces / "a.png").read_bytes())
    committed = str(Path(__file__).resolve().parents[2] / "figures")
    for command in (
        ["embed", str(faces), "--model", model, "--out", str(no_room / "out.npz")],
        ["export", "--model", model, "--format", "pt2", "--out", str(no_room / "out")],
        ["figures", "--runs", committed, "--out", str(no_room / "out")],
        ["pack", str(tmp_path / "people"), str(no_room / "out")],
        ["train", "--config", str(settled(tmp_path)), "--out", str(no_room / "out")],
        [
            "adapt",
            "--trunk",
            f"{model}/trunk.safetensors",
            "--faces",
            json.dumps(FACES),
            "--set",
            "batch=4",
            "--out",
            str(no_room / "out"),
        ],
        ["reproduce", "--only", "02", "--runs", str(no_room / "out")],
    ):
        assert main(command) == 1, command
        said = capsys.readouterr().err
        assert said.startswith(f"btnet {command[0]}: "), said
        assert str(no_room) in said
    assert not [
        path
        for path in no_room.rglob("*")
        if path.is_file() and path.stat().st_size and path.name != "full"
    ]


# ---- folders that others use, or that another version wrote ----


@pytest.fixture
def commands(tmp_path: Path) -> dict[str, list[str]]:
    """Of everything that works in a folder for long: out of the same folder, ``out``."""
    trunk, out = tmp_path / "trunk.safetensors", str(tmp_path / "out")
    options = ["--set", "batch=4", "--out", out, "--device", "cpu"]
    save_backbone(build_backbone(TINY), trunk)
    return {
        "train": ["train", "--config", str(settled(tmp_path)), "--out", out, "--device", "cpu"],
        "adapt": [
            "adapt",
            "--trunk",
            str(trunk),
            "--faces",
            json.dumps(FACES),
            "--resolutions",
            "7",
            *options,
        ],
        "reproduce": ["reproduce", "--runs", out, "--only", "02"],
    }


HELD = {"train": "out", "adapt": "out/train/branch_7", "reproduce": "out/demo"}


@pytest.mark.parametrize("name", HELD)
def test_a_second_run_in_a_folder_is_told_who_is_there(
    name: str, commands: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    place = tmp_path / HELD[name]
    place.mkdir(parents=True)
    with lock(place):
        assert main(commands[name]) == 1
    said = capsys.readouterr().err
    assert f"process {os.getpid()}" in said
    assert str(place) in said


@pytest.mark.parametrize("name", ["train", "adapt"])
@pytest.mark.parametrize("state", [{"format": 99}, {"step": 3}, [1]])
def test_a_checkpoint_of_another_version_is_told_and_kept(
    name: str,
    state: Any,
    commands: dict[str, list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    path = tmp_path / HELD[name] / checkpoint.STATE
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    before = path.read_bytes()
    assert main(commands[name]) == 1
    assert f"{path}: format" in (said := capsys.readouterr().err)
    assert f"expected {checkpoint.FORMAT}" in said
    assert "--fresh" in said
    assert path.read_bytes() == before
    if name == "train":
        assert main([*commands[name], "--fresh"]) == 0


@pytest.mark.parametrize("name", ["train", "adapt"])
def test_missing_data_is_told_before_anything_is_written(
    name: str, commands: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for missing in ("nowhere/train.rec", "nowhere"):
        line = [word.replace(json.dumps(FACES), str(tmp_path / missing)) for word in commands[name]]
        (tmp_path / "c.json").write_text(
            TrainConfig(data=str(tmp_path / missing), backbone=TINY).to_json()
        )
        assert main(line) == 1
        assert str(tmp_path / missing) in capsys.readouterr().err
    assert not [
        path
        for path in (tmp_path / "out").rglob("*")
        if path.suffix in (".pt", ".safetensors", ".jsonl")
    ]
