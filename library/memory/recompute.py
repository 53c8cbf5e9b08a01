"""Gradient checkpointing, applied from outside to the blocks of a model.

*Full* keeps a block's inputs alone and computes everything again in backward.

*Selective* keeps what is dear to compute and small to keep: the result of attention, and of each matrix product that
makes its rows no more than twice as wide. What it computes again is cheap (norms, rotations, gates) or large (the wide
products of the feed-forward layer). In a block of Lumina that is 5.7 of 31 widths a token, for 55 % of the products.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode_temporarily
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    _CachedTorchDispatchMode,
    _CachingTorchDispatchMode,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from library.errors import SettingsError
from library.memory.settings import CheckpointingLevel

_WIDENING = 2  # a product whose rows become wider than this many times its input's is not kept
_SMALL = 8  # nor is one kept whose rows become narrower than this part
_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default, _aten._scaled_mm.default}
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_fused_attention_overrideable.default,
}
_TELLS_RESULTS = hasattr(SelectiveCheckpointContext(is_recompute=False), "op_output")
_ATTENTION_NAMESPACES = ("lumina", "flash_attn", "flash_attn_3", "torch_attn")  # of kernels that are not torch's SDPA


def recompute_in_backward(
    blocks: Iterable[nn.Module], preserve_rng_state: bool, level: CheckpointingLevel = "full"
) -> None:
    """Makes each block keep little in forward, and compute the rest again in backward.

    Wraps the blocks' ``forward``, so it comes after LoRA has been attached to what is inside them.

    Args:
        blocks: modules that are run once a forward pass.
        preserve_rng_state: set it where something in a block draws from torch's global generators; costs a copy of
            their states per block.
        level: what is kept.
    """
    for block in blocks:
        block.forward = _recomputed(block.forward, preserve_rng_state, level)


def _recomputed(forward: Any, preserve_rng_state: bool, level: CheckpointingLevel) -> Any:
    further: dict[str, Any] = {"context_fn": selective_contexts} if level == "selective" else {}

    @functools.wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(
            forward, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state, **further, **kwargs
        )

    return recomputed


def selective_contexts() -> tuple[Any, Any]:
    """Returns the contexts of a block's forward pass and of its recomputation, for ``checkpoint``'s ``context_fn``."""
    policy = _Policy()
    first, again = create_selective_checkpoint_contexts(policy)
    # torch 2.11 asks before an operation is run and tells no result.
    return first if _TELLS_RESULTS else _Telling(policy, first.storage), again


@contextlib.contextmanager
def hidden_from_recomputation() -> Iterator[None]:
    """Hides what the block of code does from selective recomputation, if one is going on.

    That one counts operations: what a block of the model does in backward it must have done in forward, or newer
    versions of torch end the run. What depends on more than the block's inputs, such as what is remembered of a mask and
    the order in which weights come from host memory, has to be done in here.
    """
    with contextlib.ExitStack() as stack:
        while isinstance(_get_current_dispatch_mode(), (_CachingTorchDispatchMode, _CachedTorchDispatchMode)):
            stack.enter_context(_pop_mode_temporarily())
        yield


class _Policy:
    """Says of each operation of a block's forward pass whether its result is kept.

    What is kept must not be written over: the recomputation would go on from it as if it were the result. torch looks
    only at the very tensor that the operation returned, and a Linear returns a view of it that counts its changes apart.
    """

    def __init__(self) -> None:
        self._kept: set[int] = set()  # storages, which live as long as what is kept

    def __call__(self, ctx: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keeps = _keeps(operation, args)
        # Recomputing, torch 2.11 asks again; by then what was kept is let go bit by bit, and other storages take its place.
        if not ctx.is_recompute:
            schema = getattr(operation, "_schema", None)  # operators that take functions have none
            if schema is not None and schema.is_mutable and self._kept:
                self._check_writes(operation, args, kwargs)
            if keeps:
                self.keep(getattr(ctx, "op_output", None))
        return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE

    def keep(self, results: Any) -> None:
        """Takes note of what an operation gave and is kept."""
        # Being compiled, operations are traced with stand-ins, and writing becomes making anew.
        leaves = tree_leaves(results)
        self._kept.update(result.untyped_storage()._cdata for result in leaves if type(result) is Tensor)

    def _check_writes(self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = zip(operation._schema.arguments, args, strict=False)
        named = ((argument, kwargs.get(argument.name)) for argument in operation._schema.arguments)
        for argument, value in (*given, *named):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            if any(type(one) is Tensor and one.untyped_storage()._cdata in self._kept for one in tree_leaves(value)):
                raise SettingsError(
                    "--gradient_checkpointing_level selective keeps the results of matrix products, and something in a"
                    f" block (the network module, as a rule) writes over one ({operation}), so that gradients would be"
                    " wrong; use --gradient_checkpointing_level full"
                )


class _Telling(_CachingTorchDispatchMode):
    """Tells the policy the results that it has kept, where torch itself does not."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if _keeps(func, args):
            self.policy_fn.keep(out)
        return out


def _keeps(operation: Any, args: tuple[Any, ...]) -> bool:
    if operation in _PRODUCTS:
        return _is_narrow(args[0].shape[1], args[1].shape[1])
    return operation in _ATTENTION or getattr(operation, "namespace", "") in _ATTENTION_NAMESPACES


def _is_narrow(width_in: int, width_out: int) -> bool:
    # A LoRA's way down is left out: it is small, and cheap to compute again.
    return width_in // _SMALL < width_out <= _WIDENING * width_in
