"""Quick inference on a CPU: ``BTNet.fast(mode)``, the routes folded and their kernels chosen (docs/fast.md).

"fp32" and "bf16" run in PyTorch. Batch norms are folded into convolutions (exactly, also at borders), maps stay
channels_last in the dtype of the mode, weights are laid out for oneDNN once, 3x3 convolutions with many channels go
through Winograd's transform, and faces are taken a few at a time so that their maps stay in the cache. "int8" runs
the folded routes in OpenVINO, quantised on some faces by onnxruntime. Inputs and outputs are the routes' own.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from btnet_core.data.faces import open_faces
from btnet_core.errors import ConfigError
from btnet_core.images import resize, scaled_size, to_pixels
from btnet_core.models.backbone import Backbone
from btnet_core.models.blocks import PReLU, Stem, Unit
from btnet_core.models.btnet import BTNet

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODES = (*DTYPES, "int8")
LARGEST_SHIFT = 8.0  # standard deviations; a map shifted further would lose its digits in bf16
CALIBRATION = 64  # faces that set the ranges of int8


class FastBTNet(BTNet):
    """A BTNet whose forward pass, and so ``embed``, runs in ``mode``; it shares the weights that it was made from.

    Args:
        net: on the CPU; changes of its weights after a route's first use are not seen.
        faces: for int8, those that set the ranges: aligned, as ``embed`` takes them; the first 64 are used.

    Raises:
        ConfigError: an unknown mode, one that the processor or the installation lacks, or no faces for int8.
    """

    def __init__(self, net: BTNet, mode: str, faces: Iterable = ()) -> None:
        nn.Module.__init__(self)
        check_mode(mode)
        if next(net.parameters()).device.type != "cpu":
            raise ConfigError(
                f"mode {mode!r} is for a CPU; on a GPU, autocast and channels_last do the same"
            )
        self.trunk, self.routes, self.mode = net.trunk, net.routes, mode
        self.faces = [
            to_pixels(face, f"faces[{i}]") for i, face in enumerate(islice(faces, CALIBRATION))
        ]
        if mode == "int8" and not self.faces:
            raise ConfigError(
                "mode 'int8': got no faces to calibrate on, expected fast('int8', faces) or --calibrate FACES"
            )
        self.eval()
        self.compiled: dict[int, Callable[[Tensor], Tensor]] = {}

    @torch.inference_mode()
    def forward(self, x: Tensor, r: int) -> Tensor:
        if r not in self.compiled:
            route, size = fold(self.route(r)), scaled_size(r, self.trunk.config.size)
            if self.mode == "int8":
                pixels = torch.stack([resize(self.trunk.crop(face), size) for face in self.faces])
                self.compiled[r] = Quantised(route, self.trunk.normalise(pixels))
            else:
                self.compiled[r] = Laid(route, DTYPES[self.mode])
        with torch.autocast("cpu", enabled=False):
            return self.compiled[r](x)


def some_faces(spec: str) -> Tensor:
    """Pixels of CALIBRATION faces of the set ``spec`` (``open_faces``), always the same ones."""
    faces = open_faces(spec)
    chosen = np.random.default_rng(0).permutation(len(faces))[:CALIBRATION]
    return faces.images(sorted(chosen.tolist()))


def check_mode(mode: str) -> None:
    """Raises ConfigError where ``mode`` cannot run here, saying what is offered."""
    if mode not in MODES:
        raise ConfigError(f"mode: got {mode!r}, expected one of {', '.join(MODES)}")
    lacks = {"bf16": "avx512_bf16", "int8": "avx512_vnni"}.get(mode)
    if lacks and not (
        torch.cpu.get_capabilities().get(lacks) or torch.cpu.get_capabilities().get(f"amx_{mode}")
    ):
        raise ConfigError(f"mode {mode!r}: this processor lacks {lacks}; fp32 is offered")
    if mode == "int8":
        try:
            import onnxruntime.quantization  # noqa: F401
            import onnxscript  # noqa: F401
            import openvino  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"mode 'int8' needs {error.name}: pip install 'btnet-core[fast]'"
            ) from error


# ---- folding -----------------------------------------------------------------------------------------------------


def fold(route: nn.Module) -> nn.Sequential:
    """(body, head): what a Route or a trunk computes in evaluation, float32, without batch norms beside convolutions.

    IResNet normalises before a convolution whose zero padding then means "the mean" and not 0. Its units therefore
    pass on ``u = x + b / s`` in place of x, where ``s x + b`` is the next unit's first norm: padded with zeros, u is
    what that norm gives up to the factor s, which goes into the weights. All shifts go into the biases before them.
    """
    parts = [route.body] if isinstance(route, Backbone) else [route.branch, route.shared]
    units = [copy.deepcopy(unit) for part in parts for unit in part]
    head = copy.deepcopy(route.head)
    if isinstance(units[0], Stem) and all(isinstance(unit, Unit) for unit in units[1:]):
        shifts = [_shift(unit.bn1) for unit in units[1:]] + [
            torch.zeros(units[-1].bn3.num_features)
        ]
        units = [_FoldedStem(units[0], shifts[0]), *map(_FoldedUnit, units[1:], shifts, shifts[1:])]
        flat = nn.Linear(1, 1)
        scale, shift = (
            t.repeat_interleave(head.fc.in_features // len(t)) for t in _affine(head.bn)
        )
        last_scale, last_shift = _affine(head.features)
        weight = head.fc.weight.double()
        flat.weight = nn.Parameter((weight * scale * last_scale[:, None]).float())
        flat.bias = nn.Parameter(
            ((head.fc.bias + weight @ shift) * last_scale + last_shift).float()
        )
        head = nn.Sequential(nn.Flatten(), flat)
    folded = nn.Sequential(nn.Sequential(*units), head)
    _fuse_neighbours(folded)
    return folded.eval().requires_grad_(False)


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(scale, shift) of a norm in evaluation, float64."""
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, norm.bias.double() - norm.running_mean.double() * scale


