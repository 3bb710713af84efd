"""Specs: how face and pair sets are named. A text is a path; a mapping is a kind with options.

Free of torch, so that a package can say at its import which kinds it brings.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from btnet_core.errors import ConfigError

Spec = str | Mapping[str, Any]
Opener = Callable[..., Any]
FACES: dict[str, Opener | str] = {}  # kind -> what opens a face set of it


def register(kind: str, opener: Opener | str) -> None:
    """``opener(**options)`` opens ``{kind: …, **options}``; "module:name" is imported if needed."""
    FACES[kind] = opener


def registered() -> dict[str, str]:
    """{kind: "module:name"}, with which another process can ``register`` the same kinds."""
    return {
        kind: opener if isinstance(opener, str) else f"{opener.__module__}:{opener.__qualname__}"
        for kind, opener in FACES.items()
    }


def spec_text(spec: Spec) -> str:
    """A spec as one line: the path, or the mapping as JSON with sorted keys."""
    return spec if isinstance(spec, str) else json.dumps(spec, sort_keys=True, ensure_ascii=False)


def parse_spec(spec: Spec) -> Spec:
    """The mapping that ``spec`` is in JSON, as on a command line; else itself. A path stays one."""
    if not isinstance(spec, str) or not spec.startswith("{") or os.path.exists(spec):
        return spec
    try:
        return json.loads(spec)
    except json.JSONDecodeError:
        raise ConfigError(f"{spec!r}: neither a path nor a mapping in JSON") from None


def paths_of(spec: Spec) -> list[str]:
    """The paths that a spec names, itself or in the specs inside it."""
    if isinstance(spec, str):
        return [spec]
    inner = [spec[key] for key in ("faces", "path", "images") if key in spec]
    return [path for one in inner if isinstance(one, str | Mapping) for path in paths_of(one)]


def open_kind(spec: Mapping[str, Any], openers: Mapping[str, Opener | str]) -> Any:
    """What the opener of ``spec["kind"]`` makes of the other keys.

    Raises:
        ConfigError: a kind or key that is not known, a key that is missing, or a value of another
            type than the opener's default.
    """
    options, text = dict(spec), spec_text(spec)
    kind = options.pop("kind", None)
    if kind not in openers:
        raise ConfigError(
            f"{text}: got the kind {kind!r}, expected one of {', '.join(sorted(openers))}"
        )
    opener = openers[kind]
    if isinstance(opener, str):
        module, _, name = opener.partition(":")
        opener = getattr(import_module(module), name)
    parameters = inspect.signature(opener).parameters
    known = ", ".join(parameters)
    if unknown := options.keys() - parameters.keys():
        raise ConfigError(f"{text}: got the key {min(unknown)!r}, expected {known}")
    for name, parameter in parameters.items():
        default = parameter.default
        if default is parameter.empty and name not in options:
            raise ConfigError(f"{text}: {name} is missing; keys of {kind}: {known}")
        value = options.get(name, default)
        if isinstance(default, int) and type(value) is not type(default):
            raise ConfigError(f"{text}: {name}: got {value!r}, expected as {default!r}")
    return opener(**options)
