"""The driver: order, checked parameters, failure with its place, resuming, what makes a notebook run again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from btnet_core.errors import BusyError, ReproduceError
from btnet_paper import runner, scales
from btnet_paper.needs import data_checksum
from btnet_paper.notebooks import code_checksum, convert, load_notebooks
from btnet_paper.runner import reproduce

COUNT = """
from pathlib import Path
log = Path(run_dir) / "log.txt"
log.parent.mkdir(parents=True, exist_ok=True)
with log.open("a") as file:
    file.write(f"{name} {value} {scale}\\n")
"""


def write(
    folder: Path,
    stem: str,
    source: str = COUNT,
    parameters: str = "",
    depends: tuple[str, ...] = (),
    **about: object,
) -> None:
    notebook = nbformat.v4.new_notebook()
    first = f'scale = "demo"\nrun_dir = ""\nvalue = 1\nname = "{stem}"\n{parameters}'
    notebook.cells = [
        nbformat.v4.new_markdown_cell("# title"),
        nbformat.v4.new_code_cell(first, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(source),
    ]
    notebook.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"},
        "btnet": {"depends": list(depends), **about},
    }
    folder.mkdir(exist_ok=True)
    nbformat.write(notebook, folder / f"{stem}.ipynb")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write(tmp_path / "nb", "01_first")
    write(tmp_path / "nb", "02_second", depends=("01",))
    return tmp_path


def run(place: Path, **options) -> list[str]:
    """Run, and return the lines the notebooks logged so far."""
    options = {"notebooks": place / "nb", "runs": place / "runs", "data": "d"} | options
    reproduce("demo", **options)
    return (place / "runs" / "demo" / "log.txt").read_text().splitlines()


pytestmark = pytest.mark.notebook


def test_relative_paths_mean_what_they_mean_to_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set in the current folder, or a relative BTNET_DATA, is the one that was checked."""
    source = "from pathlib import Path\n(Path(run_dir) / 'where.txt').write_text(str(Path.cwd()))"
    write(tmp_path / "nb", "01_where", source)
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    reproduce("demo", notebooks=tmp_path / "nb", runs="runs", data="d")
    where = tmp_path / "mine" / "runs" / "demo" / "where.txt"
    assert where.read_text() == str(tmp_path / "mine")


def test_order_outputs_and_skipping_what_is_unchanged(
    place: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(place) == ["01_first 1 demo", "02_second 1 demo"]
    executed = nbformat.read(place / "runs/demo/notebooks/01_first.ipynb", as_version=4)
    assert any("injected-parameters" in cell.metadata.get("tags", []) for cell in executed.cells)
    assert (place / "runs/demo/logs/01_first.log").is_file()
    told = capsys.readouterr().out
    left = {path.name for path in (place / "nb").iterdir()}  # a kernel's sockets are not there
    assert left == {"01_first.ipynb", "02_second.ipynb"}
    assert "[1/2] 01_first" in told
    assert str(place / "runs/demo") in told
    write(place / "nb", "03_sums_up", always=True)
    assert run(place)[2:] == ["03_sums_up 1 demo"]
    assert "unchanged" in capsys.readouterr().out
    assert run(place)[3:] == ["03_sums_up 1 demo"]  # it reads what others may have recorded since
    assert len(run(place, resume=False)) == 7


def test_what_makes_a_notebook_run_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(place)
    assert run(place, only=["02"], parameters={"value": "2"})[2:] == ["02_second 2 demo"]
    write(place / "nb", "01_first", COUNT + "# changed\n")
    assert run(place)[3:] == [
        "01_first 1 demo",
        "02_second 1 demo",
    ]  # the second depends on the first
    write(place / "nb", "01_first", COUNT + "# changed again\n1 + 1\n")
    assert len(run(place)) == 7  # nothing but the first has changed since
    assert len(run(place, data="other")) == 9
    monkeypatch.setattr("btnet_paper.runner.code_checksum", lambda: "other code")
    assert len(run(place, data="other")) == 11
    (place / "runs/demo/notebooks/02_second.ipynb").unlink()
    assert run(place, data="other")[11:] == ["02_second 1 demo"]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"valeu": "3"}, r"valeu.*value \(int, default 1\)"),
        ({"value": "three"}, r"value is 'three', expected int.*name \(str"),
        ({"run_dir": "x"}, "--runs"),
    ],
)
def test_wrong_parameters_are_found_before_anything_runs(
    place: Path, parameters: dict, message: str
) -> None:
    with pytest.raises(ReproduceError, match=message):
        run(place, parameters=parameters)
    assert not (place / "runs/demo/log.txt").exists()


