"""Give a trained recogniser its branches: what it will cost, the training of each branch, what it brought."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch.nn import functional as F

from btnet_core.data.faces import FaceSet, open_faces
from btnet_core.data.pairs import PairSet, open_pairs
from btnet_core.data.sources import Spec
from btnet_core.device import resolve_device
from btnet_core.errors import CheckpointError, ConfigError, DataError
from btnet_core.evaluation.embedders import BranchEmbedder, UpsamplingEmbedder
from btnet_core.evaluation.verification import evaluate_pairs
from btnet_core.files import read_safetensors
from btnet_core.models.backbone import Backbone, load_backbone
from btnet_core.models.btnet import BTNet, coupling_layer, weights_digest
from btnet_core.models.costs import measure_time, route_cost
from btnet_core.training import checkpoint, methods
from btnet_core.training.batches import cache_place, open_pixels
from btnet_core.training.classifier import class_means, save_classifier
from btnet_core.training.config import TrainConfig
from btnet_core.training.loop import _batches, train
from btnet_core.training.step import embed_all, prepare
from btnet_paper import results

PAIR_COUNTS = (6000, 3000, 1000, 600, 300, 100, 40, 20)  # as many as the held-out people allow
FIDELITY_FACES = (
    1000  # held-out faces compared with the trunk's own embedding, where no pairs can be drawn
)


def adapt(
    trunk: str, faces: Spec, out: Path | str, *, resolutions: Sequence[int] = (28, 14, 7), labels: bool = True,
    pairs: Sequence[Spec] = (), percent: int = 10, adapter: type[Backbone] | None = None, device: str = "auto",
    fresh: bool = False, say: Callable[[str], None] = print, **changes: Any,
) -> dict[str, Any]:  # fmt: skip
    """Train a branch for each resolution on ``faces`` (a spec of open_faces) and write the BTNet into ``out``.

    The recipe is ``methods.adapted``; ``changes`` are fields of TrainConfig. Goes on where an earlier call stopped.
    Without ``pairs`` (specs of open_pairs), ``percent`` of the identities are held out for the comparison.

    Returns:
        What ``compare`` measured, and ``seconds`` of this call.

    Raises:
        ConfigError, DataError, CheckpointError: before the first step; TrainingError: see ``train``.
    """
    began, out = time.monotonic(), Path(out)
    backbone, seed = load_backbone(trunk, adapter), int(changes.get("seed", 0))
    btnet = BTNet(backbone, sorted(resolutions, reverse=True))
    check_routes(btnet)
    if unknown := changes.keys() - {field.name for field in fields(TrainConfig)}:
        raise ConfigError(
            f"recipe: no field {sorted(unknown)}; known: {[field.name for field in fields(TrainConfig)]}"
        )
    part = {"kind": "part", "faces": faces, "percent": percent, "seed": seed}
    data = faces if pairs else {**part, "held": False}
    held = list(pairs) or [_held_pairs({**part, "held": True}, seed)]
    training, opened = (
        open_faces(data),
        [_open(spec) for spec in held],
    )  # whatever cannot be read is told now
    if labels and len(training) == training.num_identities:
        raise DataError(
            f"{faces}: every identity has a single image, nothing tells people apart; use --no-labels"
        )
    _store_trunk(out, backbone)
    kappa = out / "train" / f"kappa-{training.checksum[-12:]}.safetensors"
    changes = {"btnet": str(out), **changes}
    runs = [
        methods.adapted(
            data, r, str(out / "trunk.safetensors"), str(kappa) if labels else "", **changes
        )
        for r in btnet.resolutions[-2::-1]
    ]
    place, compared = (
        resolve_device(device),
        sum(one.num_images if isinstance(one, PairSet) else len(one) for one in opened),
    )
    say(
        forecast(
            runs, btnet.to(place), training, out, fresh, labels and not kappa.is_file(), compared
        )
    )
    if labels and not kappa.is_file():
        z = embed_all(backbone, open_pixels(data, runs[0].workers), place, "fp32")
        save_classifier(kappa, class_means(z, training.labels, training.num_identities))
    for run in runs:
        train(run, _place(out, run), device=device, fresh=fresh)
    found = compare(BTNet.load(out, [run.resolution for run in runs]), held, device=device)
    say(report(found))
    worse = [
        r for r in btnet.resolutions[:-1] if _own(found["after"], r) < _own(found["before"], r)
    ]
    if worse:
        say(
            f"branches {worse} are no gain yet: more faces, or more epochs in a new folder (--set epochs=20)"
        )
    values = {**found, "seconds": time.monotonic() - began}
    results.record(
        out,
        "adapt",
        values,
        config=runs[0],
        data=training.checksum,
        kernel=runs[0].resize.name,
        seed=seed,
    )
    return values


def check_routes(btnet: BTNet) -> None:
    """Run every branch once: it must meet the trunk's feature map at its coupling layer.

    Raises:
        ConfigError: another shape, as where a unit down-samples in its own code.
    """
    trunk = btnet.trunk
    if trunk.config.size[0] != 112:
        raise ConfigError(
            f"size: the trunk works at {trunk.config.size}, faces are read with 112 rows"
        )
    maps = {
        name: z.shape for name, z in trunk.eval().features(torch.zeros(1, 3, *trunk.config.size))
    }
    for r, route in btnet.routes.items():
        z = route.eval().encode(torch.zeros(1, 3, *route.size))
        if z.shape != maps[coupling_layer(trunk, int(r))]:
            raise ConfigError(
                f"branch {r}: gives {tuple(z.shape[1:])} where the trunk has {tuple(maps[str(route.couple_at)][1:])} after "
                f"{route.couple_at}; a unit down-samples in its own code: override abandon_stride in the adapter's unit"
            )


def _store_trunk(out: Path, backbone: Backbone) -> None:
    if not (out / "trunk.safetensors").is_file():
        try:
            BTNet(backbone, ()).save(out)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"--out {out}: cannot be written ({error})") from error
    elif read_safetensors(out / "trunk.safetensors")[1].get("digest") != weights_digest(backbone):
        raise CheckpointError(
            f"{out}: holds branches of another trunk; choose another folder for this one"
        )


def _place(out: Path, run: TrainConfig) -> Path:
    return out / "train" / f"branch_{run.resolution}"


def _held_pairs(held: Spec, seed: int) -> Spec:
    """Spec of as many pairs as the held-out people allow; of the held-out faces alone where they allow none."""
    for count in PAIR_COUNTS:
        spec = {"kind": "drawn", "faces": held, "count": count, "seed": seed}
        try:
            open_pairs(spec)
            return spec
        except DataError:
            continue
    return held


# ---- before: what it will take ------------------------------------------------------------------------------------


def forecast(
    runs: Sequence[TrainConfig],
    btnet: BTNet,
    faces: FaceSet,
    out: Path,
    fresh: bool,
    means: bool,
    compared: int,
) -> str:
    """Storage, and time measured on a few steps of each branch; ``means``: class means too; ``compared`` images after."""
    whole, device = (
        sum(p.numel() for p in btnet.trunk.parameters()),
        next(btnet.parameters()).device,
    )
    lines = [
        f"trunk: {btnet.trunk.config.name}, {whole:,} parameters, stays as it is; {len(faces):,} faces"
    ]
    each = (
        measure_time(btnet, 112, device=device, batch_size=16, repeats=2, warmup=1)["median"] / 1e3
    )
    more = each * (
        means * len(faces) + 2 * compared * (2 * len(runs) + 1)
    )  # mirrored too; a branch costs at most a trunk
    total = more
    for run in runs:
        cost, place = route_cost(btnet, run.resolution), _place(out, run)
        seconds, steps, where = _measure(run, out, device, len(faces))
        state = None if fresh else checkpoint.load_state(place)
        left = (
            0.0
            if not fresh and checkpoint.read_record(place)
            else 1 - (state["step"] / steps if state else 0)
        )
        total += left * seconds
        done = {1.0: "", 0.0: ", done"}.get(left, f", {100 * (1 - left):.0f} % done")
        lines.append(
            f"branch {run.resolution}: stores {cost.stored:,} parameters ({100 * cost.share:.1f} % of the trunk) and "
            f"{cost.running:,} statistics, {4 * (cost.stored + cost.running) / 1e6:.1f} MB; {steps:,} steps of "
            f"{run.batch}, about {_minutes(left * seconds)}{done}; {where}"
        )
    what = "the comparison" + " and class means" * means
    return "\n".join([*lines, f"in all about {_minutes(total)}, {_minutes(more)} of it for {what}"])


def _measure(
    run: TrainConfig, out: Path, device: torch.device, count: int, steps: int = 3
) -> tuple[float, int, str]:
    """Seconds that a run takes from its start, its steps, and where the teacher's features will be."""
    trial = prepare(
        run.replace(classifier="fresh", fix_classifier=False, validation=()), out, device
    )
    row = trial.branch_rows(trial.pixels.get(torch.arange(1)).to(device))
    size = sum(2 * count * part.numel() * part.element_size() for part in row)
    place, where = cache_place(run.cache, size, run.epochs, out)
    trial.modes(training=True)
    inputs, rest = [], []
    for _, (batch, pixels) in zip(range(steps + 1), _batches(trial), strict=False):
        start = time.perf_counter()
        x, teacher = trial.inputs(batch, pixels)
        middle = _now(device)
        trial.optimiser.zero_grad(set_to_none=True)
        sum(trial.losses(batch, x, teacher).values()).backward()  # type: ignore[union-attr]
        trial.optimiser.step()
        inputs.append(middle - start)
        rest.append(_now(device) - middle)
    passes = trial.total if place == "off" else 2 * count / run.batch
    each = (
        np.median(inputs[1:] or inputs) * passes + np.median(rest[1:] or rest) * trial.total
    )  # the first warms up
    return float(each), trial.total, where


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _minutes(seconds: float) -> str:
    value, unit = (seconds, "s") if seconds < 90 else (seconds / 60, "min")
    return f"{value:.0f} {unit}"


