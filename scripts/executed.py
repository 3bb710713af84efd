"""docs/executed: the notebooks as a run of the scale demo left them, as pages of Markdown.

    python scripts/executed.py             # of runs/demo, which `make reproduce` makes
    python scripts/executed.py RUN_DIR     # of another folder
    python scripts/executed.py --check     # fail where a page is not of the notebook as it is now

Each page and its pictures have at most 400 kB together. Only faces that may be shown are: the run
must be one of a scale with ``pictures: true``.
"""

from __future__ import annotations

import base64
import io
import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from PIL import Image

from btnet_core.errors import DataError
from btnet_core.files import write_atomically
from btnet_paper import results
from btnet_paper.figures import shown_width
from btnet_paper.notebooks import Notebook, load_notebooks
from btnet_paper.scales import ROOT, get_scale

PAGES = ROOT / "docs" / "executed"
LIMIT = 400_000  # bytes of a page and its pictures
COLUMNS = 100  # of a line of output
# What a training says, all but its last step.
STEPS = r"(?m)^\S+: step [^\n]*\n(?=\S+: step )"
FACTS = r"(?m)^\S+: (\d[\d,]* of [\d,]+ parameters learn|inputs and teacher features)[^\n]*(\n|\Z)"
OWN = (  # the run's own figures, which stand above, and a line that would lead to nothing
    r"(?m)^!\[[^\]]*\]\(\.\./figures/\w+\.png\)\s*?$\n?",
    r"(?m)^Scale `demo`[^\n]*:\n+(?=Scale|Next|\Z)",
)
LINKS = (  # from notebooks/ to docs/executed/
    (r"\(\.\./docs/executed/", "("),
    (r"\(\.\./docs/", "(../"),
    (r"\(\.\./(data|figures)/", r"(../../\1/"),
    (r"\((\d\d_\w+)\.ipynb\)", r"(\1.md)"),
)


def page(notebook: Notebook, run_dir: Path) -> tuple[str, dict[str, bytes]]:
    """Markdown of one executed notebook, and its pictures by name.

    Raises DataError if it was not run there from its present source, or may not be shown.
    """
    path = run_dir / "notebooks" / notebook.path.name
    if not path.is_file():
        raise DataError(f"{path} does not exist: btnet reproduce --scale demo makes it")
    record = results.load(run_dir, notebook.name)
    if not get_scale(record["scale"]).pictures:
        raise DataError(f"{path}: faces of the scale {record['scale']} may not be shown")
    cells = json.loads(path.read_text("utf-8"))["cells"]
    cells = [c for c in cells if "injected-parameters" not in c["metadata"].get("tags", [])]
    if [(c["cell_type"], "".join(c["source"])) for c in cells] != notebook.cells:
        raise DataError(f"{path} was run from another source than {notebook.path}: run it again")
    pictures: dict[str, bytes] = {}
    parts = [header(notebook, record)]
    for cell in cells:
        parts += _cell(cell, notebook.name, pictures)
    text = "\n\n".join(parts) + "\n"
    for place, shown in ((run_dir.resolve(), "runs/demo"), (ROOT, ".")):
        text = text.replace(str(place), shown)
    return text, pictures


def header(notebook: Notebook, record: dict[str, Any]) -> str:
    """Where a page comes from; `stamp` is how ``--check`` knows its source."""
    made = f"scale `{record['scale']}`, {record['date'][:10]}"
    source = f"[notebooks/{notebook.path.name}](../../notebooks/{notebook.path.name})"
    return f"{stamp(notebook)}\n*{source}, executed: {made}. Made by `python scripts/executed.py`.*"


def stamp(notebook: Notebook) -> str:
    """A comment that names the source of a page by its checksum."""
    return f"<!-- source: {notebook.source_checksum} -->"


