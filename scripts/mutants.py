"""What `make mutants` found: Markdown on how many mutants of each module the tests notice, and which they do not.

    python scripts/mutants.py > found.md

Reads the folder that mutmut leaves, mutants/. docs/mutants.md says why each survivor is harmless.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from mutmut.mutation.diff_apply import get_diff_for_mutant

FOUND = Path("mutants")
SURVIVED, NOT_RUN, NO_TEST = 0, None, (5, 33)  # of mutmut's exit codes; all others: noticed


def outcome(code: int | None) -> str:
    if code == SURVIVED:
        return "survived"
    if code is NOT_RUN:
        return "not run"
    return "no test" if code in NO_TEST else "noticed"


def change(mutant: str) -> str:
    """The lines that differ, without the headers of a diff."""
    lines = [line for line in get_diff_for_mutant(mutant).splitlines() if line[:1] in ("-", "+")]
    return "\n".join(line for line in lines if line[:3] not in ("---", "+++"))


def main() -> None:
    rows, survivors, total = [], [], Counter[str]()
    for path in sorted(FOUND.rglob("*.meta")):
        found = {m: outcome(c) for m, c in json.loads(path.read_text())["exit_code_by_key"].items()}
        if not found:
            continue
        counts = Counter(found.values())
        total += counts
        rows.append((str(path.relative_to(FOUND)).removesuffix(".meta"), counts))
        survivors += [mutant for mutant, what in found.items() if what != "noticed"]
    print("| module | mutants | noticed | of them |\n| --- | ---: | ---: | ---: |")
    for name, counts in [*rows, ("all", total)]:
        whole = counts.total()
        part = 100 * counts["noticed"] / max(1, whole)
        print(f"| {name} | {whole:,} | {counts['noticed']:,} | {part:.1f} % |")
    for mutant in survivors:
        print(f"\n{mutant}\n{change(mutant)}")


if __name__ == "__main__":
    main()
