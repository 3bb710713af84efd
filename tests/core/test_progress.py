"""What a run tells: rows, lines by time; the bar and Ctrl-C in a real kernel."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from btnet_core.errors import BusyError
from btnet_core.files import lock
from btnet_core.models.backbone import BackboneConfig
from btnet_core.training import checkpoint, methods, progress
from btnet_core.training.loop import train
from btnet_core.training.progress import Progress, read_metrics

FACES = {"kind": "synthetic", "identities": 6, "images": 6, "seed": 0}
TINY = BackboneConfig(name="iresnet18", width=0.125, embedding=16)
LONG = methods.phi_hr(FACES, backbone=TINY, batch=12, epochs=3000, warmup_epochs=0.0, lr=0.1)


def told(
    out: Path, seconds_a_step: float, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> Progress:
    """400 steps of two epochs, as slow as wanted, on a clock of our own."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    shown = Progress(out, "phi", 400, 0, 200, show="lines", **options)
    for step in range(1, 401):
        clock[0] += seconds_a_step
        shown.step(step, {"loss": float(step)}, 0.1, 32)
    shown.close()
    return shown


def test_rows_hold_means_and_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told(tmp_path, 0.5, monkeypatch)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(20, 401, 20))
    assert rows[0]["loss"] == pytest.approx(10.5)
    assert rows[3]["images_per_second"] == pytest.approx(64)
    assert {"epoch", "lr", "memory_gb", "seconds"} <= rows[0].keys()


def test_plain_lines_are_throttled_by_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    told(tmp_path, 0.01, monkeypatch)  # four seconds: only the end is told
    assert len(capsys.readouterr().out.splitlines()) == 1
    told(
        tmp_path, 6.0, monkeypatch
    )  # slower than a line each ten seconds: not only when a row ends
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 200
    assert "step 2/400 epoch 0.01 loss 1.5 lr 0.1 images_per_second 5.333" in lines[0]
    assert lines[0].endswith("left 2388 s")


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    with (
        lock(tmp_path),
        pytest.raises(BusyError, match=rf"process {os.getpid()} \(since .*\) works there"),
    ):
        train(LONG.replace(epochs=1), tmp_path, device="cpu", show="none")
    with lock(tmp_path):
        pass  # nobody holds it any more


# ---- a real kernel ----


@pytest.fixture
def kernel() -> Iterator[Any]:
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import KernelManager

    class ThisPython(KernelManager):
        kernel_spec = KernelSpec(
            argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        )

    manager = ThisPython()
    manager.start_kernel(stderr=sys.__stderr__)
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def wait(reached: Callable[[], Any], seconds: float = 90) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := reached()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return value


def run_until(
    client: Any, code: str, done: Callable[[], Any], act: Callable[[], Any]
) -> tuple[dict, list[dict]]:
    """Execute a cell, ``act`` once it is ``done`` far enough; its reply and what it displayed."""
    asked, messages = client.execute(code), []
    wait(done)
    act()
    while True:
        message = client.get_iopub_msg(timeout=60)
        if message["parent_header"].get("msg_id") == asked:
            messages.append(message)
            if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                break
    while (reply := client.get_shell_msg(timeout=60))["parent_header"].get("msg_id") != asked:
        pass
    return reply["content"], messages


@pytest.mark.notebook
@pytest.mark.skipif(os.name != "posix", reason="interrupts a kernel with a signal")
def test_bar_and_interrupt_in_a_kernel(kernel: Any, tmp_path: Path) -> None:
    manager, client = kernel
    cell = (
        "import btnet_paper\nfrom btnet_core.training.config import TrainConfig\n"
        "from btnet_core.training.launch import train_in_subprocess\n"
        f"train_in_subprocess(TrainConfig.from_json({LONG.to_json()!r}), {str(tmp_path)!r}, device='cpu')\n"
    )
    reply, shown = run_until(
        client, cell, lambda: len(read_metrics(tmp_path)) > 3, manager.interrupt_kernel
    )
    assert reply["ename"] == "KeyboardInterrupt"
    with lock(tmp_path):
        pass  # it has stopped
    saved = checkpoint.load_state(tmp_path)["step"]
    assert saved > 3
    text = "".join(message["content"].get("text", "") for message in shown)
    assert "parameters learn" in text
    assert f"stopped at step {saved}, checkpoint saved" in text
    assert "phi_hr: step" not in text  # that is what the bar is for
    assert re.search(r"\rphi_hr: .*step.*images_per_second", text)

    # Under btnet reproduce: no bar.
    check = (
        "import os\nfrom btnet_core.training.launch import watched\nseen = [watched()]\n"
        "os.environ['BTNET_REPRODUCE'] = '1'\nseen.append(watched())\nprint(seen)\n"
    )
    _, shown = run_until(client, check, lambda: True, lambda: None)
    assert "[True, False]" in "".join(message["content"].get("text", "") for message in shown)
