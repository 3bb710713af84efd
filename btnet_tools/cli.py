"""The command line: `btnet COMMAND`. Each command imports what it needs when it runs, so that --help is quick.

A command is an `add_NAME(commands)` function, listed in COMMANDS, that adds its parser and a `run_NAME(options)`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from btnet_core.errors import BTNetError, ConfigError, ReproduceError

# Those of scales.py, which --help does not import.
HEADLINE = "03,04,05"  # notebooks
SCALES = ("demo", "lfw", "lfw-mr", "lfw-quick", "lfw-scratch", "paper")
Commands = Any  # argparse's own type of the object that adds sub-parsers is private


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    *,
    help: str,
    example: str,
) -> argparse.ArgumentParser:
    """Add the command `name`, whose --help ends with `example`, and return its parser for the arguments."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--debug", action="store_true", help="show the traceback of an error (or BTNET_DEBUG=1)"
    )
    parser.set_defaults(run=run)
    return parser


def add_reproduce(commands: Commands) -> None:
    parser = add_command(
        commands,
        "reproduce",
        run_reproduce,
        help="run the notebooks in order and collect their results under runs/",
        example="btnet reproduce --scale demo --only 01,05 -p seed=1",
    )
    parser.add_argument("--scale", choices=SCALES, default="demo",
                        help="size of the experiments; -p quick=true shortens it")  # fmt: skip
    parser.add_argument("--only", default="", metavar="01,05", help="only these notebooks, by number or name "
                        f"(default: all; of lfw-…, which compare the headline rows, {HEADLINE})")  # fmt: skip
    parser.add_argument(
        "-p",
        "--parameter",
        dest="parameters",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a parameter, for the notebooks that know it; may be repeated",
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--resume",
        action="store_true",
        default=True,
        help="do not repeat notebooks whose inputs are unchanged (the default)",
    )
    group.add_argument(
        "--fresh", dest="resume", action="store_false", help="run all of the selected ones again"
    )
    parser.add_argument(
        "--device", default=None, help="auto, cpu, cuda or cuda:N (default: the notebooks')"
    )
    parser.add_argument(
        "--runs", default="runs", metavar="DIR", help="where runs are kept (default: runs)"
    )


def run_reproduce(options: argparse.Namespace) -> None:
    from btnet_paper.runner import reproduce

    parameters = dict(_pair(text) for text in options.parameters)
    quick = parameters.pop("quick", "false").lower() == "true"  # of the scale, not of a notebook
    scale = options.scale + "-quick" * quick
    reproduce(
        scale,
        only=(options.only or HEADLINE * ("-" in scale)).split(","),
        parameters=parameters,
        resume=options.resume,
        device=options.device,
        runs=options.runs,
    )


def add_train(commands: Commands) -> None:
    parser = add_command(
        commands,
        "train",
        run_train,
        help="train a trunk or a branch from a configuration file, going on from its checkpoint",
        example="btnet train --config phi_bt_14.json --out runs/mine/phi_bt_14   (several GPUs: torchrun -m btnet_tools train ...)",
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="JSON fields of btnet_core.training.config.TrainConfig",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="folder for checkpoint, weights and metrics.jsonl",
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)"
    )
    parser.add_argument("--fresh", action="store_true", help="start over, whatever DIR holds")


def run_train(options: argparse.Namespace) -> None:
    from btnet_core.training.launch import train_from_file

    train_from_file(options.config, options.out, device=options.device, fresh=options.fresh)


def add_data(commands: Commands) -> None:
    parser = add_command(
        commands,
        "data",
        run_data,
        help="list the data sets: where each is looked for, counts, checksum, licence, how to get it",
        example="btnet data   (or: btnet data get lfw)",
    )
    parser.add_argument(
        "action", nargs="*", metavar="get lfw", help="download LFW through scikit-learn and pack it"
    )


def run_data(options: argparse.Namespace) -> None:
    from btnet_core.files import data_root
    from btnet_tools import data as registry

    if not options.action:
        print(registry.table())
    elif options.action == ["get", "lfw"]:
        out = data_root() / "lfw"
        print(f"{registry.get_lfw(out):,} images packed into {out}")
    else:
        raise ConfigError(
            f"got {' '.join(options.action)!r}; only LFW can be fetched: btnet data get lfw"
        )


