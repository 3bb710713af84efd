"""Several processes as if they were one: gather, reduce, a softmax over a classifier cut by classes, shared BN statistics.

Convention: each process adds its share of one total loss, so gradients of the network are SUMMED over processes and the
result does not depend on how many there are. Started by torchrun; alone, every function here is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from btnet_core.device import resolve_device
from btnet_core.errors import ConfigError


def start(device: str = "auto") -> torch.device:
    """Join the processes that torchrun started (nccl on GPUs, gloo on CPUs); returns this process's device."""
    chosen = resolve_device(device)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        if chosen.type == "cuda":
            chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(chosen)
        dist.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(minutes=30)
        )
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

    ``total=True`` where each process goes on to compute its own share of the loss from the result (a shard of the
    classifier); False where all compute the same full loss from it.
    """
    return _Gather.apply(value, total) if world() > 1 else value


class _ShardedSoftmax(torch.autograd.Function):
    """Mean cross-entropy of logits ``(B, C_shard)`` whose softmax runs over the classes of all processes."""

    @staticmethod
    def forward(ctx, logits: Tensor, column: Tensor) -> Tensor:
        largest = logits.amax(1) if logits.shape[1] else logits.new_full((len(logits),), -torch.inf)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        exponents = (logits - largest[:, None]).exp_()
        rows = torch.nonzero(column >= 0).squeeze(1)
        target = torch.zeros_like(largest)
        target[rows] = logits[rows, column[rows]] - largest[rows]
        both = torch.stack([exponents.sum(1), target])
        dist.all_reduce(both)
        ctx.save_for_backward(exponents.div_(both[0][:, None]), rows, column)
        return (both[0].log() - both[1]).mean()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        probability, rows, column = ctx.saved_tensors
        probability = probability.index_put(
            (rows, column[rows]), probability.new_tensor(-1.0).expand(len(rows)), accumulate=True
        )
        return probability * (gradient / len(column)), None


def sharded_cross_entropy(logits: Tensor, column: Tensor) -> Tensor:
    """Mean over the whole batch B of ``-log softmax(logits)_y``; the softmax runs over the shards of all processes.

    ``column`` ``(B,)``: place of the true class in this shard, -1 if it is elsewhere. The value is the same everywhere.
    """
    return _ShardedSoftmax.apply(logits, column) if world() > 1 else F.cross_entropy(logits, column)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its sum over processes (one exchange for all of them)."""
    if world() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def average_statistics(model: nn.Module) -> None:
    """Running means and variances of batch norms become their average over processes (paper-and-code: running statistics)."""
    if world() > 1:
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(all_sum(buffer) / world())


class _AllMean(torch.autograd.Function):
    """Mean over processes, forwards and (each process holds its share of the loss) sum / n backwards."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        return all_sum(value) / world()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return all_sum(gradient) / world()


class _SyncBatchNorm:
    """Batch statistics over all processes; works on CPU and GPU. Mixed into the batch norms of a model in place."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world() == 1:
            return super().forward(x)  # type: ignore[misc]
        axes = [0, *range(2, x.ndim)]
        shape = [1, -1] + [1] * (x.ndim - 2)
        values = x.float()
        mean, square = _AllMean.apply(torch.stack([values.mean(axes), values.square().mean(axes)]))
        variance = (square - mean * mean).clamp_min(0)
        with torch.no_grad():
            count = x.numel() // x.shape[1] * world()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / max(count - 1, 1)), self.momentum)
            self.num_batches_tracked += 1
        normal = (values - mean.view(shape)) * (variance + self.eps).rsqrt().view(shape)
        return (normal * self.weight.view(shape) + self.bias.view(shape)).to(x.dtype)


class SyncBatchNorm1d(_SyncBatchNorm, nn.BatchNorm1d):
    """nn.BatchNorm1d with statistics over all processes."""


class SyncBatchNorm2d(_SyncBatchNorm, nn.BatchNorm2d):
    """nn.BatchNorm2d with statistics over all processes."""


def synchronise_batch_norms(model: nn.Module) -> None:
    """Turn every batch norm of ``model`` into its synchronised kind, in place (parameters and names stay)."""
    for module in model.modules():
        if type(module) is nn.BatchNorm1d:
            module.__class__ = SyncBatchNorm1d
        elif type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d


def check_batch(batch: int) -> int:
    """Images for this process of a total batch.

    Raises:
        ConfigError: the batch does not divide over the processes.
    """
    if batch % world():
        raise ConfigError(f"batch: got {batch} images for {world()} processes, expected a multiple")
    return batch // world()
