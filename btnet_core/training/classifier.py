"""The classifier kappa of Eq. 1: a unit vector for each identity, cut over the processes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from btnet_core.errors import CheckpointError, ConfigError
from btnet_core.files import read_safetensors, write_safetensors
from btnet_core.losses import Margin
from btnet_core.training import distributed
from btnet_core.training.batches import transfer


def shard(num_classes: int) -> tuple[int, int]:
    """First class and number of classes that this process holds."""
    n, r = distributed.world(), distributed.rank()
    first, end = num_classes * r // n, num_classes * (r + 1) // n
    return first, end - first


class Classifier(nn.Module):
    """``L_influence = CE(margin(cos(z, kappa)), y)`` over embeddings of all processes.

    Args:
        weight: ``(C, D)`` rows of every class; this process keeps its own.
        margin: which loss.
        sample_rate: fraction of each shard's classes that take part in a step: those of the batch,
            and negatives drawn at random (An et al. 2021, PartialFC). Deviation: the rows left out
            still decay and keep their momentum.
        seed: of the draws, which differ from process to process.

    Raises:
        ConfigError: there are fewer classes than processes.
    """

    def __init__(
        self, weight: Tensor, margin: Margin, *, sample_rate: float = 1.0, seed: int = 0
    ) -> None:
        super().__init__()
        self.num_classes = len(weight)
        if self.num_classes < distributed.world():
            got = f"got {self.num_classes} for {distributed.world()} processes"
            raise ConfigError(f"identities: {got}, expected one each at least")
        self.first, count = shard(self.num_classes)
        self.weight = nn.Parameter(weight[self.first : self.first + count].clone())
        self.margin, self.sample_rate = margin, sample_rate
        self.seed, self.step = seed, 0  # of the draws; the training loop sets the step

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        """z ``(b, D)``, labels ``(b,)`` of this process -> the mean loss of the whole batch.

        The value is the same on every process; its gradient reaches every z and every shard.
        """
        with torch.autocast(z.device.type, enabled=False):
            z = z if z.dtype == torch.float64 else z.float()
            everyone, labels = distributed.gather(z, total=True), distributed.all_gather(labels)
            weight, column = self._rows(labels)
            cosine = F.normalize(everyone) @ F.normalize(weight.to(z.dtype)).T
            target = self._target(cosine, column)
            norms = everyone.norm(dim=1) if self.margin.needs_norms else None
            logits = self.margin(cosine, column, target, norms)
            return distributed.sharded_cross_entropy(logits, column)

    def _rows(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Weight rows that take part, and where in them each label is (-1: not here)."""
        column, count = labels - self.first, len(self.weight)
        column = torch.where((column >= 0) & (column < count), column, -1)
        if self.sample_rate == 1 or not self.training:
            return self.weight, column
        seed = hash((self.seed, self.step, distributed.rank())) % 2**63
        drawn = torch.rand(count, generator=torch.Generator().manual_seed(seed))
        priority = F.pad(transfer(drawn, labels.device), (0, 1))  # one more, for labels elsewhere
        priority.index_fill_(0, torch.where(column >= 0, column, count), 2.0)  # of the batch
        priority, wanted = priority[:count], round(count * self.sample_rate)
        if wanted < len(labels):  # else there is room for all of them, and a GPU is not asked
            wanted = max(wanted, int((priority == 2).sum()))
        chosen = priority.topk(wanted).indices.sort().values
        place = torch.searchsorted(chosen, column.clamp_min(0))
        return self.weight[chosen], torch.where(column >= 0, place, -1)

    @staticmethod
    def _target(cosine: Tensor, column: Tensor) -> Tensor:
        """Cosine of the true class of each sample, wherever it is held; no gradient."""
        own = cosine.detach().gather(1, column.clamp_min(0)[:, None]).squeeze(1)
        return distributed.all_sum(torch.where(column >= 0, own, 0))

    def whole(self, mine: Tensor | None = None) -> Tensor:
        """The rows of every process ``(C, D)``: of the weights, or of a tensor like them."""
        mine = self.weight.detach() if mine is None else mine
        total = mine.new_zeros(self.num_classes, *mine.shape[1:])
        total[self.first : self.first + len(mine)] = mine
        return distributed.all_sum(total)

    def part(self, whole: Tensor) -> Tensor:
        """This process's rows of a tensor ``(C, D)``."""
        return whole[self.first : self.first + len(self.weight)]


def fresh_weight(num_classes: int, dim: int, seed: int) -> Tensor:
    """normal(0, 0.01), the same whatever the number of processes."""
    return torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(seed)) * 0.01


def class_means(batches: Iterable[tuple[Tensor, Tensor]], num_classes: int, dim: int) -> Tensor:
    """kappa* where the trunk came without one: each class's mean unit embedding, at length 1.

    batches of z ``(n, D)`` and labels ``(n,)`` -> ``(C, D)``; each process brings faces of its own.
    A class without images keeps the zero vector (cosine 0 to all).
    """
    total = torch.zeros(num_classes, dim)
    for z, labels in batches:
        unit = F.normalize(z.float())
        total = total.to(z.device).index_add_(0, labels.to(z.device), unit)
    return F.normalize(distributed.all_sum(total))


def save_classifier(path: Path, weight: Tensor) -> None:
    """Write ``weight (C, D)`` as safetensors."""
    write_safetensors(path, {"weight": weight}, {"kind": "btnet_classifier"})


def load_classifier(path: str | Path, num_classes: int, dim: int) -> Tensor:
    """Read ``weight (C, D)``.

    Raises:
        CheckpointError: unreadable, or of other classes than the data (a head cannot move to
            another problem, paper-and-code: fresh head).
    """
    weight = read_safetensors(path)[0].get("weight")
    if weight is None or tuple(weight.shape) != (num_classes, dim):
        found = "no tensor 'weight'" if weight is None else f"{tuple(weight.shape)}"
        needed = f"the data and trunk need a classifier ({num_classes}, {dim})"
        raise CheckpointError(f"{path}: got {found}, {needed}")
    return weight


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Find a wrong label before the first step.

    Raises:
        ConfigError: naming the first record whose label is outside 0 .. num_classes - 1.
    """
    wrong = torch.nonzero((labels < 0) | (labels >= num_classes)).flatten()
    if len(wrong):
        index = int(wrong[0])
        raise ConfigError(
            f"{len(wrong)} labels outside 0..{num_classes - 1}, "
            f"the first is {int(labels[index])} of record {index}"
        )
