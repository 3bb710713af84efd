"""Trunk networks T (paper 3.2, 4.1): IResNet-18/34/50/100 and MobileFaceNet, as an ordered list of units.

A backbone is ``body`` (named units in order, the feature pyramid) and ``head`` (the final embedding). Branches are
derived from the body alone (see btnet.Route), so a new trunk needs only units with ``stride`` and ``abandon_stride``.
Shapes: B batch, H x W canonical size, D embedding.
"""

from __future__ import annotations

import json
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from btnet_core.errors import CheckpointError, ConfigError, DataError
from btnet_core.files import load_torch, read_safetensors, write_safetensors

IRESNET_UNITS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3)}
# MobileFaceNet (Chen et al. 2018), rows: expansion, channels, repeats, stride of the first
MOBILEFACENET_ROWS = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))
NAMES = (*(f"iresnet{depth}" for depth in IRESNET_UNITS), "mobilefacenet")
ADAPTERS: dict[
    str, type[Backbone]
] = {}  # trunks of the user's own (adapter.Adapter), by the name of the class


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """What a trunk is; stored inside every checkpoint."""

    name: str = "iresnet50"  # one of NAMES, or of an Adapter class
    width: float = 1.0  # multiplies every channel count
    size: tuple[int, int] = (112, 112)  # canonical rows, columns in pixels; S in the paper
    embedding: int = 512  # D
    mean: float = 127.5  # normalised = (pixels - mean) / std
    std: float = 127.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", tuple(self.size))
        if self.name not in (*NAMES, *ADAPTERS):
            raise ConfigError(
                f"name: got {self.name!r}, expected one of {', '.join((*NAMES, *ADAPTERS))}; "
                "a trunk of your own needs its Adapter class: import its file first, or --adapter FILE.py"
            )
        if len(self.size) != 2 or any(side < 16 or side % 16 for side in self.size):
            raise ConfigError(f"size: got {self.size}, expected (rows, columns), multiples of 16")
        if not (
            0 < self.width < 1e6
            and self.embedding >= 1
            and self.std > 0
            and isinstance(self.embedding, int)
        ):
            raise ConfigError(
                f"width, embedding and std must be positive, embedding an integer, got {self}"
            )


class _FastPReLU(torch.autograd.Function):
    """relu(x) + a min(x, 0) out of operations that have fast bf16 kernels on a CPU, both ways; a is ``(C, 1, 1)``."""

    @staticmethod
    def forward(ctx, x: Tensor, a: Tensor) -> Tensor:
        ctx.save_for_backward(x, a)
        return torch.addcmul(torch.relu(x), a, torch.clamp_max(x, 0))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        x, a = ctx.saved_tensors
        passed = torch.ops.aten.threshold_backward(gradient, x, 0)  # where x > 0
        of_a = (
            (gradient * torch.clamp_max(x, 0)).sum_to_size(a.shape)
            if ctx.needs_input_grad[1]
            else None
        )
        return torch.addcmul(passed, a, gradient - passed), of_a


class PReLU(nn.PReLU):
    """nn.PReLU; in bf16 on a CPU the same values several times as fast."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype != torch.bfloat16 or torch.compiler.is_compiling():
            return super().forward(x)
        return _FastPReLU.apply(x, self.weight.to(x.dtype).view(-1, 1, 1))


class Pointwise(nn.Conv2d):
    """Strided 1x1 convolution that skips pixels first when channels are few.

    oneDNN (PyTorch 2.14, CPU, channels_last) writes out of bounds in its backward pass below 16 input channels.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or self.in_channels >= 16:
            return super().forward(x)
        return F.conv2d(x[..., :: self.stride[0], :: self.stride[1]], self.weight)


class Depthwise(nn.Conv2d):
    """Depthwise convolution; where it is strided and a gradient runs through it in bf16 on a CPU, in float32.

    oneDNN (PyTorch 2.14) takes a hundred times as long for that gradient in bf16.
    """

    def forward(self, x: Tensor) -> Tensor:
        slow = (
            x.device.type == "cpu"
            and self.stride != (1, 1)
            and torch.is_grad_enabled()
            and x.requires_grad
        )
        if not slow or torch.compiler.is_compiling():
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float()).to(x.dtype)


class Stem(nn.Sequential):
    """IResNet's first layer: conv3x3 stride 1, BN, PReLU."""

    stride = 1

    def __init__(self, channels: int) -> None:
        super().__init__(
            OrderedDict(
                conv=nn.Conv2d(3, channels, 3, padding=1, bias=False),
                bn=nn.BatchNorm2d(channels),
                prelu=PReLU(channels),
            )
        )

    def abandon_stride(self) -> list[str]:
        """Set every stride to 1 in place; returns the names of weights that this drops."""
        return []


