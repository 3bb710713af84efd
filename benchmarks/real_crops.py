"""How far crops of ``btnet data get lfw`` are from the packed ones, and what three methods say.

    python benchmarks/real_crops.py --raw lfw-deepfunneled.tgz --models runs/lfw/models

Needs the packed ``lfw_devtest`` and its pairs under BTNET_DATA, raw pictures of LFW's 1,711 DevTest
people (the whole archive will do), and the networks of notebooks 03 and 04 at the scale lfw, which
were trained on packed crops. About 25 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from btnet_core.data.pairs import open_pairs
from btnet_core.data.recordio import FaceRecords
from btnet_core.device import machine
from btnet_core.evaluation.verification import evaluate_pairs
from btnet_core.files import find, write_atomically
from btnet_core.images import decode
from btnet_paper.plans import load_methods
from btnet_tools.align import cut, members
from btnet_tools.catalogue import DATA
from btnet_tools.fetch import write_pairs

METHODS = ("phi_hr", "phi_mr", "phi_bt")
SETTINGS = ((112, 112), (112, 28), (28, 28), (112, 14), (14, 14), (112, 7), (7, 7))


def rebuild(raw: Path) -> tuple[list[bytes], np.ndarray, np.ndarray]:
    """New crops of the DevTest people, who each shows, and ``lfw_devtest_6000``'s index pairs."""
    numbers = np.load(DATA / "alignment" / "lfw.npz")
    people = np.repeat(np.arange(len(numbers["images"])), numbers["images"])
    test = np.flatnonzero(numbers["test"][people])
    keys = sorted({key for key, _ in members(raw, 2)})
    if len(keys) == len(people):  # the whole archive
        keys = [keys[i] for i in test]
    crops = cut(raw, keys, numbers["transform"][test])
    return crops, people[test], np.searchsorted(test, numbers["lfw_devtest_6000"])


def differences(crops: list[bytes], packed: FaceRecords) -> dict[str, float]:
    """Mean absolute differences of whole crops, in grey levels."""
    values = []
    for i, crop in enumerate(crops):
        new, old = (decode(data, where=f"crop {i}").float() for data in (crop, packed.image(i)))
        values.append(float((new - old).abs().mean()))
    names = ("least", "median", "most")
    return dict(zip(names, np.quantile(values, [0, 0.5, 1]).round(3).tolist(), strict=True))


def accuracies(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Ten-fold accuracy in % by setting."""
    return {setting: round(row["accuracy"], 3) for setting, row in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--raw", type=Path, required=True, help="folder, .tar, .tgz or .zip")
    parser.add_argument("--models", type=Path, required=True, help="folder of phi_hr, phi_mr, …")
    parser.add_argument("--keep", type=Path, help="folder of embeddings of the packed pairs")
    parser.add_argument("--out", type=Path, default=Path("figures/results/real_crops.json"))
    options = parser.parse_args()
    crops, people, pairs = rebuild(options.raw)
    packed = FaceRecords(find("lfw_devtest"))
    labels = np.unique(people, return_inverse=True)[1]
    methods = {name: load_methods(options.models, device="cpu")[name] for name in METHODS}
    result: dict[str, Any] = {
        "sets": "lfw_devtest (3,708 pictures) and lfw_devtest_6000, packed and rebuilt",
        "same_labels": bool(np.array_equal(labels, packed.labels)),
        "grey_levels": differences(crops, packed),
        "networks": "scale lfw, trained on packed crops; bf16 where fast, flip, ten folds, in %",
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lfw_devtest_6000.bin"
        sets = {
            "packed": open_pairs("lfw_devtest_6000.bin"),
            "rebuilt": open_pairs(write_pairs(path, crops, pairs, people, options.raw)),
        }
        for name, one in sets.items():
            found = {
                method: evaluate_pairs(embedder, one, SETTINGS, keep=options.keep)
                for method, embedder in methods.items()
            }
            result[name] = {method: accuracies(rows) for method, rows in found.items()}
    result["machine"] = machine()
    write_atomically(options.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
