"""Times drawing: the real sampler on a named model with random weights, against the machine's own matmul ceiling.

    python tests/bench/bench_sampling.py --preset medium --size 256 512 --steps 6
    python tests/bench/bench_sampling.py --preset full --size 256 512 1024 --steps 12 --device cuda

Prints one JSON object. For every size it draws with prompt and negative prompt in one batch, in two passes, with guidance
in every step (no truncation) and without guidance; these take turns, so that a machine that grows slower meets all of
them. Decoding is not part of it. FLOPs are those that are necessary: real tokens, attention counted full, modulation and
everything else that is no large matrix product not counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import presets
from measuring import circumstances

from library.lumina.configs import PATCH_SIZE, NextDiTConfig
from library.lumina.drawing import conditioning
from library.lumina.next_dit import NextDiT
from library.lumina.sampler import Conditioning, SamplingOptions, guided_steps, initial_noise, sample, sigma_schedule

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_CEILING_SIDE = {"cpu": 3072, "cuda": 8192}


def forward_flops(sizes: NextDiTConfig, num_image: int, num_caption: int) -> int:
    """Returns the necessary floating-point operations of one sample's forward pass.

    Args:
        sizes: of the model.
        num_image: image tokens.
        num_caption: caption tokens, without padding.
    """
    query, key = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    a_token = 2 * (sizes.dim * (query + 2 * key) + query * sizes.dim + 3 * sizes.dim * sizes.ffn_dim)

    def blocks(count: int, tokens: int) -> int:
        return count * (tokens * a_token + 4 * tokens**2 * query)

    patch = PATCH_SIZE**2 * sizes.channels
    return (
        blocks(sizes.num_noise_refiners, num_image)
        + blocks(sizes.num_context_refiners, num_caption)
        + blocks(sizes.num_layers, num_image + num_caption)
        + 2 * num_image * patch * sizes.dim * 2  # into the model and out of it
        + 2 * num_caption * sizes.cap_dim * sizes.dim
    )


def matmul_ceiling(dtype: torch.dtype, device: torch.device, repeats: int = 5) -> float:
    """Returns the FLOP/s of a large matrix product of random numbers, the median of several."""
    side = _CEILING_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    taken = [_seconds(lambda: torch.mm(a, b), device) for _ in range(repeats + 2)][2:]
    return 2 * side**3 / statistics.median(taken)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to draw the same pictures."""

    options: SamplingOptions
    together: bool | None = None


def measure(model: NextDiT, size_px: int, arguments: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """Returns the figures of one picture size."""
    sizes = model.config
    generator = torch.Generator().manual_seed(0)
    batch = arguments.batch

    def captions(tokens: int) -> Conditioning:
        return conditioning(
            [torch.randn(tokens, sizes.cap_dim, generator=generator) for _ in range(batch)], model, device
        )

    prompt, negative = captions(arguments.tokens), captions(arguments.negative_tokens)
    noise = initial_noise(range(batch), sizes.channels, size_px, size_px).to(device)
    plain = SamplingOptions(steps=arguments.steps, guidance_scale=arguments.guidance)
    ways = {
        "one_batch": Way(plain, together=True),
        "two_passes": Way(plain, together=False),
        "as_drawn": Way(plain),
        "without_truncation": Way(dataclasses.replace(plain, cfg_trunc_ratio=1.0)),
        "without_guidance": Way(dataclasses.replace(plain, guidance_scale=1.0)),
    }

    def predict(latents: torch.Tensor, time: torch.Tensor, features: torch.Tensor, mask: object) -> torch.Tensor:
        return model(latents.to(model.dtype), time, features, mask)

    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(arguments.turns + 1):
        for name, way in ways.items():
            seconds = _seconds(
                lambda way=way: sample(predict, noise, prompt, negative, way.options, together=way.together), device
            )
            if turn:  # the first one warms up
                taken[name].append(seconds)
    num_image = (size_px // 8 // PATCH_SIZE) ** 2
    found: dict[str, object] = {"size_px": size_px}
    for name, way in ways.items():
        guided = sum(guided_steps(sigma_schedule(arguments.steps, way.options.shift), way.options))
        flops = batch * (
            arguments.steps * forward_flops(sizes, num_image, arguments.tokens)
            + guided * forward_flops(sizes, num_image, arguments.negative_tokens)
        )
        seconds = statistics.median(taken[name])
        found[name] = {
            "guided_steps": guided,
            "seconds_a_picture": round(seconds / batch, 4),
            "seconds_a_step": round(seconds / arguments.steps, 4),
            "tflop_a_picture": round(flops / batch / 1e12, 4),
            "tflops": round(flops / seconds / 1e12, 4),
        }
    medians = {name: statistics.median(seconds) for name, seconds in taken.items()}
    flops_of = {name: found[name]["tflop_a_picture"] for name in ways}  # type: ignore[index]
    return found | {
        "one_batch_over_two_passes": round(medians["one_batch"] / medians["two_passes"], 3),
        "truncation_time_ratio": round(medians["as_drawn"] / medians["without_truncation"], 3),
        "truncation_flop_ratio": round(flops_of["as_drawn"] / flops_of["without_truncation"], 3),
    }


def main() -> None:
    """Parses the command line, measures and prints."""
    parser = argparse.ArgumentParser(description="Times drawing against the machine's matmul ceiling.")
    parser.add_argument("--preset", default="medium", choices=presets.PRESETS, help="model")
    parser.add_argument("--size", type=int, nargs="+", default=[256], help="picture sides in pixels, multiples of 16")
    parser.add_argument("--batch", type=int, default=1, help="pictures drawn at a time")
    parser.add_argument("--steps", type=int, default=6, help="steps a picture")
    parser.add_argument("--guidance", type=float, default=3.5, help="guidance scale")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each prompt")
    parser.add_argument(
        "--negative_tokens", type=int, default=None, help="of each negative prompt; --tokens if left out"
    )
    parser.add_argument("--dtype", default="bf16", choices=DTYPES, help="precision")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--turns", type=int, default=3, help="measurements of each way")
    arguments = parser.parse_args()
    if arguments.negative_tokens is None:
        arguments.negative_tokens = arguments.tokens
    device = torch.device(arguments.device)
    model = presets.build(presets.config(arguments.preset), DTYPES[arguments.dtype], device)
    before = matmul_ceiling(model.dtype, device)
    figures = [measure(model, size, arguments, device) for size in arguments.size]
    ceiling = statistics.mean([before, matmul_ceiling(model.dtype, device)])
    for one in figures:
        for way in one.values():
            if isinstance(way, dict):
                way["of_ceiling"] = round(way["tflops"] * 1e12 / ceiling, 3)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    asked = {name: value for name, value in vars(arguments).items() if name != "size"}
    print(
        json.dumps(
            {
                **asked,
                "device": where,
                "threads": torch.get_num_threads(),
                "ceiling_tflops": round(ceiling / 1e12, 4),
                "sizes": figures,
                **circumstances(),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
