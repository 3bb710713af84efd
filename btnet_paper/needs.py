"""What a scale needs: data from outside, and the time, memory and disk of its runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch

from btnet_core.data.faces import open_faces
from btnet_core.data.sources import Spec, paths_of, spec_text
from btnet_core.errors import BTNetError, ReproduceError
from btnet_core.files import checksum, data_root, find
from btnet_core.models.backbone import build_backbone
from btnet_core.models.btnet import BTNet, Route
from btnet_core.models.costs import Cost, route_cost
from btnet_core.training.config import TrainConfig
from btnet_paper import plans, published
from btnet_paper.openers import OPENERS
from btnet_paper.scales import Scale, get_scale

# Assumed, not measured: a fifth of what an RTX 2080 Ti, the paper's card, can do in fp16.
GPU, MACS_PER_SECOND = "RTX 2080 Ti, fp16, a fifth of its peak", 11e12
GB = 1e9
SURVFACE = (220_890, 5_319)  # images and people of QMUL-SurvFace's training part


@dataclass(frozen=True, kw_only=True)
class Need:
    """Data or weights that notebooks of a scale read."""

    what: str
    kind: str  # of OPENERS
    spec: Spec
    notebooks: tuple[str, ...]  # their numbers

    def look(self) -> tuple[bool, str]:
        """Returns whether it can be opened, and what it holds or why not."""
        try:
            return True, OPENERS[self.kind](self.spec)
        except (BTNetError, OSError) as error:
            places = [
                place / path for path in paths_of(self.spec) for place in (data_root(), Path())
            ]
            looked = ", ".join(str(place.absolute()) for place in places)
            return False, f"{error} (looked for {looked})"


def needs(scale: Scale) -> list[Need]:
    """Returns everything that the notebooks of a scale read, with those that read it."""
    testing = ("03", "04", "05", "07", "12")
    found = [
        _need_of_faces("training faces", scale.faces, "01", "03", "04", "07", "12"),
        *(Need(what="pairs", kind="pairs", spec=one, notebooks=testing) for one in scale.pairs),
    ]
    if "data" in scale.ablation:
        found.append(_need_of_faces("faces of Section 5", scale.ablation["data"], "07", "12"))
    others = ["09", "10"]
    tuned = scale.survface_faces or scale.faces
    if scale.survface:
        root, tuned = scale.survface, f"{scale.survface}/training_set"
        readers = ("06", "12")
        found.append(Need(what="SurvFace's test", kind="open set", spec=root, notebooks=readers))
    else:
        others += ["06", "12"]
    found.append(_need_of_faces("SurvFace's training part", tuned, "06"))
    if scale.ijbc:
        readers = ("08", "12")
        found.append(Need(what="IJB-C", kind="templates", spec=scale.ijbc, notebooks=readers))
    else:
        others += ["08", "12"]
    found.append(_need_of_faces("faces of other people", scale.others, *others))
    if scale.pretrained:
        everywhere = tuple(f"{number:02}" for number in range(13))  # Study takes it
        trunk = {"what": "phi_hr trained by others", "kind": "weights", "spec": scale.pretrained}
        found.append(Need(**trunk, notebooks=everywhere))
    return found


def _need_of_faces(what: str, spec: Spec, *notebooks: str) -> Need:
    return Need(what=what, kind="faces", spec=spec, notebooks=notebooks)


def require(scale: Scale, numbers: Sequence[str]) -> None:
    """Opens all that the notebooks of these numbers read, before the first of them runs.

    Raises:
        ReproduceError: something lacks; the message names it, where it was looked for, and the
            data root.
    """
    lacks = []
    for need in needs(scale):
        if set(need.notebooks) & set(numbers):
            there, said = need.look()
            if not there:
                readers = ", ".join(sorted(set(need.notebooks) & set(numbers)))
                lacks.append(f"  {need.what} (notebooks {readers}): {said}")
    if lacks:
        how = f"data root: {data_root()} (BTNET_DATA); `btnet data` says how to get each"
        raise ReproduceError(f"scale {scale.name} lacks:\n" + "\n".join([*lacks, how]))


def data_checksum(scale: str) -> str:
    """Returns a checksum of a scale's page and of all the data that it names."""
    page = get_scale(scale)
    decides = {key: value for key, value in asdict(page).items() if key != "claim"}
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode())
    for need in needs(page):
        files = [file for path in paths_of(need.spec) for file in _files(find(path))]
        digest.update(f"{spec_text(need.spec)} {checksum(files)}\n".encode())
    return digest.hexdigest()


