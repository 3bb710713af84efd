"""One HTML file of a run: summary, figures, tables beside the paper's, every executed notebook.

nbconvert makes it with the template in `templates/report`. Nothing is loaded from anywhere:
pictures are embedded, equations become MathML, there is no script, and a content security policy
forbids the rest.
"""

from __future__ import annotations

import base64
import html
import os
import re
from pathlib import Path
from typing import Any

import nbformat
from jinja2 import pass_context
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.formatters import HtmlFormatter
from traitlets.config import Config

from btnet_core.errors import DataError, ReproduceError
from btnet_core.files import reason, write_atomically
from btnet_paper import check, claims, published, records, results, tables
from btnet_paper.notebooks import load_notebooks
from btnet_paper.scales import get_scale
from btnet_paper.state import State

NUMBERED = re.compile(r"^(figure|table)(\d)")
COMMITTED = re.compile(r"!\[[^]]*\]\(\.\./figures/")  # a picture of the repository
WIDGET = "application/vnd.jupyter.widget-view+json"
IMAGES = ["image/svg+xml", "image/png", "image/jpeg"]
SHOWN = ["text/html", "text/markdown", *IMAGES, "text/plain"]  # no script, no widget


def report(
    scale: str = "demo", *, runs: str | Path = "runs", out: str | Path | None = None,
    notebooks: str | Path | None = None,
) -> Path:  # fmt: skip
    """Writes the report of ``runs/<scale>``, by default to its report.html, and returns the path.

    ``notebooks`` is the folder of the source notebooks (default: the repository's), of which those
    not run are named as missing.

    Raises:
        ReproduceError: nothing has been run.
        DataError: a result, notebook or figure is damaged, or lacks although the state lists it.
    """
    page = get_scale(scale)
    run_dir = (Path(runs) / page.name).resolve()
    state = State(run_dir).notebooks
    _check_outputs(run_dir, state)
    executed = {path.stem: _read(path) for path in sorted((run_dir / "notebooks").glob("*.ipynb"))}
    if not executed:
        place = run_dir / "notebooks"
        raise ReproduceError(f"no notebooks in {place}: run btnet reproduce --scale {scale} first")
    ran = _ran(scale, executed, notebooks)
    resources = {
        "metadata": {"path": str(run_dir), "name": f"BTNet, reproduced: scale {page.name}"},
        "scale": page.name,
        "claim": page.claim,
        "about": results.environment(),
        "highlight": HtmlFormatter().get_style_defs(".highlight"),
        "front": _front(page.name, run_dir, ran),
        "figures": _figures(run_dir, state),
        "ran": list(ran),
        "toc": [],  # filled by Renderer
    }
    body, _ = Exporter().from_notebook_node(_document(executed, ran), resources)
    path = Path(out) if out else run_dir / "report.html"
    write_atomically(path, _without_paths(body, run_dir))
    return path


def _without_paths(body: str, run_dir: Path) -> str:
    """The page without paths of one machine."""
    for folder in (results.ROOT, run_dir.parent.parent):
        body = body.replace(f"{folder}{os.sep}", "")
    return body


def report_or_reason(scale: str, *, runs: str | Path = "runs") -> str:
    """Returns the path of the report, or why it could not be made: the run is as good without."""
    try:
        return str(report(scale, runs=runs))
    except Exception as error:  # whatever it is, the results must not look lost
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        again = f"btnet report --scale {scale} --runs {runs}"
        return f"not made ({why}); the results are complete, once mended: {again}"


def _check_outputs(run_dir: Path, state: dict[str, Any]) -> None:
    """Raises DataError where a result or figure that the state lists is not there any more."""
    for entry in state.values():
        for name in entry.get("outputs", ()):
            if not name.startswith("models/") and not (run_dir / name).is_file():
                what = "is missing although its notebook has run; run it again with --fresh"
                raise DataError(f"{run_dir / name} {what}")


def _document(executed: dict[str, Any], ran: dict[str, dict[str, Any]]) -> Any:
    """Returns one notebook with the cells of all."""
    language = {"name": "python", "pygments_lexer": "ipython3"}
    document = nbformat.v4.new_notebook(metadata={"language_info": language})
    for stem, line in ran.items():
        document.cells += _cells(stem, executed.get(stem), line["state"])
    return document


