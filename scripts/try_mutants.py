"""A pytest plugin that tries mutants: each in a fork of one warm process, with the tests that reach it.

Started by scripts/mutants.py in the folder that mutmut fills, mutants/. mutmut by itself starts
pytest anew for each mutant, which takes longer than the tests do.
"""

from __future__ import annotations

import gc
import json
import os
import random
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
    metas = {path: json.loads(path.read_text()) for path in sorted(Path().rglob("*.py.meta"))}
    waiting = [
        (path, mutant)
        for path, meta in metas.items()
        for mutant, code in meta["exit_code_by_key"].items()
        if code is None
    ]
    random.Random(0).shuffle(waiting)  # a run that is cut off is a fair sample
    for path, mutant in waiting:
        items = reached.get(mangled_name_from_mutant_name(mutant), [])
        code = attempt(mutant, items, after) if items else NO_TEST
        metas[path]["exit_code_by_key"][mutant] = code
        path.write_text(json.dumps(metas[path], indent=1))
    return True
