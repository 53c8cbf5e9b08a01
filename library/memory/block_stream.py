"""Block streaming: frozen weights of blocks live in host memory and are copied to the device just ahead of use.

All frozen tensors of a block (parameters and buffers, any mix of dtypes) are laid out in one flat host buffer. On the
device there is a ring of two flat buffers, the *slots*: while the computation runs one block, the next one in its
direction is copied into the other slot. Weights are frozen, so nothing is ever copied back.

Two slots are enough: in the steady state a copy starts when the block before last is done and has the time of a whole
block to finish; a third slot would move every copy one block earlier and make none of them shorter, so it would only
cost memory.

What makes it right:

* **A slot's life.** ``_use`` makes a block *current*: its copy is ordered, if it was not, and the computation waits for
  it. ``_release`` ends that: it marks the computation behind the block's last use. A slot is overwritten only after such
  a mark, and the current block's slot never.
* **Forward.** A block is current from the beginning to the end of its ``forward``. In that time its parameters and
  buffers are views of the slot; before and after they are views of the host buffer, so that ``state_dict``, dtypes and
  shapes are right at any time, and computing with them elsewhere is an error on CUDA instead of stale numbers.
* **Backward without recomputation.** Autograd saves views of the weights for the backward pass, but by then their slot
  holds other blocks' weights: the gradients would be wrong without any error. So a saved-tensor hook
  (``saved_tensors.py``) keeps a *handle* instead, the block's number and the place in its buffer (:meth:`pack`); using
  it makes the block current again (:meth:`unpack`).
* **Backward with recomputation.** ``torch.utils.checkpoint`` calls the block's ``forward`` again, inside the backward pass
  and below hooks of its own, and keeps what that saves as it is: views of the slot, or the parameters themselves. They
  are used until the last of the block's backward nodes has run. So a block that is run inside a backward pass stays
  current, with its parameters in the slot, until another block is used. That is soon enough, and not too
  soon: autograd's queue runs the node with the highest sequence number that is ready. Numbers grow in the order of the
  forward pass, and what a node waits for was made after it and has a higher number; so the highest of all that are left
  is always ready, and nodes run in exactly the reverse order of the forward pass. (Accumulating a gradient into a leaf
  goes first, but needs no weight.) All nodes of a block have higher numbers than those of the blocks before
  it, and checkpointing recomputes a block when its first node asks for a saved tensor. Hence no other streamed block is
  used before the last node of this one has run, and its kernels are in front of the mark that ``_release`` makes.
* **Errors and Ctrl+C** may strike anywhere. Nothing here belongs to a pass but which block is current; a slot is either
  empty, or its copy has been ordered and has a token. So the next pass starts from any such state.

Nothing here knows Next-DiT: blocks are modules whose ``forward`` is called in the order given.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from library.memory.recompute import hidden_from_recomputation
from library.memory.transport import CudaTransport, Lane, Transport
from library.memory.views import View, is_plain

NUM_SLOTS = 2
ALIGNMENT_BYTES = 256  # of every tensor, as PyTorch's allocators align: kernels choose by it


class WeightHandle(NamedTuple):
    """Stands for a view of a streamed weight that autograd wanted to save."""

    block: int
    view: View


class _Slot:
    """One device buffer of the ring."""

    def __init__(self, buffer: Tensor, released: Any) -> None:
        self.buffer = buffer
        self.block: int | None = None
        self.ready: Any = None
        self.released: Any = released
        self.views: dict[int, list[Tensor]] = {}


class _HostBlock:
    """One block's frozen tensors in host memory."""

    def __init__(self, block: nn.Module, transport: Transport) -> None:
        self.places = _frozen_tensors(block)
        self.tensors = [place.tensor() for place in self.places]
        self.views, num_bytes = _lay_out(self.tensors)
        self.buffer = transport.host_buffer(num_bytes)
        self.host_views = [view.into(self.buffer) for view in self.views]
        for tensor, view in zip(self.tensors, self.host_views, strict=True):
            view.copy_(tensor.detach())
            tensor.data = view

    def check_unchanged(self) -> None:
        """Makes sure that the module still uses the tensors that are streamed."""
        for place, tensor, view in zip(self.places, self.tensors, self.views, strict=True):
            if place.tensor() is not tensor or tensor.dtype != view.dtype:
                raise RuntimeError(
                    f"{place.name} of a streamed block was replaced or cast; merge, quantise and cast before streaming"
                )

    def show(self, views: Sequence[Tensor]) -> None:
        """Makes the module's tensors these views."""
        for tensor, view in zip(self.tensors, views, strict=True):
            tensor.data = view


