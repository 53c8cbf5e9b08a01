"""Applies the memory settings to a model's blocks, in the one order that is right.

Before: weights are read, merged into, quantised and placed (:func:`place`), and LoRA is attached. Then, each around the
one before it:

1. *compile* (``compilation.py``);
2. *stream*: the block's weights are made present (``block_stream.py``);
3. *recompute*: gradient checkpointing. It stands outside streaming, so that computing again goes through it too;
4. *saved tensors*: handles for streamed weights, and activations to the host (``saved_tensors.py``).

Selective recomputation of compiled blocks is the exception: it goes by single operations, which only the compiler sees, so
it stands inside what is compiled. The compiled backward pass then takes the weights as saved tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from library.memory.activation_offload import ActivationOffload
from library.memory.block_stream import NUM_SLOTS, BlockStream
from library.memory.compilation import compile_blocks
from library.memory.compile_report import report_compiling
from library.memory.recompute import recompute_in_backward
from library.memory.saved_tensors import SavedTensors
from library.memory.settings import MemorySettings
from library.memory.transport import CudaTransport, Transport

logger = logging.getLogger(__name__)

T = TypeVar("T")
_MIB = 2**20


def spread(blocks: Sequence[T], count: int) -> list[T]:
    """Returns ``count`` of the blocks, evenly spread.

    Each copy then has the time of ``len(blocks) / count`` blocks to hide behind; with neighbouring blocks it would have
    that of one, and the rest of the pass would have nothing to copy.
    """
    return [blocks[index * len(blocks) // count] for index in range(count)]


def can_stream(device: torch.device) -> bool:
    """Whether a device has memory of its own that host memory can be copied to beside its computation."""
    return device.type == "cuda"


def streamed_blocks(blocks: Sequence[nn.Module], blocks_to_swap: int | None, device: torch.device) -> list[nn.Module]:
    """Returns which blocks are streamed: none on a device that cannot."""
    return spread(blocks, blocks_to_swap) if blocks_to_swap and can_stream(device) else []


def stream_weights(blocks: Sequence[nn.Module], device: torch.device, whose: str) -> BlockStream:
    """Streams the weights of blocks that nothing is trained through; whatever changes the blocks came before.

    Args:
        blocks: in the order of a forward pass, with their weights in host memory.
        device: where they compute; see :func:`can_stream`.
        whose: blocks these are, for the log.

    Returns:
        The stream. Its memory is given back when it and the blocks are let go; the device's at once by its ``free``.

    Raises:
        SettingsError: there is not enough host memory.
    """
    return _attached_stream(blocks, device, CudaTransport(device), f"{len(blocks)} {whose}")


def _attached_stream(
    blocks: Sequence[nn.Module], device: torch.device, transport: Transport | None, whose: str
) -> BlockStream:
    stream = BlockStream(blocks, device, transport)
    stream.attach()
    logger.info(
        "The weights of %s are streamed: %d MiB of host memory, %d MiB of device memory",
        whose,
        stream.num_host_bytes // _MIB,
        stream.num_ring_bytes // _MIB,
    )
    return stream


def warn_where_useless(settings: MemorySettings, device: torch.device) -> None:
    """Warns where streaming or offload are asked for and change nothing."""
    asked = [
        f"--{name}" for name in ("blocks_to_swap", "cpu_offload_checkpointing") if getattr(settings, name)
    ]  # 0 blocks ask for nothing
    if asked and not can_stream(device):
        logger.warning(
            "%s: no effect on the device %s, where nothing is gained by moving weights or activations to host memory; the"
            " run goes on without",
            " and ".join(asked),
            device.type,
        )


def place(model: nn.Module, device: torch.device, besides: Collection[nn.Module] = ()) -> nn.Module:
    """Moves a model to a device, all but some of its modules, and returns it.

    Args:
        model: of any devices.
        device: where to.
        besides: modules that stay where they are, with all that is in them.
    """
    if any(model is module for module in besides):
        return model
    for child in model.children():
        place(child, device, besides)
    model._apply(lambda tensor: tensor.to(device), recurse=False)
    return model


def prepare_blocks(
    blocks: Iterable[nn.Module],
    settings: MemorySettings,
    device: torch.device,
    *,
    streamed: Sequence[nn.Module] = (),
    resident: Iterable[Tensor] = (),
    preserve_rng_state: bool = False,
    transport: Transport | None = None,
) -> BlockStream | None:
    """Applies compilation, streaming, recomputation and activation offload to blocks that LoRA is attached to.

    Args:
        blocks: all blocks that are trained through.
        settings: what is asked for.
        device: where the blocks compute.
        streamed: those of ``blocks`` whose weights are streamed, in the order of a forward pass; see
            :func:`streamed_blocks`.
        resident: tensors outside of the blocks that stay on the device, such as the LoRA's.
        preserve_rng_state: see :func:`~library.memory.recompute.recompute_in_backward`.
        transport: for copies on a device of another kind; None = CUDA's, where the device is one.

    Returns:
        The stream, or None where nothing is streamed.

    Raises:
        SettingsError: there is not enough host memory.
    """
    blocks = list(blocks)
    selects_inside = settings.gradient_checkpointing_level == "selective" and settings.torch_compile
    if settings.gradient_checkpointing and selects_inside:
        recompute_in_backward(blocks, preserve_rng_state, "selective")
    if settings.torch_compile:
        compile_blocks(blocks, settings.dynamo_backend)
        report_compiling()
    offloads = settings.cpu_offload_checkpointing and (transport is not None or can_stream(device))
    if transport is None and (streamed or offloads):
        transport = CudaTransport(device)
    stream = _attached_stream(streamed, device, transport, f"{len(streamed)} blocks") if streamed else None
    if 0 < len(streamed) <= NUM_SLOTS:
        logger.warning(
            "--blocks_to_swap %d saves no device memory for blocks, because %d have to have room there; give more",
            len(streamed),
            NUM_SLOTS,
        )
    if settings.gradient_checkpointing and not selects_inside:
        recompute_in_backward(blocks, preserve_rng_state, settings.gradient_checkpointing_level)
    offload = None
    if offloads and transport is not None:
        weights = [tensor for block in blocks for tensor in (*block.parameters(), *block.buffers())]
        offload = ActivationOffload(transport, [*weights, *resident])
    if offload is not None or stream is not None:
        SavedTensors(stream, offload).attach(blocks if offload is not None else streamed)
    return stream
