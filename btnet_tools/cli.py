"""`btnet COMMAND`. A command imports what it needs when it runs, so that --help is quick."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from btnet_core.errors import BTNetError, ReproduceError

# Those of scales.py, which --help does not import.
HEADLINE = "03,04,05"  # notebooks
SCALES = (
    "demo", "lfw", "lfw-edgeface", "lfw-mr", "lfw-ms1m", "lfw-scratch", "paper", "paper-authors",
)  # fmt: skip


class Command(click.Command):
    """A command with --debug, whose errors are one line; ``resumes``: goes on after Ctrl-C."""

    def __init__(self, *args: Any, resumes: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.resumes = resumes
        said = "Show the traceback of an error (or BTNET_DEBUG=1)."
        self.params.append(click.Option(["--debug"], is_flag=True, help=said))

    def invoke(self, context: click.Context) -> Any:
        debug = context.params.pop("debug") or os.environ.get("BTNET_DEBUG", "0") not in ("", "0")
        name = str(self.name)
        try:
            return super().invoke(context)
        except BrokenPipeError:  # the reader of our output, e.g. head, has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except (BTNetError, OSError) as error:
            if debug:
                raise
            message = str(error)
            if not isinstance(error, BTNetError):  # an OSError of a full disk names no file
                given = context.params
                where = error.filename or given.get("out") or given.get("runs") or name
                message = f"{where}: {error.strerror or error}"
            click.echo(f"btnet {name}: {message}", err=True)
            return 1
        except KeyboardInterrupt:
            whole = str(context.params.get("out")).endswith(".npz")  # of embed: written at the end
            goes_on = self.resumes and not whole
            then = "the same command goes on from here" if goes_on else "nothing was written"
            click.echo(f"btnet {name}: interrupted; {then}", err=True)
            return 130


@click.group(no_args_is_help=False, epilog="btnet COMMAND --help shows options and an example.")
def btnet() -> None:
    """BTNet: unified representations for multi-resolution face recognition."""


def command(example: str, resumes: bool = False) -> Callable[..., click.Command]:
    """The function becomes a command; its docstring is the help, which ends with ``example``."""
    return btnet.command(cls=Command, epilog=f"\b\nexample:\n  {example}", resumes=resumes)


def option(*names: str, **settings: Any) -> Callable[..., Any]:
    """A click option whose help tells its default."""
    return click.option(*names, **{"show_default": True, **settings})


def pairs_of(context: click.Context, parameter: click.Parameter, given: Any) -> dict[str, str]:
    """NAME=VALUE, given several times, as a dictionary."""
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (equals and name.isidentifier()):
            raise click.BadParameter(f"expected NAME=VALUE, got {text!r}")
        found[name] = value
    return found


def assignments(*names: str, help: str) -> Callable[..., Any]:
    """An option that takes NAME=VALUE, several times."""
    return option(*names, multiple=True, callback=pairs_of, metavar="NAME=VALUE", help=help)


def scale_of(context: click.Context, parameter: click.Parameter, given: str) -> str:
    """A scale's name, or the whole path of a page: notebooks run in another folder."""
    if given in SCALES:
        return given
    if given.endswith(".yaml"):
        return str(Path(given).resolve())
    known = ", ".join(SCALES)
    raise click.BadParameter(f"expected one of {known}, or a page (.yaml), got {given!r}")


scale_option = option(
    "--scale", default="demo", callback=scale_of, metavar="NAME", help="Whose run, or a .yaml."
)
runs_option = option("--runs", default="runs", metavar="DIR", help="Where runs are kept.")
fresh_option = option("--fresh", is_flag=True, help="Start over, whatever the folder holds.")
device_option = option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
adapter_option = option(
    "--adapter", metavar="FILE.py", help="File with the Adapter class of a trunk of your own."
)
skip_option = option(
    "--skip-bad", is_flag=True, help="Leave out images that cannot be read, and list them."
)
select_option = option(
    "--select", default="max+ceil", metavar="RULE", help="How a face's branch is chosen."
)


