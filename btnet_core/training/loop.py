"""Training: ``train`` runs a configuration in a folder from wherever it stands to its end; ``fit`` is the loop."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from btnet_core.data.faces import open_faces
from btnet_core.data.pairs import PairSet, open_pairs
from btnet_core.data.sources import spec_text
from btnet_core.errors import CheckpointError, ConfigError, TrainingError
from btnet_core.evaluation.embedders import BranchEmbedder, Embedder, UpsamplingEmbedder
from btnet_core.evaluation.verification import evaluate_pairs
from btnet_core.files import lock, read_safetensors, write_safetensors
from btnet_core.models.backbone import save_backbone
from btnet_core.models.btnet import BTNet, Route, weights_digest
from btnet_core.training import checkpoint, distributed
from btnet_core.training.batches import Batch, TeacherCache, cache_place
from btnet_core.training.classifier import save_classifier
from btnet_core.training.config import TrainConfig
from btnet_core.training.progress import Progress
from btnet_core.training.step import Run, describe, prepare

MACHINE = frozenset(
    {"workers", "checkpoint_seconds", "cache", "cache_dir"}
)  # settings that change no result


def fit(run: Run, progress: Progress) -> None:
    """Train from ``run.step`` to the end: load, forward, backward, sum, clip, check, step, tell, save."""
    config, steps = run.config, run.sampler.steps
    network = list(run.trainable.values())
    saved = time.monotonic()
    run.modes(training=True)
    with _interruptible() as stop:
        for batch, pixels in _batches(run):
            lr = config.lr_at(run.step, steps)
            for group in run.optimiser.param_groups:
                group["lr"] = lr
            parts = run.losses(batch, *run.inputs(batch, pixels))
            run.optimiser.zero_grad(set_to_none=True)
            (sum(parts.values()) * run.scaler.scale).backward()
            distributed.sum_gradients(network)
            norm = _clip(network, config.clip_norm, run)
            values = _values(parts, norm, stop)
            _check_finite(run, values, batch, lr)
            if run.scaler.passes(math.isfinite(values["norm"])):
                run.optimiser.step()
            run.step += 1
            if run.scaler.enabled:
                progress.extra = {
                    "loss_scale": run.scaler.scale,
                    "skipped_steps": run.scaler.skipped,
                }
            progress.step(
                run.step, {k: v for k, v in values.items() if k != "stop"}, lr, config.batch
            )
            ended = run.step % steps == 0
            if (
                ended
                and config.validate_epochs
                and (run.step // steps) % config.validate_epochs == 0
                and run.step < run.total
            ):
                validate(run, progress)
            if ended or values["stop"] or _due(run, saved):
                run.save()
                saved = time.monotonic()
            if values["stop"]:
                progress.say(f"{config.name}: stopped at step {run.step}, checkpoint saved")
                raise KeyboardInterrupt


def _batches(run: Run) -> Iterator[tuple[Batch, Tensor | None]]:
    batches = (run.sampler.batch(step) for step in range(run.step, run.total))
    cached = run.cache is not None and not run.config.shift
    return ((batch, None) for batch in batches) if cached else run.pixels.stream(batches)


def _clip(network: list[nn.Parameter], limit: float, run: Run) -> Tensor:
    """Unscale all gradients, clip the network's to norm ``limit``; returns that norm before clipping.

    It is not finite when any gradient is not, the classifier's included.
    """
    gradients = [p.grad for p in network if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients) / run.scaler.scale
    torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0) / run.scaler.scale)
    if run.kappa is not None and run.kappa.weight.grad is not None:
        run.kappa.weight.grad /= run.scaler.scale
        norm = norm + 0 * distributed.all_sum(run.kappa.weight.grad.square().sum())
    return norm


def _values(parts: dict[str, Tensor], norm: Tensor, stop: threading.Event) -> dict[str, float]:
    """Loss parts of the whole batch, gradient norm and whether any process was asked to stop; one synchronisation."""
    names = [*parts, "norm", "stop"]
    n = distributed.world()
    mine = [
        value.detach().float() / (n if name == "influence" else 1) for name, value in parts.items()
    ]
    mine += [norm.float() / n, norm.new_tensor(float(stop.is_set()))]
    values = dict(zip(names, distributed.all_sum(torch.stack(mine)).tolist(), strict=True))
    return {"loss": sum(values[name] for name in parts), **values}


def _check_finite(run: Run, values: dict[str, float], batch: Batch, lr: float) -> None:
    """Stop before a bad step is taken.

    Raises:
        TrainingError: with step, learning rate, loss parts, norms and the records of the batch.
    """
    overflow = run.scaler.scale > 1  # of fp16 gradients: the step is skipped and the scale halved
    if math.isfinite(values["loss"]) and (math.isfinite(values["norm"]) or overflow):
        run.norms.append(values["norm"])
        return
    weights = torch.nn.utils.get_total_norm([p.detach() for p in run.trainable.values()]).item()
    before = ", ".join(f"{norm:.4g}" for norm in run.norms)
    shown = ", ".join(f"{key} {value:.4g}" for key, value in values.items() if key != "stop")
    raise TrainingError(
        f"{run.config.name}: not finite at step {run.step + 1} (epoch {run.step / run.sampler.steps:.2f}), lr {lr:.4g}: "
        f"{shown}; gradient norms before it {before}; norm of the weights {weights:.4g}; records {batch.records.tolist()}. "
        f"The last checkpoint is kept in {run.out / checkpoint.STATE}"
    )


def _due(run: Run, saved: float) -> bool:
    due = time.monotonic() - saved >= run.config.checkpoint_seconds
    if distributed.world() == 1:
        return due
    return bool(
        distributed.all_sum(torch.tensor(float(due), device=run.device)).item()
    )  # all at the same step


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set the event, so that the step in progress ends and is saved; a second one stops at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(number: int, frame: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, action in old.items():
            signal.signal(number, action)


# ---- from a configuration to a finished folder ------------------------------------------------------------------


def train(
    config: TrainConfig,
    out: Path | str,
    *,
    device: str = "auto",
    fresh: bool = False,
    show: str = "auto",
) -> dict[str, Any]:
    """Train what ``config`` says in folder ``out``; go on from its checkpoint; return at once if it is finished.

    Args:
        device: "auto", "cpu", "cuda", …; under torchrun each process takes its own.
        fresh: forget what ``out`` holds.
        show: see ``Progress``.

    Returns:
        Of the last steps: loss parts; ``seconds`` (all sessions), ``images_per_second``, ``parameters`` (that learnt),
        ``validation`` (accuracy in % for each "r1&r2", last evaluation), ``config``.

    Raises:
        ConfigError, CheckpointError, DataError: before the first step. TrainingError: it had to stop.
        KeyboardInterrupt: it was stopped; a checkpoint is saved.
    """
    out, chosen = Path(out), distributed.start(device)
    torch.set_float32_matmul_precision(config.matmul)
    torch.backends.cudnn.allow_tf32 = config.matmul != "highest"  # convolutions, too
    identity = {"config": json.loads(config.to_json()), "inputs": _inputs(config)}
    record = None if fresh else checkpoint.read_record(out)
    if record and record["inputs"] == identity["inputs"]:
        changed = _changed(_complete(record["config"]), identity["config"], MACHINE)
        if not changed:
            return record["metrics"]
    checkpoint.check_room(out, 0)
    with lock(out) if distributed.rank() == 0 else nullcontext():
        distributed.wait()  # every process has read the record before the first one removes it
        if fresh or record:  # asked for again, or finished with another configuration: start over
            checkpoint.forget(out)
        try:
            return _train(config, out, chosen, identity, show)
        except (OSError, SafetensorError) as error:
            raise checkpoint.unwritten(out, error, out / checkpoint.STATE) from error


def _train(
    config: TrainConfig, out: Path, device: torch.device, identity: dict[str, Any], show: str
) -> dict[str, Any]:
    run = prepare(config, out, device)
    folder = btnet_folder(run)
    numbers = sum(tensor.numel() for tensor in run.network.state_dict().values())
    numbers += run.kappa.num_classes * run.trunk.config.embedding if run.kappa is not None else 0
    checkpoint.check_room(out, 8 * numbers)  # float32, and as many momenta
    state = checkpoint.load_state(out)
    if state is not None:
        _check_same(_complete(json.loads(state["config"])), identity["config"], out)
        run.restore(state)
    show = show if distributed.rank() == 0 else "none"
    progress = Progress(
        out,
        config.name,
        run.total,
        run.step,
        run.sampler.steps,
        show=show,
        speak=distributed.rank() == 0,
    )
    progress.say(describe(run))
    try:
        _fill_cache(run, progress)
        fit(run, progress)
        validate(run, progress)
        return _finish(run, progress, identity, folder)
    finally:
        progress.close()


def _inputs(config: TrainConfig) -> dict[str, str]:
    """Digests of what the configuration names: a finished run is only that of the same inputs."""
    files = [
        path
        for path in (config.init, config.classifier)
        if path not in ("", "fresh", "class_means")
    ]
    return {
        "data": open_faces(config.data).checksum,
        **{path: checkpoint.fingerprint(path) for path in files},
    }


def _complete(config: dict[str, Any]) -> dict[str, Any]:
    """A recorded configuration with the fields that came after it, at their defaults."""
    try:
        return json.loads(TrainConfig.from_json(json.dumps(config)).to_json())
    except ConfigError:  # a field that is gone: another configuration
        return config


def _changed(old: dict[str, Any], new: dict[str, Any], free: frozenset[str]) -> list[str]:
    """The fields that differ, but for those in ``free``."""
    keys = (old.keys() | new.keys()) - free
    return [
        f"{key} {old.get(key)!r} -> {new.get(key)!r}"
        for key in keys
        if old.get(key) != new.get(key)
    ]


def _check_same(old: dict[str, Any], new: dict[str, Any], out: Path) -> None:
    """Going on from a checkpoint is only allowed where the result is what the configuration says."""
    changed = _changed(
        old, new, MACHINE | {"validation", "validation_resolutions", "validate_epochs", "name"}
    )
    if changed:
        raise ConfigError(
            f"{out}: its checkpoint is of another configuration ({'; '.join(sorted(changed))}); "
            "choose another folder, or start over with fresh=True (--fresh)"
        )


def _fill_cache(run: Run, progress: Progress) -> None:
    """Compute the teacher's features of every face once, where that pays and fits."""
    config = run.config
    if not config.resolution or config.cache == "off":
        return
    row = run.branch_rows(run.pixels.get(torch.arange(1)).to(run.device))
    count = len(run.pixels.faces.labels)
    size = sum(2 * count * part.numel() * part.element_size() for part in row)
    folder = Path(config.cache_dir or run.out / "cache")
    place, text = ("memmap", f"inputs and teacher features: {size / 1e6:.1f} MB, kept in {folder} for other runs") if \
        config.cache_dir else cache_place(config.cache, size, config.epochs, run.out)  # fmt: skip
    facts = (weights_digest(run.trunk), run.pixels.faces.checksum, run.network.couple_at, config.resize.name,
             run.precision, [(tuple(part.shape), part.dtype) for part in row])  # fmt: skip
    folder /= hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    progress.say(f"{config.name}: {text}")
    if place != "off":
        run.cache = TeacherCache(
            run.pixels, count, run.branch_rows, folder if place == "memmap" else None, run.device
        )


