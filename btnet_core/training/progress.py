"""What a run tells while it runs: a bar in a terminal or notebook, plain lines elsewhere, JSON lines, TensorBoard."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

LINE_SECONDS = 10.0  # between plain lines


class Progress:
    """Counts images and shows the means since the last line; every row goes to ``metrics.jsonl``.

    Only the first process speaks (``speak``). ``show``: "bar", "lines", "none" or "auto" (a bar where stderr is a
    terminal, lines elsewhere).
    """

    def __init__(
        self, out: Path, name: str, total: int, start: int, steps: int, *, show: str = "auto", speak: bool = True
    ) -> None:
        self.name, self.total, self.steps, self.speak = name, total, steps, speak
        self.every = max(1, steps // 10)  # steps between rows of metrics.jsonl
        self.began = self.last = self.told = time.monotonic()
        self.start = start
        self.sums: dict[str, float] = {}
        self.row: dict[str, Any] = {}  # the latest
        self.count = self.images = self.all_images = 0
        show = ("bar" if sys.stderr.isatty() else "lines") if show == "auto" else show
        self.bar = tqdm(total=total, initial=start, desc=name, unit="step") if show == "bar" and speak else None
        self.lines = show == "lines" and speak
        self.file = self.board = None
        if speak:
            path = out / "metrics.jsonl"
            _keep_until(path, start)
            self.file = path.open("a")
            self.board = _tensorboard(out)

    def step(self, step: int, parts: dict[str, float], lr: float, images: int) -> None:
        """Account for step ``step`` (from 1)."""
        for key, value in parts.items():
            self.sums[key] = self.sums.get(key, 0.0) + value
        self.count += 1
        self.images += images
        self.all_images += images
        if self.bar is not None:
            self.bar.update()
        if step % self.every == 0 or step == self.total:
            self._row(step, lr)

    def _row(self, step: int, lr: float) -> None:
        now = time.monotonic()
        row: dict[str, Any] = {key: value / self.count for key, value in self.sums.items()}
        row |= {
            "step": step,
            "epoch": step / self.steps,
            "lr": lr,
            "images_per_second": self.images / max(now - self.last, 1e-9),
        }
        row |= {"seconds": now - self.began, "memory_gb": memory_gb()}
        self.sums, self.count, self.images, self.last = {}, 0, 0, now
        self.row = row
        self.write(row)
        text = " ".join(f"{key} {row[key]:.4g}" for key in row if key not in ("step", "epoch", "seconds"))
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        elif self.lines and (now - self.told >= LINE_SECONDS or step == self.total):
            self.told = now
            left = (self.total - step) * (now - self.began) / max(1, step - self.start)
            print(
                f"{self.name}: step {step}/{self.total} epoch {row['epoch']:.2f} {text} left {left:.0f} s", flush=True
            )

    def write(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl and TensorBoard."""
        if self.file is not None:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        if self.board is not None:
            for key, value in row.items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(key, value, row["step"])

    def say(self, text: str) -> None:
        """One line, past the bar."""
        if self.bar is not None:
            self.bar.write(text)
        elif self.lines:
            print(text, flush=True)

    def close(self) -> None:
        for sink in (self.bar, self.file, self.board):
            if sink is not None:
                sink.close()


def memory_gb() -> float:
    """Peak memory of this process: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (1e9 if sys.platform == "darwin" else 1e6)
    except ImportError:  # Windows
        return float("nan")


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
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _tensorboard(out: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out / "tensorboard"))
