"""What a scale needs from outside: data sets and weights, with a checksum of what is there."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

from btnet_core.data.sources import paths_of, spec_text
from btnet_core.files import checksum, find
from btnet_paper.scales import Scale, get_scale


def data_checksum(scale: str) -> str:
    """Returns a checksum of a scale's page and of the data that it names."""
    page = get_scale(scale)
    digest = hashlib.sha256(_page(page).encode())
    for spec in (page.faces, *page.pairs, page.others, page.pretrained):
        places = [find(path) for path in paths_of(spec) if path]
        files = [
            f for p in places for f in (sorted(p.rglob("*")) if p.is_dir() else [p]) if f.is_file()
        ]
        digest.update(f"{spec_text(spec)} {checksum(files)}\n".encode())
    return digest.hexdigest()


def _page(scale: Scale) -> str:
    """Returns what of a page decides results."""
    values = {key: value for key, value in asdict(scale).items() if key != "claim"}
    return json.dumps(values, sort_keys=True, default=str)
