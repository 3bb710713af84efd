"""Several processes as if they were one: gather, reduce, a softmax over all their classes.

Convention: each process adds its part of one total loss, so gradients of the network are SUMMED
over processes and the result does not depend on how many there are. Started by torchrun; alone,
every function here is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn  # before joining: its default arguments would keep a group for good
from torch import Tensor, nn
from torch.nn import functional as F

from btnet_core.device import resolve_device

BUCKET = 2**22  # gradients that are exchanged together, as they are ready: 16 MiB of numbers


def start(device: str = "auto") -> torch.device:
    """Join the processes that torchrun started (nccl on GPUs, gloo on CPUs).

    Returns this process's device.
    """
    chosen = resolve_device(device)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        if chosen.type == "cuda":
            chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(chosen)
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    elif dist.is_initialized() and chosen.type == "cuda":
        chosen = torch.device("cuda", torch.cuda.current_device())
    return chosen


def stop() -> None:
    """Leave the group that ``start`` joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def neighbours() -> int:
    """Processes of this run on this machine, this one included."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world()))


def wait() -> None:
    """Until every process is here."""
    if world() > 1:
        dist.barrier()


def all_sum(value: Tensor) -> Tensor:
    """The sum over processes, a new tensor without gradient."""
    value = value.detach().clone()
    if world() > 1:
        dist.all_reduce(value)
    return value


def all_gather(value: Tensor) -> Tensor:
    """Rows of all processes in rank order (same shape everywhere), without gradient."""
    if world() == 1:
        return value.detach()
    parts = [torch.empty_like(value) for _ in range(world())]
    dist.all_gather(parts, value.detach().contiguous())
    return torch.cat(parts)


def all_objects(value: object) -> list:
    """The small picklable ``value`` of every process, in rank order."""
    if world() == 1:
        return [value]
    found: list = [None] * world()
    dist.all_gather_object(found, value)
    return found


class _Gather(torch.autograd.Function):
    """Forward: rows of all processes. Backward: this process's rows of the (summed) gradient."""

    @staticmethod
    def forward(ctx, value: Tensor, total: bool) -> Tensor:
        ctx.rows, ctx.total = len(value), total
        return all_gather(value)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        if ctx.total:
            gradient = all_sum(gradient)
        return gradient[rank() * ctx.rows : (rank() + 1) * ctx.rows], None


def gather(value: Tensor, *, total: bool) -> Tensor:
    """``(b, ...)`` of each process -> ``(B, ...)`` with gradient.

    ``total=True`` where each process goes on to compute its own part of the loss from the result (a
    shard of the classifier); False where all compute the same full loss from it.
    """
    return _Gather.apply(value, total) if world() > 1 else value


class _ShardedSoftmax(torch.autograd.Function):
    """Mean cross-entropy of logits ``(B, C_shard)``, the softmax over all processes' classes."""

    @staticmethod
    def forward(ctx, logits: Tensor, column: Tensor) -> Tensor:
        largest = logits.amax(1)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        exponents = (logits - largest[:, None]).exp_()
        place, here = column.clamp_min(0)[:, None], column >= 0
        target = torch.where(here, logits.gather(1, place).squeeze(1) - largest, 0)
        both = torch.stack([exponents.sum(1), target])
        dist.all_reduce(both)
        ctx.save_for_backward(exponents.div_(both[0][:, None]), place, here)
        return (both[0].log() - both[1]).mean()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        probability, place, here = ctx.saved_tensors
        difference = probability.scatter_add(1, place, -here[:, None].to(probability.dtype))
        return difference * (gradient / len(here)), None


def sharded_cross_entropy(logits: Tensor, column: Tensor) -> Tensor:
    """Mean over the whole batch B of ``-log softmax(logits)_y``, the same value everywhere.

    ``column`` ``(B,)``: place of the true class in this shard, -1 if another process holds it.
    """
    return _ShardedSoftmax.apply(logits, column) if world() > 1 else F.cross_entropy(logits, column)


@contextmanager
def summed_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Gradients of the backward pass inside become sums over processes, exchanged as it goes on."""
    ready: list[Tensor] = []
    sent: list[tuple[dist.Work, Tensor, list[Tensor]]] = []

    def send() -> None:
        flat = torch.cat([gradient.flatten() for gradient in ready])
        sent.append((dist.all_reduce(flat, async_op=True), flat, ready.copy()))
        ready.clear()

    def add(parameter: nn.Parameter) -> None:
        ready.append(parameter.grad)
        if sum(gradient.numel() for gradient in ready) >= BUCKET:
            send()

    chosen = [p for p in parameters if p.requires_grad] if world() > 1 else []
    hooks = [parameter.register_post_accumulate_grad_hook(add) for parameter in chosen]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if ready:
        send()
    for work, flat, gradients in sent:
        work.wait()
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def average_statistics(model: nn.Module) -> None:
    """Batch norms' running statistics become their average over processes.

    paper-and-code: running statistics.
    """
    if world() > 1:
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(all_sum(buffer) / world())
