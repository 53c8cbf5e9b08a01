"""A CUDA device without one: tensors that know their device, dtype, shape and strides, and hold no values.

What is on the CPU is computed for real. What is on ``DEVICE`` are torch's fake tensors: an operation on them runs its shape
function alone, and mixing devices raises. Besides, every operation is looked at that makes the host wait for a GPU: reading
a value, results whose size depends on values, copies that are not asynchronous. So what a first run on a GPU would stumble
over shows on a machine without one; what kernels compute does not. Not seen is what Python brings to the device by
itself, such as a list as an index.

Tricks that a torch without CUDA needs are all here:

* autograd asks for a device's streams, which such a torch has not. So in C++ fake tensors say that they are on ``meta``, and
  only in Python that they are on CUDA; what C++ makes on ``meta`` is made on CUDA.
* ``scaled_dot_product_attention`` picks a kernel by the devices that it was built for: here CUDA's rules are written out.
* ``torch.cuda`` is filled with stand-ins.
"""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo  # before anything is patched, which it would notice
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from networks import lora, lora_product

DEVICE = torch.device("cuda", 0)
_aten = torch.ops.aten
_READS = {_aten._local_scalar_dense.default, _aten.equal.default, _aten.is_nonzero.default}
_SIZED_BY_VALUES = {
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.repeat_interleave.Tensor,
    _aten.unique_dim.default,
    _aten._unique2.default,
    _aten.bincount.default,
}
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}
PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.addmm_.default, _aten.bmm.default, _aten.convolution.default}
_COPIES = {_aten._to_copy.default, _aten.copy_.default}


class FakeCuda(TorchDispatchMode):
    """Runs operations, and keeps what made the host wait.

    Attributes:
        waits: the operation and the line of the project that asked for it, of each wait.
        product_dtypes: of matrix products and convolutions so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.product_dtypes: set[torch.dtype] = set()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._meta_is_cuda = True
        self._registered: list[tuple[int, int]] = []  # pinned host memory

    def __enter__(self) -> FakeCuda:
        self._fake.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._fake.__exit__(*error)

    @contextlib.contextmanager
    def meta_is_meta(self) -> Iterator[None]:
        """Lets code make tensors without memory while the block runs, as models are before they are read."""
        self._meta_is_cuda = False
        try:
            yield
        finally:
            self._meta_is_cuda = True

    def register(self, address: int, num_bytes: int) -> None:
        """Notes that host memory is pinned."""
        self._registered.append((address, address + num_bytes))

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether a tensor's host memory is pinned."""
        if getattr(tensor, "is_pinned_here", False):
            return True
        address = tensor.data_ptr()
        return any(begin <= address < end for begin, end in self._registered)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if self._meta_is_cuda and given.get("device") is not None and torch.device(given["device"]).type == "meta":
            given["device"] = DEVICE
        tensors = _tensors_in(args, given)
        if any(map(self._is_disguised, tensors)):
            args, given = tree_map_only(Tensor, self._as_fake, (args, given))
            tensors = _tensors_in(args, given)
        is_fake = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        target = torch.device(given["device"]) if given.get("device") is not None else None
        if not is_fake and (target is None or target.type != "cuda"):
            with unset_fake_temporarily():
                return self._on_cpu(func, args, given)
        if func in _COPIES:
            self._look_at_copy(func, args, given)
        elif func in _SIZED_BY_VALUES or (func in _INDEXING and any(_waits_as_index(index) for index in args[1])):
            self._note_wait(func)
        elif func in PRODUCTS:
            self._look_at_product(func, tensors)
        if func in _READS:
            self._note_wait(func)
            return _made_up(args[0].dtype)
        if is_fake and target is not None and target.type == "cpu":  # values come back: any will do
            like = args[0]
            with unset_fake_temporarily():
                return torch.ones(like.shape, dtype=given.get("dtype") or like.dtype)
        if func is _aten.copy_.default and not isinstance(args[0], FakeTensor):
            with unset_fake_temporarily():
                return args[0].fill_(1)
        return func(*args, **given)

    def _is_disguised(self, tensor: Tensor) -> bool:
        """Whether only C++ knows that a tensor has become a fake one, because its ``data`` was set."""
        return self._meta_is_cuda and not isinstance(tensor, FakeTensor) and tensor.device.type == "meta"

    def _as_fake(self, tensor: Tensor) -> Tensor:
        if not self._is_disguised(tensor):
            return tensor
        with unset_fake_temporarily():
            like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        return FakeTensor(self._fake, like, DEVICE)

    def _on_cpu(self, func: Any, args: Any, given: Any) -> Any:
        if func is _aten._pin_memory.default:
            pinned = args[0].clone()
            pinned.is_pinned_here = True
            return pinned
        if func is _aten.is_pinned.default:
            return self.is_pinned(args[0])
        return func(*args, **given)

    def _look_at_copy(self, func: Any, args: Any, given: Any) -> None:
        if func is _aten.copy_.default:
            destination, source = args[:2]
            non_blocking = bool(args[2]) if len(args) > 2 else bool(given.get("non_blocking"))
            to_cuda, host = isinstance(destination, FakeTensor), destination
        else:
            (source,), destination = args[:1], None
            non_blocking = bool(given.get("non_blocking"))
            target = given.get("device")
            to_cuda, host = target is None or torch.device(target).type == "cuda", None
        from_cuda = isinstance(source, FakeTensor)
        if from_cuda == to_cuda:
            return
        host = source if to_cuda else host
        if not non_blocking or host is None or not self.is_pinned(host):
            self._note_wait(func)

    def _look_at_product(self, func: Any, tensors: list[Tensor]) -> None:
        dtypes = {tensor.dtype for tensor in tensors}
        if len(dtypes) > 1:  # torch's shape functions let that pass
            raise RuntimeError(f"{func} of more than one dtype: {dtypes}")
        self.product_dtypes |= dtypes

    def _note_wait(self, func: Any) -> None:
        frames = [frame for frame in traceback.extract_stack() if _is_ours(frame.filename)]
        where = f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}: {frames[-1].line}" if frames else "?"
        self.waits.append(f"{func} in {where}")


