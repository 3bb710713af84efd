"""Where and in which precision the numbers are computed."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from btnet_core.errors import ConfigError

PRECISIONS = ("fp32", "bf16", "fp16")
# of a processor, by torch's names: those that decide how fast a network runs
INSTRUCTIONS = (
    "avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni",
    "amx_tile", "amx_int8", "amx_bf16", "amx_fp16",
)  # fmt: skip


def resolve_device(device: str = "auto") -> torch.device:
    """Returns the device of that name; "auto" is CUDA where there is one, else the CPU.

    Of several GPUs a process that torchrun started gets its own, unless a number is named.

    Raises:
        ConfigError: torch knows no such device, or sees no CUDA device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device: got {device!r}, expected auto, cpu, cuda or cuda:N") from None
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: {device!r} was asked for, but torch sees no CUDA device")
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return resolved


def fast_bf16(device: torch.device) -> bool:
    """True where bfloat16 products have hardware: GPUs since Ampere, CPUs with AVX512-BF16 or AMX.

    A GPU that only emulates bfloat16 (the paper's RTX 2080 Ti) is slower with it than without.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool({"avx512_bf16", "amx_bf16"} & set(instruction_sets()))


def resolve_precision(precision: str, device: torch.device) -> str:
    """Returns "fp32", "bf16" or "fp16" for a name of PRECISIONS or "auto".

    "auto" is bf16 where it is fast; else fp16 on CUDA (training needs a gradient scaler then;
    paper-and-code: mixed precision) and fp32 on a CPU.

    Raises:
        ConfigError: another name.
    """
    if precision in PRECISIONS:
        return precision
    if precision != "auto":
        raise ConfigError(f"precision: got {precision!r}, expected auto, {', '.join(PRECISIONS)}")
    if fast_bf16(device):
        return "bf16"
    return "fp16" if device.type == "cuda" else "fp32"


def autocast(device: torch.device, precision: str = "auto") -> AbstractContextManager:
    """The forward pass in ``precision``, a name of PRECISIONS or "auto"."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = dtypes.get(resolve_precision(precision, device))
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def describe_precision(precision: str, device: torch.device) -> str:
    """The resolved precision for a record; TF32 is named where products of fp32 use it.

    TF32 keeps 10 of float32's 23 bits of mantissa; torch uses it for convolutions by default.
    """
    name = resolve_precision(precision, device)
    if name != "fp32" or device.type != "cuda":
        return name
    parts = [part for part, used in tf32().items() if used]
    return f"fp32 (TF32 in {' and '.join(parts)})" if parts else name


def tf32() -> dict[str, bool]:
    """Whether products of float32 are computed in TF32 on a GPU that has it."""
    return {
        "matrix products": torch.backends.cuda.matmul.allow_tf32,
        "convolutions": torch.backends.cudnn.allow_tf32,
    }


def instruction_sets() -> list[str]:
    """Those of INSTRUCTIONS that the processor has; empty where torch cannot tell."""
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return [name for name in INSTRUCTIONS if found.get(name)]


def machine() -> dict[str, Any]:
    """What a recorded time or number was computed on."""
    gpu = torch.cuda.is_available()
    return {
        "cpu": _processor(), "instruction_sets": instruction_sets(), "cores": len(cores()),
        "threads": torch.get_num_threads(), "gpu": torch.cuda.get_device_name() if gpu else None,
        "tf32": tf32() if gpu else None,
    }  # fmt: skip


def cores() -> set[int]:
    """Numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def idle_cores(seconds: float = 0.2, least: int = 1) -> int:
    """How many of its cores nobody else works on, watched for so long; at least ``least``.

    Two threads on one idle and one busy core are slower than one: they wait for each other.
    """
    before = _busy_ticks()
    if not before:  # no Linux
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        return max(least, len(cores()) - round(load))
    time.sleep(seconds)
    after, ticks = _busy_ticks(), seconds * os.sysconf("SC_CLK_TCK")
    return max(least, sum(after[core] - before[core] < 0.5 * ticks for core in before))


@contextmanager
def threads(wanted: int = 0, processes: int = 1) -> Iterator[int]:
    """torch with ``wanted`` threads; 0: as many as cores are idle, at most as it had before.

    ``processes`` on this machine share the idle cores. Yields the number; restores it at the end.
    """
    before = torch.get_num_threads()
    chosen = wanted or (before if before == 1 else max(1, min(before, idle_cores() // processes)))
    torch.set_num_threads(chosen)
    try:
        yield chosen
    finally:
        torch.set_num_threads(before)


def _busy_ticks() -> dict[int, int]:
    """Clock ticks that each of this process's cores has worked since the machine started."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return {}
    found = {}
    for line in stat.read_text().splitlines():
        name, *ticks = line.split()
        number = name.removeprefix("cpu")
        if name.startswith("cpu") and number.isdigit() and int(number) in cores():
            user, nice, system = (int(value) for value in ticks[:3])
            found[int(number)] = user + nice + system
    return found


def _processor() -> str:
    """Model of the processor, as Linux names it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
