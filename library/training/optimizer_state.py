"""Optimizer and schedule as plain values: tensors, numbers, texts, None, and lists and dictionaries of them.

Only what has changed since the optimizer and its schedule were made is kept. The rest comes from the flags again, so a
run that goes on with the same flags goes on exactly, and one that changes the weight decay or the schedule's length
gets what it asks for.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from library.errors import SettingsError

logger = logging.getLogger(__name__)

_NOT_PLAIN = object()


def plain(value: Any) -> Any:
    """Returns a value as copies of tensors on the CPU, plain values, lists, and dictionaries with texts as keys.

    What has no such form (functions, dtypes, objects) is left out of lists' and dictionaries' entries.
    """
    found = _plain(value)
    return None if found is _NOT_PLAIN else found


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        entries = {str(key): _plain(entry) for key, entry in value.items()}
        return {key: entry for key, entry in entries.items() if entry is not _NOT_PLAIN}
    if isinstance(value, (list, tuple)):
        listed = [_plain(entry) for entry in value]
        return _NOT_PLAIN if any(entry is _NOT_PLAIN for entry in listed) else listed
    if hasattr(value, "item") and not isinstance(value, type):  # numpy's numbers
        return _plain(value.item())
    return _NOT_PLAIN


def _changed(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in now.items() if key not in before or not _same(value, before[key])}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def _as_before(saved: Any, before: Any, device: torch.device) -> Any:
    """Returns a saved value in the form that the optimizer had it in: a tuple, a tensor on the device."""
    if isinstance(saved, Tensor):
        return saved.to(device)
    return tuple(saved) if isinstance(before, tuple) else copy.deepcopy(saved)


class OptimizerState:
    """Reads and restores one optimizer's state."""

    def __init__(self, optimizer: Optimizer) -> None:
        """Remembers what the optimizer was made with; to be called before its first step and after its schedule."""
        self._optimizer = optimizer
        self._made_with = [self._settings_of(group) for group in optimizer.param_groups]

    @staticmethod
    def _settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
        return plain({key: value for key, value in group.items() if key != "params"})

    @property
    def _class_name(self) -> str:
        found = type(self._optimizer)
        return f"{found.__module__}.{found.__qualname__}"

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, with each parameter's part under its index in the order of the groups."""
        groups = self._optimizer.param_groups
        changed = [
            _changed(self._settings_of(group), made) for group, made in zip(groups, self._made_with, strict=True)
        ]
        return {
            "class": self._class_name,
            "sizes": [len(group["params"]) for group in groups],
            "groups": changed,
            "parameters": plain(self._optimizer.state_dict()["state"]),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state.

        Raises:
            SettingsError: it is of another optimizer, or of a network with other parameters.
        """
        groups = self._optimizer.param_groups
        sizes = [len(group["params"]) for group in groups]
        if state["class"] != self._class_name:
            raise SettingsError(
                f"--resume: the state is of the optimizer {state['class']}, but this run's is {self._class_name}; give the"
                " same --optimizer_type, or start anew from the LoRA with --network_weights"
            )
        if list(state["sizes"]) != sizes:
            raise SettingsError(
                f"--resume: the state is of {list(state['sizes'])} trained tensors, but this run trains {sizes}; give the"
                " same network flags and learning rates, or start anew from the LoRA with --network_weights"
            )
        whole = self._optimizer.state_dict()
        whole["state"] = {int(key) if key.isdigit() else key: value for key, value in state["parameters"].items()}
        for group, packed, saved in zip(groups, whole["param_groups"], state["groups"], strict=True):
            device = group["params"][0].device
            packed |= {key: _as_before(value, group.get(key), device) for key, value in saved.items()}
        self._optimizer.load_state_dict(whole)
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        for key, value in state["parameters"].items():
            if key.isdigit():
                self._keep_dtypes(parameters[int(key)], value)

    def _keep_dtypes(self, parameter: torch.nn.Parameter, saved: Mapping[str, Any]) -> None:
        """Undoes the casts to the parameter's dtype that torch makes, and lets paged states be paged again."""
        optimizer: Any = self._optimizer
        found = optimizer.state[parameter]
        pages = getattr(optimizer, "is_paged", False)
        for key, value in found.items():
            original = saved.get(key)
            if isinstance(value, Tensor) and isinstance(original, Tensor) and value.dtype != original.dtype:
                found[key] = original.to(value.device)
            elif pages and key in ("state1", "state2"):
                buffer = optimizer.get_state_buffer(parameter, dtype=value.dtype)
                found[key] = buffer.copy_(value)


class ScheduleState:
    """Reads and restores one schedule's state."""

    def __init__(self, scheduler: LRScheduler) -> None:
        """Remembers what the schedule was made with; to be called before its first step."""
        self._scheduler = scheduler
        self._made_with = plain(scheduler.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Returns what has changed since the schedule was made."""
        return _changed(plain(self._scheduler.state_dict()), self._made_with)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state; a schedule that only counts steps gives its rates anew, by its flags of now."""
        scheduler = self._scheduler
        scheduler.load_state_dict({**scheduler.state_dict(), **copy.deepcopy(dict(state))})
        if type(scheduler) is LambdaLR:
            step = scheduler.last_epoch
            courses = zip(scheduler.base_lrs, scheduler.lr_lambdas, scheduler.optimizer.param_groups, strict=True)
            for rate, course, group in courses:
                group["lr"] = rate * course(step)

    def restart(self) -> None:
        """Lets the schedule begin again; the rates stay as they are."""
        self._scheduler.load_state_dict({**self._scheduler.state_dict(), **copy.deepcopy(self._made_with)})
