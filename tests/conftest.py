"""Shared fixtures: where the real faces are, and the rule for GPU tests."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def btnet_data() -> Path:
    """The folder of real faces named by BTNET_DATA; skips where it is unset."""
    if not os.environ.get("BTNET_DATA"):
        pytest.skip("BTNET_DATA is unset: this test needs the real faces described in data/README.md")
    return Path(os.environ["BTNET_DATA"])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    if re.search(r"(?<!not )\bgpu\b", config.getoption("-m")):
        raise pytest.UsageError("-m gpu was asked for, but torch sees no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