class _Place(NamedTuple):
    """Where a module keeps a tensor."""

    owner: dict[str, Tensor | None]
    key: str
    name: str

    def tensor(self) -> Tensor:
        tensor = self.owner[self.key]
        if tensor is None:
            raise RuntimeError(f"{self.name} of a streamed block was taken away")
        return tensor


class BlockStream:
    """The frozen weights of some blocks in host memory, and the ring through which the device sees them."""

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device, transport: Transport | None = None) -> None:
        """Moves the blocks' frozen tensors into host memory; device memory is taken when a block first runs.

        Trainable parameters are left alone: they belong on the device. Buffers count as frozen: what a block writes into
        one is lost.

        Args:
            blocks: in the order in which a forward pass runs them; other blocks may run in between.
            device: where they compute.
            transport: how copies are ordered; None = by CUDA.

        Raises:
            SettingsError: there is not enough host memory.
            TypeError: a weight is a tensor of a kind that cannot be streamed.
            ValueError: two blocks share a weight.
        """
        self._transport = transport or CudaTransport(device)
        _refuse_shared(blocks)
        self._blocks = tuple(blocks)
        self._hosts = [_HostBlock(block, self._transport) for block in blocks]
        self._slots: list[_Slot] = []
        self._slot_at: dict[int, _Slot] = {}  # by the address of its memory
        self._current: int | None = None
        # A copy that is under way when the ring is let go must not hit its memory's next user.
        weakref.finalize(self, _settle, self._transport, self._slots).atexit = False

    @property
    def num_host_bytes(self) -> int:
        """Bytes of host memory."""
        return sum(host.buffer.numel() for host in self._hosts)

    @property
    def num_ring_bytes(self) -> int:
        """Bytes of device memory that the ring takes while it is in use."""
        largest = max((host.buffer.numel() for host in self._hosts), default=0)
        return min(NUM_SLOTS, len(self._hosts)) * largest

    def attach(self) -> None:
        """Lets the blocks' ``forward`` make their weights present; wraps what is there, such as a compiled one."""
        for index, block in enumerate(self._blocks):
            block.forward = self._streamed(block.forward, index)

    def _streamed(self, forward: Callable[..., Any], index: int) -> Callable[..., Any]:
        @functools.wraps(forward)
        def streamed(*args: Any, **kwargs: Any) -> Any:
            in_backward = _in_backward()
            try:
                with hidden_from_recomputation():  # what is copied depends on the blocks that ran before
                    slot = self._use(index, in_backward)
                    self._hosts[index].show(self._views(slot, index))
                return forward(*args, **kwargs)
            finally:
                if not in_backward:
                    self._release()

        return streamed

    def pack(self, tensor: Tensor) -> WeightHandle | None:
        """Returns a handle for a plain tensor that lies in the ring, or None for any other."""
        slot = self._slot_at.get(tensor.untyped_storage().data_ptr())
        if slot is None or slot.block is None:
            return None
        return WeightHandle(slot.block, View.of(tensor))

    def unpack(self, handle: WeightHandle) -> Tensor:
        """Returns the view that a handle stands for; right until another block is used."""
        slot = self._slot_of(handle.block)
        if slot is None or self._current != handle.block:
            slot = self._use(handle.block, in_backward=True)
        return handle.view.into(slot.buffer)

    def free(self) -> None:
        """Gives the ring's device memory back; the next use takes it again."""
        self._release()
        _settle(self._transport, self._slots)
        self._slots.clear()
        self._slot_at.clear()

    def _use(self, index: int, in_backward: bool) -> _Slot:
        """Makes a block current, and orders the copy of the one that will be used next."""
        if self._current != index:
            self._release()
        slot = self._slot_of(index) or self._load(index)
        self._transport.wait(slot.ready)
        self._current = index
        slot.released = None
        following = self._following(index, in_backward)
        if following is not None and self._slot_of(following) is None:
            self._load(following)
        return slot

    def _following(self, index: int, in_backward: bool) -> int | None:
        """Returns the streamed block that comes after this one, as far as is known."""
        if in_backward:
            # The next forward pass begins with the two blocks that this leaves in the ring.
            return index - 1 if index > 0 else None
        if index + 1 < len(self._hosts):
            return index + 1
        # The backward pass begins with the two that are in the ring; without one, the next forward pass comes.
        return None if torch.is_grad_enabled() else 0

    def _load(self, index: int) -> _Slot:
        """Orders the copy of a block into a slot that is not the current block's."""
        if not self._slots:
            self._make_slots()
        slot = next(slot for slot in self._slots if slot.block is None or slot.block != self._current)
        host = self._hosts[index]
        host.check_unchanged()
        slot.block = None  # what it holds is lost from here on, also where an error comes in between
        free = self._transport.mark() if slot.released is None else slot.released
        pair = (slot.buffer[: host.buffer.numel()], host.buffer)
        slot.ready = self._transport.copy(Lane.WEIGHTS, [pair], after=[free])
        slot.block = index
        return slot

    def _make_slots(self) -> None:
        num_slots = min(NUM_SLOTS, len(self._hosts))
        largest = max(host.buffer.numel() for host in self._hosts)
        buffers = [self._transport.device_buffer(largest) for _ in range(num_slots)]
        # The memory may have had another use, which the device has been told of but has not got to yet.
        self._slots += [_Slot(buffer, self._transport.mark()) for buffer in buffers]
        self._slot_at.update({slot.buffer.untyped_storage().data_ptr(): slot for slot in self._slots})

    def _release(self) -> None:
        """Ends the use of the current block."""
        if self._current is None:
            return
        host, slot = self._hosts[self._current], self._slot_of(self._current)
        host.show(host.host_views)
        if slot is not None:
            slot.released = self._transport.mark()
        self._current = None

    def _slot_of(self, index: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.block == index), None)

    def _views(self, slot: _Slot, index: int) -> list[Tensor]:
        views = slot.views.get(index)
        if views is None:
            views = slot.views[index] = [view.into(slot.buffer) for view in self._hosts[index].views]
        return views


