"""Notebook 10: a face through every trained method, who is recognised, where a branch may end.

`Explorer` embeds known people and strangers beforehand and answers a `Choice` with a figure in
under 300 ms on a CPU; `controls` puts ipywidgets around it. Faces are RGB pixels (3, 112, 112) in
[0, 255]. The drawing is in plots/answers.py.
"""

from __future__ import annotations

import html
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from btnet_core.data.faces import at_size
from btnet_core.data.folders import SUFFIXES
from btnet_core.data.sources import spec_text
from btnet_core.device import autocast
from btnet_core.errors import BTNetError, DataError
from btnet_core.evaluation.embedders import BranchEmbedder, UpsamplingEmbedder
from btnet_core.evaluation.identification import prototypes
from btnet_core.evaluation.verification import strictest_needed
from btnet_core.images import KERNELS, Resize, decode, resize, to_pixels
from btnet_core.models.backbone import BackboneConfig, build_backbone
from btnet_core.models.btnet import INDICATORS, ROUNDINGS, BTNet, Route, select_branch
from btnet_core.models.costs import count_macs
from btnet_paper.features import network, strength, watching
from btnet_paper.people import choose_people, open_once
from btnet_paper.plans import load_methods
from btnet_paper.plots import answers
from btnet_paper.scales import Scale

