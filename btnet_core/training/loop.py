"""Training: ``train`` takes a configuration to a finished folder; ``fit`` is the loop."""

from __future__ import annotations

import hashlib
import math
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from btnet_core.data.faces import open_faces
from btnet_core.device import threads
from btnet_core.errors import CheckpointError, TrainingError
from btnet_core.evaluation.embedders import BranchEmbedder, Embedder, UpsamplingEmbedder
from btnet_core.evaluation.verification import evaluate_pairs
from btnet_core.files import lock, read_safetensors, write_safetensors
from btnet_core.models.btnet import BTNet, Route, weights_digest
from btnet_core.models.weights import save_backbone
from btnet_core.training import checkpoint, distributed
from btnet_core.training.batches import Batch
from btnet_core.training.classifier import save_classifier
from btnet_core.training.config import TrainConfig
from btnet_core.training.progress import Progress
from btnet_core.training.run import Run, prepare
from btnet_core.training.step import losses_of, to_keep
from btnet_core.training.teacher import TeacherCache, pays_and_fits

READ_EVERY = 10  # steps on a GPU, which is not waited for in between


def fit(run: Run, progress: Progress) -> None:
    """Train from ``run.step`` to the end: load, forward, backward, clip, step, save."""
    network = list(run.trainable.values())
    readings = Readings(run, progress)
    run.modes(training=True)
    with _interruptible() as stop:
        for batch, pixels in run.batches():
            lr = _set_lr(run)
            run.optimiser.zero_grad(set_to_none=True)
            terms = backward(run, batch, pixels)
            norm = unscale_and_clip(run, network)
            readings.add(batch, lr, terms, norm, stop.is_set())
            run.grad_scaler.step(run.optimiser)
            run.grad_scaler.update()
            run.step += 1
            if readings.waiting:
                continue
            ended = run.step % run.sampler.steps == 0
            if ended and _validation_due(run):
                validate(run, progress)
            if ended or readings.stop or readings.late:
                checkpoint.save(run)
                readings.saved = time.monotonic()
            if readings.stop:
                progress.say(f"{run.config.name}: stopped at step {run.step}, checkpoint saved")
                raise KeyboardInterrupt


def _set_lr(run: Run) -> float:
    """The step's learning rate, handed to the optimiser."""
    lr = run.config.lr_at(run.step, run.sampler.steps)
    for group in run.optimiser.param_groups:
        group["lr"] = lr
    return lr


def backward(run: Run, batch: Batch, pixels: Tensor | None) -> dict[str, Tensor]:
    """The gradients of L, part by part of the batch, summed over processes; returns L's terms.

    The parts are means over as many faces each, so that they add up to the mean over the batch.
    Deviation where ``accumulate`` is above 1: batch norms see a part, and CurricularFace's t moves
    at each.
    """
    parts = run.config.accumulate
    faces = pixels.chunk(parts) if pixels is not None else [None] * parts
    total: dict[str, Tensor] = {}
    for index, (part, some) in enumerate(zip(batch.split(parts), faces, strict=True), 1):
        L, terms = losses_of(run, part, some)
        with distributed.summed_gradients(run.trainable.values() if index == parts else ()):
            run.grad_scaler.scale(L / parts).backward()
        for name, term in terms.items():
            total[name] = total.get(name, 0) + term.detach() / parts
    return total


def unscale_and_clip(run: Run, network: list[nn.Parameter]) -> Tensor:
    """Unscale all gradients and clip the network's; returns their norm before clipping.

    A gradient of the classifier that is not finite, on any process, makes the norm not finite on
    all: they stop, or skip the step, together.
    """
    gradients = [p.grad for p in network if p.grad is not None]
    if run.kappa is not None and run.kappa.weight.grad is not None:
        gradients[0] += 0 * distributed.all_sum(run.kappa.weight.grad.sum())
    if run.grad_scaler.is_enabled():
        run.grad_scaler.unscale_(run.optimiser)
    return torch.nn.utils.clip_grad_norm_(network, run.config.clip_norm)


