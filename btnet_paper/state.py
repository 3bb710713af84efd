"""``state.json`` of a run folder: what each finished notebook was run with, and what it left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from btnet_core.errors import ReproduceError
from btnet_core.files import reason, write_atomically

MADE = (
    "logs/{}.made"  # file in which Study lists what a notebook has made, a path of the run a line
)


class State:
    """For each notebook its fingerprint (of everything that it depends on), seconds and outputs.

    Written after every notebook, so that an interrupted run goes on where it was.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.path = run_dir, run_dir / "state.json"
        try:
            self.notebooks: dict[str, dict[str, Any]] = json.loads(self.path.read_text())
        except FileNotFoundError:
            self.notebooks = {}
        except ValueError as error:
            how = "delete it to run everything again"
            raise ReproduceError(f"{self.path} is damaged ({reason(error)}); {how}") from None

    def seconds(self, name: str) -> float | None:
        return self.notebooks.get(name, {}).get("seconds")

    def fingerprints(self, numbers: Sequence[str]) -> dict[str, str | None]:
        """Returns what the notebooks of these numbers were last run with."""
        found = {name[:2]: entry.get("fingerprint") for name, entry in self.notebooks.items()}
        return {number: found.get(number) for number in numbers}

    def is_current(self, name: str, fingerprint: str) -> bool:
        """Whether the notebook was run with this, and all that it left is still there."""
        entry = self.notebooks.get(name, {})
        files = [f"notebooks/{name}.ipynb", *entry.get("outputs", ())]
        there = all((self.run_dir / file).is_file() for file in files)
        return entry.get("fingerprint") == fingerprint and there

    def forget(self, name: str) -> None:
        """From here on its outputs are overwritten: it counts as never finished."""
        if self.notebooks.get(name, {}).pop("fingerprint", None):
            self.finish(name, self.notebooks[name])

    def finish(self, name: str, entry: dict[str, Any]) -> None:
        self.notebooks[name] = entry
        write_atomically(self.path, json.dumps(self.notebooks, indent=1) + "\n")