def test_a_parameter_goes_to_the_notebooks_that_know_it(place: Path) -> None:
    write(place / "nb", "03_third", COUNT + "assert extra == 5", parameters="extra = 1\n")
    assert len(run(place, parameters={"extra": "5"})) == 3


def test_a_device_that_cannot_be(place: Path) -> None:
    with pytest.raises(ReproduceError, match="tpu"):
        run(place, device="tpu")
    with pytest.raises(ReproduceError, match="processes is 'many'"):
        run(place, processes="many")


def test_processes_go_to_the_notebooks_that_train(place: Path) -> None:
    write(place / "nb", "02_second", COUNT + "assert processes == 'auto'", "processes = '1'\n")
    assert len(run(place, processes="auto")) == 2


def test_unknown_notebook(place: Path) -> None:
    with pytest.raises(ReproduceError, match=r"09.*01_first, 02_second"):
        run(place, only=["09"])


def test_failure_shows_error_and_place_and_resumes(place: Path) -> None:
    write(
        place / "nb",
        "02_second",
        COUNT + "flag = Path(run_dir) / 'fixed'\nif not flag.exists():\n    1 / 0\n",
    )
    with pytest.raises(ReproduceError) as caught:
        run(place)
    text = str(caught.value)
    assert "02_second" in text
    assert "ZeroDivisionError" in text
    assert "1 / 0" in text
    assert "cell 3" in text
    state = json.loads((place / "runs/demo/state.json").read_text())
    assert "fingerprint" not in state.get("02_second", {})
    (place / "runs/demo/fixed").touch()
    assert run(place) == ["01_first 1 demo", "02_second 1 demo", "02_second 1 demo"]


def test_a_notebook_that_fails_once_it_has_been_run_counts_as_never_finished(place: Path) -> None:
    run(place)
    flag = COUNT + "if Path(run_dir, 'broken').exists():\n    1 / 0\n"
    write(place / "nb", "02_second", flag)
    run(place, only=["02"])
    (place / "runs/demo/broken").touch()
    with pytest.raises(ReproduceError):
        run(place, only=["02"], resume=False)
    (place / "runs/demo/broken").unlink()
    assert len(run(place, only=["02"])) == 5  # what it left half way is not taken for its result


