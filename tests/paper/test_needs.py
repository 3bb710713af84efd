"""What a scale needs: found out before anything runs, counted, and part of what results depend on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from btnet_core.data.pairs import write_bin
from btnet_core.data.survface import TEST_FOLDER
from btnet_core.errors import ReproduceError
from btnet_core.images import encode
from btnet_core.models.backbone import BackboneConfig
from btnet_paper import needs
from btnet_paper.layouts import write_survface, write_survface_training
from btnet_paper.notebooks import load_notebooks
from btnet_paper.scales import get_scale

PAGE = """
claim: A toy.
faces: {kind: synthetic, identities: 3, images: 2, seed: 0}
pairs: [two.bin]
others: {kind: synthetic, identities: 3, images: 2, seed: 0}
backbone: {name: iresnet18, width: 0.125, embedding: 16}
survface: Surv
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data root with a page that names two sets in it."""
    monkeypatch.setenv("BTNET_DATA", str(tmp_path))
    (tmp_path / "toy.yaml").write_text(PAGE)
    face = torch.zeros(3, 112, 112, dtype=torch.uint8)
    write_bin(tmp_path / "two.bin", [encode(face, "PNG")] * 40, [True, False] * 10)
    image = torch.zeros(3, 20, 16, dtype=torch.uint8)
    write_survface(tmp_path / "Surv", [(1, image)], [(1, image)], [(0, image), (0, image)])
    write_survface_training(tmp_path / "Surv", [(1, image), (2, image)])
    return tmp_path


def scale(place: Path):
    return get_scale(str(place / "toy.yaml"))


def test_all_is_found_and_counted(place: Path, capsys: pytest.CaptureFixture) -> None:
    assert needs.check(scale(place))
    told = capsys.readouterr().out
    assert "6 images of 3 people" in told
    assert "20 pairs" in told
    assert "SurvFace's test: Surv: 4 images" in told
    assert "SurvFace's training part: Surv/training_set: 2 images of 2 people" in told
    assert f"Data root: {place}" in told
    assert "LACKS" not in told
    for run in ("Table 1: phi_hr", "Table 2: phi_bt_7", "Section 5: cosface"):
        assert run in told
    needs.require(scale(place), ["03", "06"])


def test_what_lacks_is_said_before_anything_runs(
    place: Path, capsys: pytest.CaptureFixture
) -> None:
    (place / "two.bin").unlink()
    for path in (place / "Surv" / TEST_FOLDER / "unmated_probe").iterdir():
        path.unlink()
    (place / "Surv" / TEST_FOLDER / "unmated_probe").rmdir()
    assert not needs.check(scale(place))
    assert capsys.readouterr().out.count("LACKS") == 2
    with pytest.raises(ReproduceError) as caught:
        needs.require(scale(place), ["03", "06"])
    text = str(caught.value)
    assert "pairs (notebooks 03): two.bin: no such verification set" in text
    assert "SurvFace's test (notebooks 06)" in text
    assert f"data root: {place} (BTNET_DATA)" in text
    needs.require(scale(place), ["00", "01", "02"])  # these need neither


def test_a_probe_that_is_gone_or_another_picture_changes_what_results_depend_on(
    place: Path,
) -> None:
    page, seen = str(place / "toy.yaml"), []
    seen.append(needs.data_checksum(page))
    (place / "Surv" / TEST_FOLDER / "unmated_probe" / "000001.jpg").unlink()
    seen.append(needs.data_checksum(page))
    (place / "Surv" / "training_set" / "2").joinpath("new.jpg").write_bytes(b"x")
    seen.append(needs.data_checksum(page))
    (place / "two.bin").write_bytes((place / "two.bin").read_bytes() + b" ")
    seen.append(needs.data_checksum(page))
    assert len(set(seen)) == 4
    assert seen[-1] == needs.data_checksum(page)


def test_pairs_beside_the_training_faces_are_found(place: Path) -> None:
    """InsightFace's own layout: the .bin files in the folder of train.rec."""
    page = place / "toy.yaml"
    page.write_text(PAGE.replace("faces: {kind: synthetic, identities: 3, images: 2, seed: 0}\np",
                                 "faces: ms1m\np", 1))  # fmt: skip
    assert scale(place).pairs == ("two.bin",)
    (place / "ms1m").mkdir()
    (place / "two.bin").rename(place / "ms1m" / "two.bin")
    assert scale(place).pairs == ("ms1m/two.bin",)


def test_costs_follow_from_operations_faces_and_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted for the paper's network: 6.31 GMACs a face at 112 px, 4.28 at 14; no data is here."""
    monkeypatch.setenv("BTNET_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    paper = get_scale("paper")
    table = needs.costs(paper)
    hours, images = table["GPU hours"], 5_179_510
    unit = needs.MACS_PER_SECOND * 3600
    assert hours["Table 1: phi_hr"] == pytest.approx(images * 25 * 3 * 6.31e9 / unit, rel=2e-3)
    branch = images * 10 * (3 * 4.28e9 + 6.31e9) / unit
    assert hours["Table 1: phi_bt_14"] == pytest.approx(branch, rel=2e-3)
    assert hours["Table 1: phi_mm_7"] == pytest.approx(images * 25 * 3 * 1.52e9 / unit, rel=5e-3)
    kept = table["features, GB"]["Section 5: cosface"]
    assert kept == pytest.approx(images * 2 * 2 * (3 * 14**2 + 256 * 14**2 + 512) / 1e9, rel=1e-6)
    assert table["features, GB"]["Table 1: phi_bt_14"] == 0
    weights = 12 * (43_590_848 + 93_431 * 512) / 1e9
    assert table["memory, GB"]["Table 1: phi_hr"] == pytest.approx(weights, rel=1e-6)
    small = replace(paper, backbone=BackboneConfig(name="iresnet18", width=0.25, embedding=128))
    assert needs.costs(small)["GPU hours"].sum() < 0.05 * hours.sum()


# What in a notebook's source opens which data (Study's names, plans, people of the explorer)
OPENS = {
    "training faces": ("study.faces", "plans.plan(", "plans.ablations("),
    "pairs": ("study.pairs", "study.verify(", "plans.plan("),
    "SurvFace's test": ("study.survface(",),
    "SurvFace's training part": ("study.survface_training(",),
    "IJB-C": ("study.templates(",),
    "faces of other people": ("study.scale.others", "Explorer("),
    "phi_hr trained by others": ("Study(",),
}


def test_each_notebook_needs_what_its_source_opens() -> None:
    paper = replace(get_scale("paper"), pretrained="hr.pth")
    found = needs.needs(paper)
    told = {one.what: set(one.notebooks) for one in found}
    assert told.keys() == OPENS.keys()
    for what, names in OPENS.items():
        opened = set()
        for notebook in load_notebooks():
            code = "\n".join(text for kind, text in notebook.cells if kind == "code")
            if any(name in code for name in names):
                opened.add(notebook.number)
        assert told[what] == opened, what


def test_stand_ins_are_of_other_people_and_of_the_faces_to_tune_on() -> None:
    own = replace(get_scale("paper"), survface="", ijbc="", survface_faces="tuned")
    own = replace(own, ablation={"data": "ablated"})
    found = {str(one.spec): set(one.notebooks) for one in needs.needs(own)}
    assert found["lfw"] == {"06", "08", "09", "10", "12"}
    assert (found["tuned"], found["ablated"]) == ({"06"}, {"07", "12"})
