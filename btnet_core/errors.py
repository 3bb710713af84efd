"""Named errors: what a user can get wrong, told apart from a bug; checks of fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from numbers import Integral, Real
from typing import Any, TypeVar


class BTNetError(Exception):
    """Base of every error this package raises on purpose."""


class DataError(BTNetError, ValueError):
    """A file, record, image or label is not what its format says; the message names it."""


class ConfigError(BTNetError, ValueError):
    """An argument or a configuration field has a value that cannot work."""


class CheckpointError(BTNetError, ValueError):
    """Saved weights or training state do not fit, are damaged, or are of another version."""


class TrainingError(BTNetError, RuntimeError):
    """Training had to stop (non-finite loss, full disk); the message says at which step and why."""


class WriteError(BTNetError, OSError):
    """A file or folder cannot be written; what it held before is as it was."""


class BusyError(BTNetError, RuntimeError):
    """Another process works in the folder; the message says which."""


class ReproduceError(BTNetError, RuntimeError):
    """A notebook of the reproduction could not run or failed."""


# ---- fields of configurations ----------------------------------------------------------------

Kind = TypeVar("Kind")


def _is(kind: type) -> Callable[[Any], bool]:
    """Whether a value is of ``kind``; true and false are no numbers."""
    return lambda value: isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _all(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(map(_is(kind), value))


EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {  # by annotation
    "int": (_is(Integral), "an integer"),
    "float": (_is(Real), "a number"),
    "float | None": (lambda value: value is None or _is(Real)(value), "a number"),
    "bool": (_is(bool), "true or false"),
    "str": (_is(str), "a text"),
    "tuple[int, ...]": (_all(Integral), "a list of integers"),
    "tuple[int, int]": (_all(Integral), "a list of two integers"),
    "tuple[float, ...]": (_all(Real), "a list of numbers"),
    "tuple[Spec, ...]": (_is(list | tuple), "a list"),
    "tuple[str, ...]": (_all(str), "a list of texts"),
    "dict[str, Any]": (_is(Mapping), "fields with their values"),
}


def check_types(record: Any) -> None:
    """Raise ConfigError where a field of a dataclass is not what its annotation says."""
    for field in fields(record):
        fits, expected = EXPECTED.get(str(field.type), (None, ""))
        value = getattr(record, field.name)
        if fits and not fits(value):
            raise ConfigError(f"{field.name}: got {value!r}, expected {expected}")


def from_fields(kind: type[Kind], values: Any, where: str) -> Kind:
    """A dataclass of the given fields; ConfigError for one that is unknown or missing."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: got {values!r}, expected fields with their values")
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    if unknown := values.keys() - known.keys():
        told = f"unknown fields {sorted(map(str, unknown))}; known: {[*known]}"
        raise ConfigError(f"{where}: {told}")
    for name, field in known.items():
        if field.default is field.default_factory is MISSING and name not in values:
            raise ConfigError(f"{where}: the field {name} is missing")
    return kind(**values)
