"""Named errors: what a user can get wrong, told apart from a bug; checks of fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from numbers import Integral, Real
from typing import Any


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

# annotation of a field -> type of its value, type of the items in it, and both in words
EXPECTED: dict[str, tuple[Any, Any, str]] = {
    "int": (Integral, None, "an integer"),
    "float": (Real, None, "a number"),
    "float | None": ((Real, type(None)), None, "a number"),
    "bool": (bool, None, "true or false"),
    "str": (str, None, "a text"),
    "tuple[int, ...]": ((list, tuple), Integral, "a list of integers"),
    "tuple[int, int]": ((list, tuple), Integral, "a list of two integers"),
    "tuple[float, ...]": ((list, tuple), Real, "a list of numbers"),
    "tuple[Spec, ...]": ((list, tuple), None, "a list"),
    "dict[str, Any]": (Mapping, None, "fields with their values"),
}


def check_types(record: Any) -> None:
    """Raise ConfigError where a field of a dataclass is not what its annotation says."""
    for field in fields(record):
        kind, item, expected = EXPECTED.get(str(field.type), (object, None, ""))
        value = getattr(record, field.name)
        fit = isinstance(value, kind) and not (item and any(not isinstance(x, item) for x in value))
        if not fit or (isinstance(value, bool) and kind in (Integral, Real)):
            raise ConfigError(f"{field.name}: got {value!r}, expected {expected}")


def from_fields(kind: Any, values: Any, where: str) -> Any:
    """A dataclass of the given fields; ConfigError for one that is unknown or missing."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: got {values!r}, expected fields with their values")
    known = {field.name: field for field in fields(kind)}
    if unknown := values.keys() - known.keys():
        told = f"unknown fields {sorted(map(str, unknown))}; known: {[*known]}"
        raise ConfigError(f"{where}: {told}")
    for name, field in known.items():
        if field.default is field.default_factory is MISSING and name not in values:
            raise ConfigError(f"{where}: the field {name} is missing")
    return kind(**values)
