"""Batches: who comes when (resumable, whatever the number of processes), and their pixels."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from btnet_core.data.faces import FaceSet, open_faces
from btnet_core.data.sources import Spec, spec_text
from btnet_core.errors import ConfigError
from btnet_core.images import Resize, resize, scaled_size
from btnet_core.models.backbone import Backbone
from btnet_core.training import distributed
from btnet_core.training.config import TrainConfig

MEMORY_FRACTION = 0.3  # of the free memory, for the decoded images of all processes here


@dataclass(frozen=True)
class Batch:
    """One process's part of a batch, on the CPU: ``(b,)`` each, ``shift`` ``(b, 2)``."""

    records: Tensor
    labels: Tensor
    flip: Tensor
    size: Tensor  # rows to shrink to
    shift: Tensor  # right and down, in pixels

    def split(self, parts: int) -> list[Batch]:
        """Equal parts, in order."""
        columns = [getattr(self, column.name).chunk(parts) for column in fields(self)]
        return [Batch(*part) for part in zip(*columns, strict=True)]


class Sampler:
    """Every epoch a new order, flips and sizes, drawn from (seed, epoch).

    A position is (epoch, step) and nothing else. The draws are for the batch of all processes
    together; each takes its consecutive part. The last incomplete batch is left out.

    Raises:
        ConfigError: the batch cannot be cut, or is larger than the data.
    """

    def __init__(self, labels: Tensor, config: TrainConfig) -> None:
        self.labels, self.config = labels, config
        self.mine = images_each(config)
        self.steps = len(labels) // config.batch
        if not self.steps:
            raise ConfigError(
                f"batch: got {config.batch} images, the data have only {len(labels)}: "
                f"set batch to {len(labels)} or less"
            )
        self._drawn: tuple[int, tuple[Tensor, ...]] | None = None

    def batch(self, step: int) -> Batch:
        """The part of global step ``step`` that belongs to this process."""
        epoch, place = divmod(step, self.steps)
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = (epoch, self._draw(epoch))
        order, flip, size, shift = self._drawn[1]
        start = place * self.config.batch + distributed.rank() * self.mine
        part = slice(start, start + self.mine)
        records = order[part]
        return Batch(records, self.labels[records], flip[part], size[part], shift[part])

    def _draw(self, epoch: int) -> tuple[Tensor, ...]:
        config, count = self.config, len(self.labels)
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
        order = torch.randperm(count, generator=generator)
        if config.per_identity > 1:
            order = self._grouped(order, generator)
        flip = torch.rand(count, generator=generator) < (0.5 if config.flip else 0.0)
        weights = torch.tensor(config.size_weights or [1.0] * len(config.sizes))
        chosen = torch.multinomial(weights, count, replacement=True, generator=generator)
        shift = config.shift * (2 * torch.rand(count, 2, generator=generator) - 1)
        return order, flip, torch.tensor(config.sizes)[chosen], shift

    def _grouped(self, order: Tensor, generator: torch.Generator) -> Tensor:
        """Runs of ``per_identity`` records of one identity, the runs in random order."""
        order = order[torch.argsort(self.labels[order], stable=True)]
        labels = self.labels[order]
        first = torch.searchsorted(labels, labels)  # where each identity begins
        run = (torch.arange(len(order)) - first) // self.config.per_identity
        key = labels * (len(order) + 1) + run
        _, group = torch.unique_consecutive(key, return_inverse=True)
        place = torch.randperm(int(group[-1]) + 1, generator=generator)
        return order[torch.argsort(place[group], stable=True)]


def images_each(config: TrainConfig) -> int:
    """Images of this process in a batch.

    Raises:
        ConfigError: the batch does not divide over processes and parts, or a part is a single
            image, of which batch norms have no variance.
    """
    parts = distributed.world() * config.accumulate
    among = f"{distributed.world()} processes, each in {config.accumulate} parts"
    if config.batch % parts:
        raise ConfigError(f"batch: got {config.batch} for {among}: set a multiple of {parts}")
    if config.batch == parts:
        raise ConfigError(
            f"batch: got {config.batch} for {among}: one image each, and batch norms need two; "
            f"set batch to {2 * parts} or more"
        )
    return config.batch // distributed.world()


