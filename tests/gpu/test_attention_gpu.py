"""Attention kernels on CUDA against the definition in float32 on the CPU; none of them may wait for the host."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import pytest
import torch
from attention_helpers import heads_of_a_block, written_out
from torch.nn.attention import SDPBackend, sdpa_kernel

from library.lumina.configs import NextDiTConfig
from library.lumina.next_dit import NextDiT
from library.memory.attention import Workload, choose_attention, sdpa_attention
from library.memory.attention_kernels import KERNELS, AttentionFn, sdpa_without_sharing
from library.memory.half_attention import in_halves
from library.memory.settings import AttentionSettings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LENGTHS = [300, 211, 1, 256]
NAMES = ["sdpa", "cudnn", "cudnn_wide", "varlen", "flash2", "flash3", "flex"]


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Raises where anything inside waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def made(name: str, training: bool = True) -> AttentionFn:
    """Returns a kernel, or skips the test with the reason why this machine has none."""
    reason = KERNELS[name].unsuitable(Workload(torch.device("cuda"), torch.bfloat16, 6, 2, 96, training))
    if reason is not None:
        pytest.skip(f"{KERNELS[name].label}: {reason}")
    return KERNELS[name].make()


def inputs(lengths: list[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Returns q, k, v of head size 96, rounded to bf16 but kept in float32 on the CPU, and the key mask."""
    tensors, mask = heads_of_a_block(lengths, head_dim=96)
    return [tensor.detach().bfloat16().float() for tensor in tensors], mask


def results(
    function: AttentionFn, tensors: list[torch.Tensor], key_mask: torch.Tensor | None, weights: torch.Tensor
) -> list[torch.Tensor]:
    """Returns the weighted output and the gradients of q, k and v."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    weighted = function(*leaves, key_mask) * weights
    return [weighted.detach(), *torch.autograd.grad(weighted.sum(), leaves)]


def off_by(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Returns the size of the difference as a share of the size of what is wanted."""
    return float((found.float().cpu() - wanted).norm() / wanted.norm())


def weights_of(mask: torch.Tensor) -> torch.Tensor:
    """Returns weights (B,S,A,E) of the output, exact in bf16, 0 at padding."""
    draws = torch.randn((*mask.shape, 6, 96), generator=torch.Generator().manual_seed(1)).bfloat16().float()
    return draws * mask[:, :, None, None]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward_equal_the_definition_without_waiting(name: str, masked: bool) -> None:
    function = made(name)
    tensors, mask = inputs(LENGTHS if masked else [300, 300])
    weights = weights_of(mask)
    wanted = results(written_out, tensors, mask if masked else None, weights)
    on_cuda = [tensor.cuda().bfloat16() for tensor in tensors]
    key_mask, cuda_weights = (mask.cuda() if masked else None), weights.cuda().bfloat16()
    results(function, on_cuda, key_mask, cuda_weights)  # compiles and picks kernels
    other_mask = None if key_mask is None else key_mask.clone()  # nothing is remembered of it
    with no_waiting():
        found = results(function, on_cuda, other_mask, cuda_weights)
    for ours, expected in zip(found, wanted, strict=True):
        assert torch.isfinite(ours).all()  # at padding too
        # bf16 has 8 bits (0.2 % a rounding): probabilities, their gradients and the results are rounded once each.
        assert off_by(ours, expected) < 0.02


def for_halves(name: str) -> AttentionFn:
    """Returns a kernel; ``efficient`` is the one that cards before Ampere have."""
    if name != "efficient":
        return made(name)

    def efficient(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            return sdpa_without_sharing(q, k, v, key_mask)

    return efficient


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["efficient", *NAMES])
def test_halves_of_float32_equal_the_definition_without_waiting(name: str, masked: bool) -> None:
    function = in_halves(for_halves(name))
    (q, k, v), mask = inputs(LENGTHS if masked else [300, 300])
    v, weights = 1e6 * v, 1e-6 * weights_of(mask)  # neither is within fp16
    wanted = results(written_out, [q, k, v], mask if masked else None, weights)
    on_cuda, key_mask = [tensor.cuda() for tensor in (q, k, v)], mask.cuda() if masked else None
    cuda_weights = weights.cuda()
    results(function, on_cuda, key_mask, cuda_weights)  # compiles and picks kernels
    with no_waiting():
        found = results(function, on_cuda, key_mask, cuda_weights)
    for ours, expected in zip(found, wanted, strict=True):
        assert ours.dtype == torch.float32
        assert off_by(ours, expected) < 0.004  # as in bf16, with three bits more, and the gradients of queries twice


@pytest.mark.parametrize("name", ["efficient", *NAMES])
def test_no_gradient_leaves_fp16(name: str) -> None:
    """Kernels have to scale before they round: half of every query's weight is on one key, and all gradients agree."""
    tokens, width, length = 9000, 96, 3.0
    q, k, v, weights = (torch.zeros(1, tokens, heads, width, device="cuda") for heads in (6, 2, 2, 6))
    q[..., 0] = length
    k[:, 0, :, 0] = math.log(tokens - 1) * width**0.5 / length
    v[..., 1] = -1e5
    v[:, 0, :, 1] = 1e5
    weights[..., 1] = 1e-9
    found = results(in_halves(for_halves(name)), [q, k, v], None, weights)
    assert all(bool(ours.isfinite().all()) for ours in found)
    wanted = results(sdpa_attention, [q, k, v], None, weights)
    assert off_by(found[2][:, 0], wanted[2][:, 0].cpu()) < 0.02  # the share of a half in fp16, exponentials in float32