def _shift(norm: nn.BatchNorm2d) -> Tensor | None:
    """b / s, or None where it is so large that the norm has to stay."""
    if not (norm.bias.abs() < LARGEST_SHIFT * norm.weight.abs()).all():
        return None
    scale, shift = _affine(norm)
    return shift / scale


def _conv(conv: nn.Conv2d, norm: nn.Module, before: Tensor | None = None) -> nn.Conv2d:
    """``norm(conv(before * x))`` as one convolution, computed in float64."""
    conv = conv.double()
    if before is not None:
        conv.weight.data *= before[:, None, None]
    return fuse_conv_bn_eval(conv.eval(), norm.double().eval()).float()


def _zero(shift: Tensor | None) -> Tensor | float:
    return 0.0 if shift is None else shift


class _FoldedStem(nn.Module):
    def __init__(self, stem: Stem, shift: Tensor | None) -> None:
        super().__init__()
        self.conv, self.prelu = _conv(stem.conv, stem.bn), nn.PReLU(stem.prelu.num_parameters)
        self.prelu.weight = stem.prelu.weight
        shift = torch.zeros(stem.conv.out_channels) if shift is None else shift
        self.register_buffer("shift", shift.float().view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.prelu(self.conv(x)) + self.shift


class _FoldedUnit(nn.Module):
    """Takes x + c, gives its output + c_next."""

    def __init__(self, unit: Unit, c: Tensor | None, c_next: Tensor | None) -> None:
        super().__init__()
        self.norm = unit.bn1 if c is None else None
        self.conv1 = _conv(unit.conv1, unit.bn2, None if c is None else _affine(unit.bn1)[0])
        self.prelu = nn.PReLU(unit.prelu.num_parameters)
        self.prelu.weight = unit.prelu.weight
        self.conv2 = _conv(unit.conv2, unit.bn3)
        self.shortcut = None
        moved: Tensor | float = _zero(c_next)
        if unit.shortcut is None:
            moved = moved - _zero(c)
        else:
            self.shortcut = _conv(unit.shortcut.conv, unit.shortcut.bn)
            if c is not None:
                self.shortcut.bias.data -= (self.shortcut.weight.flatten(1).double() @ c).float()
        self.conv2.bias.data += moved

    def forward(self, u: Tensor) -> Tensor:
        y = self.prelu(self.conv1(u if self.norm is None else self.norm(u)))
        u = u if self.shortcut is None else self.shortcut(u)
        return self.conv2(y, u) if isinstance(self.conv2, _Conv) else self.conv2(y) + u


def _fuse_neighbours(module: nn.Module) -> None:
    """In every Sequential, fuse a convolution with the norm after it; PReLU becomes PyTorch's own again."""
    for name, child in list(module.named_children()):
        _fuse_neighbours(child)
        if isinstance(child, PReLU):
            plain = nn.PReLU(child.num_parameters)
            plain.weight = child.weight
            setattr(module, name, plain)
    names = list(module._modules) if isinstance(module, nn.Sequential) else []
    for first, second in pairwise(names):
        conv, norm = module._modules[first], module._modules[second]
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(module, first, _conv(conv, norm))
            setattr(module, second, nn.Identity())


# ---- fp32 and bf16 -----------------------------------------------------------------------------------------------

CHUNK = {True: 8, False: 32}  # faces at a time, by whether a face has 28 rows or more
WINOGRAD_CHANNELS, WINOGRAD_TILES = 128, 96  # from here on it is quicker
KERNEL = torch.tensor(
    [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]
)  # G of F(2 x 2, 3 x 3)


class Laid:
    """A folded route in ``dtype``, its body on a few faces at a time."""

    def __init__(self, folded: nn.Sequential, dtype: torch.dtype) -> None:
        self.dtype = dtype
        _lay_out(folded.to(dtype=dtype, memory_format=torch.channels_last))
        self.body, self.head = folded

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
        maps = [self.body(part) for part in x.split(CHUNK[x.shape[2] >= 28])]
        return self.head(torch.cat(maps)).float()


def _lay_out(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        _lay_out(child)
        if isinstance(child, nn.Conv2d):
            setattr(module, name, _Conv(child))


class _Conv(nn.Module):
    """conv(x) [+ added]: by Winograd's F(2 x 2, 3 x 3) or by oneDNN with its weights laid out beforehand."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.how = (conv.padding, conv.stride, conv.dilation, conv.groups)
        padding, stride, dilation, groups = self.how
        self.bias = conv.bias
        self.weight = torch._C._nn.mkldnn_reorder_conv2d_weight(
            conv.weight.detach().to_mkldnn(), padding, stride, dilation, groups
        )
        self.kernels: Tensor | None = None
        square = conv.kernel_size == (3, 3) and self.how == ((1, 1), (1, 1), (1, 1), 1)
        if square and conv.in_channels >= WINOGRAD_CHANNELS:
            k = torch.einsum("ka,oiab,lb->klio", KERNEL, conv.weight.float(), KERNEL)
            self.kernels = k.flatten(0, 1).to(conv.weight.dtype).contiguous()  # (16, C_in, C_out)

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        tiles = x.shape[0] * ((x.shape[2] + 1) // 2) * ((x.shape[3] + 1) // 2)
        if self.kernels is not None and tiles >= WINOGRAD_TILES:
            y = winograd(x, self.kernels, self.bias)
            return y if added is None else y + added
        one = torch.ops.mkldnn._convolution_pointwise
        if added is None:
            return one(x, self.weight, self.bias, *self.how, "none", [], "")
        return one.binary(x, added, self.weight, self.bias, *self.how, "add", None, None, [], None)


def winograd(x: Tensor, kernels: Tensor, bias: Tensor) -> Tensor:
    """3x3 convolution, padding 1, of channels_last ``(B, C, H, W)`` with 16 products for 4 outputs instead of 36.

    Lavin and Gray 2016, F(2 x 2, 3 x 3): every 4 x 4 tile of x, two apart, is transformed, multiplied with the
    transformed kernels ``(16, C, C_out)``, and transformed back to 2 x 2 outputs.
    """
    b, c, height, width = x.shape
    h, w = (height + 1) // 2, (width + 1) // 2  # tiles
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1 + width % 2, 1, 1 + height % 2))
    tiles = x.new_empty(4, 4, b, h, w, c)
    for row, a in zip(
        tiles, _four([padded[:, i : i + 2 * h - 1 : 2] for i in range(4)]), strict=True
    ):
        _four([a[:, :, i : i + 2 * w - 1 : 2] for i in range(4)], row)
    m = torch.bmm(tiles.view(16, b * h * w, c), kernels).view(4, 4, b, h, w, -1)
    m[1, 1] += bias  # the one product that all four outputs take with +1
    y = x.new_empty(b, h, 2, w, 2, m.shape[-1])
    above, below = m[1] + m[2], m[1] - m[2]
    for i, s in enumerate((above.add_(m[0]), below.sub_(m[3]))):
        torch.add(s[0] + s[1], s[2], out=y[:, :, i, :, 0])
        torch.sub(s[1] - s[2], s[3], out=y[:, :, i, :, 1])
    return y.view(b, 2 * h, 2 * w, -1)[:, :height, :width].permute(0, 3, 1, 2)


def _four(d: list[Tensor], out: Tensor | None = None) -> list[Tensor]:
    """B^T d: (d0 - d2, d1 + d2, d2 - d1, d1 - d3)."""
    into = [None] * 4 if out is None else out
    return [
        torch.sub(d[0], d[2], out=into[0]),
        torch.add(d[1], d[2], out=into[1]),
        torch.sub(d[2], d[1], out=into[2]),
        torch.sub(d[1], d[3], out=into[3]),
    ]


# ---- int8 --------------------------------------------------------------------------------------------------------


class Quantised:
    """A folded route in OpenVINO: convolutions of 8-bit weights and maps, the rest in bf16 where that is quick.

    Weights have one scale a channel, maps one scale and zero point, from the extremes on ``x``, normalised faces. The
    first convolution, those of the head and depthwise ones lose too much by it, and save little: they stay in bf16.
    """

    def __init__(self, folded: nn.Sequential, x: Tensor) -> None:
        import onnx
        import openvino
        from onnxruntime import quantization

        logging.getLogger().addFilter(_advises_nothing)
        with tempfile.TemporaryDirectory() as name:
            whole, small = Path(name) / "whole.onnx", Path(name) / "int8.onnx"
            write_onnx(folded, x[:1].repeat(2, 1, 1, 1), whole)
            convs = [node for node in onnx.load(whole).graph.node if node.op_type == "Conv"]
            apart = [
                node.name
                for node in convs
                if any(a.name == "group" and a.i > 1 for a in node.attribute)
            ]
            heads = sum(isinstance(module, nn.Conv2d) for module in folded[1].modules())
            apart += [node.name for node in (convs[0], *convs[len(convs) - heads :])]
            quantization.quantize_static(
                whole, small, _Batches(x), op_types_to_quantize=["Conv"], nodes_to_exclude=apart,
                per_channel=True, activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
                extra_options={"WeightSymmetric": True},
            )  # fmt: skip
            hints = {
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "ENABLE_CPU_PINNING": False,
            }  # PyTorch's threads use the same cores
            core = openvino.Core()
            self.request = core.compile_model(
                core.read_model(small), "CPU", hints
            ).create_infer_request()

    def __call__(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.request.infer({0: x.contiguous().numpy()})[0].copy())


def _advises_nothing(record: logging.LogRecord) -> bool:
    """False for onnxruntime's advice, on the root logger, to simplify a graph that is as simple as it gets."""
    return "pre-processing" not in record.getMessage()


class _Batches:
    """What onnxruntime's calibration reads."""

    def __init__(self, x: Tensor, size: int = 8) -> None:
        self.parts = iter(x.split(size))

    def get_next(self) -> dict[str, np.ndarray] | None:
        part = next(self.parts, None)
        return None if part is None else {"x": part.numpy()}


def write_onnx(folded: nn.Module, x: Tensor, path: Path) -> None:
    """``folded`` with input x ``(B, 3, r, r')``, normalised, B free."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = ({0: torch.export.Dim("batch")},)
        torch.onnx.export(
            folded,
            (x,),
            path,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=["x"],
            external_data=False,
            verbose=False,
        )
