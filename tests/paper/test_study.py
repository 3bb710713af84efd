"""Study: the ceremony of a notebook, safe to build twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from btnet_core.data.faces import open_faces
from btnet_core.errors import DataError
from btnet_core.evaluation.embedders import MultiModelEmbedder, UpsamplingEmbedder
from btnet_core.evaluation.verification import evaluate_pairs
from btnet_core.models.backbone import BackboneConfig, build_backbone
from btnet_core.models.weights import load_backbone, save_backbone
from btnet_core.training.methods import phi_hr
from btnet_paper import figures, results
from btnet_paper.layouts import write_survface
from btnet_paper.scales import Scale, get_scale
from btnet_paper.study import Study

TINY = BackboneConfig(name="iresnet18", width=0.125, embedding=16)


def toy(**changes) -> Scale:
    demo = get_scale("demo")
    faces = {"kind": "synthetic", "identities": 4, "images": 3, "seed": 0}
    return replace(demo, name="toy", claim="A toy.", faces=faces, backbone=TINY, **changes)


def write_trunk(path: Path, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    save_backbone(build_backbone(TINY), path)
    return first_weight(path)


def first_weight(path: Path) -> torch.Tensor:
    return next(load_backbone(path).parameters()).detach()


def test_it_is_built_twice_and_says_what_it_is(tmp_path: Path) -> None:
    for _ in range(2):
        study = Study("05_verification", scale=toy(), run_dir=tmp_path, seed=3, device="cpu")
        drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    assert study.models == tmp_path / "models"
    assert study._repr_markdown_() == "Scale `toy`: A toy."
    assert study.settings == [
        (112, 7), (112, 14), (112, 28), (7, 7), (14, 14), (28, 28), (112, 112)
    ]  # fmt: skip
    assert Study("x", scale="demo").scale == get_scale("demo")
    assert Study("x", scale="demo").run_dir == get_scale("demo").run_dir()


def test_a_trunk_of_others_is_made_ready_and_renewed(tmp_path: Path) -> None:
    source, kept = tmp_path / "theirs.safetensors", tmp_path / "models/phi_hr/trunk.safetensors"
    scale = toy(pretrained=str(source))
    first = write_trunk(source, 0)
    Study("x", scale=scale, run_dir=tmp_path)
    assert torch.equal(first_weight(kept), first)
    before = kept.stat().st_mtime_ns
    Study("x", scale=scale, run_dir=tmp_path)
    assert kept.stat().st_mtime_ns == before
    second = write_trunk(source, 1)
    Study("x", scale=scale, run_dir=tmp_path)
    assert torch.equal(first_weight(kept), second)
    assert not torch.equal(first, second)


def test_a_record_says_how_it_came_about(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(figures, "save", lambda *_: [])
    study = Study("toy", scale=toy(), run_dir=tmp_path, seed=3, device="cpu")
    values = study.record({"x": 1.5}, config={"flip": True}, data=[study.faces], kernel="nearest")
    assert values == study.load() == {"x": 1.5}
    record = results.load(tmp_path, "toy")
    assert record["config"] == {"flip": True}
    assert record["data"] == study.faces.checksum
    assert (record["scale"], record["seed"], record["kernel"]) == ("toy", 3, "nearest")
    assert record["device"] == "cpu"
    assert record["precision"] in ("fp32", "bf16")
    assert record["seconds"] > 0
    assert record["threads"] == torch.get_num_threads()
    assert record["instruction_sets"] is not None


def test_its_figures_are_drawn_and_shown(tmp_path: Path, monkeypatch) -> None:
    shown: list = []
    monkeypatch.setattr("btnet_paper.study.display", shown.append)
    values = {"history": {"phi_bt_7": {"step": [1, 2], "influence": [2.0, 1], "branch": [2.0, 1]}}}
    Study("04_train_branches", scale=toy(), run_dir=tmp_path).record(values)
    assert len(shown) == 2
    assert (tmp_path / "figures" / "loss_branch.png").is_file()


def test_figures_may_be_left_to_the_cells_before(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("btnet_paper.study.display", lambda _: pytest.fail("shown"))
    values = {"history": {"phi_bt_7": {"step": [1, 2], "influence": [2.0, 1], "branch": [2.0, 1]}}}
    study = Study("04_train_branches", scale=toy(), run_dir=tmp_path)
    study.record(values, show=False)
    assert (tmp_path / "figures" / "loss_branch.png").is_file()


def test_a_verdict_is_of_the_values_to_be_recorded(tmp_path: Path) -> None:
    study = Study("05_verification", scale=toy(), run_dir=tmp_path)
    rows = {"phi_mr": 80.0, "phi_bt": 90.0}
    accuracy = {name: {"14&14": {"accuracy": value}} for name, value in rows.items()}
    told = study.verdict("Table 1", {"accuracy": accuracy}).data
    assert "**As in the paper:** phi_bt above phi_mr below 112 (4.3.1, Table 1), 1 of 1" in told
    assert "no claim" in study.verdict("Table 2", {"accuracy": accuracy}).data
    shown = study.table("table1", {"accuracy": accuracy}, "toys")
    assert shown.caption.endswith("ours at the scale toy: toys")
    assert shown.data.loc["phi_bt"]["14&14"].to_dict() == {
        "ours": "90.00",
        "the paper": "90.90 (+4.13)",
    }


def test_pairs_are_verified_as_far_as_a_method_goes_and_embeddings_kept(tmp_path: Path) -> None:
    drawn = {"kind": "drawn", "faces": toy().faces, "count": 20, "seed": 0}
    study = Study("x", scale=toy(pairs=(drawn, drawn)), run_dir=tmp_path, device="cpu")
    torch.manual_seed(0)
    hr = UpsamplingEmbedder(build_backbone(TINY), device="cpu")
    found = study.verify(MultiModelEmbedder({112: hr, 14: hr}))
    assert list(found) == ["112&14", "14&14", "112&112"]
    (pairs, _) = study.pairs
    alone = evaluate_pairs(hr, pairs, [(14, 14)])["14&14"]["accuracy"]
    assert found["14&14"]["sets"] == [alone, alone]
    assert len(list((tmp_path / "embeddings").iterdir())) == 2  # at 112 and at 14 px
    assert list(study.verify(hr, [(7, 7)], flip=False)) == ["7&7"]
    assert study.compared(False, "1 < 2").data == "**Not as in the paper**, because 1 < 2."


def test_it_trains_remembers_configurations_and_history(tmp_path: Path, monkeypatch) -> None:
    asked = []

    def train(runs, **options):
        for out, config in runs.items():
            asked.append((config.name, out, options))
            out.mkdir(parents=True)
            rows = ('{"step": 1, "loss": 2.0}', '{"step": 2, "loss": 1.0}', '{"validation": {}}')
            (out / "metrics.jsonl").write_text("\n".join(rows))
        return [{"seconds": 1.0}] * len(runs)

    monkeypatch.setattr("btnet_paper.study.train_all", train)
    monkeypatch.setattr(figures, "save", lambda *_: [])
    study = Study("toy", scale=toy(), run_dir=tmp_path, device="cpu")
    runs = {name: phi_hr("faces", name=name, lr=0.3) for name in ("a", "b")}
    assert study.train(runs, "ablations") == {"a": {"seconds": 1.0}, "b": {"seconds": 1.0}}
    folders = [tmp_path / "models" / "ablations" / name for name in ("a", "b")]
    assert asked[:2] == [(f.name, f, {"device": "cpu"}) for f in folders]
    Study("toy", scale=toy(), run_dir=tmp_path / "two", device="cpu", processes="2").train(runs)
    assert asked[-1][2] == {"device": "cpu", "processes": 2}
    assert study.history("loss")["b"] == {"step": [1, 2], "loss": [2.0, 1.0]}
    study.record({"x": 1})
    assert results.load(tmp_path, "toy")["config"]["b"]["lr"] == 0.3


def test_stand_ins_where_there_is_no_real_set_and_the_real_one_where_there_is(
    tmp_path: Path,
) -> None:
    few = {"kind": "synthetic", "identities": 6, "images": 3, "seed": 0, "first": 50}
    study = Study("x", scale=toy(others=few, survface_faces=""), run_dir=tmp_path, device="cpu")
    test, templates = study.survface(), study.templates()
    assert "stand-in" in test.name
    assert "stand-in" in templates.name
    training = open_faces(study.survface_training())
    assert len(training) == len(study.faces)
    root = Path(study.survface_training()).parent
    write_survface(root, [(7, image := test.images[0])], [(7, image)], [(0, image)])
    (root / "STAND-IN.txt").unlink()
    real = Study("x", scale=toy(survface=str(root), ijbc="nowhere"), run_dir=tmp_path)
    assert real.survface().labels.tolist() == [7, 7, -1]
    assert real.survface_training() == str(root / "training_set")
    with pytest.raises(DataError, match="nowhere"):
        real.templates()


@pytest.mark.parametrize("field", ["scale", "device"])
def test_what_cannot_be_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match="unheard"):
        Study("x", **{field: "unheard"})
