"""What changes the network once gradients are there: clipping, optimizer, learning rate, limits on norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from library.training.optimizers import clip_gradients


class Updater:
    """Drives the optimizer and its learning rate.

    Attributes:
        parameters: everything that is trained, in the order of the optimizer's groups.
    """

    def __init__(
        self,
        network: Any,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        group_names: Sequence[str],
        max_grad_norm: float,
        scale_weight_norms: float | None,
    ) -> None:
        self.network = network
        self.optimizer = optimizer
        self.scheduler = scheduler
        self._group_names = group_names
        self._max_grad_norm = max_grad_norm
        self._scale_weight_norms = scale_weight_norms
        self.parameters: list[torch.nn.Parameter] = [
            parameter for group in optimizer.param_groups for parameter in group["params"]
        ]

    def state_dict(self) -> dict[str, Any]:
        """Returns what optimizer and schedule remember: tensors and plain values."""
        return {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from what :meth:`state_dict` returned.

        Raises:
            ValueError: it belongs to another optimizer or network.
        """
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])

    def clip(self) -> Tensor:
        """Scales the gradients down where they are too long; returns the norm that they had."""
        return clip_gradients(self.parameters, self._max_grad_norm)

    def apply(self) -> dict[str, float]:
        """Takes one optimizer step with the gradients that are there and clears them; returns what is worth logging."""
        rates = self.scheduler.get_last_lr()
        values = {f"lr/{name}": float(rate) for name, rate in zip(self._group_names, rates, strict=True)}
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self._scale_weight_norms is not None:
            scaled, mean, largest = self.network.apply_max_norm_regularization(
                self._scale_weight_norms, self.parameters[0].device
            )
            values |= {"max_norm/keys_scaled": scaled, "norm/avg_key_norm": mean, "max_norm/max_key_norm": largest}
        return values