METHODS = ("phi_hr", "phi_mm", "phi_mr", "phi_bt")  # Table 1's order
SOURCES = {
    "of the gallery": "known",
    "a stranger": "stranger",
    "synthetic": "synthetic",
    "upload, file, data set": "",
}
SYNTHETIC = '{"kind": "synthetic", "identities": 50, "images": 4, "first": 200000}'


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What the controls say."""

    source: str = "known"  # known, stranger, synthetic, an image file, or a data set's path
    upload: bytes = b""  # content of an image file; goes before `source`
    person: int = 0  # place in the source
    height: int = 14  # of the captured face, pixels
    aspect: int = 85  # its width in % of its height
    kernel: str = "bilinear"
    antialias: bool = True
    indicator: str = "max"
    rounding: str = "ceil"
    fpir: float = 0.3  # fraction of strangers that may be taken for somebody
    network: str = "of this scale"  # key of `Explorer.networks`
    branch: int = 14  # the one whose end moves
    ends: int = -1  # index of its last unit; -1: BTNet's allocation


class Explorer:
    """Methods trained under ``run_dir/models`` and people of ``scale.others``.

    Where no phi_bt was trained, the repository's demo network takes the place of all; ``note``
    says so. Thresholds come from strangers shrunk to the resolution of the branch.
    """

    def __init__(
        self, scale: Scale, run_dir: Path | str, *, device: str = "auto", known: int = 24,
        strangers: int = 48,
    ) -> None:  # fmt: skip
        models = Path(run_dir) / "models"
        found = load_methods(models, device=device)
        self.weights = "models/phi_bt" if "phi_bt" in found else "data/demo"
        if "phi_bt" not in found:
            net = BTNet.load("demo")
            found = {"phi_bt": BranchEmbedder(net, device=device)}
            found["phi_mr"] = UpsamplingEmbedder(net.trunk, device=device)
        net = found["phi_bt"].btnet
        self.resolutions, canonical = net.resolutions, net.trunk.config.size[0]
        every = [(r, r) for r in self.resolutions]  # phi_mm has a network for each
        able = [name for name in METHODS if name in found and found[name].covered(every) == every]
        self.methods = {name: found[name] for name in able}
        missing = [name for name in METHODS if name not in self.methods]
        train = f"Train: btnet reproduce --scale {scale.name} --only 03,04"
        self.note = f"Not trained yet in {models}: {', '.join(missing)}. {train}" if missing else ""
        if self.weights == "data/demo":
            self.note = f"These are the weights that come with the repository, data/demo. {train}"
        configs = {"of this scale": net.trunk.config, "the paper's": BackboneConfig()}
        low = self.resolutions[-2::-1]  # the largest first
        self.networks = {name: allocations(config, low) for name, config in configs.items()}
        self.people = choose_people(open_once(spec_text(scale.others)), known, strangers)
        self.known, self.probes = len(self.people.gallery), self.people.probes
        self.entries: dict[str, Tensor] = {}  # method -> (known, D), unit length
        self.cosines: dict[tuple[str, int], np.ndarray] = {}  # method, r -> (probes, known)
        for name, embedder in tqdm(self.methods.items(), desc="embedding", leave=False):
            embedded = embedder(self.people.entries, canonical)
            self.entries[name] = F.normalize(prototypes(embedded, self.people.who)[1])
            for r in self.resolutions:
                probes = F.normalize(embedder(self.probes, r))
                self.cosines[name, r] = (probes @ self.entries[name].T).numpy()

    def threshold(self, name: str, r: int, fpir: float) -> float:
        """The smallest at which at most ``fpir`` of the strangers at r rows pass for somebody."""
        return strictest_needed(self.cosines[name, r][self.known :].max(1), fpir)

    def recognised(self, name: str, r: int, fpir: float) -> np.ndarray:
        """For each probe: 1 = called by the right name, 0 = by none, -1 = by a wrong one."""
        cosines = self.cosines[name, r]
        right = cosines.argmax(1) == np.arange(len(cosines))
        return np.where(cosines.max(1) > self.threshold(name, r, fpir), np.where(right, 1, -1), 0)

    def face(self, choice: Choice) -> tuple[Tensor, int | None]:
        """The chosen face at canonical size, and which of the probes it is.

        Raises DataError, ConfigError.
        """
        if choice.upload:
            return at_size(decode(choice.upload, where="upload"), (112, 112)), None
        if choice.source in ("known", "stranger"):
            strangers = len(self.probes) - self.known
            first, count = (0, self.known) if choice.source == "known" else (self.known, strangers)
            probe = first + choice.person % count
            return self.probes[probe], probe
        if not choice.source:
            raise DataError("upload an image, or give the path of an image or of a data set")
        if Path(choice.source).suffix.lower() in SUFFIXES:
            return at_size(to_pixels(Path(choice.source).expanduser(), "face"), (112, 112)), None
        faces = open_once(SYNTHETIC if choice.source == "synthetic" else choice.source)
        return faces.images([choice.person % len(faces)])[0], None

    def look(self, choice: Choice) -> dict[str, Any]:
        """All that the figure of one face shows, see plots/answers.py.

        "methods" has, by name, the maps (H, W) of the stages, cosines with the gallery (known,),
        the threshold at the resolution r of the branch, and there what `recognised` says.
        """
        how = Resize(kernel=choice.kernel, antialias=choice.antialias)
        face, probe = self.face(choice)
        h, w = choice.height, max(1, round(choice.height * choice.aspect / 100))
        indicator, rounding = choice.indicator, choice.rounding
        rule = {"indicator": indicator, "rounding": rounding, "resolutions": self.resolutions}
        r = select_branch(w, h, **rule)
        native = resize(face, (h, w), how)
        seen = resize(native, 112, how)
        methods = {}
        for name in self.methods:
            maps, cosines = self._walk(name, native, r, how)
            methods[name] = {
                "maps": maps, "cosines": cosines, "threshold": self.threshold(name, r, choice.fpir),
                "found": self.recognised(name, r, choice.fpir),
            }  # fmt: skip
        return rule | {
            "face": face, "person": probe if probe is not None and probe < self.known else None,
            "native": native, "seen": seen, "error": (seen - face).abs().mean(0).numpy(),
            "side": {"min": min(w, h), "max": max(w, h), "avg": (w + h) // 2}[indicator], "r": r,
            "fpir": choice.fpir, "gallery": self.people.gallery, "small": resize(self.probes, r),
            "methods": methods,
        }  # fmt: skip

    @torch.inference_mode()
    def _walk(
        self, name: str, native: Tensor, r: int, how: Resize
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Through the method's network for r: maps of its stages, and cosines (known,)."""
        embedder = self.methods[name]
        trunk, net = network(embedder, r)
        size = net.size if isinstance(net, Route) else trunk.config.size
        x = trunk.normalise(resize(trunk.crop(native)[None], size, how)).to(embedder.device)
        with watching(trunk, net) as seen, autocast(embedder.device, embedder.precision):
            embedding = net(x.contiguous(memory_format=torch.channels_last))
        unit = F.normalize(embedding.float().cpu())[0]
        return [strength(z)[0].numpy() for (z,) in seen], (self.entries[name] @ unit).numpy()

    def picture(self, choice: Choice) -> tuple[Figure, str]:
        """One face and who is recognised, and a line that says which branch was taken and why."""
        view = self.look(choice)
        h, w = view["native"].shape[-2:]
        line = f"{w} x {h} px, {choice.indicator} + {choice.rounding}: branch {view['r']}"
        return answers.face_figure(view), line

    def costs(self, choice: Choice) -> tuple[Figure, str]:
        """What each branch costs wherever it ends, and a line with numbers of the chosen end."""
        tables = self.networks[choice.network]
        rows = tables[choice.branch]
        ends = _standard(rows) if choice.ends < 0 else min(choice.ends, len(rows) - 1)
        row = rows[ends]
        line = (
            f"B_{choice.branch} up to {row['unit']}: {row['stored']:,} parameters "
            f"({row['share']:.1%} of the trunk), {row['bytes'] / 1e6:.2f} MB, "
            f"{row['macs'] / 1e9:.3g} GMACs a face (trunk: {row['trunk'] / 1e9:.3g})"
        )
        return answers.cost_figure(tables, choice.branch, ends), line


