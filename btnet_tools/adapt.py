"""`btnet adapt`: branches for a trained recogniser: cost, training, comparison."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from btnet_core.data.faces import FaceSet, open_faces
from btnet_core.data.pairs import PairSet, draw_pairs, open_pairs
from btnet_core.data.sources import Spec, parse_spec, spec_text
from btnet_core.device import autocast, resolve_device
from btnet_core.errors import CheckpointError, ConfigError, DataError
from btnet_core.files import find, read_safetensors
from btnet_core.models.backbone import Backbone
from btnet_core.models.btnet import BTNet, coupling_layer, weights_digest
from btnet_core.models.costs import Cost, route_cost
from btnet_core.models.weights import load_backbone, read_config
from btnet_core.training import checkpoint, methods
from btnet_core.training.batches import Sampler, open_pixels
from btnet_core.training.classifier import save_classifier
from btnet_core.training.config import TrainConfig
from btnet_core.training.loop import train
from btnet_core.training.run import class_means
from btnet_paper import results
from btnet_tools.data import bad_images
from btnet_tools.evaluate import compare, table

# Chosen on the real faces of the scale lfw, on folds 1-5 of its pairs.
RECIPE: dict[str, Any] = {
    "batch": 128,  # images
    "lr": 0.5,  # at 512 images, scaled linearly with the batch
    "margin": 0.2,  # m of the influence loss; 0.5 asks too much of small faces
    "s": 32.0,  # of the influence loss
    "embedding": "cosine",  # the teacher's embedding is a second target (Deviation from Eq. 3)
    "embedding_weight": 60.0,  # of 1 - cosine, times lambda_branch
    "embedding_mirrored": True,  # that target is of the face and its mirror image
    "shift": 4.0,  # of 112 pixels, each way: faces are seldom aligned as well as those learnt from
}
# In its place for a trunk with layer norms: with SGD its branch forgets what the trunk has learned.
LAYER_NORMS: dict[str, Any] = {"optimiser": "adamw", "lr": 0.008, "warmup_epochs": 0.2}
EPOCHS = {56: 1, 28: 6, 14: 20, 7: 12}  # of the branch of r; 30 at 7 px learn faces by heart
MOST_EPOCHS = max(EPOCHS.values())
PAIR_COUNTS = (6000, 3000, 1000, 600, 300, 100, 40, 20)  # as many as the held-out people allow
FORWARD_AND_BACKWARD = 3  # times the MACs of the forward pass
TIMED = 16  # images of the timed step


@dataclass(frozen=True, kw_only=True)
class AdaptOptions:
    """How ``adapt`` works; the defaults are those of the command."""

    resolutions: Sequence[int] = (28, 14, 7)  # rows of the branches, in pixels
    labels: bool = True  # False: learn from the trunk alone
    pairs: Sequence[Spec] = ()  # compare on these specs of open_pairs; (): on held-out people
    percent: int = 10  # of the people, held out where no pairs are given
    adapter: type[Backbone] | None = None  # class of a trunk of one's own
    bgr: bool = False  # the trunk was trained on blue, green, red (BackboneConfig.channels)
    device: str = "auto"
    fresh: bool = False  # start over, whatever the folder holds
    skip_bad: bool = False  # leave out images that cannot be read, instead of refusing
    changes: Mapping[str, Any] = field(default_factory=dict)  # fields of TrainConfig

    @property
    def seed(self) -> int:
        """Of the training, and of who is held out."""
        seed = self.changes.get("seed", 0)
        if type(seed) is not int:
            raise ConfigError(f"seed: got {seed!r}, expected an integer")
        return seed


def adapt(
    trunk: Path | str, faces: Spec, out: Path | str, options: AdaptOptions | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:  # fmt: skip
    """Train a branch for each resolution on ``faces`` (a spec); write the BTNet into ``out``.

    Goes on where an earlier call stopped. Returns what ``compare`` measured, ``left_out`` (why each
    such image was) and ``seconds`` of this call.

    Raises:
        ConfigError, DataError, CheckpointError: before the first step. TrainingError: as ``train``.
    """
    began, out, options = time.monotonic(), Path(out), options or AdaptOptions()
    backbone = load_backbone(find(trunk), options.adapter, bgr=options.bgr)
    btnet = BTNet(backbone, sorted(options.resolutions, reverse=True))
    check_routes(btnet)
    faces, left_out = readable(parse_spec(faces), options.skip_bad, say)
    data, held = parts(faces, options)
    training = open_faces(data)
    if options.labels and len(training) == len(training.labels.unique()):
        raise DataError(f"{spec_text(faces)}: nobody has two images; use --no-labels")
    kappa = out / "train" / f"kappa-{training.checksum[-12:]}.safetensors"
    runs = plan(btnet, data, out, kappa, options)
    check_batches(runs, training)
    store_trunk(out, backbone)
    if not options.fresh:
        check_unchanged(runs, out, training)
    values = compare(btnet, held, ["before"], options.device)  # what cannot be read is told now
    say(forecast(runs, btnet, len(training), out, options))
    net = learn(runs, backbone, kappa, out, options)
    values |= compare(net, held, ["after"], options.device)
    say(table(values))
    values |= {"left_out": left_out, "seconds": time.monotonic() - began}
    about = {"data": training.checksum, "kernel": runs[0].resize.name, "seed": options.seed}
    results.record(out, "adapt", values, config=runs[0], **about)
    return values


def readable(faces: Spec, skip_bad: bool, say: Callable[[str], None]) -> tuple[Spec, list[str]]:
    """The spec of the images that can be read, and why each of the others cannot."""
    bad = bad_images(open_faces(faces), skip_bad)
    if not bad:
        return faces, []
    say("\n".join([f"left out {len(bad)} images that cannot be read:", *bad.values()]))
    return {"kind": "without", "faces": faces, "images": sorted(bad)}, list(bad.values())


def parts(faces: Spec, options: AdaptOptions) -> tuple[Spec, list[PairSet | FaceSet]]:
    """The spec of the faces to learn from, and the opened sets to compare on: nobody is in both.

    As many pairs are drawn as the held-out people allow; where they allow none, the held-out faces.
    """
    if options.pairs:
        return faces, [open_pairs(spec) for spec in options.pairs]
    part = {"kind": "part", "faces": faces, "percent": options.percent, "seed": options.seed}
    rest, held = {**part, "held": False}, open_faces({**part, "held": True})
    for count in PAIR_COUNTS:
        try:
            return rest, [draw_pairs(held, count, options.seed)]
        except DataError:
            continue
    return rest, [held]


def plan(
    btnet: BTNet, data: Spec, out: Path, kappa: Path, options: AdaptOptions
) -> list[TrainConfig]:
    """The training of each branch, the largest first: phi_bt, or distillation alone without labels.

    Raises:
        ConfigError: a change names no field of TrainConfig, or has a value that cannot work.
    """
    runs, trunk = [], str(out / "trunk.safetensors")
    layer_norms = any(isinstance(one, nn.LayerNorm) for one in btnet.trunk.modules())
    recipe = RECIPE | (LAYER_NORMS if layer_norms else {})
    for r in btnet.resolutions[-2::-1]:
        run = methods.distillation_only(data, r, trunk)
        if options.labels:
            run = methods.phi_bt(data, r, trunk, str(kappa))
        own = {"name": f"branch_{r}", "btnet": str(out), "epochs": EPOCHS.get(r, MOST_EPOCHS)}
        fields = {**run.to_dict(), **recipe, **own, **options.changes}
        runs.append(TrainConfig.from_dict(fields))
    return runs


def learn(
    runs: Sequence[TrainConfig], backbone: Backbone, kappa: Path, out: Path, options: AdaptOptions
) -> BTNet:
    """Class means where they lack, then each branch; returns the BTNet."""
    device = resolve_device(options.device)
    if options.labels and not kappa.is_file():
        pixels = open_pixels(runs[0].data, runs[0].workers)
        save_classifier(kappa, class_means(backbone.to(device), pixels, device, "fp32"))
    for run in runs:
        train(run, place_of(out, run), device=options.device, fresh=options.fresh)
    return BTNet.load(out, [run.resolution for run in runs])


def check_routes(btnet: BTNet) -> None:
    """Run every branch once: it must meet the trunk's feature map at its coupling layer.

    Raises:
        ConfigError: another shape, as where a unit down-samples in its own code.
    """
    trunk = btnet.trunk.eval()
    size = trunk.config.size
    if size[0] != 112:
        raise ConfigError(f"size: the trunk works at {size}, faces are read with 112 rows")
    maps = {name: z.shape for name, z in trunk.features(torch.zeros(1, 3, *size))}
    for r, route in btnet.routes.items():
        z = route.eval().encode(torch.zeros(1, 3, *route.size))
        wanted = maps[coupling_layer(trunk, int(r))]
        if z.shape != wanted:
            raise ConfigError(
                f"branch {r}: gives {tuple(z.shape[1:])} where the trunk has {tuple(wanted[1:])} "
                f"after {route.couple_at}; a unit down-samples in its own code: override "
                "abandon_stride in the adapter's unit"
            )


def check_batches(runs: Sequence[TrainConfig], faces: FaceSet) -> None:
    """Raise ConfigError for a batch that cannot be drawn from ``faces``."""
    for run in runs:
        Sampler(faces.labels, run)


def store_trunk(out: Path, backbone: Backbone) -> None:
    """Write ``out/trunk.safetensors``, or check that it holds the same weights.

    Raises:
        CheckpointError: ``out`` holds branches of another trunk.
        WriteError: it cannot be written.
    """
    file = out / "trunk.safetensors"
    if not file.is_file():
        BTNet(backbone, ()).save(out)
        return
    metadata = read_safetensors(file)[1]
    same = metadata.get("digest") == weights_digest(backbone)
    if not same or read_config(metadata, file) != backbone.config:
        raise CheckpointError(f"{out}: holds branches of another trunk; choose another folder")


def place_of(out: Path, run: TrainConfig) -> Path:
    """The folder of a branch's training."""
    return out / "train" / f"branch_{run.resolution}"


