"""Training states on disk: what they are called, what is in them, and which is the newest.

A state is a folder of three files: ``state.json`` (position, settings, everything that is no tensor),
``network.safetensors`` and ``memory.safetensors`` (what optimizer, schedule and averages remember). It is written under
a temporary name and renamed, so a state that exists is complete. No file can run code when it is read.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library import files
from library.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

JSON_FILE, NETWORK_FILE, MEMORY_FILE = "state.json", "network.safetensors", "memory.safetensors"
FORMAT = "lumina-lora-trainer state"
VERSION = 1
_LARGEST_JSON_BYTES = 256 * 2**20
_FACTS = {"seed", "accumulation", "optimizer", "num_batches", "steps_per_epoch", "num_steps"}


class StateError(UserError):
    """A training state is missing, damaged, or belongs to another run."""


@dataclass(frozen=True)
class Position:
    """Where a run stands between two optimizer steps.

    Attributes:
        step: optimizer steps taken.
        epoch: the running epoch, counted from 1.
        batch: batches of this epoch that have been used, over all processes.
        finished_epochs: whose last step is done and whose averages were taken. Equal to ``epoch`` where the events
            of the epoch's end (saving, previews) were still going on.
    """

    step: int = 0
    epoch: int = 1
    batch: int = 0
    finished_epochs: int = 0

    @classmethod
    def of_step(cls, step: int, steps_per_epoch: int, accumulation: int) -> Position:
        """Returns the position after a step; an epoch's last step is followed by the next epoch."""
        epochs, rest = divmod(step, steps_per_epoch)
        return cls(step, epochs + 1, rest * accumulation, epochs)


@dataclass(frozen=True)
class StateContent:
    """What a state holds.

    Attributes:
        position: where the run stood.
        run: name that all states of a run and of its continuations share.
        facts: what the run's length and draws follow from: seed, steps per epoch, processes, pictures.
        settings: the run's flags as they were in effect, without secrets.
        versions: of this program and of packages, for those who look for a difference.
        network: from :func:`own_tensors`, in their dtype.
        memory: nested tensors and plain values of everything else.
        written_at: seconds since 1970.
    """

    position: Position
    run: str
    facts: Mapping[str, Any]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    network: Mapping[str, Tensor]
    memory: Mapping[str, Any]
    written_at: float = field(default_factory=time.time)


@dataclass(frozen=True)
class StateHeader:
    """A state's JSON file; its tensors are read later."""

    path: Path
    position: Position
    run: str
    facts: Mapping[str, Any]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    memory: Any
    written_at: float


