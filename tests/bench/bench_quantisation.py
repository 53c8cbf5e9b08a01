"""Measures what quantised base weights lose, and what they take: JSON of errors and bytes; on CUDA of times as well.

    python tests/bench/bench_quantisation.py
    python tests/bench/bench_quantisation.py --tokens 16384      # on a GPU: one batch of 4 pictures of 1024 px

Errors are relative (L2), on random data with rows of different size, heavy tails and outlier channels. ``channels`` is the
mean of every output channel's own error: of all numbers together the large channels' errors are nearly all. ``fp16`` is
``--mixed_precision fp16`` with a bf16 file's weights; ``cast`` is what a plain cast to e4m3 gives, as in sd-scripts. The
model is a Next-DiT of 8 layers and width 384, with a LoRA on every matrix. Without fp8 products in the hardware
``fp8_fast`` is computed by torch on the CPU: the same errors.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from measuring import circumstances
from quantisation_helpers import (
    channel_error,
    realistic_gradient,
    realistic_tokens,
    realistic_weight,
    relative_error,
)

from library.lumina.next_dit import LARGE_MATRICES, NextDiT, NextDiTConfig
from library.memory import fp8
from library.memory.fp8 import E4M3, Fp8Linear, quantise_rows
from library.memory.half_attention import in_halves
from library.memory.half_linear import HalfLinear
from library.memory.nf4 import Nf4Linear
from library.memory.quantised import quantise_block
from networks import lora_lumina

MATRICES = {"attention.qkv": (3840, 2304), "feed_forward.w1": (9216, 2304), "feed_forward.w2": (2304, 9216)}
MODEL = NextDiTConfig(
    dim=384, num_layers=8, num_heads=4, num_kv_heads=2, head_dim=96, ffn_dim=1536, time_dim=128, cap_dim=256
)
KINDS = ("fp16", "cast", "fp8", "fp8_fast", "nf4")
BITS = {"bf16": 16.0, "fp8": 8.0, "nf4": 4.5}


class Cast(nn.Module):
    """A Linear whose weight was cast to e4m3 without a scale."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight.to(E4M3))

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """Returns the weight in ``dtype``."""
        return self.weight.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Returns x W'."""
        return F.linear(x, self.dequantised(x.dtype))


def made(kind: str, weight: Tensor) -> nn.Module:
    """Returns the Linear of a kind for a weight."""
    if kind in ("cast", "fp16"):
        return Cast(weight) if kind == "cast" else HalfLinear(weight)
    return Nf4Linear.of(weight) if kind == "nf4" else Fp8Linear.of(weight, fast=kind == "fp8_fast")


def activations_of(kind: str) -> torch.dtype:
    """Returns the dtype of the tensors between products."""
    return torch.float32 if kind == "fp16" else torch.bfloat16


def matrix_errors(out_features: int, in_features: int, device: str) -> dict[str, dict[str, float]]:
    """Returns each kind's errors of weight, output and input gradient, against float32."""
    weight = realistic_weight(out_features, in_features).to(device)
    x, gradient = realistic_tokens(256, in_features).to(device), realistic_gradient(256, out_features).to(device)
    exact, exact_gradient = F.linear(x, weight), gradient @ weight
    found = {}
    for kind in KINDS:
        linear = made(kind, weight.bfloat16())
        tokens = x.to(activations_of(kind), copy=True).requires_grad_()
        output = linear(tokens)
        (x_gradient,) = torch.autograd.grad(output, tokens, gradient.to(tokens.dtype))
        dequantised = linear.dequantised(torch.float32)
        found[kind] = {
            "weight": relative_error(dequantised, weight),
            "weight, channels": channel_error(dequantised, weight),
            "output": relative_error(output, exact),
            "output, channels": channel_error(output.t(), exact.t()),
            "gradient": relative_error(x_gradient, exact_gradient),
        }
    return found


def model_errors(device: str) -> dict[str, dict[str, float]]:
    """Returns each kind's errors of velocity and LoRA gradients against a float32 model."""
    torch.manual_seed(0)
    model = NextDiT(MODEL).requires_grad_(False)
    blocks = (*model.noise_refiner, *model.context_refiner, *model.layers)
    for number, block in enumerate(blocks):
        for path in LARGE_MATRICES:
            weight = block.get_submodule(path).weight
            new = realistic_weight(*weight.shape, seed=number)
            weight.copy_(new * (math.sqrt(len(weight)) / new.norm()))
    exact = _run(copy.deepcopy(model).to(device))
    found = {}
    for kind in ("bf16", *KINDS):
        other = copy.deepcopy(model).to(device, activations_of(kind))
        for block in (*other.noise_refiner, *other.context_refiner, *other.layers):
            if kind == "cast":
                for path in LARGE_MATRICES:
                    parent, _, name = path.rpartition(".")
                    setattr(block.get_submodule(parent), name, Cast(block.get_submodule(path).weight))
            elif kind == "fp16":
                quantise_block(block, LARGE_MATRICES, None, device, in_halves=True)
                block.attention.attention = in_halves(block.attention.attention)
            elif kind != "bf16":
                quantise_block(block, LARGE_MATRICES, kind, device)  # type: ignore[arg-type]
        errors = [relative_error(*pair) for pair in zip(_run(other), exact, strict=True)]
        found[kind] = dict(zip(("velocity", "LoRA gradients"), errors, strict=True))
    return found


