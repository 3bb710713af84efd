"""What a run tells while it runs: a bar, or plain lines; rows of JSON; TensorBoard."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from btnet_core.files import write_atomically

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]
try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:  # an option
    SummaryWriter = None

LINE_SECONDS = 10.0  # between plain lines
LIVE_SECONDS = 0.5  # between updates of the bar and of LIVE
LIVE = "progress.json"  # where the run stands now, for whoever watches it from another process
STEP = "{name}: step "  # how a plain line about progress begins


def watched() -> bool:
    """True where somebody sees a bar: in a terminal, or a live notebook (not `btnet reproduce`)."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if getattr(shell, "kernel", None) is None:
        return sys.stderr.isatty()
    return "BTNET_REPRODUCE" not in os.environ


class Progress:
    """Counts images and shows the means since the last row; every row goes to ``metrics.jsonl``.

    Args:
        total, start: steps of the run, and those done before; ``steps``: in an epoch.
        show: "bar", "lines", "none" or "auto" (a bar where it is ``watched``, lines elsewhere).
        speak: False on all processes but the first.

    Attributes:
        row: the latest, e.g. {"loss": …, "norm": …, "step": …, "lr": …, "seconds": …}.
        extra: numbers that every row shows as they are.
    """

    def __init__(
        self, out: Path, name: str, total: int, start: int, steps: int, *, show: str = "auto",
        speak: bool = True,
    ) -> None:  # fmt: skip
        self.out, self.name, self.speak = out, name, speak
        self.total, self.start, self.steps = total, start, steps
        self.every = max(1, min(steps // 10, 100))  # steps between rows of metrics.jsonl
        self.began = self.last = self.told = self.shown = time.monotonic()
        self.sums: dict[str, float] = {}
        self.row: dict[str, Any] = {}
        self.extra: dict[str, float] = {}
        self.count = self.images = 0
        show = ("bar" if watched() else "lines") if show == "auto" else show
        seen = show == "bar" and speak
        self.bar = tqdm(total=total, initial=start, desc=name, unit="step") if seen else None
        self.lines = show == "lines" and speak
        self.file = self.board = None
        if speak:
            _keep_until(out / "metrics.jsonl", start)
            self.file = (out / "metrics.jsonl").open("a")
        if speak and SummaryWriter is not None:
            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)

    def step(self, step: int, terms: dict[str, float], lr: float, images: int) -> None:
        """Account for step ``step`` (from 1)."""
        for key, value in terms.items():
            self.sums[key] = self.sums.get(key, 0.0) + value
        self.count += 1
        self.images += images
        if self.bar is not None:
            self.bar.update()
        now, ended = time.monotonic(), step % self.every == 0 or step == self.total
        if not (self.speak and (ended or now - self.shown >= LIVE_SECONDS)):
            return
        row: dict[str, Any] = {key: value / self.count for key, value in self.sums.items()}
        row |= {
            "step": step,
            "epoch": step / self.steps,
            "lr": lr,
            "images_per_second": self.images / max(now - self.last, 1e-9),
            "seconds": now - self.began,
            "memory_gb": memory_gb(),
            **self.extra,
        }
        self._show(row, now)
        if ended:
            self.write(row)
            self.sums, self.row = {}, row
            self.count = self.images = 0
            self.last = now

    def _show(self, row: dict[str, Any], now: float) -> None:
        """The row as the bar's text, as a line if the last is long ago, and in LIVE."""
        step, self.shown = row["step"], now
        shown = [key for key in row if key not in ("step", "epoch", "seconds")]
        text = " ".join(f"{key} {row[key]:.4g}" for key in shown)
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        elif self.lines and (now - self.told >= LINE_SECONDS or step == self.total):
            self.told = now
            left = (self.total - step) * (now - self.began) / max(1, step - self.start)
            where = f"{STEP.format(name=self.name)}{step}/{self.total} epoch {row['epoch']:.2f}"
            print(f"{where} {text} left {left:.0f} s", flush=True)
        live = {"start": self.start, "total": self.total, "text": text, **row}
        temporary = self.out / f".{LIVE}"  # not synchronised to the disk: it lives for a moment
        temporary.write_text(json.dumps(live))
        with suppress(PermissionError):  # Windows, while somebody reads it
            temporary.replace(self.out / LIVE)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl and TensorBoard."""
        if self.file is not None:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        if self.board is not None:
            for key, value in (row | row.get("validation", {})).items():
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