# ---- after: what it brought ---------------------------------------------------------------------------------------


def compare(
    btnet: BTNet, held: Sequence[Spec], *, baseline: bool = True, device: str = "auto"
) -> dict[str, Any]:
    """Before (faces scaled up to the trunk) and after (branches), at every pair of resolutions.

    Returns:
        ``pairs`` (what it was measured on), ``before`` and ``after``: {"112&14": %, …}, ``thresholds`` of ``after``.
        Where ``held`` is a face set and no pairs, the numbers are the mean cosine to the trunk's own embedding of the
        face at full size.
    """
    embedders: dict[str, Any] = (
        {"before": UpsamplingEmbedder(btnet.trunk, device=device)} if baseline else {}
    )
    embedders["after"] = BranchEmbedder(btnet, device=device)
    opened = [_open(spec) for spec in held]
    if isinstance(faces := opened[0], FaceSet):
        found = {
            name: _fidelity(embedder, faces, btnet.resolutions)
            for name, embedder in embedders.items()
        }
        return {
            "pairs": [faces.name],
            "measure": "cosine to the full-size face",
            **found,
            "thresholds": {},
        }
    settings = list(combinations_with_replacement(reversed(btnet.resolutions), 2))
    sets = [one for one in opened if isinstance(one, PairSet)]
    found, thresholds = {}, {}
    for name, embedder in embedders.items():
        reports = [evaluate_pairs(embedder, one, settings) for one in sets]
        found[name] = {
            key: float(np.mean([one[key]["accuracy"] for one in reports])) for key in reports[0]
        }
        thresholds = {
            key: float(
                np.mean([way["thresholds"] for one in reports for way in one[key]["directions"]])
            )
            for key in reports[0]
        }
    return {
        "pairs": [one.name for one in sets],
        "measure": "accuracy (%)",
        **found,
        "thresholds": thresholds,
    }