def model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of :func:`open_model`."""
    for decorate in (
        option("--model", required=True, metavar="DIR", help="Folder of a BTNet, or demo."),
        adapter_option,
        device_option,
        option("--precision", help="Quick inference on a CPU: fp32, bf16 or int8."),
        option("--calibrate", metavar="FACES", help="For int8: some full-size faces."),
    ):
        function = decorate(function)
    return function


def open_model(
    model: str, adapter: str | None, device: str, precision: str | None, calibrate: str | None
) -> Any:
    """The BTNet in the folder ``model``, ready to embed."""
    from btnet_core.device import resolve_device
    from btnet_core.models.btnet import BTNet
    from btnet_core.models.openvino import OpenVinoBTNet
    from btnet_tools.adapter import find_adapter

    if calibrate:
        say_where(calibrate)
    if adapter:
        find_adapter(adapter)  # importing it is enough: the model names its class
    say_where(f"{model}/trunk.safetensors")
    net = BTNet.load(model).to(resolve_device(device)).eval()
    if not precision:
        return net
    return OpenVinoBTNet(net.cpu(), precision, some_faces(calibrate) if calibrate else ())


def some_faces(text: str) -> Any:
    """Pixels of 64 faces, evenly from the set that ``text`` names."""
    from btnet_core.data.faces import open_faces
    from btnet_core.data.sources import parse_spec

    faces = open_faces(parse_spec(text))
    step = max(1, len(faces) // 64)
    return faces.images(range(0, len(faces), step)[:64])


def say_where(*specs: Any) -> None:
    """Say which file a relative path is, where it is under the data root instead of or as here."""
    from btnet_core.data.sources import parse_spec, paths_of
    from btnet_core.files import data_root, find

    for path in dict.fromkeys(path for spec in specs for path in paths_of(parse_spec(spec))):
        here, there, place = Path(path).expanduser(), data_root() / path, find(path)
        if place != here:
            click.echo(f"{path}: not in this folder, taken from {place}", err=True)
        elif here.exists() and there.exists() and not here.samefile(there):
            click.echo(f"{path}: taken from this folder, not {there}", err=True)


# ---- the reproduction ------------------------------------------------------------------------


@command("btnet reproduce --scale demo --only 01,05 -p seed=1", resumes=True)
@scale_option
@option("--only", default="", metavar="01,05", help="Only these notebooks, by number or name.")
@assignments("-p", "--parameter", "parameters", help="For the notebooks that know it; repeatable.")
@option("--fresh", is_flag=True, help="Run also those notebooks whose inputs are unchanged.")
@option("--device", help="auto, cpu, cuda or cuda:N (default: the notebooks').")
@option("--processes", metavar="N", help="That train together; auto: one for each GPU.")
@option("--jobs", metavar="N", help="Notebooks at once (auto: idle cores, at the scale demo).")
@option("--check", is_flag=True, help="Only say which data lack (then 1), and what the runs cost.")
@runs_option
def reproduce(
    scale: str, only: str, parameters: dict[str, str], fresh: bool, check: bool, **given: Any
) -> int:
    """Run the notebooks in order and collect their results."""
    from btnet_paper import needs, runner, scales
    from btnet_paper import report as page

    headline = HEADLINE if scale.startswith("lfw-") else ""
    chosen = [entry for entry in (only or headline).split(",") if entry]
    numbers = {entry[:2].zfill(2) for entry in chosen}
    if check:
        return int(not needs.check(scales.get_scale(scale), sorted(numbers)))
    for need in needs.needs(scales.get_scale(scale)):
        if not numbers or numbers & set(need.notebooks):
            say_where(need.spec)
    runner.reproduce(scale, only=chosen, parameters=parameters, resume=not fresh, **given)
    click.echo(f"report: {page.report_or_reason(scale, runs=given['runs'])}")
    return 0


@command("btnet check --scale demo")
@scale_option
@runs_option
def check(scale: str, runs: str) -> int:
    """Hold every number of a run against the committed record; 1 if any is off."""
    from btnet_paper import check as rerun
    from btnet_paper.scales import get_scale

    name = get_scale(scale).name
    checked = rerun.check(name, Path(runs) / name)
    click.echo(rerun.told(checked))
    return int(rerun.is_off(checked))


@command("btnet figures --runs figures   (from the repository's own results)")
@scale_option
@runs_option
@option("--out", default="figures", metavar="DIR", help="Where figures and results go.")
def figures(scale: str, runs: str, out: str) -> None:
    """Draw every figure of the paper again from recorded results, without training."""
    from btnet_paper.figures import publish
    from btnet_paper.scales import get_scale

    own = Path(runs) / get_scale(scale).name
    folder = Path(runs) if (Path(runs) / "results").is_dir() else own
    made, missing = publish(folder, out, scale=scale)
    if not made:
        raise ReproduceError(
            f"{folder / 'results'} holds no results: btnet reproduce --scale {scale} makes them"
        )
    click.echo(f"{len(made)} figures in {out}")
    if missing:
        click.echo(f"not recorded: {', '.join(missing)}")


@command("btnet report --scale demo --out report.html")
@scale_option
@runs_option
@option("--out", metavar="FILE", help="The file to write (default: DIR/SCALE/report.html).")
def report(scale: str, runs: str, out: str | None) -> None:
    """Make one HTML page of a run: summary, figures, tables, every executed notebook."""
    from btnet_paper import report as page

    click.echo(page.report(scale, runs=runs, out=out))


@command("btnet train --config phi_bt_14.json --out runs/mine/phi_bt_14", resumes=True)
@option("--config", required=True, metavar="FILE", help="Fields of training.config.TrainConfig.")
@option("--out", required=True, metavar="DIR", help="For checkpoint, weights, metrics.jsonl.")
@device_option
@fresh_option
def train(config: str, out: str, device: str, fresh: bool) -> None:
    """Train a trunk or a branch from a configuration file, going on from its checkpoint."""
    from btnet_core.training.config import TrainConfig
    from btnet_core.training.launch import train_from_file

    page = TrainConfig.read(config)
    say_where(page.data, *page.validation)
    train_from_file(config, out, device=device, fresh=fresh)


# ---- data ------------------------------------------------------------------------------------


@command("btnet data   (or: btnet data get lfw --from lfw-deepfunneled.tgz)")
@click.argument("action", nargs=-1, metavar="[get NAME]")
@option("--from", "source", metavar="PATH", help="A folder or archive that you have.")
def data(action: tuple[str, ...], source: str | None) -> None:
    """List the data sets: what is there, what lacks, how to get it; or get one."""
    from btnet_tools.data import describe_all
    from btnet_tools.fetch import get

    if not action:
        click.echo(describe_all())
    elif len(action) == 2 and action[0] == "get":
        click.echo("\n".join(get(action[1], source)))
    else:
        raise click.UsageError(f"got {' '.join(action)}, expected get and the name of a set")


@command("btnet pack faces/ packed/")
@click.argument("source", metavar="FOLDER")
@click.argument("out")
@skip_option
def pack(source: str, out: str, skip_bad: bool) -> None:
    """Write a folder for each person as RecordIO."""
    from btnet_tools.data import pack_folder

    count, bad = pack_folder(Path(source), Path(out), skip_bad)
    click.echo(f"{count:,} images in {out}")
    for reason in bad:
        click.echo(f"left out {reason}", err=True)


@command("btnet align photos/ crops/   (pip install 'btnet-core[align]')")
@click.argument("photos", metavar="PHOTOS")
@click.argument("out", metavar="OUT")
@option("--largest", is_flag=True, help="Only the largest face of each photograph.")
def align(photos: str, out: str, largest: bool) -> int:
    """Cut the faces out of photographs, aligned as recognisers want them."""
    from btnet_tools import photographs as work

    found = work.align_photos(Path(photos), Path(out), work.retinaface(), largest)
    click.echo(f"{len(found['crops']):,} faces in {out}, listed in {out}.json")
    for name, facts in found["crops"].items():
        if facts["note"]:
            click.echo(f"{name}: {facts['note']}", err=True)
    for name, reason in found["without"].items():
        click.echo(f"no crop of {name}: {reason}", err=True)
    return 1 if found["without"] else 0


# ---- a recogniser of your own ----------------------------------------------------------------


@command(
    "btnet adapt --trunk backbone.pth --faces my_faces/ --resolutions 28 14 7 --out my_btnet/",
    resumes=True,
)
@option("--trunk", required=True, metavar="FILE", help="IResNet, MobileFaceNet, … (docs).")
@option("--faces", required=True, metavar="PATH", help="A folder a person, RecordIO, a list.")
@option("--bgr", is_flag=True, help="The trunk was trained on blue, green, red.")
@option("--labels/--no-labels", default=True, help="Without: learn from the trunk alone.")
@option("--resolutions", type=int, metavar="R R R", help="Of branches (default: 28 14 7).")
@option("--out", required=True, metavar="DIR", help="Folder of the BTNet.")
@option("--pairs", multiple=True, metavar="SET", help="Compare on it; repeatable.")
@option(
    "--hold-out", "percent", default=10, metavar="PERCENT", help="Of the people, to compare on."
)
@assignments("--set", "changes", help="A field of the recipe, e.g. epochs=4; repeatable.")
@click.argument("more", nargs=-1, type=int, metavar="")  # resolutions after the first
@skip_option
@fresh_option
@adapter_option
@device_option
def adapt(
    trunk: str, faces: str, out: str, resolutions: int | None, more: tuple[int, ...], **given: Any
) -> None:
    """Give a trained face recogniser its branches for small faces."""
    from btnet_tools import adapt as work
    from btnet_tools.adapter import find_adapter

    if more and not resolutions:
        raise click.UsageError(f"got {more[0]}, which belongs behind --resolutions")
    if resolutions:
        given["resolutions"] = (resolutions, *more)
    given["changes"] = {name: value_of(text) for name, text in given["changes"].items()}
    given["adapter"] = find_adapter(given["adapter"]) if given["adapter"] else None
    say_where(trunk, faces, *given["pairs"])
    work.adapt(trunk, faces, out, work.AdaptOptions(**given))


def value_of(text: str) -> Any:
    """The JSON value that ``text`` is, or itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


