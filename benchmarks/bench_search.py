"""1:N in a million entries: an index of faiss against exact blocks, in recall, time and memory.

    python benchmarks/bench_search.py [--out figures/results/bench_search.json]

Entries are unit vectors drawn at random, the hardest case for an index: nothing lies in groups. A mated probe is its
entry and noise, at a cosine of about 0.5, as two pictures of a person may have. Recall: of the mates that the exact search
has at rank 1, how many the index has there, too; and of the best entry of unmated probes. Times are those of the processor,
with one thread, so that other work on the machine does not count; bytes are of the index, or of the entries, alone.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import faiss
import harness as bench
import numpy as np
import torch
from torch.nn import functional as F

from btnet_core.evaluation import identification
from btnet_tools.neighbours import Neighbours

WIDTH = 512


def faces(entries: int, probes: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Gallery, probes, and the row of each probe's mate; every second probe has none."""
    generator = torch.Generator().manual_seed(0)
    gallery = torch.empty(entries, WIDTH)
    for part in gallery.split(65_536):
        part.normal_(generator=generator)
        F.normalize(part, out=part)
    mates = np.where(np.arange(probes) % 2, -1, np.arange(probes) * (entries // probes))
    noise = F.normalize(torch.randn(probes, WIDTH, generator=generator))
    mated = torch.from_numpy(mates >= 0)[:, None]
    own = torch.where(mated, gallery[torch.from_numpy(mates).clamp_min(0)], 0)
    return gallery, F.normalize(own + 3**0.5 * noise), mates


def index_bytes(index: Neighbours) -> int:
    """What the index takes, on disk as in memory."""
    with tempfile.TemporaryDirectory() as folder:
        faiss.write_index(index.index, f"{folder}/index")
        return (Path(folder) / "index").stat().st_size


def against_exact(
    index: Neighbours, probed: int, exact: identification.Search, given: tuple, best: np.ndarray
) -> dict[str, Any]:
    """Recall, the percentages that matter, and milliseconds a probe, with so many lists looked into."""
    _, probes, mates = given
    index.probed = probed
    found = index.search(probes, mates)
    first = exact.rank == 1
    start = time.process_time()
    index.nearest(probes)
    took = time.process_time() - start
    near = index.nearest(probes[torch.from_numpy(mates < 0)], 1)[1][:, 0]
    return {
        "probed": probed, "recall_mate": float(np.mean(found.rank[first] == 1)),
        "recall_best_of_unmated": float(np.mean(near == best)),
        "tpir": identification.open_set(found)["tpir"], "ms_a_probe": 1e3 * took / len(probes),
    }  # fmt: skip


def main() -> None:
    began, parser = time.monotonic(), bench.options(__doc__)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--probes", type=int, default=1000)
    options = parser.parse_args()
    entries, probes = (4000, 100) if options.quick else (options.entries, options.probes)
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    given = gallery, asked, mates = faces(entries, probes)
    start = time.process_time()
    exact = identification.search(asked, gallery, mates, device="cpu")
    took = time.process_time() - start
    unmated = np.flatnonzero(mates < 0)
    chunks = identification.score_chunks(asked, unmated, gallery, "cpu")
    best = np.concatenate([scores.argmax(1).numpy() for _, scores in chunks])
    values: dict[str, Any] = {
        "entries": entries, "probes": probes, "cosine_of_mates": float(exact.mate.mean()),
        "exact": {"ms_a_probe": 1e3 * took / probes, "bytes": 4 * gallery.numel(),
                  "tpir": identification.open_set(exact)["tpir"]},
    }  # fmt: skip
    values["lists"] = round(entries**0.5)
    for kind in ("Flat", "SQ8"):
        start = time.process_time()
        index = Neighbours(gallery, kind)
        made = time.process_time() - start
        rows = [against_exact(index, probed, exact, given, best) for probed in (8, 32, 128)]
        values[kind] = {"seconds_to_make": made, "bytes": index_bytes(index), "searches": rows}
        print(kind, values[kind], flush=True)
        del index
    bench.write(options, [], values, began)


if __name__ == "__main__":
    main()
