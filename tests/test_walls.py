"""The walls of the house: imports point one way, no circle, no long function, nothing grows beyond its size."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("btnet_core", "btnet_paper", "btnet_tools")
    for path in sorted((ROOT / package).rglob("*.py"))
}
TREES = {module: ast.parse(path.read_text()) for module, path in FILES.items()}
LAYERS = (  # each may import from its own layer and from those before it
    ("btnet_core.errors", "btnet_core.kinds", "btnet_core.files", "btnet_core.device"),
    ("btnet_core.images", "btnet_core.losses"),
    ("btnet_core.data", "btnet_core.models"),
    ("btnet_core.evaluation",),
    ("btnet_core.training",),
    ("btnet_core",),
    ("btnet_paper",),
    ("btnet_tools",),
)
LONG: dict[str, str] = {}  # functions over 40 lines: the reason, at most five
FOREIGN = ("jupyterlab", "papermill", "matplotlib", "seaborn", "sklearn", "pandas", "IPython")


def layer(module: str) -> int:
    """The place in LAYERS of the longest prefix of ``module``."""
    names = {name: rank for rank, names in enumerate(LAYERS) for name in names}
    parts = module.split(".")
    prefixes = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next(names[prefix] for prefix in prefixes if prefix in names)


def imported(module: str) -> set[str]:
    """Modules of the three packages that ``module`` imports, wherever it does so."""
    found = set()
    for node in ast.walk(TREES[module]):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            found |= {name, name.rpartition(".")[0]} & FILES.keys()
    return found - {module}


def functions() -> list[tuple[str, ast.FunctionDef]]:
    """Every function of the packages as ``module.name`` and its node."""
    return [
        (f"{module}.{node.name}", node)
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    ]


def test_imports_point_one_way() -> None:
    upward = [
        f"{module} -> {other}"
        for module in FILES
        for other in sorted(imported(module))
        if layer(other) > layer(module) and other != "btnet_core"
    ]
    assert not upward


def test_no_import_circle() -> None:
    graph = {module: imported(module) - {"btnet_core"} for module in FILES}
    circles = []
    while True:
        try:
            list(TopologicalSorter(graph).static_order())
            break
        except ValueError as error:  # CycleError: (message, nodes, each a predecessor of the next)
            first, second = error.args[1][:2]
            circles.append(error.args[1])
            graph[second] = graph[second] - {first}
    assert not circles


def test_no_import_inside_a_function() -> None:
    inside = [
        name
        for name, function in functions()
        if not name.startswith(("btnet_tools.cli.", "btnet_core.__getattr__"))  # both lazy
        and any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.walk(function))
    ]
    assert not inside


def test_private_names_stay_in_their_module() -> None:
    private = []
    for module, tree in TREES.items():
        modules = {name.rpartition(".")[2] for name in imported(module)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("btnet_"):
                private += [f"{module}: {a.name}" for a in node.names if a.name.startswith("_")]
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                hidden = node.attr.startswith("_") and not node.attr.startswith("__")
                if hidden and node.value.id in modules:
                    private.append(f"{module}: {node.value.id}.{node.attr}")
    assert not private


def test_functions_have_at_most_40_lines() -> None:
    lengths = {name: node.end_lineno - node.lineno + 1 for name, node in functions()}
    long = {name: length for name, length in lengths.items() if length > 40}
    assert len(LONG) <= 5
    assert long.keys() == LONG.keys(), long  # a reason that is needed no more goes


def test_lines_have_at_most_100_columns() -> None:
    wide = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in FILES.values()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 100
    ]
    assert not wide


def test_sizes() -> None:
    lines = {module: path.read_text().count("\n") for module, path in FILES.items()}
    core = sum(count for module, count in lines.items() if module.startswith("btnet_core"))
    assert core <= 7650  # on the way to 4,500
    assert sum(lines.values()) <= 15905  # on the way to 9,000


@pytest.mark.parametrize("package", ["btnet_core", "btnet_tools"])
def test_core_and_tools_need_no_notebook_and_no_figure(package: str) -> None:
    """`pip install .` is enough for the method, `pip install .[tools]` for `btnet embed` and `adapt`."""
    modules = [name for name in FILES if name.startswith(package) and "__main__" not in name]
    code = f"import sys, {', '.join(modules)}; print(*(sys.modules.keys() & {set(FOREIGN)}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr
