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
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import flops
import presets
from measuring import circumstances
from timing import DTYPES, Ceiling, timed

from library.lumina.drawing import conditioning
from library.lumina.next_dit import NextDiT
from library.lumina.sampler import Conditioning, SamplingOptions, guided_steps, initial_noise, sample, sigma_schedule
from library.memory.attention import Workload, choose_attention
from library.memory.device_memory import let_segments_grow
from library.memory.host_memory import keep_freed_memory
from library.memory.settings import AttentionSettings


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
            seconds = timed(
                lambda way=way: sample(predict, noise, prompt, negative, way.options, together=way.together), device
            )
            if turn:  # the first one warms up
                taken[name].append(seconds)
    num_image = flops.image_tokens(size_px, size_px)
    a_prompt, a_negative = (
        flops.count(sizes, num_image, [tokens]).forward for tokens in (arguments.tokens, arguments.negative_tokens)
    )
    found: dict[str, object] = {"size_px": size_px}
    for name, way in ways.items():
        guided = sum(guided_steps(sigma_schedule(arguments.steps, way.options.shift), way.options))
        operations = batch * (arguments.steps * a_prompt + guided * a_negative)
        seconds = statistics.median(taken[name])
        found[name] = {
            "guided_steps": guided,
            "seconds_a_picture": round(seconds / batch, 4),
            "seconds_a_step": round(seconds / arguments.steps, 4),
            "tflop_a_picture": round(operations / batch / 1e12, 4),
            "tflops": round(operations / seconds / 1e12, 4),
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
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"], help="precision")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--turns", type=int, default=3, help="measurements of each way")
    arguments = parser.parse_args()
    let_segments_grow()
    if arguments.negative_tokens is None:
        arguments.negative_tokens = arguments.tokens
    device = torch.device(arguments.device)
    if device.type == "cpu":
        keep_freed_memory()  # as the programs do
    sizes, dtype = presets.config(arguments.preset), DTYPES[arguments.dtype]
    work = Workload(device, dtype, sizes.num_heads, sizes.num_kv_heads, sizes.head_dim, training=False)
    attention = choose_attention(AttentionSettings(), work, "--dtype bf16").function
    model = presets.random_next_dit(sizes, dtype, attention, device)
    ceiling = Ceiling(dtype, device)
    figures, ceilings = [], [ceiling.measure() for _ in range(3)]
    for size in arguments.size:
        figures.append(measure(model, size, arguments, device))
        ceilings += [ceiling.measure() for _ in range(3)]
    most = statistics.median(ceilings)
    for one in figures:
        for way in one.values():
            if isinstance(way, dict):
                way["of_ceiling"] = round(way["tflops"] / most, 3)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    asked = {name: value for name, value in vars(arguments).items() if name != "size"}
    print(
        json.dumps(
            {
                **asked,
                "device": where,
                "threads": torch.get_num_threads(),
                "ceiling_tflops": round(most, 4),
                "sizes": figures,
                **circumstances(),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
