"""Source notebooks and what their results depend on: parameters, checked before anything runs, code and data."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from btnet_core.errors import ReproduceError

PACKAGE = Path(__file__).parent
PACKAGES = ("btnet_core", "btnet_paper", "btnet_tools")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Notebook:
    """A source notebook: what decides its result, and what it says about itself in its metadata `btnet`."""

    path: Path
    cells: list[tuple[str, str]]  # (type, source)
    parameters: dict[str, Any]  # name -> default
    parameters_cell: int  # its number, from 1
    depends: tuple[str, ...] = ()  # numbers of earlier notebooks whose outputs it reads
    expected: dict[str, float] = dataclasses.field(default_factory=dict)  # scale -> seconds
    always: bool = False  # whether it runs even if unchanged: it reads results of any scale

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def number(self) -> str:
        return self.name[:2]

    @property
    def after(self) -> str:
        """The highest number among it and those it depends on."""
        return max([self.number, *self.depends])

    @property
    def source_checksum(self) -> str:
        return hashlib.sha256(json.dumps(self.cells).encode()).hexdigest()


def load_notebook(path: Path) -> Notebook:
    """Read one notebook. Raises ReproduceError unless it has exactly one parameters cell, of literals only."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        cells = [
            (c["cell_type"], "".join(c["source"]), c["metadata"].get("tags", []))
            for c in content["cells"]
        ]
    except (OSError, ValueError, KeyError) as error:
        raise ReproduceError(
            f"{path} is not a notebook ({type(error).__name__}: {error})"
        ) from None
    tagged = [
        i for i, (kind, _, tags) in enumerate(cells) if kind == "code" and "parameters" in tags
    ]
    if len(tagged) != 1:
        raise ReproduceError(
            f"{path} has {len(tagged)} cells tagged 'parameters', expected exactly one"
        )
    about = content["metadata"].get("btnet", {})
    return Notebook(
        path=path,
        cells=[(kind, source) for kind, source, _ in cells],
        parameters=_literals(cells[tagged[0]][1], path),
        parameters_cell=tagged[0] + 1,
        depends=tuple(about.get("depends", ())),
        expected=about.get("seconds", {}),
        always=about.get("always", False),
    )


def load_notebooks(folder: str | Path | None = None) -> list[Notebook]:
    """The notebooks NN_*.ipynb of `folder`; by default of ./notebooks or of the repository.

    In the order of their numbers, but after those that they depend on: the tour, 00, runs once there is a network.
    """
    places = [Path(folder)] if folder else [Path("notebooks"), PACKAGE.parent / "notebooks"]
    for place in places:
        if found := sorted(place.resolve().glob("[0-9][0-9]_*.ipynb")):
            return sorted(
                map(load_notebook, found),
                key=lambda notebook: (notebook.after, notebook.number != notebook.after),
            )
    where = " nor ".join(str(place.resolve()) for place in places)
    raise ReproduceError(
        f"no notebooks NN_name.ipynb in {where}: call it from a copy of the repository"
    )


def select(notebooks: list[Notebook], only: Sequence[str]) -> list[Notebook]:
    """Those named in `only`, by number ("1" or "01") or name; all when it is empty."""
    wanted = {entry.strip().removesuffix(".ipynb") for entry in only if entry.strip()}
    wanted = {entry.zfill(2) if entry.isdigit() else entry for entry in wanted}
    if unknown := wanted - {key for n in notebooks for key in (n.name, n.number)}:
        known = ", ".join(n.name for n in notebooks)
        raise ReproduceError(f"no notebook {', '.join(sorted(unknown))}; there are {known}")
    return [n for n in notebooks if not wanted or wanted & {n.name, n.number}]


def assign(
    notebooks: list[Notebook], given: dict[str, Any], *, optional: Sequence[str] = ()
) -> dict[str, dict]:
    """For each notebook, the given values that it knows, as its own types.

    Raises ReproduceError, listing the known ones, for a parameter that no notebook knows (those in `optional`
    apart) and for a value of another type than the default.
    """
    known = {name: default for n in notebooks for name, default in n.parameters.items()}
    listing = ", ".join(
        f"{name} ({_type(value)}, default {value!r})" for name, value in sorted(known.items())
    )
    if unknown := [name for name in given if name not in known and name not in optional]:
        raise ReproduceError(
            f"unknown parameter {', '.join(unknown)}; the selected notebooks know: {listing}"
        )
    assigned: dict[str, dict[str, Any]] = {}
    for notebook in notebooks:
        mine = {name: value for name, value in given.items() if name in notebook.parameters}
        try:
            assigned[notebook.name] = {
                k: convert(v, notebook.parameters[k], k) for k, v in mine.items()
            }
        except ReproduceError as error:
            raise ReproduceError(f"{error}; {notebook.path.name} knows: {listing}") from None
    return assigned