@command("btnet embed faces/ --model my_btnet --out embeddings.npz", resumes=True)
@click.argument("source", metavar="FOLDER")
@option("--out", required=True, metavar="FILE.npz|DIR", help="One file; or a folder of shards.")
@option("--shard", type=click.IntRange(min=1), default=10_000, help="Images a shard (10,000).")
@option("--keep-going", is_flag=True, help="Leave out unreadable images and list them.")
@select_option
@model_options
def embed(source: str, out: str, shard: int, keep_going: bool, select: str, **model: Any) -> int:
    """Embed all face images under a folder, of any sizes.

    Into one .npz file; or, where --out is a folder, into shards that are written as it goes, with
    an index.json. The same command goes on; under torchrun each process takes its share.
    """
    from btnet_tools.embed import embed_folder, embed_shards

    net, bad = open_model(**model), False
    if out.endswith(".npz"):
        parts = iter([(out, *embed_folder(net, source, out, select, keep_going))])
    else:
        parts = embed_shards(net, source, out, select, keep_going, shard)
    for file, count, failed in parts:
        click.echo(f"{count:,} embeddings in {file}")
        for name, reason in failed.items():
            click.echo(f"left out {name}: {reason}", err=True)
        bad = bad or bool(failed)
    return int(bad and "WORLD_SIZE" not in os.environ)  # torchrun would end the other processes