class Renderer(IPythonRenderer):
    """Markdown with equations as MathML, anchors unique in the report, and links inside it."""

    def __init__(self, resources: Any, section: str, **options: Any) -> None:
        super().__init__(
            escape=False, embed_images=True, path=resources["metadata"]["path"], **options
        )
        self.toc, self.ran, self.section = resources["toc"], resources["ran"], section

    def heading(self, text: str, level: int, **attrs: Any) -> str:
        """One level down, under the report's title; a notebook's title has its name as anchor."""
        slug = re.sub(r"\W+", "-", re.sub("<[^>]+>", "", text)).strip("-").lower()
        anchor = self.section if level == 1 else f"{self.section}-{slug}"
        taken = sum(entry["slug"] == anchor for entry in self.toc)
        self.toc.append({"slug": anchor, "level": level, "text": text})
        anchor = self.toc[-1]["anchor"] = f"{anchor}--{taken + 1}" if taken else anchor
        link = f'<a class="anchor" href="#{anchor}" aria-label="link to this section">#</a>'
        return f'<h{level + 1} id="{anchor}">{text} {link}</h{level + 1}>\n'

    def block_math(self, body: str) -> str:
        """An equation and its number at the right; at \\qquad a narrow page may break the line."""
        tag = re.search(r"\\tag\{([^}]*)\}", body)
        number = f'<span class="tag">({html.escape(tag[1])})</span>' if tag else ""
        body = body.replace(tag[0], "") if tag else body
        parts = body.split(r"\qquad")
        whole = all(
            p.count("{") == p.count("}") and p.count(r"\begin") == p.count(r"\end") for p in parts
        )
        drawn = "".join(mathml(part, "block") for part in (parts if whole else [body]))
        return f'<div class="equation">{drawn}{number}</div>'

    def inline_math(self, body: str) -> str:
        return mathml(body, "inline")

    def latex_environment(self, name: str, body: str) -> str:
        return self.block_math(rf"\begin{{{name}}}{body}\end{{{name}}}")

    def image(self, text: str, url: str, title: str | None = None) -> str:
        """Embedded, or where that cannot be (another place, no file) told."""
        picture = super().image(text, url, title)
        if 'src="data:' in picture:
            return picture
        return f"<em>[picture not here: {text or html.escape(url)}]</em>"

    def link(self, text: str, url: str, title: str | None = None) -> str:
        """A link to a notebook leads to its section; of other files only the name stays."""
        stem = Path(url.partition("#")[0]).stem
        url = f"#{stem}" if stem in self.ran else url
        return super().link(text, url, title) if re.match("https?:|#", url) else text


def mathml(latex: str, display: str) -> str:
    """LaTeX as MathML, or as it stands where it is not understood."""
    try:
        return convert(latex, display=display)
    except Exception:  # the converter raises many kinds
        return f"<code>{html.escape(latex)}</code>"


class Exporter(HTMLExporter):
    """nbconvert's HTML through this package's template and renderer."""

    def __init__(self) -> None:
        super().__init__(
            config=Config({"NbConvertBase": {"display_data_priority": SHOWN}}),
            preprocessors=["nbconvert.preprocessors.CoalesceStreamsPreprocessor"],
            template_name="report",
            extra_template_basedirs=[str(Path(__file__).parent / "templates")],
        )

    @pass_context
    def markdown2html(self, context: Any, source: str) -> str:
        cell = context["cell"]
        renderer = Renderer(
            context["resources"], cell.metadata.section, attachments=cell.get("attachments", {})
        )
        return MarkdownWithMath(renderer=renderer).render(source)


def _read(path: Path) -> Any:
    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat's, json's and its validator's own kinds
        raise DataError(f"{path} is not a notebook ({reason(error)}); run it again") from None


