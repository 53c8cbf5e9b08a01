"""What changes the network once gradients are there: clipping, optimizer, learning rate, limits on norms, averages."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from library.errors import SettingsError
from library.training.ema import MovingAverage
from library.training.optimizer_state import OptimizerState, ScheduleState
from library.training.optimizers import clip_gradients, goes_by_the_loss, used_rate

logger = logging.getLogger(__name__)


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
        average: MovingAverage | None = None,
    ) -> None:
        """Takes over a fresh optimizer and a fresh schedule.

        Args:
            network: what is trained.
            optimizer: over the network's parameters, ready to train.
            scheduler: of the optimizer's learning rates.
            group_names: of the optimizer's groups, for the log.
            max_grad_norm: gradients are scaled down to this norm; 0 leaves them.
            scale_weight_norms: modules are scaled down to this norm; None leaves them.
            average: moved after every step.
        """
        self.network = network
        self.optimizer = optimizer
        self.scheduler: Any = scheduler  # torch's types do not say that some schedules are told a loss
        self._group_names = group_names
        self._max_grad_norm = max_grad_norm
        self._scale_weight_norms = scale_weight_norms
        self._average = average
        self._goes_by_the_loss = goes_by_the_loss(scheduler)
        self._was_validated = False
        self._validated_step: int | None = None
        self._optimizer_state = OptimizerState(optimizer)
        self._schedule_state = ScheduleState(scheduler)
        self.parameters: list[torch.nn.Parameter] = [
            parameter for group in optimizer.param_groups for parameter in group["params"]
        ]

    def in_order_of_use(self) -> list[torch.nn.Parameter]:
        """Returns ``parameters`` about in the order that a forward pass uses them in: as the network's modules stand.

        The optimizer's groups do not stand so: LoRA+ has one with every ``lora_down`` and one with every ``lora_up``.
        """
        places = {id(parameter): place for place, parameter in enumerate(self.network.parameters())}
        return sorted(self.parameters, key=lambda parameter: places.get(id(parameter), 0))

    def clip(self) -> Tensor:
        """Scales the gradients down where they are too long; returns the norm that they had."""
        return clip_gradients(self.parameters, self._max_grad_norm)

    def apply(self) -> dict[str, float]:
        """Takes one optimizer step with the gradients that are there and clears them; returns what is worth logging.

        Raises:
            SettingsError: a schedule of the user's own has come to its end.
        """
        self.optimizer.step()
        values = self._rates()
        if not self._goes_by_the_loss:
            self._step_schedule()
        self.optimizer.zero_grad(set_to_none=True)
        if self._scale_weight_norms is not None:
            scaled, mean, largest = self.network.apply_max_norm_regularization(
                self._scale_weight_norms, self.parameters[0].device
            )
            values |= {"max_norm/keys_scaled": scaled, "norm/avg_key_norm": mean, "max_norm/max_key_norm": largest}
        if self._average is not None:
            self._average.update()
        return values

    def _step_schedule(self) -> None:
        try:
            self.scheduler.step()
        except (ValueError, ArithmeticError) as error:  # OneCycleLR has too few steps, StepLR none
            raise SettingsError(
                f"--lr_scheduler_args: {type(self.scheduler).__name__} gives no further learning rate: {error}; mend its"
                " number of steps"
            ) from error

    def _rates(self) -> dict[str, float]:
        """Returns the rates of the step that was just taken, and what a self-tuning optimizer makes of them."""
        values = {}
        for name, group in zip(self._group_names, self.optimizer.param_groups, strict=True):
            values[f"lr/{name}"] = used_rate(self.optimizer, group)
            if "d" in group:
                values[f"lr/d*lr/{name}"] = float(group["d"]) * float(group.get("effective_lr", group["lr"]))
        return values

    def after_epoch(self, mean_loss: float) -> None:
        """Tells a schedule that goes by the loss the epoch's mean training loss, unless it goes by validation.

        Args:
            mean_loss: the same in all processes.
        """
        if self._goes_by_the_loss and not self._was_validated:
            self._tell(mean_loss)

    def after_validation(self, loss: float, step: int) -> None:
        """Tells a schedule that goes by the loss the validation loss; from then on it goes by nothing else.

        Args:
            loss: the same in all processes.
            step: the optimizer step that it was measured after; a second telling of one step changes nothing.
        """
        if not self.awaits_validation(step):
            return
        self._validated_step = step
        if not self._was_validated:
            self._was_validated = True
            self._schedule_state.restart()  # the best loss in training says nothing about losses in validation
        self._tell(loss)

    def awaits_validation(self, step: int) -> bool:
        """Whether the schedule goes by the loss and has not been told of a validation after this optimizer step."""
        return self._goes_by_the_loss and step != self._validated_step

    def _tell(self, loss: float) -> None:
        before = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.scheduler.step(loss)
        after = [float(group["lr"]) for group in self.optimizer.param_groups]
        if after != before:
            changes = zip(self._group_names, before, after, strict=True)
            logger.info("Learning rate: %s", ", ".join(f"{name} {a:g} -> {b:g}" for name, a, b in changes))

    @torch.no_grad()
    def norms(self) -> dict[str, float]:
        """Returns the norm of all trained parameters and of each group's; the device is waited for once."""
        groups = [torch.stack(torch._foreach_norm(group["params"])).float() for group in self.optimizer.param_groups]
        found = torch.stack([norms.norm() for norms in groups])
        total, *each = torch.cat([found.norm().reshape(1), found]).tolist()
        values = {"norm/lora": total}
        if len(each) > 1:
            values |= {f"norm/lora/{name}": norm for name, norm in zip(self._group_names, each, strict=True)}
        return values

    def state_dict(self) -> dict[str, Any]:
        """Returns what a later run needs to go on exactly, as copies: tensors on the CPU, plain values, lists, dicts.

        To be called between steps and outside of :meth:`Weights.in_use`; the network's parameters of that moment belong
        to it. Numbers may be infinite.
        """
        return {
            "optimizer": self._optimizer_state.state_dict(),
            "schedule": self._schedule_state.state_dict(),
            "was_validated": self._was_validated,
            "validated_step": self._validated_step,
            "average": None if self._average is None else self._average.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state; the network's parameters of that state must be in place already.

        Raises:
            SettingsError: the state is of another optimizer or another network.
        """
        self._optimizer_state.load_state_dict(state["optimizer"])
        self._schedule_state.load_state_dict(state["schedule"])
        self._was_validated = bool(state["was_validated"])
        self._validated_step = state["validated_step"]
        if self._average is not None:
            if state["average"] is None:
                logger.warning("The state to resume holds no moving average; --ema_decay starts one from here")
            self._average.load_state_dict(state["average"])
        elif state["average"] is not None:
            logger.warning("The state to resume holds a moving average, which ends here without --ema_decay")
