"""What every notebook does around its subject: scale, folders, trunk, training, record, figures."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from IPython.display import Image, Markdown, display

from btnet_core.data.faces import FaceSet, open_faces
from btnet_core.data.ijbc import read_templates
from btnet_core.data.pairs import PairSet, open_pairs
from btnet_core.data.survface import OpenSet, read_open_set
from btnet_core.device import resolve_device
from btnet_core.evaluation.embedders import Embedder
from btnet_core.evaluation.templates import TemplateSet
from btnet_core.evaluation.verification import evaluate_pairs, summarise
from btnet_core.files import checksum, find, write_atomically
from btnet_core.images import Resize
from btnet_core.models.weights import load_backbone, save_backbone
from btnet_core.training.config import TrainConfig
from btnet_core.training.launch import train_all
from btnet_core.training.progress import read_metrics
from btnet_paper import claims, figures, published, records, results, tables
from btnet_paper.scales import Scale, get_scale
from btnet_paper.standins import ijbc_standin, survface_standin, survface_training_standin
from btnet_paper.state import MADE


class Study:
    """One notebook's run at one scale; building it again starts its clock anew and changes nothing.

        study = Study("05_verification", scale=scale, run_dir=run_dir, seed=seed, device=device)
        ...
        study.record({"accuracy": accuracy}, config={"flip": flip}, data=study.pairs)

    Shown as the last line of a cell it is the scale's claim. ``scale`` is a name or a Scale;
    ``run_dir`` "" is the scale's own folder;
    ``processes`` train together, "auto" one for each GPU.
    """

    def __init__(
        self, name: str, *, scale: str | Scale = "demo", run_dir: str | Path = "", seed: int = 0,
        device: str = "auto", processes: int | str = 1,
    ) -> None:  # fmt: skip
        self.name, self.seed = name, seed
        self.scale = get_scale(scale) if isinstance(scale, str) else scale
        self.run_dir = self.scale.run_dir(run_dir)
        self.models, self.embeddings = self.run_dir / "models", self.run_dir / "embeddings"
        self.device = str(resolve_device(device))
        number = str(processes)  # a notebook's parameter is a text: "1", "auto"
        self.processes: int | str = int(number) if number.isdecimal() else number
        self.claim = f"Scale `{self.scale.name}`: {self.scale.claim}"
        self.configs: dict[str, TrainConfig] = {}  # of the runs that `train` was given
        self.trained: dict[str, dict[str, Any]] = {}  # what they measured
        self.folders: dict[str, Path] = {}
        self.made: set[str] = set()
        self._began = time.monotonic()
        torch.manual_seed(seed)
        if self.scale.threads:
            torch.set_num_threads(self.scale.threads)
        if self.scale.pretrained:
            self._take_pretrained(find(self.scale.pretrained))

    def _take_pretrained(self, source: Path) -> None:
        """Keeps phi_hr that others trained where the own one would be."""
        kept, note = self.models / "phi_hr" / "trunk.safetensors", checksum([source])
        stamp = kept.with_name("source.txt")
        if not (kept.is_file() and stamp.is_file() and stamp.read_text() == note):
            save_backbone(load_backbone(source), kept)
            stamp.write_text(note)

    def keep(self, *made: Path | str) -> None:
        """Tells `btnet reproduce` of files and folders that this notebook has made."""
        self.made |= {os.path.relpath(path, self.run_dir) for path in made}
        write_atomically(self.run_dir / MADE.format(self.name), "\n".join(sorted(self.made)))

    def _repr_markdown_(self) -> str:
        return self.claim

    @cached_property
    def faces(self) -> FaceSet:
        """The scale's training faces."""
        return open_faces(self.scale.faces)

    @cached_property
    def pairs(self) -> list[PairSet]:
        """The scale's verification sets."""
        return [open_pairs(spec) for spec in self.scale.pairs]

    def survface(self, *, blur: float = 0.0, noise: float = 0.0) -> OpenSet:
        """The open-set test: QMUL-SurvFace, or a stand-in of this scale's other faces.

        ``blur`` (sigma, native pixels) and ``noise`` (grey levels) are of the stand-in.
        """
        if self.scale.survface:
            return read_open_set(find(self.scale.survface))
        others, how = open_faces(self.scale.others), {"blur": blur, "noise": noise}
        return survface_standin(others, self.run_dir / "data", seed=self.seed, **how)

    def survface_training(self) -> str:
        """The faces on which Table 2's networks are fine-tuned: a spec for `open_faces`."""
        if self.scale.survface:
            return str(find(self.scale.survface) / "training_set")
        faces = open_faces(self.scale.survface_faces or self.scale.faces)
        return str(survface_training_standin(faces, self.run_dir / "data", seed=self.seed))

    def templates(self) -> TemplateSet:
        """The templates of Tables 5 to 8: IJB-C, or a stand-in of this scale's other faces."""
        if self.scale.ijbc:
            return read_templates(find(self.scale.ijbc))
        others = open_faces(self.scale.others)
        data = ijbc_standin(others, self.run_dir / "data", seed=self.seed)
        images = data.images(range(len(data.template)))  # few enough to be aligned once
        return replace(data, images=lambda rows: images[torch.as_tensor(rows)])

    @property
    def settings(self) -> list[tuple[int, int]]:
        """Table 1's columns: 112 & r for each branch, smallest first, then r & r up to 112."""
        rows = sorted(self.scale.resolutions)
        return [(112, r) for r in rows] + [(r, r) for r in (*rows, 112)]

    def train(self, runs: Mapping[str, TrainConfig], folder: str = "") -> dict[str, dict[str, Any]]:
        """Trains each run in ``models/FOLDER/NAME``, in a process of its own, and returns metrics.

        A run that is finished is not repeated; an interrupted one goes on from its checkpoint.
        Where the scale gives ``threads`` they train side by side: see `train_all`.
        """
        threads = {"threads": self.scale.threads} if self.scale.threads else {}
        runs = {name: config.replace(**threads) for name, config in runs.items()}
        options: dict[str, Any] = {"device": self.device}
        if self.processes != 1:
            options["processes"] = self.processes
        folders = {name: self.models / folder / name for name in runs}
        self.folders |= folders
        self.configs |= runs
        self.keep(*folders.values(), *(run.btnet for run in runs.values() if run.btnet))
        found = train_all({folders[name]: config for name, config in runs.items()}, **options)
        for name, measured in zip(runs, found, strict=True):
            self.trained[name] = {key: measured[key] for key in measured if key != "config"}
        return {name: self.trained[name] for name in runs}

    def verify(
        self, embedder: Embedder, settings: Sequence[tuple[int, int]] = (), **options: Any
    ) -> dict[str, dict[str, Any]]:
        """Returns accuracies over all verification sets: ``summarise`` of ``evaluate_pairs``.

        ``settings``: those of Table 1 by default, as far as the embedder covers them. Embeddings
        are kept in ``RUN_DIR/embeddings``, where every notebook finds them.
        """
        covered = embedder.covered(settings or self.settings)
        options = {"keep": self.embeddings, **options}
        return summarise([evaluate_pairs(embedder, one, covered, **options) for one in self.pairs])

    def history(self, *keys: str) -> dict[str, dict[str, list[float]]]:
        """Returns ``{run: {"step": [...], key: [...]}}`` of the runs trained here."""
        found = {}
        for name, folder in self.folders.items():
            rows = [row for row in read_metrics(folder) if set(keys) <= row.keys()]
            found[name] = {key: [row[key] for row in rows] for key in ("step", *keys)}
        return found

    def record(
        self, values: Mapping[str, Any], *, config: Mapping[str, Any] | None = None,
        data: Iterable[Any] = (), kernel: str = Resize().name,
        arrays: Mapping[str, Any] | None = None, show: bool = True,
    ) -> dict[str, Any]:  # fmt: skip
        """Writes ``results/NAME.json`` and its figures, and returns what was written.

        Args:
            config: options of what was measured; the configurations of the runs come to them.
            data: sets with a ``checksum`` on which it was measured.
            kernel: name of the resize; "": there was none.
            arrays: small pictures of faces that may be shown, for figures.
            show: whether the figures are shown here.
        """
        config = {**(config or {}), **{name: asdict(run) for name, run in self.configs.items()}}
        written = results.record(
            self.run_dir, self.name, dict(values), config=config,
            data=" ".join(one.checksum for one in data), kernel=kernel, seed=self.seed,
            seconds=time.monotonic() - self._began, scale=self.scale.name, device=self.device,
            arrays=arrays,
        )  # fmt: skip
        names = figures.save(self.run_dir, self.name)
        made = [self.run_dir / f"figures/{name}.png" for name in names]
        self.keep(written, written.with_suffix(".npz"), *made)
        for path in made if show else ():
            display(Image(path, width=figures.shown_width(path), alt=path.stem))
        return self.load()

    def table(self, name: str, values: Mapping[str, Any], measured_on: str = "") -> tables.Table:
        """Returns "table1" … with gains: ours from ``values``, as recorded, beside the paper's."""
        long = pd.concat([self._long(values), records.paper()])
        wide = tables.wide(name, long)
        ours, theirs = (
            wide.loc[source].dropna(axis="columns", how="all")
            for source in (f"scale {self.scale.name}", records.PAPER)
        )
        caption = f"Table {name[5:]}. {published.title(name)}; ours at the scale {self.scale.name}"
        return tables.show(ours, theirs, caption=f"{caption}: {measured_on}".rstrip(": "))

    def verdict(self, where: str, values: Mapping[str, Any]) -> Markdown:
        """Returns whether ``values``, as recorded, show what the paper claims of e.g. "Table 1"."""
        told = claims.told(self._long(values), where)
        return Markdown(told or f"{where}: no claim of the paper can be asked of these numbers.")

    @staticmethod
    def compared(same: bool, because: str) -> Markdown:
        """Returns a verdict that no claim of claims.py gives."""
        return Markdown(f"**{'As' if same else 'Not as'} in the paper**, because {because}.")

    def _long(self, values: Mapping[str, Any]) -> pd.DataFrame:
        record = {"name": self.name, "scale": self.scale.name, "values": values}
        return records.numbers(record)

    def load(self, name: str = "") -> dict[str, Any]:
        """Returns the values recorded by this notebook, or by the one named."""
        return results.load(self.run_dir, name or self.name)["values"]
