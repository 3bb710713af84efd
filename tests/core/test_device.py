"""Device and precision as resolved."""

from __future__ import annotations

import pytest
import torch

from btnet_core import device
from btnet_core.errors import ConfigError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_resolve_device_refuses_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.resolve_device("auto") == CPU
    with pytest.raises(ConfigError, match="torch sees no CUDA"):
        device.resolve_device("cuda")
    with pytest.raises(ConfigError, match=r"got 'gpu', expected auto, cpu, cuda or cuda:N$"):
        device.resolve_device("gpu")


@pytest.mark.parametrize("real", [True, False])
def test_a_gpu_that_emulates_bf16_gets_fp16(real: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's RTX 2080 Ti answers True when asked with its emulation."""
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or real,
    )
    assert device.fast_bf16(CUDA) is real
    assert device.resolve_precision("auto", CUDA) == ("bf16" if real else "fp16")
    assert device.resolve_precision("fp32", CUDA) == "fp32"


@pytest.mark.parametrize("sets", [["avx512_bf16"], ["amx_bf16"], ["avx2"]])
def test_auto_on_a_cpu(sets: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = dict.fromkeys(sets, True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {**found, "avx512_fp16": False})
    expected = "fp32" if sets == ["avx2"] else "bf16"
    assert device.resolve_precision("auto", CPU) == expected
    assert device.machine()["instruction_sets"] == sets
    with device.autocast(CPU):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[expected]


def test_unknown_precision() -> None:
    with pytest.raises(ConfigError, match="precision: got 'int4', expected auto, fp32, bf16, fp16"):
        device.resolve_precision("int4", CPU)


@pytest.mark.parametrize("matmul", [True, False])
@pytest.mark.parametrize("convolutions", [True, False])
def test_tf32_is_named_where_fp32_uses_it(matmul: bool, convolutions: bool) -> None:
    before = device.tf32()
    try:
        torch.backends.cuda.matmul.allow_tf32 = matmul
        torch.backends.cudnn.allow_tf32 = convolutions
        said = device.describe_precision("fp32", CUDA)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before["matrix products"]
        torch.backends.cudnn.allow_tf32 = before["convolutions"]
    assert ("matrix products" in said, "convolutions" in said) == (matmul, convolutions)
    assert ("TF32" in said) == (matmul or convolutions)
    assert device.describe_precision("fp32", CPU) == "fp32"
    assert device.describe_precision("bf16", CUDA) == "bf16"


def test_machine_names_what_there_is() -> None:
    facts = device.machine()
    assert facts.keys() == {"cpu", "instruction_sets", "cores", "threads", "gpu", "tf32"}
    assert facts["threads"] == torch.get_num_threads()
    assert (facts["gpu"] is None) == (facts["tf32"] is None) == (not torch.cuda.is_available())


def test_of_several_gpus_a_process_of_torchrun_gets_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.resolve_device("auto") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert device.resolve_device("auto") == device.resolve_device("cuda") == torch.device("cuda", 2)
    assert device.resolve_device("cuda:1") == torch.device("cuda", 1)
    assert device.resolve_device("cpu") == torch.device("cpu")
