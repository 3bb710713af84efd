"""The scales of the experiment, each a page under ``configs/``: what is trained, on what, and how.

Every result names the scale that made it. A page lists fields of :class:`Scale`; one with
``base: lfw`` takes the page of that name (beside it, else among the scales) and changes what it
lists.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from btnet_core.data.sources import Spec
from btnet_core.errors import ConfigError, check_types, from_fields
from btnet_core.files import find, reason
from btnet_core.kinds import what_is
from btnet_core.models.backbone import BackboneConfig
from btnet_core.training.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
# Fields that hold fields of TrainConfig: a page changes those of its base one by one.
RUNS = ("hr", "trunk", "branch", "ablation", "survface_trunk", "survface_branch")
BY_RESOLUTION = ("epochs", "survface_epochs")  # these, too
# Readings of phi_mm -> (row of Table 1, how its folders begin)
SPECIALISTS = {
    "native": ("phi_mm", "phi_mm_"),
    "scaled_up": ("phi_mm, scaled up", "phi_mm_up_"),
    "from_hr": ("phi_mm, from phi_hr", "phi_mm_hr_"),
}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What a scale trains, on what, and how its numbers may be read."""

    name: str
    claim: str  # one sentence shown beside every number
    faces: Spec  # training faces, for data.faces.open_faces
    pairs: tuple[Spec, ...]  # verification sets, for data.pairs.open_pairs; their mean is shown
    others: Spec  # faces of people outside `faces`: stand-ins for galleries and templates
    backbone: BackboneConfig  # of a trunk that is trained from random weights
    pretrained: str = ""  # file of phi_hr trained by others; "": it is trained here
    resolutions: tuple[int, ...] = (28, 14, 7)  # of the branches, rows in pixels
    threads: int = 0  # of the CPU, of a training and of what is evaluated; 0: as cores are idle
    pictures: bool = False  # whether its faces may be shown in committed figures
    from_hr: bool = False  # Deviation where True: phi_mr starts from phi_hr
    authors: bool = False  # train and evaluate as the authors' code does, where it differs
    teacher: str = "phi_mr"  # the trunk that the branches join
    variants: tuple[str, ...] = ("v1",)  # of phi_mr: candidate sizes (methods.MR_VARIANTS)
    hr: dict[str, Any] = field(default_factory=dict)  # fields of TrainConfig for phi_hr
    trunk: dict[str, Any] = field(default_factory=dict)  # for phi_mr
    # for each network of phi_mm, by reading of it (SPECIALISTS); {}: not trained
    specialists: dict[str, dict[str, Any]] = field(default_factory=lambda: {"native": {}})
    branch: dict[str, Any] = field(default_factory=dict)  # for each branch of phi_bt
    epochs: dict[int, int] = field(default_factory=dict)  # of the branch of r, where not `branch`'s
    ablation: dict[str, Any] = field(default_factory=dict)  # for the runs of Section 5
    ablated: int = 14  # resolution of those runs, rows in pixels
    survface: str = ""  # QMUL-SurvFace; "": a stand-in of `others`
    ijbc: str = ""  # IJB-C; "": a stand-in of `others`
    survface_faces: Spec = ""  # of which the stand-in's training part is made; "": `faces`
    # fields of TrainConfig where trunk and branches are fine-tuned on SurvFace (notebook 06)
    survface_trunk: dict[str, Any] = field(default_factory=dict)
    survface_branch: dict[str, Any] = field(default_factory=dict)
    survface_epochs: dict[int, int] = field(default_factory=dict)  # of the branch of r

    @property
    def shown(self) -> Spec:
        """Faces for pictures that may be published: its own, or the demo's if its are real."""
        return self.faces if self.pictures else get_scale("demo").faces

    def __post_init__(self) -> None:
        check_types(self)

    def run_dir(self, given: str | Path = "") -> Path:
        """Returns the folder of this scale's runs: ``given``, or the repository's ``runs/NAME``."""
        return Path(given) if given else ROOT / "runs" / self.name


def pages() -> dict[str, Path]:
    """Returns the scales' pages by name: those of ./configs, else the repository's."""
    for folder in (Path("configs"), ROOT / "configs"):
        if found := sorted(folder.resolve().glob("*.yaml")):
            return {path.stem: path for path in found}
    return {}


def get_scale(name: str) -> Scale:
    """Returns the scale of that name, or of the page whose path ``name`` is.

    Raises:
        ConfigError: there is no such page, or it is not one; the message names page and field.
    """
    known = pages()
    path = Path(name) if name.endswith(".yaml") else known.get(name)
    if path is None:
        raise ConfigError(f"scale: got {name!r}, expected one of {', '.join(known)}")
    values = _read(path)
    values |= {"name": path.stem, "pairs": values.get("pairs", ())}
    try:
        values["backbone"] = from_fields(BackboneConfig, values.get("backbone"), "backbone")
        page = from_fields(Scale, values, "page")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return replace(page, pairs=tuple(_beside(one, page.faces) for one in page.pairs))


def _beside(pairs: Spec, faces: Spec) -> Spec:
    """Returns ``pairs``, found in the folder of the training faces if that alone has them.

    InsightFace ships its ``.bin`` files so.
    """
    if not (isinstance(pairs, str) and isinstance(faces, str)) or find(pairs).exists():
        return pairs
    inside = f"{faces}/{pairs}"
    return inside if find(inside).exists() else pairs


def _read(path: Path) -> dict[str, Any]:
    """Returns the fields of a page, those of its base under its own."""
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({reason(error)})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: no page in YAML, but {what_is(path)}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: no YAML ({place_in(error)})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: got {type(values).__name__}, expected `field: value` lines")
    _check(path, values)
    base = values.pop("base", None)
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    if base is None:
        return values
    beside = path.with_name(f"{base}.yaml")
    below = _read(beside if beside.is_file() else pages().get(base, beside))
    merged = {
        key: {**below.get(key, {}), **values[key]}
        for key in (*RUNS, *BY_RESOLUTION)
        if key in values
    }
    return below | values | merged


def place_in(error: yaml.YAMLError) -> str:
    """Returns where a page stops being YAML."""
    mark = getattr(error, "problem_mark", None)
    return f"line {mark.line + 1}, column {mark.column + 1}" if mark else "a sign it does not admit"


def _check(path: Path, values: dict[str, Any]) -> None:
    """Raises ConfigError for a field that a scale, or one of its runs, does not have."""
    known = {entry.name for entry in fields(Scale)} - {"name"} | {"base"}
    if unknown := values.keys() - known:
        raise ConfigError(f"{path}: unknown {sorted(unknown)}, expected some of {sorted(known)}")
    for name in (*RUNS, *BY_RESOLUTION, "specialists"):
        if not isinstance(values.get(name, {}), dict):
            got = f"got {values[name]!r}, expected fields with their values"
            raise ConfigError(f"{path}: {name}: {got}")
    specialists = values.get("specialists", {})
    if unknown := specialists.keys() - SPECIALISTS.keys():
        raise ConfigError(
            f"{path}: specialists: unknown {sorted(unknown)}, expected some of {[*SPECIALISTS]}"
        )
    trained = {entry.name for entry in fields(TrainConfig)}
    for run, changes in {**{run: values.get(run) for run in RUNS}, **specialists}.items():
        if unknown := (changes or {}).keys() - trained:
            raise ConfigError(f"{path}: {run}: unknown {sorted(unknown)}, see TrainConfig")
