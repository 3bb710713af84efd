"""Every data set of the project, as ``data/sets.yaml`` lists them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import yaml

DATA = Path(__file__).resolve().parents[1] / "data"  # committed pages and numbers


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A set or weights that the project can use."""

    name: str
    path: str  # under the data root
    kind: str  # faces, pairs, open set, templates, weights
    scale: str  # which needs it
    source: str
    get: str = ""  # names of the downloads that make it
    trained_on: str = ""  # who may have learned these people

    @property
    def command(self) -> str:
        """What makes it, or ""."""
        return "; ".join(f"btnet data get {name}" for name in self.get.split())


@dataclass(frozen=True, kw_only=True)
class Download:
    """Where raw pictures or weights come from."""

    by_hand: str  # what to download where there is no url, or it fails
    url: str = ""
    md5: str = ""  # of what url gives
    tensors: str = ""  # of weights: fetch.tensor_digest


@lru_cache(maxsize=1)
def _page() -> dict:
    return yaml.safe_load((DATA / "sets.yaml").read_text("utf-8"))


def entries() -> list[Entry]:
    """The sets, in the order of the page."""
    return [Entry(name=name, **values) for name, values in _page()["sets"].items()]


def downloads() -> dict[str, Download]:
    """What ``btnet data get`` takes, by name."""
    return {name: Download(**values) for name, values in _page()["downloads"].items()}