def convert(value: Any, default: Any, name: str) -> Any:
    """`value`, or the command-line text of one, as the type of `default` (None takes any literal)."""
    wrong = ReproduceError(f"parameter {name} is {value!r}, expected {_type(default)}")
    if isinstance(default, str):
        if isinstance(value, str):
            return value
        raise wrong
    if isinstance(value, str):
        try:
            value = ast.literal_eval(
                {"true": "True", "false": "False", "none": "None"}.get(value.lower(), value)
            )
        except (ValueError, SyntaxError):
            if default is not None:
                raise wrong from None
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(default, list | tuple) and isinstance(value, list | tuple):
        value = type(default)(value)
    if default is not None and type(value) is not type(default):
        raise wrong
    return value


def _literals(source: str, path: Path) -> dict[str, Any]:
    values = {}
    for statement in ast.parse(source).body:
        target = (
            getattr(statement, "target", None) or (getattr(statement, "targets", None) or [None])[0]
        )
        try:
            values[target.id] = ast.literal_eval(statement.value)  # type: ignore[attr-defined]
        except (AttributeError, ValueError):
            line = ast.unparse(statement)
            raise ReproduceError(
                f"{path}: parameters may only be 'name = literal', got {line!r}"
            ) from None
    return values


def _type(value: Any) -> str:
    return "any literal" if value is None else type(value).__name__


def explain(error: Any, notebook: Notebook, cell: int) -> str:
    """What papermill raised, with its place: cell (counted from 1 in the source notebook), line, source line."""
    where = f"{notebook.path.name}, cell {cell} of {len(notebook.cells)}"
    if not hasattr(
        error, "traceback"
    ):  # no exception in a cell: the kernel died, the disk is full, ...
        return f"{where}: {type(error).__name__}: {error}"
    trace = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback))
    lines = [
        int(number) for number in re.findall(r"^\s*Cell In\[\d+\], line (\d+)", trace, re.M)
    ] or [1]
    message = f"{where}, line {lines[0]}: {error.ename}: {error.evalue}"
    message += "".join(
        f"\n    {text.strip()}"
        for text in error.source.lstrip("\n").splitlines()[lines[0] - 1 : lines[0]]
    )
    inner = re.findall(r"^File (\S+:\d+), in (\w+)", trace, re.M)
    return message + (f"\n    raised in {inner[-1][0]}, {inner[-1][1]}" if inner else "")


def code_checksum() -> str:
    """A checksum of this package that comments and layout do not change; what only reports results does not count."""
    digest = hashlib.sha256()
    for path in sorted(path for name in PACKAGES for path in (PACKAGE.parent / name).rglob("*")):
        if path.suffix == ".py" and path.name not in (
            "cli.py",
            "__main__.py",
            "report.py",
            "claims.py",
            "records.py",
            "tables.py",
        ):
            digest.update(ast.dump(ast.parse(path.read_text(encoding="utf-8"))).encode())
        elif path.suffix == ".json":
            digest.update(path.read_bytes())
    return digest.hexdigest()


def data_checksum(scale: str) -> str:
    """A checksum of the data that a scale names: of the specs, which decide synthetic faces, and of the files."""
    from btnet_core.data.sources import paths_of, spec_text
    from btnet_core.files import checksum, find
    from btnet_paper.scales import get_scale

    plan, digest = get_scale(scale), hashlib.sha256()
    for spec in (plan.faces, *plan.pairs, plan.others, plan.pretrained):
        places = [find(path) for path in paths_of(spec) if path]
        files = [
            f for p in places for f in (sorted(p.rglob("*")) if p.is_dir() else [p]) if f.is_file()
        ]
        digest.update(f"{spec_text(spec)} {checksum(files)}\n".encode())
    return digest.hexdigest()
