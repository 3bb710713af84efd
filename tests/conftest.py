"""Shared fixtures: where the real faces are, a browser, and the rule for GPU tests."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Here and in what tests start: one thread, whatever else the machine does, for the same sums each time.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

import btnet_paper  # noqa: F401 (brings the kind "synthetic" of face sets)

torch.set_num_threads(1)  # where torch was there before


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """What a test sets in the environment (`btnet reproduce` does) is not there for the next one."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def btnet_data() -> Path:
    """The folder of real faces named by BTNET_DATA; skips where it is unset."""
    if not os.environ.get("BTNET_DATA"):
        pytest.skip(
            "BTNET_DATA is unset: this test needs the real faces described in data/README.md"
        )
    return Path(os.environ["BTNET_DATA"])


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A Playwright browser: Chromium of the system."""
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="no playwright: pip install -e '.[test]'"
    )
    executable = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if executable is None:
        pytest.skip("no Chromium: apt-get install chromium")
    quiet = ("no-sandbox", "disable-gpu", "disable-dev-shm-usage", "disable-background-networking", "disable-sync",
             "no-first-run", "disable-component-update")  # fmt: skip
    options = {"executable_path": executable, "args": [f"--{option}" for option in quiet]}
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(**options)
        yield started
        started.close()


def pytest_configure() -> None:
    """Ctrl-C is heard, also where the shell started the tests in the background and had it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "test_paper_scale" not in item.nodeid)  # it takes longest
    if torch.cuda.is_available():
        return
    if re.search(r"(?<!not )\bgpu\b", config.getoption("-m")):
        raise pytest.UsageError("-m gpu was asked for, but torch sees no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords also hold the names of folders
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
