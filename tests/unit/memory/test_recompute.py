"""Recomputation gives the same gradients and keeps less."""

import torch
from torch import nn

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
