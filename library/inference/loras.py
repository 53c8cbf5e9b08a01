"""The LoRA files that a picture is drawn with: checked, then merged into the models or attached to them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import NetworkError
from library.files import read_safetensors_header
from library.inference.settings import split_lora
from library.lumina.prompt_template import plain_system_prompt, system_prompt_of
from library.picture_text import LoraInUse
from library.prompts import PromptError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from library.lumina.filling import TensorChange
    from library.lumina.loading import ModelFiles

logger = logging.getLogger(__name__)

NetworkReader = Callable[[Path, float, "nn.Module", "nn.Module"], Any]
"""(LoRA file, multiplier, Gemma2, Next-DiT) -> the network of the file for these two, not attached yet."""


class LoraFiles:
    """The LoRA files of a run, in their order."""

    def __init__(
        self,
        texts: Sequence[str],
        merged: bool,
        read: NetworkReader,
        known: Sequence[str] = (),
        compared: Sequence[Path] = (),
    ) -> None:
        """Remembers the files, reads nothing.

        Args:
            texts: each ``path`` or ``path;multiplier``.
            merged: into the models' weights, instead of attached.
            read: makes the network of a file.
            known: what pictures are drawn with, system prompts included, as far as it is known at the start; a LoRA that
                was trained with another system prompt is warned about.
            compared: files that are attached for a while, one at a time, see :meth:`beside`.
        """
        self._files = [split_lora(text) for text in texts]
        self._given = [multiplier for _, multiplier in self._files]
        self._merged = merged
        self._read = read
        self._known = known
        self._compared = list(compared)
        self._trained_with: dict[Path, str] = {}  # system prompts that have not been warned about
        self._networks: list[Any] = []
        self._models: tuple[nn.Module, nn.Module, torch.device] | None = None
        self._beside: tuple[Path, Any] | None = None
        self._told: set[str] = set()
        self._hashes: dict[Path, str] = {}

    def check(self, files: ModelFiles) -> tuple[TensorChange | None, TensorChange | None]:
        """Fits the files to models without weights: a wrong one must show before gigabytes are read.

        Returns:
            What merging makes of each tensor of Gemma2 and of the Next-DiT as it is read; None where nothing is merged.

        Raises:
            NetworkError: a file is no LoRA of these models.
        """
        if self._merged and not self._files:
            logger.warning("--merge_lora_weights: no effect without --lora_weights, which names the files to merge")
        if not self._files and not self._compared:
            return None, None
        import torch

        from library.lumina.filling import in_turn
        from library.lumina.gemma2 import empty_gemma2
        from library.lumina.next_dit import NextDiT

        with torch.device("meta"):
            dit = NextDiT(files.dit.config)
        encoder = empty_gemma2(files.gemma2.config)

        def fitted(flag: str, path: Path, multiplier: float) -> Any:
            try:
                network = self._read(path, multiplier, encoder, dit)
            except NetworkError as error:
                raise NetworkError(f"{flag}: {error}") from error
            self._remember(path)
            return network

        networks = []
        for path, multiplier in self._files:
            networks.append(fitted("--lora_weights", path, multiplier))
            logger.info("LoRA %s, multiplier %g, %s", path, multiplier, "merged" if self._merged else "attached")
        for path in self._compared:
            fitted("--compare_lora_weights", path, 1.0)
        for text in self._known:
            self.tell_system_prompts(text)
        if not self._merged or not networks:
            return None, None
        of_encoder, of_dit = ([network.weight_changes(model) for network in networks] for model in (encoder, dit))
        return in_turn(of_encoder), in_turn(of_dit)

    def _remember(self, path: Path) -> None:
        """Keeps what a file's metadata say."""
        metadata = _metadata(path)
        self._hashes[path] = metadata.get("sshs_model_hash", "")
        trained_with = metadata.get("ss_system_prompt")
        if trained_with not in (None, "None"):
            # Without the spaces at its ends, as system_prompt_of gives that of a text.
            self._trained_with[path] = plain_system_prompt(str(trained_with)).strip()

    def tell_system_prompts(self, text: str) -> None:
        """Warns of LoRAs that were trained with another system prompt than this text has, each system prompt once.

        Args:
            text: as it is encoded; an empty one has no system prompt in training either.
        """
        used = system_prompt_of(text)
        others = [path for path, trained_with in self._trained_with.items() if text and trained_with != used]
        for path in others:
            trained_with = self._trained_with.pop(path)
            if trained_with in self._told:  # by another file of the same run
                continue
            self._told.add(trained_with)
            if trained_with:
                logger.warning(
                    '%s was trained with the system prompt "%s"; draw with the same: --system_prompt "%s"',
                    path,
                    trained_with,
                    trained_with,
                )
            else:
                logger.warning(
                    '%s was trained without a system prompt, and "%s" is put before the prompt; draw without it',
                    path,
                    used,
                )

    def attach(self, encoder: nn.Module, dit: nn.Module, device: torch.device) -> None:
        """Attaches the networks to the models, with their weights on the device; nothing where they are merged."""
        self._models = (encoder, dit, device)
        if not self._merged:
            self._networks = [self._attached(path, multiplier) for path, multiplier in self._files]

    def _attached(self, path: Path, multiplier: float) -> Any:
        if self._models is None:
            raise RuntimeError("attach() comes first")
        encoder, dit, device = self._models
        network = self._read(path, multiplier, encoder, dit)
        network.apply_to([encoder], dit)
        return network.to(device).eval()

    @contextlib.contextmanager
    def beside(self, path: Path) -> Iterator[Any]:
        """Has the network of a further file attached while the block runs."""
        network = self._attached(path, 1.0)
        self._beside = (path, network)
        try:
            yield network
        finally:
            self._beside = None
            network.remove()

    def check_multipliers(self, multipliers: Sequence[float]) -> None:
        """Makes sure that :meth:`set_multipliers` can set these, before any model is read.

        Raises:
            PromptError: the LoRAs are merged, or there are more multipliers than LoRAs.
        """
        if multipliers and self._merged:
            raise PromptError("--m has no effect on merged LoRAs; start without --merge_lora_weights")
        if len(multipliers) > len(self._files):
            raise PromptError(f"--m gives {len(multipliers)} multipliers; the number of LoRAs is {len(self._files)}")

    @property
    def change_text(self) -> bool:
        """Whether texts are encoded otherwise with other multipliers."""
        return any(network.text_encoder_loras for network in self._networks)

    def set_multipliers(self, multipliers: Sequence[float]) -> None:
        """Sets the attached LoRAs' multipliers; the last one holds for all that follow. None are those of the files.

        Raises:
            PromptError: they cannot be had, see :meth:`check_multipliers`.
        """
        self.check_multipliers(multipliers)
        count = len(self._networks)
        padded = [*multipliers, *[multipliers[-1]] * (count - len(multipliers))] if multipliers else self._given[:count]
        for network, multiplier in zip(self._networks, padded, strict=True):
            network.set_multiplier(multiplier)

    def in_use(self) -> list[LoraInUse]:
        """Returns the files and the multipliers that pictures are drawn with now."""
        now = self._given if self._merged else [network.multiplier for network in self._networks]
        found = [(path, multiplier) for (path, _), multiplier in zip(self._files, now, strict=True)]
        if self._beside is not None:
            path, network = self._beside
            found.append((path, network.multiplier))
        return [LoraInUse(path.stem, multiplier, self._hashes.get(path, "")) for path, multiplier in found]


def _metadata(path: Path) -> dict[str, str]:
    """Returns the metadata of a LoRA file; empty where its format has none."""
    if path.suffix != ".safetensors":
        return {}
    return read_safetensors_header(path)[0].get("__metadata__", {})