def btnet_folder(run: Run) -> Path | None:
    """Where the finished branch goes; None where the result is not a branch of a shared trunk.

    Raises:
        CheckpointError: the folder holds a BTNet with another trunk.
    """
    if not (isinstance(run.network, Route) and run.config.fix_trunk):
        return None
    folder = Path(run.config.btnet or run.out / "btnet")
    if (folder / "trunk.safetensors").is_file():
        _, metadata = read_safetensors(folder / "trunk.safetensors")
        if metadata.get("digest") != weights_digest(run.trunk):
            raise CheckpointError(
                f"{folder}: holds a BTNet with another trunk than {run.config.init or 'this one'}"
            )
    return folder


def validate(run: Run, progress: Progress) -> None:
    """Verification accuracy in % at 112&r and r&r on each of the configured pair sets (first process alone)."""
    config = run.config
    if not config.validation:
        return
    distributed.average_statistics(run.network)
    if distributed.rank() == 0:
        size = run.trunk.config.size[0]
        resolutions = (
            (size, config.resolution) if config.resolution else config.validation_resolutions
        )
        settings = list(
            dict.fromkeys([(size, r) for r in resolutions] + [(r, r) for r in resolutions])
        )
        embedder = _embedder(run)
        row: dict[str, Any] = {
            "step": run.step,
            "epoch": run.step / run.sampler.steps,
            "accuracy": {},
        }
        for spec in config.validation:
            report = evaluate_pairs(embedder, _pairs(spec_text(spec)), settings, how=config.resize)
            row["accuracy"][spec_text(spec)] = {name: value["accuracy"] for name, value in report.items()}
        run.validation.append(row)
        progress.write({"step": run.step, "validation": row["accuracy"]})
        progress.say(f"{config.name}: epoch {row['epoch']:.4g} accuracy " + ", ".join(
            f"{name} {value:.2f}" for name, value in mean_accuracy(row).items()))  # fmt: skip
    run.modes(training=True)


