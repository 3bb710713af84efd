"""What else could be done for small faces with a recogniser as it is? The alternatives to branches, on real faces.

    btnet reproduce --scale lfw --only 03,04 && python benchmarks/alternatives.py
    python benchmarks/alternatives.py --rows SRCNN "map of embeddings (ridge)"    # only these; the others stay recorded

Super-resolution before phi_hr (Table 2's rows; `super_resolution.py`), a map of embeddings, batch norms of each resolution,
a phi_mr whose batches hold every face at several sizes, and branches on that phi_mr: each on the scale's training faces, then Table 1's settings on
its two sets of frontal faces (LFW, CFP-FF), beside operations, parameters and minutes. Finished networks lie in runs/lfw/alternatives and are not trained
again. Writes figures/results/lfw_alternatives.json. Each row says what it
took (`seconds`, `minutes` of training); VDSR, of 8.4 GMACs, takes longest.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from btnet_core import losses
from btnet_core.device import autocast
from btnet_core.evaluation.embedders import BranchEmbedder, MultiModelEmbedder, UpsamplingEmbedder
from btnet_core.evaluation.verification import embed_images, evaluate_pairs, summarise
from btnet_core.files import find, lock, read_safetensors, write_safetensors
from btnet_core.images import degrade, resize, scaled_size
from btnet_core.models.backbone import Backbone
from btnet_core.models.btnet import NORMS, BTNet
from btnet_core.models.costs import count_macs, route_cost
from btnet_core.models.weights import load_backbone, save_backbone
from btnet_core.training.batches import open_pixels
from btnet_core.training.classifier import Classifier
from btnet_core.training.loop import train
from btnet_core.training.run import class_means
from btnet_paper import plans, results
from btnet_paper.study import Study
from btnet_paper.super_resolution import (
    NETWORKS,
    VDSR,
    SuperResolvingEmbedder,
    bicubic,
    entered,
    load_published,
    loss,
)

SMALL = (28, 14, 7)  # rows, px
# Faces that each network sees; a batch has 32: minutes of one core, not what their papers spend.
SEEN = {"SRCNN": 13_000, "FSRCNN": 80_000, "VDSR": 6_000, "LapSRN": 13_000, "identity": 26_000}
IDENTITY = (
    0.02  # of 1 - cosine of phi_hr's embeddings, beside the mean squared error of pixels in [0, 1]
)
EMBEDDING = (
    30.0  # of 1 - cosine to phi_hr's embedding, beside the margin loss, as in a branch's recipe
)
MARGIN = {"margin": 0.2, "s": 32.0}  # of the branches
STRONG = {"sizes": (112, 28, 14, 7), "faces": 32, "seen": 13_000, "lr": 0.025, "triplet": 1.0}


class Training:
    """The scale's faces in memory, phi_hr, and what it says of them."""

    def __init__(self, study: Study) -> None:
        self.study, self.folder = study, study.run_dir / "alternatives"
        self.trunk = load_backbone(study.models / "phi_hr" / "trunk.safetensors").eval()
        self.trunk.requires_grad_(False)
        self.pixels = open_pixels(study.scale.faces, 2)
        self.labels = self.pixels.faces.labels
        self.minutes: dict[str, float] = {}

    def embedded(self, r: int) -> Tensor:
        """phi_hr's embeddings of all faces at r px (N, D), kept in a file."""
        place = self.folder / f"phi_hr_{r}.safetensors"
        if not place.is_file():
            embedder = UpsamplingEmbedder(self.trunk, device="cpu")
            z = embed_images(
                embedder, lambda rows: self.pixels.get(torch.as_tensor(rows)), len(self.labels), r
            )
            write_safetensors(place, {"z": z}, {})
        return read_safetensors(place)[0]["z"]

    def learn(
        self, name: str, module: nn.Module, step: Callable[[Tensor], Tensor], *, seen: int, batch: int,
        optimiser: torch.optim.Optimizer,
    ) -> nn.Module:  # fmt: skip
        """Train by ``step(rows of faces) -> loss`` with a rate that falls to 0 in a line, or take what is finished."""
        place = self.folder / f"{name}.safetensors"
        if place.is_file():
            state, facts = read_safetensors(place)
            module.load_state_dict(state)
            self.minutes[name] = float(facts["minutes"])
            return module.eval()
        began, steps, lr = time.monotonic(), seen // batch, optimiser.param_groups[0]["lr"]
        generator, order = (
            torch.Generator().manual_seed(self.study.seed),
            torch.empty(0, dtype=torch.long),
        )
        for number in range(steps):
            if len(order) < batch:
                order = torch.cat([order, torch.randperm(len(self.labels), generator=generator)])
            rows, order = order[:batch], order[batch:]
            for group in optimiser.param_groups:
                group["lr"] = lr * (1 - number / steps)
            optimiser.zero_grad()
            value = step(rows)
            value.backward()
            nn.utils.clip_grad_norm_([p for g in optimiser.param_groups for p in g["params"]], 5.0)
            optimiser.step()
            if number % max(1, steps // 10) == 0:
                print(f"{name}: step {number}/{steps} loss {value.item():.4g}", flush=True)
        self.minutes[name] = (time.monotonic() - began) / 60
        write_safetensors(place, module.state_dict(), {"minutes": str(self.minutes[name])})
        return module.eval()

    def faces(self, rows: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) as phi_hr is given them, half of them mirrored."""
        faces = self.trunk.crop(self.pixels.get(rows)).float()
        return torch.where(
            (torch.rand(len(rows)) < 0.5)[:, None, None, None], faces.flip(-1), faces
        )


def small(faces: Tensor, r: int) -> Tensor:
    """Faces (B, 3, H, W) at r rows, in [0, 1]."""
    return resize(faces, scaled_size(r, tuple(faces.shape[-2:]))) / 255


# ---- super-resolution ----


def super_resolution(
    training: Training, name: str, *, identity: float = 0.0
) -> dict[int, nn.Module]:
    """A network for each of SMALL, of the row ``name``; VDSR is one for all. With ``identity`` phi_hr's answer counts, too."""
    title = f"{name}+identity" if identity else name
    torch.manual_seed(training.study.seed)
    if name == "VDSR":
        network = VDSR()
        one = fit_pixels(training, title, network, SMALL, SEEN[name], identity)
        return dict.fromkeys(SMALL, one)
    seen = SEEN["identity" if identity else name]
    return {
        r: fit_pixels(training, f"{title}_{r}", NETWORKS[name](112 // r), (r,), seen, identity)
        for r in SMALL
    }


def fit_pixels(
    training: Training, name: str, network: nn.Module, sizes: Iterable[int], seen: int, identity: float
) -> nn.Module:  # fmt: skip
    """Train a network by its paper's loss; phi_hr is not trained."""
    sizes, trunk = tuple(sizes), training.trunk
    network.to(memory_format=torch.channels_last)

    def step(rows: Tensor) -> Tensor:
        faces = training.faces(rows)
        high, r = faces / 255, sizes[int(torch.randint(len(sizes), ()))]
        x = entered(network, small(faces, r), tuple(high.shape[-2:])).contiguous(
            memory_format=torch.channels_last
        )
        with autocast(torch.device("cpu"), "auto"):
            value = loss(network, x, high)
            if identity:
                z = trunk(trunk.normalise(255 * network(x).float().clamp(0, 1)))
                with torch.no_grad():
                    true = trunk(trunk.normalise(faces))
                value = value + identity * losses.embedding_loss(z, true, "cosine")
        return value

    optimiser = torch.optim.Adam(
        network.parameters(), lr=1e-3 if name.startswith(("FSR", "SRC")) else 3e-4
    )
    return training.learn(name, network, step, seen=seen, batch=32, optimiser=optimiser)


def psnr_gain(networks: dict[int, nn.Module], faces: Tensor) -> dict[str, float]:
    """dB of PSNR over RGB above bicubic enlargement, mean over ``faces`` (N, 3, H, W) in [0, 255], by r."""
    gains = {}
    for r, network in networks.items():
        size, low, high = tuple(faces.shape[-2:]), small(faces, r), faces / 255
        with torch.inference_mode():
            out = torch.cat([network(entered(network, x, size)).clamp(0, 1) for x in low.split(32)])
        error = [
            (image - high).square().flatten(1).mean(1)
            for image in (bicubic(low, size).clamp(0, 1), out)
        ]
        gains[str(r)] = float((10 * (error[0] / error[1]).log10()).mean())
    return gains


def published_gains(study: Study, faces: Tensor) -> dict[str, float]:
    """dB on the luminance of faces that the published VDSR and LapSRN gain over bicubic, by name and factor."""
    weights = torch.tensor([65.481, 128.553, 24.966])[:, None, None]
    luminance = ((faces / 255 * weights).sum(1, keepdim=True) + 16) / 255
    found = {}
    for name, factors in (("vdsr", (2, 4)), ("lapsrn_x2x4", (2, 4))):
        network = load_published(find(f"weights/{name}.safetensors"))
        for factor in factors:
            size = tuple(side // factor for side in luminance.shape[-2:])
            low = bicubic(luminance, size)
            big = bicubic(low, tuple(luminance.shape[-2:]))
            with torch.inference_mode():
                images = [network(big)] if network.enlarged else [*network.pyramid(low)]
            out = next(image for image in images if image.shape == big.shape)
            error = [(image - luminance).square().flatten(1).mean(1) for image in (big, out)]
            found[f"{name} x{factor}"] = float((10 * (error[0] / error[1]).log10()).mean())
    return found


# ---- on embeddings, on batch norms, on all of phi_hr ----


class MappedEmbedder(UpsamplingEmbedder):
    """phi_hr, and behind it for each r a map of its embeddings."""

    def __init__(self, backbone: Backbone, maps: dict[int, nn.Module], **options: Any) -> None:
        super().__init__(backbone, **options)
        self.maps = maps

    def network(self, r: int) -> nn.Module:
        return nn.ModuleList([self.backbone, self.maps[r]]) if r in self.maps else self.backbone

    def _embed(self, pixels: Tensor, r: int) -> Tensor:
        z = super()._embed(pixels, r).float()
        return self.maps[r](z) if r in self.maps else z


def ridge(training: Training, r: int) -> nn.Linear:
    """The linear map from embeddings at r px to those at 112 in closed form; its weight decay is chosen on a tenth of the people."""
    x, y = training.embedded(r).double(), training.embedded(112).double()
    x = F.pad(x, (0, 1), value=1.0)
    held = training.labels % 10 == 0
    inner, outer = x[~held].T @ x[~held], x[~held].T @ y[~held]
    mean, best = inner.diagonal().mean(), (-1.0, torch.empty(0))
    for decay in (1e-4, 1e-3, 1e-2, 1e-1):
        found = torch.linalg.solve(inner + decay * mean * torch.eye(len(inner)).double(), outer)
        best = max(
            best,
            (float(F.cosine_similarity(x[held] @ found, y[held]).mean()), found),
            key=lambda row: row[0],
        )
    layer = nn.Linear(x.shape[1] - 1, y.shape[1]).requires_grad_(False)
    layer.weight.copy_(best[1][:-1].T)
    layer.bias.copy_(best[1][-1])
    return layer


def perceptron(training: Training, r: int) -> nn.Module:
    """A map of two hidden layers of 512, trained by 1 - cosine."""
    x, y = training.embedded(r), training.embedded(112)
    torch.manual_seed(training.study.seed)
    width = x.shape[1]
    layers = nn.Sequential(
        nn.Linear(width, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, width)
    )
    optimiser = torch.optim.AdamW(layers.parameters(), lr=1e-3, weight_decay=0.01)
    step = lambda rows: losses.embedding_loss(layers(x[rows]), y[rows], "cosine")  # noqa: E731
    return training.learn(f"map_{r}", layers, step, seen=260_000, batch=128, optimiser=optimiser)


def own_norms(training: Training, r: int) -> Backbone:
    """phi_hr with batch norms of r px, faces scaled back up; nothing else is trained."""
    trunk, kappa = copy.deepcopy(training.trunk), fixed_classifier(training)
    norms = [one for one in trunk.modules() if isinstance(one, NORMS)]
    learns = [p.requires_grad_() for norm in norms for p in norm.parameters()]
    target = training.embedded(112)

    def step(rows: Tensor) -> Tensor:
        trunk.train()
        with autocast(torch.device("cpu"), "auto"):
            z = trunk(
                trunk.normalise(degrade(training.faces(rows), r)).contiguous(
                    memory_format=torch.channels_last
                )
            )
        return kappa(z, training.labels[rows]) + EMBEDDING * losses.embedding_loss(
            z, target[rows], "cosine"
        )

    optimiser = torch.optim.SGD(learns, lr=0.1, momentum=0.9)
    trunk.to(memory_format=torch.channels_last)
    return training.learn(f"norms_{r}", trunk, step, seen=13_000, batch=128, optimiser=optimiser)


def strong_mr(training: Training) -> Backbone:
    """phi_mr from phi_hr: each batch holds its faces at four sizes, with a margin at each and a triplet loss across them."""
    trunk, kappa = copy.deepcopy(training.trunk).requires_grad_(), fixed_classifier(training)
    kappa.weight.requires_grad_()
    triplet, sizes = losses.Triplet(), STRONG["sizes"]

    def step(rows: Tensor) -> Tensor:
        trunk.train()
        faces = training.faces(rows)
        x = trunk.normalise(torch.cat([degrade(faces, r) for r in sizes])).contiguous(
            memory_format=torch.channels_last
        )
        labels = training.labels[rows].repeat(len(sizes))
        with autocast(torch.device("cpu"), "auto"):
            z = trunk(x)
        return kappa(z, labels) + STRONG["triplet"] * triplet(z.float(), labels)

    learns = [*trunk.parameters(), kappa.weight]
    optimiser = torch.optim.SGD(learns, lr=STRONG["lr"], momentum=0.9, weight_decay=5e-4)
    trunk.to(memory_format=torch.channels_last)
    return training.learn(
        "strong_mr", trunk, step, seen=STRONG["seen"], batch=STRONG["faces"], optimiser=optimiser
    )


def strong_bt(training: Training) -> BTNet:
    """Branches by the scale's own recipe, which join that phi_mr and learn from it."""
    scale, models = training.study.scale, training.folder / "strong"
    trunk = strong_mr(training)
    save_backbone(trunk, models / "phi_hr" / "trunk.safetensors")  # trained before, as phi_hr is
    for run in plans.branches(scale, models, training.study.seed):
        train(run.replace(validation=(), threads=1), models / run.name, device="cpu", show="lines")
    training.minutes["strong_bt"] = trained_minutes(models, "phi_bt")
    return BTNet.load(models / "phi_bt")


def fixed_classifier(training: Training) -> Classifier:
    """kappa* of phi_hr's class means, as the branches have it."""
    pixels, device = training.pixels, torch.device("cpu")
    place = training.folder / "kappa.safetensors"
    if not place.is_file():
        write_safetensors(place, {"kappa": class_means(training.trunk, pixels, device, "bf16")}, {})
    kappa = Classifier(
        read_safetensors(place)[0]["kappa"], losses.build_margin("curricularface", **MARGIN)
    )
    kappa.weight.requires_grad_(False)
    return kappa


# ---- the table ----


def rows(training: Training) -> dict[str, Callable[[], tuple[Any, dict[str, Any]]]]:
    """By row: what gives its embedder, and what of its cost the embedder does not say."""
    trunk, found = training.trunk, plans.load_methods(training.study.models)
    place = {"device": "cpu", "batch_size": 32}

    def enlarging(name: str, identity: float = 0.0) -> Callable:
        def make() -> tuple[Any, dict[str, Any]]:
            networks = super_resolution(training, name, identity=identity)
            own = {id(one): sum(p.numel() for p in one.parameters()) for one in networks.values()}
            single = {r: SuperResolvingEmbedder(trunk, one, **place) for r, one in networks.items()}
            whole = MultiModelEmbedder({112: UpsamplingEmbedder(trunk, **place), **single})
            return whole, {"stored": sum(own.values()), "networks": networks}

        return make  # fmt: skip

    def mapped(fit: Callable[[Training, int], nn.Module]) -> Callable:
        def make() -> tuple[Any, dict[str, Any]]:
            maps = {r: fit(training, r) for r in SMALL}
            stored = sum(p.numel() for one in maps.values() for p in one.parameters())
            return MappedEmbedder(trunk, maps, **place), {"stored": stored}

        return make  # fmt: skip

    def norms() -> tuple[Any, dict[str, Any]]:
        single = {r: UpsamplingEmbedder(own_norms(training, r), **place) for r in SMALL}
        stored = len(SMALL) * sum(
            p.numel() for m in trunk.modules() if isinstance(m, NORMS) for p in m.parameters()
        )
        return MultiModelEmbedder({112: UpsamplingEmbedder(trunk, **place), **single}), {
            "stored": stored
        }

    def strong() -> tuple[Any, dict[str, Any]]:
        net = strong_bt(training)
        stored = whole + sum(route_cost(net, r).stored for r in SMALL)
        return BranchEmbedder(net, **place), {"stored": stored}

    whole = sum(p.numel() for p in trunk.parameters())
    return {
        "phi_hr": lambda: (found["phi_hr"], {"stored": 0}),
        "phi_mr": lambda: (found["phi_mr"], {"stored": whole}),
        "phi_bt": lambda: (found["phi_bt"], {"stored": sum(route_cost(found["phi_bt"].btnet, r).stored for r in SMALL)}),
        "map of embeddings (ridge)": mapped(ridge),
        "map of embeddings (MLP)": mapped(perceptron),
        "batch norms of each resolution": norms,
        "phi_mr, every face at four sizes, triplet": lambda: (UpsamplingEmbedder(strong_mr(training), **place), {"stored": whole}),
        "phi_bt on that phi_mr": strong,
        "FSRCNN": enlarging("FSRCNN"),
        "FSRCNN, identity term": enlarging("FSRCNN", IDENTITY),
        "SRCNN": enlarging("SRCNN"),
        "LapSRN": enlarging("LapSRN"),
        "VDSR": enlarging("VDSR"),
    }  # fmt: skip


def macs(embedder: Any, trunk: Backbone, networks: dict[int, nn.Module]) -> dict[str, int]:
    """Multiply-accumulates of a face by r; ``networks`` are those that enlarge it."""
    size, found = trunk.config.size, {}
    for r in SMALL:
        network = embedder.network(r)
        if first := networks.get(r):
            own = count_macs(first, size if first.enlarged else scaled_size(r, size))
            found[str(r)] = own + count_macs(trunk, size)
        elif isinstance(embedder, MappedEmbedder):
            found[str(r)] = count_macs(trunk, size) + sum(
                p.numel() for p in embedder.maps[r].parameters() if p.ndim > 1
            )
        else:
            found[str(r)] = count_macs(network, getattr(network, "size", size))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", default="", help="folder of the scale's run (default: runs/lfw)")
    parser.add_argument("--rows", nargs="+", default=[], help="default: all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    study = Study("alternatives", scale="lfw", run_dir=options.run)
    training, settings = (
        Training(study),
        [*((112, r) for r in SMALL), *((r, r) for r in SMALL), (112, 112)],
    )
    test = training.trunk.crop(study.pairs[0].images(range(0, 600, 2))).float()
    makers = rows(training)
    gains = published_gains(study, study.pairs[0].images(range(0, 600, 20)).float())
    for name in options.rows or makers:
        began = time.monotonic()
        training.minutes.clear()
        embedder, about = makers[name]()
        networks = about.pop("networks", {})
        sets = [
            evaluate_pairs(embedder, one, settings, keep=study.embeddings)
            for one in study.pairs[:2]
        ]
        row = {
            "accuracy": summarise(sets),
            "macs": macs(embedder, training.trunk, networks),
            **about,
        }
        row["minutes"] = sum(training.minutes.values()) or trained_minutes(study.models, name)
        if networks:
            row["psnr_gain"] = psnr_gain(networks, test)
        row["seconds"] = time.monotonic() - began
        print(
            name,
            {s: round(cell["accuracy"], 1) for s, cell in row["accuracy"].items()},
            row["minutes"],
            flush=True,
        )
        record(study, [*makers], name, row, gains)


def record(
    study: Study, order: list[str], name: str, row: dict[str, Any], gains: dict[str, float]
) -> None:
    """Put one row beside those that are recorded, also by another process meanwhile."""
    folder = results.ROOT / "figures"
    with lock(folder / "results", wait=True):
        place = folder / "results" / "lfw_alternatives.json"
        there = json.loads(place.read_text())["values"]["rows"] if place.is_file() else {}
        there[name] = row
        values = {"rows": {one: there[one] for one in order if one in there}, "published": gains}
        config = {
            "seen": SEEN,
            "identity": IDENTITY,
            "embedding": EMBEDDING,
            "strong": STRONG,
            "seed": study.seed,
            **MARGIN,
        }
        seconds = sum(one.get("seconds", 0.0) for one in there.values())
        results.record(folder, "lfw_alternatives", values, config=config, scale="lfw", kernel="bilinear+antialias, float",
                       data=" ".join([study.faces.checksum, *(one.checksum for one in study.pairs[:2])]), seconds=seconds)  # fmt: skip


def trained_minutes(models: Path, name: str) -> float:
    """Minutes of the scale's own trainings of a method."""
    found = [models / name, *(models / f"{name}_{r}" for r in SMALL)]
    records = [
        json.loads((folder / "run.json").read_text())
        for folder in found
        if (folder / "run.json").is_file()
    ]
    return sum(record["metrics"]["seconds"] for record in records) / 60


if __name__ == "__main__":
    main()
