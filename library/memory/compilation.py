"""``torch.compile`` of a model's blocks, applied from outside.

One block is compiled, not the model: blocks of a kind run the same code on tensors of the same shapes, so that they share
what was compiled for the first of them. Their weights and the LoRA's are inputs of the compiled code. A size that was not
met before is compiled for once; from the second caption length on, code for any length is made.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from library.errors import SettingsError

logger = logging.getLogger(__name__)

# What differs makes code of its own: kinds of blocks, bucket sizes, with and without gradients, masks, network on and off.
_MOST_VARIANTS = 256


def check_backend(name: str, device: torch.device) -> None:
    """Checks that torch knows a compiler and that what it needs is there, before a model is read.

    Args:
        name: torch's.
        device: of the run; a compiler makes its code for a GPU by other means than for a CPU.

    Raises:
        SettingsError: it does not.
    """
    known = torch._dynamo.list_backends(exclude_tags=())
    if name not in known:
        raise SettingsError(f"--dynamo_backend: {name!r} is none of this torch's: {', '.join(sorted(known))}")
    try:
        torch.compile(_probe, backend=name, fullgraph=True)(torch.ones(4, device=device))
    except Exception as error:  # whatever a compiler raises: that it cannot run is the answer
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise SettingsError(
            f"--torch_compile: the compiler {name!r} cannot be used here ({reason}); on a GPU it needs the package triton"
            " (on Windows: triton-windows), on a CPU a C++ compiler; install that, or leave --torch_compile out"
        ) from error


def _probe(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(x) * x


def compile_blocks(blocks: Iterable[nn.Module], backend: str) -> None:
    """Compiles each block's ``forward`` when it is first run; comes after LoRA has been attached.

    Args:
        blocks: of few kinds, whose forward runs without a break.
        backend: torch's name of the compiler.
    """
    # Beyond this many variants of one piece of code torch would go on uncompiled without a word, or end the run.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_VARIANTS)
    torch._dynamo.config.accumulated_recompile_limit = max(
        torch._dynamo.config.accumulated_recompile_limit, 8 * _MOST_VARIANTS
    )
    for block in blocks:
        forward: Any = block.forward
        block.forward = torch.compile(forward, fullgraph=True, backend=backend)
    logger.info("Blocks are compiled (%s): the first steps of each picture size take a minute or more", backend)