def test_interrupt_leaves_a_state_that_resumes(place: Path) -> None:
    waiting = (
        COUNT
        + "import time\nflag = Path(run_dir) / 'go'\nwhile not flag.exists():\n    time.sleep(0.1)\n"
    )
    write(place / "nb", "02_second", waiting)
    write(place / "nb", "03_third", waiting)
    code = "import sys; from btnet_tools.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "reproduce", "--runs", str(place / "runs")]
    command += ["--jobs", "2"]
    (place / "nb").rename(place / "notebooks")
    log = place / "runs/demo/log.txt"
    process = subprocess.Popen(
        command,
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_IGN
        ),  # as a shell starts a background job
    )
    deadline = time.monotonic() + 240
    while not (log.exists() and all(name in log.read_text() for name in ("second", "third"))):
        assert time.monotonic() < deadline, "two notebooks did not start"
        time.sleep(0.2)
    with pytest.raises(BusyError, match="works there"):
        run(place, notebooks=place / "notebooks")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert list(json.loads((place / "runs/demo/state.json").read_text())) == ["01_first"]
    (place / "runs/demo/go").touch()
    done = subprocess.run(
        command, cwd=place, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    runs = ["01_first", "02_second", "02_second", "03_third", "03_third"]
    assert sorted(log.read_text().splitlines()) == [f"{name} 1 demo" for name in runs]


MEET = """
import time
from pathlib import Path
root = Path(run_dir)
(root / f"{name} began").touch()
deadline = time.monotonic() + 240
while not all((root / f"{one} began").exists() for one in ("01_first", "03_third")):
    assert time.monotonic() < deadline, "alone"
    time.sleep(0.05)
(root / f"figures/{name}.png").write_bytes(b"x")
(root / f"logs/{name}.made").write_text(f"figures/{name}.png")
"""


def test_two_at_once_each_with_what_it_made(place: Path) -> None:
    write(place / "nb", "01_first", MEET + COUNT)
    write(place / "nb", "03_third", MEET + COUNT)
    write(place / "nb", "04_last", always=True)
    told = run(place, jobs="2")
    assert told[0][:2] in ("01", "03")
    assert told.index("02_second 1 demo") > told.index("01_first 1 demo")
    assert told[-1] == "04_last 1 demo"
    manifest = json.loads((place / "runs/demo/figures/manifest.json").read_text())
    assert {key: entry["notebook"] for key, entry in manifest.items()} == {
        "01_first": "01_first",
        "03_third": "03_third",
    }
    state = json.loads((place / "runs/demo/state.json").read_text())
    assert state["03_third"]["outputs"] == ["figures/03_third.png"]
    assert len(run(place, jobs="2")) == len(told) + 1  # 04 alone


def test_a_failure_beside_another_stops_both(place: Path, capsys: pytest.CaptureFixture) -> None:
    write(place / "nb", "01_first", MEET + "time.sleep(60)")
    write(place / "nb", "03_third", MEET + "1 / 0")
    began = time.monotonic()
    with pytest.raises(ReproduceError, match=r"03_third.*ZeroDivisionError"):
        run(place, jobs="2")
    assert time.monotonic() - began < 60
    assert "01_first: interrupted after" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("jobs", "idle", "names"),
    [(1, 2, []), (2, 0, ["03_third"]), (0, 1, ["03_third"]), (0, 0, [])],
)
def test_what_may_start_beside_the_first(
    jobs: int, idle: int, names: list[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(place / "nb", "03_third")
    write(place / "nb", "04_last", always=True)
    monkeypatch.setattr(runner, "idle_cores", lambda least: idle)
    monkeypatch.setattr(runner, "cores", lambda: {0, 1})
    notebooks = load_notebooks(place / "nb")
    first = SimpleNamespace(notebook=notebooks.pop(0))
    assert [one.name for one in runner.ready(notebooks, [first], jobs)] == names


def test_side_by_side_the_longest_starts_first(place: Path) -> None:
    write(place / "nb", "05_short", seconds={"demo": 10})
    write(place / "nb", "06_long", seconds={"demo": 60})
    write(place / "nb", "07_needs_the_short", depends=("05",))
    notebooks = load_notebooks(place / "nb")[-3:]
    assert [one.name[:2] for one in runner.ready(notebooks, [], 2)] == ["05", "06"]
    notebooks = load_notebooks(place / "nb")[-3:-1]
    assert [one.name[:2] for one in runner.ready(notebooks, [], 2)] == ["06", "05"]
    assert [one.name[:2] for one in runner.ready(notebooks, [], 1)] == ["05", "06"]


def test_parameters_cell_must_hold_literals(place: Path) -> None:
    write(place / "nb", "01_first", parameters="worse = open('x')\n")
    with pytest.raises(ReproduceError, match="01_first"):
        run(place)
    assert os.listdir(place) == ["nb"]


@pytest.mark.parametrize(
    ("text", "default", "value"),
    [
        ("3", 1, 3),
        ("3", 1.0, 3.0),
        ("true", False, True),
        ("3", "x", "3"),
        ("[7, 14]", (28,), (7, 14)),
        ("none", None, None),
        (2, 1.0, 2.0),
    ],
)
def test_values_take_the_type_of_the_default(text: object, default: object, value: object) -> None:
    found = convert(text, default, "p")
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "default"), [("1.5", 1), ("1", True), (True, 1), (1, "x"), ("x", 1.0), ("7", [1])]
)
def test_values_of_another_type_are_refused(text: object, default: object) -> None:
    with pytest.raises(ReproduceError, match=f"parameter p.*expected {type(default).__name__}"):
        convert(text, default, "p")


