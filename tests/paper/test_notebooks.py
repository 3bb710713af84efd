"""The notebooks: a fixed head, cells of one thought, no outputs, every cell safe to run twice."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from btnet_core.training.config import TrainConfig
from btnet_core.training.loop import train
from btnet_paper import results, study
from btnet_paper.notebooks import load_notebooks

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = {one.name: one for one in load_notebooks(ROOT / "notebooks")}
HEAD = ("Claim", "What we do.", "What to look for.", "Minutes.", "Needs.")
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def cells(name: str, kind: str) -> list[str]:
    return [source for one, source in NOTEBOOKS[name].cells if one == kind]


def raw(name: str) -> dict[str, Any]:
    return json.loads(NOTEBOOKS[name].path.read_text("utf-8"))


def lines_of(source: str) -> list[str]:
    """Lines of code: blank ones do not count."""
    return [line for line in source.splitlines() if line.strip()]


def test_they_are_the_papers_sections_and_one_beyond() -> None:
    assert [name[:2] for name in sorted(NOTEBOOKS)] == [f"{number:02}" for number in range(13)]


@pytest.mark.parametrize("name", sorted(NOTEBOOKS))
def test_the_head_says_what_is_claimed_done_and_needed(name: str) -> None:
    head = cells(name, "markdown")[0]
    assert head.startswith(f"# {name[:2]} · ")
    assert f"(../docs/executed/{name}.md)" in head
    assert re.findall(r"^\*\*([^*]+)\*\*", head, re.M) == list(HEAD)
    claim = head.split("**Claim**")[1].split("**What we do.**")[0]
    assert re.match(r" \((Section|Sections|Appendix|Abstract)[^)]*\): “", claim)
    minutes = re.search(r"\*\*Minutes\.\*\* demo (\d+), lfw (\d+)\.", head)
    assert minutes
    expected = NOTEBOOKS[name].expected
    assert [int(n) for n in minutes.groups()] == [
        max(1, round(expected[scale] / 60)) for scale in ("demo", "lfw")
    ]


@pytest.mark.parametrize("name", sorted(NOTEBOOKS))
def test_parameters_are_literals_and_set_up_and_record_are_short(name: str) -> None:
    parameters, *code = cells(name, "code")
    tags = [cell["metadata"].get("tags", []) for cell in raw(name)["cells"]]
    assert [tag for tag in tags if "parameters" in tag] == [["parameters"]]
    for statement in ast.parse(parameters).body:
        assert isinstance(statement, ast.Assign)
        ast.literal_eval(statement.value)
    assert {"scale", "run_dir", "seed", "device"} <= NOTEBOOKS[name].parameters.keys()
    (set_up,) = [source for source in code if "Study(" in source]
    assert len(lines_of(set_up)) <= 6
    (record,) = [source for source in code if "study.record(" in source]
    call = next(
        node
        for node in ast.walk(ast.parse(record))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "study.record"
    )
    assert call.end_lineno - call.lineno < 3


@pytest.mark.parametrize("name", sorted(NOTEBOOKS))
def test_a_cell_is_one_thought(name: str) -> None:
    for source in cells(name, "code"):
        assert len(source.splitlines()) <= 12, source
        assert not re.search(r"sys\.path|^[!%]|^class |^def ", source, re.M), source
        for node in ast.walk(ast.parse(source)):
            inner = [one for one in ast.walk(node) if isinstance(one, COMPREHENSIONS)]
            assert not isinstance(node, COMPREHENSIONS) or inner == [node], source
    for source in (text for _, text in NOTEBOOKS[name].cells):
        assert all(len(line) <= 100 for line in source.splitlines()), source


def test_all_together_are_short_code_and_long_prose() -> None:
    code = [line for name in NOTEBOOKS for one in cells(name, "code") for line in lines_of(one)]
    words = [word for name in NOTEBOOKS for one in cells(name, "markdown") for word in one.split()]
    assert len(code) <= 800
    assert len(words) >= 4300


@pytest.mark.parametrize("name", sorted(NOTEBOOKS))
def test_source_notebooks_hold_no_outputs(name: str) -> None:
    code = [cell for cell in raw(name)["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)


@pytest.mark.parametrize("name", sorted(NOTEBOOKS))
def test_the_findings_are_three_sentences_with_computed_numbers(name: str) -> None:
    found = cells(name, "code")[-1]
    if name == "11_summary":
        assert "claims.summary" in found  # the only one whose prose is generated
        return
    text = found[found.index('f"""') :]
    assert len(re.findall(r"^- ", text, re.M)) == 3
    assert text.count("{") >= 3


