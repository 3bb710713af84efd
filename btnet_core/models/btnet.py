"""BTNet (paper 3.2-3.4): a trunk, and for each low resolution r a route that enters it at a layer.

    112 x 112  ──►  S0 ──► S1 ──► S2 ──► S3 ──► S4 ──► head ──► embedding     T, the trunk
     28 x 28   ──►  B_28 (trunk up to S2U1 at stride 1) ──┘  T_28 = S2U2 …    T's, but own BN

Shapes: B batch, r rows of the resolution, C_r channels of the coupling layer, D embedding.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from btnet_core.device import autocast
from btnet_core.errors import CheckpointError, ConfigError, DataError
from btnet_core.files import find, read_safetensors, write_safetensors
from btnet_core.images import Resize, resize, scaled_size, to_pixels
from btnet_core.models.backbone import Backbone, embed_features
from btnet_core.models.weights import build_from, load_strictly, read_config

log = logging.getLogger(__name__)
# Of which a route has its own; the paper's trunks have no layer norms.
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.LayerNorm)
INDICATORS = ("min", "max", "avg")
ROUNDINGS = ("floor", "near", "ceil")
BN_MODES = ("all", "authors", "frozen_bn")


def select_branch(width, height, *, indicator="max", rounding="ceil", resolutions=(7, 14, 28, 112)):
    """Resolution of the branch for a face of ``width`` x ``height`` pixels (paper 4.3.2, Figure 8).

    The indicator is min, max or the integer mean of the two sides. "floor" takes the largest
    resolution not above it, "ceil" the smallest not below it, "near" the closest; half-way (10.5,
    21, 70) goes to the larger. Beyond the smallest or largest resolution there is no choice. Works
    on numbers and on arrays alike.

    Raises:
        ConfigError: an unknown indicator or rounding, or a side below 1.
    """
    if indicator not in INDICATORS or rounding not in ROUNDINGS:
        told = f"expected {INDICATORS} + {ROUNDINGS}"
        raise ConfigError(f"branch selection {indicator}+{rounding}: {told}")
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
    """The first unit whose output has ``r`` rows: where a branch for r ends.

    See paper-and-code: coupling layer.

    Raises:
        ConfigError: the trunk has no layer of that resolution below its canonical size.
    """
    rows = trunk.resolutions()
    name = next((name for name, value in rows.items() if value == r), None)
    if name is None or r >= trunk.config.size[0]:
        below = {value for value in rows.values() if value < trunk.config.size[0]}
        below = sorted(below, reverse=True)
        raise ConfigError(f"resolution {r}: this trunk's feature pyramid offers {below}")
    return name


class Route(nn.Module):
    """B_r followed by T_r: normalised ``(B, 3, r, r')`` -> embedding ``(B, D)``, any length.

    ``branch`` (B_r) starts as a copy of the trunk's first units with every stride 1. ``shared`` and
    ``head`` (T_r) hold the trunk's own Parameters; only their norms (NORMS: affine and running
    statistics) are copies, one set for each resolution (paper 3.4). ``couple_at`` moves the end of
    the branch to any unit (Figure 7); units between it and the layer of resolution r then stay
    shared but run at stride 1.
    """

    def __init__(self, trunk: Backbone, r: int, *, couple_at: str | None = None) -> None:
        super().__init__()
        names = [name for name, _ in trunk.units()]
        joins = names.index(coupling_layer(trunk, r))
        self.r, self.couple_at = r, couple_at or names[joins]
        if self.couple_at not in names:
            units = ", ".join(names)
            raise ConfigError(f"couple_at: got {self.couple_at!r}, the trunk's units are {units}")
        ends = names.index(self.couple_at)
        self.branch, self.shared = nn.Sequential(), nn.Sequential()
        self.dropped: list[str] = []  # trunk weights that have no place in the branch
        for index, (name, unit) in enumerate(trunk.units()):
            copied = copy.deepcopy(unit) if index <= ends else share(unit)
            if index <= joins:
                self.dropped += [f"{name}.{weight}" for weight in copied.abandon_stride()]
            (self.branch if index <= ends else self.shared).add_module(name, copied)
        self.head = share(trunk.head)
        self.register_buffer("length", torch.ones(()))  # factor of embeddings, see follow_length
        self.size = scaled_size(r, trunk.config.size)  # rows, columns of the input
        if self.dropped:
            log.info("branch %d leaves out pretrained weights: %s", r, ", ".join(self.dropped))

    def parts(self) -> tuple[nn.Module, ...]:
        """What x goes through, in order."""
        return self.branch, self.shared, self.head

    def encode(self, x: Tensor) -> Tensor:
        """z_r = B_r(X_r) ``(B, C_r, r, r')``: what meets the trunk's map at the coupling layer."""
        return self.branch(x)

    def finish(self, z_r: Tensor) -> Tensor:
        """T_r(z_r), the embedding ``(B, D)``."""
        return embed_features(self.head, self.shared(z_r)) * self.length

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != (3, *self.size):
            expected = f"(B, 3, {self.size[0]}, {self.size[1]})"
            raise DataError(f"route {self.r}: got {tuple(x.shape)}, expected {expected}")
        return self.finish(self.encode(x))

    def shared_norms(self) -> Iterator[tuple[str, nn.Module]]:
        """(name, norm) of T_r, in order."""
        for part in ("shared", "head"):
            for name, module in getattr(self, part).named_modules():
                if isinstance(module, NORMS):
                    yield f"{part}.{name}", module

    def trainable(self, *, bn: str = "all", fix_trunk: bool = True) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name (paper-and-code: which batch norms learn).

        Args:
            bn: what moves in T_r: "all" BN affines (the paper), "authors" (not those of shortcuts
                and of the last BN1d), "frozen_bn" (none).
            fix_trunk: False lets all of T_r learn (Table 3; full fine-tuning).
        """
        if bn not in BN_MODES:
            raise ConfigError(f"bn: got {bn!r}, expected one of {', '.join(BN_MODES)}")
        if not fix_trunk:
            return dict(self.named_parameters())
        chosen = {f"branch.{name}": parameter for name, parameter in self.branch.named_parameters()}
        for name, norm in self.shared_norms():
            skipped = "shortcut" in name or name.endswith(".features")
            if bn == "all" or (bn == "authors" and not skipped):
                chosen |= {f"{name}.{leaf}": value for leaf, value in norm.named_parameters()}
        return chosen

    def own_state(self) -> dict[str, Tensor]:
        """What is stored: the branch, and T_r's BN affines and running statistics."""
        norms = {name for name, _ in self.shared_norms()}
        return {
            name: tensor
            for name, tensor in self.state_dict().items()
            if name.startswith("branch.") or name.rsplit(".", 1)[0] in norms or name == "length"
        }


def share(module: nn.Module) -> nn.Module:
    """A copy of ``module`` with the same Parameter objects, except those of NORMS: copies."""
    norms = [norm for norm in module.modules() if isinstance(norm, NORMS)]
    own = {id(parameter) for norm in norms for parameter in norm.parameters()}
    return copy.deepcopy(module, {id(p): p for p in module.parameters() if id(p) not in own})


class BTNet(nn.Module):
    """phi_bt: one trunk for faces of canonical size and one route for each lower resolution.

    Args:
        trunk: any Backbone; it is used, not copied.
        resolutions: rows of the branches, e.g. (28, 14, 7) as in the paper; 56 is possible too.
        couple_at: for a resolution, the unit where its branch ends, if not the standard one.
    """

    inference = ""  # what computes it, if not PyTorch (openvino.py)

    def __init__(
        self, trunk: Backbone, resolutions: Sequence[int] = (28, 14, 7), *,
        couple_at: dict[int, str] | None = None,
    ) -> None:  # fmt: skip
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
        """The network that takes faces of resolution r: a Route, or the trunk at canonical size."""
        if r == self.trunk.config.size[0]:
            return self.trunk
        if str(r) not in self.routes:
            raise ConfigError(f"resolution {r}: this BTNet has {self.resolutions}")
        return self.routes[str(r)]

    def input_size(self, r: int) -> tuple[int, int]:
        """Rows and columns of a face of resolution r."""
        self.route(r)
        return scaled_size(r, self.trunk.config.size)

    def forward(self, x: Tensor, r: int) -> Tensor:
        """Normalised faces of resolution r ``(B, 3, r, r')`` -> embeddings ``(B, D)``."""
        return self.route(r)(x)

    @torch.inference_mode()
    def embed(
        self, images: Sequence, *, select: str | Callable[[Tensor], int] = "max+ceil",
        how: Resize | None = None, precision: str = "fp32", batch_size: int = 64,
        normalise: bool = True, return_info: bool = False,
    ) -> Any:  # fmt: skip
        """Embed aligned faces of any sizes, each through its own branch, in the order given.

        Args:
            images: paths, PIL images, uint8 arrays ``(H, W, 3)`` or pixel tensors ``(3, H, W)`` in
                [0, 255], RGB; all are held in memory at the size of their branch.
            select: the rule of ``select_branch``, "max+ceil", "min+near", …; or a function of the
                pixels ``(3, H, W)`` that returns a resolution.
            precision: "fp32", or "bf16" or "auto" for autocast.
            normalise: to unit length, so that a dot product is the cosine.
            return_info: also return for each image a dict, see ``entrance``.

        Returns ``(len(images), D)`` float32 on the CPU [, list of dicts]. Raises DataError if an
        image is not a face image, with its place in the list.
        """
        faces, info = self._read(images, select, how)
        was_training = self.training
        self.eval()
        embeddings = torch.empty(len(faces), self.trunk.config.embedding)
        for r in self.resolutions:
            members = [i for i, facts in enumerate(info) if facts["r"] == r]
            for start in range(0, len(members), batch_size):
                batch = members[start : start + batch_size]
                embeddings[batch] = self._embed([faces[i] for i in batch], r, precision)
        self.train(was_training)
        if normalise:
            embeddings = nn.functional.normalize(embeddings)
        return (embeddings, info) if return_info else embeddings

    def _read(self, images: Sequence, select: Any, how: Resize | None) -> tuple[list, list[dict]]:
        """Each image at the size of its branch, and what `entrance` says of it."""
        faces, info = [], []
        for index, image in enumerate(images):
            face, facts = self.entrance(to_pixels(image, f"images[{index}]"), select, how)
            faces.append(face)
            info.append(facts)
        return faces, info

    def _embed(self, faces: Sequence[Tensor], r: int, precision: str) -> Tensor:
        """Faces of one branch, each ``(3, r, r')`` -> embeddings ``(B, D)`` on the CPU."""
        device = next(self.parameters()).device
        x = self.trunk.normalise(torch.stack(list(faces)).to(device))
        with autocast(device, precision):
            z = self(x.contiguous(memory_format=torch.channels_last), r)
        return z.float().cpu()

    def entrance(
        self, pixels: Tensor, select: str | Callable[[Tensor], int] = "max+ceil",
        how: Resize | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
        """The way in of a face ``(3, H, W)``: its pixels at the size of its branch, and facts.

        The facts: ``size`` (rows, columns of the picture), ``r``, and ``resize_factor`` (of rows,
        of columns). ``select`` as for ``embed``.
        """
        face = self.trunk.crop(pixels)
        rows, columns = face.shape[-2:]
        if callable(select):
            r = select(pixels)
        else:
            indicator, _, rounding = select.partition("+")
            rule = {"indicator": indicator, "rounding": rounding}
            r = select_branch(columns, rows, **rule, resolutions=self.resolutions)
        target = self.input_size(r)
        factor = (target[0] / rows, target[1] / columns)
        size = tuple(pixels.shape[-2:])
        return resize(face, target, how), {"size": size, "r": r, "resize_factor": factor}

    # ---- storage (paper 3.4): the trunk once, each resolution as its own small file ----

    def save(self, folder: Path | str, *, only: int | None = None) -> None:
        """Write ``trunk.safetensors`` and ``branch_<r>.safetensors``; ``only`` one branch."""
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

        ``folder`` is looked for as by ``files.find``: "demo" is the repository's ``data/demo``.

        Raises:
            CheckpointError: a file is missing, damaged, or a branch was trained on another trunk.
        """
        path = find(Path(folder) / "trunk.safetensors")
        folder = path.parent
        if not path.is_file():
            told = f"holds no BTNet ({path.name}); `btnet adapt --out {folder}` makes one"
            if folder.name == "demo":
                told += "; that of the repository is its data/demo, which no wheel holds"
            raise CheckpointError(f"{folder}: {told}")
        state, metadata = read_safetensors(path)
        btnet = cls(build_from(read_config(metadata, path), state, path), ())
        if resolutions is None:
            names = [path.stem for path in folder.glob("branch_[0-9]*.safetensors")]
            resolutions = sorted(int(name.removeprefix("branch_")) for name in names)
        digest = weights_digest(btnet.trunk)
        for r in resolutions:
            btnet._load_branch(folder / f"branch_{r}.safetensors", r, digest)
        return btnet

    def _load_branch(self, path: Path, r: int, digest: str) -> None:
        """Add the route of r from its file; ``digest`` is the trunk's."""
        state, metadata = read_safetensors(path)
        try:
            facts = {"couple_at": None, **json.loads(metadata.get("btnet_branch", "{}"))}
        except (ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path}: no usable description inside") from error
        if facts.get("r") != r or facts.get("trunk") != digest:
            of = f"a branch of resolution {facts.get('r')} for another trunk than this one"
            raise CheckpointError(f"{path}: {of}")
        route = self.add_route(r, couple_at=facts["couple_at"])
        differ = (route.own_state().keys() ^ state.keys()) - {"length"}  # older files have none
        if differ:
            first = ", ".join(sorted(differ)[:5])
            raise CheckpointError(f"{path}: tensors missing or unexpected: {first}")
        load_strictly(route, route.state_dict() | state, str(path))


def weights_digest(module: nn.Module) -> str:
    """SHA-256 over names and values of parameters and running statistics (no step counters)."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
