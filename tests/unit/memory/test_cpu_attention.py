"""bf16 attention of plain matrix products against the definition in float64, and against torch's own kernel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_helpers import heads_of_a_block, written_out

from library.lumina.configs import NextDiTConfig
from library.lumina.next_dit import JointAttention, plain_attention, rope_table
from library.memory import cpu_attention as module
from library.memory.attention import sdpa_attention
from library.memory.attention_kernels import KERNELS, Workload
from library.memory.cpu_attention import cpu_attention

LENGTHS = [37, 50, 1]
HEAD_DIM = 16  # its root is a power of two, so that scaling queries rounds nothing


def results(
    function: Callable[..., torch.Tensor], tensors: list[torch.Tensor], mask: torch.Tensor, masked: bool
) -> list[torch.Tensor]:
    """Returns the output at real tokens and the gradients."""
    inputs = [tensor.detach().requires_grad_() for tensor in tensors]
    output = function(*inputs, mask if masked else None)
    assert torch.isfinite(output).all()
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(output.dtype)
    (output * weights)[mask].sum().backward()
    return [output[mask].detach(), *(tensor.grad for tensor in inputs)]


def inputs(masked: bool, gain: float) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Returns q, k, v in bf16, and the mask; ``gain`` makes scores large."""
    tensors, mask = heads_of_a_block(LENGTHS if masked else [50, 50], head_dim=HEAD_DIM)
    return [x.detach().mul(by).bfloat16() for x, by in zip(tensors, (gain, gain, 1), strict=True)], mask


def errors(
    tensors: list[torch.Tensor], mask: torch.Tensor, masked: bool, function: Callable[..., torch.Tensor] = cpu_attention
) -> list[float]:
    """Returns how far output and gradients are from the definition's, as shares of their norm."""
    exact = results(written_out, [x.double() for x in tensors], mask, masked)
    found = results(function, tensors, mask, masked)
    return [float((x.double() - y).norm() / y.norm()) for x, y in zip(found, exact, strict=True)]


def count_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[None]:
    """Returns a list that grows with each call of the module's function."""
    calls: list[None] = []
    function = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *arguments: calls.append(None) or function(*arguments))
    return calls


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gain", [1.0, 3.0])  # 3: scores up to about 40, where bf16 has steps of 0.25
@pytest.mark.parametrize("scores", [module._SCORES, 700])  # 700: several chunks of rows, the last one shorter
def test_it_equals_the_definition(monkeypatch: pytest.MonkeyPatch, masked: bool, gain: float, scores: int) -> None:
    monkeypatch.setattr(module, "_SCORES", scores)
    tensors, mask = inputs(masked, gain)
    # bf16 rounds by up to 2^-9 = 0.002: weights, their products, output. Scores rounded as they are would be off by 6 %.
    assert max(errors(tensors, mask, masked)) < 0.012
    assert max(errors(tensors, mask, masked, sdpa_attention)) < 0.012


@pytest.mark.parametrize("masked", [False, True])
def test_scores_far_below_their_bound(monkeypatch: pytest.MonkeyPatch, masked: bool) -> None:
    tensors, mask = inputs(masked, 1.0)
    tensors[0][:, 1::2] *= 8
    tensors[0][:, ::2] *= 0.1
    tensors[1][:, 3] *= 8  # the bound is near 300, where the small queries' weights would not be numbers
    calls = count_calls(monkeypatch, "_maxima")
    # As above; where one key has all the weight, gradients of scores are differences of rounded numbers.
    assert max(errors(tensors, mask, masked)) < 0.02
    assert calls


def test_the_bound_is_enough_for_usual_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch, "_maxima")
    errors(*inputs(masked=True, gain=1.0), True)
    assert not calls


def test_one_query_head_for_each_key_head() -> None:
    tensors, mask = heads_of_a_block(LENGTHS, kv_heads=3, heads=3, head_dim=HEAD_DIM)
    assert max(errors([tensor.detach().bfloat16() for tensor in tensors], mask, True)) < 0.009  # as above


def test_the_model_scales_queries_before_they_are_rounded() -> None:
    class Recording:
        def __call__(self, *arguments: torch.Tensor | None) -> torch.Tensor:
            raise RuntimeError("queries would be scaled a second time")

        def of_scaled_queries(self, q: torch.Tensor, *others: torch.Tensor | None) -> torch.Tensor:
            return plain_attention(q * config.head_dim**0.5, *others)

    config = NextDiTConfig(dim=72, num_heads=3, num_kv_heads=1, head_dim=24)
    plain, scaling = JointAttention(config, plain_attention), JointAttention(config, Recording())
    scaling.load_state_dict(plain.state_dict())
    x = torch.randn(2, 12, 72, generator=torch.Generator().manual_seed(0))
    rope = rope_table(torch.tensor([3]), 3, 3, 3, 24)
    torch.testing.assert_close(scaling(x, rope, None), plain(x, rope, None))  # float32: 1e-5, for 24 ** 0.5 is rounded


def test_queries_scaled_early_are_as_exact_as_the_kernel() -> None:
    tensors, mask = heads_of_a_block(LENGTHS, head_dim=24)
    tensors = [x.detach().mul(by).bfloat16() for x, by in zip(tensors, (0.5, 3.0, 1.0), strict=True)]

    def scaled(q: torch.Tensor, *others: torch.Tensor | None) -> torch.Tensor:
        return cpu_attention.of_scaled_queries(q, *others)

    def exact(q: torch.Tensor, *others: torch.Tensor | None) -> torch.Tensor:
        return written_out(q * 24**0.5, *others)

    wanted = results(exact, [x.double() for x in tensors], mask, True)
    for found, right in zip(results(scaled, tensors, mask, True), wanted, strict=True):
        assert float((found.double() - right).norm() / right.norm()) < 0.009  # as above


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