def mean_accuracy(row: dict[str, Any]) -> dict[str, float]:
    """Accuracy at each "r1&r2", averaged over the pair sets."""
    sets = list(row["accuracy"].values())
    return {name: sum(one[name] for one in sets) / len(sets) for name in sets[0]}


@lru_cache(maxsize=8)
def _pairs(spec: str) -> PairSet:
    return open_pairs(spec)


def _embedder(run: Run) -> Embedder:
    options = {"how": run.config.resize, "device": str(run.device), "precision": run.precision}
    if not isinstance(run.network, Route):
        return UpsamplingEmbedder(run.trunk, **options)
    btnet = BTNet(run.trunk, ())
    btnet.routes[str(run.config.resolution)] = run.network
    return BranchEmbedder(btnet, **options)


def _finish(
    run: Run, progress: Progress, identity: dict[str, Any], folder: Path | None
) -> dict[str, Any]:
    """Write the weights and the record; returns the metrics."""
    config, out = run.config, run.out
    distributed.average_statistics(run.network)
    kappa = run.kappa.whole() if run.kappa is not None else None
    metrics = {
        key: value for key, value in progress.row.items() if key not in ("step", "epoch", "seconds")
    }
    seconds = time.monotonic() - run.began
    metrics |= {"steps": run.total, "seconds": seconds, "images_per_second": run.total * config.batch / seconds,
                "parameters": sum(p.numel() for p in run.trainable.values()), "skipped_steps": run.scaler.skipped,
                "validation": mean_accuracy(run.validation[-1]) if run.validation else {}}  # fmt: skip
    if distributed.rank():
        return metrics
    if folder is not None:
        btnet = BTNet(run.trunk, ())
        btnet.routes[str(config.resolution)] = run.network
        btnet.save(
            folder, only=config.resolution if (folder / "trunk.safetensors").is_file() else None
        )
    elif isinstance(run.network, Route):
        facts = {"r": str(config.resolution), "couple_at": run.network.couple_at}
        write_safetensors(out / "route.safetensors", run.network.state_dict(), facts)
    else:
        save_backbone(run.trunk, out / "trunk.safetensors")
    if kappa is not None:
        save_classifier(out / "classifier.safetensors", kappa)
    shutil.rmtree(out / "cache", ignore_errors=True)
    checkpoint.write_record(
        out, {**identity, "versions": checkpoint.versions(), "metrics": metrics}
    )
    return metrics