def _open(spec: Spec) -> FaceSet | PairSet:
    faces = not isinstance(spec, str) and spec.get("kind") == "part"
    return open_faces(spec) if faces else open_pairs(spec)


def _fidelity(embedder: Any, faces: FaceSet, resolutions: Sequence[int]) -> dict[str, float]:
    pixels = faces.images(range(min(len(faces), FIDELITY_FACES)))
    whole = embedder(pixels, resolutions[-1])
    return {
        str(r): float(F.cosine_similarity(embedder(pixels, r), whole).mean())
        for r in resolutions[-2::-1]
    }


def _own(found: dict[str, float], r: int) -> float:
    return found.get(f"{r}&{r}", found.get(str(r), 0.0))


def report(found: dict[str, Any]) -> str:
    """A table of what ``compare`` returned, full size against each resolution and each against itself first."""
    ways = {"before": "scaled up to the trunk", "after": "through the branch"}
    keys = sorted(
        found["after"],
        key=lambda key: not (key.startswith("112&") or len(set(key.split("&"))) == 1),
    )
    lines = [
        f"{found['measure']} on {', '.join(found['pairs'])}",
        " " * 24 + "".join(f"{key:>9}" for key in keys),
    ]
    digits = 2 if "%" in found["measure"] else 3
    for name in (name for name in ways if name in found):
        lines.append(
            f"{ways[name]:<24}" + "".join(f"{found[name][key]:9.{digits}f}" for key in keys)
        )
    return "\n".join(lines)
