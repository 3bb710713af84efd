"""scripts/executed.py: a page says what its notebook showed, nothing of this machine or of real people."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from btnet_core.errors import DataError
from btnet_paper import results
from btnet_paper.notebooks import load_notebook

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("executed", ROOT / "scripts" / "executed.py")
executed = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(executed)
NOTEBOOK = load_notebook(ROOT / "notebooks" / "05_verification.ipynb")


def png(width: int) -> str:
    written = io.BytesIO()
    Image.effect_noise((width, 40), 90).convert("RGB").save(written, "PNG")
    return base64.b64encode(written.getvalue()).decode()


def run(folder: Path, outputs: list[dict[str, Any]], scale: str = "demo") -> None:
    """What papermill leaves of the notebook, with ``outputs`` under its last cell of code."""
    content = json.loads(NOTEBOOK.path.read_text("utf-8"))
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    code[-1]["outputs"] = outputs
    injected = {"cell_type": "code", "source": [f"run_dir = '{folder}'"], "outputs": []}
    injected["metadata"] = {"tags": ["injected-parameters"]}
    content["cells"].insert(2, injected)
    (folder / "notebooks").mkdir(parents=True)
    (folder / "notebooks" / NOTEBOOK.path.name).write_text(json.dumps(content))
    results.record(folder, NOTEBOOK.name, {"x": 1}, scale=scale, seconds=3.0)


def test_a_page_holds_what_was_shown_and_nothing_else(tmp_path: Path) -> None:
    facts = "a: 1,504 of 1,505 parameters learn: …\na: inputs and teacher features: 8 MB\n"
    lines = [facts, "a: step 1/9 loss 2\n", f"a: step 2/9 loss 1\nin {tmp_path}\n" + "long " * 30]
    table = {"text/html": "<style>td</style>", "text/markdown": "|  | a |", "text/plain": "<T>"}
    bar = {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "a: 50%|"}
    box = {**bar, "text/plain": "VBox(children=())"}
    shown = [{"output_type": "display_data", "data": data} for data in (table, bar, box)]
    picture = {"image/png": png(2000), "text/plain": "<Figure>"}
    shown.append({"output_type": "display_data", "data": picture, "metadata": {}})
    shown.append({"output_type": "stream", "name": "stdout", "text": lines[:2]})
    shown.append({"output_type": "stream", "name": "stderr", "text": ["WARNING"]})
    shown.append({"output_type": "stream", "name": "stdout", "text": lines[2:]})
    run(tmp_path, shown)
    text, pictures = executed.page(NOTEBOOK, tmp_path)
    assert text.startswith(f"<!-- source: {NOTEBOOK.source_checksum} -->")
    assert "scale `demo`" in text
    assert "|  | a |" in text
    assert text.count("Controls, which need a kernel") == 1
    assert "a: step 2/9 loss 1\nin runs/demo" in text
    for absent in (
        "parameters learn",
        "teacher features",
        "step 1/9",
        "WARNING",
        "<style>",
        "<T>",
        "50%|",
        str(tmp_path),
        "injected",
    ):
        assert absent not in text
    assert "(../results.md#table-1)" in text
    assert "figures/table1_accuracy.png" not in text  # it stands above
    assert 'src="../../figures/lfw/table1_accuracy.png" alt="Table 1 as curves, real faces"' in text
    assert '<img src="05_verification/1.webp" alt="figure" width="900">' in text
    assert max(map(len, text[text.index("a: step") :].split("```")[0].splitlines())) <= 100
    (one,) = pictures.values()
    assert Image.open(io.BytesIO(one)).size == (2000, 40)
    assert len(one) < len(base64.b64decode(picture["image/png"]))


def test_a_picture_keeps_its_colours() -> None:
    """Cells of a diverging map: a palette of few colours once made some of them orange."""
    ramp = np.linspace([5, 48, 97], [178, 24, 43], 900).round().astype(np.uint8)
    image = Image.fromarray(np.broadcast_to(ramp, (60, 900, 3)).copy())
    again = np.asarray(Image.open(io.BytesIO(executed.small(image))).convert("RGB"), int)
    assert np.abs(again - np.asarray(image, int)).max() < 12


def test_real_faces_and_other_sources_are_refused(tmp_path: Path) -> None:
    run(tmp_path / "lfw", [], scale="lfw")
    with pytest.raises(DataError, match="may not be shown"):
        executed.page(NOTEBOOK, tmp_path / "lfw")
    run(tmp_path / "demo", [])
    path = tmp_path / "demo" / "notebooks" / NOTEBOOK.path.name
    path.write_text(path.read_text().replace("flip = True", "flip = False"))
    with pytest.raises(DataError, match="another source"):
        executed.page(NOTEBOOK, tmp_path / "demo")
    with pytest.raises(DataError, match="does not exist"):
        executed.page(NOTEBOOK, tmp_path)


def test_a_page_of_another_source_is_outdated(tmp_path: Path) -> None:
    names = [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    assert sorted(executed.outdated(tmp_path)) == names
    (tmp_path / "05_verification.md").write_text(executed.stamp(NOTEBOOK))
    assert sorted(executed.outdated(tmp_path)) == [n for n in names if n != NOTEBOOK.name]
    (tmp_path / "05_verification.md").write_text(executed.stamp(NOTEBOOK)[:-9] + "0 -->")
    assert NOTEBOOK.name in executed.outdated(tmp_path)
