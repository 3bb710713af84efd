"""data/demo: the network that notebooks 03 and 04 train, made small enough to be committed.

    python scripts/demo_network.py             # of runs/demo, which `make reproduce` makes
    python scripts/demo_network.py RUN_DIR     # of another folder

Weights are rounded: of tensors of at least LARGE numbers to float8 (e4m3), of others to float16,
of the smallest, as batch norms have them, not at all. What is written is then measured as notebook
05 measures, on the same pairs; the record and the table of the card say both accuracies.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
from torch import Tensor

from btnet_core.errors import DataError
from btnet_core.evaluation.embedders import BranchEmbedder
from btnet_core.files import read_safetensors, write_safetensors
from btnet_core.models.btnet import BTNet
from btnet_paper import results, tables
from btnet_paper.scales import ROOT, get_scale
from btnet_paper.study import Study

OUT = ROOT / "data" / "demo"
LARGE, SMALL = 100_000, 1_000  # numbers of a tensor
LIMIT = 3_000_000  # bytes of all files of weights


def rounded(tensor: Tensor) -> Tensor:
    """The tensor in the type that it is kept in."""
    if tensor.numel() < SMALL or not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.float8_e4m3fn if tensor.numel() >= LARGE else torch.float16)


def write(net: BTNet, folder: Path) -> int:
    """Round the network's weights and write them; returns the bytes of its files."""
    for state in (net.trunk.state_dict(), *(route.own_state() for route in net.routes.values())):
        for tensor in state.values():
            tensor.copy_(rounded(tensor))
    net.save(folder)  # in float32, with the digest of the rounded trunk in each branch
    files = list(folder.glob("*.safetensors"))
    for path in files:
        tensors, facts = read_safetensors(path)
        write_safetensors(path, {name: rounded(one) for name, one in tensors.items()}, facts)
    return sum(path.stat().st_size for path in files)


def main(run_dir: Path) -> None:
    """Raises DataError if the run is not of the scale demo, or the files are too large."""
    made_by = results.load(run_dir, "05_verification")
    if made_by["scale"] != "demo":
        raise DataError(f"{run_dir}: got a run of the scale {made_by['scale']}, expected demo")
    size = write(BTNet.load(run_dir / "models" / "phi_bt"), OUT)
    if size > LIMIT:
        raise DataError(f"{OUT}: got {size:,} bytes, expected at most {LIMIT:,}")
    study = Study("demo", run_dir=run_dir)
    network = BranchEmbedder(BTNet.load(OUT), device="cpu")
    accuracy = {
        "as trained": made_by["values"]["accuracy"]["phi_bt"],
        "as kept here": study.verify(network, flip=True, cross="both"),
    }
    rows = {
        name: {setting: cell["accuracy"] for setting, cell in found.items()}
        for name, found in accuracy.items()
    }
    data = " ".join(pairs.checksum for pairs in study.pairs)
    results.record(OUT, "accuracy", rows | {"bytes": size}, config={"flip": True}, data=data)
    card = OUT / "README.md"
    table = re.compile(r"(?<=<!-- accuracy -->\n).*?(?=<!-- /accuracy -->)", re.DOTALL)
    card.write_text(table.sub(lambda _: tables.markdown(rows) + "\n", card.read_text("utf-8")))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else get_scale("demo").run_dir())