def _tensors_in(args: Any, given: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves((args, given)) if isinstance(leaf, Tensor)]


def _is_ours(filename: str) -> bool:
    return any(part in filename for part in ("/library/", "/networks/", "/lumina_")) and "site-packages" not in filename


def _waits_as_index(index: Any) -> bool:
    """Whether the host has to count what an index chooses, or to bring the index to the device."""
    return isinstance(index, Tensor) and (index.dtype in (torch.bool, torch.uint8) or not isinstance(index, FakeTensor))


def _made_up(dtype: torch.dtype) -> Any:
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


# ---- torch's own, by the rules of its CUDA build ----


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *given: Any, enable_gqa: bool = False, **more: Any
) -> Tensor:
    """Runs the kernel that CUDA's ``scaled_dot_product_attention`` picks for (B,heads,S,E).

    Raises:
        AssertionError: none but the one that writes out the S x S matrix would do; or cuDNN is asked for what it cannot.
    """
    if not q.is_cuda:
        return _REAL_SDPA(q, k, v, attn_mask, *given, enable_gqa=enable_gqa, **more)
    is_half, grouped = q.dtype in (torch.bfloat16, torch.float16), q.shape[1] != k.shape[1]
    assert enable_gqa or not grouped
    if not torch.backends.cuda.flash_sdp_enabled():  # inside sdpa_kernel
        assert is_half
        assert attn_mask is None
        assert max(q.shape[-1], v.shape[-1]) <= 128
        assert q.shape[-1] % 8 == v.shape[-1] % 8 == 0
        needs_gradients = torch.is_grad_enabled() and q.requires_grad
        return _aten._scaled_dot_product_cudnn_attention(q, k, v, None, needs_gradients, scale=more["scale"])[0]
    if is_half and attn_mask is None and q.shape[-1] <= 256:
        padding = -q.shape[-1] % 8
        q, k, v = (torch.nn.functional.pad(x, (0, padding)) if padding else x for x in (q, k, v))
        out = _aten._scaled_dot_product_flash_attention(q, k, v)[0]
        return out[..., : out.shape[-1] - padding]
    assert not grouped, "only flash kernels share heads, and they take halves without a mask"
    assert q.shape[-1] % (8 if is_half else 4) == 0
    bias = None
    if attn_mask is not None:
        bias = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, float("-inf"))
        bias = bias.expand(*q.shape[:-1], k.shape[2])
    needs_gradients = torch.is_grad_enabled() and q.requires_grad
    return _aten._scaled_dot_product_efficient_attention(q, k, v, bias, needs_gradients)[0]


