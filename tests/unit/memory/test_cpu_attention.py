"""bf16 attention of plain matrix products against the definition in float64, and against torch's own kernel."""

from __future__ import annotations

import pytest
import torch
from attention_helpers import heads_of_a_block, written_out

from library.memory import cpu_attention as module
from library.memory.attention import sdpa_attention
from library.memory.attention_kernels import KERNELS, Workload
from library.memory.cpu_attention import cpu_attention

LENGTHS = [37, 50, 1]


def results(function, dtype: torch.dtype, masked: bool, gain: float) -> list[torch.Tensor]:
    """Returns the output at real tokens and the gradients; ``gain`` makes scores large."""
    tensors, mask = heads_of_a_block(LENGTHS if masked else [50, 50], head_dim=24)
    inputs = [
        tensor.detach().bfloat16().mul(factor).to(dtype)
        for tensor, factor in zip(tensors, (gain, gain, 1), strict=True)
    ]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    output = function(*inputs, mask if masked else None)
    assert torch.isfinite(output).all()
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtype)
    (output * weights)[mask].sum().backward()
    return [output[mask].detach(), *(tensor.grad for tensor in inputs)]


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gain", [1.0, 3.0])  # 3: scores up to about 40, where bf16 has steps of 0.25
@pytest.mark.parametrize("scores", [module._SCORES, 700])  # 700: several chunks of rows, the last one shorter
def test_it_equals_the_definition(monkeypatch: pytest.MonkeyPatch, masked: bool, gain: float, scores: int) -> None:
    monkeypatch.setattr(module, "_SCORES", scores)
    exact = results(written_out, torch.float64, masked, gain)
    for found, wanted in zip(results(cpu_attention, torch.bfloat16, masked, gain), exact, strict=True):
        # bf16 rounds by up to 2^-9 = 0.002: scores, weights, output. Scores rounded as they are
        # would be off by 6 % here.
        assert off(found, wanted) < 0.012
    for found, wanted in zip(results(sdpa_attention, torch.bfloat16, masked, gain), exact, strict=True):
        assert off(found, wanted) < 0.012


def test_it_compiles_into_one_graph() -> None:
    tensors, mask = heads_of_a_block(LENGTHS)
    inputs = [tensor.detach().bfloat16() for tensor in tensors]
    compiled = torch.compile(cpu_attention, fullgraph=True, backend="aot_eager")
    for key_mask in (None, mask):
        assert torch.equal(compiled(*inputs, key_mask), cpu_attention(*inputs, key_mask))


def test_it_is_chosen_for_bf16_on_cpus_with_idle_units_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(device: str, dtype: torch.dtype) -> str | None:
        return KERNELS["cpu"].unsuitable(Workload(torch.device(device), dtype, 6, 2, 24, training=True))

    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert reason("cpu", torch.bfloat16) is None
    assert reason("cpu", torch.float32)
    assert reason("cuda", torch.bfloat16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert reason("cpu", torch.bfloat16)