def _standard(rows: Sequence[dict[str, Any]]) -> int:
    return [row["standard"] for row in rows].index(True)


def allocations(
    config: BackboneConfig, resolutions: Sequence[int]
) -> dict[int, list[dict[str, Any]]]:
    """r -> for each unit where its branch may end: what is stored (parameters, bytes), and MACs."""
    with torch.device("meta"):
        net = BTNet(build_backbone(config), resolutions)
    trunk = count_macs(net.trunk, config.size)
    whole = sum(p.numel() for p in net.trunk.parameters())
    tables: dict[int, list[dict[str, Any]]] = {}
    for r in resolutions:
        usual: Any = net.route(r)
        macs = count_macs(usual, usual.size)  # the same wherever the branch ends
        tables[r] = []
        for unit, _ in net.trunk.units():
            route = Route(net.trunk, r, couple_at=unit)
            stored = sum(p.numel() for p in route.trainable().values())
            facts = {"unit": unit, "standard": unit == usual.couple_at, "stored": stored}
            facts |= {"share": stored / whole, "macs": macs, "trunk": trunk}
            tables[r].append(facts | {"bytes": sum(t.nbytes for t in route.own_state().values())})
    return tables


def png(figure: Figure) -> bytes:
    """The figure as PNG: fast, not small."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=figure.dpi, pil_kwargs={"compress_level": 1})
    return out.getvalue()


def controls(explorer: Explorer, start: Choice | None = None) -> widgets.VBox:
    """ipywidgets: the fields of a `Choice` beside the two figures, which follow at once."""
    start = start or Choice()
    face = _linked(_face_boxes(explorer, start), explorer.picture)
    cost = _linked(_cost_boxes(explorer, start), explorer.costs)
    note = [widgets.HTML(f"<b>{explorer.note}</b>")] if explorer.note else []
    return widgets.VBox([*note, face, cost])


def _dropdown(options: Any, value: Any, description: str) -> widgets.Dropdown:
    return widgets.Dropdown(options=options, value=value, description=description)


def _face_boxes(explorer: Explorer, start: Choice) -> dict[str, Any]:
    hint = "photo.jpg, folder, list, .rec"
    percent = {"min": 0, "max": 0.5, "step": 0.02, "readout_format": ".0%"}
    return {
        "source": _dropdown(SOURCES, start.source, "face"),
        "path": widgets.Text(placeholder=hint, description="or path", continuous_update=False),
        "upload": widgets.FileUpload(accept="image/*", description="or upload"),
        "person": widgets.IntSlider(start.person, 0, explorer.known - 1, description="person"),
        "height": widgets.IntSlider(start.height, 4, 112, description="height (px)"),
        "aspect": widgets.IntSlider(start.aspect, 50, 100, 5, description="width (%)"),
        "kernel": _dropdown(KERNELS, start.kernel, "kernel"),
        "antialias": widgets.Checkbox(start.antialias, description="antialias"),
        "indicator": _dropdown(INDICATORS, start.indicator, "indicator"),
        "rounding": _dropdown(ROUNDINGS, start.rounding, "rounding"),
        "fpir": widgets.FloatSlider(start.fpir, description="FPIR", **percent),
    }


def _cost_boxes(explorer: Explorer, start: Choice) -> dict[str, Any]:
    tables = explorer.networks[start.network]
    usual, last = _standard(tables[start.branch]), 24
    return {
        "network": _dropdown(list(explorer.networks), start.network, "network"),
        "branch": _dropdown(list(tables), start.branch, "branch (px)"),
        "ends": widgets.IntSlider(usual, 0, last, description="ends at unit", readout=False),
    }


def _linked(boxes: dict[str, Any], draw: Callable[[Choice], tuple[Figure, str]]) -> widgets.HBox:
    """Controls, and beside them the picture that they change and a line about it.

    The line is no ``widgets.Output``: nbclient answers one past its own event loop, and can then
    wait for ever for a cell that has ended.
    """
    image, told = widgets.Image(format="png", layout={"max_width": "100%"}), widgets.HTML()

    def follow(change: Any = None) -> None:
        began = time.perf_counter()
        values = {name: box.value for name, box in boxes.items()}
        path, upload = values.pop("path", ""), values.pop("upload", ())
        if values.get("source") == "":
            values["source"] = path
            values["upload"] = bytes(upload[-1]["content"]) if upload and not path else b""
        try:
            figure, line = draw(Choice(**values))
            image.value = png(figure)
            line += f" · answered in {1e3 * (time.perf_counter() - began):.0f} ms"
        except BTNetError as error:
            line = str(error)
        told.value = html.escape(line)

    follow()
    for box in boxes.values():
        box.observe(follow, "value")
        box.layout.width, box.style.description_width = "270px", "80px"
    column = widgets.VBox(list(boxes.values()), layout={"min_width": "290px"})
    return widgets.HBox([column, widgets.VBox([image, told])])