class Unit(nn.Module):
    """IResNet's pre-activation unit: BN, conv3x3, BN, PReLU, conv3x3/stride, BN + shortcut."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.prelu = PReLU(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.shortcut: nn.Sequential | None = None
        if stride != 1 or c_in != c_out:
            conv = Pointwise(c_in, c_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(c_out)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        return self.bn3(self.conv2(y)) + (x if self.shortcut is None else self.shortcut(x))

    def abandon_stride(self) -> list[str]:
        """As Stem.abandon_stride; a shortcut that only down-sampled becomes the identity and is dropped."""
        self.stride, self.conv2.stride = 1, (1, 1)
        if self.shortcut is None:
            return []
        if self.conv1.in_channels == self.conv2.out_channels:
            dropped = [f"shortcut.{name}" for name in self.shortcut.state_dict()]
            self.shortcut = None
            return dropped
        self.shortcut.conv.stride = (1, 1)
        return []


class ConvBlock(nn.Sequential):
    """MobileFaceNet's layer: conv, BN, and PReLU unless linear."""

    def __init__(self, c_in: int, c_out: int, kernel: int | tuple[int, int], *, stride: int = 1, padding: int = 0,
                 groups: int = 1, linear: bool = False) -> None:  # fmt: skip
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv=nn.Conv2d(c_in, c_out, kernel, stride, padding, groups=groups, bias=False),
            bn=nn.BatchNorm2d(c_out),
        )
        if not linear:
            layers["prelu"] = PReLU(c_out)
        super().__init__(layers)
        self.stride = stride

    def abandon_stride(self) -> list[str]:
        """As Stem.abandon_stride."""
        self.stride, self.conv.stride = 1, (1, 1)
        return []