def check_unchanged(runs: Sequence[TrainConfig], out: Path, faces: FaceSet) -> None:
    """What ``out`` holds of an earlier call, finished or not, must be of this recipe and faces.

    Raises:
        ConfigError: naming what differs, before any branch is trained.
    """
    for run in runs:
        place = place_of(out, run)
        record = checkpoint.read_record(place)
        state = None if record else checkpoint.load_state(place)
        if old := record or (state and checkpoint.identity_in(state)):
            files = checkpoint.contents(old)  # they are of ``out`` itself
            inputs = {run.init: files["init"], run.classifier: files["classifier"]}
            new = {"config": run.to_dict(), "inputs": {**inputs, "data": faces.checksum}}
            if record:
                checkpoint.check_finished(record, new, place)
            else:
                checkpoint.check_same(old, new, place, checkpoint.RESUMED)


def forecast(
    runs: Sequence[TrainConfig], btnet: BTNet, faces: int, out: Path, options: AdaptOptions
) -> str:
    """What each branch stores, and about how long it takes: MACs at the speed of a timed step."""
    trunk = route_cost(btnet, btnet.resolutions[-1])
    speed = macs_per_second(btnet.to(resolve_device(options.device)), trunk)
    name = btnet.trunk.config.name
    lines = [f"trunk: {name}, {trunk.stored:,} parameters, stays as it is; {faces:,} faces"]
    total = 0.0
    for run in runs:
        cost, steps = route_cost(btnet, run.resolution), run.epochs * (faces // run.batch)
        left = 1.0 if options.fresh else what_is_left(place_of(out, run), steps)
        macs = FORWARD_AND_BACKWARD * cost.macs * steps * run.batch
        macs += trunk.macs * teacher_passes(run, steps, faces)
        seconds = left * macs / speed
        total += seconds
        lines.append(
            f"branch {run.resolution}: stores {cost.stored:,} parameters ({100 * cost.share:.1f} % "
            f"of the trunk), {4 * (cost.stored + cost.running) / 1e6:.1f} MB; "
            f"{steps:,} steps of {run.batch}, {100 * (1 - left):.0f} % done, {duration(seconds)}"
        )
    return "\n".join([*lines, f"in all {duration(total)}, and the comparison"])


def what_is_left(place: Path, steps: int) -> float:
    """The fraction of a training that is still to be done."""
    if checkpoint.read_record(place):
        return 0.0
    state = checkpoint.load_state(place)
    return 1 - state["step"] / steps if state else 1.0


def teacher_passes(run: TrainConfig, steps: int, faces: int) -> int:
    """How many images the trunk embeds: each face and its mirror image once where they are kept."""
    every = steps * run.batch * (2 if run.embedding_mirrored else 1)
    return every if run.cache == "off" or run.epochs <= 2 else min(every, 2 * faces)


def macs_per_second(btnet: BTNet, trunk: Cost) -> float:
    """MACs of one forward and backward pass of the trunk, divided by its seconds."""
    device = next(btnet.parameters()).device
    x = torch.zeros(TIMED, 3, *btnet.trunk.config.size, device=device)
    for _ in range(2):  # the first warms up
        start = time.perf_counter()
        with autocast(device):
            z = btnet.trunk.eval()(x)
        z.sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    btnet.zero_grad()
    return FORWARD_AND_BACKWARD * TIMED * trunk.macs / seconds


def duration(seconds: float) -> str:
    """About how long, in seconds or minutes."""
    return f"about {seconds:.0f} s" if seconds < 90 else f"about {seconds / 60:,.0f} min"
