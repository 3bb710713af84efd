"""A recogniser of your own as a trunk: one small class says what its units and its head are."""

from __future__ import annotations

import runpy
from collections import OrderedDict

import torch
from torch import Tensor, nn

from btnet_core.errors import ConfigError
from btnet_core.models.backbone import ADAPTERS, Backbone, BackboneConfig
from btnet_core.models.weights import load_wrapped

POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d)


class Layer(nn.Sequential):
    """Any module as a unit of the body."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.stride = 1  # the trunk's resolutions are measured, see Adapter.resolutions

    def abandon_stride(self) -> list[str]:
        """Strided convolutions keep their weights at stride 1, strided pooling is left out."""
        for parent in list(self.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Conv2d) and child.stride != (1, 1):
                    child.stride, child.padding = (1, 1), "same"
                elif isinstance(child, POOLS) and child.stride not in (1, (1, 1)):
                    setattr(parent, name, nn.Identity())
        return []


class Adapter(Backbone):
    """Subclass, set the facts, write ``build`` and ``split``; the class is then known by its name.

    ``state``: weights with the names of ``build()``'s network, or wrapped; ``where``: their file.

    Raises:
        ConfigError: ``split`` computes something else than the network, or the facts do not fit.
        CheckpointError: ``state`` does not fit the network.
    """

    size = (112, 112)  # canonical rows, columns in pixels
    embedding = 512  # D
    mean, std = 127.5, 127.5  # normalised = (pixels - mean) / std
    channels = "rgb"  # the order that the network was trained with, or "bgr"

    def build(self) -> nn.Module:
        """The network with any weights: normalised ``(B, 3, H, W)`` -> embeddings ``(B, D)``."""
        raise ConfigError(f"{type(self).__name__}: an Adapter needs its own method build()")

    def split(self, network: nn.Module) -> tuple[dict[str, nn.Module], nn.Module]:
        """Its layers by name, in the order of running, and the head: last map -> embedding."""
        raise ConfigError(f"{type(self).__name__}: an Adapter needs its own method split()")

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        ADAPTERS[cls.__name__] = cls

    def __init__(self, state: dict[str, Tensor] | None = None, where: str = "") -> None:
        network, name = self.build(), type(self).__name__
        if state is not None:
            load_wrapped(network, state, where)
        names = ("size", "embedding", "mean", "std", "channels")
        facts = {fact: getattr(self, fact) for fact in names}
        body, head = self.split(network)
        units: OrderedDict[str, nn.Module] = OrderedDict()
        units.update((key.replace(".", "_"), Layer(unit)) for key, unit in body.items())
        super().__init__(units, head, BackboneConfig(name=name, **facts))
        self._measure(network.eval())

    @torch.no_grad()
    def _measure(self, network: nn.Module) -> None:
        name = type(self).__name__
        self.eval()
        x = torch.rand(2, 3, *self.config.size, generator=torch.Generator().manual_seed(0)) * 2 - 1
        try:
            expected, maps = network(x), OrderedDict(self.features(x))
            z = self.head(maps[next(reversed(maps))])
        except Exception as error:  # whatever the user's own modules raise
            told = f"does not run on {tuple(x.shape)} ({told_by(error)})"
            raise ConfigError(f"{name}: {told}") from error
        if not isinstance(expected, Tensor) or tuple(z.shape) != (2, self.embedding):
            wanted = f"expected embeddings (2, {self.embedding})"
            raise ConfigError(f"{name}: gives {tuple(z.shape)}, {wanted}")
        if z.shape != expected.shape or not torch.allclose(z, expected, rtol=1e-3, atol=1e-4):
            told = "the units and head of split() compute something else than build()'s network"
            raise ConfigError(f"{name}: {told}")
        self._rows = OrderedDict((unit, value.shape[-2]) for unit, value in maps.items())
        self.train()

    def resolutions(self) -> OrderedDict[str, int]:
        """Rows of each unit's output for an input of canonical size, as measured."""
        return OrderedDict(self._rows)


def told_by(error: Exception) -> str:
    """The kind of an error and its first line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def find_adapter(spec: str) -> type[Backbone]:
    """Run ``FILE.py`` and return its Adapter class; ``FILE.py:Class`` where it has several.

    Raises:
        ConfigError: the file cannot be run, or does not hold exactly one such class.
    """
    place, _, name = spec.partition(".py:")
    try:
        found = runpy.run_path(f"{place}.py" if name else spec)
    except Exception as error:  # whatever the user's file raises
        told = f"cannot be run ({told_by(error)})"
        raise ConfigError(f"--adapter {spec}: {told}") from error
    classes = {
        key: value
        for key, value in found.items()
        if isinstance(value, type) and issubclass(value, Adapter) and value is not Adapter
    }
    mine = [classes[name]] if name in classes else list(classes.values())
    if len(mine) != 1:
        told = f"holds Adapter classes {sorted(classes)}, expected one (FILE.py:Class)"
        raise ConfigError(f"--adapter {spec}: {told}")
    return mine[0]