def _files(place: Path) -> list[Path]:
    """Returns the file, or those of a folder, in order."""
    found = sorted(place.rglob("*")) if place.is_dir() else [place]
    return [file for file in found if file.is_file()]


def costs(scale: Scale) -> pd.DataFrame:
    """Returns for each run of a scale its GPU hours (on GPU, assumed), memory and disk in GB.

    Memory is of weights, gradients and momentum, without activations; disk of weights and
    checkpoint; the teacher's features are kept where they are used more than once.
    """
    models = Path("models")
    with torch.device("meta"):  # shapes, no memory
        network = build_backbone(scale.backbone)
    runs = {f"Table 1: {run.name}": run for run in plans.plan(scale, models).values()}
    for run in plans.finetuning(scale, models, "SurvFace").values():
        runs[f"Table 2: {run.name}"] = run
    for rows in plans.ablations(scale, models, network=network).values():
        runs |= {f"Section 5: {run.name}": run for run in rows.values()}
    resolutions = {run.resolution for run in runs.values()} - {0}
    with torch.device("meta"):
        btnet = BTNet(network, sorted(resolutions))
    routes = {r: (route_cost(btnet, r), _features(btnet, r)) for r in btnet.resolutions}
    sizes = {spec_text(run.data): _size(run.data, scale) for run in runs.values()}
    lines = {
        name: _cost(run, routes, sizes[spec_text(run.data)], scale.backbone.embedding)
        for name, run in runs.items()
    }
    return pd.DataFrame.from_dict(lines, orient="index")


def _cost(
    run: TrainConfig, routes: dict[int, tuple[Cost, int]], size: tuple[int, int], embedding: int
) -> dict[str, float]:
    (images, identities), whole = size, max(routes)
    route, features = routes[run.resolution or whole]
    macs = 3 * run.epochs * route.macs  # forward, and about twice that backward
    kept = 0
    if run.branch_weight:  # the teacher sees both mirror images once, or one at every step
        macs += (2 if run.cache_dir else run.epochs) * routes[whole][0].macs
        kept = 2 * images * features if run.cache_dir else 0
    parameters = route.route + identities * embedding
    return {
        "GPU hours": images * macs / MACS_PER_SECOND / 3600,
        "memory, GB": 3 * 4 * parameters / GB,
        "disk, GB": 3 * 4 * parameters / GB,
        "features, GB": 2 * kept / GB,  # of the teacher, two bytes each; runs of one r share them
    }


def _features(btnet: BTNet, r: int) -> int:
    """Returns how many numbers the teacher's map and embedding of one face are, with its input."""
    route, embedding = btnet.route(r), btnet.trunk.config.embedding
    if not isinstance(route, Route):
        return embedding
    with torch.no_grad():
        face = torch.empty(1, 3, *route.size, device="meta")
        return face.numel() + route.encode(face).numel() + embedding


def _size(data: Spec, scale: Scale) -> tuple[int, int]:
    """Returns images and people of a set, or the paper's numbers where it is not here."""
    try:
        faces = open_faces((scale.survface_faces or scale.faces) if data == "SurvFace" else data)
        return len(faces), faces.num_identities
    except (BTNetError, OSError):
        if data == "SurvFace":
            return SURVFACE
        return published.text("ms1mv3_images"), published.text("ms1mv3_identities")


def check(scale: Scale, numbers: Sequence[str] = ()) -> bool:
    """Prints what a scale needs and what its runs cost; returns whether nothing lacks."""
    print(f"Scale {scale.name}. Data root: {data_root()} (BTNET_DATA)")
    complete = True
    for need in needs(scale):
        if numbers and not set(need.notebooks) & set(numbers):
            continue
        there, said = need.look()
        complete &= there
        mark = "found  " if there else "LACKS  "
        places = ", ".join(str(find(path)) for path in paths_of(need.spec)) if there else ""
        print(f"{mark}{need.what}: {spec_text(need.spec)}: {said} {places}".rstrip())
    table = costs(scale)
    table.loc["all"] = table.sum()
    for column in ("memory, GB", "features, GB"):  # not at once, and shared
        table.loc["all", column] = table[column].iloc[:-1].max()
    print(f"\nHours are of one {GPU} ({MACS_PER_SECOND / 1e12:g} TMAC/s, assumed).")
    print(table.to_string(float_format="{:.2f}".format))
    return complete
