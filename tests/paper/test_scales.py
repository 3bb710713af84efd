"""Pages of configs/: read strictly, variants change what they list alone."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from btnet_core.errors import ConfigError
from btnet_paper.scales import ROOT, RUNS, Scale, get_scale, pages

PAGE = """
claim: A toy.
faces: here
pairs: [there.bin]
others: elsewhere
backbone: {name: iresnet18, width: 0.25, embedding: 128}
trunk: {epochs: 3, batch: 8}
epochs: {14: 2, 7: 1}
"""


@pytest.fixture
def page(tmp_path: Path) -> Path:
    (tmp_path / "toy.yaml").write_text(PAGE)
    return tmp_path / "toy.yaml"


def test_the_repository_has_these_scales() -> None:
    lfw = {"lfw", "lfw-edgeface", "lfw-mr", "lfw-ms1m", "lfw-scratch"}
    assert set(pages()) == lfw | {"demo", "paper", "paper-authors"}
    for name in pages():
        assert get_scale(name).name == name
        assert get_scale(name).claim.endswith(".")


def test_a_variant_changes_what_it_lists_and_nothing_else() -> None:
    lfw, other = get_scale("lfw"), get_scale("lfw-mr")
    changed = {f.name for f in fields(Scale) if getattr(lfw, f.name) != getattr(other, f.name)}
    listed = {"teacher", "variants", "specialists", "resolutions", "epochs"}
    assert changed == listed | {"name"}
    assert get_scale("lfw-mr").epochs == {56: 1, 28: 6, 14: 10, 7: 6}


def test_the_authors_choices_are_one_page() -> None:
    paper, theirs = get_scale("paper"), get_scale("paper-authors")
    assert (paper.authors, theirs.authors) == (False, True)
    assert theirs.survface_epochs == {7: 25}
    assert (paper.branch, theirs.branch) == ({}, {})


def test_a_page_of_ones_own(page: Path) -> None:
    scale = get_scale(str(page))
    assert (scale.name, scale.faces, scale.pairs) == ("toy", "here", ("there.bin",))
    assert scale.epochs == {14: 2, 7: 1}
    assert scale.run_dir() == ROOT / "runs" / "toy"
    assert scale.run_dir("given") == Path("given")
    page.with_name("more.yaml").write_text("base: toy\ntrunk: {batch: 16}\nfaces: [x]\n")
    more = get_scale(str(page.with_name("more.yaml")))
    assert more.trunk == {"epochs": 3, "batch": 16}
    assert scale.trunk == {"epochs": 3, "batch": 8}
    page.with_name("mine.yaml").write_text("base: paper\nbackbone: {name: iresnet18}\n")
    mine, paper = get_scale(str(page.with_name("mine.yaml"))), get_scale("paper")
    assert (mine.faces, mine.pairs) == (paper.faces, paper.pairs)
    assert mine.backbone.name == "iresnet18"


def test_real_faces_are_shown_in_no_figure() -> None:
    assert get_scale("demo").shown == get_scale("demo").faces
    assert get_scale("lfw").shown == get_scale("demo").faces


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("epoch: {14: 2}", r"toy\.yaml: unknown \['epoch'\].*epochs"),
        *((f"{run}: {{epoch: 3}}", rf"{run}: unknown \['epoch'\]") for run in RUNS),
        ("name: other", "unknown \\['name'\\]"),
        ("backbone: {name: iresnet19}", "iresnet19"),
        ("specialists: {best: {}}", r"unknown \['best'\], expected some of \['native'"),
        ("specialists: {native: {epoch: 3}}", r"native: unknown \['epoch'\]"),
        ("base: nowhere", "nowhere"),
        ("a: [", r"no YAML \(line \d+, column \d+\)"),
    ],
)
def test_what_no_scale_has_is_refused(page: Path, line: str, message: str) -> None:
    page.write_text(f"{PAGE}\n{line}\n")
    with pytest.raises(ConfigError, match=message):
        get_scale(str(page))


def test_what_is_no_page_is_named(page: Path) -> None:
    with pytest.raises(ConfigError, match=r"lfw-fast.*expected one of demo, lfw"):
        get_scale("lfw-fast")
    page.write_text("claim: A toy.\n")
    with pytest.raises(ConfigError, match=r"toy\.yaml: backbone: got None, expected fields"):
        get_scale(str(page))
    backbone = "backbone: {name: iresnet18}\n"
    for text, told in (
        (f"claim: A toy.\n{backbone}", "page: the field faces is missing$"),
        ("backbone: {name: iresnet18, depth: 3}\n", r"backbone: unknown fields \['depth'\]; known"),
        (f"claim: 3\n{backbone}faces: x\nothers: x\n", "claim: got 3, expected a text$"),
        (
            f"claim: x\n{backbone}faces: x\nothers: x\npairs: y.bin\n",
            "pairs: got 'y.bin', expected",
        ),
        ("hr: [1]\n", r"hr: got \[1\], expected fields with their values$"),
        ("base: demo\nspecialists: native\n", "specialists: got 'native', expected fields"),
    ):
        page.write_text(text)
        with pytest.raises(ConfigError, match=told) as caught:
            get_scale(str(page))
        assert str(caught.value).startswith(str(page))
    page.write_text("- one\n")
    with pytest.raises(ConfigError, match="got list"):
        get_scale(str(page))