class Readings:
    """Loss terms and gradient norms of the latest steps, brought from the device together.

    Attributes:
        waiting: values of some steps have not been read yet.
        stop, late: whether any process was asked to stop, and whether a checkpoint is due; as of
            the last reading, the same on all processes.
        saved: when the last checkpoint was written.
    """

    def __init__(self, run: Run, progress: Progress) -> None:
        self.run, self.progress = run, progress
        self.every = READ_EVERY if run.device.type == "cuda" else 1
        self.rows: list[tuple[int, float, Batch, Tensor]] = []
        self.norms: deque[float] = deque(maxlen=5)
        self.stop = self.late = False
        self.saved = time.monotonic()

    @property
    def waiting(self) -> bool:
        return bool(self.rows)

    def add(
        self, batch: Batch, lr: float, terms: dict[str, Tensor], norm: Tensor, stop: bool
    ) -> None:
        """Take a step's values; read those that wait where it is time to.

        Raises:
            TrainingError: a loss or gradient is not finite; the last checkpoint is from before it.
        """
        step, n = self.run.step + 1, distributed.world()
        whole = {"influence": n, "norm": n}  # the same on all processes: counted once
        values = {name: value.float() / whole.get(name, 1) for name, value in terms.items()}
        values["norm"] = norm.float() / n
        self.rows.append((step, lr, batch, torch.stack(list(values.values()))))
        ended = step % self.run.sampler.steps == 0 or step == self.run.total
        if step % self.every == 0 or ended:
            self._read([*values], stop)

    def _read(self, names: list[str], stop: bool) -> None:
        late = time.monotonic() - self.saved >= self.run.config.checkpoint_seconds
        flags = self.rows[0][3].new_tensor([float(stop), float(late)])
        read = distributed.all_sum(torch.cat([*(row[3] for row in self.rows), flags])).tolist()
        *values, stop_count, late_count = read
        self.stop, self.late = stop_count > 0, late_count > 0
        for index, (step, lr, batch, _) in enumerate(self.rows):
            mine = values[index * len(names) : (index + 1) * len(names)]
            row = dict(zip(names, mine, strict=True))
            loss = sum(value for name, value in row.items() if name != "norm")
            self._check({"loss": loss, **row}, step, lr, batch)
            self.progress.step(step, {"loss": loss, **row}, lr, self.run.config.batch)
        self.rows.clear()

    def _check(self, values: dict[str, float], step: int, lr: float, batch: Batch) -> None:
        """Tell a step that must not be gone on from, with all that one needs to see why."""
        run, scaler = self.run, self.run.grad_scaler
        finite = math.isfinite(values["norm"])
        overflow = not finite and scaler.is_enabled() and scaler.get_scale() > 1  # step is skipped
        if scaler.is_enabled():
            run.skipped += overflow
            self.progress.extra = {"grad_scale": scaler.get_scale(), "skipped_steps": run.skipped}
        if math.isfinite(values["loss"]) and (finite or overflow):
            self.norms.append(values["norm"])
            return
        before = ", ".join(f"{norm:.4g}" for norm in self.norms)
        shown = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
        raise TrainingError(
            f"{run.config.name}: not finite at step {step} (epoch {step / run.sampler.steps:.2f}), "
            f"lr {lr:.4g}: {shown}; gradient norms before it {before}; "
            f"records {batch.records.tolist()}. "
            f"The last checkpoint is kept in {run.out / checkpoint.STATE}"
        )


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set the event: the step ends and is saved. A second one stops at once."""
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


# ---- from a configuration to a finished folder --------------------------------------------------


def train(
    config: TrainConfig, out: Path | str, *, device: str = "auto", fresh: bool = False,
    show: str = "auto",
) -> dict[str, Any]:  # fmt: skip
    """Train what ``config`` says in folder ``out``.

    Goes on from the checkpoint that is there; returns at once what is finished.

    Args:
        device: "auto", "cpu", "cuda", …; under torchrun each process takes its own.
        fresh: forget what ``out`` holds.
        show: see ``Progress``.

    Returns:
        Of the last steps: loss terms; ``seconds`` (all sessions), ``images_per_second``,
        ``parameters`` (that learnt), ``validation`` (accuracy in % for each "r1&r2", at the end).

    Raises:
        ConfigError, CheckpointError, DataError: before the first step; also where ``out`` holds a
            run of another recipe or of other faces. BusyError: another process trains there.
        TrainingError: it had to stop.
        KeyboardInterrupt: it was stopped; a checkpoint is saved.
    """
    out, place = Path(out), distributed.start(device)
    identity = checkpoint.identity_of(config, open_faces(config.data).checksum)
    record = None if fresh else checkpoint.read_record(out)
    if record:
        checkpoint.check_finished(record, identity, out)
        return record["metrics"]
    checkpoint.check_room(out, 0)
    with lock(out) if distributed.rank() == 0 else nullcontext():
        distributed.wait()  # every process has read the record before the first one removes it
        if fresh:
            checkpoint.forget(out)
        state = checkpoint.resumable(out, identity)
        try:
            with _machine(config, place, state):
                return _train(config, out, place, identity, state, show)
        except OSError as error:
            raise checkpoint.unwritten(out, error) from error


def _machine(
    config: TrainConfig, device: torch.device, state: dict | None
) -> AbstractContextManager:
    """torch as the run needs it; a resumed run keeps its threads, and so the order of sums."""
    torch_settings(config, device)
    if device.type != "cpu":
        return nullcontext()
    kept = state["threads"] if state else 0
    return threads(config.threads or kept, distributed.neighbours())


def torch_settings(config: TrainConfig, device: torch.device) -> None:
    """How float32 products are computed, and that cuDNN tries which of its kernels is fastest."""
    torch.set_float32_matmul_precision(config.matmul)
    torch.backends.cudnn.allow_tf32 = config.matmul != "highest"  # convolutions, too
    torch.backends.cudnn.benchmark = device.type == "cuda"


def _train(
    config: TrainConfig, out: Path, device: torch.device, identity: dict[str, Any],
    state: dict[str, Any] | None, show: str,
) -> dict[str, Any]:  # fmt: skip
    run = prepare(config, out, device)
    run.identity = identity
    folder = btnet_folder(run)
    numbers = sum(tensor.numel() for tensor in run.network.state_dict().values())
    numbers += run.kappa.num_classes * run.trunk.config.embedding if run.kappa is not None else 0
    checkpoint.check_room(out, 8 * numbers)  # float32, and as many momenta
    if state is not None:
        checkpoint.restore(run, state)
    first = distributed.rank() == 0
    progress = Progress(
        out, config.name, run.total, run.step, run.sampler.steps,
        show=show if first else "none", speak=first,
    )  # fmt: skip
    progress.say(run.describe())
    try:
        fill_cache(run, progress)
        fit(run, progress)
        write_weights(run, folder)
        validate(run, progress)
        return _finish(run, progress)
    finally:
        progress.close()


def fill_cache(run: Run, progress: Progress) -> None:
    """Keep the teacher's answers to all faces, where that pays and fits."""
    config, faces = run.config, run.pixels.faces
    if not config.resolution or config.cache == "off":
        return
    row = to_keep(run, run.pixels.get(torch.arange(1)).to(run.device))
    size = sum(2 * len(faces) * part.numel() * part.element_size() for part in row.values())
    facts = (
        weights_digest(run.trunk), faces.checksum, run.network.couple_at, config.resize.name,
        run.precision, [(name, tuple(part.shape), part.dtype) for name, part in row.items()],
    )  # fmt: skip
    folder = Path(config.cache_dir or run.out / "cache")
    folder /= hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    found = pays_and_fits(size, config.last_epoch, folder, shared=bool(config.cache_dir))
    kept, text = distributed.all_objects(found)[0]
    progress.say(f"{config.name}: {text}")
    if kept:
        with lock(folder, wait=True) if distributed.rank() == 0 else nullcontext():
            distributed.wait()  # for another run that fills it
            run.cache = TeacherCache(run.pixels, lambda x: to_keep(run, x), folder, run.device)


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
            other = run.config.init or "this one"
            raise CheckpointError(f"{folder}: holds a BTNet with another trunk than {other}")
    return folder


