"""A pytest plugin that tries mutants: each in a fork of one warm process, with the tests that reach it.

Started by scripts/mutants.py in the folder that mutmut fills, mutants/. mutmut by itself starts
pytest anew for each mutant, which takes longer than the tests do.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from _pytest.runner import runtestprotocol
from mutmut.state import state
from mutmut.utils.format_utils import mangled_name_from_mutant_name

MUTANT = "MUTANT_UNDER_TEST"  # mutmut's: which mutant runs, or that hits are to be counted
NOTICED, SURVIVED, NO_TEST = 1, 0, 33  # mutmut's exit codes
SECONDS = 6  # of a processor, for the tests of one mutant: those beyond are left out
CPU_LIMIT, WALL_LIMIT = 20, 180  # seconds; a mutant that takes longer has no end


def passes(item: pytest.Item, after: object) -> bool:
    return not any(report.failed for report in runtestprotocol(item, log=False, nextitem=after))


def measure(session: pytest.Session, after: object) -> dict[str, list[pytest.Item]]:
    """The tests that reach each function, the fastest first."""
    os.environ[MUTANT] = "stats"
    seconds: dict[pytest.Item, float] = {}
    reached: dict[str, list[pytest.Item]] = {}
    for item in session.items:
        state()._stats.clear()
        began = time.process_time()
        if not passes(item, after):
            raise pytest.UsageError(f"{item.nodeid} fails without a mutant")
        seconds[item] = time.process_time() - began
        for function in state()._stats:
            reached.setdefault(function, []).append(item)
    for items in reached.values():
        items.sort(key=seconds.__getitem__)
    os.environ[MUTANT] = ""
    return reached


def attempt(mutant: str, items: list[pytest.Item], after: object) -> int:
    """The exit code of a child that runs the tests until one fails; minus the signal that ended it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        signal.alarm(WALL_LIMIT)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT, CPU_LIMIT + 1))
        os.environ[MUTANT] = mutant
        for item in items:
            if not passes(item, after):
                os._exit(NOTICED)
            if time.process_time() > SECONDS:
                break
        os._exit(SURVIVED)
    except BaseException:  # a mutant may raise anything, also from within pytest
        os._exit(NOTICED)


def pytest_runtestloop(session: pytest.Session) -> bool:
    after = SimpleNamespace(listchain=lambda: [session])  # what the session shares stays
    reached = measure(session, after)
    gc.collect()
    gc.freeze()  # a child looks through its own garbage alone
    for path in sorted(Path().rglob("*.py.meta")):
        meta = json.loads(path.read_text())
        codes = meta["exit_code_by_key"]
        for mutant in [mutant for mutant, code in codes.items() if code is None]:
            items = reached.get(mangled_name_from_mutant_name(mutant), [])
            codes[mutant] = attempt(mutant, items, after) if items else NO_TEST
            path.write_text(json.dumps(meta, indent=1))
        if codes:
            counted = sum(code != SURVIVED and code != NO_TEST for code in codes.values())
            print(f"{path}: {counted} of {len(codes)} noticed", flush=True)
    return True
