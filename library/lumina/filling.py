"""Giving a model that was built without memory its tensors, block by block, with what is done to them on the way.

The order is: read a tensor, merge into it, and when a block is full quantise and place it, before the next one is read.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

TensorChange = Callable[[str, "torch.Tensor"], "torch.Tensor"]
"""(tensor's name, tensor as read) -> the tensor that the model gets instead; same shape and dtype."""
BlockFinish = Callable[["nn.Module", Sequence[str]], None]
"""Works on a block whose weights were just read, such as by quantising; given the paths of its large matrices."""


def in_turn(changes: Sequence[Mapping[str, Callable[[torch.Tensor], torch.Tensor]]]) -> TensorChange:
    """Returns one change out of several, each of which has functions for some tensors' names, applied in their order.

    What several functions make of a tensor is rounded once: between them it is float32.
    """

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        functions = [named[name] for named in changes if name in named]
        if len(functions) < 2:
            return functions[0](tensor) if functions else tensor
        changed = tensor.float()
        for function in functions:
            changed = function(changed)
        return changed.to(tensor.dtype)

    return change


def fill(
    model: nn.Module,
    tensors: Iterable[tuple[str, torch.Tensor]],
    blocks: str,
    large: Sequence[str],
    change: TensorChange | None,
    finish: BlockFinish | None,
) -> None:
    """Gives a model on the meta device its tensors, block by block, and freezes it.

    Args:
        model: its tensors are replaced.
        tensors: all of them by name; those of a block stand together.
        blocks: pattern of the blocks' paths.
        large: paths of the large matrices within a block.
        change: applied to each tensor.
        finish: applied to each block when it is full. Only then is the next one read, so that no more than one block
            has to be in memory as the file has it.
    """

    def block_of(entry: tuple[str, torch.Tensor]) -> str:
        match = re.match(blocks, entry[0])
        return match[0] if match else ""

    for path, entries in itertools.groupby(tensors, key=block_of):
        part = model.get_submodule(path)
        found = {
            name.removeprefix(f"{path}."): tensor if change is None else change(name, tensor)
            for name, tensor in entries
        }
        unexpected = part.load_state_dict(found, strict=bool(path), assign=True).unexpected_keys
        if unexpected:
            raise RuntimeError(f"the model has no tensors {unexpected}")
        del found  # or a block's tensors would stay until the next one is read
        part.requires_grad_(False)
        if path and finish is not None:
            finish(part, large)
    empty = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if empty:
        raise RuntimeError(f"no values for the model's tensors {empty}")
