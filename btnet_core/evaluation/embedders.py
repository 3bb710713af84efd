"""The compared methods as one kind of callable: ``embedder(pixels, r) -> (B, D)`` (paper 4.1).

Each takes faces of canonical size, shrinks them to r itself and embeds them in its own way: the
baselines scale back up to S, BTNet goes through the branch. Pixels are RGB ``(B, 3, S, S)`` in [0,
255]; embeddings are not normalised.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from btnet_core.device import autocast, resolve_device, resolve_precision
from btnet_core.errors import ConfigError
from btnet_core.images import Resize, degrade, resize, scaled_size
from btnet_core.models.backbone import Backbone
from btnet_core.models.btnet import BTNet, Route, weights_digest


class Embedder(ABC):
    """Base: batching, inference mode, autocast, channels_last; ``_embed`` embeds one batch."""

    def __init__(
        self, *modules: nn.Module, how: Resize | None, device: str = "auto",
        precision: str = "auto", batch_size: int = 128,
    ) -> None:  # fmt: skip
        self.device, self.how = resolve_device(device), how or Resize()
        self.precision = resolve_precision(precision, self.device)
        self.batch_size = batch_size
        for module in modules:
            module.to(self.device, memory_format=torch.channels_last).eval()

    @torch.inference_mode()
    def __call__(self, pixels: Tensor, r: int) -> Tensor:
        """``(B, 3, S, S)`` pixels shrunk to resolution r -> ``(B, D)`` float32 on the CPU."""
        with autocast(self.device, self.precision):
            batches = [
                self._embed(batch.to(self.device), r) for batch in pixels.split(self.batch_size)
            ]
        return torch.cat(batches).float().cpu()

    @abstractmethod
    def _embed(self, pixels: Tensor, r: int) -> Tensor:
        """One batch on the device -> embeddings of any float dtype."""

    @abstractmethod
    def network(self, r: int) -> nn.Module:
        """What embeds faces of r."""

    def covered(self, settings: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Those settings (r1, r2) for which it has a network at both resolutions."""
        return [pair for pair in settings if all(self._has(r) for r in pair)]

    def _has(self, r: int) -> bool:
        try:
            self.network(r)
        except ConfigError:
            return False
        return True

    def fingerprint(self, r: int) -> str:
        """Equal for embedders with equal embeddings at r: weights, resize, precision, device."""
        network = self.network(r)
        route = f"route {r}" if isinstance(network, Route) else f"from {r} px"
        return (
            f"{weights_digest(network)} {route} {self.how.name} {self.precision} {self.device.type}"
        )


class UpsamplingEmbedder(Embedder):
    """phi_hr, phi_mr: shrink to r, scale back up to S, embed with the trunk."""

    def __init__(self, backbone: Backbone, *, how: Resize | None = None, **options) -> None:
        super().__init__(backbone, how=how, **options)
        self.backbone = backbone

    def network(self, r: int) -> nn.Module:
        return self.backbone

    def _embed(self, pixels: Tensor, r: int) -> Tensor:
        faces = degrade(self.backbone.crop(pixels), r, self.how)
        return self.backbone(
            self.backbone.normalise(faces).contiguous(memory_format=torch.channels_last)
        )


class MultiModelEmbedder(Embedder):
    """phi_mm: an embedder of its own for each resolution, all of one device and resize."""

    def __init__(self, single: dict[int, Embedder]) -> None:
        one = next(iter(single.values()))
        options = {"precision": one.precision, "batch_size": one.batch_size}
        super().__init__(how=one.how, device=str(one.device), **options)
        self.single = single

    def network(self, r: int) -> nn.Module:
        return self._of(r).network(r)

    def fingerprint(self, r: int) -> str:
        return self._of(r).fingerprint(r)

    def _of(self, r: int) -> Embedder:
        if r not in self.single:
            raise ConfigError(f"resolution {r}: phi_mm has models for {sorted(self.single)}")
        return self.single[r]

    def _embed(self, pixels: Tensor, r: int) -> Tensor:
        return self._of(r)._embed(pixels, r)


class BranchEmbedder(Embedder):
    """phi_bt: shrink to r and embed through the branch of r."""

    def __init__(self, btnet: BTNet, *, how: Resize | None = None, **options) -> None:
        super().__init__(btnet, how=how, **options)
        self.btnet = btnet

    def network(self, r: int) -> nn.Module:
        return self.btnet.route(r)

    def fingerprint(self, r: int) -> str:
        return " ".join(filter(None, (super().fingerprint(r), self.btnet.inference)))

    def _embed(self, pixels: Tensor, r: int) -> Tensor:
        trunk = self.btnet.trunk
        faces = resize(trunk.crop(pixels), scaled_size(r, trunk.config.size), self.how)
        return self.btnet(trunk.normalise(faces).contiguous(memory_format=torch.channels_last), r)
