"""The trainer in this process, up to where a test wants it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from library.training.arguments import parse_arguments
from lumina_train_network import LuminaNetworkTrainer

STEPS = (
    "check_inputs",
    "start",
    "rehearse_network",
    "build_data",
    "cache_latents",
    "plan_steps",
    "cache_text",
    "load_models",
    "build_network",
    "build_optimizer",
)


def made_trainer(argv: Sequence[str], last: str = "build_optimizer") -> Any:
    """Returns the trainer of a command line after the steps of a run up to ``last``; see :func:`fresh_accelerate`."""
    fresh_accelerate()
    config = parse_arguments(argv)
    assert config is not None
    trainer = LuminaNetworkTrainer(config)
    for step in STEPS[: STEPS.index(last) + 1]:
        getattr(trainer, step)()
    return trainer


def fresh_accelerate() -> None:
    """Forgets accelerate's state, of which a process has only one."""
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(True)
    PartialState._reset_state()


def fill_network(network: Any, seed: int = 0, size: float = 0.05) -> None:
    """Gives every parameter a random value, so that the network's part of the output is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)


def gradients(network: Any) -> dict[str, torch.Tensor]:
    """Returns a copy of every gradient by the parameter's name, and clears them."""
    found = {name: value.grad.clone() for name, value in network.named_parameters() if value.grad is not None}
    for parameter in network.parameters():
        parameter.grad = None
    return found


def step(trainer: Any) -> dict[str, torch.Tensor]:
    """Returns the losses and the gradients of a batch."""
    torch.manual_seed(0)
    batch = trainer.data.load(trainer.data.plan_epoch(1, 1).batch(0).draws)
    losses = trainer.losses_of(batch).values
    losses.sum().backward()
    return {"losses": losses.detach(), **gradients(trainer.network)}
