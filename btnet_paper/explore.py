"""Notebook 10: a face through every trained method, who is recognised at a chosen FPIR, where a branch may end.

`Explorer` embeds known people and strangers beforehand and answers a `Choice` with a figure in under 300 ms on a
CPU; `controls` puts ipywidgets around it. Faces are RGB pixels (3, 112, 112) in [0, 255].
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from btnet_core.data.faces import FaceSet, at_size, open_faces
from btnet_core.data.folders import SUFFIXES
from btnet_core.data.sources import Spec, spec_text
from btnet_core.device import autocast
from btnet_core.errors import BTNetError, DataError
from btnet_core.evaluation.identification import prototypes
from btnet_core.evaluation.verification import strictest_needed
from btnet_core.images import KERNELS, Resize, decode, resize, to_pixels
from btnet_core.models.backbone import BackboneConfig, build_backbone, embed_features
from btnet_core.models.btnet import (
    INDICATORS,
    ROUNDINGS,
    BTNet,
    Route,
    coupling_layer,
    select_branch,
)
from btnet_core.models.costs import count_macs
from btnet_paper.features import network, stages
from btnet_paper.plans import load_methods
from btnet_paper.plots import style
from btnet_paper.plots.images import pixels, stretched
from btnet_paper.scales import Scale

METHODS = ("phi_hr", "phi_mm", "phi_mr", "phi_bt")  # Table 1's order
SOURCES = {"of the gallery": "known", "a stranger": "stranger", "synthetic": "synthetic",
           "upload, file, data set": ""}  # fmt: skip
WIDTH, DPI = 1080, 108  # of the figures, pixels
SYNTHETIC: Spec = {"kind": "synthetic", "identities": 50, "images": 4, "first": 200000}


def open_once(spec: Spec) -> FaceSet:
    return _opened(spec_text(spec))


@lru_cache(maxsize=4)
def _opened(text: str) -> FaceSet:
    return open_faces(text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """What the controls say."""

    source: str = "known"  # known, stranger, an image file, or a data set as for `open_faces`
    upload: bytes = b""  # content of an image file; goes before `source`
    person: int = 0  # place in the source
    height: int = 14  # of the captured face, pixels
    aspect: int = 85  # its width in % of its height
    kernel: str = "bilinear"
    antialias: bool = True
    indicator: str = "max"
    rounding: str = "ceil"
    fpir: float = 0.3  # share of strangers that may be taken for somebody
    network: str = "of this scale"  # key of `Explorer.networks`
    branch: int = 14  # the one whose end moves
    ends: int = -1  # index of its last unit; -1: BTNet's allocation


class Explorer:
    """Methods trained under ``run_dir/models``; people of ``scale.others``, one image of each kept for probing.

    The other images (at most two) are the gallery, at canonical size. Thresholds come from strangers shrunk to the
    resolution of the branch. ``note`` says how to train what is missing; without it only faces and costs are shown.
    """

    def __init__(
        self,
        scale: Scale,
        run_dir: Path | str,
        *,
        device: str = "auto",
        known: int = 24,
        strangers: int = 48,
    ) -> None:
        found = load_methods(models := Path(run_dir) / "models", device=device)
        bt, hr = found.get("phi_bt"), found.get("phi_hr")
        self.trunk = bt.btnet.trunk if bt else hr.backbone if hr else build_backbone(scale.backbone)
        canonical = self.trunk.config.size[0]
        self.resolutions = bt.btnet.resolutions if bt else (*sorted(scale.resolutions), canonical)
        needed = {
            one: set(self.resolutions) - set(getattr(found.get(one), "single", self.resolutions))
            for one in METHODS
        }
        missing = [
            one for one in METHODS if one not in found or needed[one]
        ]  # phi_mm: a model for each resolution
        self.methods = {one: found[one] for one in METHODS if one not in missing}
        self.note = f"Not trained yet in {models}: {', '.join(missing)}. Train: btnet reproduce --scale {scale.name} --only 03,04"
        self.note *= bool(missing)
        networks = {"of this scale": self.trunk.config, "the paper's": BackboneConfig()}
        self.networks = {
            name: allocations(config, scale.resolutions) for name, config in networks.items()
        }
        faces = open_once(scale.others)
        people = [
            np.flatnonzero(faces.labels.numpy() == label)[:3]
            for label in range(faces.num_identities)
        ]
        able = [images for images in people if len(images) > 1][: min(known, len(people) // 2)]
        others = [
            images for images in people if len(images) and images[0] not in {one[0] for one in able}
        ][:strangers]
        if not able or not others:
            raise DataError(
                f"{faces.name}: {len(people)} people; expected one with two images, and a stranger"
            )
        self.known, self.gallery = len(able), faces.images([images[1] for images in able])
        self.probes = faces.images(
            [images[0] for images in (*able, *others)]
        )  # known people, then strangers
        entries = faces.images(np.concatenate([images[1:] for images in able]))
        who = np.repeat(np.arange(self.known), [len(images) - 1 for images in able])
        self.entries: dict[str, Tensor] = {}  # method -> (known, D), unit length
        self.cosines: dict[tuple[str, int], np.ndarray] = {}  # method, r -> (probes, known)
        for name, embedder in tqdm(self.methods.items(), desc="embedding", leave=False):
            self.entries[name] = F.normalize(prototypes(embedder(entries, canonical), who)[1])
            for r in self.resolutions:
                self.cosines[name, r] = (
                    F.normalize(embedder(self.probes, r)) @ self.entries[name].T
                ).numpy()

    def threshold(self, name: str, r: int, fpir: float) -> float:
        """The smallest at which at most a share ``fpir`` of the strangers at r rows are taken for somebody."""
        return strictest_needed(self.cosines[name, r][self.known :].max(1), fpir)

    def recognised(self, name: str, r: int, fpir: float) -> np.ndarray:
        """For each probe: 1 = called by the right name, 0 = by none, -1 = by a wrong one."""
        cosines = self.cosines[name, r]
        right = cosines.argmax(1) == np.arange(len(cosines))
        return np.where(cosines.max(1) > self.threshold(name, r, fpir), np.where(right, 1, -1), 0)

    def face(self, choice: Choice) -> tuple[Tensor, int | None]:
        """The chosen face at canonical size, and which of the probes it is. Raises DataError, ConfigError."""
        if choice.source in ("known", "stranger") and not choice.upload:
            pool = (
                range(self.known)
                if choice.source == "known"
                else range(self.known, len(self.probes))
            )
            return self.probes[probe := pool[choice.person % len(pool)]], probe
        if choice.upload:
            return at_size(decode(choice.upload, where="upload"), (112, 112)), None
        if not choice.source:
            raise DataError("upload an image, or give the path of an image or of a data set")
        if Path(choice.source).suffix.lower() in SUFFIXES:
            return at_size(to_pixels(Path(choice.source).expanduser(), "face"), (112, 112)), None
        faces = open_once(SYNTHETIC if choice.source == "synthetic" else choice.source)
        return faces.images([choice.person % len(faces)])[0], None

    def look(self, choice: Choice) -> dict[str, Any]:
        """One face: its pixels, the branch r, and by method the maps (H, W) of the stages and the cosines (known,)."""
        how, (face, probe) = (
            Resize(kernel=choice.kernel, antialias=choice.antialias),
            self.face(choice),
        )
        h, w = choice.height, max(1, round(choice.height * choice.aspect / 100))
        rule = {
            "indicator": choice.indicator,
            "rounding": choice.rounding,
            "resolutions": self.resolutions,
        }
        native, r = resize(face, (h, w), how), select_branch(w, h, **rule)
        seen, walks = (
            resize(native, 112, how),
            {name: self._walk(name, native, r, how) for name in self.methods},
        )
        error = (seen - face).abs().mean(0).numpy()
        return {
            "face": face,
            "probe": probe,
            "native": native,
            "seen": seen,
            "error": error,
            "r": r,
            "methods": walks,
        }

    @torch.inference_mode()
    def _walk(
        self, name: str, native: Tensor, r: int, how: Resize
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Unit by unit through the method's network for r: RMS over channels where branches join; cosines."""
        embedder, maps = self.methods[name], []
        trunk, net = network(embedder, r)
        parts, size = (
            ((net.branch, net.shared), net.size)
            if isinstance(net, Route)
            else ((net.body,), net.config.size)
        )
        joins = [coupling_layer(trunk, rows) for rows in stages(trunk)]
        z = trunk.normalise(resize(trunk.crop(native)[None], size, how)).to(embedder.device)
        with autocast(embedder.device, embedder.precision):
            z = z.contiguous(memory_format=torch.channels_last)
            for unit, module in itertools.chain(*(part.named_children() for part in parts)):
                z = module(z)
                if unit in joins:
                    maps.append(z[0].float().square().mean(0).sqrt().cpu().numpy())
            embedding = F.normalize(embed_features(net.head, z).float().cpu())
        return maps, (self.entries[name] @ embedding[0]).numpy()

    def picture(self, choice: Choice) -> tuple[Page, str]:
        """One face and who is recognised, and a line that says which branch was taken and why."""
        view, n = self.look(choice), len(self.methods)
        r, (h, w) = view["r"], view["native"].shape[-2:]
        with mpl.rc_context(style.STYLE):
            page = Page(338 + 90 * n if n else 226)
            error = np.uint8(255 * mpl.colormaps["magma"](view["error"] / 64)[..., :3])
            mean = f"|error|, mean {view['error'].mean():.1f} levels"
            titles = ("face, 112 px", f"captured: {w} x {h} px", "scaled back up", mean)
            shown = (*(pixels(view[name]) for name in ("face", "native", "seen")), error)
            for x, title, image in zip(range(48, 808, 190), titles, shown, strict=True):
                page.tile(image, x, 30, 176)
                page.text_at(x + 88, 16, title, ha="center", fontsize=8)
            side, here = (
                np.arange(3, 131),
                {"min": min(w, h), "max": max(w, h), "avg": (w + h) // 2}[choice.indicator],
            )
            axes = page.axes_at(858, 30, 210, 158)
            taken = select_branch(
                side, side, rounding=choice.rounding, resolutions=self.resolutions
            )
            axes.step(side, taken, "#999999", where="mid")
            axes.plot(here, r, "o", color=style.colour(r), markersize=9)
            axes.set(
                xscale="log",
                yscale="log",
                title=f"{choice.indicator} = {here} px, {choice.rounding}: branch {r}",
            )
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_ticks(self.resolutions, [str(one) for one in self.resolutions])
                axis.set_ticks([], minor=True)
            if n:
                self._draw_methods(page, choice, view, 252)
                self._draw_people(page, choice, r, 300 + 68 * n)
            return page, f"{w} x {h} px, {choice.indicator} + {choice.rounding}: branch {r}"

    def _draw_methods(
        self, page: Page, choice: Choice, view: dict[str, Any], top: int, row: int = 68
    ) -> None:
        """A line for each method: feature maps, cosines with the gallery against the threshold, nearest entries."""
        rows = ", ".join(map(str, stages(self.trunk)))
        titles = (
            f"feature maps where the trunk has {rows} rows",
            "cosine with the gallery (● this person)",
            "nearest in the gallery",
        )
        for x, title in zip((184, 490, 800), titles, strict=True):
            page.text_at(x, top - 14, title, ha="center", fontsize=8)
        for value in (-0.4, 0, 0.5, 1):
            page.text_at(
                426 + 214 * value, top + row * len(self.methods) + 8, f"{value:g}", ha="center"
            )
        for y, (name, (maps, cosines)) in zip(
            itertools.count(top, row), view["methods"].items(), strict=False
        ):
            own = style.METHODS[name][1]
            t, best = self.threshold(name, view["r"], choice.fpir), np.argsort(-cosines)[:4]
            tiles = [np.uint8(255 * mpl.colormaps["viridis"](stretched(z))[..., :3]) for z in maps]
            tiles += [pixels(self.gallery[person]) for person in best]
            places = [
                *range(48, 48 + row * len(maps), row),
                *range(664, 664 + row * len(best), row),
            ]
            for x, tile in zip(places, tiles, strict=True):
                page.tile(tile, x, y + 2, row - 4)
            page.text_at(24, y + row / 2, f"φ_{name[4:]}", ha="center", color=own, fontsize=9)
            page.mark(426 + 214 * cosines, y + row / 2, "|", color="#999999", markersize=10)
            page.mark(426 + 214 * max(t, -0.4), (y + 6, y + row - 6), "-", color=style.RED)
            if known := view["probe"] is not None and view["probe"] < self.known:
                page.mark(426 + 214 * cosines[view["probe"]], y + row / 2, "o", color=own, ms=7)
            value, right = cosines[best[0]], known and best[0] == view["probe"]
            verdict, colour = (
                ("recognised", style.GREEN) if right else ("taken for the first", style.RED)
            )
            verdict, colour = (verdict, colour) if value > t else ("nobody", "#666666")
            page.text_at(
                944, y + row / 2, f"{verdict}\n{value:.2f}, threshold {t:.2f}", color=colour
            )

    def _draw_people(self, page: Page, choice: Choice, r: int, top: int, row: int = 22) -> None:
        """Known people and strangers, all shrunk to the resolution of the branch: who is called what by each method."""
        small, limit = (
            [pixels(face) for face in resize(self.probes, r)],
            f"at most {choice.fpir:.0%}",
        )
        titles = (
            f"Known people at {r} px: ● recognised, ✗ wrong name",
            f"Strangers at {r} px: ✗ taken for known, {limit}",
        )
        for title, start, stop, x in zip(
            titles, (0, self.known), (self.known, len(small)), (48, 570), strict=True
        ):
            page.text_at(x, top - 14, title, fontsize=8)
            at = x + 460 / (stop - start) * (np.arange(stop - start) + 0.5)
            for place, image in zip(at, small[start:stop], strict=True):
                page.tile(
                    image, round(place - 230 / (stop - start)), top, 24, round(460 / (stop - start))
                )
            for y, name in zip(
                itertools.count(top + 24 + row // 2, row), self.methods, strict=False
            ):
                found = self.recognised(name, r, choice.fpir)[start:stop]
                for value, mark, colour in (
                    (1, "o", style.GREEN),
                    (0, ".", "#bbbbbb"),
                    (-1, "X", style.RED),
                ):
                    page.mark(at[found == value], y, mark, color=colour, markersize=5)
                page.text_at(x + 466, y, f"{np.mean(found == (-1 if start else 1)):.0%}")
                page.text_at(24, y, f"φ_{name[4:]}", ha="center", color=style.METHODS[name][1])

    def costs(self, choice: Choice) -> tuple[Page, str]:
        """What each branch costs wherever it ends, and a line with the numbers of the chosen end."""
        tables = self.networks[choice.network]
        rows = tables[choice.branch]
        standard = {
            r: [row["standard"] for row in table].index(True) for r, table in tables.items()
        }
        ends = standard[choice.branch] if choice.ends < 0 else min(choice.ends, len(rows) - 1)
        row, colour = rows[ends], style.colour(choice.branch)
        with mpl.rc_context(style.STYLE):
            page = Page(250)
            left, right = page.axes_at(70, 30, 660, 150), page.axes_at(800, 30, 268, 150)
            left.plot([100 * entry["share"] for entry in rows], ".-", color=colour)
            left.plot(
                ends, 100 * row["share"], "o", color=colour, **style.HOLLOW | {"markersize": 13}
            )
            for r, at in standard.items():
                left.plot(
                    at,
                    100 * tables[r][at]["share"],
                    "*",
                    color=style.colour(r),
                    markersize=11,
                    mec="white",
                )
                right.barh(str(r), tables[r][0]["macs"] / row["trunk"], color=style.colour(r))
            left.set(
                yscale="log",
                ylabel="stored, % of the trunk",
                title="Where the branch ends (★ BTNet's choices)",
            )
            left.set_yticks((0.1, 1, 10, 100), ("0.1", "1", "10", "100"))
            left.set_xticks(
                range(len(rows)),
                [entry["unit"] for entry in rows],
                rotation=60 if len(rows) > 12 else 0,
            )
            right.set(title="MACs a face, share of the trunk's", ylabel="r (px)", xlim=(0, 1))
        return page, (
            f"B_{choice.branch} up to {row['unit']}: {row['stored']:,} parameters ({row['share']:.1%} of the trunk), "
            f"{row['bytes'] / 1e6:.2f} MB, {row['macs'] / 1e9:.3g} GMACs a face (trunk: {row['trunk'] / 1e9:.3g})"
        )


def allocations(
    config: BackboneConfig, resolutions: Sequence[int]
) -> dict[int, list[dict[str, Any]]]:
    """r -> for each unit where its branch may end: parameters and bytes to store, share of the trunk, MACs."""
    with torch.device("meta"):
        net = BTNet(build_backbone(config), resolutions)
    tables: dict[int, list[dict[str, Any]]] = {}
    trunk, whole = (
        count_macs(net.trunk, config.size),
        sum(p.numel() for p in net.trunk.parameters()),
    )
    for r in resolutions:
        usual: Any = net.route(r)
        macs, tables[r] = count_macs(usual, usual.size), []  # the same wherever the branch ends
        for unit, _ in net.trunk.units():
            route = Route(net.trunk, r, couple_at=unit)
            stored, size = (
                sum(p.numel() for p in route.trainable().values()),
                sum(t.nbytes for t in route.own_state().values()),
            )
            facts = {
                "unit": unit,
                "standard": unit == usual.couple_at,
                "stored": stored,
                "share": stored / whole,
            }
            tables[r].append(facts | {"bytes": size, "macs": macs, "trunk": trunk})
    return tables


class Page(Figure):
    """A figure addressed in pixels from its upper left corner, with as few axes as can be: they are what takes time."""

    def __init__(self, height: int) -> None:
        super().__init__(figsize=(WIDTH / DPI, height / DPI), dpi=DPI)
        self.over = self.add_axes((0, 0, 1, 1))
        self.over.axis("off")
        white = np.full((height, WIDTH, 3), 255, np.uint8)
        self.pixels: Any = (
            self.over.imshow(white, extent=(0, WIDTH, height, 0), aspect="auto").get_array().data
        )

    def tile(self, image: np.ndarray, x: int, y: int, h: int, w: int = 0) -> None:
        w = w or min(h, round(h * image.shape[1] / image.shape[0]))
        self.pixels[y : y + h, x : x + w] = np.asarray(
            Image.fromarray(image).resize((w, h), Image.Resampling.NEAREST)
        )

    def mark(self, x: Any, y: Any, marker: str, **options: Any) -> None:
        self.over.plot(*np.broadcast_arrays(x, y), marker, **options)

    def text_at(self, x: float, y: float, text: str, **options: Any) -> None:
        self.over.text(x, y, text, **{"va": "center", "fontsize": 7} | options)

    def axes_at(self, x: float, y: float, w: float, h: float) -> Axes:
        height = len(self.pixels)
        return self.add_axes((x / WIDTH, 1 - (y + h) / height, w / WIDTH, h / height))


def png(page: Page) -> bytes:
    """Fast, not small: pictures go past matplotlib, whose resampling would take a quarter of the time."""
    canvas, out, (image,) = FigureCanvasAgg(page), io.BytesIO(), page.over.images
    image.set_visible(False)
    canvas.draw()
    image.set_visible(True)
    shown = np.minimum(
        np.asarray(canvas.buffer_rgba())[..., :3], page.pixels
    )  # one of the two is white everywhere
    Image.fromarray(shown).save(out, "PNG", compress_level=1)
    return out.getvalue()


def controls(explorer: Explorer, start: Choice | None = None) -> Any:
    """ipywidgets: the fields of a `Choice` beside the two figures, which follow at once."""
    import ipywidgets as widgets

    start = start or Choice()
    usual = [row["standard"] for row in explorer.networks[start.network][start.branch]].index(True)
    face = {
        "source": widgets.Dropdown(options=SOURCES, value=start.source, description="face"),
        "path": widgets.Text(
            placeholder="photo.jpg, folder, list, .rec",
            description="or path",
            continuous_update=False,
        ),
        "upload": widgets.FileUpload(accept="image/*", description="or upload"),
        "person": widgets.IntSlider(start.person, 0, explorer.known - 1, description="person"),
        "height": widgets.IntSlider(start.height, 4, 112, description="height (px)"),
        "aspect": widgets.IntSlider(start.aspect, 50, 100, 5, description="width (%)"),
        "kernel": widgets.Dropdown(options=KERNELS, value=start.kernel, description="kernel"),
        "antialias": widgets.Checkbox(start.antialias, description="antialias"),
        "indicator": widgets.Dropdown(
            options=INDICATORS, value=start.indicator, description="indicator"
        ),
        "rounding": widgets.Dropdown(
            options=ROUNDINGS, value=start.rounding, description="rounding"
        ),
        "fpir": widgets.FloatSlider(
            start.fpir, min=0, max=0.5, step=0.02, readout_format=".0%", description="FPIR"
        ),
    }
    cost = {
        "network": widgets.Dropdown(options=list(explorer.networks), description="network"),
        "branch": widgets.Dropdown(
            options=list(explorer.networks[start.network]),
            value=start.branch,
            description="branch (px)",
        ),
        "ends": widgets.IntSlider(usual, 0, 24, description="ends at unit", readout=False),
    }
    parts: list[Any] = [widgets.HTML(f"<b>{explorer.note}</b>")] * bool(explorer.note)
    for boxes, draw in ((face, explorer.picture), (cost, explorer.costs)):
        image = widgets.Image(format="png", layout={"max_width": "100%"})

        def follow(
            path: str = "", upload: Any = (), *, draw: Any = draw, image: Any = image, **values: Any
        ) -> None:
            began = time.perf_counter()
            if not values.get("source", "known"):
                values |= {
                    "source": path,
                    "upload": bytes(upload[-1]["content"]) if upload and not path else b"",
                }
            try:
                figure, line = draw(Choice(**values))
                image.value = png(figure)
                print(f"{line} · answered in {1e3 * (time.perf_counter() - began):.0f} ms")
            except BTNetError as error:
                print(error)

        output = widgets.interactive_output(follow, boxes)
        for box in boxes.values():
            box.layout.width, box.style.description_width = "270px", "80px"
        parts.append(
            widgets.HBox(
                [
                    widgets.VBox(list(boxes.values()), layout={"min_width": "290px"}),
                    widgets.VBox([image, output]),
                ]
            )
        )
    return widgets.VBox(parts)
