"""One step: what the network and its teacher see, and the paper's loss (Section 3.3, Eq. 1 to 3).

A process holds its part of the batch; each adds its part of one total loss (see distributed.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from btnet_core import losses
from btnet_core.device import autocast
from btnet_core.models.btnet import Route
from btnet_core.training import distributed
from btnet_core.training.batches import Batch, branch_input, mirrored, moved, transfer, trunk_input
from btnet_core.training.run import Run
from btnet_core.training.teacher import Teacher, ask

CENTER_WEIGHT = 0.003  # of the centre loss beside the softmax (Wen et al. 2016)
Losses = tuple[Tensor, dict[str, Tensor]]  # L, and its weighted terms by name


def losses_of(run: Run, batch: Batch, pixels: Tensor | None) -> Losses:
    """The loss of a batch, whatever the run trains; ``pixels`` uint8 ``(b, 3, 112, 112)``."""
    if not run.config.resolution:
        faces = mirrored(transfer(pixels, run.device), batch.flip)
        x = trunk_input(run.trunk, faces, batch.size, run.config.resize)
        return trunk_losses(run, x, batch.labels)
    return branch_losses(run, *branch_inputs(run, batch, pixels), batch.labels)


def trunk_losses(run: Run, x: Tensor, labels: Tensor) -> Losses:
    """The trunk's loss on faces x ``(b, 3, H, W)``: L_influence alone."""
    with autocast(run.device, run.precision):
        z = run.finish(x)
    L = run.config.influence_weight * influence(run, z, labels)
    return L, {"influence": L}


def branch_losses(run: Run, x: Tensor, teacher: Teacher, labels: Tensor) -> Losses:
    """The branch's loss on X_r ``(b, 3, r, r')``: Eq. 3, with the authors' third term as an option.

    A term of weight 0 is not computed: without labels and embeddings, T_r does not run.
    """
    config = run.config
    lambda_branch = config.branch_weight
    with autocast(run.device, run.precision):
        z_r = run.encode(x)  # B_r(X_r)
        needed = config.influence_weight or config.embedding_weight
        z = run.finish(z_r) if needed else None  # T_r(z_r)

    L_influence = influence(run, z, labels)  # Eq. 1
    L_branch = distillation(run, z_r, teacher)  # Eq. 2
    L_embedding = embedding_distillation(run, z, teacher)
    L = config.influence_weight * L_influence + lambda_branch * (
        L_branch + config.embedding_weight * L_embedding
    )

    terms = {
        "influence": config.influence_weight * L_influence,
        "branch": lambda_branch * L_branch,
        "embedding": lambda_branch * (config.embedding_weight * L_embedding),
    }
    return L, {name: term for name, term in terms.items() if isinstance(term, Tensor)}


def influence(run: Run, z: Tensor | None, labels: Tensor) -> Tensor | float:
    """L_influence (Eq. 1) of embeddings ``(b, D)``: the mean over all processes' batch."""
    if not run.config.influence_weight:
        return 0.0
    labels = transfer(labels, run.device)
    loss = z.new_zeros(())
    if run.kappa is not None:
        run.kappa.step = run.step
        loss = loss + run.kappa(z, labels)
    if run.metric is not None:
        everyone = distributed.gather(z.float(), total=False)
        weight = CENTER_WEIGHT if run.config.loss == "center" else 1.0
        loss = loss + weight * run.metric(everyone, distributed.all_gather(labels))
    return loss


def distillation(run: Run, z_r: Tensor, teacher: Teacher) -> Tensor | float:
    """This process's part of L_branch (Eq. 2), from ``(b, C_r, r, r')`` at the coupling layer."""
    if teacher.z_s is None:
        return 0.0
    # A kept map lies channels last; the gradient then does, too, which batch norms take faster.
    axis = 1 if run.cache is None else -1
    maps = z_r.movedim(1, axis), teacher.z_s.movedim(1, axis)
    loss = losses.branch_loss(*maps, run.config.distillation, channels=axis)
    return loss / distributed.world()


def embedding_distillation(run: Run, z: Tensor | None, teacher: Teacher) -> Tensor | float:
    """This process's part of the distance of the embeddings (paper-and-code: embedding MSE)."""
    if teacher.z is None:
        return 0.0
    if run.config.embedding == "cosine" and run.network.training:
        follow_length(run.network, z.detach(), teacher.z)
    return losses.embedding_loss(z, teacher.z, run.config.embedding) / distributed.world()


def follow_length(route: Route, z: Tensor, z_teacher: Tensor) -> None:
    """The route's ``length`` moves to where its z come closest to the teacher's, in least squares.

    A cosine leaves lengths open, and sums of embeddings of several resolutions depend on them
    (templates, galleries). As batch norms follow their statistics: of every batch a tenth.
    """
    products = torch.stack(((z * z_teacher).sum(), z.square().sum()))
    inner, square = distributed.all_sum(products)
    route.length = route.length * (inner / square).clamp(0.1, 10.0) ** 0.1  # the old one stays


# ---- inputs -------------------------------------------------------------------------------------


def branch_inputs(run: Run, batch: Batch, pixels: Tensor | None) -> tuple[Tensor, Teacher]:
    """X_r ``(b, 3, r, r')`` and the teacher's answer; only a filled cache does without pixels."""
    config = run.config
    faces = mirrored(transfer(pixels, run.device), batch.flip) if pixels is not None else None
    if run.cache is None:
        x, teacher = see(run, faces)
    else:
        kept = [run.cache.get(name, batch.records, batch.flip) for name in ("x", "z_s", "z")]
        x, teacher = kept[0], Teacher(*kept[1:])
    if config.embedding_mirrored and teacher.z is not None:
        if run.cache is None:
            other = see(run, faces.flip(-1))[1].z
        else:
            other = run.cache.get("z", batch.records, ~batch.flip)
        teacher = Teacher(teacher.z_s, (teacher.z.float() + other.float()) / 2)
    if config.varies_input:
        faces = moved(faces, batch.shift) if config.shift else faces
        size = batch.size if config.sizes != (112,) else None  # None: straight to r
        x = branch_input(run.trunk, faces, config.resolution, config.resize, size)
    return x, teacher


@torch.no_grad()
def see(run: Run, faces: Tensor) -> tuple[Tensor, Teacher]:
    """X_r of uint8 ``faces (b, 3, 112, 112)``, and the teacher's answer where one is distilled."""
    config = run.config
    x = branch_input(run.trunk, faces, config.resolution, config.resize)
    if not config.branch_weight:
        return x, Teacher()
    embedding = config.embedding_weight > 0
    size = tuple(x.shape[-2:])
    return x, ask(run.trunk, faces, run.network.couple_at, size, embedding, run.precision)


def to_keep(run: Run, faces: Tensor) -> dict[str, Tensor]:
    """What a cache keeps of ``faces``, by name."""
    x, teacher = see(run, faces)
    found = {"x": x, "z_s": teacher.z_s, "z": teacher.z}
    return {name: value for name, value in found.items() if value is not None}