def own_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Returns the very parameters and buffers of a network, by name, without the buffers that it does not want saved.

    Not its ``state_dict``: network modules of others give there what their files hold, which may be computed from
    parameters (LyCORIS: ``lora_up`` times a scalar, a matrix less the model's), so that a run would not go on from the same.
    """
    unsaved = {
        f"{path}.{name}".removeprefix(".")
        for path, module in network.named_modules()
        for name in module._non_persistent_buffers_set
    }
    tensors = (*network.named_parameters(), *network.named_buffers())
    return {name: tensor.detach() for name, tensor in tensors if name not in unsaved}


def write_state(folder: Path, content: StateContent) -> None:
    """Writes a state to ``folder``, whole or not at all.

    Raises:
        OSError: it cannot be written.
        CannotBeKept: something in ``content.memory`` fits into no file.
    """
    from library.training.nested import flatten, unshared

    tensors, memory = flatten(content.memory, "memory")
    with files.replacing_folder(folder) as temporary:
        files.write_safetensors(temporary / NETWORK_FILE, unshared(content.network), None)
        files.write_safetensors(temporary / MEMORY_FILE, unshared(tensors), None)
        sizes = {name: (temporary / name).stat().st_size for name in (NETWORK_FILE, MEMORY_FILE)}
        document = {
            "format": FORMAT,
            "version": VERSION,
            "written_at": content.written_at,
            "run": content.run,
            "position": asdict(content.position),
            "facts": dict(content.facts),
            "settings": dict(content.settings),
            "versions": dict(content.versions),
            "bytes": sizes,
            "memory": memory,
        }
        files.write_json(temporary / JSON_FILE, document)  # last: with it the state is complete


def read_header(folder: Path) -> StateHeader:
    """Returns what a state says of itself, without reading its tensors.

    Raises:
        StateError: it is damaged, or no state of this program.
    """
    path = folder / JSON_FILE
    try:
        if path.stat().st_size > _LARGEST_JSON_BYTES:
            raise ValueError("it is too large")
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError("it was not written by this program")
        if document["version"] != VERSION:
            raise ValueError(f"its version is {document['version']}, this program reads version {VERSION}")
        missing = _FACTS - set(document["facts"])
        if missing:
            raise ValueError(f"its facts lack {', '.join(sorted(missing))}")
        if not isinstance(document["memory"], dict):
            raise ValueError("its memory is no table")
        for name, size in document["bytes"].items():
            if (folder / name).stat().st_size != size:
                raise ValueError(f"{name} has not the size that it was written with")
        return StateHeader(
            path=folder,
            position=_position(document["position"]),
            run=str(document["run"]),
            facts=dict(document["facts"]),
            settings=dict(document["settings"]),
            versions=dict(document["versions"]),
            memory=document["memory"],
            written_at=float(document["written_at"]),
        )
    except OSError as error:
        raise StateError(_damaged(folder, f"{error.filename}: {error.strerror}")) from error
    except (ValueError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise StateError(_damaged(folder, f"{JSON_FILE}: {error}")) from error


def _position(entries: Mapping[str, Any]) -> Position:
    position = Position(**{name: int(value) for name, value in entries.items()})
    if min(asdict(position).values()) < 0 or position.epoch < 1:
        raise ValueError(f"its position {dict(entries)} is none")
    return position


def read_tensors(header: StateHeader) -> tuple[dict[str, Tensor], Any]:
    """Returns the network's tensors and the nested rest.

    Raises:
        StateError: a file is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from library.training.nested import unflatten

    try:
        network = load_file(header.path / NETWORK_FILE)
        return network, unflatten(header.memory, load_file(header.path / MEMORY_FILE))
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise StateError(_damaged(header.path, str(error))) from error


def _damaged(folder: Path, reason: str) -> str:
    return f"--resume: the training state {folder} cannot be read ({reason}); give another state, or leave --resume out"


def is_complete(folder: Path) -> bool:
    """Returns whether a folder holds a whole state."""
    try:
        read_header(folder)
    except StateError:
        return False
    return True


class StateNames:
    """Names of a run's states, those of sd-scripts."""

    def __init__(self, folder: Path, output_name: str | None) -> None:
        """Sets where states go and what their names begin with."""
        self.folder = folder
        self._name = output_name

    def of_epoch(self, epoch: int) -> Path:
        """Returns the state after an epoch, counted from 1."""
        return self.folder / f"{self._name or 'epoch'}-{epoch:06d}-state"

    def of_step(self, step: int) -> Path:
        """Returns the state after a step, counted from 1."""
        return self.folder / f"{self._name or 'at'}-step{step:08d}-state"

    def final(self) -> Path:
        """Returns the state at the end of the run."""
        return self.folder / f"{self._name or 'last'}-state"

    def epochs(self) -> dict[int, Path]:
        """Returns the states of epochs that are there."""
        return files.numbered(self.folder, re.escape(self._name or "epoch") + r"-(\d{6,})-state")

    def steps(self) -> dict[int, Path]:
        """Returns the states of steps that are there."""
        return files.numbered(self.folder, re.escape(self._name or "at") + r"-step(\d{8,})-state")

    def newest(self) -> StateHeader | None:
        """Returns the complete state that was written last, or None where there is none.

        Several runs may have used the same names one after the other, so the time counts before the step.
        """
        paths = [*self.epochs().values(), *self.steps().values(), self.final()]
        headers = [read_header(path) for path in paths if is_complete(path)]
        return max(headers, key=lambda header: (header.written_at, header.position.step), default=None)

    def remove_leftovers(self) -> list[str]:
        """Removes what killed runs of this name left half-written, pictures included; returns the names of that."""
        return [
            *files.remove_leftovers(self.folder, self._is_ours, is_complete),
            *files.remove_leftovers(self.folder / "sample", self._is_our_picture, is_complete),
        ]

    def _is_ours(self, name: str) -> bool:
        names = {self._name} if self._name else {"epoch", "at", "last"}
        tail = r"(-\d{6,}|-step\d{8,})?(-ema)?(-\d{14})?(-state)?"
        return any(re.fullmatch(re.escape(one) + tail, name) for one in names)

    def _is_our_picture(self, name: str) -> bool:
        return bool(re.match((re.escape(self._name) + "_" if self._name else "") + r"e?\d{6,}", name))