_REAL_SDPA = torch.nn.functional.scaled_dot_product_attention


class _Stream:
    def __init__(self, device: Any = None) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def synchronize(self) -> None:
        raise AssertionError("the host waits for a stream")


class _Event:
    def record(self, stream: Any = None) -> None:
        pass


def _cudart(mode: FakeCuda) -> Any:
    def register(address: int, num_bytes: int, flags: int) -> int:
        mode.register(address, num_bytes)
        return 0

    return SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=lambda address: 0)


_GIB = 2**30
_CURRENT = _Stream()


def _stand_ins(mode: FakeCuda) -> dict[str, Any]:
    """Returns what takes the place of ``torch.cuda``'s functions: an H100 that nothing is on."""
    return {
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "a stand-in",
        "is_bf16_supported": lambda including_emulation=True: True,
        "current_device": lambda: 0,
        "mem_get_info": lambda device=None: (79 * _GIB, 80 * _GIB),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "max_memory_reserved": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: mode._note_wait("synchronize"),
        "Stream": _Stream,
        "Event": _Event,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device=None: _CURRENT,
        "cudart": lambda: _cudart(mode),
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
    }


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Has a CUDA device, ``DEVICE``, while the block runs.

    Skips the test where there is a real one, and where torch's fake tensors take no part: 2.11's go by what C++ says of
    a tensor's device.
    """
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, and tests/gpu for it")
    if TorchVersion(torch.__version__) < (2, 13):
        pytest.skip(
            f"the stand-in for CUDA needs the fake tensors of torch 2.13 or newer, and this is {torch.__version__}"
        )
    make_subclass = Tensor._make_subclass
    mode = FakeCuda()

    def made(cls: type, *args: Any, **given: Any) -> Tensor:
        if cls is FakeTensor and given["device_for_backend_keys"].type == "cuda":
            given["dispatch_device"] = False  # "meta" in C++
        return make_subclass(cls, *args, **given)

    def values(tensor: Tensor) -> Any:
        return tensor.cpu().tolist() if isinstance(tensor, FakeTensor) else to_list(tensor)

    to_list = Tensor.tolist
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "_make_subclass", staticmethod(made))
        patch.setattr(FakeTensor, "is_cuda", property(lambda tensor: tensor.device.type == "cuda"), raising=False)
        patch.setattr(FakeTensor, "is_cpu", property(lambda tensor: tensor.device.type == "cpu"), raising=False)
        patch.setattr(FakeTensor, "is_meta", property(lambda tensor: tensor.device.type == "meta"), raising=False)
        patch.setattr(FakeTensor, "tolist", values)
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", _sdpa)
        # A fake tensor's mode is no observer that may hold an operation's result.
        for module in (lora, lora_product):
            patch.setattr(module, "is_observed", lambda: _num_observers() > 0)
        patch.setattr(fake_tensor, "init_gpu_context", lambda device: None, raising=False)
        patch.setattr(torch.utils, "swap_tensors", _swapped)
        for name, stand_in in _stand_ins(mode).items():
            patch.setattr(torch.cuda, name, stand_in)
        with mode, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            yield mode


def _swapped(old: Tensor, new: Tensor) -> None:
    """Does what ``torch.utils.swap_tensors`` does to parameters where nothing changes; it does not like fake tensors."""
    if (old.device, old.dtype) != (new.device, new.dtype):
        _REAL_SWAP(old, new)


_REAL_SWAP = torch.utils.swap_tensors


def _num_observers() -> int:
    return torch._C._len_torch_dispatch_stack() - 2  # besides FakeCuda and FakeTensorMode