def _cells(stem: str, notebook: Any, state: str) -> list[Any]:
    """A notebook's cells fit to stand beside others': own ids and sections, pictures described."""
    title = f"# {stem[:2]} · {stem[3:].replace('_', ' ')}"
    missing = nbformat.v4.new_markdown_cell(f"{title}\n\n{state}", id="missing")
    cells, heading = [], stem
    for cell in notebook.cells if notebook else [missing]:
        if cell.cell_type == "markdown":
            if COMMITTED.search(cell.source):  # this run's own figures are above
                continue
            heading = next(iter(re.findall(r"^#+ (.+)$", cell.source, re.M)), heading)
        cell.id = f"{stem}-{cell.id}"[:64]
        cell.metadata = cell.metadata | {"section": stem, "alt": cell.metadata.get("alt", heading)}
        if outputs := cell.get("outputs"):  # of a live widget its still picture, if it has one
            cell.outputs = [
                o
                for o in outputs
                if WIDGET not in o.get("data", ()) or o.data.keys() - {WIDGET, "text/plain"}
            ]
        cells.append(cell)
    return cells


def _ran(scale: str, executed: dict[str, Any], folder: str | Path | None) -> dict[str, Any]:
    """For every notebook of the repository or the run: whether, when and for how long it ran."""
    try:
        known = [notebook.name for notebook in load_notebooks(folder)]
    except ReproduceError:  # installed without the repository
        known = []
    lines = {}
    for stem in sorted({*known, *executed}):
        about = executed[stem].metadata.get("papermill", {}) if stem in executed else {}
        ended, seconds = about.get("end_time"), about.get("duration")
        state = "executed" if ended and not about.get("exception") else "NOT FINISHED"
        if stem not in executed:
            state = f"MISSING: btnet reproduce --scale {scale} --only {stem[:2]}"
        ended = ended[:16].replace("T", " ") if ended else None
        minutes = seconds / 60 if seconds else None
        lines[stem] = {"state": state, "minutes": minutes, "ended, UTC": ended}
    return lines


def _front(scale: str, run_dir: Path, ran: dict[str, Any]) -> dict[str, Any]:
    """The tables before the notebooks, as HTML."""
    found = records.everything(run_dir)
    long = records.all_numbers(found)
    how = "for how many settings, and by how many points (lowest to highest)"
    recorded = "recorded of the paper's figures and numbers"
    shown = {
        "ran": tables.show(ran, caption=f"scale {scale}", digits=1),
        "claims": tables.show(claims.verdicts(long), caption=how),
        "coverage": tables.show(claims.coverage(found), caption=recorded),
    }
    shown |= _checked(scale, run_dir)
    front: dict[str, Any] = {name: styled.to_html() for name, styled in shown.items()}
    front["coverage"] += tables.show(records.origins(found), caption="measured on").to_html()
    front["tables"] = {
        published.title(table): tables.beside(table, long).to_html() for table in published.TABLES
    }
    return front


def _checked(scale: str, run_dir: Path) -> dict[str, Any]:
    """Returns the run against the committed record, where its scale has one."""
    try:
        found = check.check(scale, run_dir)
    except ReproduceError:
        return {}
    lines = {f"{one}": int((found["verdict"] == one).sum()) for one in check.VERDICTS}
    lines["with recorded seeds"] = int(found["seeds"].sum())
    counts = {"numbers": lines | {"all": len(found)}}
    return {"check": tables.show(counts, caption=f"scale {scale}, against its record", digits=0)}


def _figures(run_dir: Path, state: dict[str, Any]) -> list[dict[str, Any]]:
    """The run's figures, the paper's first, each with the notebook that made it."""
    made_by = {name: stem for stem, entry in state.items() for name in entry.get("outputs", ())}
    paths = (run_dir / "figures").glob("*.png")
    found = []
    for path in sorted(paths, key=lambda path: (not path.name.startswith("figure"), path.name)):
        data = path.read_bytes()
        figure = {
            "name": NUMBERED.sub(r"\1 \2:", path.stem.replace("_", " ")).capitalize(),
            "notebook": made_by.get(f"figures/{path.name}"),
            "wide": int.from_bytes(data[16:20], "big") > 1000,  # where a PNG has its width
            "data": base64.b64encode(data).decode(),
        }
        found.append(figure)
    return found
