"""The command line: quick, one-line errors, examples in every --help."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from btnet_core.errors import ConfigError
from btnet_tools.cli import COMMANDS, main


def test_help_is_quick_and_imports_no_torch() -> None:
    code = "import sys; from btnet_tools.cli import main\ntry: main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("False")
    assert "reproduce" in done.stdout


@pytest.mark.parametrize("command", COMMANDS, ids=lambda add: add.__name__)
def test_every_command_has_an_example(command, capsys: pytest.CaptureFixture) -> None:
    name = command.__name__.removeprefix("add_")
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert f"example:\n  btnet {name}" in capsys.readouterr().out


def test_python_dash_m(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "btnet_tools", "--help"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, "usage: btnet" in done.stdout) == (0, True)


def test_an_error_is_one_line_and_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "--config", str(tmp_path / "none.json"), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err.strip()
    assert "none.json" in error
    assert "\n" not in error
    assert main(["reproduce", "--only", "77"]) == 2
    assert "77" in capsys.readouterr().err


def test_debug_shows_where_an_error_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["train", "--config", str(tmp_path / "none.json"), "--out", str(tmp_path)]
    with pytest.raises(ConfigError, match=r"none\.json"):
        main([*command, "--debug"])
    monkeypatch.setenv("BTNET_DEBUG", "1")
    with pytest.raises(ConfigError, match=r"none\.json"):
        main(command)


def test_the_scales_offered_are_those_there_are() -> None:
    from btnet_paper import scales
    from btnet_tools import cli

    assert set(cli.SCALES) == set(scales.pages())


def test_quick_is_a_scale_of_its_own_with_the_headline_notebooks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from btnet_paper import runner as reproduce

    seen = []
    monkeypatch.setattr(
        reproduce, "reproduce", lambda scale, *, only, **options: seen.append((scale, only))
    )
    for arguments in ("lfw", "lfw -p quick=true", "lfw -p quick=true --only 07", "lfw-mr"):
        main(["reproduce", "--scale", *arguments.split()])
    headline = ["03", "04", "05"]
    assert seen == [
        ("lfw", [""]),
        ("lfw-quick", headline),
        ("lfw-quick", ["07"]),
        ("lfw-mr", headline),
    ]
