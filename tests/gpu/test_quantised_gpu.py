"""Quantised weights on CUDA: what the CPU computes, fp8 products in the hardware, memory while loading, the programs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from e2e_helpers import Job, make_job, python
from fp8_kernel_helpers import expected_rows, quantised_cases, row_with_nan, same_codes, transposed_cases
from quantisation_helpers import (
    emulated_product,
    realistic_gradient,
    realistic_tokens,
    realistic_weight,
    relative_error,
)
from torch import Tensor

from library.errors import SettingsError
from library.memory import fp8
from library.memory.fp8 import Fp8Linear, quantise_rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

HAS_FP8 = torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 9)
needs_fp8 = pytest.mark.skipif(not HAS_FP8, reason="needs a GPU that multiplies in fp8")
OUT, IN = 384, 256


def made(kind: str, weight: Tensor) -> torch.nn.Module:
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
        from library.memory.nf4 import Nf4Linear

        return Nf4Linear.of(weight)
    return Fp8Linear.of(weight, fast=kind == "fp8_fast")


def results(linear: torch.nn.Module, tokens: int = 77) -> tuple[Tensor, Tensor]:
    """Returns output and input gradient, on the CPU in float32."""
    device = linear.weight.device
    x = realistic_tokens(tokens, IN).to(device, torch.bfloat16).requires_grad_()
    y = linear(x)
    y.backward(realistic_gradient(tokens, OUT).to(device, torch.bfloat16))
    assert x.grad is not None
    return y.detach().cpu().float(), x.grad.cpu().float()


def test_codes_are_those_of_the_cpu() -> None:
    weight = realistic_weight(OUT, IN).bfloat16()
    on_cpu, on_cuda = quantise_rows(weight), quantise_rows(weight.cuda())
    assert torch.equal(on_cuda[1].cpu(), on_cpu[1])
    assert torch.equal(on_cuda[0].cpu().view(torch.uint8), on_cpu[0].view(torch.uint8))


@pytest.mark.parametrize("kind", ["fp8", "nf4"])
@pytest.mark.parametrize("compiled", [False, True])
def test_outputs_and_gradients_are_those_of_the_cpu(kind: str, compiled: bool) -> None:
    linear = made(kind, realistic_weight(OUT, IN).bfloat16())
    expected = results(linear)
    linear = linear.cuda()
    if compiled:
        torch._dynamo.reset()
        linear.forward = torch.compile(linear.forward, fullgraph=True)
    for ours, one in zip(results(linear), expected, strict=True):
        assert relative_error(ours, one) < 2**-8  # bfloat16 sums in another order, rounded once


@needs_fp8
@pytest.mark.parametrize("tokens", [1, 77, 256])  # no number of tokens has to be padded
@pytest.mark.parametrize("compiled", [False, True])
def test_fp8_products_are_the_defined_ones(monkeypatch: pytest.MonkeyPatch, tokens: int, compiled: bool) -> None:
    weight = realistic_weight(OUT, IN).bfloat16()
    with monkeypatch.context() as patch:
        patch.setattr(fp8, "scaled_product", emulated_product)
        expected = results(Fp8Linear.of(weight, fast=True), tokens)
    linear = Fp8Linear.of(weight.cuda(), fast=True)
    if compiled:
        torch._dynamo.reset()
        linear.forward = torch.compile(linear.forward, fullgraph=True)  # type: ignore[method-assign]
    for ours, one in zip(results(linear, tokens), expected, strict=True):
        # Fast accumulators keep about 14 bits of a partial sum, and the result is rounded to bfloat16's 8.
        assert relative_error(ours, one) < 2**-7


@needs_fp8
@pytest.mark.parametrize("name", list(quantised_cases()))
def test_triton_quantises_as_torch_does(name: str) -> None:
    kernels = fp8.kernels_on(torch.cuda.current_device())
    assert kernels is not None
    matrix, factor = quantised_cases()[name]
    codes, scale = kernels.quantise_rows(matrix.cuda(), None if factor is None else factor.cuda())
    for device in ("cpu", "cuda"):
        expected, expected_scale = expected_rows(matrix.to(device), None if factor is None else factor.to(device))
        assert torch.equal(scale.cpu(), expected_scale.cpu())
        assert same_codes(codes, expected)


@needs_fp8
def test_triton_keeps_nan_and_transposes() -> None:
    kernels = fp8.kernels_on(torch.cuda.current_device())
    assert kernels is not None
    assert bool(kernels.quantise_rows(row_with_nan(2304).cuda())[0].float().isnan().all())
    for codes in transposed_cases():
        transposed, ones = kernels.transpose(codes.cuda())
        assert torch.equal(transposed.cpu().view(torch.uint8), codes.view(torch.uint8).t())
        assert torch.equal(ones, torch.ones(1, codes.shape[1], device="cuda"))


@needs_fp8
def test_products_are_the_same_with_and_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = Fp8Linear.of(realistic_weight(OUT, IN).bfloat16().cuda(), fast=True)
    by_kernels = results(linear)
    monkeypatch.setattr(fp8, "kernels_on", lambda index: None)
    assert all(torch.equal(*pair) for pair in zip(by_kernels, results(linear), strict=True))


@needs_fp8
def test_errors_of_fp8_products_are_bounded() -> None:
    weight = realistic_weight(OUT, IN)
    y, x_gradient = results(Fp8Linear.of(weight.cuda().bfloat16(), fast=True))
    # As on the CPU: two operands rounded by 2.6 % each, and a sum of few large terms.
    assert relative_error(y, realistic_tokens(77, IN) @ weight.t()) < 0.046
    assert relative_error(x_gradient, realistic_gradient(77, OUT) @ weight) < 0.046


@pytest.mark.skipif(HAS_FP8, reason="needs a GPU that does not multiply in fp8")
def test_a_gpu_without_fp8_products_is_refused() -> None:
    with pytest.raises(SettingsError, match="--fp8_fast"):
        fp8.require_fp8_products(torch.device("cuda"))


@needs_fp8
def test_a_gpu_with_fp8_products_is_taken() -> None:
    fp8.require_fp8_products(torch.device("cuda"))


@pytest.mark.parametrize("kind", ["fp8", "nf4"])
def test_loading_never_puts_the_model_on_the_device_in_bf16(tmp_path: Path, kind: str) -> None:
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    from functools import partial

    from library.files import write_safetensors
    from library.lumina import loading
    from library.lumina.configs import NextDiTConfig
    from library.memory.quantised import quantise_block

    config = NextDiTConfig(
        dim=768, num_layers=12, num_heads=8, num_kv_heads=4, head_dim=96, ffn_dim=3072, time_dim=64, cap_dim=64
    )
    tensors = {name: torch.full(shape, 0.01).bfloat16() for name, shape in config.tensor_shapes().items()}
    in_bf16 = sum(tensor.numel() for tensor in tensors.values()) * 2
    write_safetensors(tmp_path / "model.safetensors", tensors, {})
    file = loading.inspect_next_dit(loading.ModelPaths(tmp_path / "model.safetensors"))
    finish = partial(quantise_block, kind=kind, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = loading.load_next_dit(file, torch.bfloat16, None, False, None, finish).cuda()
    kept = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    assert kept < 0.62 * in_bf16
    # Above what stays: one matrix as it was read, and what quantising it takes.
    assert peak < kept + 6 * 768 * 3072 * 2
    assert next(iter(model.layers[0].buffers())).is_cuda


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    pytest.importorskip("diffusers", reason="the programs need it for the autoencoder")
    return make_job(tmp_path_factory.mktemp("job"))


@pytest.mark.parametrize(
    "flags",
    [
        ["--fp8_base", "--gradient_checkpointing"],
        ["--nf4_base", "--cache_latents", "--cache_text_encoder_outputs"],
        pytest.param(["--fp8_base_unet", "--fp8_fast", "--cache_latents"], marks=needs_fp8),
    ],
    ids=["fp8", "nf4", "fp8_fast"],
)
def test_the_programs(job: Job, tmp_path: Path, flags: list[str]) -> None:
    if "--nf4_base" in flags:
        pytest.importorskip("bitsandbytes")
    done = python("lumina_train_network.py", *job.train_flags(tmp_path, "--mixed_precision=bf16", *flags))
    assert done.returncode == 0, done.stderr
    lora = tmp_path / "my.safetensors"
    of_weights = [flag for flag in flags if flag.startswith(("--fp8", "--nf4"))]
    for more in ([], ["--offload"]):
        drawing = [*job.inference_flags, f"--output_dir={tmp_path / 'drawn'}", "--lora_weights", str(lora)]
        done = python("lumina_minimal_inference.py", *drawing, *of_weights, *more)
        assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "drawn").iterdir())) == 2
