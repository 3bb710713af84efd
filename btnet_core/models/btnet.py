"""BTNet (paper 3.2-3.4): a trunk, and for each low resolution r a route that enters the trunk at its own layer.

    112 x 112  ──►  S0 ──► S1 ──► S2 ──► S3 ──► S4 ──► head ──► embedding        T, the trunk
     28 x 28   ──►  B_28 (trunk up to S2U1 at stride 1) ──┘  T_28 = S2U2 …       convolutions shared, BN its own

Shapes: B batch, r rows of the resolution, C_r channels of the coupling layer, D embedding.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from btnet_core.errors import CheckpointError, ConfigError, DataError
from btnet_core.files import read_safetensors, write_safetensors
from btnet_core.images import Resize, resize, scaled_size, to_pixels
from btnet_core.models.backbone import Backbone, embed_features
from btnet_core.models.weights import build_from, load_strictly, read_config

log = logging.getLogger(__name__)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
INDICATORS = ("min", "max", "avg")
ROUNDINGS = ("floor", "near", "ceil")
BN_MODES = ("all", "authors", "frozen_bn")


def select_branch(width, height, *, indicator="max", rounding="ceil", resolutions=(7, 14, 28, 112)):
    """Resolution of the branch that a face of ``width`` x ``height`` pixels goes to (paper 4.3.2, Figure 8).

    The indicator is min, max or the integer mean of the two sides. ``floor`` takes the largest resolution not above
    it, ``ceil`` the smallest not below it, ``near`` the closest; half-way (10.5, 21, 70) goes to the larger. Beyond
    the smallest or largest resolution there is no choice. Works on numbers and on integer arrays alike.

    Raises:
        ConfigError: an unknown indicator or rounding, or a side below 1.
    """
    if indicator not in INDICATORS or rounding not in ROUNDINGS:
        raise ConfigError(
            f"branch selection {indicator}+{rounding}: expected {INDICATORS} + {ROUNDINGS}"
        )
    w, h = np.asarray(width), np.asarray(height)
    if (w < 1).any() or (h < 1).any():
        raise ConfigError("width and height must be at least 1 pixel")
    side = {"min": np.minimum(w, h), "max": np.maximum(w, h), "avg": (w + h) // 2}[indicator]
    steps = np.sort(np.asarray(resolutions))
    if rounding == "near":
        index = np.searchsorted((steps[:-1] + steps[1:]) / 2, side, side="right")
    elif rounding == "ceil":
        index = np.minimum(np.searchsorted(steps, side, side="left"), len(steps) - 1)
    else:
        index = np.maximum(np.searchsorted(steps, side, side="right") - 1, 0)
    chosen = steps[index]
    return int(chosen) if chosen.ndim == 0 else chosen


def coupling_layer(trunk: Backbone, r: int) -> str:
    """Name of the first unit whose output has ``r`` rows: where a branch for r ends (paper-and-code: coupling layer).

    Raises:
        ConfigError: the trunk has no layer of that resolution below its canonical size.
    """
    rows = trunk.resolutions()
    name = next((name for name, value in rows.items() if value == r), None)
    if name is None or r >= trunk.config.size[0]:
        below = sorted(
            {value for value in rows.values() if value < trunk.config.size[0]}, reverse=True
        )
        raise ConfigError(f"resolution {r}: this trunk's feature pyramid offers {below}")
    return name


class Route(nn.Module):
    """B_r followed by T_r: normalised ``(B, 3, r, r')`` -> un-normalised embedding ``(B, D)``, float32.

    ``branch`` (B_r) starts as a copy of the trunk's first units with every stride 1. ``shared`` and ``head`` (T_r)
    hold the trunk's own Parameters; only their BatchNorms (affine and running statistics) are copies, one set for
    each resolution (paper 3.4). ``couple_at`` moves the end of the branch to any unit (Figure 7); units between it
    and the layer of resolution r then stay shared but run at stride 1.
    """

    def __init__(self, trunk: Backbone, r: int, *, couple_at: str | None = None) -> None:
        super().__init__()
        names = [name for name, _ in trunk.units()]
        joins = names.index(coupling_layer(trunk, r))
        self.r, self.couple_at = r, couple_at or names[joins]
        if self.couple_at not in names:
            raise ConfigError(
                f"couple_at: got {self.couple_at!r}, the trunk's units are {', '.join(names)}"
            )
        ends = names.index(self.couple_at)
        self.branch, self.shared = nn.Sequential(), nn.Sequential()
        self.dropped: list[str] = []  # trunk weights that have no place in the branch
        for index, (name, unit) in enumerate(trunk.units()):
            copied = copy.deepcopy(unit) if index <= ends else share(unit)
            if index <= joins:
                self.dropped += [f"{name}.{weight}" for weight in copied.abandon_stride()]
            (self.branch if index <= ends else self.shared).add_module(name, copied)
        self.head = share(trunk.head)
        self.size = scaled_size(r, trunk.config.size)  # rows, columns of the input
        if self.dropped:
            log.info("branch %d leaves out pretrained weights: %s", r, ", ".join(self.dropped))

    def encode(self, x: Tensor) -> Tensor:
        """z_r = B_r(X_r) ``(B, C_r, r, r')``: what meets the trunk's feature map at the coupling layer."""
        return self.branch(x)

    def finish(self, z_r: Tensor) -> Tensor:
        """T_r(z_r), the embedding ``(B, D)``."""
        return embed_features(self.head, self.shared(z_r))

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != (3, *self.size):
            raise DataError(
                f"route {self.r}: got {tuple(x.shape)}, expected (B, 3, {self.size[0]}, {self.size[1]})"
            )
        return self.finish(self.encode(x))

    def shared_norms(self) -> Iterator[tuple[str, nn.Module]]:
        """(name, BatchNorm) of T_r, in order."""
        for part in ("shared", "head"):
            for name, module in getattr(self, part).named_modules():
                if isinstance(module, NORMS):
                    yield f"{part}.{name}", module

    def trainable(self, *, bn: str = "all", fix_trunk: bool = True) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name (paper-and-code: which batch norms learn).

        ``bn`` says what moves in T_r: "all" BN affines (the paper), "authors" (not those of shortcuts and of the last
        BN1d), "frozen_bn" (nothing). With ``fix_trunk=False`` all of T_r learns (Table 3; full fine-tuning). A weight
        fixed at 1 by the architecture never learns.
        """
        if bn not in BN_MODES:
            raise ConfigError(f"bn: got {bn!r}, expected one of {', '.join(BN_MODES)}")
        chosen = {f"branch.{name}": parameter for name, parameter in self.branch.named_parameters()}
        if not fix_trunk:
            return dict(self.named_parameters())
        for name, norm in self.shared_norms() if bn != "frozen_bn" else ():
            if bn == "all" or not ("shortcut" in name or name.endswith(".features")):
                chosen |= {
                    f"{name}.{leaf}": parameter for leaf, parameter in norm.named_parameters()
                }
        return chosen

    def own_state(self) -> dict[str, Tensor]:
        """What storing this resolution costs: the branch, and T_r's BN affines and running statistics."""
        norms = {name for name, _ in self.shared_norms()}
        return {
            name: tensor
            for name, tensor in self.state_dict().items()
            if name.startswith("branch.") or name.rsplit(".", 1)[0] in norms
        }


def share(module: nn.Module) -> nn.Module:
    """A copy of ``module`` whose parameters are the same objects, except those of BatchNorms, which are copies."""
    norms = [norm for norm in module.modules() if isinstance(norm, NORMS)]
    own = {id(parameter) for norm in norms for parameter in norm.parameters()}
    return copy.deepcopy(module, {id(p): p for p in module.parameters() if id(p) not in own})


class BTNet(nn.Module):
    """phi_bt: one trunk for faces of canonical size and one route for each lower resolution.

    Args:
        trunk: any Backbone; it is used, not copied.
        resolutions: rows of the branches, e.g. (28, 14, 7) as in the paper; 56 is possible too.
        couple_at: for a resolution, the unit where its branch ends, if not the standard one (Figure 7).
    """

    mode = ""  # of inference, see fast

    def __init__(
        self,
        trunk: Backbone,
        resolutions: Sequence[int] = (28, 14, 7),
        *,
        couple_at: dict[int, str] | None = None,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.routes = nn.ModuleDict()
        for r in resolutions:
            self.add_route(r, couple_at=(couple_at or {}).get(r))

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Every resolution that has a way in, ascending; the last is the trunk's own."""
        return (*sorted(int(r) for r in self.routes), self.trunk.config.size[0])

    def add_route(self, r: int, *, couple_at: str | None = None) -> Route:
        """Give r a fresh branch, initialised from the trunk; replaces one that is there."""
        self.routes[str(r)] = Route(self.trunk, r, couple_at=couple_at)
        return self.routes[str(r)]

    def route(self, r: int) -> nn.Module:
        """The network that takes faces of resolution r: a Route, or the trunk itself at canonical size."""
        if r == self.trunk.config.size[0]:
            return self.trunk
        if str(r) not in self.routes:
            raise ConfigError(f"resolution {r}: this BTNet has {self.resolutions}")
        return self.routes[str(r)]

    def forward(self, x: Tensor, r: int) -> Tensor:
        """Normalised faces of resolution r ``(B, 3, r, r')`` -> un-normalised embeddings ``(B, D)``."""
        return self.route(r)(x)

    @torch.inference_mode()
    def embed(
        self, images: Sequence, *, indicator: str = "max", rounding: str = "ceil", how: Resize | None = None,
        batch_size: int = 64, normalise: bool = True, return_info: bool = False, keep_going: bool = False,
    ) -> Tensor | tuple[Tensor, list[dict]]:  # fmt: skip
        """Embed aligned faces of any sizes, each through its own branch, in the order given.

        Threads decode and resize while the model works; about ``batch_size`` faces of each branch are held at a time.

        Args:
            images: PIL images, paths, uint8 arrays ``(H, W, 3)`` or pixel tensors ``(3, H, W)`` in [0, 255], RGB.
            indicator, rounding: branch selection, see ``select_branch``; indicator "detail" takes the rows of detail
                that the face really holds (quality.py) for its size.
            normalise: unit length, so that a dot product is the cosine.
            return_info: also return for each image its ``size``, branch ``r``, the ``scale`` factors of the resize, and
                its ``reliability``: the rows of detail.
            keep_going: an image that cannot be read gets a row of NaN, and its info {"error": message}.

        Returns:
            ``(len(images), D)`` float32 on the CPU [, list of dicts].

        Raises:
            DataError: an image is not a face image; the message gives its place in the list.
        """
        from btnet_paper.quality import optical_resolution

        device, was_training = next(self.parameters()).device, self.training
        embeddings = torch.full((len(images), self.trunk.config.embedding), torch.nan)
        info: list[dict] = [{}] * len(images)
        waiting: dict[int, list[tuple[int, Tensor]]] = {r: [] for r in self.resolutions}

        def load(index: int) -> tuple[Tensor, dict]:
            whole = to_pixels(images[index], f"images[{index}]")
            detail = optical_resolution(whole) if return_info or indicator == "detail" else 0.0
            face = self.trunk.crop(whole)
            rows, columns = face.shape[-2:]
            sides, rule = (
                ((detail, detail), "max") if indicator == "detail" else ((columns, rows), indicator)
            )
            r = select_branch(
                *sides, indicator=rule, rounding=rounding, resolutions=self.resolutions
            )
            target = scaled_size(r, self.trunk.config.size)
            scale = (target[0] / rows, target[1] / columns)
            facts = {"size": (rows, columns), "r": r, "scale": scale, "reliability": detail}
            return resize(face, target, how), facts

        def flush(r: int) -> None:
            indices, pixels = zip(*waiting[r], strict=True)
            x = self.trunk.normalise(torch.stack(pixels).to(device)).contiguous(
                memory_format=torch.channels_last
            )
            embeddings[list(indices)] = self(x, r).float().cpu()
            waiting[r].clear()

        self.eval()
        try:
            for index, loaded in enumerate(
                ahead(load, range(len(images)), 2 * batch_size, keep_going)
            ):
                if isinstance(loaded, DataError):
                    info[index] = {"error": str(loaded)}
                    continue
                pixels, info[index] = loaded
                r = info[index]["r"]
                waiting[r].append((index, pixels))
                if len(waiting[r]) == batch_size:
                    flush(r)
            for r in (r for r, faces in waiting.items() if faces):
                flush(r)
        finally:
            self.train(was_training)
        if normalise:
            embeddings = nn.functional.normalize(embeddings)
        return (embeddings, info) if return_info else embeddings

    def fast(self, mode: str, faces: Iterable = ()) -> BTNet:
        """This BTNet for quick inference on a CPU in ``mode`` "fp32", "bf16" or "int8" (calibrated on ``faces``): fast.py.

        Raises:
            ConfigError: an unknown mode, or one that cannot run here.
        """
        from btnet_core.models.fast import FastBTNet

        return FastBTNet(self, mode, faces)

    # ---- storage (paper 3.4): the trunk once, each resolution as its own small file ----

    def save(self, folder: Path | str, *, only: int | None = None) -> None:
        """Write ``trunk.safetensors`` and ``branch_<r>.safetensors`` into ``folder``; ``only`` writes one branch."""
        folder, digest = Path(folder), weights_digest(self.trunk)
        if only is None:
            metadata = {"btnet_backbone": json.dumps(asdict(self.trunk.config)), "digest": digest}
            write_safetensors(folder / "trunk.safetensors", self.trunk.state_dict(), metadata)
        for r, route in self.routes.items():
            if only is None or int(r) == only:
                facts = {"r": route.r, "couple_at": route.couple_at, "trunk": digest}
                metadata = {"btnet_branch": json.dumps(facts)}
                write_safetensors(folder / f"branch_{r}.safetensors", route.own_state(), metadata)

    @classmethod
    def load(cls, folder: Path | str, resolutions: Sequence[int] | None = None) -> BTNet:
        """Load a saved BTNet, or only some of its resolutions.

        Raises:
            CheckpointError: a file is missing, damaged, or a branch was trained on another trunk.
        """
        folder = Path(folder)
        if not (folder / "trunk.safetensors").is_file():
            raise CheckpointError(
                f"{folder}: holds no BTNet (trunk.safetensors); `btnet adapt --out {folder}` makes one"
            )
        state, metadata = read_safetensors(folder / "trunk.safetensors")
        config = read_config(metadata, folder / "trunk.safetensors")
        trunk = build_from(config, state, folder / "trunk.safetensors")
        btnet, digest = cls(trunk, ()), weights_digest(trunk)
        found = sorted(
            int(path.stem.removeprefix("branch_"))
            for path in folder.glob("branch_[0-9]*.safetensors")
        )
        for r in found if resolutions is None else resolutions:
            path = folder / f"branch_{r}.safetensors"
            state, metadata = read_safetensors(path)
            try:
                facts = dict(json.loads(metadata.get("btnet_branch", "{}")))
                facts = {"couple_at": None, **facts}
            except (ValueError, TypeError, RecursionError) as error:
                raise CheckpointError(f"{path}: no usable description inside ({error})") from error
            if facts.get("r") != r or facts.get("trunk") != digest:
                raise CheckpointError(
                    f"{path}: a branch of resolution {facts.get('r')} for another trunk than this one"
                )
            route = btnet.add_route(r, couple_at=facts["couple_at"])
            missing = route.own_state().keys() ^ state.keys()
            if missing:
                raise CheckpointError(
                    f"{path}: tensors missing or unexpected: {sorted(missing)[:5]}"
                )
            load_strictly(route, route.state_dict() | state, str(path))
        return btnet


def ahead(
    load: Callable[[int], Any], indices: Iterable[int], depth: int, keep_errors: bool
) -> Iterator[Any]:
    """``load(i)`` for each index, in order, by threads that are up to ``depth`` items ahead; a DataError may be one."""

    def guarded(index: int) -> Any:
        try:
            return load(index)
        except DataError as error:
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="load") as pool:
        jobs: deque = deque()
        try:
            for index in indices:
                jobs.append(pool.submit(guarded if keep_errors else load, index))
                if len(jobs) > depth:
                    yield jobs.popleft().result()
            while jobs:
                yield jobs.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def weights_digest(module: nn.Module) -> str:
    """SHA-256 over names and values of every parameter and running statistic (not the step counters)."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