def streamed_bytes(block: nn.Module) -> int:
    """Returns how many bytes a block's frozen tensors take in a flat buffer; they may be on the meta device."""
    frozen = {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers()) if not tensor.requires_grad}
    return _lay_out(list(frozen.values()))[1]


def _in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread."""
    return torch._C._current_graph_task_id() != -1


def _settle(transport: Transport, slots: list[_Slot]) -> None:
    for slot in slots:
        if slot.ready is not None:
            transport.wait(slot.ready)


def _frozen_tensors(block: nn.Module) -> list[_Place]:
    """Returns where a block keeps its buffers and the parameters that are not trained; each tensor once.

    Raises:
        TypeError: one of them is not plain memory.
    """
    places, seen = [], set()
    for prefix, module in block.named_modules():
        owners: list[dict[str, Any]] = [module._parameters, module._buffers]
        for owner in owners:
            for key, tensor in owner.items():
                if tensor is None or tensor.requires_grad or id(tensor) in seen:
                    continue
                name = f"{prefix}.{key}".lstrip(".")
                if not is_plain(tensor) or tensor.is_meta:
                    raise TypeError(f"{name} is a {type(tensor).__name__} on {tensor.device}, which cannot be streamed")
                seen.add(id(tensor))
                places.append(_Place(owner, key, name))
    return places


def _refuse_shared(blocks: Sequence[nn.Module]) -> None:
    owner_of: dict[int, int] = {}
    for index, block in enumerate(blocks):
        for place in _frozen_tensors(block):
            if owner_of.setdefault(id(place.tensor()), index) != index:
                raise ValueError(f"{place.name} belongs to two blocks; such a weight cannot be streamed")


def _lay_out(tensors: Sequence[Tensor]) -> tuple[list[View], int]:
    """Returns each tensor's place in one flat buffer, and the buffer's size in bytes."""
    views, start = [], 0
    for tensor in tensors:
        size = tensor.element_size()
        # Some kernels want a matrix that lies column by column: what is dense keeps its strides.
        stride = torch.empty_like(tensor, device="meta").stride()
        views.append(View(tensor.dtype, start // size, tuple(tensor.shape), stride))
        start += -(-tensor.numel() * size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return views, start
