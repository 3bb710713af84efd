"""What a resolution costs: parameters (paper 3.4, Figure 5), operations (Figure 6), time.

Unit: a MAC is one multiply-accumulate, half of what torch.utils.flop_counter counts (2 FLOPs per
MAC). Papers on face recognition, this one included, print MACs under the name FLOPs. Convolutions
and the final fully connected layer are counted, element-wise work is not.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from btnet_core.errors import ConfigError
from btnet_core.models.btnet import BTNet, Route


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One way into BTNet, in single numbers; at canonical size everything is the trunk's."""

    r: int  # rows of the input, pixels
    couple_at: str  # unit where the branch ends; "" for the trunk
    route: int  # parameters that an embedding passes through
    branch: int  # parameters of B_r
    stored: int  # B_r + every BatchNorm affine of T_r: what the paper stores per resolution
    authors: int  # trainable under the authors' mask (paper-and-code: which batch norms learn)
    running: int  # running means and variances stored beside them
    share: float  # stored / the trunk's parameters, 0 to 1
    macs: int  # multiply-accumulates per face


def route_cost(btnet: BTNet, r: int) -> Cost:
    """Parameters and MACs of resolution ``r``; ConfigError if ``btnet`` has no such way in."""
    route, whole = btnet.route(r), _count(btnet.trunk.parameters())
    couple_at, branch, stored, authors = "", whole, whole, whole
    state = dict(route.named_buffers())
    if isinstance(route, Route):
        couple_at, state = route.couple_at, route.own_state()
        branch = _count(route.branch.parameters())
        stored = _count(route.trainable(bn="all").values())
        authors = _count(route.trainable(bn="authors").values())
    return Cost(
        r=r, couple_at=couple_at, route=_count(route.parameters()), branch=branch, stored=stored,
        authors=authors,
        running=_count(t for name, t in state.items() if re.search("running_(mean|var)$", name)),
        share=stored / whole, macs=count_macs(route, btnet.input_size(r)),
    )  # fmt: skip


def cost_table(btnet: BTNet) -> list[Cost]:
    """`route_cost` of every resolution, from the trunk down."""
    return [route_cost(btnet, r) for r in reversed(btnet.resolutions)]


def count_macs(module: nn.Module, size: tuple[int, int]) -> int:
    """MACs of one (3, rows, columns) image through ``module``, from shapes alone."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    state = {name: tensor.to("meta") for name, tensor in tensors}
    # two, so that BatchNorm accepts them in training mode, too
    two_images = torch.empty(2, 3, *size, device="meta")
    with FlopCounterMode(display=False) as counter:
        functional_call(module, state, two_images)
    return counter.get_total_flops() // 4


def measure_time(
    btnet: BTNet, r: int, *, device: torch.device | str, batch_size: int = 1, repeats: int = 20,
    warmup: int = 3,
) -> dict[str, float]:  # fmt: skip
    """Milliseconds per face through the route of ``r``: median, quartiles ``low`` and ``high``.

    Float32, evaluation mode, after ``warmup`` untimed passes, with torch's current threads;
    ``btnet`` is moved to ``device`` and stays there.
    """
    if repeats < 1 or batch_size < 1 or warmup < 0:
        raise ConfigError(f"too small: repeats {repeats}, batch_size {batch_size}, warmup {warmup}")
    device = torch.device(device)
    route, training = btnet.to(device).route(r), btnet.training
    x = torch.zeros(batch_size, 3, *btnet.input_size(r), device=device)
    samples = []
    btnet.eval()
    with torch.inference_mode():
        for _ in range(warmup + repeats):
            start = time.perf_counter()
            route(x)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            samples.append((time.perf_counter() - start) * 1e3 / batch_size)
    btnet.train(training)
    low, median, high = np.percentile(samples[warmup:], (25, 50, 75)).tolist()
    return {"median": median, "low": low, "high": high}


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)
