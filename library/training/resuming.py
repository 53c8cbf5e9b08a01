"""Continuing a run: which state, what of it, and what has changed since.

``--resume`` takes a state of this program, ``latest``, or a state folder of sd-scripts, whose weights alone can be used.
This module imports nothing heavy at once, so that a wrong ``--resume`` shows before anything is loaded.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import SettingsError, UserError, some
from library.training.other_networks import require_loaded
from library.training.report import RunPlan
from library.training.run_facts import changes, in_words
from library.training.state import (
    JSON_FILE,
    Position,
    StateError,
    StateHeader,
    StateNames,
    is_complete,
    own_tensors,
    read_header,
    read_tensors,
)

if TYPE_CHECKING:
    from torch import nn

    from library.training.arguments import TrainConfig
    from library.training.processes import Processes
    from library.training.progress import Progress
    from library.training.updater import Updater

logger = logging.getLogger(__name__)

LATEST = "latest"
_FOREIGN_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class ForeignState:
    """A state folder of sd-scripts (accelerate): its weights, and the step that it says to stand at."""

    path: Path
    step: int | None

    @property
    def weights(self) -> Path:
        """The file of the network's weights."""
        return self.path / _FOREIGN_WEIGHTS


class Resuming:
    """What a run continues, if anything.

    Attributes:
        header: the state of this program, or None.
        foreign: the state of sd-scripts, or None.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._settings = config.state
        self.header: StateHeader | None = None
        self.foreign: ForeignState | None = None
        self._memory: Mapping[str, Any] = {}

    # Which state

    def check(self) -> None:
        """Looks at what ``--resume`` names, before anything is loaded; a state on the hub is downloaded.

        Raises:
            SettingsError: it cannot be understood.
            StateError: it is no state, or a damaged one.
        """
        name = self._settings.resume
        if self._config.hub.resume_from_huggingface:
            from library.training.hub import download_state

            if not name:
                raise SettingsError(
                    "--resume_from_huggingface: --resume is missing, which names the state on the hub; add"
                    " --resume=owner/name/folder"
                )
            self._take(download_state(name, self._config.hub))
        elif name and name != LATEST:
            self._take(Path(name).expanduser())

    def _take(self, path: Path) -> None:
        if (path / JSON_FILE).exists():
            self.header = read_header(path)
        else:
            self.foreign = _foreign_state(path)

    def find(self, processes: Processes, names: StateNames) -> None:
        """Removes what killed runs left half-written, and finds the state that ``latest`` means, for all processes.

        Raises:
            StateError: a process does not see the state that the first one found.
        """
        chosen = None
        if processes.is_main:
            leftovers = names.remove_leftovers()
            if leftovers:
                logger.info("Removed what a run that was killed had not written completely: %s", some(leftovers))
            if self._settings.resume == LATEST and self.is_new:
                newest = names.newest()
                chosen = str(newest.path) if newest is not None else None
                if newest is None:
                    logger.warning(
                        "--resume=latest: there is no training state of this --output_name in %s yet; the run starts from"
                        " the beginning",
                        names.folder,
                    )
        chosen = processes.gather([chosen])[0][0]
        if chosen is not None:
            self.header = read_header(Path(chosen))

    @property
    def is_new(self) -> bool:
        """Whether the run continues no state."""
        return self.header is None and self.foreign is None

    @property
    def seed(self) -> int | None:
        """The seed of the run that is continued."""
        return int(self.header.facts["seed"]) if self.header is not None else None

    @property
    def run(self) -> str | None:
        """The name that the states of the run that is continued share."""
        return self.header.run if self.header is not None else None

    def continues_at(self, step: int) -> bool:
        """Whether the run goes on from this optimizer step because its state stood there."""
        return self.header is not None and self.header.position.step == step

    # Putting it in place

    def restore(
        self,
        network: nn.Module,
        updater: Updater,
        plan: RunPlan,
        facts: Mapping[str, Any],
        settings: Mapping[str, Any],
    ) -> Position:
        """Puts the state's weights and memory in place, says what is continued, and returns where the run goes on.

        Args:
            network: just made.
            updater: with optimizer and schedule just made.
            plan: length of this run.
            facts: of this run, from :func:`library.training.run_facts.run_facts`.
            settings: of this run, from :func:`library.training.run_facts.plain_settings`.

        Raises:
            StateError: the state does not fit network or optimizer.
            SettingsError: ``--initial_epoch`` or ``--initial_step`` lie behind the end of the run.
        """
        from library.training.schedule_position import FreshValues

        fresh = FreshValues(updater.optimizer, updater.scheduler)
        initial = self._initial_step(plan)
        if self.foreign is not None:
            self._restore_foreign(network, self.foreign)
        if self.header is None:
            position = Position.of_step(initial or 0, plan.steps_per_epoch, int(facts["accumulation"]))
            follows = position.step > 0
            if follows:
                self._tell_of_shift(position.step, plan)
        else:
            before = self.header
            changed = changes(before, facts, settings)
            self._load(before, network, updater, facts)
            position = self._position(before, plan, facts, initial)
            self._tell(before, position, plan, facts, changed)
            fresh.put_back(name for one in changed for name in one.optimizer_arguments)
            follows = (position.step, plan.num_steps) != (before.position.step, before.facts["num_steps"])
            follows = follows or any(one.in_schedule for one in changed)
        if follows:
            fresh.move_schedule(position.step)
        self._load_random_state()
        return position

    def _tell_of_shift(self, step: int, plan: RunPlan) -> None:
        logger.warning(
            "The run starts after step %d of %d without the memory of a training state: only the count of steps, the order"
            " of the pictures and the learning rate's schedule go on from there; the optimizer begins anew",
            step,
            plan.num_steps,
        )

    def load_progress(self, progress: Progress) -> None:
        """Continues the running averages of the loss."""
        if "progress" in self._memory:
            progress.load_state_dict(self._memory["progress"])

    def _load_random_state(self) -> None:
        """Continues torch's own random numbers, which other people's network modules may draw from."""
        import torch

        random = self._memory.get("random")
        if not random:
            return
        torch.set_rng_state(random["torch"])
        if torch.cuda.is_available() and random["cuda"] is not None:
            torch.cuda.set_rng_state(random["cuda"])

    def _initial_step(self, plan: RunPlan) -> int | None:
        """Returns the step that the flags ask to start after."""
        step = self._settings.first_step(plan.steps_per_epoch)
        if step is not None and step >= plan.num_steps:
            name = "initial_step" if self._settings.initial_step is not None else "initial_epoch"
            raise SettingsError(
                f"--{name}: {getattr(self._settings, name)} lies behind the end of the run ({plan.num_steps} steps,"
                f" {plan.num_epochs} epochs), so nothing would be trained; give a smaller one or a longer run"
            )
        return step

    def _load(self, header: StateHeader, network: nn.Module, updater: Updater, facts: Mapping[str, Any]) -> None:
        instead = (
            "continue with the settings that it was written with, or start a new run from its LoRA file with"
            " --network_weights"
        )
        before, now = header.facts["optimizer"], facts["optimizer"]
        if before != now:
            raise StateError(
                f"--resume: {header.path} holds the memory of the optimizer {before}, which {now} cannot use; {instead}"
            )
        tensors, memory = read_tensors(header)
        own = own_tensors(network)
        _check_tensors(header.path, tensors, own, instead)
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        try:
            updater.load_state_dict(memory["updater"])
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise StateError(
                f"--resume: {header.path} does not fit this run's optimizer: {error}; {instead}"
            ) from error
        self._memory = memory

    def _position(self, header: StateHeader, plan: RunPlan, facts: Mapping[str, Any], initial: int | None) -> Position:
        accumulation = int(facts["accumulation"])
        if initial is not None:
            return Position.of_step(initial, plan.steps_per_epoch, accumulation)
        length = ("num_batches", "steps_per_epoch", "accumulation")
        if all(header.facts[name] == facts[name] for name in length):
            return header.position
        return Position.of_step(header.position.step, plan.steps_per_epoch, accumulation)

    def _tell(
        self, header: StateHeader, position: Position, plan: RunPlan, facts: Mapping[str, Any], changed: list[Any]
    ) -> None:
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(header.written_at))
        epoch = min(position.epoch, plan.num_epochs)
        logger.info(
            "Continuing the training state %s (written %s) after step %d of %d, in epoch %d of %d",
            header.path,
            written,
            position.step,
            plan.num_steps,
            epoch,
            plan.num_epochs,
        )
        if position.step != header.position.step:
            logger.warning(
                "--initial_epoch and --initial_step override where the state stood: step %d instead of %d; weights and"
                " optimizer are the state's",
                position.step,
                header.position.step,
            )
        steps = header.facts["num_steps"]
        if steps != plan.num_steps:
            logger.info(
                "The run is %d steps long instead of %d; the learning rate's schedule follows the new length",
                plan.num_steps,
                steps,
            )
        if changed:
            before, now = header.facts["steps_per_epoch"], facts["steps_per_epoch"]
            logger.warning(
                "The run does not continue exactly as it was going, because this has changed: %s. Weights and optimizer"
                " are kept, and the new values hold from step %d on%s",
                in_words(changed),
                position.step + 1,
                f"; an epoch has {now} steps instead of {before}, so this is epoch {epoch}" if before != now else "",
            )

    def _restore_foreign(self, network: Any, foreign: ForeignState) -> None:
        try:
            require_loaded(network.load_weights(str(foreign.weights)), foreign.weights)
        except (ValueError, KeyError, RuntimeError) as error:
            raise StateError(f"--resume: the weights of {foreign.path} cannot be used: {error}") from error
        counted = (
            f" Its step counter stands at {foreign.step}: --initial_step={foreign.step} counts on from there."
            if foreign.step and self._settings.initial_step is None and self._settings.initial_epoch is None
            else ""
        )
        logger.warning(
            "%s is a training state of sd-scripts: its LoRA weights are taken, but not its optimizer, schedule and position,"
            " which this program cannot read.%s",
            foreign.path,
            counted,
        )


def _check_tensors(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any], instead: str) -> None:
    unknown = [name for name in found if name not in expected]
    missing = [name for name in expected if name not in found]
    others = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in found
        if name in expected and found[name].shape != expected[name].shape
    ]
    precisions = [
        f"{name} {str(found[name].dtype).removeprefix('torch.')} instead of"
        f" {str(expected[name].dtype).removeprefix('torch.')}"
        for name in found
        if name in expected and found[name].dtype != expected[name].dtype
    ]
    alphas = [
        f"{name} {float(found[name]):g} instead of {float(expected[name]):g}"
        for name in found
        if name.endswith(".alpha") and name in expected and expected[name].numel() == found[name].numel() == 1
        if float(found[name]) != float(expected[name])
    ]
    problems = []
    if unknown:
        problems.append(f"{len(unknown)} tensors that this run's network does not have ({some(unknown, 2)})")
    if missing:
        problems.append(f"no value for {len(missing)} tensors ({some(missing, 2)})")
    if others:
        problems.append(f"{len(others)} tensors of another shape ({some(others, 2)})")
    if alphas:  # a state's alpha would take the place of the one that is asked for
        problems.append(f"{len(alphas)} alphas of another value ({some(alphas, 2)})")
    if problems:
        raise StateError(f"--resume: {path} belongs to another network: it has {'; '.join(problems)}; {instead}")
    if precisions:  # the optimizer's memory has that precision too, and cannot go on in another
        raise StateError(
            f"--resume: {path} was written in another precision, which --full_bf16 sets: it has"
            f" {len(precisions)} such tensors ({some(precisions, 2)}); {instead}"
        )


def _foreign_state(path: Path) -> ForeignState:
    """Returns a state of sd-scripts.

    Raises:
        StateError: there is none that can be read.
    """
    if path.is_file():
        raise StateError(
            f"--resume: {path} is a file, and a training state is a folder; to start from a LoRA file give it with"
            " --network_weights"
        )
    if not path.is_dir():
        raise StateError(f"--resume: there is no folder {path}; give a training state, or latest for the newest one")
    if (path / _FOREIGN_WEIGHTS).is_file():
        return ForeignState(path, _foreign_step(path))
    pickles = sorted(one.name for one in path.glob("*.bin"))
    if pickles:
        raise StateError(
            f"--resume: {path} holds its weights as a pickle file ({pickles[0]}), which can run any code when it is read;"
            " give the LoRA file that was saved beside it with --network_weights"
        )
    states = sorted(one.name for one in path.iterdir() if one.is_dir() and is_complete(one))
    hint = f"; there are training states in it: {some(states)}" if states else ""
    raise StateError(f"--resume: {path} is no training state (it has no {JSON_FILE}){hint}")


def _foreign_step(path: Path) -> int | None:
    try:
        return int(json.loads((path / "train_state.json").read_text(encoding="utf-8"))["current_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # older states have none, and it is only for a hint
