"""Measures what several processes cost a training step: gradients exchanged during backward, behind it, and not at all.

    python tests/bench/bench_processes.py --preset medium --size 256 --rank 32

Starts the processes itself (gloo on CPUs, NCCL where there are as many GPUs) and prints one JSON object. The three kinds
of steps take turns, so that a machine that grows slower meets all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, distributed

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import presets
from measuring import circumstances

from library.training.gradient_sums import GradientSums
from library.training.processes import Processes
from networks import lora_lumina

KINDS = ("in backward", "behind backward", "not exchanged")


def _processes(rank: int, count: int, device: torch.device) -> Processes:
    one: Any = SimpleNamespace(process_index=rank, num_processes=count, is_main_process=rank == 0, device=device)
    return Processes(one)


def _run(rank: int, options: argparse.Namespace, folder: str) -> None:
    on_cuda = torch.cuda.device_count() >= options.processes
    device = torch.device("cuda", rank) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(options.threads)
    distributed.init_process_group(
        "nccl" if on_cuda else "gloo", f"file://{folder}/meeting", rank=rank, world_size=options.processes
    )
    sizes = presets.config(options.preset)
    model = presets.random_next_dit(sizes, torch.bfloat16, device=device)
    network = lora_lumina.create_network(1.0, options.rank, options.rank, None, [], model)
    network.apply_to([], model)
    network.to(device).train()
    parameters = list(network.parameters())
    sums = GradientSums(parameters, _processes(rank, options.processes, device), small=0)
    generator = torch.Generator().manual_seed(rank)
    side = options.size // 8
    latents = torch.randn(options.batch, sizes.channels, side, side, generator=generator).to(device, torch.bfloat16)
    features = torch.randn(options.batch, options.tokens, sizes.cap_dim, generator=generator).to(device, torch.bfloat16)
    time_of = torch.rand(options.batch, generator=generator).to(device)
    values = torch.zeros(10, device=device)

    def step(kind: str) -> float:
        for parameter in parameters:
            parameter.grad = None
        _meet(device)
        start = time.perf_counter()
        loss = model(latents, time_of, features).float().square().mean()
        if kind == "in backward":
            sums.last_backward_follows()
        loss.backward()
        total = values if kind == "not exchanged" else sums.finish(values)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        total.tolist()
        return time.perf_counter() - start

    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(options.turns + 1):
        for kind in KINDS:
            taken = step(kind)
            if turn:  # the first one of each warms up
                seconds[kind].append(taken)
    flat = torch.randn(sum(parameter.numel() for parameter in parameters), device=device)
    exchanges = [_exchange(flat, device) for _ in range(options.turns + 1)][1:]
    if rank == 0:
        found = {
            "backend": distributed.get_backend(),
            "processes": options.processes,
            "preset": options.preset,
            "size_px": options.size,
            "batch": options.batch,
            "caption_tokens": options.tokens,
            "rank": options.rank,
            "gradient_mb": round(flat.numel() * 4 / 1e6, 1),
            "seconds_exchange_alone": round(statistics.median(exchanges), 4),
            **{
                f"seconds_{kind.replace(' ', '_')}": round(statistics.median(taken), 4)
                for kind, taken in seconds.items()
            },
            **circumstances(),
        }
        print(json.dumps(found, indent=1))
    distributed.barrier()
    distributed.destroy_process_group()


def _meet(device: torch.device) -> None:
    distributed.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize()


def _exchange(flat: Tensor, device: torch.device) -> float:
    _meet(device)
    start = time.perf_counter()
    distributed.all_reduce(flat)
    _meet(device)
    return time.perf_counter() - start


def main() -> None:
    """Parses the command line and runs the processes."""
    parser = argparse.ArgumentParser(description="Measures the exchange of gradients in a training step.")
    parser.add_argument("--preset", default="medium", choices=presets.PRESETS, help="model")
    parser.add_argument("--size", type=int, default=256, help="picture side in pixels")
    parser.add_argument("--batch", type=int, default=1, help="pictures a process")
    parser.add_argument("--tokens", type=int, default=128, help="caption tokens")
    parser.add_argument("--rank", type=int, default=32, help="of the LoRA")
    parser.add_argument("--processes", type=int, default=2, help="how many")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a process")
    parser.add_argument("--turns", type=int, default=5, help="steps of each kind")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_run, (options, folder), nprocs=options.processes)


if __name__ == "__main__":
    main()
