"""Where and in which precision the numbers are computed."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from btnet_core.errors import ConfigError


def resolve_device(device: str = "auto") -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU; anything else is torch's own name for a device."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device: got {device!r} ({error})") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: {device!r} was asked for, but torch sees no CUDA device")
    return resolved


def fast_bf16(device: torch.device) -> bool:
    """True where bfloat16 matrix products have hardware: recent GPUs, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def autocast(device: torch.device, precision: str = "auto") -> AbstractContextManager:
    """Autocast for ``precision`` "fp32", "bf16", "fp16" or "auto" (bf16 where it is fast)."""
    if precision == "auto":
        precision = "bf16" if fast_bf16(device) else "fp32"
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)