def _validation_due(run: Run) -> bool:
    every, epoch = run.config.validate_epochs, run.step // run.sampler.steps
    return every > 0 and epoch % every == 0 and run.step < run.total


def validate(run: Run, progress: Progress) -> None:
    """Accuracy in % at 112&r and r&r on each pair set; the processes share the sets."""
    config = run.config
    if not run.pairs:
        return
    distributed.average_statistics(run.network)
    size = run.trunk.config.size[0]
    rows = (size, config.resolution) if config.resolution else config.validation_resolutions
    settings = list(dict.fromkeys([(size, r) for r in rows] + [(r, r) for r in rows]))
    embedder, found = _embedder(run), {}
    for pairs in run.pairs[distributed.rank() :: distributed.world()]:
        result = evaluate_pairs(embedder, pairs, settings, how=config.resize)
        found[pairs.name] = {name: value["accuracy"] for name, value in result.items()}
    run.modes(training=True)
    together = {name: row for some in distributed.all_objects(found) for name, row in some.items()}
    accuracy = {pairs.name: together[pairs.name] for pairs in run.pairs}
    epoch = run.step / run.sampler.steps
    run.validation.append({"step": run.step, "epoch": epoch, "accuracy": accuracy})
    progress.write({"step": run.step, "validation": accuracy})
    means = ", ".join(f"{name} {value:.2f}" for name, value in mean_accuracy(accuracy).items())
    progress.say(f"{config.name}: epoch {epoch:.4g} accuracy {means}")


