"""The command line: quick, one-line errors, examples in every --help."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

from btnet_core.errors import ConfigError, WriteError
from btnet_core.training import launch
from btnet_paper import runner, scales
from btnet_tools import adapt, cli
from btnet_tools.cli import btnet, main

COMMANDS = ("reproduce", "figures", "report", "train", "data", "pack")
COMMANDS += ("align", "check", "adapt", "embed", "verify", "evaluate", "export")


def test_no_help_imports_torch() -> None:
    code = f"""
import sys
from btnet_tools.cli import main
for command in ([], *([name] for name in {COMMANDS})):
    assert main([*command, "--help"]) == 0
print("torch" in sys.modules, "numpy" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False False\n")


def test_every_command_has_help_and_an_example(capsys: pytest.CaptureFixture) -> None:
    assert set(COMMANDS) == set(btnet.commands)
    for name, command in btnet.commands.items():
        assert main([name, "--help"]) == 0
        said = capsys.readouterr().out
        assert f"example:\n    btnet {name}" in said
        assert command.help
        undocumented = [
            option.name
            for option in command.params
            if isinstance(option, click.Option) and not option.help
        ]
        assert not undocumented


def test_python_dash_m() -> None:
    command = [sys.executable, "-m", "btnet_tools", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "Usage: btnet" in done.stdout) == (0, True)


@pytest.mark.parametrize(
    ("line", "status", "told"),
    [
        ("train --config none.json --out .", 1, "btnet train: none.json"),
        ("reproduce --only 77", 1, "77"),
        ("reproduce --scale huge", 2, "Invalid value for '--scale': expected one of demo"),
        ("reproduce -p seed", 2, "expected NAME=VALUE, got 'seed'"),
        ("adapt --trunk . --faces . --out . --resolutions a", 2, "'a' is not a valid integer"),
        ("train", 2, "Missing option '--config'"),
        ("fly", 2, "No such command 'fly'"),
        ("", 2, "Missing command"),
    ],
)
def test_an_error_is_one_line(
    line: str, status: int, told: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == status
    error = capsys.readouterr().err.strip()
    assert told in error
    assert error.startswith("btnet")
    assert "\n" not in error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "here: No space left on device"),
        (PermissionError(13, "Permission denied", "/mnt/x"), "/mnt/x: Permission denied"),
        (WriteError("page.html: cannot be written"), "page.html: cannot be written"),
    ],
)
def test_the_systems_errors_name_a_file(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(**options: object) -> None:
        raise error

    monkeypatch.setattr(btnet.commands["figures"], "callback", fail)
    assert main(["figures", "--out", "here"]) == 1
    assert capsys.readouterr().err == f"btnet figures: {said}\n"


def test_debug_shows_where_an_error_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["train", "--config", str(tmp_path / "none.json"), "--out", str(tmp_path)]
    with pytest.raises(ConfigError, match=r"none\.json"):
        main([*command, "--debug"])
    monkeypatch.setenv("BTNET_DEBUG", "1")
    with pytest.raises(ConfigError, match=r"none\.json"):
        main(command)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_says_what_goes_on(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupted(**options: object) -> None:
        os.kill(os.getpid(), number)

    handlers = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        for name, then in (("reproduce", "goes on from here"), ("embed", "nothing was written")):
            monkeypatch.setattr(btnet.commands[name], "callback", interrupted)
            given = [] if name == "reproduce" else [".", "--model", ".", "--out", "x.npz"]
            assert main([name, *given]) == 130
            assert then in capsys.readouterr().err
    finally:
        for one, handler in handlers.items():
            signal.signal(one, handler)


def test_the_scales_offered_are_those_there_are() -> None:
    assert set(cli.SCALES) == set(scales.pages())


def test_a_scale_is_a_page_given_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The notebooks, which run in another folder, are given the whole path."""
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("base: demo\nclaim: A page of one's own.\n")
    seen = []
    monkeypatch.setattr(runner, "reproduce", lambda scale, **options: seen.append(scale))
    main(["reproduce", "--scale", "mine.yaml"])
    assert seen == [str(tmp_path / "mine.yaml")]
    capsys.readouterr()
    for name in ("report", "check", "figures"):  # none has been run
        assert main([name, "--scale", "mine.yaml", "--runs", "here"]) == 1
        assert "mine" in capsys.readouterr().err


def test_a_variant_of_lfw_runs_the_headline_notebooks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    monkeypatch.setattr(
        runner, "reproduce", lambda scale, *, only, **options: seen.append((scale, only))
    )
    for arguments in ("lfw", "lfw-ms1m", "lfw-ms1m --only 07", "lfw-mr"):
        main(["reproduce", "--scale", *arguments.split()])
    headline = ["03", "04", "05"]
    assert seen == [
        ("lfw", []),
        ("lfw-ms1m", headline),
        ("lfw-ms1m", ["07"]),
        ("lfw-mr", headline),
    ]


def test_each_command_says_which_file_a_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Under the data root instead of here, or in both places; whatever looks a name up."""
    here, root = tmp_path / "here", tmp_path / "root"
    for folder in (here, root):
        folder.mkdir()
        (folder / "both.bin").write_bytes(folder.name.encode())
    (root / "there.bin").write_bytes(b"x")
    monkeypatch.chdir(here)
    monkeypatch.setenv("BTNET_DATA", str(root))
    fields = {"data": "there.bin", "validation": ["both.bin", "none.bin", str(here / "both.bin")]}
    Path("run.json").write_text(json.dumps(fields))
    Path("mine.yaml").write_text("base: demo\nclaim: x\nfaces: both.bin\npairs: [there.bin]\n")
    monkeypatch.setattr(launch, "train_from_file", lambda *_, **options: None)
    monkeypatch.setattr(adapt, "adapt", lambda *_: None)
    monkeypatch.setattr(runner, "reproduce", lambda *_, **options: None)
    told = {
        "there": f"there.bin: not in this folder, taken from {root / 'there.bin'}\n",
        "both": f"both.bin: taken from this folder, not {root / 'both.bin'}\n",
    }
    for line, names in (
        ("train --config run.json --out x", ["there", "both"]),
        ("adapt --trunk there.bin --faces both.bin --out x", ["there", "both"]),
        ("adapt --trunk t --faces f --out x --pairs both.bin --pairs both.bin", ["both"]),
        ("reproduce --scale mine.yaml --only 5", ["there"]),
        ("reproduce --scale mine.yaml", ["both", "there"]),
        ("embed x --model none --out x.npz --precision int8 --calibrate both.bin", ["both"]),
        ("verify x y --model none --calibrate there.bin", ["there"]),
        ("evaluate --model none --pairs both.bin --calibrate there.bin", ["both", "there"]),
    ):
        main(line.split())
        said = capsys.readouterr().err
        assert said.startswith("".join(told[name] for name in names)), line
        assert said.count("taken from") == len(names)