class Pixels:
    """uint8 faces by record: all in memory as one tensor when they fit, else decoded ahead."""

    def __init__(self, faces: FaceSet, workers: int) -> None:
        self.faces, self.workers = faces, max(1, workers)
        shape = (len(faces), 3, 112, 112)
        room = MEMORY_FRACTION * free_memory() / distributed.neighbours()
        fits = torch.Size(shape).numel() < room
        self.all = torch.empty(shape, dtype=torch.uint8) if fits else None
        if self.all is not None:
            for records in torch.arange(len(faces)).split(1024):
                self.all[records] = faces.images(records.tolist())

    def get(self, records: Tensor) -> Tensor:
        """uint8 ``(n, 3, 112, 112)``."""
        return self.faces.images(records.tolist()) if self.all is None else self.all[records]

    def stream(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Tensor]]:
        """Each batch with its pixels, decoded while earlier ones are trained on."""
        if self.all is not None:
            yield from ((batch, self.all[batch.records]) for batch in batches)
            return
        with ThreadPoolExecutor(self.workers) as pool:
            waiting: deque = deque()
            for batch in batches:
                waiting.append((batch, pool.submit(self.get, batch.records)))
                if len(waiting) > self.workers:
                    ready, pixels = waiting.popleft()
                    yield ready, pixels.result()
            yield from ((ready, pixels.result()) for ready, pixels in waiting)


def open_pixels(spec: Spec, workers: int) -> Pixels:
    """The faces of a spec, kept for the next run of this process on the same data."""
    return _pixels(spec_text(spec), workers)


@lru_cache(maxsize=1)
def _pixels(spec: str, workers: int) -> Pixels:
    return Pixels(open_faces(spec), workers)


def free_memory() -> float:
    """Bytes of memory that are free or hold files that can be dropped."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":") for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024.0
    except (OSError, KeyError):  # no Linux
        if not hasattr(os, "sysconf"):
            return 4e9
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2.0


def transfer(rows: Tensor, device: torch.device) -> Tensor:
    """To the device, without waiting for the copy, or for the work before it, on a GPU."""
    if device.type == "cuda" and rows.device.type == "cpu":
        return rows.pin_memory().to(device, non_blocking=True)
    return rows.to(device)


def mirrored(pixels: Tensor, flip: Tensor) -> Tensor:
    """Images with ``flip`` set are mirrored left to right (paper-and-code: teacher)."""
    flip = transfer(flip, pixels.device)
    return torch.where(flip[:, None, None, None], pixels.flip(-1), pixels)


def moved(pixels: Tensor, shift: Tensor) -> Tensor:
    """Each image ``(B, 3, H, W)`` moved right and down by its ``shift`` ``(B, 2)`` pixels.

    Returns float32; edges go on.
    """
    rows, columns = pixels.shape[-2:]
    step = transfer(2 * shift / torch.tensor([columns, rows]), pixels.device)
    matrix = torch.eye(2, 3, device=pixels.device).repeat(len(pixels), 1, 1)
    matrix[:, :, 2] = -step
    grid = F.affine_grid(matrix, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels.float(), grid, padding_mode="border", align_corners=False)


def trunk_input(trunk: Backbone, pixels: Tensor, size: Tensor, how: Resize) -> Tensor:
    """Each face shrunk to its own ``size`` in rows and scaled back up (4.1): ``(B, 3, H, W)``."""
    faces = _each_at(trunk.crop(pixels), size, trunk.config.size, how)
    return trunk.normalise(faces).contiguous(memory_format=torch.channels_last)


def branch_input(
    trunk: Backbone, pixels: Tensor, r: int, how: Resize, size: Tensor | None = None
) -> Tensor:
    """X_r ``(B, 3, r, r')``: each face shrunk to its own ``size`` in rows, then scaled to r."""
    shape = scaled_size(r, trunk.config.size)
    faces = _each_at(trunk.crop(pixels), size, shape, how)
    return trunk.normalise(faces).contiguous(memory_format=torch.channels_last)


def _each_at(pixels: Tensor, size: Tensor | None, shape: tuple[int, int], how: Resize) -> Tensor:
    """Images ``(B, 3, H, W)`` shrunk to their ``size`` in rows, then scaled to ``shape``."""
    if size is None:
        return resize(pixels, shape, how)
    faces = torch.empty((*pixels.shape[:2], *shape), dtype=torch.float32, device=pixels.device)
    for rows in size.unique().tolist():
        members = transfer(torch.nonzero(size == rows).flatten(), pixels.device)
        small = resize(pixels[members], scaled_size(rows, tuple(pixels.shape[-2:])), how)
        faces[members] = resize(small, shape, how)
    return faces