def add_pack(commands: Commands) -> None:
    parser = add_command(
        commands,
        "pack",
        run_pack,
        help="write a folder of faces as RecordIO, or a pair list as a verification set",
        example="btnet pack faces/ packed/   (or: btnet pack --pairs pairs.txt pairs.bin)",
    )
    parser.add_argument(
        "source", metavar="FOLDER", help="a folder per identity; with --pairs the file to write"
    )
    parser.add_argument("out", nargs="?", metavar="OUT", help="the folder to write")
    parser.add_argument(
        "--pairs", metavar="FILE", help="LFW-style pairs.txt, images beside it or under --images"
    )
    parser.add_argument("--images", metavar="DIR", help="folder of the images that --pairs names")


def run_pack(options: argparse.Namespace) -> None:
    from pathlib import Path

    from btnet_tools import data as registry

    if options.pairs:
        folder = Path(options.images) if options.images else None
        print(
            f"{registry.pack_pairs(Path(options.pairs), Path(options.source), folder):,} pairs in {options.source}"
        )
    elif options.out:
        print(
            f"{registry.pack_folder(Path(options.source), Path(options.out)):,} images in {options.out}"
        )
    else:
        raise ConfigError("pack takes FOLDER and OUT, or --pairs FILE and the .bin to write")


