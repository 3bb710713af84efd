"""Super-resolution before a recogniser (the rows SRCNN to LapSRN of Table 2): networks and losses.

Images are ``(B, C, h, w)`` in [0, 1], C = 3 (RGB) or 1 (luminance). Networks that work at the large
size take the face already enlarged (bicubic), the others the small one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from btnet_core.errors import CheckpointError
from btnet_core.evaluation.embedders import UpsamplingEmbedder
from btnet_core.files import read_safetensors
from btnet_core.images import resize, scaled_size
from btnet_core.models.backbone import Backbone
from btnet_core.models.weights import load_strictly

WIDTH = 64  # channels of VDSR and LapSRN
convolution = partial(nn.Conv2d, padding="same")  # keeps rows and columns


class SRCNN(nn.Sequential):
    """9-5-5 with 64 and 32 channels (Dong et al. 2014), on the enlarged face."""

    enlarged = True

    def __init__(self, channels: int = 3) -> None:
        middle, last = convolution(64, 32, 5), convolution(32, channels, 5)
        super().__init__(convolution(channels, 64, 9), nn.ReLU(), middle, nn.ReLU(), last)


class FSRCNN(nn.Sequential):
    """d = 56, s = 12, m = 4 (Dong et al. 2016), on the small face; the last layer enlarges it."""

    enlarged = False

    def __init__(self, scale: int, channels: int = 3) -> None:
        layers = [convolution(channels, 56, 5), nn.PReLU(56), convolution(56, 12, 1), nn.PReLU(12)]
        layers += [one for _ in range(4) for one in (convolution(12, 12, 3), nn.PReLU(12))]
        layers += [convolution(12, 56, 1), nn.PReLU(56)]
        step = min(scale, 8)  # larger ones leave holes between kernels of 9: the rest is bicubic
        rest = nn.Upsample(scale_factor=scale // step, mode="bicubic")
        last = nn.ConvTranspose2d(56, channels, 9, step, (10 - step) // 2, 1)  # centred
        super().__init__(*layers, last, rest)


class VDSR(nn.Module):
    """20 layers of 64 channels that give what the enlarged face lacks (Kim et al. 2016)."""

    enlarged = True

    def __init__(self, channels: int = 3, *, bias: bool = True) -> None:
        super().__init__()
        widths = [channels, *[WIDTH] * 19, channels]
        self.layers = nn.ModuleList(convolution(*p, 3, bias=bias) for p in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        z = x
        for layer in self.layers[:-1]:
            z = F.relu(layer(z))
        return x + self.layers[-1](z)


class DRRN(nn.Module):
    """One block of 25 units that share two convolutions of 128 channels (B1U25, Tai et al. 2017).

    Deviation: without batch norms, as its usual parameter count. Not trained here: see its MACs.
    """

    enlarged = True

    def __init__(self, channels: int = 3, units: int = 25) -> None:
        super().__init__()
        self.units, self.first = units, convolution(channels, 128, 3)
        self.unit = nn.ModuleList([convolution(128, 128, 3), convolution(128, 128, 3)])
        self.last = convolution(128, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        start = z = self.first(F.relu(x))
        for _ in range(self.units):
            z = start + self.unit[1](F.relu(self.unit[0](F.relu(z))))
        return x + self.last(F.relu(z))


class Level(nn.Module):
    """One doubling of LapSRN: of the features by ``body``, of the image by a kernel that learns."""

    def __init__(self, channels: int, bias: bool, kernel: int) -> None:
        super().__init__()
        up = nn.ConvTranspose2d(WIDTH, WIDTH, kernel, 2, 1, output_padding=kernel % 2, bias=bias)
        self.body = nn.ModuleList(convolution(WIDTH, WIDTH, 3, bias=bias) for _ in range(10))
        self.body.append(up)
        self.image = nn.ConvTranspose2d(channels, channels, 4, 2, 1, groups=channels, bias=False)
        bilinear = torch.tensor([0.25, 0.75, 0.75, 0.25])
        self.image.weight.data.copy_(torch.outer(bilinear, bilinear))
        self.residual = convolution(WIDTH, channels, 3, bias=bias)

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.body:
            z = F.leaky_relu(layer(z), 0.2)
        return self.image(x) + self.residual(z), z


class LapSRN(nn.Module):
    """The small face doubled level by level (Lai et al. 2017): x2, x4, x8, x16 for 1 to 4 levels.

    The published weights have no biases, and transposed convolutions of 4x4 (``kernel``), not 3x3.
    """

    enlarged = False

    def __init__(self, levels: int, channels: int = 3, *, bias: bool = True, kernel: int = 3):
        super().__init__()
        self.first = convolution(channels, WIDTH, 3, bias=bias)
        self.levels = nn.ModuleList(Level(channels, bias, kernel) for _ in range(levels))

    def pyramid(self, x: Tensor) -> Iterator[Tensor]:
        """The image after each level, each twice as large as the one before."""
        z = F.leaky_relu(self.first(x), 0.2)
        for level in self.levels:
            x, z = level(x, z)
            yield x

    def forward(self, x: Tensor) -> Tensor:
        return [*self.pyramid(x)][-1]


NETWORKS: dict[str, Callable[[int], nn.Module]] = {  # by the name in Table 2; of a power of two
    "SRCNN": lambda scale: SRCNN(), "FSRCNN": FSRCNN, "VDSR": lambda scale: VDSR(),
    "DRRN": lambda scale: DRRN(), "LapSRN": lambda scale: LapSRN(scale.bit_length() - 1),
}  # fmt: skip


def loss(network: nn.Module, x: Tensor, high: Tensor) -> Tensor:
    """The loss of its paper, of ``x`` as `entered` gives it and the face ``high`` (B, 3, H, W).

    Mean squared error; of LapSRN Charbonnier's at each level, summed.
    """
    if not isinstance(network, LapSRN):
        return F.mse_loss(network(x), high)
    errors = [image - bicubic(high, image.shape[-2:]) for image in network.pyramid(x)]
    return torch.stack([(error.square() + 1e-6).sqrt().mean() for error in errors]).sum()


def entered(network: nn.Module, low: Tensor, size: tuple[int, int]) -> Tensor:
    """The input of a network for faces ``low`` (B, C, r, r'), whose output has ``size``."""
    return bicubic(low, size) if network.enlarged else low


def bicubic(images: Tensor, size: Sequence[int]) -> Tensor:
    """Smaller or larger, as PIL and MATLAB do (a = -0.5: torch with antialiasing)."""
    return F.interpolate(images, [*size], mode="bicubic", antialias=True)


def load_published(path: Path | str) -> nn.Module:
    """VDSR or LapSRN on luminance, github.com/twtygqyy's weights; CheckpointError if neither."""
    state, _ = read_safetensors(path)
    for network in (VDSR(1, bias=False), LapSRN(2, 1, bias=False, kernel=4)):
        if len(state) == len(network.state_dict()):
            load_strictly(network, {_renamed(name): state[name] for name in state}, str(path))
            return network.eval()
    raise CheckpointError(f"{path}: {len(state)} tensors, neither VDSR's nor LapSRN's")


def _renamed(name: str) -> str:
    """The name here of a published tensor."""
    if middle := re.match(r"residual_layer\.(\d+)\.", name):
        return f"layers.{int(middle[1]) + 1}.weight"
    if body := re.match(r"convt_F(\d)\.0\.cov_block\.(\d+)\.", name):
        return f"levels.{int(body[1]) - 1}.body.{int(body[2]) // 2}.weight"
    if end := re.match(r"convt_([IR])(\d)\.", name):
        return f"levels.{int(end[2]) - 1}.{'image' if end[1] == 'I' else 'residual'}.weight"
    ends = {"input": "layers.0", "output": "layers.19", "conv_input": "first"}
    return f"{ends.get(name.removesuffix('.weight'), name)}.weight"


class SuperResolvingEmbedder(UpsamplingEmbedder):
    """Shrink to r, enlarge with a network for that r, embed with the trunk."""

    def __init__(self, backbone: Backbone, enlarge: nn.Module, **options) -> None:
        super().__init__(backbone, **options)
        self.enlarge = enlarge.to(self.device).eval()

    def network(self, r: int) -> nn.Module:
        return nn.ModuleList([self.enlarge, self.backbone])

    def _embed(self, pixels: Tensor, r: int) -> Tensor:
        size = self.backbone.config.size
        low = resize(self.backbone.crop(pixels), scaled_size(r, size), self.how) / 255
        high = self.enlarge(entered(self.enlarge, low, size)).float().clamp(0, 1)
        return self.backbone(self.backbone.normalise(255 * high))