def _cell(cell: dict[str, Any], name: str, pictures: dict[str, bytes]) -> list[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [_prose(source)]
    shown = [_output(output, name, pictures) for output in _joined(cell["outputs"])]
    return [f"```python\n{source}\n```", *filter(None, shown)]


def _prose(source: str) -> str:
    for pattern in OWN:
        source = re.sub(pattern, "", source)
    source = re.sub(r"!\[([^\]]*)\]\(\.\./(figures/[^)]+)\)", _committed, source)
    for old, new in LINKS:
        source = re.sub(old, new, source)
    lines = source.rstrip().splitlines()
    return "\n".join(line for line in lines if not line.startswith("[This notebook,"))


def _committed(found: re.Match[str]) -> str:
    """A picture of the repository, as wide as its text asks for."""
    return _img(f"../../{found[2]}", found[1], shown_width(ROOT / found[2]))


def _img(source: str, alt: str, width: int) -> str:
    return f'<img src="{source}" alt="{alt}" width="{width}">'


def _joined(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pieces of printed text that follow each other as one; warnings are left out."""
    joined: list[dict[str, Any]] = []
    for output in outputs:
        if output.get("name") == "stderr":
            continue
        if output["output_type"] == "stream":
            before = joined.pop()["text"] if joined and "text" in joined[-1] else []
            output = {**output, "text": [*before, *output["text"]]}
        joined.append(output)
    return joined


def _output(output: dict[str, Any], name: str, pictures: dict[str, bytes]) -> str:
    """One output; "" for what says nothing on a page: progress bars, objects."""
    if output["output_type"] == "stream":
        return _text(re.sub(r"\x1b\[[0-9;]*m", "", "".join(output["text"])).strip())
    data = output.get("data", {})
    if "image/png" in data:
        file = f"{name}/{len(pictures) + 1}.webp"
        alt = output["metadata"].get("image/png", {}).get("alt", "figure")
        png = base64.b64decode("".join(data["image/png"]))
        pictures[file] = small(Image.open(io.BytesIO(png)))
        return _img(file, alt, shown_width(io.BytesIO(png)))
    if "text/markdown" in data:
        return "".join(data["text/markdown"]).strip()
    text = "".join(data.get("text/plain", ""))
    if "application/vnd.jupyter.widget-view+json" in data:  # controls, or a progress bar
        return "*Controls, which need a kernel.*" if "Box(" in text else ""
    return "" if text.startswith("<") else _text(text)


def _text(printed: str) -> str:
    lines = re.sub(STEPS, "", re.sub(FACTS, "", printed)).splitlines()
    whole = {"break_on_hyphens": False, "break_long_words": False}  # paths
    folded = [textwrap.fill(line, COLUMNS, subsequent_indent="    ", **whole) for line in lines]
    return "```text\n" + "\n".join(folded) + "\n```" if lines else ""


def small(image: Image.Image) -> bytes:
    """The picture in few bytes and all its colours."""
    written = io.BytesIO()
    image.convert("RGB").save(written, "WEBP", quality=90, method=6)
    return written.getvalue()


def write(run_dir: Path, pages: Path = PAGES) -> None:
    """All pages. Raises DataError, too, for one that is too large."""
    for notebook in load_notebooks(ROOT / "notebooks"):
        text, pictures = page(notebook, run_dir)
        size = len(text.encode()) + sum(map(len, pictures.values()))
        if size > LIMIT:
            raise DataError(f"{notebook.name}: got {size:,} bytes, expected at most {LIMIT:,}")
        for old in (pages / notebook.name).glob("*"):
            old.unlink()
        for name, png in pictures.items():
            write_atomically(pages / name, png)
        write_atomically(pages / f"{notebook.name}.md", text)
        print(f"{notebook.name}: {size / 1e3:.0f} kB")


def outdated(pages: Path = PAGES) -> list[str]:
    """Notebooks without a page of their present source."""
    old = []
    for notebook in load_notebooks(ROOT / "notebooks"):
        path = pages / f"{notebook.name}.md"
        if not path.is_file() or stamp(notebook) not in path.read_text("utf-8"):
            old.append(notebook.name)
    return old


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(f"docs/executed is not of {', '.join(old)}" if (old := outdated()) else 0)
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else get_scale("demo").run_dir())
