"""Recomputation gives the same gradients and keeps less."""

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from library.errors import SettingsError
from library.memory import recompute
from library.memory.recompute import recompute_in_backward


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.calls = 0

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        self.calls += 1
        return x + torch.tanh(self.linear(x)) * scale


def test_gradients_are_the_same_and_blocks_run_twice() -> None:
    torch.manual_seed(0)
    plain = Block()
    wrapped = Block()
    wrapped.load_state_dict(plain.state_dict())
    recompute_in_backward([wrapped], preserve_rng_state=False)
    x = torch.randn(2, 8)
    for block in (plain, wrapped):
        block(x, scale=0.5).sum().backward()
    assert torch.equal(plain.linear.weight.grad, wrapped.linear.weight.grad)
    assert (plain.calls, wrapped.calls) == (1, 2)


def test_without_gradients_nothing_is_recomputed() -> None:
    block = Block()
    recompute_in_backward([block], preserve_rng_state=False)
    with torch.no_grad():
        block(torch.ones(1, 8))
    assert block.calls == 1


def test_activations_are_not_kept() -> None:
    kept: list[int] = []
    block = Block()
    recompute_in_backward([block], preserve_rng_state=False)
    x = torch.randn(4, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        block(x)
    assert sum(kept) <= x.numel()  # the input at most


class WritesOver(nn.Module):
    """A Linear's result is changed in place, as some network modules do; on a tensor (B,S,in) it is a view of a product."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=False)
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.linear(x)
        if self.how == "method":
            return result.add_(torch.tanh(x))
        if self.how == "of a part":
            result[..., :4].mul_(2)
            return result
        if self.how == "out":
            torch.add(x.detach(), 1, out=result.detach())
            return result
        return (result * 2).add_(1)


class Untold:
    """torch 2.11's ``SelectiveCheckpointContext``: it has no ``op_output``."""

    def __init__(self, *, is_recompute: bool, op_output: object = None) -> None:
        self.is_recompute = is_recompute


@pytest.fixture(params=["as it is", "2.11"])
def torchs_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways in which versions of torch call the policy."""
    if request.param == "2.11":
        monkeypatch.setattr(torch.utils.checkpoint, "SelectiveCheckpointContext", Untold)
        monkeypatch.setattr(recompute, "_TELLS_RESULTS", False)


@pytest.mark.usefixtures("torchs_way")
@pytest.mark.parametrize("how", ["method", "of a part", "out"])
@pytest.mark.parametrize("shape", [(2, 3, 8), (6, 8)])
def test_selective_refuses_what_writes_over_a_result_that_it_keeps(how: str, shape: tuple[int, ...]) -> None:
    block = WritesOver(how)
    recompute_in_backward([block], preserve_rng_state=False, level="selective")
    with pytest.raises(SettingsError, match="--gradient_checkpointing_level full"):
        block(torch.ones(shape, requires_grad=True))


@pytest.mark.usefixtures("torchs_way")
def test_selective_lets_other_results_be_written_over() -> None:
    torch.manual_seed(0)
    gradients = []
    block = WritesOver("not what is kept")
    x = torch.randn(2, 3, 8)
    for level in ("none", "selective"):
        if level == "selective":
            recompute_in_backward([block], preserve_rng_state=False, level="selective")
        block.zero_grad()
        block(x).square().sum().backward()
        gradients.append(block.linear.weight.grad)
    assert torch.equal(*gradients)
