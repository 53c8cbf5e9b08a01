"""How a tensor lies in its storage, kept apart from it: so that it can be found again in another one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class View(NamedTuple):
    """A tensor's place in a storage, or in a buffer."""

    dtype: torch.dtype
    offset: int
    """In elements of ``dtype``."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> View:
        """Returns where a tensor lies in its storage."""
        return cls(tensor.dtype, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride())

    def into(self, buffer: Tensor) -> Tensor:
        """Returns the tensor that lies at this place of ``buffer``, counted from its first byte, whatever its dtype is.

        A buffer need not begin where its storage does.
        """
        begin, rest = divmod(int(buffer.storage_offset()) * buffer.element_size(), self.dtype.itemsize)
        if rest:
            raise RuntimeError(f"a buffer that begins at byte {rest} of a {self.dtype} cannot hold such numbers")
        tensor = torch.empty(0, dtype=self.dtype, device=buffer.device)
        return tensor.set_(buffer.untyped_storage(), begin + self.offset, self.shape, self.stride)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is memory and a view of it, and not something that stands for other tensors."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided


def whole_storage(tensor: Tensor) -> Tensor:
    """Returns all bytes of a tensor's storage as (num_bytes,) uint8, without copying."""
    storage = tensor.untyped_storage()
    bytes_of = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return bytes_of.set_(storage, 0, (storage.nbytes(),), (1,))
