"""The report as a reader gets it: one file that loads nothing, whose links and anchors fit, that hides nothing."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from btnet_core.errors import DataError, ReproduceError
from btnet_paper import results
from btnet_paper.report import WIDGET, report, report_or_reason
from btnet_tools.cli import main

TEXT = r"""# 05 · Verification
Inline $z_r = B_r(X_r)$, see [training](03_train_trunk.ipynb) and [a file](../docs/x.md), [elsewhere](https://example.org).

$$Gain=\frac{M-M_{hr}}{|M_{mr}-M_{hr}|}\tag{4}$$

$$L=a+b,\qquad N=\begin{cases}a & b\\ c&\text{otherwise}\end{cases}$$

![remote](https://example.org/x.png) and what no converter knows: $\left( x$"""
CODE = "values = [1, 2, 3]\nvalues  # <tag> & more"


def png(width: int = 60) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, 30), "red").save(file, "png")
    return file.getvalue()


def write(path: Path, cells: list[Any], **about: Any) -> None:
    metadata = {
        "papermill": {"duration": 90.0, "end_time": "2026-01-02T03:04:05", "exception": None}
        | about,
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
    }
    for number, cell in enumerate(cells):
        cell.id = f"c{number:02}"  # the same in every notebook, as the repository's are
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells, metadata=metadata), path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with two executed notebooks, one of them not finished, and two figures; its source notebooks are three."""
    place = tmp_path_factory.mktemp("report")
    picture = {"image/png": base64.b64encode(png()).decode(), "text/plain": "<Figure>"}
    outputs = [
        new_output("stream", name="stdout", text="step 1\n"),
        new_output("stream", name="stdout", text="step 2\n"),
        new_output("execute_result", data=picture),
        new_output("execute_result", data={"text/html": "<table><tr><td>90.9</td></tr></table>"}),
        new_output("display_data", data={"text/markdown": "- found $x^2$"}),
        new_output(
            "display_data", data={WIDGET: {"model_id": "1"}, "text/plain": "HBox(children=...)"}
        ),
    ]
    cells = [
        new_markdown_cell(TEXT),
        new_code_cell("scale = 'demo'", metadata={"tags": ["parameters"]}),
        new_markdown_cell("## What we found"),
        new_code_cell(CODE, outputs=outputs, execution_count=1),
        new_markdown_cell("## What we found\nagain"),
        new_markdown_cell(
            "Scale `demo` (made by `make reproduce`):\n\n![committed](../figures/table1.png)"
        ),
    ]
    write(place / "demo/notebooks/05_verification.ipynb", cells)
    short = [new_markdown_cell("# 03 · Trunk"), new_markdown_cell("## What we found")]
    write(place / "demo/notebooks/03_train_trunk.ipynb", short, exception=True)
    for stem in ("03_train_trunk", "05_verification", "07_ablations"):
        write(
            place / f"source/{stem}.ipynb",
            [new_code_cell("scale = 'demo'", metadata={"tags": ["parameters"]})],
        )
    accuracy = {"phi_hr": {"14&14": {"accuracy": 12.34, "std": 1.0}}}
    results.record(
        place / "demo",
        "05_verification",
        {"accuracy": accuracy, "pairs": ["toy"]},
        seed=0,
        scale="demo",
    )
    (place / "demo/figures").mkdir()
    (place / "demo/figures/figure1_x.png").write_bytes(png(1200))
    (place / "demo/figures/loss.png").write_bytes(png())
    outputs_of = {
        "05_verification": {"outputs": ["figures/loss.png", "results/05_verification.json"]}
    }
    (place / "demo/state.json").write_text(json.dumps(outputs_of))
    return place


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "ROOT", run / "repository")  # away from the repository's own results
        return report(runs=run, notebooks=run / "source").read_text()


@pytest.fixture(scope="module")
def page(html: str) -> BeautifulSoup:
    return BeautifulSoup(html, "html.parser")


def test_nothing_is_loaded_from_anywhere(html: str, page: BeautifulSoup) -> None:
    assert not page.find_all(["script", "link", "iframe", "object", "embed", "base"])
    loading = [
        (tag.name, name)
        for tag in page.find_all(True)
        for name in ("src", "srcset", "data", "poster")
        if tag.get(name)
    ]
    assert set(loading) == {("img", "src")}
    assert all(
        picture["src"].startswith("data:image/png;base64,") for picture in page.find_all("img")
    )
    assert not re.search(r"@import|url\(", "".join(style.text for style in page.find_all("style")))
    (policy,) = page.find_all("meta", attrs={"http-equiv": "Content-Security-Policy"})
    assert policy["content"].startswith("default-src 'none'")
    assert "[picture not here: remote]" in html


def test_anchors_are_unique_and_every_link_inside_has_its_end(page: BeautifulSoup) -> None:
    ids = [tag["id"] for tag in page.find_all(id=True)]
    assert len(ids) == len(set(ids))
    links = [tag["href"] for tag in page.find_all("a", href=True)]
    assert {link for link in links if not link.startswith("#")} == {"https://example.org"}
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    contents = [tag["href"][1:] for tag in page.nav.find_all("a")]
    wanted = ["summary", "figures", "tables", "table8", "03_train_trunk", "05_verification"]
    assert [name for name in contents if name in wanted] == wanted
    assert "05_verification-what-we-found--2" in contents
    assert page.find("a", string="training")["href"] == "#03_train_trunk"
    assert page.find("a", string="a file") is None


def test_equations_are_mathml(html: str, page: BeautifulSoup) -> None:
    assert "$" not in page.main.get_text().replace(r"$\left( x$", "")
    blocks = page.find_all("math", display="block")
    assert len(blocks) == 3  # the second line has two, which may stand below each other
    assert len(page.find_all("div", class_="equation")) == 2
    assert blocks[0].find("mfrac")
    assert page.find("span", class_="tag").text == "(4)"
    assert len(page.find_all("math", display="inline")) >= 2  # of the text and of a Markdown output
    assert r"\left( x" in page.get_text()  # not understood: shown as it stands


def test_pictures_are_embedded_and_described(page: BeautifulSoup) -> None:
    pictures = {
        picture["alt"]: base64.b64decode(picture["src"].split(",")[1])
        for picture in page.find_all("img")
    }
    assert pictures["Figure 1: x"] == png(1200)
    assert pictures["Loss"] == pictures["What we found"] == png()
    captions = [caption.get_text() for caption in page.find_all("figcaption")]
    assert captions == ["Figure 1: x. Scale demo", "Loss. Scale demo, notebook 05"]
    assert "committed" not in pictures  # the repository's figures are those of another run


def test_everything_is_there_and_what_is_missing_is_named(html: str, page: BeautifulSoup) -> None:
    text = re.sub(r"\s+", " ", page.get_text())
    assert [block.text for block in page.select(".output_stream pre")] == ["step 1\nstep 2\n"]
    assert "values # <tag> & more" in text
    assert "90.9" in text
    assert "HBox" not in text
    assert "03_train_trunk NOT FINISHED" in text
    assert "05_verification executed 1.5" in text
    assert (
        text.count("MISSING: btnet reproduce --scale demo --only 07") == 2
    )  # in the list and in its place
    assert page.find(id="07_ablations")
    assert "scale demo: 05_verification 0 toy" in text
    assert "12.34" in text
    assert "the paper" in text
    assert str(Path.cwd()) not in html


def test_a_run_is_held_against_the_committed_record(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "ROOT", run / "repository")
    moved = {"phi_hr": {"14&14": {"accuracy": 92.34, "std": 1.0}}}
    values = {"accuracy": moved, "pairs": ["toy, 1600 pairs"]}
    results.record(run / "repository/figures", "05_verification", values, scale="demo")
    try:
        written = report(runs=run, notebooks=run / "source", out=run / "new/checked.html")
        text = BeautifulSoup(written.read_text(), "html.parser").find(id="check")
        table = text.find_next("table").get_text(" ", strip=True)
    finally:
        (run / "repository/figures/results/05_verification.json").unlink()
    assert "off" in table
    assert "scale demo, against its record" in table


def test_two_reports_of_a_run_differ_in_their_date_alone(
    run: Path, html: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "ROOT", run / "repository")
    again = report(runs=run, notebooks=run / "source", out=run / "new/again.html").read_text()
    first, second = (re.sub("Made [^·]+·", "", text) for text in (html, again))
    assert first == second


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("results/05_verification.json", "{", DataError),
        ("results/05_verification.json", '{"scale": "demo", "name": "05_verification"}', DataError),
        ("results/05_verification.json", None, DataError),
        ("figures/loss.png", None, DataError),
        ("notebooks/05_verification.ipynb", "{}", DataError),
        ("state.json", "{", ReproduceError),
    ],
)
def test_what_is_damaged_or_gone_is_named(
    run: Path, name: str, content: str | None, kind: type, capsys: pytest.CaptureFixture
) -> None:
    path = run / "demo" / name
    whole = path.read_bytes()
    path.unlink()
    try:
        if content is not None:
            path.write_text(content)
        with pytest.raises(kind, match=re.escape(str(path))):
            report(runs=run)
    finally:
        path.write_bytes(whole)
    assert main(["report", "--runs", str(run / "nowhere")]) == 1
    assert "run btnet reproduce --scale demo first" in capsys.readouterr().err


def test_a_report_that_fails_does_not_lose_the_run(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr("btnet_paper.report._front", fail)
    told = report_or_reason("demo", runs=run)
    assert told.startswith("not made (KeyError: 'surprise'); the results are complete")
    assert told.endswith(f"btnet report --scale demo --runs {run}")


@pytest.mark.browser
@pytest.mark.parametrize("width", [1440, 390])
def test_in_a_browser(browser: Any, run: Path, html: str, width: int) -> None:
    """It opens from disk without a message or a request, pictures and links work, and nothing is wider than the screen."""
    messages, requests = [], []
    page = browser.new_page(viewport={"width": width, "height": 844})
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto((run / "demo/report.html").as_uri())
    assert messages == []
    assert [url for url in requests if not url.startswith("data:")] == [
        (run / "demo/report.html").as_uri()
    ]
    assert page.evaluate("[...document.images].map(image => image.naturalWidth)") == [1200, 60, 60]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert (
        page.evaluate("document.querySelector('math mfrac').getBoundingClientRect().height") > 20
    )  # drawn as a fraction
    page.click("nav a[href='#05_verification']")
    assert (
        page.evaluate("document.getElementById('05_verification').getBoundingClientRect().top")
        < 100
    )
    beside = page.evaluate("document.querySelector('nav').getBoundingClientRect().bottom") > 0
    assert beside == (width > 1000)  # on wide screens the contents stay in view
    page.close()


@pytest.mark.browser
def test_printed(browser: Any, run: Path, html: str) -> None:
    page = browser.new_page()
    page.goto((run / "demo/report.html").as_uri())
    printed = page.pdf(format="A4")
    page.close()
    assert printed.startswith(b"%PDF")
    assert 6 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 20  # a new page for each part
