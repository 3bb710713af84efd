"""Trunk networks T (paper 3.2, 4.1) as an ordered list of units: IResNets and MobileFaceNets.

A backbone is ``body`` (named units in order, the feature pyramid) and ``head`` (the embedding).
Branches are derived from the body alone (btnet.Route), so that a new trunk needs only units with
``stride`` and ``abandon_stride`` (blocks.py). B batch, H x W canonical size, D embedding.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from btnet_core.errors import ConfigError, DataError, check_types
from btnet_core.models.blocks import Bottleneck, ConvBlock, Stem, Unit

IRESNET_UNITS = {
    18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3), 200: (6, 26, 60, 6),
}  # fmt: skip
# MobileFaceNet (Chen et al. 2018), rows: expansion, channels, repeats, stride of the first
MOBILEFACENET_ROWS = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))
# InsightFace's: twice the channels between the bottlenecks, as many inside
MBF_ROWS = ((1, 128, 5, 2), (2, 256, 1, 2), (1, 256, 6, 1), (2, 256, 1, 2), (1, 256, 2, 1))
NAMES = (*(f"iresnet{depth}" for depth in IRESNET_UNITS), "mobilefacenet", "mbf")
ADAPTERS: dict[str, type[Backbone]] = {}  # the user's own trunks (btnet_tools.adapter) by class


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """What a trunk is; stored inside every checkpoint."""

    name: str = "iresnet50"  # one of NAMES, or of an Adapter class
    width: float = 1.0  # multiplies every channel count
    size: tuple[int, int] = (112, 112)  # canonical rows, columns in pixels; S in the paper
    embedding: int = 512  # D
    mean: float = 127.5  # normalised = (pixels - mean) / std
    std: float = 127.5
    channels: str = "rgb"  # order that the trunk was trained with: rgb or bgr

    def __post_init__(self) -> None:
        check_types(self)
        object.__setattr__(self, "size", tuple(self.size))
        known = (*NAMES, *ADAPTERS)
        if self.name not in known:
            raise ConfigError(
                f"name: got {self.name!r}, expected one of {', '.join(known)}; a trunk of your own "
                "needs its Adapter class: import its file first, or --adapter FILE.py"
            )
        if len(self.size) != 2 or any(side < 16 or side % 16 for side in self.size):
            raise ConfigError(f"size: got {self.size}, expected (rows, columns), multiples of 16")
        if self.embedding < 1:
            raise ConfigError(f"embedding: got {self.embedding}, expected an integer of 1 or more")
        if not (0 < self.width < 1e6 and self.std > 0):
            raise ConfigError(f"got width {self.width}, std {self.std}; expected more than 0")
        if self.channels not in ("rgb", "bgr"):
            raise ConfigError(f"channels: got {self.channels!r}, expected rgb or bgr")


class Backbone(nn.Module):
    """A trunk T: normalised ``(B, 3, H, W)`` -> un-normalised embeddings ``(B, D)`` in float32."""

    def __init__(
        self, body: OrderedDict[str, nn.Module], head: nn.Module, config: BackboneConfig
    ) -> None:
        super().__init__()
        self.body = nn.Sequential(body)
        self.head = head
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        return embed_features(self.head, self.body(x))

    def parts(self) -> tuple[nn.Module, ...]:
        """What x goes through, in order."""
        return self.body, self.head

    def units(self) -> list[tuple[str, nn.Module]]:
        """The body's units in order, with the paper's names (S1U1: stage 1, unit 1)."""
        return list(self.body.named_children())

    def resolutions(self) -> OrderedDict[str, int]:
        """Rows of each unit's output for an input of canonical size, computed from the strides."""
        rows = self.config.size[0]
        result = OrderedDict()
        for name, unit in self.units():
            rows = (rows - 1) // unit.stride + 1
            result[name] = rows
        return result

    def features(self, x: Tensor, upto: str | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yields (unit name, feature map) in order, stopping after ``upto``."""
        for name, unit in self.units():
            x = unit(x)
            yield name, x
            if name == upto:
                return

    def crop(self, pixels: Tensor) -> Tensor:
        """Square faces cut to the trunk's shape about their centre: 112 columns to 8..103 of 96.

        The cut comes before any resize; a small face loses ``round(columns / 14)`` columns a side.
        """
        rows, columns = self.config.size
        if rows == columns or pixels.shape[-1] * rows == pixels.shape[-2] * columns:
            return pixels
        cut = round(pixels.shape[-1] * (rows - columns) / rows / 2)
        return pixels[..., cut : pixels.shape[-1] - cut]

    def normalise(self, pixels: Tensor) -> Tensor:
        """RGB pixels in [0, 255] -> (pixels - mean) / std, float32, in the trunk's order."""
        if self.config.channels == "bgr":
            pixels = pixels.flip(-3)
        return (pixels.float() - self.config.mean) / self.config.std

    def preprocess(self, pixels: Tensor) -> Tensor:
        """Crop and normalise faces of canonical rows; ``images.resize`` comes before for others.

        Raises:
            DataError: the faces do not have the canonical rows.
        """
        cropped = self.crop(pixels)
        if tuple(cropped.shape[-2:]) != self.config.size:
            got = tuple(pixels.shape[-2:])
            raise DataError(f"pixels: got {got}, the trunk works at {self.config.size}")
        return self.normalise(cropped)


def embed_features(head: nn.Module, z: Tensor) -> Tensor:
    """Final feature map -> embedding, outside autocast: bf16 has too few digits to compare by."""
    device = "cpu" if z.is_meta else z.device.type  # meta: costs.count_macs
    with torch.autocast(device, enabled=False):
        return head(z if z.dtype == torch.float64 else z.float())


def build_backbone(config: BackboneConfig) -> Backbone:
    """A trunk with fresh weights."""
    if config.name in ADAPTERS:
        return ADAPTERS[config.name]()  # type: ignore[call-arg]
    if config.name in ("mobilefacenet", "mbf"):
        return _mobilefacenet(config)
    return _iresnet(config)


def _iresnet(config: BackboneConfig) -> Backbone:
    """Convolutions start from normal(0, 0.1), as InsightFace trains IResNets."""
    channels = [round(c * config.width) for c in (64, 64, 128, 256, 512)]
    body: OrderedDict[str, nn.Module] = OrderedDict(stem=Stem(channels[0]))
    units = IRESNET_UNITS[int(config.name.removeprefix("iresnet"))]
    for stage, repeats in enumerate(units, start=1):
        for index in range(1, repeats + 1):
            c_in = channels[stage - 1] if index == 1 else channels[stage]
            body[f"S{stage}U{index}"] = Unit(c_in, channels[stage], 2 if index == 1 else 1)
    cells = (config.size[0] // 16) * (config.size[1] // 16)
    head = OrderedDict(
        bn=nn.BatchNorm2d(channels[4]), dropout=nn.Dropout(0.0, inplace=True), flatten=nn.Flatten(),
        fc=nn.Linear(channels[4] * cells, config.embedding),
        features=nn.BatchNorm1d(config.embedding),
    )  # fmt: skip
    backbone = Backbone(body, nn.Sequential(head), config)
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0, 0.1)
    # fixed at 1: the embedding's length is the loss's affair
    backbone.head.features.weight.requires_grad_(False)
    return backbone


def _mobilefacenet(config: BackboneConfig) -> Backbone:
    """MobileFaceNet as published, or as InsightFace's arcface_torch has it ("mbf")."""
    mbf = config.name == "mbf"
    first, last = round((128 if mbf else 64) * config.width), round(512 * config.width)
    groups = first // 2 if mbf else first  # InsightFace's second layer mixes channels in pairs
    body: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=ConvBlock(3, first, 3, stride=2, padding=1),
        dw_conv1=ConvBlock(first, first, 3, padding=1, groups=groups),
    )
    c_in = first
    for expansion, channels, repeats, first_stride in MBF_ROWS if mbf else MOBILEFACENET_ROWS:
        c_out = round(channels * config.width)
        for repeat in range(repeats):
            stride = first_stride if repeat == 0 else 1
            body[f"block{len(body) - 2}"] = Bottleneck(c_in, c_out, expansion * c_in, stride)
            c_in = c_out
    body["conv2"] = ConvBlock(c_in, last, 1)
    cells = (config.size[0] // 16, config.size[1] // 16)
    head: OrderedDict[str, nn.Module] = OrderedDict(
        linear7=ConvBlock(last, last, cells, groups=last, linear=True)
    )
    if mbf:
        head["flatten"] = nn.Flatten()
        head["fc"] = nn.Linear(last, config.embedding, bias=False)
        head["features"] = nn.BatchNorm1d(config.embedding)
    else:
        head["linear1"] = ConvBlock(last, config.embedding, 1, linear=True)
        head["flatten"] = nn.Flatten()
    return Backbone(body, nn.Sequential(head), config)