def mean_accuracy(accuracy: dict[str, dict[str, float]]) -> dict[str, float]:
    """Accuracy at each "r1&r2", averaged over the pair sets."""
    sets = list(accuracy.values())
    return {name: sum(one[name] for one in sets) / len(sets) for name in sets[0]}


def _embedder(run: Run) -> Embedder:
    options = {"how": run.config.resize, "device": str(run.device), "precision": run.precision}
    if not isinstance(run.network, Route):
        return UpsamplingEmbedder(run.trunk, **options)
    btnet = BTNet(run.trunk, ())
    btnet.routes[str(run.config.resolution)] = run.network
    return BranchEmbedder(btnet, **options)


def write_weights(run: Run, folder: Path | None) -> None:
    """The trained weights, written by the first process."""
    config, out = run.config, run.out
    distributed.average_statistics(run.network)
    kappa = run.kappa.whole() if run.kappa is not None else None
    if distributed.rank():
        return
    if folder is not None:
        btnet = BTNet(run.trunk, ())
        btnet.routes[str(config.resolution)] = run.network
        there = (folder / "trunk.safetensors").is_file()
        btnet.save(folder, only=config.resolution if there else None)
    elif isinstance(run.network, Route):
        facts = {"r": str(config.resolution), "couple_at": run.network.couple_at}
        write_safetensors(out / "route.safetensors", run.network.state_dict(), facts)
    else:
        save_backbone(run.network, out / "trunk.safetensors")
    if kappa is not None:
        save_classifier(out / "classifier.safetensors", kappa)


def _finish(run: Run, progress: Progress) -> dict[str, Any]:
    """Write the record; returns the metrics."""
    seconds = time.monotonic() - run.began
    accuracy = run.validation[-1]["accuracy"] if run.validation else None
    last = {k: v for k, v in progress.row.items() if k not in ("step", "epoch", "seconds")}
    metrics = {
        **last, "steps": run.total, "seconds": seconds,
        "images_per_second": run.total * run.config.batch / seconds,
        "parameters": sum(p.numel() for p in run.trainable.values()), "skipped_steps": run.skipped,
        "precision": run.precision, "validation": mean_accuracy(accuracy) if accuracy else {},
    }  # fmt: skip
    if distributed.rank() == 0:
        shutil.rmtree(run.out / "cache", ignore_errors=True)
        record = {**run.identity, "versions": checkpoint.versions(), "metrics": metrics}
        branch = Path(run.config.btnet) / f"branch_{run.config.resolution}.safetensors"
        if run.config.btnet and branch.is_file():
            record["branch"] = checkpoint.fingerprint(branch)
        checkpoint.write_record(run.out, record)
    return metrics
