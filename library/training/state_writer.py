"""Writes a running training as a state."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.keyed_random import key
from library.training.loop import Loop
from library.training.run_facts import versions
from library.training.state import StateContent, own_tensors, write_state
from library.training.updater import Updater


@dataclass
class StateWriter:
    """What of a run goes into its states; called with a folder it writes one.

    Attributes:
        run: name that the states of a run and of its continuations share; None: a new one.
        facts: from :func:`library.training.run_facts.run_facts`.
        settings: from :func:`library.training.run_facts.plain_settings`.
        network: its parameters and buffers are kept in their dtype.
        updater: optimizer, schedule and average.
        loop: position and the loss's averages.
        on_cuda: whether CUDA's random numbers are in use.
    """

    run: str | None
    facts: Mapping[str, Any]
    settings: Mapping[str, Any]
    network: nn.Module
    updater: Updater
    loop: Loop
    on_cuda: bool

    def __post_init__(self) -> None:
        if self.run is None:
            self.run = f"{key('run', self.facts['seed'], str(time.time_ns())):016x}"

    def __call__(self, folder: Path, events_done: bool) -> None:
        """Writes the state.

        Args:
            folder: which it becomes.
            events_done: whether all that happens at the end of an epoch has happened, where one ends here.

        Raises:
            OSError: it cannot be written.
            CannotBeKept: the optimizer remembers what fits into no file.
        """
        # Our own draws are keyed; torch's generators are for network modules that draw from them.
        random = {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if self.on_cuda else None}
        memory = {
            "updater": self.updater.state_dict(),
            "progress": self.loop.parts.progress.state_dict(),
            "random": random,
        }
        content = StateContent(
            position=self.loop.position(events_done),
            run=str(self.run),
            facts=self.facts,
            settings=self.settings,
            versions=versions(),
            network=own_tensors(self.network),
            memory=memory,
        )
        write_state(folder, content)
