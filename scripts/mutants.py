"""Which planted faults do the tests notice? mutmut plants them; writes docs/mutants.md.

    python scripts/mutants.py            # all, from the start (make mutants)
    python scripts/mutants.py --again    # those that no test has noticed, after tests were added
    python scripts/mutants.py --go-on    # those that a run which was cut off has not tried

What is planted where and which tests try it: [tool.mutmut] in pyproject.toml.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from mutmut.__main__ import copy_also_copy_files, copy_src_dir, create_mutants
from mutmut.configuration import config
from mutmut.mutation.diff_apply import get_diff_for_mutant

FOUND, PAGE = Path("mutants"), Path("docs/mutants.md")
# exit codes: pytest failed; the time was over (SIGALRM, SIGXCPU, SIGKILL)
NOTICED, ENDLESS, SURVIVED, NOT_RUN, NO_TEST = 1, (-14, -24, -9), 0, None, 33
AROUND = 40  # characters of a line shown on either side of a change
HEAD = """# Mutants: faults that the tests do not notice

`make mutants` plants a fault at a time (mutmut: another operator, constant, argument, text) in the
modules below, runs the tests that reach it, the fastest first and for six seconds of a processor at
most, and writes this page. {commits}
"""
# Why a survivor is harmless, and what "old -> new | its name and the line" looks like.
REASONS = (
    ("Of a GPU alone, or of another device: the tests of this run have a CPU.",
     r"^[^|]*(devic|pin_memory|non_blocking|memory_format)|cuda"),
    ("Over several processes: tests/core/test_distributed.py, which starts some, is not in this run.",
     r"^[^|]*(total=|world|rank\(\))"),
    ("What a whole training does (resume, finished runs, weights that are written): the tests that train "
     "(tests/core/test_loop.py, test_checkpoint.py, test_run.py) are not in this run, for time.",
     r"\| training\.loop\.x_(train|_train|fit|fill_cache|write_weights|_finish|_embedder|validate) "),
    ("The layout in memory of two maps that are compared channel by channel: the same number.",
     r"\| training\.step\.x_distillation "),
    ("Equal lengths by construction: `strict` guards against nothing that can be passed in.",
     r"strict="),
    ("The size of a block, or how far ahead is read: no result depends on it.",
     r"split\(|chunk\b|buffer|65536|batch_size|max_workers|READ_EVERY"),
    ("A default that says what is given, or what torch and numpy take anyway.",
     r"^[^|]*(align_corners|dtype|np\.|float|dim=|eps=|stable=)|^, ?(\S+ )?-> ,? \|"),
    ("A text: the end of a message, the name of an encoding, the layout of JSON.",
     r"^[^|]*-> (XX|[A-Z][A-Z ,.:'()-]+\|)|indent="),
    ("Equality of floats that never meet, or of a bound that has slack.",
     r"^ ?[<>]?=? -> [<>]?=? \|"),
    ("Square images only: rows for columns.", r"shape\[-[12]\]"),
)  # fmt: skip
REST = (
    "Read as a group, not proved one by one: what differs is not read, cannot occur with what the tests "
    "or the program pass in, or comes to the same number."
)


def outcome(code: int | None) -> str:
    if code is NOT_RUN:
        return "not run"
    if code == SURVIVED:
        return "survived"
    if code == NO_TEST:
        return "no test"
    return "noticed" if code == NOTICED else "endless" if code in ENDLESS else "broken off"


def common(old: str, new: str) -> int:
    """How many characters two lines begin with alike."""
    pairs = enumerate(zip(old, new, strict=False))
    return next((k for k, (a, b) in pairs if a != b), min(len(old), len(new)))


def change(mutant: str) -> tuple[str, str]:
    """What a mutant changes, "old -> new": those characters alone, and with some around them."""
    lines = [line for line in get_diff_for_mutant(mutant).splitlines() if line[:1] in ("-", "+")]
    lines = [line for line in lines if line[:3] not in ("---", "+++")]
    old, new = (" ".join(x[1:].strip() for x in lines if x[0] == sign) for sign in "-+")
    start = common(old, new)
    end = common(old[start:][::-1], new[start:][::-1])
    first, last = max(0, start - AROUND), min(end, AROUND)
    alone = " -> ".join(text[start : len(text) - end] for text in (old, new))
    return alone, " -> ".join(text[first : len(text) - end + last] for text in (old, new))


def reason(text: str) -> str:
    return next((why for why, like in REASONS if re.search(like, text)), REST)


def table(counts: dict[str, Counter[str]]) -> str:
    """Markdown: a row for each module and for all; the score is of those that were tried."""
    total: Counter[str] = Counter()
    for found in counts.values():
        total.update(found)
    lines = ["| module | mutants | noticed | without end | survived | no test | not run | score |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, found in [*counts.items(), ("all", total)]:
        whole, seen = found.total(), found["noticed"] + found["endless"]
        tried = max(1, whole - found["not run"])
        cells = [f"{found[k]:,}" for k in ("noticed", "endless", "survived", "no test", "not run")]
        lines.append(f"| {name} | {whole:,} | {' | '.join(cells)} | {100 * seen / tried:.1f} % |")
    return "\n".join(lines)


def plant() -> None:
    """Fill the folder with the mutants of all modules, none of them tried."""
    shutil.rmtree(FOUND, ignore_errors=True)
    FOUND.mkdir()
    copy_src_dir()
    copy_also_copy_files()
    create_mutants(1)


def forget_survivors() -> None:
    """Have those tried again that no test has noticed, with the tests as they are now."""
    copy_also_copy_files()
    for path in FOUND.rglob("*.meta"):
        meta = json.loads(path.read_text())
        codes = meta["exit_code_by_key"]
        meta["exit_code_by_key"] = {
            mutant: code if outcome(code) == "noticed" else NOT_RUN
            for mutant, code in codes.items()
        }
        path.write_text(json.dumps(meta, indent=1))


def attempt() -> None:
    """Run the tests on each mutant that has not been tried."""
    given = config()
    here = str(Path(__file__).parent.resolve())
    places = os.pathsep.join([str(FOUND.resolve()), here])
    command = [sys.executable, "-m", "pytest", "-s", "-p", "try_mutants", "--rootdir=."]
    command += [*given.pytest_add_cli_args, *given.pytest_add_cli_args_test_selection]
    subprocess.run(command, cwd=FOUND, env={**os.environ, "PYTHONPATH": places}, check=True)


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def page() -> str:
    """docs/mutants.md, from what the folder holds."""
    counts: dict[str, Counter[str]] = {}
    survivors: dict[str, list[str]] = {}
    for path in sorted(FOUND.rglob("*.meta")):
        codes = json.loads(path.read_text())["exit_code_by_key"]
        found = {mutant: outcome(code) for mutant, code in codes.items()}
        if found:
            counts[str(path.relative_to(FOUND)).removesuffix(".meta")] = Counter(found.values())
        for mutant, what in found.items():
            if what in ("survived", "no test", "broken off"):
                name = mutant.split(".", 1)[1].replace("__mutmut_", " ")
                alone, told = change(mutant)
                why = reason(f"{alone} | {name} {told}")
                survivors.setdefault(why, []).append(f"- {name}: `{told}`")
    parts = [HEAD.format(commits=(FOUND / "commits").read_text()), table(counts)]
    parts.append("\n## What survives, and why that is harmless")
    for why, lines in sorted(survivors.items(), key=lambda item: -len(item[1])):
        parts.append("\n".join([f"\n### {why} ({len(lines)})\n", *lines]))
    return "\n".join(parts) + "\n"


def main() -> None:
    told = FOUND / "commits"
    if "--go-on" in sys.argv:
        print(f"going on with {told.read_text()}")
    elif "--again" in sys.argv:
        forget_survivors()
        told.write_text(f"{told.read_text()} Survivors tried again at commit {commit()}.")
    else:
        plant()
        told.write_text(f"Tried at commit {commit()}.")
    attempt()
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