def add_adapt(commands: Commands) -> None:
    parser = add_command(
        commands,
        "adapt",
        run_adapt,
        help="give a trained face recogniser its branches for small faces; the same command goes on after a stop",
        example="btnet adapt --trunk backbone.pth --faces my_faces/ --resolutions 28 14 7 --out my_btnet/",
    )
    parser.add_argument(
        "--trunk",
        required=True,
        metavar="FILE",
        help="IResNet, MobileFaceNet, … (.pth, .safetensors)",
    )
    parser.add_argument(
        "--faces",
        required=True,
        metavar="PATH",
        help="a folder for each person, RecordIO, a list file",
    )
    parser.add_argument(
        "--no-labels", dest="labels", action="store_false", help="learn from the trunk alone"
    )
    parser.add_argument(
        "--resolutions",
        type=int,
        nargs="+",
        default=[28, 14, 7],
        metavar="R",
        help="default: 28 14 7",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the BTNet")
    parser.add_argument(
        "--pairs", action="append", default=[], metavar="SET", help="compare on it; may be repeated"
    )
    parser.add_argument(
        "--hold-out",
        type=int,
        default=10,
        metavar="PERCENT",
        help="people to compare on (default: 10)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the recipe, e.g. epochs=4",
    )
    parser.add_argument("--fresh", action="store_true", help="start over, whatever DIR holds")
    _add_machine(parser)


def run_adapt(options: argparse.Namespace) -> None:
    from btnet_tools.adapt import adapt

    changes = {name: _value(text) for name, text in map(_pair, options.set)}
    adapt(
        options.trunk, options.faces, options.out, resolutions=options.resolutions, labels=options.labels,
        pairs=options.pairs, percent=options.hold_out, adapter=_adapter(options), device=options.device,
        fresh=options.fresh, **changes,
    )  # fmt: skip


def add_export(commands: Commands) -> None:
    parser = add_command(
        commands,
        "export",
        run_export,
        help="write a model for other programs: pixels in, embedding of unit length and its norm out",
        example="btnet export --model my_btnet --format onnx --out exported/   (or: --resolution 14 7)",
    )
    parser.add_argument("--format", required=True, choices=("onnx", "torchscript", "pt2"))
    parser.add_argument(
        "--resolution",
        nargs="+",
        default=["all"],
        metavar="R",
        help="a file each; default: all in one",
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="receives btnet.onnx, or btnet_14.onnx, …"
    )
    _add_model(parser, select=False)


def run_export(options: argparse.Namespace) -> None:
    from btnet_tools.export import export

    if options.resolution != ["all"] and not all(text.isdecimal() for text in options.resolution):
        raise ConfigError(
            f"--resolution {' '.join(options.resolution)}: expected rows of branches, or all"
        )
    rows = [int(text) for text in options.resolution if text != "all"]
    for path in export(_model(options), options.format, options.out, rows):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def add_report(commands: Commands) -> None:
    parser = add_command(
        commands,
        "report",
        run_report,
        help="make one HTML file of a run: summary, figures, tables beside the paper's, every executed notebook",
        example="btnet report --scale demo --out report.html",
    )
    parser.add_argument("--scale", choices=SCALES, default="demo", help="whose run (default: demo)")
    parser.add_argument(
        "--runs", default="runs", metavar="DIR", help="where runs are kept (default: runs)"
    )
    parser.add_argument(
        "--out", metavar="FILE", help="the file to write (default: DIR/SCALE/report.html)"
    )


def run_report(options: argparse.Namespace) -> None:
    from btnet_paper.report import report

    print(report(options.scale, runs=options.runs, out=options.out))


def add_embed(commands: Commands) -> None:
    parser = add_command(
        commands,
        "embed",
        run_embed,
        help="embed all face images under a folder, of any sizes, into one .npz file",
        example="btnet embed faces/ --model my_btnet --out embeddings.npz",
    )
    parser.add_argument(
        "source", metavar="FOLDER", help="searched with its sub-folders; or one image"
    )
    parser.add_argument(
        "--out", required=True, metavar="FILE.npz", help="names, embeddings, branch, reliability, …"
    )
    parser.add_argument(
        "--keep-going", action="store_true", help="leave out unreadable images and list them"
    )
    _add_model(parser)
    _add_mode(parser)


def run_embed(options: argparse.Namespace) -> int:
    from btnet_tools.embed import embed_folder

    rule = _selection(options.select)
    count, failed = embed_folder(
        _model(options), options.source, options.out, keep_going=options.keep_going, **rule
    )
    print(f"{count:,} embeddings in {options.out}")
    for name, reason in failed.items():
        print(f"left out {name}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def add_verify(commands: Commands) -> None:
    parser = add_command(
        commands,
        "verify",
        run_verify,
        help="tell how alike two faces are, and whether they are one person",
        example="btnet verify passport.jpg camera.png --model my_btnet",
    )
    parser.add_argument("first", metavar="A", help="an aligned face image of any size")
    parser.add_argument("second", metavar="B")
    parser.add_argument(
        "--threshold", type=float, help="cosine above which it is one person (default: the model's)"
    )
    _add_model(parser)
    _add_mode(parser)


def run_verify(options: argparse.Namespace) -> None:
    from btnet_tools.embed import verify

    rule = _selection(options.select)
    print(
        verify(
            _model(options), options.first, options.second, options.model, options.threshold, **rule
        )
    )


def add_evaluate(commands: Commands) -> None:
    parser = add_command(
        commands,
        "evaluate",
        run_evaluate,
        help="ten-fold verification accuracy of a model at every pair of its resolutions",
        example="btnet evaluate --model my_btnet --pairs lfw.bin --baseline",
    )
    parser.add_argument(
        "--pairs",
        action="append",
        required=True,
        metavar="SET",
        help=".bin or pairs.txt; repeatable",
    )
    parser.add_argument("--baseline", action="store_true", help="also the trunk on faces scaled up")
    _add_model(parser, select=False)
    _add_mode(parser)


def run_evaluate(options: argparse.Namespace) -> None:
    from btnet_tools.adapt import compare, report

    print(
        report(
            compare(
                _model(options), options.pairs, baseline=options.baseline, device=options.device
            )
        )
    )


def add_figures(commands: Commands) -> None:
    parser = add_command(
        commands,
        "figures",
        run_figures,
        help="draw every figure and table of the paper again from recorded results, without training",
        example="btnet figures --out figures   (or, from the repository's own results: btnet figures --runs figures)",
    )
    parser.add_argument("--scale", choices=SCALES, default="demo", help="whose run (default: demo)")
    parser.add_argument(
        "--runs",
        default="runs",
        metavar="DIR",
        help="where runs, or results/, are kept (default: runs)",
    )
    parser.add_argument(
        "--out",
        default="figures",
        metavar="DIR",
        help="where figures and results go (default: figures)",
    )


def run_figures(options: argparse.Namespace) -> None:
    from pathlib import Path

    from btnet_paper.figures import remake

    runs = Path(options.runs)
    folder = runs if (runs / "results").is_dir() else runs / options.scale
    made, missing = remake(folder, out=options.out, scale=options.scale)
    if not made:
        raise ReproduceError(
            f"{folder / 'results'} holds no results: btnet reproduce --scale {options.scale} makes them"
        )
    print(
        f"{len(made)} figures and tables in {options.out}"
        + (f"; not recorded: {', '.join(missing)}" * bool(missing))
    )


def add_bench(commands: Commands) -> None:
    parser = add_command(
        commands,
        "bench",
        run_bench,
        help="measure how fast everything is on this machine, and hold it to the project's goals",
        example="btnet bench training recordio --out runs/bench   (or, what the repository has recorded: btnet bench --recorded)",
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="of benchmarks/bench_NAME.py (default: all of them)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="small sizes: shows that it runs, measures nothing"
    )
    parser.add_argument(
        "--recorded",
        action="store_true",
        help="run nothing: the table and figure of what DIR holds",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="receives results/bench_*.json and the figure (default: runs/bench, or figures)",
    )


def run_bench(options: argparse.Namespace) -> None:
    from pathlib import Path

    from btnet_tools import bench

    folder = Path(options.out or ("figures" if options.recorded else "runs/bench"))
    if not options.recorded:
        bench.measure(options.names, folder, quick=options.quick)
    print(bench.report(folder, options.names))


COMMANDS: tuple[Callable[[Commands], None], ...] = (
    add_reproduce,
    add_train,
    add_data,
    add_pack,
    add_adapt,
    add_embed,
    add_verify,
    add_evaluate,
    add_export,
    add_report,
    add_figures,
    add_bench,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 0; 2 for an error with a message of its own; 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="btnet",
        description="BTNet: unified representations for multi-resolution face recognition.",
        epilog="btnet COMMAND --help shows the options of a command and an example.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(commands)
    options = parser.parse_args(arguments)
    # Stopped by a scheduler: as orderly as by Ctrl-C. Set for SIGINT too: a shell that starts a job in the background
    # hands it down ignored, and Python then leaves it so.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    try:
        return options.run(options) or 0
    except (BTNetError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output, e.g. head, has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        if options.debug or os.environ.get("BTNET_DEBUG", "0") not in ("", "0"):
            raise
        said = str(error)
        if isinstance(error, OSError):  # one of a full disk names no file
            said = f"{error.filename or getattr(options, 'out', options.command)}: {error.strerror or error}"
        print(f"btnet {options.command}: {said}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"btnet {options.command}: interrupted", file=sys.stderr)
        return 130


def _add_model(parser: argparse.ArgumentParser, select: bool = True) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of a BTNet")
    if select:
        parser.add_argument(
            "--select",
            default="max+ceil",
            metavar="RULE",
            help="max+ceil (default), detail+near, …",
        )
    _add_machine(parser)


def _add_mode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mode", metavar="MODE", help="quick inference on a CPU: fp32, bf16 or int8 (docs/fast.md)"
    )
    parser.add_argument(
        "--calibrate", metavar="FACES", help="for int8: a folder or RecordIO of full-size faces"
    )


def _selection(rule: str) -> dict[str, str]:
    indicator, _, rounding = rule.partition("+")
    return {"indicator": indicator, "rounding": rounding}


def _add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter", metavar="FILE.py", help="file with the Adapter class of a trunk of your own"
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)"
    )


def _adapter(options: argparse.Namespace) -> Any:
    from btnet_tools.adapter import find_adapter

    return find_adapter(options.adapter) if options.adapter else None


def _model(options: argparse.Namespace) -> Any:
    from btnet_core.device import resolve_device
    from btnet_core.models.btnet import BTNet

    _adapter(options)  # importing it is enough: the model names its class
    net = BTNet.load(options.model).to(resolve_device(options.device)).eval()
    if not getattr(options, "mode", None):
        return net
    from btnet_core.models.fast import some_faces

    return net.fast(options.mode, some_faces(options.calibrate) if options.calibrate else ())


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise ReproduceError(f"expected NAME=VALUE, got {text!r}")
    return name, value


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