@pytest.mark.parametrize("lengths", [[2, 1], [64, 0, 63], [129, 1, 128, 2], [1090, 1089, 1024]], ids=str)
@pytest.mark.parametrize("name", ["cudnn", "cudnn_wide", "varlen", "flash2", "flash3"])
def test_lengths_that_kernels_may_stumble_over(name: str, lengths: list[int]) -> None:
    function = made(name)
    tensors, mask = inputs(lengths)
    weights = weights_of(mask)
    # A sample of padding alone has no definition; what is wanted of it is that nothing in it is NaN.
    readable = mask | ~mask.any(dim=1, keepdim=True)
    wanted = results(written_out, tensors, readable, weights)
    found = results(function, [tensor.cuda().bfloat16() for tensor in tensors], mask.cuda(), weights.cuda().bfloat16())
    for ours, expected in zip(found, wanted, strict=True):
        assert torch.isfinite(ours).all()
        assert off_by(ours, expected) < 0.02  # as above


@pytest.mark.parametrize("name", ["cudnn", "cudnn_wide"])
def test_marked_padding_stays_out_of_large_scores(name: str) -> None:
    function = made(name)
    tensors, mask = inputs(LENGTHS)
    q, k, v = (tensor.cuda().bfloat16() for tensor in tensors)
    on_cuda, padding = mask.cuda(), ~mask.cuda()[:, :, None, None]
    q, k = q * 20, k * 20  # scores of some thousands
    found = function(q, k, v, on_cuda)
    other = function(q, k.masked_fill(padding, 60.0), v.masked_fill(padding, 1e4), on_cuda)
    assert torch.equal(found[on_cuda], other[on_cuda])


@pytest.mark.parametrize("masked", [False, True])
def test_sage_attention_is_near_the_definition(masked: bool) -> None:
    function = made("sage", training=False)
    tensors, mask = inputs(LENGTHS if masked else [300, 300])
    key_mask = mask if masked else None
    with torch.no_grad():
        found = function(*(tensor.cuda().bfloat16() for tensor in tensors), mask.cuda() if masked else None)
        wanted = written_out(*tensors, key_mask)
    # 8-bit queries and keys: scores are off by about 1 %, and outputs of random values by some of that.
    assert off_by(found[mask.cuda()], wanted[mask]) < KERNELS["sage"].tolerance


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_it_compiles_into_one_graph(name: str, masked: bool) -> None:
    function = made(name)
    tensors, mask = inputs(LENGTHS if masked else [300, 300])
    on_cuda, weights = [tensor.cuda().bfloat16() for tensor in tensors], weights_of(mask).cuda().bfloat16()
    key_mask = mask.cuda() if masked else None

    def joint(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None = None) -> torch.Tensor:
        return function(q * 2, k, v, key_mask)

    eager = results(joint, on_cuda, key_mask, weights)
    compiled = results(torch.compile(joint, fullgraph=True), on_cuda, key_mask, weights)
    for ours, expected in zip(compiled, eager, strict=True):
        # The same kernel; a fused product may be rounded at another place, once.
        assert off_by(ours, expected.float().cpu()) < 0.01


@pytest.mark.parametrize("masked", [False, True])
def test_sdpa_never_writes_out_the_scores(masked: bool) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    tensors, mask = inputs([64, 40] if masked else [64, 64])
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
        sdpa_attention(*(tensor.cuda().bfloat16() for tensor in tensors), mask.cuda() if masked else None)
        sdpa_attention(*(tensor.cuda() for tensor in tensors), mask.cuda() if masked else None)


@pytest.mark.parametrize("mode", ["auto", "sdpa", "cudnn", "varlen"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_training_step_of_the_model_waits_for_nothing(mode: str, masked: bool) -> None:
    config = NextDiTConfig(dim=192, num_layers=3, num_noise_refiners=1, num_context_refiners=2, num_heads=2,
                           num_kv_heads=1, head_dim=96, ffn_dim=64, cap_dim=16, time_dim=32)  # fmt: skip
    device = torch.device("cuda")
    work = Workload(device, torch.bfloat16, config.num_heads, config.num_kv_heads, config.head_dim, training=True)
    if mode in ("cudnn", "varlen") and KERNELS[mode].unsuitable(work):
        pytest.skip(f"no {mode} here")
    settings = AttentionSettings(attn_mode=mode)  # type: ignore[arg-type]
    chosen = choose_attention(settings, work, "--mixed_precision bf16")
    torch.manual_seed(0)
    model = NextDiT(config, chosen.function).to(device, torch.bfloat16)
    latents, time = torch.randn(2, 16, 16, 16, device=device), torch.rand(2, device=device)
    features = torch.randn(2, 9, 16, device=device)
    mask = (torch.arange(9) < torch.tensor([9, 4])[:, None]).to(device) if masked else None

    def step() -> torch.Tensor:
        loss = model(latents, time, features, mask).float().square().mean()
        loss.backward()
        return loss

    step()
    with no_waiting():
        loss = step()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_auto_uses_no_mask_kernel_for_bf16() -> None:
    work = Workload(torch.device("cuda"), torch.bfloat16, 24, 8, 96, training=True)
    chosen = choose_attention(AttentionSettings(), work, "--dtype bf16")
    if torch.cuda.get_device_capability() < (8, 0) and torch.version.hip is None:
        assert (chosen.equal, chosen.ragged) == ("sdpa", "sdpa")
    else:
        assert chosen.ragged in ("flash3", "cudnn", "flash2", "varlen")
        if "(cudnn kernel)" in chosen.description and KERNELS["flash3"].unsuitable(work):
            assert chosen.ragged == "cudnn"  # or the trial has found something wrong with it
    if chosen.equal == "sdpa":
        assert "math kernel" not in chosen.description
