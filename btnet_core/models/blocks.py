"""The units of trunks, and the layers in them that PyTorch's CPU kernels need help with.

A unit is a module with ``stride``, what it divides rows and columns by, and ``abandon_stride``.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
        """As Stem's; a shortcut that only down-sampled becomes the identity and is dropped."""
        self.stride = 1
        self.conv2.stride = (1, 1)
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

    def __init__(
        self, c_in: int, c_out: int, kernel: int | tuple[int, int], *, stride: int = 1,
        padding: int = 0, groups: int = 1, linear: bool = False,
    ) -> None:  # fmt: skip
        conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, groups=groups, bias=False)
        layers: OrderedDict[str, nn.Module] = OrderedDict(conv=conv, bn=nn.BatchNorm2d(c_out))
        if not linear:
            layers["prelu"] = PReLU(c_out)
        super().__init__(layers)
        self.stride = stride

    def abandon_stride(self) -> list[str]:
        """As Stem's."""
        self.stride = 1
        self.conv.stride = (1, 1)
        return []


class Bottleneck(nn.Module):
    """MobileFaceNet's inverted residual: expand 1x1, depthwise 3x3/stride, project 1x1 (linear)."""

    def __init__(self, c_in: int, c_out: int, inner: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.residual = stride == 1 and c_in == c_out
        self.conv = nn.Sequential(
            nn.Conv2d(c_in, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            PReLU(inner),
            Depthwise(inner, inner, 3, stride, 1, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            PReLU(inner),
            nn.Conv2d(inner, c_out, 1, bias=False),
            nn.BatchNorm2d(c_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)

    def abandon_stride(self) -> list[str]:
        """As Stem's; no residual appears where the pretrained unit had none."""
        self.stride = 1
        self.conv[3].stride = (1, 1)
        return []


# ---- layers ----------------------------------------------------------------------------------


class _FastPReLU(torch.autograd.Function):
    """relu(x) + a min(x, 0) out of operations with fast bf16 kernels; a is ``(C, 1, 1)``."""

    @staticmethod
    def forward(ctx, x: Tensor, a: Tensor) -> Tensor:
        ctx.save_for_backward(x, a)
        return torch.addcmul(torch.relu(x), a, torch.clamp_max(x, 0))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        x, a = ctx.saved_tensors
        passed = torch.ops.aten.threshold_backward(gradient, x, 0)  # where x > 0
        of_a = None
        if ctx.needs_input_grad[1]:
            of_a = (gradient * torch.clamp_max(x, 0)).sum_to_size(a.shape)
        return torch.addcmul(passed, a, gradient - passed), of_a


class PReLU(nn.PReLU):
    """nn.PReLU; in bf16 on a CPU the same values several times as fast."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype != torch.bfloat16 or torch.compiler.is_compiling():
            return super().forward(x)
        return _FastPReLU.apply(x, self.weight.to(x.dtype).view(-1, 1, 1))


class Pointwise(nn.Conv2d):
    """Strided 1x1 convolution that skips pixels first when channels are few.

    oneDNN (PyTorch 2.14, CPU, channels_last) writes out of bounds in its backward pass below 16
    input channels.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or self.in_channels >= 16:
            return super().forward(x)
        return F.conv2d(x[..., :: self.stride[0], :: self.stride[1]], self.weight)


class Depthwise(nn.Conv2d):
    """Depthwise convolution; strided and with a gradient in bf16 on a CPU, it runs in float32.

    oneDNN (PyTorch 2.14) takes a hundred times as long for that gradient in bf16.
    """

    def forward(self, x: Tensor) -> Tensor:
        learns = torch.is_grad_enabled() and x.requires_grad
        slow = x.device.type == "cpu" and self.stride != (1, 1) and learns
        if not slow or torch.compiler.is_compiling():
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float()).to(x.dtype)
