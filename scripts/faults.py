"""kill -9 at random moments of `btnet train`, `adapt` and `reproduce`, again and again until each ends.

    python scripts/faults.py [--kills 8] [--seed 0] [--out FILE.json]

Each command, on tiny synthetic faces, is run undisturbed once. Then it is started, killed after a random time and started
again, `--kills` times, and left to end. It must end well, and its weights and recorded results must equal the undisturbed
ones bit for bit. Exit status 1 if they do not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import nbformat

from btnet_core.files import read_safetensors
from btnet_core.models.backbone import BackboneConfig, build_backbone
from btnet_core.models.weights import save_backbone
from btnet_core.training import methods
from btnet_paper.results import environment

FACES = {"kind": "synthetic", "identities": 24, "images": 6, "seed": 0}
TINY = BackboneConfig(name="iresnet18", width=0.125, embedding=16)
QUICK = {
    "batch": 12,
    "epochs": 6,
    "warmup_epochs": 0.0,
    "lr": 1.0,
    "checkpoint_seconds": 0.5,
    "precision": "fp32",
}
FIRST = """
from btnet_core.training import methods
from btnet_core.training.config import TrainConfig
from btnet_core.training.launch import train_in_subprocess
from pathlib import Path
config = TrainConfig.from_json(Path("config.json").read_text())
metrics = train_in_subprocess(config, Path(run_dir) / "models" / "phi_mr", device="cpu")
"""
SECOND = """
from pathlib import Path
from btnet_paper import results
from btnet_core.models.backbone import load_backbone
from btnet_core.models.btnet import weights_digest
digest = weights_digest(load_backbone(Path(run_dir) / "models" / "phi_mr" / "trunk.safetensors"))
results.record(Path(run_dir), "second", {"digest": digest}, config={}, data="", kernel="", seed=0, seconds=0.0)
"""


def prepare_train(place: Path) -> list[str]:
    (place / "c.json").write_text(methods.phi_mr(FACES, backbone=TINY, **QUICK).to_json())
    return ["train", "--config", "c.json", "--out", "out", "--device", "cpu"]


def prepare_adapt(place: Path) -> list[str]:
    save_backbone(build_backbone(TINY), place / "trunk.safetensors")
    changes = [f"--set={name}={value}" for name, value in QUICK.items() if name != "warmup_epochs"]
    faces = ["--faces", json.dumps(FACES), "--hold-out", "25", "--resolutions", "14", "7"]
    return [
        "adapt",
        "--trunk",
        "trunk.safetensors",
        *faces,
        "--out",
        "out",
        "--device",
        "cpu",
        *changes,
    ]


def prepare_reproduce(place: Path) -> list[str]:
    (place / "notebooks").mkdir()
    (place / "notebooks" / "config.json").write_text(
        methods.phi_mr(FACES, backbone=TINY, **QUICK).to_json()
    )
    for stem, source, depends in (("01_first", FIRST, []), ("02_second", SECOND, ["01"])):
        parameters = nbformat.v4.new_code_cell(
            'scale = "demo"\nrun_dir = ""', metadata={"tags": ["parameters"]}
        )
        notebook = nbformat.v4.new_notebook(cells=[parameters, nbformat.v4.new_code_cell(source)])
        notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
                             "btnet": {"depends": depends}}  # fmt: skip
        nbformat.write(notebook, place / "notebooks" / f"{stem}.ipynb")
    return ["reproduce", "--runs", "out"]


KINDS = {"train": prepare_train, "adapt": prepare_adapt, "reproduce": prepare_reproduce}


def outcome(out: Path) -> dict[str, Any]:
    """Every weight and recorded result under ``out``, without times."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*.safetensors")):
        state, _ = read_safetensors(path)
        found[str(path.relative_to(out))] = {
            name: tensor.numpy().tobytes() for name, tensor in state.items()
        }
    for path in sorted(out.rglob("results/*.json")):
        values = json.loads(path.read_text())
        values = values.get("values", values)
        found[str(path.relative_to(out))] = {
            k: v for k, v in values.items() if k not in ("seconds", "environment")
        }
    return found


def start(command: list[str], place: Path, log: Path) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("ab") as sink:
        return subprocess.Popen(
            [sys.executable, "-m", "btnet_tools", *command],
            cwd=place,
            env=env,
            stdout=sink,
            stderr=subprocess.STDOUT,
        )


def phase(out: Path) -> str:
    """How far the command had come when it was killed, by what is on the disk."""
    if list(out.rglob("results/*.json")):
        return "results recorded"
    records, states = list(out.rglob("run.json")), list(out.rglob("checkpoint/state.pt"))
    if records and len(records) >= len(states):
        return "between two trainings, or after the last"
    return "training, with a checkpoint" if states else "before the first checkpoint"


def torture(kind: str, kills: int, dice: random.Random, folder: Path) -> dict[str, Any]:
    """Run, then kill and go on ``kills`` times; what was seen."""
    whole, cut = folder / "whole", folder / "cut"
    for place in (whole, cut):
        place.mkdir(parents=True)
    command, began = KINDS[kind](whole), time.monotonic()
    if start(command, whole, folder / "log").wait():
        raise SystemExit(
            f"{kind}: the undisturbed run failed:\n{(folder / 'log').read_text()[-3000:]}"
        )
    seconds, moments, phases = time.monotonic() - began, list[float](), Counter[str]()
    command = KINDS[kind](cut)
    for trunk in whole.glob("trunk.safetensors"):  # the input of adapt, with random weights
        (cut / trunk.name).write_bytes(trunk.read_bytes())
    while len(moments) < kills:
        process, wait = start(command, cut, folder / "log"), dice.uniform(0, 0.9 * seconds)
        try:
            status = process.wait(wait)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            moments.append(round(wait, 2))
            phases[phase(cut / "out")] += 1
            continue
        if status:
            return {"kills": moments, "failed": (folder / "log").read_text()[-3000:]}
        if len(moments) < kills:  # it had ended: once more from the start
            (cut / "out").rename(cut / f"ended_{len(list(cut.glob('ended_*')))}")
    if start(command, cut, folder / "log").wait():
        return {"kills": moments, "failed": (folder / "log").read_text()[-3000:]}
    expected = outcome(whole / "out")
    ends = [cut / "out", *cut.glob("ended_*")]
    different = [
        f"{end.name}/{name}"
        for end in ends
        for name, value in expected.items()
        if outcome(end).get(name) != value
    ]
    return {
        "kills": moments,
        "phases": dict(phases),
        "seconds": round(seconds, 1),
        "ends": len(ends),
        "compared": len(expected),
        "different": different,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=8, help="of each command (default: 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    dice, kinds = random.Random(options.seed), dict[str, Any]()
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.kinds.split(","):
            kinds[kind] = seen = torture(kind, options.kills, dice, Path(folder) / kind)
            if "failed" in seen:
                print(f"{kind}: FAILED after kills at {seen['kills']} s:\n{seen['failed']}")
            else:
                print(f"{kind}: {len(seen['kills'])} kills at {seen['kills']} s ({seen['phases']}), {seen['ends']} ends, {seen['compared']} files "
                      f"compared, different: {seen['different'] or 'none'}", flush=True)  # fmt: skip
    if options.out:
        report = {
            "command": f"python scripts/faults.py --kills {options.kills} --seed {options.seed}",
            "kinds": kinds,
        }
        options.out.write_text(json.dumps({**report, **environment()}, indent=1) + "\n")
    return int(any(seen.get("failed") or seen.get("different") for seen in kinds.values()))


if __name__ == "__main__":
    sys.exit(main())