@pytest.mark.parametrize("name", sorted(NOTEBOOKS))
def test_every_table_of_the_paper_is_followed_by_a_verdict(name: str) -> None:
    code = cells(name, "code")
    for place, source in enumerate(code):
        if re.search(r"study\.table\(\"table[1-8]\"", source):
            assert "study.verdict(" in code[place + 1]


def test_links_lead_somewhere() -> None:
    for notebook in NOTEBOOKS.values():
        text = "\n".join(source for kind, source in notebook.cells if kind == "markdown")
        for target in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", text):
            if "docs/executed" not in target and "://" not in target:
                assert (notebook.path.parent / target).exists(), (notebook.name, target)


def test_executed_pages_are_of_the_present_notebooks() -> None:
    pages = ROOT / "docs" / "executed"
    if not pages.is_dir():
        pytest.skip("docs/executed has not been made: python scripts/executed.py after a demo run")
    script = ROOT / "scripts" / "executed.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in NOTEBOOKS:
        files = [pages / f"{name}.md", *(pages / name).glob("*")]
        assert sum(path.stat().st_size for path in files) <= 400_000
        text = files[0].read_text("utf-8")
        assert "scale `demo`" in text
        assert not re.search(r"/tmp/|/home/|/work/|Traceback", text)
        assert {str(path.relative_to(pages)) for path in files[1:]} == set(
            re.findall(rf"src=\"({name}/\d+\.webp)\"", text)
        )


# ---- each run, at a scale of seconds ----

SMALL = {  # parameters of single notebooks
    "01_upsampling_error": {"images": 4},
    "02_architecture_and_cost": {"repeats": 1, "batch_size": 1},
    "09_feature_maps": {"images": 4},
    "10_explore": {"known": 3, "strangers": 4},
    "12_beyond_the_paper": {"count": 12},
}
TIMED = ("study.record(", "ms a face", "seconds", "origins(", "controls(")  # what they show varies


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Parameters of a scale whose networks are trained in seconds, in this process."""
    root = tmp_path_factory.mktemp("tiny")
    page = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text("utf-8"))
    people = {"kind": "synthetic", "identities": 8, "images": 4, "seed": 0}
    others = {**people, "identities": 12, "first": 100}
    page |= {"faces": people, "others": others, "survface_faces": people}
    page["pairs"] = [{"kind": "drawn", "faces": others, "count": 20, "seed": 0}]
    page["backbone"] = {"name": "iresnet18", "width": 0.125, "embedding": 16}
    page["specialists"] = {"native": dict(page["specialists"]["native"])}
    quick = {"epochs": 1, "batch": 8, "warmup_epochs": 0.0}
    for run in ("hr", "trunk", "branch", "ablation", "survface_trunk", "survface_branch"):
        page[run] |= quick | ({"data": people} if run == "ablation" else {})
    page["specialists"]["native"] |= quick
    (root / "tiny.yaml").write_text(yaml.safe_dump(page))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "train_all", in_this_process)
        yield {"scale": str(root / "tiny.yaml"), "run_dir": str(root / "run"), "device": "cpu"}


def in_this_process(
    runs: dict[Path, TrainConfig], *, device: str, **_: Any
) -> list[dict[str, Any]]:
    return [train(config, out, device=device, show="none") for out, config in runs.items()]


def run(source: str, names: dict[str, Any]) -> str:
    """Runs a cell; returns what it shows at its end."""
    *body, last = ast.parse(source).body
    if not isinstance(last, ast.Expr):
        body, last = [*body, last], ast.parse("None").body[0]
    exec(compile(ast.Module(body, []), "cell", "exec"), names)
    shown = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    for form in ("_repr_markdown_", "_repr_html_"):
        if hasattr(shown, form):
            return getattr(shown, form)()
    return repr(shown)


@pytest.mark.slow
@pytest.mark.notebook
@pytest.mark.parametrize("name", list(NOTEBOOKS))
def test_every_cell_runs_twice_with_the_same_result(name: str, tiny: dict[str, str]) -> None:
    parameters, *code = cells(name, "code")
    names: dict[str, Any] = {}
    run(parameters, names)
    names |= tiny | SMALL.get(name, {})
    for source in code:
        first = run(source, names)
        again = first if re.search("process_time|measure_time", source) else run(source, names)
        if not any(word in source for word in TIMED):
            assert first == again, source
    (set_up,) = [source for source in code if "Study(" in source]
    assert run(set_up, names) is not None
    record = results.load(tiny["run_dir"], name)
    assert record["scale"] == "tiny"
    assert record["values"]
