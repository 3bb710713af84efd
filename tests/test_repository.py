"""The repository's promises: one list of dependencies, stripped notebooks of the agreed shape, working commands."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from btnet_paper.notebooks import load_notebooks

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def names(requirements: list[str]) -> dict[str, str]:
    """Package -> version bounds, spaces removed."""
    found = (re.match(r"([A-Za-z0-9_.-]+)\s*(.*)", text.split(";")[0]) for text in requirements)
    return {match[1].lower(): match[2].replace(" ", "") for match in found if match}


def test_environment_yml_is_pyprojects_list() -> None:
    """It names no package of its own: pip installs the project, with its list and its constraints."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    conda = names([entry for entry in listed if isinstance(entry, str)])
    assert conda == {"python": project["requires-python"], "pip": ""}
    (pip,) = [group["pip"] for group in listed if isinstance(group, dict)]
    extras = ",".join(project["optional-dependencies"])
    assert pip == ["-c constraints.txt", f"-e .[{extras}]"]


def test_constraints_pin_what_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and line[0] != "#"
    ]
    for line in lines:
        assert re.fullmatch(r'[a-z0-9-]+==[\w.]+( ; python_version (<|>=) "3\.11")?', line), line
    assert {"torch==2.14.1", "torchvision==0.29.1"} <= set(lines)
    extras = [name for group in project["optional-dependencies"].values() for name in group]
    pinned = names(lines).keys()
    assert not names([*project["dependencies"], *extras]).keys() - pinned


def test_notebooks_run_after_those_they_depend_on() -> None:
    order = [notebook.name[:2] for notebook in load_notebooks(ROOT / "notebooks")]
    assert order[:5] == ["01", "02", "03", "04", "00"]  # the tour wants a trained network
    assert order[5:] == sorted(order[5:])
    for notebook in load_notebooks(ROOT / "notebooks"):
        assert all(
            order.index(one) < order.index(notebook.name[:2])
            for one in notebook.depends
            if one in order
        )


def test_gpu_tests_skip_without_a_gpu_and_are_an_error_when_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    path = ROOT / "tests" / "conftest.py"
    spec = importlib.util.spec_from_file_location("conftest_of_all", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pytest_collection_modifyitems = module.pytest_collection_modifyitems

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    marks: list[pytest.MarkDecorator] = []
    item = SimpleNamespace(nodeid="", get_closest_marker={"gpu": True}.get, add_marker=marks.append)
    for asked in ("", "not gpu", "not slow"):
        pytest_collection_modifyitems(
            SimpleNamespace(getoption=lambda name, asked=asked: asked), [item]
        )
    assert [mark.name for mark in marks] == ["skip"] * 3
    other = SimpleNamespace(nodeid="", get_closest_marker={}.get, add_marker=marks.append)
    pytest_collection_modifyitems(SimpleNamespace(getoption=lambda name: ""), [other])
    assert len(marks) == 3
    for asked in ("gpu", "gpu and not slow", "slow or gpu"):
        with pytest.raises(pytest.UsageError, match="no CUDA device"):
            pytest_collection_modifyitems(
                SimpleNamespace(getoption=lambda name, asked=asked: asked), [item]
            )


def test_committed_figures_are_linked_and_exist() -> None:
    text = "".join(path.read_text() for path in (*NOTEBOOKS, ROOT / "README.md"))
    linked = set(re.findall(r"\((?:\.\./)?(figures/[\w./]+\.png)\)", text))
    assert linked
    assert not [name for name in sorted(linked) if not (ROOT / name).is_file()]
    assert not [name for name in sorted(linked) if not (ROOT / name).with_suffix(".pdf").is_file()]


def test_the_readmes_commands_exist() -> None:
    readme, makefile = ((ROOT / name).read_text() for name in ("README.md", "Makefile"))
    for target in set(re.findall(r"make (\w+)", readme)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    assert {"reproduce", "test", "lab"} <= set(re.findall(r"make (\w+)", readme))


@pytest.mark.parametrize("script", ["results.py", "run_times.py"])
def test_the_pages_numbers_are_the_recorded_ones(script: str) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / script, "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_lock_has_the_versions_of_the_constraints() -> None:
    """requirements.lock: every direct dependency, and no version other than constraints.txt's."""
    lock = re.findall(r"^([a-z0-9._-]+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.M)
    pins = re.findall(r"^([a-z0-9._-]+)==([^\s;]+)", (ROOT / "constraints.txt").read_text(), re.M)
    allowed = {(name, version) for name, version in pins}
    known = {name for name, _ in pins}
    assert not [pin for pin in lock if pin[0] in known and pin not in allowed]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [project["optional-dependencies"][name] for name in ("tools", "paper", "test", "dev")]
    direct = names([*project["dependencies"], *(text for extra in extras for text in extra)])
    assert direct.keys() <= dict(lock).keys(), "see the first lines of requirements.lock"


def test_what_a_codecheck_compares_is_committed() -> None:
    """Every output of the demo that codecheck.yml lists, but the report, is under figures/."""
    listed = [
        entry["file"] for entry in yaml.safe_load((ROOT / "codecheck.yml").read_text())["manifest"]
    ]
    outputs = [name.removeprefix("runs/demo/") for name in listed]
    assert "report.html" in outputs
    outputs.remove("report.html")
    kept = [name.replace("results/", "figures/results/") for name in outputs]
    assert not [name for name in kept if not (ROOT / name).is_file()]


def test_the_share_of_noticed_mutants_is_the_recorded_one() -> None:
    page = (ROOT / "docs" / "mutants.md").read_text()
    (score,) = re.findall(r"^\| all \|.* ([\d.]+) % \|$", page, re.M)
    assert f"{score} % of those tried are noticed" in (ROOT / "CONTRIBUTING.md").read_text()
