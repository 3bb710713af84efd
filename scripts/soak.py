"""`btnet embed` on 100,000 images of mixed sizes, a tenth of them broken: is memory flat, is every broken one reported?

    python scripts/soak.py [--model runs/demo/models/phi_bt] [--images 100000] [--out figures/results/soak.json]

It writes shards of a twentieth of the images and is killed (SIGKILL) in the ninth; the same command then goes on. Without
--model the network is a small one with random weights: what is watched does not depend on it.

The images are 1,000 different files under 100,000 names (hard links): JPEG and PNG of 4 to 300 pixels a side; the broken
ones are empty, cut short, text, pixels turned to noise, or announce 30,000 x 30,000 pixels. Exit status 1 if a broken
image is not reported, a good one is, memory grows by more than 256 MB after the first fifth of a run, or the kill cost
more than the shard in which it came.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from btnet_core.models.backbone import BackboneConfig, build_backbone
from btnet_core.models.btnet import BTNet
from btnet_paper.results import environment

DIFFERENT, GROWTH = 1000, 256


def picture(dice: np.random.Generator) -> bytes:
    """A noisy image of any size, as JPEG or PNG."""
    rows, columns = (int(4 * 75 ** dice.random()) for _ in range(2))
    small = dice.integers(0, 256, (rows // 4 + 2, columns // 4 + 2, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(small).resize((columns, rows)).save(out, ("JPEG", "PNG")[int(dice.integers(2))])
    return out.getvalue()


def spoil(data: bytes, kind: int) -> bytes:
    """One of five ways in which a file is no image."""
    if kind == 0:
        return b""
    if kind == 1:
        return data[: len(data) // 2]
    if kind == 2:
        return b"<html><body>404 Not Found</body></html>"
    if kind == 3:
        return bytes(b ^ 0x5A for b in data)
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


def make(folder: Path, images: int, seed: int = 0) -> set[str]:
    """Write the files; the names of the broken ones."""
    dice, order = np.random.default_rng(seed), random.Random(seed)
    sources = []
    for i in range(DIFFERENT):
        broken = i % 10 == 9
        data = picture(dice)
        path = folder / "sources" / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(spoil(data, i // 10 % 5) if broken else data)
        sources.append((path, broken))
    spoiled = set()
    for i in range(images):
        path, broken = sources[i % DIFFERENT] if i < DIFFERENT else order.choice(sources)
        name = f"faces/{i // 1000:03d}/{i:06d}.jpg"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(path, folder / name)
        if broken:
            spoiled.add(name.removeprefix("faces/"))
    return spoiled


def resident(pid: int) -> float:
    """Memory of a process in MB; 0 when it has ended."""
    try:
        return (
            int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            * os.sysconf("SC_PAGE_SIZE")
            / 2**20
        )
    except (OSError, IndexError):
        return 0.0


class Watched:
    """`btnet embed` in a process of its own, and its memory over time."""

    def __init__(self, command: list[str], said: Path) -> None:
        self.command, self.said = command, said
        self.memory: list[tuple[float, float]] = []
        self.seconds = 0.0

    def run(self, stop: Callable[[], bool] = lambda: False) -> int:
        """Until it ends, or ``stop`` says that it is to be killed; the status."""
        began = time.monotonic()
        with self.said.open("ab") as said:
            process = subprocess.Popen(self.command, stderr=said, stdout=subprocess.DEVNULL)
            while process.poll() is None:
                self.memory.append((time.monotonic() - began, resident(process.pid)))
                if stop():
                    process.kill()
                time.sleep(1)
        self.seconds = time.monotonic() - began
        return process.returncode

    def growth(self) -> dict[str, int]:
        """Largest MB in the first fifth of the run, and in all of it."""
        early = max(mb for at, mb in self.memory if at <= 0.2 * self.seconds)
        return {"first_fifth": round(early), "peak": round(max(mb for _, mb in self.memory))}


def small_model(folder: Path) -> str:
    """A folder with a BTNet of random weights, for faces of 32 pixels."""
    config = BackboneConfig(name="mobilefacenet", width=0.125, embedding=64, size=(32, 32))
    BTNet(build_backbone(config), (16, 8)).save(folder)
    return str(folder)


def gathered(out: Path) -> tuple[set[str], set[str], bool]:
    """Names of all shards of the index: embedded, left out; whether all embeddings are finite."""
    names, failed, finite = set(), set(), True
    for shard in json.loads((out / "index.json").read_text())["shards"]:
        with np.load(out / shard["file"]) as table:
            names |= set(table["names"].tolist())
            failed |= set(table["failed"].tolist())
            finite &= bool(np.isfinite(table["embeddings"]).all())
    return names, failed, finite


def soak(folder: Path, model: str, images: int) -> dict[str, Any]:
    """Embed, kill, go on; what came of it."""
    broken, out, size = make(folder, images), folder / "out", max(1, images // 20)
    command = [sys.executable, "-m", "btnet_tools", "embed", str(folder / "faces"), "--model", model,
               "--out", str(out), "--shard", str(size), "--keep-going"]  # fmt: skip
    first, second = (Watched(command, folder / "said") for _ in range(2))
    status = first.run(stop=lambda: len(list(out.glob("shard_*.npz"))) >= 8)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("shard_*.npz")}
    ended = second.run()
    names, failed, finite = gathered(out)
    if ended not in (0, 1) or not names:
        raise SystemExit((folder / "said").read_text()[-3000:])
    told = {
        line for line in (folder / "said").read_text().splitlines() if line.startswith("left out ")
    }
    seconds, step = first.seconds + second.seconds, max(1, len(second.memory) // 60)
    return {
        "images": images, "broken": len(broken), "reported": len(failed & broken), "wrongly_reported": len(failed - broken),
        "printed": len(told), "embedded": len(names), "finite": finite, "images_a_shard": size,
        "killed": {"status": status, "shards_then": len(kept),
                   "made_again": sum(path.stat().st_mtime_ns != at for path, at in kept.items())},
        "seconds": round(seconds, 1), "images_per_second": round(images / seconds, 1),
        "memory_mb": {"until_the_kill": first.growth(), "after_it": second.growth()},
        "memory_over_time": [[round(at, 1), round(mb)] for at, mb in second.memory[::step]],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a folder with a BTNet")
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        report = soak(folder, options.model or small_model(folder / "model"), options.images)
    print(json.dumps({k: v for k, v in report.items() if k != "memory_over_time"}, indent=1))
    if options.out:
        options.out.write_text(json.dumps({**report, **environment()}, indent=1) + "\n")
    complete = report["reported"] == report["broken"] and not report["wrongly_reported"]
    complete &= report["embedded"] == report["images"] - report["broken"] and report["finite"]
    flat = all(mb["peak"] - mb["first_fifth"] <= GROWTH for mb in report["memory_mb"].values())
    return int(not (complete and flat) or report["killed"]["made_again"] > 0)


if __name__ == "__main__":
    sys.exit(main())
