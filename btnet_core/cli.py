"""The command line: `btnet COMMAND`. Each command imports what it needs when it runs, so that --help is quick.

A command is an `add_NAME(commands)` function, listed in COMMANDS, that adds its parser and a `run_NAME(options)`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .errors import BTNetError, ReproduceError

Commands = Any  # argparse's own type of the object that adds sub-parsers is private


def add_command(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int | None], *, help: str, example: str
) -> argparse.ArgumentParser:
    """Add the command `name`, whose --help ends with `example`, and return its parser for the arguments."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error (or BTNET_DEBUG=1)")
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
    parser.add_argument("--scale", choices=("demo", "lfw", "paper"), default="demo", help="size of the experiments")
    parser.add_argument("--only", default="", metavar="01,05", help="only these notebooks, by number or name")
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
    group.add_argument("--fresh", dest="resume", action="store_false", help="run all of the selected ones again")
    parser.add_argument("--device", default=None, help="auto, cpu, cuda or cuda:N (default: the notebooks')")
    parser.add_argument("--runs", default="runs", metavar="DIR", help="where runs are kept (default: runs)")


def run_reproduce(options: argparse.Namespace) -> None:
    from .reproduce import reproduce

    parameters = dict(_pair(text) for text in options.parameters)
    reproduce(
        options.scale,
        only=options.only.split(","),
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
        example="btnet train --config phi_bt_14.json --out runs/mine/phi_bt_14   (several GPUs: torchrun -m btnet_core train ...)",
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="JSON fields of btnet_core.training.config.TrainConfig"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for checkpoint, weights and metrics.jsonl")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--fresh", action="store_true", help="start over, whatever DIR holds")


def run_train(options: argparse.Namespace) -> None:
    from .training.run import train_from_file

    train_from_file(options.config, options.out, device=options.device, fresh=options.fresh)


COMMANDS: tuple[Callable[[Commands], None], ...] = (add_reproduce, add_train)


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
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stopped by a scheduler: as orderly as by Ctrl-C
    try:
        return options.run(options) or 0
    except BTNetError as error:
        if options.debug or os.environ.get("BTNET_DEBUG", "0") not in ("", "0"):
            raise
        print(f"btnet {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"btnet {options.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, e.g. head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise ReproduceError(f"-p takes NAME=VALUE, got {text!r}")
    return name, value