@command("btnet verify passport.jpg camera.png --model my_btnet")
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@option("--threshold", type=float, help="Cosine above which it is one person (default: known).")
@select_option
@model_options
def verify(first: str, second: str, threshold: float | None, select: str, **model: Any) -> None:
    """Tell how alike two aligned faces are, and whether they are one person."""
    from btnet_tools.evaluate import verify

    click.echo(verify(open_model(**model), first, second, select, model["model"], threshold))


@command("btnet evaluate --model my_btnet --pairs lfw.bin --baseline")
@option("--pairs", multiple=True, required=True, metavar="SET", help=".bin or pairs.txt.")
@option("--baseline", is_flag=True, help="Also the trunk on faces scaled up.")
@model_options
def evaluate(pairs: tuple[str, ...], baseline: bool, **model: Any) -> None:
    """Ten-fold verification accuracy of a model at every pair of its resolutions."""
    from btnet_core.data.pairs import open_pairs
    from btnet_tools import evaluate as work

    say_where(*pairs)
    net, sets = open_model(**model), [open_pairs(spec) for spec in pairs]
    ways = ("before", "after") if baseline else ("after",)
    found = work.compare(net, sets, ways, model["device"])
    click.echo(work.table(found))


@command("btnet export --model my_btnet --format onnx --out exported/")
@option("--format", "kind", required=True, type=click.Choice(("onnx", "pt2")), help="Of the file.")
@option("--out", required=True, metavar="DIR", help="Receives btnet.onnx, or btnet_14.pt2, …")
@option("--model", required=True, metavar="DIR", help="Folder of a BTNet, or demo.")
@adapter_option
def export(kind: str, out: str, model: str, adapter: str | None) -> None:
    """Write a model for other programs: pixels in, embedding of unit length and its norm out."""
    from btnet_tools.export import export

    net = open_model(model, adapter, "cpu", None, None)
    for path in export(net, kind, out):
        click.echo(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its status: 1 for an error, 2 for wrong usage, 130 for Ctrl-C."""
    # Stopped by a scheduler: as orderly as by Ctrl-C. Set for SIGINT too: a shell that starts a
    # job in the background hands it down ignored, and Python then leaves it so.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    warnings.formatwarning = lambda message, *_: f"btnet: {message}\n"
    try:
        return btnet.main(arguments, prog_name="btnet", standalone_mode=False) or 0
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "btnet"
        click.echo(f"{where}: {error.format_message()} ({where} --help)", err=True)
        return error.exit_code