class Bottleneck(nn.Module):
    """MobileFaceNet's inverted residual: expand 1x1, depthwise 3x3/stride, project 1x1 (linear)."""

    def __init__(self, c_in: int, c_out: int, expansion: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.residual = stride == 1 and c_in == c_out
        inner = expansion * c_in
        self.conv = nn.Sequential(
            nn.Conv2d(c_in, inner, 1, bias=False), nn.BatchNorm2d(inner), PReLU(inner),
            Depthwise(inner, inner, 3, stride, 1, groups=inner, bias=False), nn.BatchNorm2d(inner), PReLU(inner),
            nn.Conv2d(inner, c_out, 1, bias=False), nn.BatchNorm2d(c_out),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)

    def abandon_stride(self) -> list[str]:
        """As Stem.abandon_stride; no residual appears where the pretrained unit had none."""
        self.stride, self.conv[3].stride = 1, (1, 1)
        return []


class Backbone(nn.Module):
    """A trunk T: normalised RGB ``(B, 3, H, W)`` -> un-normalised embeddings ``(B, D)`` in float32."""

    def __init__(
        self, body: OrderedDict[str, nn.Module], head: nn.Module, config: BackboneConfig
    ) -> None:
        super().__init__()
        self.body = nn.Sequential(body)
        self.head = head
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        return embed_features(self.head, self.body(x))

    def units(self) -> list[tuple[str, nn.Module]]:
        """The body's units in order, with the paper's names (S1U1: stage 1, unit 1)."""
        return list(self.body.named_children())

    def resolutions(self) -> OrderedDict[str, int]:
        """Rows of each unit's output for an input of canonical size, computed from the strides."""
        rows, result = self.config.size[0], OrderedDict()
        for name, unit in self.units():
            rows = (rows - 1) // unit.stride + 1
            result[name] = rows
        return result

    def features(self, x: Tensor, upto: str | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield (unit name, feature map) in order, stopping after ``upto``."""
        for name, unit in self.units():
            x = unit(x)
            yield name, x
            if name == upto:
                return

    def crop(self, pixels: Tensor) -> Tensor:
        """Cut square faces to the trunk's shape about their centre: 112 columns to 8..103 for a 112x96 trunk.

        The cut is made before any resize; a small face loses ``round(columns / 14)`` columns a side.
        """
        rows, columns = self.config.size
        if rows == columns or pixels.shape[-1] * rows == pixels.shape[-2] * columns:
            return pixels
        cut = round(pixels.shape[-1] * (rows - columns) / rows / 2)
        return pixels[..., cut : pixels.shape[-1] - cut]

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 255] -> (pixels - mean) / std, float32."""
        return (pixels.float() - self.config.mean) / self.config.std

    def preprocess(self, pixels: Tensor) -> Tensor:
        """Crop and normalise faces of canonical rows; use ``images.resize`` before this for any other size.

        Raises:
            DataError: the faces do not have the canonical rows.
        """
        cropped = self.crop(pixels)
        if tuple(cropped.shape[-2:]) != self.config.size:
            raise DataError(
                f"pixels: got {tuple(pixels.shape[-2:])}, the trunk works at {self.config.size}"
            )
        return self.normalise(cropped)


def embed_features(head: nn.Module, z: Tensor) -> Tensor:
    """Final feature map -> embedding, outside autocast: bf16 has too few digits to compare faces with."""
    with torch.autocast(
        "cpu" if z.is_meta else z.device.type, enabled=False
    ):  # meta: costs.count_macs
        return head(z if z.dtype == torch.float64 else z.float())


def build_backbone(config: BackboneConfig) -> Backbone:
    """A trunk with fresh weights (convolutions normal(0, 0.1) as InsightFace trains IResNets)."""
    if config.name in ADAPTERS:
        return ADAPTERS[config.name]()  # type: ignore[call-arg]
    if config.name == "mobilefacenet":
        return _mobilefacenet(config)
    channels = [round(c * config.width) for c in (64, 64, 128, 256, 512)]
    body: OrderedDict[str, nn.Module] = OrderedDict(stem=Stem(channels[0]))
    for stage, repeats in enumerate(
        IRESNET_UNITS[int(config.name.removeprefix("iresnet"))], start=1
    ):
        for index in range(1, repeats + 1):
            c_in = channels[stage - 1] if index == 1 else channels[stage]
            body[f"S{stage}U{index}"] = Unit(c_in, channels[stage], 2 if index == 1 else 1)
    cells = (config.size[0] // 16) * (config.size[1] // 16)
    head = OrderedDict(
        bn=nn.BatchNorm2d(channels[4]),
        dropout=nn.Dropout(0.0, inplace=True),
        flatten=nn.Flatten(),
        fc=nn.Linear(channels[4] * cells, config.embedding),
        features=nn.BatchNorm1d(config.embedding),
    )
    backbone = Backbone(body, nn.Sequential(head), config)
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0, 0.1)
    backbone.head.features.weight.requires_grad_(
        False
    )  # fixed at 1: the embedding's scale is the loss's affair
    return backbone


def _mobilefacenet(config: BackboneConfig) -> Backbone:
    c = [round(channels * config.width) for channels in (64, 512)]
    body: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=ConvBlock(3, c[0], 3, stride=2, padding=1),
        dw_conv1=ConvBlock(c[0], c[0], 3, padding=1, groups=c[0]),
    )
    c_in, index = c[0], 0
    for expansion, channels, repeats, first_stride in MOBILEFACENET_ROWS:
        c_out = round(channels * config.width)
        for repeat in range(repeats):
            body[f"block{index}"] = Bottleneck(
                c_in, c_out, expansion, first_stride if repeat == 0 else 1
            )
            c_in, index = c_out, index + 1
    body["conv2"] = ConvBlock(c_in, c[1], 1)
    cells = (config.size[0] // 16, config.size[1] // 16)
    head = OrderedDict(
        linear7=ConvBlock(c[1], c[1], cells, groups=c[1], linear=True),
        linear1=ConvBlock(c[1], config.embedding, 1, linear=True),
        flatten=nn.Flatten(),
    )
    return Backbone(body, nn.Sequential(head), config)


# ---- checkpoints ------------------------------------------------------------------------------------------------


def save_backbone(backbone: Backbone, path: Path | str) -> None:
    """Write weights and configuration to one safetensors file, atomically."""
    write_safetensors(
        path, backbone.state_dict(), {"btnet_backbone": json.dumps(asdict(backbone.config))}
    )


def load_backbone(path: Path | str, adapter: type[Backbone] | None = None) -> Backbone:
    """Load a trunk: this project's .safetensors, InsightFace arcface_torch ``backbone.pth`` or a MobileFaceNet.

    Nothing in the file is executed. The configuration is inside the file or inferred from the shapes. With ``adapter``
    (adapter.Adapter) the file is a state dict of the user's own network.

    Raises:
        CheckpointError: missing, damaged, or its tensors fit none of the known trunks (the names are listed).
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        state, metadata = read_safetensors(path)
    else:
        state, metadata = _read_torch(path), {}
    if "btnet_backbone" in metadata:
        config = read_config(metadata, path)
    else:
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
        if adapter is not None:
            return adapter(state, str(path))  # type: ignore
        try:
            state, config = _translate(state, path)
        except (KeyError, ValueError, IndexError, ArithmeticError) as error:
            raise CheckpointError(
                f"{path}: tensors missing or of impossible shapes ({error})"
            ) from error
    return build_from(config, state, path)


def read_config(metadata: dict[str, str], path: Path) -> BackboneConfig:
    """The configuration that a file of weights holds; CheckpointError if there is none or no usable one."""
    try:
        return BackboneConfig(**json.loads(metadata["btnet_backbone"]))
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: no usable configuration inside ({error}); was it saved by btnet?"
        ) from error


def build_from(config: BackboneConfig, state: dict[str, Tensor], path: Path) -> Backbone:
    """A trunk with given weights; an absurd size is refused before it takes memory."""
    if config.name in NAMES:
        with torch.device("meta"):
            _check_fit(build_backbone(config), state, str(path))
    backbone = build_backbone(config)
    load_strictly(backbone, state, str(path))
    return backbone


def load_strictly(module: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """``load_state_dict`` whose error names the file and the first tensors that do not fit."""
    module.load_state_dict(_check_fit(module, state, where))


def _check_fit(module: nn.Module, state: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    expected = module.state_dict()
    counters = {name for name in expected if name.endswith("num_batches_tracked")} - state.keys()
    state = state | {
        name: expected[name] for name in counters
    }  # absent in old checkpoints, unused in evaluation
    wrong = [f"missing {name}" for name in expected.keys() - state.keys()]
    wrong += [f"unexpected {name}" for name in state.keys() - expected.keys()]
    wrong += [
        f"{name}: {tuple(state[name].shape)} for {tuple(expected[name].shape)}"
        for name in expected.keys() & state.keys()
        if state[name].shape != expected[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(
            f"{where}: does not fit {type(module).__name__}: {'; '.join(sorted(wrong)[:5])}{more}"
        )
    return state


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = load_torch(path)
    except Exception as error:  # torch raises many types for damaged or unsafe files
        raise CheckpointError(
            f"{path}: cannot read weights safely ({type(error).__name__}: {error})"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        raise CheckpointError(
            f"{path}: got {type(state).__name__}, expected a state dict of tensors"
        )
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if size > 4 * path.stat().st_size:  # a number repeated by strides, one storage for many tensors
        raise CheckpointError(f"{path}: announces tensors of {size:,} bytes, many times the file")
    return state


def _translate(state: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], BackboneConfig]:
    """Foreign names to ours, and the configuration that the shapes imply."""
    if "layer1.0.conv1.weight" in state and "fc.weight" in state:
        counts = tuple(
            1
            + max(
                (int(m[1]) for n in state if (m := re.match(rf"layer{s}\.(\d+)\.", n))), default=-1
            )
            for s in (1, 2, 3, 4)
        )
        depth = next((d for d, units in IRESNET_UNITS.items() if units == counts), None)
        if depth is None:
            raise CheckpointError(f"{path}: IResNet with units {counts}, known are {IRESNET_UNITS}")
        embedding, flat = state["fc.weight"].shape
        side = 16 * round((flat / state["layer4.0.conv2.weight"].shape[0]) ** 0.5)
        width = state["conv1.weight"].shape[0] / 64
        config = BackboneConfig(
            name=f"iresnet{depth}", width=width, size=(side, side), embedding=embedding
        )
        return {_iresnet_name(name): tensor for name, tensor in state.items()}, config
    if "dw_conv1.conv.weight" in state and "linear7.conv.weight" in state:
        rows, columns = state["linear7.conv.weight"].shape[2:]
        config = BackboneConfig(
            name="mobilefacenet",
            width=state["conv1.conv.weight"].shape[0] / 64,
            size=(16 * rows, 16 * columns),
            embedding=state["linear1.conv.weight"].shape[0],
            std=128.0,
        )
        return {_mobilefacenet_name(name): tensor for name, tensor in state.items()}, config
    raise CheckpointError(
        f"{path}: neither IResNet nor MobileFaceNet; first tensors: {sorted(state)[:5]}. "
        "Another network needs an Adapter class (--adapter FILE.py, docs/own-recogniser.md)"
    )


def _mobilefacenet_name(name: str) -> str:
    """The name of a tensor in the published CASIA MobileFaceNet -> ours."""
    part = "head" if name.split(".")[0] in ("linear7", "linear1") else "body"
    return f"{part}.{re.sub(r'^blocks[.]', 'block', name)}"


def _iresnet_name(name: str) -> str:
    """arcface_torch's name of a tensor -> ours."""
    if match := re.match(r"layer(\d)\.(\d+)\.(.+)", name):
        rest = (
            match[3].replace("downsample.0", "shortcut.conv").replace("downsample.1", "shortcut.bn")
        )
        return f"body.S{match[1]}U{int(match[2]) + 1}.{rest}"
    for old, new in (("conv1.", "body.stem.conv."), ("bn1.", "body.stem.bn."), ("prelu.", "body.stem.prelu."),
                     ("bn2.", "head.bn."), ("fc.", "head.fc."), ("features.", "head.features.")):  # fmt: skip
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
