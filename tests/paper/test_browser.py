"""In a real browser: notebooks in JupyterLab run twice, 10 reacts to a slider, a long cell shows its progress.

Debian's chromium, driven by Playwright; skipped, saying so, where either is missing. All thirteen notebooks are
run twice over the finished run of the scale demo that BTNET_RUN names (which they write to: give a copy):

    cp -r runs/demo runs/copy && BTNET_RUN=runs/copy python -m pytest tests/paper/test_browser.py -k finished
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.slow]
NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
PATIENCE = 1000 * int(os.environ.get("BTNET_PATIENCE", "120"))  # ms: a busy machine takes its time
READ_IMAGE = "async (image) => Array.from(new Uint8Array(await (await fetch(image.src)).arrayBuffer())).join()"


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A fresh page of laptop size; its uncaught errors fail the test."""
    opened, errors = browser.new_page(viewport={"width": 1500, "height": 950}), []
    opened.set_default_timeout(PATIENCE)
    opened.on("pageerror", lambda error: errors.append(str(error)))
    yield opened
    opened.close()
    assert not errors


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, Path]]:
    """JupyterLab on a free port: (address, token, folder it serves); settings of this user are neither read nor written."""
    root = tmp_path_factory.mktemp("lab")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = (
        "JUPYTER_CONFIG_DIR",
        "JUPYTERLAB_SETTINGS_DIR",
        "JUPYTERLAB_WORKSPACES_DIR",
        "JUPYTER_RUNTIME_DIR",
        "IPYTHONDIR",
    )
    environment = os.environ | {place: str(root / ".jupyter" / place) for place in places}
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--port={port}",
    ]
    command += [
        "--IdentityProvider.token=secret",
        "--LabApp.news_url=None",
        "--ServerApp.port_retries=0",
        f"--notebook-dir={root}",
    ]
    with (root / ".lab.log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE / 1000
    try:
        while True:
            assert (server.poll(), time.monotonic() < deadline) == (None, True), (
                root / ".lab.log"
            ).read_text()
            try:
                urllib.request.urlopen(f"{address}/api", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield address, "secret", root
    finally:
        server.terminate()  # and with it its kernels
        server.wait(30)


def run_all(page: Any, lab: tuple[str, str, Path], name: str, *, opened: bool = False) -> None:
    """Open the notebook, unless it is, and choose Run > Run All Cells."""
    (address, token, _), deadline = lab, time.monotonic() + PATIENCE / 1000
    if not opened:
        page.goto(f"{address}/lab/tree/{name}?token={token}")
    while (
        True
    ):  # the page says "idle" before it has a kernel, and asks which one when cells are run then
        kernels = [session["kernel"] for session in page.request.get(f"{address}/api/sessions?token={token}").json()
                   if session["path"] == name]  # fmt: skip
        if any(kernel["connections"] and kernel["execution_state"] == "idle" for kernel in kernels):
            break
        assert time.monotonic() < deadline, kernels
        page.wait_for_timeout(200)
    page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").first.wait_for(
        state="attached"
    )
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


def outputs(page: Any, kind: str) -> Any:
    return page.locator(f".jp-OutputArea-output[data-mime-type='{kind}']")


def place(root: Path, name: str, **small: Any) -> int:
    """Copies a notebook to where the lab sees it, with parameters; returns its cells of code."""
    content = json.loads((NOTEBOOKS / name).read_text())
    for cell in content["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            given = {"run_dir": str(root / "run"), **small}
            cell["source"] += [f"\n{key} = {value!r}" for key, value in given.items()]
    (root / name).write_text(json.dumps(content))
    return sum(cell["cell_type"] == "code" for cell in content["cells"])


def run_twice(page: Any, lab: tuple[str, str, Path], name: str, count: int, patience: int) -> None:
    """Run All twice in one kernel: each cell is run, and none shows an error or a warning."""
    for time_of, last in enumerate((count, 2 * count)):
        run_all(page, lab, name, opened=time_of > 0)
        for output in saved(page, lab[2] / name, last, patience):
            assert output["output_type"] != "error", output["evalue"]
            assert output.get("name") != "stderr", output["text"]


def saved(page: Any, path: Path, last: int, patience: int) -> list[dict[str, Any]]:
    """All outputs once the last cell has run, as JupyterLab saves them.

    Cells far from the window are not on the page, nor is the number that says that they have run.
    """
    deadline = time.monotonic() + patience / 1000
    while True:
        page.keyboard.press("Control+s")
        page.wait_for_timeout(1000)
        code = [
            cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"
        ]
        if code[-1]["execution_count"] == last:
            return [output for cell in code for output in cell["outputs"]]
        told = [cell["execution_count"] for cell in code]
        assert time.monotonic() < deadline, f"cells were run as {told}, the last one not as {last}"


@pytest.mark.parametrize("name", ["00_tour.ipynb", "01_upsampling_error.ipynb", "11_summary.ipynb"])
def test_all_cells_run_and_run_again(name: str, page: Any, lab: tuple[str, str, Path]) -> None:
    count = place(lab[2], name, **({"images": 4} if name[:2] == "01" else {}))
    run_twice(page, lab, name, count, PATIENCE)
    shown = "image/png" if name[:2] != "11" else "text/html"
    assert outputs(page, shown).count() > 0


@pytest.mark.parametrize("name", sorted(path.name for path in NOTEBOOKS.glob("*.ipynb")))
def test_each_runs_twice_over_a_finished_run(
    name: str, page: Any, lab: tuple[str, str, Path]
) -> None:
    if not os.environ.get("BTNET_RUN"):
        pytest.skip("BTNET_RUN names no finished run of the scale demo")
    count = place(lab[2], name, run_dir=str(Path(os.environ["BTNET_RUN"]).resolve()))
    run_twice(page, lab, name, count, 10 * PATIENCE)
    sessions = f"{lab[0]}/api/sessions?token={lab[1]}"
    for session in page.request.get(sessions).json():  # one kernel at a time
        page.request.delete(f"{lab[0]}/api/sessions/{session['id']}?token={lab[1]}")


def test_a_slider_changes_the_picture(page: Any, lab: tuple[str, str, Path]) -> None:
    place(lab[2], "10_explore.ipynb", known=4, strangers=6)
    run_all(page, lab, "10_explore.ipynb")

    image = page.locator("img.widget-image").first
    image.scroll_into_view_if_needed()
    before = image.evaluate(READ_IMAGE)
    line = page.locator(".widget-html", has_text="answered in").first
    assert "12 x 14 px, max + ceil: branch 14" in line.inner_text()
    page.locator(".widget-slider", has_text="height (px)").locator(".noUi-handle").press(
        "ArrowRight"
    )
    page.locator(".widget-html", has_text="13 x 15 px, max + ceil: branch 28 ·").wait_for()
    assert image.evaluate(READ_IMAGE) != before

    page.locator(
        ".jp-RenderedMarkdown", has_text="An answer takes"
    ).last.wait_for()  # the last cell has run
    assert outputs(page, "image/png").count() >= 2  # as many as the window shows
    assert outputs(page, "application/vnd.jupyter.error").count() == 0
    assert outputs(page, "application/vnd.jupyter.stderr").count() == 0


def test_progress_shows_while_the_cell_runs(page: Any, lab: tuple[str, str, Path]) -> None:
    """Training in its own process: what it says, and how far it is, can be read before it ends."""
    import nbformat

    root = lab[2]
    (root / "training.py").write_text(
        textwrap.dedent("""
            import pathlib, sys, time
            out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
            print("has begun", flush=True)
            print("phi_hr: step 40/100 loss 1.5", flush=True)
            while not (out / "enough").exists():
                time.sleep(0.1)
            print("has ended", flush=True)
        """)
    )
    code = f"""
        import sys
        from btnet_core.training import launch, methods
        launch.command = lambda processes: [sys.executable, {str(root / "training.py")!r}]
        launch.train_in_subprocess(methods.phi_hr({{"kind": "synthetic"}}), {str(root / "out")!r})
    """
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(textwrap.dedent(code))])
    notebook.metadata["kernelspec"] = {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    nbformat.write(notebook, root / "long.ipynb")
    run_all(page, lab, "long.ipynb")
    try:
        page.locator(".jp-OutputArea-output", has_text="has begun").wait_for()
        page.locator(".jp-OutputArea-output", has_text="40/100").wait_for()
        assert page.locator(".jp-InputPrompt", has_text="[*]").count() == 1  # still running
        assert page.locator(".jp-OutputArea-output", has_text="has ended").count() == 0
    finally:
        (root / "out" / "enough").touch()
    page.locator(".jp-OutputArea-output", has_text="has ended").wait_for()
