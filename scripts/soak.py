"""`btnet embed` on 100,000 images of mixed sizes, a tenth of them broken: is memory flat, is every broken one reported?

    python scripts/soak.py --model runs/demo/models/phi_bt [--images 100000] [--out FILE.json]

The images are 1,000 different files under 100,000 names (hard links): JPEG and PNG of 4 to 300 pixels a side; the broken
ones are empty, cut short, text, pixels turned to noise, or announce 30,000 x 30,000 pixels. Exit status 1 if a broken
image is not reported, a good one is, or memory grows by more than 256 MB after the first fifth of the run.
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
from pathlib import Path

import numpy as np
from PIL import Image

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


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a folder with a BTNet")
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        broken = make(folder, options.images)
        command = [
            sys.executable,
            "-m",
            "btnet_tools",
            "embed",
            str(folder / "faces"),
            "--model",
            options.model,
        ]
        began, memory = time.monotonic(), [(0.0, 0.0)]
        with (folder / "said").open("wb") as said:
            process = subprocess.Popen(
                [*command, "--out", str(folder / "out.npz"), "--keep-going"], stderr=said
            )
            while process.poll() is None:
                memory.append((time.monotonic() - began, resident(process.pid)))
                time.sleep(1)
        seconds = time.monotonic() - began
        if process.returncode not in (0, 1):
            raise SystemExit((folder / "said").read_text()[-3000:])
        with np.load(folder / "out.npz") as table:
            failed, names, rows = (
                set(table["failed"].tolist()),
                set(table["names"].tolist()),
                table["embeddings"],
            )
        printed = sum(
            line.startswith("left out ") for line in (folder / "said").read_text().splitlines()
        )
    early = max(mb for at, mb in memory if at < 0.2 * seconds)
    late = max(mb for _, mb in memory)
    step = max(1, len(memory) // 60)
    report = {
        "images": options.images, "broken": len(broken), "reported": len(failed & broken), "wrongly_reported": len(failed - broken),
        "printed": printed, "embedded": len(names), "finite": bool(np.isfinite(rows).all()), "seconds": round(seconds, 1),
        "images_per_second": round(options.images / seconds, 1), "memory_mb": {"first_fifth": round(early), "peak": round(late)},
        "memory_over_time": [[round(at, 1), round(mb)] for at, mb in memory[::step]],
    }  # fmt: skip
    print(
        json.dumps(
            {key: value for key, value in report.items() if key != "memory_over_time"}, indent=1
        )
    )
    if options.out:
        options.out.write_text(json.dumps({**report, **environment()}, indent=1) + "\n")
    complete = failed == broken and len(names) == options.images - len(broken) and report["finite"]
    return int(not complete or late - early > GROWTH)


if __name__ == "__main__":
    sys.exit(main())
