"""Reading and writing the weights of trunks: this project's own and those that others publish.

Others wrap a state dict in many ways: names with prefixes (``module.``, ``_orig_mod.``,
``backbone.``, ``model.``, … in any order), dictionaries inside dictionaries, a classifier beside
the network. An architecture is known by one name that its state dict must hold, its *mark*: the
dictionary and the prefix under which the mark is found are the ones that are meant.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from btnet_core.errors import CheckpointError, ConfigError, from_fields
from btnet_core.files import load_torch, read_safetensors, write_safetensors
from btnet_core.kinds import what_is
from btnet_core.models.backbone import (
    IRESNET_UNITS,
    NAMES,
    Backbone,
    BackboneConfig,
    build_backbone,
)

State = dict[str, Tensor]
SHOWN = 3  # names of each kind in a message


def save_backbone(backbone: Backbone, path: Path | str) -> None:
    """Write weights and configuration to one safetensors file, atomically."""
    metadata = {"btnet_backbone": json.dumps(asdict(backbone.config))}
    write_safetensors(path, backbone.state_dict(), metadata)


def load_backbone(
    path: Path | str, adapter: type[Backbone] | None = None, *, bgr: bool = False
) -> Backbone:
    """A trunk from a file: this project's, or weights that others publish (docs/own-recogniser.md).

    Nothing in the file is executed. The configuration is inside, or follows from the shapes.

    Args:
        adapter: class of the user's own network (btnet_tools.adapter), whose state dict it is.
        bgr: the network was trained on blue, green, red; this project's own files say it inside.

    Raises:
        CheckpointError: missing, damaged, or its tensors fit none of the known trunks.
        ConfigError: ``bgr`` for a file of this project that says otherwise.
    """
    path = Path(path)
    if what_is(path) == "a safetensors file":
        content, metadata = read_safetensors(path)
        if "btnet_backbone" in metadata:
            config = read_config(metadata, path)
            if bgr and config.channels != "bgr":
                raise ConfigError(f"{path}: bgr was asked for, the file says channels rgb")
            return build_from(config, content, path)
    else:
        content = load_torch(path)
        _check_size(content, path)
    if adapter is not None:
        backbone = adapter(content, str(path))  # type: ignore[call-arg]
    else:
        kind, state = _recognise(content, str(path))
        backbone = build_from(_config(kind, state, path), kind.renamed(state), path)
    if bgr:
        backbone.config = replace(backbone.config, channels="bgr")
    return backbone


def read_config(metadata: dict[str, str], path: Path) -> BackboneConfig:
    """The configuration inside a file of weights; CheckpointError if there is no usable one."""
    try:
        fields = json.loads(metadata["btnet_backbone"])
        return from_fields(BackboneConfig, fields, "btnet_backbone")
    except ConfigError as error:
        raise CheckpointError(f"{path}: no usable configuration inside; {error}") from error
    except (KeyError, json.JSONDecodeError, RecursionError) as error:
        told = "no usable configuration inside; was it saved by btnet?"
        raise CheckpointError(f"{path}: {told}") from error


def build_from(config: BackboneConfig, state: State, path: Path) -> Backbone:
    """A trunk with given weights; an absurd size is refused before it takes memory."""
    if config.name in NAMES:
        with torch.device("meta"):
            _fitting(build_backbone(config), state, str(path))
    backbone = build_backbone(config)
    load_strictly(backbone, state, str(path))
    return backbone


def load_strictly(module: nn.Module, state: State, where: str) -> None:
    """``load_state_dict`` whose error names the file and the first tensors that do not fit."""
    module.load_state_dict(_fitting(module, state, where))


def load_wrapped(module: nn.Module, content: Any, where: str) -> None:
    """Load the one dictionary of tensors in a read checkpoint that is ``module``'s."""
    expected = list(module.state_dict())
    found = list(_unwrapped(content, expected[0]))
    if not found:
        raise CheckpointError(f"{where}: holds no {expected[0]}; {_names(content)}")
    fits = [len(one.state.keys() & set(expected)) for one in found]
    best = [one for one, fit in zip(found, fits, strict=True) if fit == max(fits)]
    parts = {name.split(".")[0] for name in expected}
    ours = _the_one(best, content, where, lambda name: name.split(".")[0] in parts)
    load_strictly(module, ours, where)


