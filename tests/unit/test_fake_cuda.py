"""The stand-in for a CUDA device finds what it is for: devices that are mixed, and a host that waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from fake_cuda_helpers import DEVICE, FakeCuda, fake_cuda
from torch import Tensor, nn


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with fake_cuda() as mode:
        yield mode


def test_gradients_stay_on_the_device_and_host_values_are_real(cuda: FakeCuda) -> None:
    linear = nn.Linear(8, 4).to(DEVICE, torch.bfloat16)
    x = torch.ones(3, 8, device=DEVICE, dtype=torch.bfloat16)
    assert x.is_cuda
    assert linear.weight.is_cuda
    linear(x).float().square().mean().backward()
    assert linear.weight.grad is not None
    assert (linear.weight.grad.device, linear.weight.grad.dtype) == (DEVICE, torch.bfloat16)
    assert (torch.arange(3) * 2).tolist() == [0, 2, 4]
    assert len(cuda.waits) == 2  # the weight and the bias on their way to the device


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x + torch.ones(3),
        lambda x: F.linear(x, torch.ones(2, 3)),
        lambda x: torch.cat([x, torch.ones(3)]),
    ],
    ids=["sum", "linear", "cat"],
)
@pytest.mark.usefixtures("cuda")
def test_mixed_devices_are_an_error(mix: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        mix(torch.ones(3, device=DEVICE))


@pytest.mark.usefixtures("cuda")
def test_mixed_dtypes_are_an_error_where_cuda_would_have_them_so() -> None:
    with pytest.raises(RuntimeError, match="dtype"):
        F.linear(torch.ones(2, 3, device=DEVICE), torch.ones(2, 3, device=DEVICE, dtype=torch.bfloat16))


WAITING: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "float": lambda x: float(x[0]),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.cpu().numpy(),
    "equal": lambda x: torch.equal(x, x + 1),
    "a slice that goes by a value": lambda x: x[: x.argmax()],
    "assignment": lambda x: x.__setitem__(0, torch.tensor(1.0)),
    "a list of numbers": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "an index in host memory": lambda x: x[torch.tensor([0, 1])],
    "a copy from ordinary memory": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "a copy that waits": lambda x: torch.ones(3).pin_memory().to(x.device),
    "a copy back": lambda x: torch.empty(3).copy_(x),
}


@pytest.mark.parametrize("name", WAITING)
def test_what_waits_is_noted(cuda: FakeCuda, name: str) -> None:
    x = torch.ones(3, device=DEVICE)
    assert cuda.waits == []
    WAITING[name](x)
    assert len(cuda.waits) >= 1


@pytest.mark.parametrize("indexed", [lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: x.masked_select(x > 0)])
def test_results_whose_size_depends_on_values_are_noted(cuda: FakeCuda, indexed: Callable[[Tensor], object]) -> None:
    with pytest.raises(RuntimeError):  # fake tensors have no such size
        indexed(torch.ones(3, device=DEVICE))
    assert len(cuda.waits) == 1


def test_what_does_not_wait_is_not_noted(cuda: FakeCuda) -> None:
    x = torch.ones(3, device=DEVICE)
    pinned = torch.tensor([0, 2]).pin_memory().to(DEVICE, non_blocking=True)
    indexed = x[pinned].sum() + x[1:].sum()
    torch.where(x > 0, x, 1.0).add_(2.0)[0].fill_(3.0)
    assert indexed.shape == ()
    assert cuda.waits == []


@pytest.mark.usefixtures("cuda")
def test_attention_that_would_write_out_the_scores_is_an_error() -> None:
    q, k = (torch.ones(1, heads, 8, 16, device=DEVICE, dtype=torch.bfloat16) for heads in (4, 2))
    mask = torch.ones(1, 1, 1, 8, device=DEVICE, dtype=torch.bool)
    assert F.scaled_dot_product_attention(q, k, k, enable_gqa=True).shape == q.shape
    with pytest.raises(AssertionError, match="flash"):
        F.scaled_dot_product_attention(q, k, k, attn_mask=mask, enable_gqa=True)
    with pytest.raises(AssertionError, match="flash"):
        F.scaled_dot_product_attention(q.float(), k.float(), k.float(), enable_gqa=True)
