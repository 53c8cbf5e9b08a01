"""Times attention by every kernel that runs here, at the full model's head sizes.

    python tests/bench/bench_attention.py                          # CUDA: 512, 1024 and 1536 px, batch 1 and 4, bf16
    python tests/bench/bench_attention.py --tokens 256 --batch 2   # small, for a CPU

Prints one JSON object: seconds of a forward pass alone, and of forward and backward together, for batches without padding
and for ragged ones (captions of 128, 96, 64 and 32 tokens in turn), with the share of the run's matmul ceiling that is
reached: 4 S^2 E FLOPs a head forward (S the sample's real tokens), twice that backward. A kernel that cannot be used stands
there with the reason. A process that is ended by SIGTERM prints the cases that it has.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from measuring import ROOT, Stopped, circumstances, stop_when_asked
from torch import Tensor

sys.path.insert(0, str(ROOT))

from library.memory.attention_kernels import KERNELS, AttentionFn, Workload

HEADS, KV_HEADS, HEAD_DIM = 24, 8, 96  # of the 2.6 B model
CAPTION_TOKENS = (128, 96, 64, 32)


def _seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Returns the median time of one run, the device's work included."""
    for _ in range(2):  # compiles, picks kernels, fills the allocator
        run()
    times = []
    for _ in range(repeats):
        _wait(device)
        begin = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _matmul_ceiling(device: torch.device, dtype: torch.dtype, size: int, repeats: int) -> float:
    """Returns the FLOP/s of a large matrix product of random values."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: a @ b, device, repeats)


def _case(num_image: int, batch: int, ragged: bool, device: torch.device, dtype: torch.dtype) -> tuple[list, list[int]]:
    """Returns ([q, k, v, key mask or None, gradient of the output], real tokens of each sample)."""
    captions = [CAPTION_TOKENS[i % len(CAPTION_TOKENS)] if ragged else CAPTION_TOKENS[0] for i in range(batch)]
    lengths = [num_image + tokens for tokens in captions]
    length = max(lengths)
    whole = torch.randn(batch, length, HEADS + 2 * KV_HEADS, HEAD_DIM, device=device).to(dtype)
    q, k, v = whole.split([HEADS, KV_HEADS, KV_HEADS], dim=2)
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).to(device)
    upstream = torch.randn(batch, length, HEADS, HEAD_DIM, device=device).to(dtype) * mask[:, :, None, None]
    return [q.contiguous(), k.contiguous(), v, mask if ragged else None, upstream], lengths


def _measure(function: AttentionFn, case: list, backward: bool, device: torch.device, repeats: int) -> float:
    q, k, v, mask, upstream = case

    def forward() -> Tensor:
        with torch.no_grad():
            return function(q, k, v, mask)

    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*leaves, mask), leaves, upstream)

    return _seconds(both if backward else forward, device, repeats)


def _row(name: str, case: list, lengths: list[int], ceiling: float, device: torch.device, repeats: int) -> dict:
    torch.compiler.reset()  # each case compiles for its own sizes
    dtype = case[0].dtype
    row: dict[str, object] = {"kernel": name}
    flops = sum(4 * length**2 * HEAD_DIM * HEADS for length in lengths)
    for title, backward, times in (("forward", False, 1), ("forward_backward", True, 3)):
        work = Workload(device, dtype, HEADS, KV_HEADS, HEAD_DIM, training=backward)
        reason = KERNELS[name].unsuitable(work)
        if reason is None:
            try:
                seconds = _measure(KERNELS[name].make(), case, backward, device, repeats)
            except Exception as error:  # what a kernel or compiler of another project raises is a finding, too
                reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            else:
                row[f"{title}_s"] = round(seconds, 6)
                row[f"{title}_share_of_ceiling"] = round(flops * times / seconds / ceiling, 3)
                continue
        row[f"{title}_unavailable"] = reason
    return row


def main() -> None:
    """Parses the command line, measures and prints."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="Times attention kernels.")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1024, 4096, 9216], help="image tokens (512 to 1536 px)"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=list(KERNELS))
    parser.add_argument("--repeats", type=int, default=20 if cuda else 3)
    parser.add_argument("--matmul_size", type=int, default=8192 if cuda else 2048)
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    ceiling = _matmul_ceiling(device, dtype, arguments.matmul_size, arguments.repeats)
    # All cases of a kernel, then the next one: what has to be compiled comes last and takes longest.
    kernels = sorted(arguments.kernels, key=lambda name: name == "flex")
    sizes = [
        (num_image, batch, ragged)
        for num_image in arguments.tokens
        for batch in arguments.batch
        for ragged in ((False, True) if batch > 1 else (False,))
    ]
    cases: list[dict] = [
        {"image_tokens": num_image, "batch": batch, "ragged": ragged, "kernels": []}
        for num_image, batch, ragged in sizes
    ]
    is_whole = False
    stop_when_asked()
    try:
        for name in kernels:
            for size, entry in zip(sizes, cases, strict=True):
                case, lengths = _case(*size, device, dtype)
                entry["kernels"].append(_row(name, case, lengths, ceiling, device, arguments.repeats))
        is_whole = True
    except Stopped:
        print("stopped before all was measured", file=sys.stderr)
    result = {
        **circumstances(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": arguments.dtype,
        "heads": [HEADS, KV_HEADS, HEAD_DIM],
        "matmul_ceiling_tflops": round(ceiling / 1e12, 3),
        "cases": cases,
    }
    print(json.dumps(result, indent=2))
    if not is_whole:
        sys.exit(1)


if __name__ == "__main__":
    main()