def _run(model: NextDiT) -> tuple[Tensor, Tensor]:
    """Returns velocity and LoRA gradients of one step with a LoRA of rank 8 that has been trained a little."""
    device = model.norm_final.weight.device
    generator = torch.Generator().manual_seed(1)
    network = lora_lumina.create_network(1.0, 8, 8, None, None, model)
    for lora in network.loras:
        lora.lora_up.weight.data.normal_(std=0.01, generator=generator)
    network.to(device).apply_to(None, model)
    latents = torch.randn(2, MODEL.channels, 32, 32, generator=generator).to(device)
    features = torch.randn(2, 60, MODEL.cap_dim, generator=generator).to(device)
    velocity = model(latents.to(model.dtype), torch.tensor([0.3, 0.8], device=device), features.to(model.dtype))
    (velocity.float() - latents).square().mean().backward()
    return velocity.detach(), torch.cat([parameter.grad.flatten() for parameter in network.parameters()])


def sizes() -> dict[str, float]:
    """Returns GiB of the whole 2.6 B model's weights by kind; what is not quantised is bfloat16."""
    shapes = NextDiTConfig().tensor_shapes()
    large = sum(math.prod(shape) for name, shape in shapes.items() if name.endswith(_ENDINGS))
    others = sum(math.prod(shape) for shape in shapes.values()) - large
    return {kind: round((large * bits / 8 + 2 * others) / 2**30, 2) for kind, bits in BITS.items()}


_ENDINGS = tuple(f".{path}.weight" for path in LARGE_MATRICES)


def times(num_tokens: int) -> dict[str, dict[str, float]]:
    """Returns ms of forward and input gradient of each matrix on CUDA, and of the steps around a product in fp8."""
    return {name: _times_of(*shape, num_tokens) for name, shape in MATRICES.items()}


def _times_of(out_features: int, in_features: int, num_tokens: int) -> dict[str, float]:
    weight = realistic_weight(out_features, in_features).cuda().bfloat16()
    tokens = realistic_tokens(num_tokens, in_features).cuda().bfloat16().requires_grad_()
    gradient = realistic_gradient(num_tokens, out_features).cuda().bfloat16()
    plain = nn.Linear(in_features, out_features, bias=False, device="cuda", dtype=torch.bfloat16)
    quantised = {kind: made(kind, weight) for kind in ("fp16", "fp8", "fp8_fast", "nf4")}
    linears = {"bf16": plain.requires_grad_(False), **quantised}
    found = {}
    for kind, linear in linears.items():
        for how, function in (("eager", linear), ("compiled", torch.compile(linear, fullgraph=True))):
            given = (tensor.detach().to(activations_of(kind)) for tensor in (tokens, gradient))
            step = partial(_forward_and_backward, function, *given)
            found[f"{kind}, {how}"] = _milliseconds(step)
    linear = Fp8Linear.of(weight)
    return found | _times_of_steps(tokens.detach(), gradient, linear.weight, linear.weight_scale)


def _times_of_steps(tokens: Tensor, gradient: Tensor, codes: Tensor, scale: Tensor) -> dict[str, float]:
    """Returns milliseconds of what fp8 products need besides themselves, by torch's operations and by Triton's kernels."""
    steps: dict[str, Callable[[], object]] = {
        "quantising the input, torch": lambda: quantise_rows(tokens),
        "quantising the gradient, torch": lambda: quantise_rows(gradient * scale.to(gradient.dtype)),
        "transposing the codes, torch": lambda: codes.t().contiguous(),
    }
    has_fp8 = torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 9)
    kernels = fp8.kernels_on(torch.cuda.current_device()) if has_fp8 else None
    if kernels is not None:
        steps["quantising the input, Triton"] = lambda: kernels.quantise_rows(tokens)
        steps["quantising the gradient, Triton"] = lambda: kernels.quantise_rows(gradient, scale)
        steps["transposing the codes, Triton"] = lambda: kernels.transpose(codes)
    found = {}
    for name, step in steps.items():
        found[f"{name}, device"] = _device_milliseconds(step)
        found[f"{name}, host"] = _host_milliseconds(step)
    return found


def _device_milliseconds(function: Callable[[], object], repeats: int = 20) -> float:
    """Returns how long the device takes, however long the host does: the launches are recorded before."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            function()
    return round(_milliseconds(graph.replay, 5) / repeats, 4)


def _host_milliseconds(function: Callable[[], object], repeats: int = 100) -> float:
    """Returns how long the host takes to launch; the device's queue holds that many."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return round(taken / repeats * 1000, 4)


def _forward_and_backward(function: Callable[[Tensor], Tensor], tokens: Tensor, gradient: Tensor) -> None:
    torch.autograd.grad(function(tokens.requires_grad_()), tokens, gradient)


def _milliseconds(function: Callable[[], object], repeats: int = 20) -> float:
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    torch.cuda.synchronize()
    return round((time.perf_counter() - start) / repeats * 1000, 3)


def _rounded(values: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {name: {key: round(value, 4) for key, value in row.items()} for name, row in values.items()}


def main() -> None:
    """Parses the command line, measures and prints."""
    parser = argparse.ArgumentParser(description="Measures errors and memory of quantised base weights.")
    parser.add_argument("--tokens", type=int, default=4352, help="of the timed products (CUDA only)")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = {
        "matrices": {name: _rounded(matrix_errors(*shape, device)) for name, shape in MATRICES.items()},
        "model": _rounded(model_errors(device)),
        "gib_of_the_2.6_b_model": sizes(),
    }
    if device == "cuda":
        result |= {"gpu": torch.cuda.get_device_name(), "tokens": options.tokens, "ms": times(options.tokens)}
    print(json.dumps({**result, **circumstances()}, indent=1))


if __name__ == "__main__":
    main()
