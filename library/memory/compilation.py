"""``torch.compile`` of a model's blocks, applied from outside.

One block is compiled, not the model: blocks of a kind run the same code on tensors of the same shapes, so that they share
what was compiled for the first of them. Their weights and the LoRA's are inputs of the compiled code, and the numbers
of samples and tokens are variables of it, so that it serves all picture sizes and caption lengths.

Passes without gradients (previews, validation) are not compiled. They would need code of their own for every kind of
block, which takes longer to make than it ever saves: their blocks keep nothing, so what is left to fuse is little.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import SettingsError, nearest

logger = logging.getLogger(__name__)

# What differs makes code of its own: kinds of blocks, batch sizes, with and without a mask, network on and off.
_MOST_VARIANTS = 256


def check_backend(name: str, device: torch.device) -> None:
    """Checks that torch knows a compiler and that what it needs is there, before a model is read.

    Args:
        name: torch's.
        device: of the run; a compiler makes its code for a GPU by other means than for a CPU.

    Raises:
        SettingsError: it does not.
    """
    if name not in torch._dynamo.list_backends(exclude_tags=()):
        known = sorted({*torch._dynamo.list_backends(), "aot_eager", "eager"})  # without those for torch's own tests
        raise SettingsError(
            f"--dynamo_backend: {name!r} is no compiler of this torch{nearest(name, known)}; give one of"
            f" {', '.join(known)}, or leave it out for inductor"
        )
    logger.info("Trying the compiler %s, for --torch_compile", name)
    try:
        torch.compile(_probe, backend=name, fullgraph=True)(torch.ones(4, device=device))
    except Exception as error:  # whatever a compiler raises: that it cannot run is the answer
        inner = getattr(error, "inner_exception", error)  # what a compiler raised, where torch has wrapped it
        first_line = next(iter(str(inner).strip().splitlines()), "")
        reason = first_line if inner is error and first_line else f"{type(inner).__name__}: {first_line}"
        raise SettingsError(
            f"--torch_compile: the compiler {name!r} cannot be used here ({reason}); on a GPU it needs the package triton"
            " (on Windows: triton-windows), on a CPU a C++ compiler, and everywhere a folder for compiled code that can be"
            " written to (the environment variable TORCHINDUCTOR_CACHE_DIR names one); mend that, or leave the flag out"
        ) from error


def _probe(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(x) * x


def compile_blocks(blocks: Iterable[nn.Module], backend: str) -> None:
    """Compiles each block's ``forward`` when it is first run with gradients; comes after LoRA has been attached.

    Args:
        blocks: of few kinds, whose forward runs without a break. The first argument is (B,S,D); whatever other tensor,
            by place or by name, has B or S numbers along its first or second axis has one for each sample or token.
        backend: torch's name of the compiler.
    """
    # Beyond this many variants of one piece of code torch would go on uncompiled without a word, or end the run.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_VARIANTS)
    torch._dynamo.config.accumulated_recompile_limit = max(
        torch._dynamo.config.accumulated_recompile_limit, 8 * _MOST_VARIANTS
    )
    for block in blocks:
        block.forward = _compiled_in_training(block.forward, backend)
    logger.info("Blocks are compiled (%s): the first steps take a minute or so", backend)


def _compiled_in_training(forward: Any, backend: str) -> Any:
    compiled = torch.compile(forward, fullgraph=True, backend=backend)

    @functools.wraps(forward)
    def run(x: Tensor, *others: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(x, *others, **named)
        if not x.requires_grad:
            # The first block of a row: a little more arithmetic, instead of code of its own.
            x = x.detach().requires_grad_()
        for tensor in _tensors((x, others, tuple(named.values()))):
            for axis in (0, 1):
                # torch has code of its own for size 1, whatever it is told.
                if tensor.dim() > axis and tensor.shape[axis] == x.shape[axis] != 1:
                    torch._dynamo.maybe_mark_dynamic(tensor, axis)
        return compiled(x, *others, **named)

    return run


def _tensors(arguments: Any) -> Iterator[Tensor]:
    if isinstance(arguments, Tensor):
        yield arguments
    elif isinstance(arguments, tuple):  # such as Gemma2's tables of sines and cosines
        for argument in arguments:
            yield from _tensors(argument)
