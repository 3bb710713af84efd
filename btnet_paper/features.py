"""Feature maps inside the compared methods (Figures 4 and 9), and how alike two of them are.

Stage k is the layer where the trunk first has 56, 28, 14 and 7 rows: where the branch of that
resolution would join.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from btnet_core.evaluation.embedders import BranchEmbedder, Embedder, MultiModelEmbedder
from btnet_core.models.backbone import Backbone
from btnet_core.models.btnet import Route, coupling_layer


def network(embedder: Embedder, r: int) -> tuple[Backbone, nn.Module]:
    """(trunk, the network that a face of resolution ``r`` passes through) of any of the methods."""
    if isinstance(embedder, BranchEmbedder):
        return embedder.btnet.trunk, embedder.btnet.route(r)
    if isinstance(embedder, MultiModelEmbedder):
        return network(embedder.single[r], r)
    return embedder.backbone, embedder.backbone  # type: ignore[attr-defined]


def stages(trunk: Backbone) -> tuple[int, ...]:
    """Rows of the trunk's feature pyramid below its canonical size, e.g. (56, 28, 14, 7)."""
    below = {rows for rows in trunk.resolutions().values() if rows < trunk.config.size[0]}
    return tuple(sorted(below, reverse=True))


@contextmanager
def watching(trunk: Backbone, net: nn.Module) -> Iterator[list[list[Tensor]]]:
    """For each stage the outputs (B, C_k, h, w) of ``net`` while it runs, float32 on the CPU."""
    parts = [net.branch, net.shared] if isinstance(net, Route) else [trunk.body]
    units = {name: unit for part in parts for name, unit in part.named_children()}
    found: dict[str, list[Tensor]] = {coupling_layer(trunk, rows): [] for rows in stages(trunk)}
    hooks = [
        units[name].register_forward_hook(lambda _, __, z, kept=kept: kept.append(z.float().cpu()))
        for name, kept in found.items()
    ]
    try:
        yield list(found.values())
    finally:
        for hook in hooks:
            hook.remove()


def stage_features(embedder: Embedder, pixels: Tensor, r: int) -> list[Tensor]:
    """Output (B, C_k, h, w) of each stage, float32 on the CPU, for (B, 3, S, S) faces of r px."""
    with watching(*network(embedder, r)) as batches:
        embedder(pixels, r)
    return [torch.cat(kept) for kept in batches]


def alike(z_r: Tensor, z_s: Tensor) -> Tensor:
    """Cosine (B,) of each face's maps (B, C, h, w), (B, C, h', w'); the larger is averaged down."""
    rows, columns = min(z_r.shape[2:], z_s.shape[2:])
    a, b = (F.adaptive_avg_pool2d(z, (rows, columns)).flatten(1) for z in (z_r, z_s))
    return F.cosine_similarity(a, b)


def strength(z: Tensor) -> Tensor:
    """What a picture of maps (B, C, h, w) shows: their root mean square over channels (B, h, w)."""
    return z.square().mean(1).sqrt()