def test_kernel_is_this_python_with_this_package_and_knows_of_fresh(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = place / "jupyter/kernels/python3/kernel.json"
    other.parent.mkdir(parents=True)
    other.write_text('{"argv": ["false"], "display_name": "another", "language": "python"}')
    monkeypatch.setenv("JUPYTER_PATH", str(place / "jupyter"))
    source = (
        "import os, sys, btnet_paper\nfrom pathlib import Path\n"
        "seen = [sys.executable, btnet_paper.__file__, os.environ['BTNET_FRESH'], os.getcwd()]\n"
        "Path(run_dir, 'log.txt').write_text('\\n'.join(seen))"
    )
    write(place / "nb", "01_first", source)
    expected = [
        sys.executable,
        scales.__file__.replace("scales", "__init__"),
        "0",
        str(Path.cwd()),
    ]
    assert run(place, only=["1"]) == expected
    assert run(place, only=["1"], resume=False)[2] == "1"


def test_figures_are_tied_to_their_notebook_and_lost_outputs_are_made_again(place: Path) -> None:
    write(
        place / "nb",
        "01_first",
        COUNT + "Path(run_dir, 'figures', 'curve.png').write_bytes(b'x')\n"
        "Path(run_dir, 'logs', name + '.made').write_text('figures/curve.png')\n",
    )
    run(place, only=["01"], parameters={"value": 4})
    entry = json.loads((place / "runs/demo/figures/manifest.json").read_text())["curve"]
    assert entry["notebook"] == "01_first"
    assert entry["parameters"] == {"scale": "demo", "value": 4}
    (place / "runs/demo/figures/curve.png").unlink()
    assert len(run(place, only=["01"], parameters={"value": 4})) == 2
    assert (place / "runs/demo/figures/curve.png").exists()


def test_a_kernel_that_dies_is_a_failure_with_its_cell(place: Path) -> None:
    write(place / "nb", "01_first", "import os\nos._exit(1)\n")
    with pytest.raises(ReproduceError, match=r"01_first\.ipynb, cell 3 of 3: DeadKernelError"):
        run(place)


def test_a_run_that_was_killed_leaves_no_lock(place: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from btnet_core.files import lock\n"
        "with lock(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(place / "runs/demo")], check=False)
    assert (place / "runs/demo/.holder").exists()
    assert len(run(place)) == 2


def test_code_checksum_ignores_comments_but_not_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("btnet_paper.notebooks.PACKAGE", tmp_path / "btnet_paper")
    (tmp_path / "btnet_core").mkdir()
    seen = []
    for source in ("x = 1", "x  =  1  # one", "x = 2"):
        (tmp_path / "btnet_core" / "a.py").write_text(source)
        seen.append(code_checksum())
    assert seen[0] == seen[1] != seen[2]
    (tmp_path / "btnet_paper").mkdir()
    (tmp_path / "btnet_paper" / "report.py").write_text("shows = 1")
    assert code_checksum() == seen[2]
    (tmp_path / "btnet_paper" / "plans.py").write_text("decides = 1")
    assert code_checksum() != seen[2]


def test_data_checksum_follows_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BTNET_DATA", str(tmp_path))
    seen = [data_checksum("lfw"), data_checksum("demo")]
    (tmp_path / "lfw_devtest_6000.bin").write_bytes(b"pairs")
    assert data_checksum("lfw") != seen[0]
    (tmp_path / "faces_train").mkdir()
    for content in (b"one", b"two"):
        (tmp_path / "faces_train" / "train.rec").write_bytes(content)
        seen.append(data_checksum("lfw"))
    assert len(set(seen)) == 4
    assert data_checksum("demo") == seen[1]


def test_data_checksum_follows_the_page_but_not_its_prose(tmp_path: Path) -> None:
    page, seen = tmp_path / "toy.yaml", []
    text = "claim: A toy.\nfaces: f\npairs: []\nothers: o\nbackbone: {name: iresnet18}\n"
    for change in ("", "# a comment\n", "hr: {epochs: 2}\n", "hr: {epochs: 3}\n"):
        page.write_text(text + change)
        seen.append(data_checksum(str(page)))
    page.write_text(text.replace("A toy.", "Another sentence."))
    assert data_checksum(str(page)) == seen[0] == seen[1]
    assert len(set(seen)) == 3
