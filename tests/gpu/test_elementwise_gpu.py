"""Norms, rotation and SwiGLU on CUDA in half precision: what float64 gives, both ways, and the host never waits."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import elementwise_helpers as helpers
import pytest
import torch
from torch import Tensor, nn

from library.lumina import elementwise
from library.lumina.configs import NextDiTConfig
from library.lumina.elementwise import scaled_norm
from library.lumina.elementwise_trial import kernels_on
from library.lumina.next_dit import JointTransformerBlock, plain_attention, rope_table
from library.memory.recompute import recompute_in_backward

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

HALVES = [torch.bfloat16, torch.float16]
WIDTH = 2304
NO_TRITON = importlib.util.find_spec("triton") is None


@pytest.fixture(params=["kernels", "torch's operations"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "kernels" and NO_TRITON:
        pytest.skip("needs the package triton")
    if request.param != "kernels":
        monkeypatch.setattr(elementwise, "_kernels_for", lambda x: None)
    return request.param


@pytest.mark.skipif(NO_TRITON, reason="needs the package triton")
@pytest.mark.parametrize("dtype", HALVES)
def test_the_kernels_are_taken(dtype: torch.dtype) -> None:
    assert kernels_on(torch.cuda.current_device(), dtype) is not None
    x = torch.randn(1, 3, WIDTH, device="cuda", dtype=dtype).requires_grad_()
    assert type(scaled_norm(x, torch.ones(WIDTH, device="cuda"), 1e-5).grad_fn).__name__ == "ScaledNormBackward"


@pytest.mark.parametrize("name", helpers.cases(torch.bfloat16))
@pytest.mark.parametrize("dtype", HALVES)
def test_halves_equal_float64_without_waiting(name: str, dtype: torch.dtype, way: str) -> None:
    case = helpers.cases(dtype)[name]
    upstream = helpers.upstream_of(case)
    expected = helpers.exact(case, upstream)
    function, on_cuda, upstream = helpers.public(case), [value.cuda() for value in case.inputs], upstream.cuda()
    helpers.results(function, case, on_cuda, upstream)  # loads kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = helpers.results(function, case, on_cuda, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    again = helpers.results(function, case, on_cuda, upstream)
    for ours, repeated, theirs in zip(found, again, expected, strict=True):
        if way == "kernels":
            assert torch.equal(ours, repeated)
            assert helpers.distance(ours, theirs) < helpers.bound(case, ours)
        else:  # rounded once more, at a size up to a few times the result's; and a sum of halves
            assert helpers.distance(ours, theirs) < torch.finfo(dtype).eps


@pytest.mark.usefixtures("way")
def test_norms_take_no_float32_memory() -> None:
    x = torch.randn(1, 4096, WIDTH, device="cuda", dtype=torch.bfloat16).requires_grad_()
    factor = torch.ones(WIDTH, device="cuda")
    upstream = torch.ones_like(x)
    scaled_norm(x, factor, 1e-5, x).backward(upstream)
    x.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    scaled_norm(x, factor, 1e-5, x).backward(upstream)
    # At once at most: the result, the gradients of both inputs and their sum, the gradient of the norm; as bfloat16.
    assert torch.cuda.max_memory_allocated() - before < 5.5 * x.nbytes


@pytest.mark.skipif(NO_TRITON, reason="needs the package triton")
def test_strides_that_no_model_has() -> None:
    """Transposed tensors and gradients, and a gradient that is one number for all."""
    case = helpers.cases(torch.bfloat16)["norm of a sample, residual"]
    x, factor, residual = (value.cuda() for value in case.inputs)

    def turned(value: Tensor) -> Tensor:
        return value.transpose(1, 2).contiguous().transpose(1, 2)

    def results(*inputs: Tensor, upstream: Tensor) -> list[Tensor]:
        leaves = [value.detach().requires_grad_() for value in inputs]
        result = scaled_norm(leaves[0], leaves[1], 1e-5, leaves[2])
        return [result.detach(), *torch.autograd.grad(result, leaves, upstream)]

    for upstream in (torch.randn_like(x), torch.ones((), device="cuda", dtype=x.dtype).expand(x.shape)):
        plain = results(x, factor, residual, upstream=upstream.contiguous())
        strided = results(turned(x), factor, turned(residual), upstream=turned(upstream))
        for ours, expected in zip([*strided, *results(x, factor, residual, upstream=upstream)], plain * 2, strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.skipif(NO_TRITON, reason="needs the package triton")
@pytest.mark.parametrize("name", ["norm of a sample, residual", "rotation, frozen weights", "swiglu"])
def test_addresses_that_no_model_has(name: str) -> None:
    """Tensors that begin at no multiple of 16 bytes have code of their own, which a short launch must not mix up."""
    case = helpers.cases(torch.bfloat16)[name]
    upstream = helpers.upstream_of(case).cuda()

    def results(shifted: int) -> list[Tensor]:
        inputs = []
        for value in case.inputs:
            room = torch.empty(value.numel() + shifted, dtype=value.dtype, device="cuda")
            inputs.append(room[shifted:].view(value.shape).copy_(value))
        return helpers.results(helpers.public(case), case, inputs, upstream)

    expected = results(0)
    for shifted in (1, 0, 1):
        for ours, theirs in zip(results(shifted), expected, strict=True):
            assert helpers.distance(ours, theirs.cpu().double()) < 2 * helpers.bound(case, ours)


@pytest.mark.skipif(NO_TRITON, reason="needs the package triton")
def test_kernels_run_on_the_current_stream() -> None:
    case = helpers.cases(torch.bfloat16)["rotation, frozen weights"]
    function, upstream = helpers.public(case), helpers.upstream_of(case).cuda()
    inputs = [value.cuda() for value in case.inputs]
    expected = helpers.results(function, case, inputs, upstream)
    late = [torch.zeros_like(value) for value in inputs]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)
        for value, source in zip(late, inputs, strict=True):
            value.copy_(source)
        found = helpers.results(function, case, late, upstream)
    torch.cuda.synchronize()
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def block_and_inputs() -> tuple[nn.Module, tuple[Tensor, ...]]:
    config = NextDiTConfig()
    torch.manual_seed(0)
    with torch.device("cuda"):
        block = JointTransformerBlock(config, plain_attention, modulated=True).to(torch.bfloat16).requires_grad_(False)
        x, time = torch.randn(2, 80, config.dim), torch.randn(2, config.time_dim)
        rope = rope_table(torch.full((1,), 16, device="cuda"), 16, 8, 8, config.head_dim)
    block.adaLN_modulation[1].weight.requires_grad_()  # factors then need gradients
    return block, (x.bfloat16().requires_grad_(), rope, None, time.bfloat16())  # type: ignore[return-value]


@pytest.mark.parametrize("level", ["full", "selective"])
@pytest.mark.usefixtures("way")
def test_blocks_computed_again_give_the_same(level: str) -> None:
    block, inputs = block_and_inputs()
    trained = [inputs[0], block.adaLN_modulation[1].weight]

    def results() -> list[Tensor]:
        out = block(*inputs)
        return [out.detach(), *torch.autograd.grad(out.float().square().mean(), trained)]

    expected = results()
    recompute_in_backward([block], False, level)  # type: ignore[arg-type]
    for ours, theirs in zip(results(), expected, strict=True):
        # Equal but for what attention's own backward pass adds up in any order.
        assert (ours - theirs).float().norm() <= 2e-3 * theirs.float().norm()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_on_the_device_of_their_tensors() -> None:
    case = helpers.cases(torch.bfloat16)["rotation"]
    upstream = helpers.upstream_of(case)
    function: Callable[..., Tensor] = helpers.public(case)
    found = helpers.results(function, case, [value.to("cuda:1") for value in case.inputs], upstream.to("cuda:1"))
    for ours, theirs in zip(found, helpers.exact(case, upstream), strict=True):
        assert ours.device == torch.device("cuda", 1)
        assert helpers.distance(ours, theirs) < helpers.bound(case, ours)
