"""How fast and how large the evaluation protocols are, against the straightforward way of doing the same.

    python benchmarks/bench_evaluation.py [--out FILE.json] [--probes 200000 --gallery 60000] [--pairs 6000] [--folds-only]

Ten-fold accuracy: at least 50x a loop over thresholds; 1:N: at most 2x the bare matrix product of the same features, in
at most 4 GiB. Ours finds the best of all thresholds; the loops try 400, as evaluation scripts do, or all. The folds are
timed by the processor's clock, the best of several runs, so that other work on the machine counts for neither side;
--folds-only measures them alone, and --out keeps its other rows.
"""

from __future__ import annotations

import json
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path

import harness as bench
import numpy as np
import torch
from torch.nn import functional as F

from btnet_core.evaluation.identification import CHUNK, open_set, search
from btnet_core.evaluation.templates import pair_scores
from btnet_core.evaluation.verification import tar_at_far, ten_fold_accuracy


def seconds(
    call: Callable[[], object], repeats: int = 1, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Best time of ``repeats`` calls, by the clock on the wall or another."""
    times = []
    for _ in range(repeats):
        start = clock()
        call()
        times.append(clock() - start)
    return min(times)


class PeakMemory:
    """Largest resident size in MiB while the block runs, sampled every 5 ms."""

    def __enter__(self) -> PeakMemory:
        self.peak, self.running = 0.0, True
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()
        return self

    def _sample(self) -> None:
        page = resource.getpagesize() / 2**20
        while self.running:
            self.peak = max(self.peak, int(Path("/proc/self/statm").read_text().split()[1]) * page)
            time.sleep(0.005)

    def __exit__(self, *exc: object) -> None:
        self.running = False
        self.thread.join()


def right(threshold: float, score: np.ndarray, label: np.ndarray) -> int:
    """Right decisions, counted as tersely as numpy can."""
    return np.count_nonzero((score > threshold) == label)


def right_by_table(threshold: float, score: np.ndarray, label: np.ndarray) -> int:
    """Right decisions from the table of true and false positives and negatives, as evaluation scripts count them."""
    accept = score > threshold
    true_positive = np.sum(np.logical_and(accept, label))
    false_positive = np.sum(np.logical_and(accept, np.logical_not(label)))
    true_negative = np.sum(np.logical_and(np.logical_not(accept), np.logical_not(label)))
    false_negative = np.sum(np.logical_and(np.logical_not(accept), label))
    right_share = (true_positive + true_negative) / (
        true_positive + false_positive + true_negative + false_negative
    )
    return round(right_share * len(label))


def looped_ten_fold(
    similarity: np.ndarray,
    same: np.ndarray,
    thresholds: np.ndarray,
    count: Callable = right,
    folds: int = 10,
) -> float:
    """The usual loop: every threshold on every training part, then the test part at the best of them."""
    accuracies = []
    for test in np.array_split(np.arange(len(same)), folds):
        train = np.ones(len(same), bool)
        train[test] = False
        score, label = similarity[train], same[train]
        best = max(thresholds, key=lambda t: count(t, score, label))
        accuracies.append(right(best, similarity[test], same[test]) / len(test))
    return float(np.mean(accuracies))


def bench_ten_fold(pairs: int, rng: np.random.Generator) -> list[dict]:
    same = rng.random(pairs) < 0.5
    similarity = rng.normal(size=pairs) + 2 * same
    ours = seconds(lambda: ten_fold_accuracy(similarity, same), 200, time.process_time)
    rows = []
    for size, count in ((400, right), (400, right_by_table), (pairs, right)):
        grid = np.sort(rng.choice(similarity, size, replace=False))
        loop = seconds(
            lambda grid=grid, count=count: looped_ten_fold(similarity, same, grid, count),
            20 if size == 400 else 3,
            time.process_time,
        )
        how = "confusion table each" if count is right_by_table else "one count each"
        rows.append({
            "what": f"ten folds, {pairs} pairs, against a loop over {size} thresholds, {how}",
            "seconds": ours, "reference_seconds": loop, "times_faster": loop / ours,
        })  # fmt: skip
    return rows


def bare_product(probes: torch.Tensor, gallery: torch.Tensor) -> float:
    """Seconds for nothing but the products, in blocks of the size that ``search`` uses and into one buffer."""
    step = max(1, min(len(probes), CHUNK // len(gallery)))
    unit, out = F.normalize(gallery).T, torch.empty(step, len(gallery))
    torch.matmul(probes[:step], unit, out=out)  # warm up

    def product() -> None:
        for block in probes.split(step):
            torch.matmul(block, unit, out=out[: len(block)])

    return seconds(product)


def bench_search(probes: int, gallery: int, width: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    entries = torch.randn(gallery, width, generator=generator)
    faces = torch.randn(probes, width, generator=generator)
    mates = np.where(np.arange(probes) % 3 == 0, -1, np.arange(probes) % gallery)
    bare = bare_product(faces, entries)
    with PeakMemory() as memory:
        ours = seconds(lambda: open_set(search(faces, entries, mates)))
    return {
        "what": f"1:N, {probes} probes x {gallery} gallery x {width}, against the bare matrix product",
        "seconds": ours, "reference_seconds": bare, "times_slower": ours / bare, "peak_process_MiB": memory.peak,
    }  # fmt: skip


def bench_templates(templates: int, pairs: int, width: int, rng: np.random.Generator) -> dict:
    features = torch.randn(templates, width)
    first, second = rng.integers(0, templates, (2, pairs))
    same = np.arange(pairs) % 800 == 0
    with PeakMemory() as memory:
        start = time.perf_counter()
        similarity = pair_scores(features, first, second)
        scored = time.perf_counter() - start
        tar_at_far(similarity, same, 1e-4)
    return {
        "what": f"1:1, {pairs} pairs of {templates} templates x {width}, scores and TAR@FAR",
        "seconds": time.perf_counter() - start, "scoring_seconds": scored, "peak_process_MiB": memory.peak,
    }  # fmt: skip


def main() -> None:
    began, parser = time.monotonic(), bench.options(__doc__)
    parser.add_argument("--pairs", type=int, default=6000)
    parser.add_argument("--probes", type=int, default=200_000)
    parser.add_argument("--gallery", type=int, default=60_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--template-pairs", type=int, default=15_000_000)
    parser.add_argument("--templates", type=int, default=23_000)
    parser.add_argument("--folds-only", action="store_true", help="--out keeps its other rows")
    args = parser.parse_args()
    if args.quick:
        args.pairs, args.probes, args.gallery, args.template_pairs, args.templates = (
            600,
            500,
            300,
            10_000,
            100,
        )
    rng = np.random.default_rng(0)
    rows = bench_ten_fold(args.pairs, rng)
    if args.folds_only:
        kept = json.loads(args.out.read_text())["values"]["rows"]
        rows += [row for row in kept if "times_faster" not in row]
    else:
        rows.append(bench_search(args.probes, args.gallery, args.width))
        rows.append(bench_templates(args.templates, args.template_pairs, args.width, rng))
    for row in rows:
        print(row["what"])
        print(
            "   "
            + ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "what")
        )
    goals = [
        bench.goal(
            row["what"].replace(f"ten folds, {args.pairs} pairs, against a", "ten folds, times faster than a"),
            row["times_faster"], 50, at_least=True,
        )
        for row in rows if "times_faster" in row
    ]  # fmt: skip
    search_row = rows[-2]
    goals += [
        bench.goal(
            "1:N / the bare matrix product, time", search_row["times_slower"], 2, at_least=False
        ),
        bench.goal(
            "1:N, peak of the process (GiB)",
            search_row["peak_process_MiB"] / 1024,
            4,
            at_least=False,
        ),
    ]
    bench.write(args, goals, {"rows": rows}, began)


if __name__ == "__main__":
    main()
