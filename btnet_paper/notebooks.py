"""Source notebooks: their parameters, checked before anything runs, and what results depend on."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from papermill import inspect_notebook

from btnet_core.errors import ReproduceError
from btnet_core.files import reason

PACKAGE = Path(__file__).parent
PACKAGES = ("btnet_core", "btnet_paper")  # whose code decides results
# what only runs or shows them
SHOWS = ("report.py", "runner.py", "check.py", "claims.py", "records.py", "tables.py")


@dataclass(frozen=True, kw_only=True)
class Notebook:
    """A source notebook: what decides its result, and what its metadata ``btnet`` says about it."""

    path: Path
    cells: list[tuple[str, str]]  # (type, source)
    parameters: dict[str, Any]  # name -> default
    depends: tuple[str, ...] = ()  # numbers of earlier notebooks whose outputs it reads
    expected: dict[str, float] = field(default_factory=dict)  # scale -> seconds
    always: bool = False  # whether it runs even if unchanged: it reads results of any scale

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def number(self) -> str:
        return self.name[:2]

    @property
    def order(self) -> tuple[str, bool]:
        """Its own number, or just after the last of those that it depends on: 00 runs after 04."""
        last = max([self.number, *self.depends])
        return last, self.number != last

    @property
    def source_checksum(self) -> str:
        return hashlib.sha256(json.dumps(self.cells).encode()).hexdigest()


def load_notebook(path: Path) -> Notebook:
    """Returns one notebook.

    Raises:
        ReproduceError: it is none, or has not exactly one cell of parameters, all of them literals.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in content["cells"]]
        tags = [cell["metadata"].get("tags", []) for cell in content["cells"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReproduceError(f"{path} is not a notebook ({reason(error)})") from None
    if (count := sum("parameters" in tag for tag in tags)) != 1:
        raise ReproduceError(f"{path}: {count} cells are tagged 'parameters', expected one")
    try:
        inferred = inspect_notebook(str(path))
    except ValueError:
        raise ReproduceError(f"{path}: names no kernel in its metadata") from None
    parameters = {}
    for name, about in inferred.items():
        try:
            parameters[name] = ast.literal_eval(about["default"])
        except (ValueError, SyntaxError):
            got = f"{name} = {about['default']}"
            raise ReproduceError(f"{path}: parameters are 'name = literal', got {got!r}") from None
    own = content["metadata"].get("btnet", {})
    return Notebook(
        path=path, cells=cells, parameters=parameters, depends=tuple(own.get("depends", ())),
        expected=own.get("seconds", {}), always=own.get("always", False),
    )  # fmt: skip


def load_notebooks(folder: str | Path | None = None) -> list[Notebook]:
    """Returns the notebooks NN_*.ipynb of ``folder``, ordered so that each follows what it needs.

    Without ``folder`` they are those of ./notebooks, else of the repository.
    """
    places = [Path(folder)] if folder else [Path("notebooks"), PACKAGE.parent / "notebooks"]
    for place in places:
        if found := sorted(place.resolve().glob("[0-9][0-9]_*.ipynb")):
            return sorted(map(load_notebook, found), key=lambda notebook: notebook.order)
    where = " nor ".join(str(place.resolve()) for place in places)
    raise ReproduceError(f"no notebooks NN_name.ipynb in {where}: call it from the repository")


def select(notebooks: list[Notebook], only: Sequence[str]) -> list[Notebook]:
    """Returns those named in ``only``, by number ("1" or "01") or name; all when it is empty."""
    wanted = {entry.strip().removesuffix(".ipynb") for entry in only if entry.strip()}
    wanted = {entry.zfill(2) if entry.isdigit() else entry for entry in wanted}
    known = {key for notebook in notebooks for key in (notebook.name, notebook.number)}
    if unknown := wanted - known:
        listing = ", ".join(notebook.name for notebook in notebooks)
        raise ReproduceError(f"no notebook {', '.join(sorted(unknown))}; there are {listing}")
    return [one for one in notebooks if not wanted or wanted & {one.name, one.number}]


def assign(
    notebooks: list[Notebook], given: dict[str, Any], *, optional: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """Returns for each notebook the given values that it knows, as the types of its defaults.

    Raises:
        ReproduceError: no notebook knows a name (but those in ``optional``), or a value is of
            another type than the default; the message lists the known ones.
    """
    known = {name: default for one in notebooks for name, default in one.parameters.items()}
    listing = ", ".join(
        f"{name} ({_type(default)}, default {default!r})" for name, default in sorted(known.items())
    )
    if unknown := [name for name in given if name not in known and name not in optional]:
        names = ", ".join(unknown)
        raise ReproduceError(f"unknown parameter {names}; the selected notebooks know: {listing}")
    assigned: dict[str, dict[str, Any]] = {}
    for notebook in notebooks:
        try:
            assigned[notebook.name] = {
                name: convert(value, notebook.parameters[name], name)
                for name, value in given.items()
                if name in notebook.parameters
            }
        except ReproduceError as error:
            raise ReproduceError(f"{error}; {notebook.path.name} knows: {listing}") from None
    return assigned


def convert(value: Any, default: Any, name: str) -> Any:
    """Returns ``value``, or the text of one as on a command line, as the type of ``default``."""
    wrong = ReproduceError(f"parameter {name} is {value!r}, expected {_type(default)}")
    if isinstance(value, str) and not isinstance(default, str):
        spelt = {"true": "True", "false": "False", "none": "None"}.get(value.lower(), value)
        try:
            value = ast.literal_eval(spelt)
        except (ValueError, SyntaxError):
            if default is not None:
                raise wrong from None
    if type(default) is float and type(value) is int:
        return float(value)
    if isinstance(default, list | tuple) and isinstance(value, list | tuple):
        return type(default)(value)
    if default is not None and type(value) is not type(default):
        raise wrong
    return value


def _type(value: Any) -> str:
    return "any literal" if value is None else type(value).__name__


def code_checksum() -> str:
    """Returns a checksum of the code that decides results; comments and layout do not change it."""
    digest = hashlib.sha256()
    for path in sorted(file for name in PACKAGES for file in (PACKAGE.parent / name).rglob("*")):
        if path.suffix == ".py" and path.name not in SHOWS:
            digest.update(ast.dump(ast.parse(path.read_text(encoding="utf-8"))).encode())
        elif path.suffix == ".json":
            digest.update(path.read_bytes())
    return digest.hexdigest()