def _fitting(module: nn.Module, state: State, where: str) -> State:
    """``state`` with what old checkpoints lack (counters, a route's length); CheckpointError if
    it does not fit."""
    expected = module.state_dict()
    broken = [name for name, values in state.items() if not values.float().isfinite().all()]
    may_lack = ("num_batches_tracked", "length")
    lacking = {name for name in expected if name.rpartition(".")[2] in may_lack} - state.keys()
    state = state | {name: expected[name] for name in lacking}
    shapes = [
        f"{name} {tuple(state[name].shape)} for {tuple(expected[name].shape)}"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    wrong = {"missing": missing, "unexpected": unexpected, "of another shape:": shapes}
    wrong["not finite:"] = broken
    if any(wrong.values()):
        told = "; ".join(f"{kind} {_first(names)}" for kind, names in wrong.items() if names)
        raise CheckpointError(f"{where}: does not fit {type(module).__name__}: {told}")
    return state


def _first(names: list[str]) -> str:
    """The first SHOWN of ``names`` and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


# ---- wrapped state dicts ---------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A dictionary of tensors that holds a mark."""

    place: str  # where in the file: keys joined by dots
    prefix: str  # what stands before every name
    state: State
    others: list[str]  # names beside it that do not have the prefix


def _dictionaries(content: Any, place: str = "", depth: int = 4) -> Iterator[tuple[str, State]]:
    """(place, tensors by name) of every dictionary in ``content`` that holds tensors."""
    if not isinstance(content, dict):
        return
    state = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if state:
        yield place, state
    for key, value in content.items() if depth else ():
        yield from _dictionaries(value, f"{place}.{key}".strip("."), depth - 1)


def _unwrapped(content: Any, mark: str) -> Iterator[Found]:
    """Each dictionary and prefix under which ``mark`` is found."""
    for place, tensors in _dictionaries(content):
        # torch.compile puts its prefix before the name of any compiled part
        names = {name.replace("_orig_mod.", ""): name for name in tensors}
        for name in names:
            prefix = name.removesuffix(mark)
            if name.endswith(mark) and (not prefix or prefix.endswith(".")):
                ours = {short: full for short, full in names.items() if short.startswith(prefix)}
                state = {short.removeprefix(prefix): tensors[full] for short, full in ours.items()}
                yield Found(place, prefix, state, [n for n in names if n not in ours])


def _the_one(found: list[Found], content: Any, where: str, is_part: Callable[[str], bool]) -> State:
    """The tensors of the only finding for which ``is_part`` is true; warns of what is left out.

    Raises:
        CheckpointError: several findings.
    """
    if len(found) > 1:
        places = [f"{one.place}.{one.prefix}".strip(".") or "the top" for one in found]
        raise CheckpointError(
            f"{where}: holds several networks that fit ({_first(places)}); save the one that is "
            "meant: torch.save(network.state_dict(), …)"
        )
    one = found[0]
    places = {place.split(".")[0] for place, _ in _dictionaries(content)}
    beside = [name for name in one.state if not is_part(name)]
    others = [*beside, *one.others, *sorted(places - {one.place.split(".")[0]})]
    if others:
        warnings.warn(f"{where}: left out {_first(others)}", stacklevel=2)
    return {name: tensor for name, tensor in one.state.items() if is_part(name)}


def _names(content: Any) -> str:
    """The names that a file holds, for a message."""
    names = [".".join(filter(None, (p, n))) for p, s in _dictionaries(content) for n in s]
    if names:
        return f"tensors found: {_first(names)}"
    if isinstance(content, dict):
        return f"no tensors, but {_first([str(key) for key in content]) or 'nothing'}"
    return f"no dictionary of tensors, but {type(content).__name__}"


def _check_size(content: Any, path: Path) -> None:
    """Refuse a small file that announces large tensors: a number repeated by strides."""
    tensors = [tensor for _, state in _dictionaries(content) for tensor in state.values()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if size > 4 * path.stat().st_size:
        raise CheckpointError(f"{path}: announces tensors of {size:,} bytes, many times the file")


# ---- architectures that others publish -------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A published architecture: its mark, its names in ours, and what the shapes say."""

    mark: str
    rename: Callable[[str], str]
    config: Callable[[State], dict[str, Any]]

    def is_part(self, name: str) -> bool:
        """Whether a tensor of that name is of this architecture, not of a classifier beside it."""
        return self.rename(name).startswith(("body.", "head."))

    def renamed(self, state: State) -> State:
        return {self.rename(name): tensor for name, tensor in state.items()}


def _recognise(content: Any, where: str) -> tuple[Kind, State]:
    """The architecture and the state dict of a file of others."""
    for kind in KINDS:
        if found := list(_unwrapped(content, kind.mark)):
            return kind, _the_one(found, content, where, kind.is_part)
    raise CheckpointError(
        f"{where}: neither IResNet nor MobileFaceNet; {_names(content)}. "
        "Another network needs an Adapter class (--adapter FILE.py, docs/own-recogniser.md)"
    )


def _config(kind: Kind, state: State, path: Path) -> BackboneConfig:
    """What the shapes of the tensors say of a trunk."""
    try:
        return BackboneConfig(**kind.config(state))
    except ConfigError as error:
        raise CheckpointError(f"{path}: of no known trunk's shapes; {error}") from error
    except KeyError as error:
        raise CheckpointError(f"{path}: lacks the tensor {error.args[0]}") from error
    except (ValueError, IndexError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: tensors of impossible shapes") from error


def _iresnet_config(state: State) -> dict[str, Any]:
    indices: dict[str, set[int]] = {stage: set() for stage in "1234"}
    for name in state:
        if match := re.match(r"layer([1-4])\.(\d+)\.", name):
            indices[match[1]].add(int(match[2]))
    units = tuple(map(len, indices.values()))
    depth = next((depth for depth, known in IRESNET_UNITS.items() if known == units), None)
    if depth is None:
        raise ConfigError(f"units: got {units}, expected one of {list(IRESNET_UNITS.values())}")
    embedding, flat = state["fc.weight"].shape
    cells = flat / state["layer4.0.conv2.weight"].shape[0]
    side = 16 * round(cells**0.5)
    width = state["conv1.weight"].shape[0] / 64
    return {
        "name": f"iresnet{depth}", "width": width, "size": (side, side), "embedding": embedding
    }  # fmt: skip


def _iresnet_name(name: str) -> str:
    """arcface_torch's name of a tensor -> ours."""
    if match := re.match(r"layer(\d)\.(\d+)\.(.+)", name):
        rest = match[3].replace("downsample.0", "shortcut.conv")
        rest = rest.replace("downsample.1", "shortcut.bn")
        return f"body.S{match[1]}U{int(match[2]) + 1}.{rest}"
    first, _, rest = name.partition(".")
    ours = {
        "conv1": "body.stem.conv", "bn1": "body.stem.bn", "prelu": "body.stem.prelu",
        "bn2": "head.bn", "fc": "head.fc", "features": "head.features",
    }  # fmt: skip
    return f"{ours[first]}.{rest}" if first in ours else name


def _mobilefacenet_config(state: State) -> dict[str, Any]:
    rows, columns = state["linear7.conv.weight"].shape[2:]
    width = state["conv1.conv.weight"].shape[0] / 64
    embedding = state["linear1.conv.weight"].shape[0]
    return {
        "name": "mobilefacenet", "width": width, "size": (16 * rows, 16 * columns),
        "embedding": embedding, "std": 128.0,
    }  # fmt: skip


def _mobilefacenet_name(name: str) -> str:
    """The name of a tensor in the published CASIA MobileFaceNet -> ours."""
    first = name.split(".")[0]
    if first in ("linear7", "linear1"):
        return f"head.{name}"
    body = first in ("conv1", "dw_conv1", "blocks", "conv2")
    return f"body.{re.sub(r'^blocks[.]', 'block', name)}" if body else name


def _mbf_config(state: State) -> dict[str, Any]:
    rows, columns = state["features.layers.0.layers.0.weight"].shape[2:]
    width = state["layers.0.layers.0.weight"].shape[0] / 128
    embedding = state["features.layers.2.weight"].shape[0]
    return {
        "name": "mbf", "width": width, "size": (16 * rows, 16 * columns), "embedding": embedding
    }  # fmt: skip


MBF_BLOCKS = {2: 0, 3: 1, 4: 5, 5: 6, 6: 12, 7: 13}  # arcface_torch's layer -> our first block
MBF_LAYERS = ("conv", "bn", "prelu")


def _mbf_name(name: str) -> str:
    """The name of a tensor in arcface_torch's MobileFaceNet -> ours."""
    if match := re.fullmatch(r"layers\.([01])\.layers\.([0-2])\.(\w+)", name):
        unit = ("conv1", "dw_conv1")[int(match[1])]
        return f"body.{unit}.{MBF_LAYERS[int(match[2])]}.{match[3]}"
    if match := re.fullmatch(r"layers\.([2-7])((?:\.layers\.\d+){2,3})\.(\w+)", name):
        *block, step, layer = map(int, re.findall(r"\d+", match[2]))
        index = MBF_BLOCKS[int(match[1])] + sum(block)
        return f"body.block{index}.conv.{3 * step + layer}.{match[3]}"
    if match := re.fullmatch(r"conv_sep\.layers\.([0-2])\.(\w+)", name):
        return f"body.conv2.{MBF_LAYERS[int(match[1])]}.{match[2]}"
    if match := re.fullmatch(r"features\.layers\.0\.layers\.([01])\.(\w+)", name):
        return f"head.linear7.{MBF_LAYERS[int(match[1])]}.{match[2]}"
    name = re.sub(r"^features\.layers\.2\.", "head.fc.", name)
    return re.sub(r"^features\.layers\.3\.", "head.features.", name)


KINDS = (
    Kind("layer1.0.conv1.weight", _iresnet_name, _iresnet_config),
    Kind("dw_conv1.conv.weight", _mobilefacenet_name, _mobilefacenet_config),
    Kind("conv_sep.layers.0.weight", _mbf_name, _mbf_config),
)
