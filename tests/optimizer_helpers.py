"""A real LoRA in training on the small Next-DiT, and optimizers that stand for other people's packages."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch
from lora_helpers import cases, small_next_dit, velocity
from torch import Tensor
from torch.optim import SGD

from library.training import optimizers
from library.training.ema import MovingAverage
from library.training.settings import OptimizerSettings
from library.training.updater import Updater
from library.training.weights import Weights
from networks.lora_lumina import create_network

RANK = 64  # gives tensors of 4096 values and more, from which on bitsandbytes keeps 8-bit states


class FakePlusScheduleFree(SGD):
    """Has what prodigyplus-like packages have: two modes, and a rate of its own in each group."""

    def __init__(self, params: Iterable[Any], lr: float = 1.0, d0: float = 1e-2) -> None:
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group |= {"d": d0, "effective_lr": lr, "train_mode": False}

    def train(self) -> None:
        self._switch(True, 0.9)

    def eval(self) -> None:
        self._switch(False, 1 / 0.9)

    @torch.no_grad()
    def _switch(self, on: bool, factor: float) -> None:
        for group in self.param_groups:
            if group["train_mode"] != on:
                for parameter in group["params"]:
                    parameter.mul_(factor)
                group["train_mode"] = on

    def step(self, closure: None = None) -> None:
        if not self.param_groups[0]["train_mode"]:
            raise RuntimeError("not in train mode")
        super().step(closure)
        for group in self.param_groups:
            group["d"] *= 1.5


class SmallTraining:
    """The parts of a run around the optimizer, made as ``NetworkTrainer.build_optimizer`` makes them."""

    def __init__(
        self, num_steps: int, lora_plus: bool = False, dtype: torch.dtype = torch.float32, **values: Any
    ) -> None:
        settings = OptimizerSettings(**{"learning_rate": 1e-3, **values})
        torch.manual_seed(0)
        self.dit = small_next_dit()
        plus = {"loraplus_lr_ratio": "2"} if lora_plus else {}
        self.network = create_network(1.0, RANK, RANK, None, None, self.dit, **plus)
        self.network.apply_to([], self.dit, False, True)
        self.network.to(dtype)
        groups, self.names = self.network.prepare_optimizer_params_with_multiple_te_lrs(
            None, None, settings.learning_rate
        )
        self.optimizer = optimizers.build_optimizer(settings, groups)
        scheduler = optimizers.build_scheduler(settings, self.optimizer, num_steps)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        average = None if settings.ema_decay is None else MovingAverage(parameters, settings.ema_decay)
        self.weights = Weights(self.network, self.optimizer, average)
        self.updater = Updater(self.network, self.optimizer, scheduler, self.names, 1.0, None, average)
        self._recorded = cases()
        self._target = torch.randn(velocity(self.dit, self._recorded).shape)
        self.logged: list[dict[str, float]] = []

    def loss(self) -> Tensor:
        return (velocity(self.dit, self._recorded) - self._target).square().mean()

    def run(self, num_steps: int) -> list[float]:
        """Trains, and returns the losses."""
        losses = []
        for _ in range(num_steps):
            loss = self.loss()
            loss.backward()
            losses.append(float(loss.detach()))
            self.updater.clip()
            self.logged.append(self.updater.apply())
        return losses

    def tensors(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.updater.parameters]


def equal(first: Iterable[Tensor], second: Iterable[Tensor]) -> bool:
    """Whether all tensors are equal bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def through_a_file(state: Any) -> Any:
    """Returns a state as it comes back from JSON beside a list of tensors."""
    tensors: list[Tensor] = []

    def take(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors.append(value)
            return {"tensor": len(tensors) - 1}
        if isinstance(value, dict):
            return {key: take(entry) for key, entry in value.items()}
        return [take(entry) for entry in value] if isinstance(value, list) else value

    def give(value: Any) -> Any:
        if isinstance(value, dict):
            if set(value) == {"tensor"}:
                return tensors[value["tensor"]]
            return {key: give(entry) for key, entry in value.items()}
        return [give(entry) for entry in value] if isinstance(value, list) else value

    return give(json.loads(json.dumps(take(state))))
