"""Copies between host and device beside the computation: one contract, and how CUDA fulfils it.

The host only gives orders. What the device is told to compute runs in the order of the orders (its *computation*); each
:class:`Lane` of copies runs in its own order beside it. Between them nothing is in order but what *tokens* put in
order: a copy starts after the tokens that it is given, and the computation goes on after a token that it waits for.
The host never waits.

Whoever uses a transport has four duties, and nothing but their fulfilment makes results right:

* a copy that reads what the computation wrote, or writes where the computation read, is given a later ``mark()``;
* a copy that reads what another lane's copy wrote, or writes where it read, is given that copy's token;
* the computation waits for a copy's token before it reads what the copy wrote, or writes where the copy read;
* device memory that a copy touches is let go only after the computation waits for that copy: PyTorch gives it to the next
  tensor of the computation at once, which is in order behind such a wait and behind nothing else.

``tests/transport_helpers.py`` has a second implementation, which runs every copy as late as it can and finds each
neglected duty.
"""

from __future__ import annotations

import enum
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from library.errors import SettingsError

Pairs = Sequence[tuple[Tensor, Tensor]]
_PAGE_BYTES = 4096
_PORTABLE = 1  # cudaHostRegisterPortable


class Lane(enum.Enum):
    """A queue of copies; each has a direction, because a card copies in both at once."""

    WEIGHTS = "weights to the device"
    OUT = "activations to the host"
    BACK = "activations back to the device"


class Transport(Protocol):
    """The contract."""

    device: torch.device

    def host_buffer(self, num_bytes: int) -> Tensor:
        """Returns (num_bytes,) uint8 in host memory that copies can read and write without the host's help.

        It need not begin where its storage does.

        Raises:
            SettingsError: there is not that much.
        """

    def device_buffer(self, num_bytes: int) -> Tensor:
        """Returns (num_bytes,) uint8 on the device, a storage of its own; the computation may have used this memory for
        something else."""

    def mark(self) -> Any:
        """Returns a token for all that the computation has been told so far."""

    def copy(self, lane: Lane, pairs: Pairs, after: Iterable[Any]) -> Any:
        """Orders copies of sources into destinations and returns a token for their end.

        Args:
            lane: where they queue.
            pairs: (destination, source), each of one size and dtype.
            after: tokens of what has to be over before.
        """

    def wait(self, token: Any) -> None:
        """Orders the computation to go on after the token."""


class CudaTransport:
    """Streams and events of one CUDA device; host memory is pinned."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._streams = {lane: torch.cuda.Stream(device) for lane in Lane}
        self._pinned: list[Tensor] = []
        # At the end of the process the driver lets go of everything itself.
        weakref.finalize(self, _unpin, device, self._pinned).atexit = False

    def host_buffer(self, num_bytes: int) -> Tensor:
        """Returns pinned host memory.

        PyTorch's own pinned allocations are rounded up to a power of two, which could nearly double what 26 blocks
        take. So whole pages of ordinary memory are registered instead; no two buffers share a page. The storage begins
        with the first of them: PyTorch asks the driver about a storage's first byte where it wants to know whether a
        tensor is pinned, and a byte before it is not.
        """
        num_pages = -(-max(num_bytes, 1) // _PAGE_BYTES)
        wanted = f"{num_pages * _PAGE_BYTES / 2**30:.2f} GiB of host memory"
        try:
            memory = torch.empty((num_pages + 1) * _PAGE_BYTES, dtype=torch.uint8)
        except RuntimeError as error:
            raise SettingsError(f"{wanted} for streaming or offload are not free; {_LESS}") from error
        start = -memory.data_ptr() % _PAGE_BYTES
        # By way of NumPy, whose views are storages of their own to PyTorch; the view keeps the whole memory alive.
        buffer = torch.from_numpy(memory.numpy()[start : start + num_pages * _PAGE_BYTES])
        status = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), _PORTABLE))
        if status != 0:
            raise SettingsError(f"{wanted} cannot be pinned for streaming or offload (CUDA error {status}); {_LESS}")
        self._pinned.append(buffer)
        return buffer[:num_bytes]

    def device_buffer(self, num_bytes: int) -> Tensor:
        """Returns memory of the computation's stream."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def mark(self) -> torch.cuda.Event:
        """Returns an event on the current stream: in a backward pass, autograd makes that the forward pass's."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def copy(self, lane: Lane, pairs: Pairs, after: Iterable[torch.cuda.Event]) -> torch.cuda.Event:
        """Orders the copies on the lane's stream."""
        stream = self._streams[lane]
        for event in after:
            stream.wait_event(event)
        with torch.cuda.stream(stream):
            for destination, source in pairs:
                destination.copy_(source, non_blocking=True)
        done = torch.cuda.Event()
        done.record(stream)
        return done

    def wait(self, token: torch.cuda.Event) -> None:
        """Lets the current stream wait."""
        torch.cuda.current_stream(self.device).wait_event(token)


_LESS = (
    "close other programs, give fewer --blocks_to_swap (with 0, Gemma2's layers stay on the GPU too), or leave"
    " --cpu_offload_checkpointing out"
)


def _unpin(device: torch.device, buffers: list[Tensor]) -> None:
    if buffers:
        torch.cuda.synchronize(device)  # a last copy may still be reading
    for buffer in buffers:
        torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
