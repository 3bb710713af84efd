"""What a run tells while it runs: a bar, or plain lines; and rows of JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from btnet_core.files import write_atomically

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

LINE_SECONDS = 10.0  # between plain lines


class Progress:
    """Counts images and shows the means since the last row; every row goes to ``metrics.jsonl``.

    Args:
        total, start: steps of the run, and those done before; ``steps``: in an epoch.
        show: "bar", "lines", "none" or "auto" (a bar in a terminal, lines elsewhere).
        speak: False on all processes but the first.

    Attributes:
        row: the latest, e.g. {"loss": …, "norm": …, "step": …, "lr": …, "seconds": …}.
        extra: numbers that every row shows as they are.
    """

    def __init__(
        self, out: Path, name: str, total: int, start: int, steps: int, *, show: str = "auto",
        speak: bool = True,
    ) -> None:  # fmt: skip
        self.name, self.speak = name, speak
        self.total, self.start, self.steps = total, start, steps
        self.every = max(1, min(steps // 10, 100))  # steps between rows of metrics.jsonl
        self.began = self.last = self.told = time.monotonic()
        self.sums: dict[str, float] = {}
        self.row: dict[str, Any] = {}
        self.extra: dict[str, float] = {}
        self.count = self.images = 0
        if show == "auto":
            show = "bar" if sys.stderr.isatty() else "lines"
        self.lines, self.bar, self.file = show == "lines" and speak, None, None
        if speak:
            _keep_until(out / "metrics.jsonl", start)
            self.file = (out / "metrics.jsonl").open("a")
        if show == "bar" and speak:
            self.bar = tqdm(total=total, initial=start, desc=name, unit="step", mininterval=0.5)

    def step(self, step: int, terms: dict[str, float], lr: float, images: int) -> None:
        """Account for step ``step`` (from 1)."""
        for key, value in terms.items():
            self.sums[key] = self.sums.get(key, 0.0) + value
        self.count += 1
        self.images += images
        if self.bar is not None:
            self.bar.update()
        now, ended = time.monotonic(), step % self.every == 0 or step == self.total
        late = self.lines and now - self.told >= LINE_SECONDS
        if not (self.speak and (ended or late)):
            return
        row: dict[str, Any] = {key: value / self.count for key, value in self.sums.items()}
        row |= {
            "step": step, "epoch": step / self.steps, "lr": lr,
            "images_per_second": self.images / max(now - self.last, 1e-9),
            "seconds": now - self.began, "memory_gb": memory_gb(), **self.extra,
        }  # fmt: skip
        if late or self.bar is not None or step == self.total:
            self._show(row, now)
        if ended:
            self.write(row)
            self.sums, self.row = {}, row
            self.count = self.images = 0
            self.last = now

    def _show(self, row: dict[str, Any], now: float) -> None:
        """The row as the bar's text, or as a line."""
        step = row["step"]
        shown = [key for key in row if key not in ("step", "epoch", "seconds")]
        text = " ".join(f"{key} {row[key]:.4g}" for key in shown)
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        if self.lines:
            self.told = now
            left = (self.total - step) * (now - self.began) / max(1, step - self.start)
            where = f"{self.name}: step {step}/{self.total} epoch {row['epoch']:.2f}"
            print(f"{where} {text} left {left:.0f} s", flush=True)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl."""
        if self.file is not None:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()

    def say(self, text: str) -> None:
        """One line, past the bar."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        elif self.lines:
            print(text, flush=True)

    def close(self) -> None:
        for sink in (self.bar, self.file):
            if sink is not None:
                sink.close()


def memory_gb() -> float:
    """Peak memory of this process: of the GPU where there is one, else resident; NaN: unknown."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    if resource is None:
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)


def read_metrics(out: Path | str) -> list[dict[str, Any]]:
    """The rows of ``out/metrics.jsonl``; a last line cut short by a crash is left out."""
    rows = []
    path = Path(out) / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _keep_until(path: Path, step: int) -> None:
    """Drop rows of steps that will be run again."""
    rows = [row for row in read_metrics(path.parent) if row["step"] <= step] if step else []
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
