"""A recogniser of your own as a trunk: one small class says what its units and its head are (docs/own-recogniser.md)."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

from btnet_core.backbones import ADAPTERS, Backbone, BackboneConfig, load_strictly
from btnet_core.errors import ConfigError

POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d)


class Layer(nn.Sequential):
    """Any module as a unit of the body."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.stride = 1  # the trunk's resolutions are measured, see Adapter.resolutions

    def abandon_stride(self) -> list[str]:
        """Strided convolutions keep their weights at stride 1, strided pooling becomes the identity."""
        for parent in list(self.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Conv2d) and child.stride != (1, 1):
                    child.stride, child.padding = (1, 1), "same"
                elif isinstance(child, POOLS) and child.stride not in (1, (1, 1)):
                    setattr(parent, name, nn.Identity())
        return []


class Adapter(Backbone):
    """Subclass, set the five facts, and write ``build`` and ``split``; the class is then known by its name.

    ``state`` are weights with the names that ``build()``'s network has, ``where`` their file.

    Raises:
        ConfigError: ``split`` computes something else than the network, or the facts do not fit.
        CheckpointError: ``state`` does not fit the network.
    """

    size = (112, 112)  # canonical rows, columns in pixels
    embedding = 512  # D
    mean, std = 127.5, 127.5  # normalised = (pixels - mean) / std, RGB

    def build(self) -> nn.Module:
        """The network with any weights: normalised ``(B, 3, H, W)`` -> embeddings ``(B, D)``."""
        raise NotImplementedError

    def split(self, network: nn.Module) -> tuple[dict[str, nn.Module], nn.Module]:
        """Its layers in the order in which they run, by name, and the head: last feature map -> embedding."""
        raise NotImplementedError

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        ADAPTERS[cls.__name__] = cls

    def __init__(self, state: dict[str, Tensor] | None = None, where: str = "") -> None:
        network = self.build()
        if state is not None:
            load_strictly(network, state, where)
        facts = {"size": self.size, "embedding": self.embedding, "mean": self.mean, "std": self.std}
        body, head = self.split(network)
        units = OrderedDict((name.replace(".", "_"), Layer(unit)) for name, unit in body.items())
        super().__init__(units, head, BackboneConfig(name=type(self).__name__, **facts))  # type: ignore[arg-type]
        self._measure(network)

    @torch.no_grad()
    def _measure(self, network: nn.Module) -> None:
        name, training = type(self).__name__, network.training
        network.eval()
        self.eval()
        x = torch.rand(2, 3, *self.config.size, generator=torch.Generator().manual_seed(0)) * 2 - 1
        try:
            expected, maps = network(x), OrderedDict(self.features(x))
            z = self.head(maps[next(reversed(maps))])
        except Exception as error:  # whatever the user's own modules raise
            raise ConfigError(f"{name}: does not run on {tuple(x.shape)} ({type(error).__name__}: {error})") from error
        if not isinstance(expected, Tensor) or tuple(z.shape) != (2, self.embedding):
            raise ConfigError(f"{name}: gives {tuple(z.shape)}, expected embeddings (2, {self.embedding})")
        if z.shape != expected.shape or not torch.allclose(z, expected, rtol=1e-3, atol=1e-4):
            raise ConfigError(f"{name}: the units and head of split() compute something else than build()'s network")
        self._rows = OrderedDict((unit, value.shape[-2]) for unit, value in maps.items())
        network.train(training)
        self.train(training)

    def resolutions(self) -> OrderedDict[str, int]:
        """Rows of each unit's output for an input of canonical size, as measured."""
        return OrderedDict(self._rows)


def find_adapter(spec: str) -> type[Backbone]:
    """The Adapter class of ``my_file.py``, ``my_file.py:Class`` or ``package.module:Class``; its file is run.

    Raises:
        ConfigError: no such file or module, it fails, or it does not hold exactly one such class.
    """
    place, _, name = spec.partition(":") if not Path(spec).is_file() else (spec, "", "")
    try:
        if place.endswith(".py"):
            found = importlib.util.spec_from_file_location(Path(place).stem, place)
            module = sys.modules[found.name] = importlib.util.module_from_spec(found)  # type: ignore[union-attr,arg-type]
            found.loader.exec_module(module)  # type: ignore[union-attr]
        else:
            sys.path.insert(0, "")
            module = importlib.import_module(place)
    except Exception as error:  # whatever the user's file raises
        raise ConfigError(f"--adapter {place}: cannot be imported ({type(error).__name__}: {error})") from error
    classes = {k: v for k, v in vars(module).items() if isinstance(v, type) and issubclass(v, Adapter)}
    mine = {key: value for key, value in classes.items() if key == name or (not name and value is not Adapter)}
    if len(mine) != 1:
        raise ConfigError(f"--adapter {spec}: holds Adapter classes {sorted(mine)}, expected one (FILE.py:Class)")
    return next(iter(mine.values()))
