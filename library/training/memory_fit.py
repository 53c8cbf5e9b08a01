"""``--vram_gb``: rehearses a run's own step with every set of memory flags, and takes the fastest one that fits.

What a step needs is in ``step_rehearsal.py``. Previews are not part of it: one that finds too little memory is left out with
a warning, and the training goes on.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from library.errors import SettingsError
from library.memory.block_stream import NUM_SLOTS
from library.memory.fit import CHECKPOINTING, GIB, QUALITY, Allowance, Choice, Row, choices, fastest, rows
from library.memory.settings import MemorySettings, Quantisation, QuantisationSettings
from library.training.step_rehearsal import META, autoencoder_bytes, encoder_bytes, rehearse, settings_of, size_px

if TYPE_CHECKING:
    from library.data.items import Batch
    from library.training.network_trainer import NetworkTrainer

logger = logging.getLogger(__name__)

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(MemorySettings)}
_FREE_SHARE = 0.97
"""Of what ``auto`` finds free: a card that also draws a screen needs a little more now and then."""
_REST_OF_CONTEXT_GIB = 0.2  # what is free is counted when CUDA's context is there, but kernels are loaded on first use


class Fit:
    """Finds the flags for one run and one card."""

    def __init__(
        self, trainer: NetworkTrainer, batch: Batch, limit_gib: float, allowance: Allowance, asked: str
    ) -> None:
        """Rehearses nothing yet.

        Args:
            trainer: before it has read a model.
            batch: the largest one of the run.
            limit_gib: of the card.
            allowance: what is needed beside tensors.
            asked: the flag, for messages.
        """
        self._trainer = trainer
        self._config = trainer.config
        self._batch = batch
        self._limit_gib = limit_gib
        self._allowance = allowance
        self._asked = asked
        self._settings: dict[tuple[Quantisation | None, bool], QuantisationSettings] = {}
        self._encoders: dict[Quantisation | None, dict[bool, int]] = {}

    def choose(self) -> Row:
        """Returns the fastest row with which the run fits, and says which it is and what else would fit.

        Rows with quantised weights, which change the result, are looked at only where no exact row fits.

        Raises:
            SettingsError: nothing fits.
        """
        open_rows = self._open_rows()
        everything: list[Choice] = []
        for kind in dict.fromkeys(row.quantisation for row in open_rows):
            found = [choice for row in open_rows if row.quantisation == kind for choice in self._choices(row)]
            # Before the large model is read, captions and pictures are encoded, each by its own model alone.
            before = {streams: self._encoding_gib(kind, streams) for streams in (False, True)}
            found = [
                dataclasses.replace(choice, gib=max(choice.gib, before[choice.row.blocks_to_swap > 0]))
                for choice in found
            ]
            best = fastest(found, self._limit_gib)
            if best is not None:
                self._report(best, found)
                return best.row
            everything += found
        least = min(everything, key=lambda choice: choice.gib)
        width, height = size_px(self._batch)
        raise SettingsError(
            f"{self._asked}: this run does not fit into {self._limit_gib:.1f} GiB; the least that it needs is"
            f" {least.gib:.1f} GiB, with {self.flags(least.row) or 'no memory flag'}. Its largest batch has"
            f" {len(self._batch.draws)} pictures of {width}x{height} pixels: lower --resolution, --train_batch_size or"
            f" --network_dim{self._or_without_given()}"
        )

    def settings(self, row: Row) -> tuple[MemorySettings, QuantisationSettings]:
        """Returns the run's settings with a row's flags."""
        return row.applied_to(self._config.memory), self.quantisation(row.quantisation, row.blocks_to_swap > 0)

    def flags(self, row: Row) -> str:
        """Returns a row as a user would type it."""
        quantisation = self.quantisation(row.quantisation, row.blocks_to_swap > 0)
        values = {
            **{name: getattr(quantisation, name) for name in ("fp8_base", "fp8_base_unet", "fp8_fast", "nf4_base")},
            **{name: value for name, value in CHECKPOINTING[row.checkpointing].items() if value != _DEFAULTS[name]},
            "blocks_to_swap": row.blocks_to_swap,
            "cpu_offload_checkpointing": row.offload,
        }
        return " ".join(
            f"--{name}" if value is True else f"--{name}={value}" for name, value in values.items() if value
        )

    def quantisation(self, kind: Quantisation | None, streams: bool) -> QuantisationSettings:
        """Returns the settings of a kind, with or without streamed weights.

        Gemma2 is quantised too only where it stays beside the model, or would not fit otherwise.
        """
        if (kind, streams) not in self._settings:
            settings = settings_of(self._config, kind)
            if kind == "fp8" and kind != self._config.quantisation.transformer:
                exact = self._allowance.with_allowance(self._encoder_bytes(settings.text_encoder, streams))
                if exact > self._limit_gib:
                    settings = QuantisationSettings(fp8_base=True)
            self._settings[kind, streams] = settings
        return self._settings[kind, streams]

    def _choices(self, row: Row) -> list[Choice]:
        """Returns a row with every number of streamed blocks that makes a difference and that the user left open."""
        need = rehearse(self._trainer, row, self._batch)
        asked = self._config.memory.blocks_to_swap
        streamed = [asked] if asked else [0, *range(NUM_SLOTS + 1, len(need.blocks) + 1)]
        return list(choices(row, need, self._allowance, streamed))

    def _open_rows(self) -> list[Row]:
        """Returns the rows that the user's own flags leave, without streaming."""
        given, memory = self._config.quantisation.transformer, self._config.memory
        given_level = self._config.given.get("gradient_checkpointing_level")
        known = self._trainer.networks.has_companion
        kinds: list[Quantisation | None] = [given]
        if given is None and known:  # other networks know no quantised weights
            kinds = [kind for kind in QUALITY if kind != "nf4" or importlib.util.find_spec("bitsandbytes") is not None]
        return [
            row
            for row in rows(kinds)
            if (not memory.gradient_checkpointing or row.checkpointing != "none")
            and (given_level is None or row.checkpointing in ("none", given_level))
            # Other networks may write over what it keeps, which ends the run.
            and (row.checkpointing != "selective" or known or given_level == "selective")
            and _may_offload(row, memory)
        ]

    def _report(self, best: Choice, found: Sequence[Choice]) -> None:
        def without_streaming(choice: Choice) -> Row:
            return dataclasses.replace(choice.row, blocks_to_swap=0)

        others = []
        for row in dict.fromkeys(map(without_streaming, found)):
            if row == without_streaming(best):
                continue
            other = fastest([choice for choice in found if without_streaming(choice) == row], self._limit_gib)
            if other is not None:
                time = f"{other.seconds / best.seconds:.2f} x the time"
                others.append(f"{self.flags(other.row) or 'no memory flag'} ({other.gib:.1f} GiB, {time})")
        logger.info(
            "%s: taken to be fastest is %s, with up to %.1f of %.1f GiB. %s",
            self._asked,
            self.flags(best.row) or "no memory flag",
            best.gib,
            self._limit_gib,
            f"Would fit too: {', '.join(others)}" if others else "Nothing else fits",
        )
        if best.row.quantisation is not None and self._config.quantisation.transformer is None:
            logger.warning(
                "%s: the frozen weights are kept in %s, which changes the result a little, because the run does not fit with"
                " exact ones; see docs/low_precision.md",
                self._asked,
                best.row.quantisation,
            )

    def _encoding_gib(self, kind: Quantisation | None, streams: bool) -> float:
        """Returns what filling the caches needs: where anything is streamed, all of Gemma2's layers are."""
        trainer, needs = self._trainer, [0]
        if self._config.data.cache_latents:
            weights = trainer.autoencoder_numbers() * trainer.autoencoder_dtype.itemsize
            needs.append(weights + autoencoder_bytes(trainer, self._batch))
        if self._config.data.cache_text_encoder_outputs:
            needs.append(self._encoder_bytes(self.quantisation(kind, streams).text_encoder, streams))
        return self._allowance.with_allowance(max(needs))

    def _encoder_bytes(self, kind: Quantisation | None, streams: bool) -> int:
        if kind not in self._encoders:
            self._encoders[kind] = encoder_bytes(self._trainer, kind)
        return self._encoders[kind][streams and not self._config.trains_text_encoder]

    def _or_without_given(self) -> str:
        memory, quantisation = self._config.memory, self._config.quantisation
        names = [
            *(name for name in ("fp8_base", "fp8_base_unet") if getattr(quantisation, name)),
            *(["blocks_to_swap"] if memory.blocks_to_swap else []),
        ]
        return f", or leave {' and '.join(f'--{name}' for name in names)} to --vram_gb" if names else ""


def _may_offload(row: Row, given: MemorySettings) -> bool:
    """Whether a row offloads as the user asked; unasked, only what checkpointing keeps.

    Without checkpointing everything that blocks save, 10 GB and more a picture, would have to be pinned in host memory.
    """
    return row.offload if given.cpu_offload_checkpointing else not row.offload or row.checkpointing != "none"


# ---- the card ----


def free_gib(device: torch.device) -> float:
    """Returns how much of a CUDA card this run may have: what is free now, less a little."""
    free, _ = torch.cuda.mem_get_info(device)
    return (free + torch.cuda.memory_reserved(device)) * _FREE_SHARE / GIB


def largest_batch(trainer: NetworkTrainer) -> Batch:
    """Returns the largest batch of a run, with latents and features of the meta device."""
    from library.data.items import Batch

    item, count = trainer.data.largest_batch()
    draw = dataclasses.replace(trainer.data.draw(item.index, 1, 0), caption=trainer.longest_caption())
    sizes = trainer.rehearsal_sizes()
    width, height = item.bucket_px
    shape = (count, sizes.latent_channels, height // sizes.px_per_latent, width // sizes.px_per_latent)
    text: tuple[Tensor, ...] | None = None
    if trainer.config.data.cache_text_encoder_outputs:
        feature = torch.empty(sizes.caption_tokens, sizes.feature_width, dtype=torch.bfloat16, device=META)
        text = (feature,) * count
    return Batch(
        draws=(draw,) * count,
        latents=torch.empty(shape, dtype=torch.bfloat16, device=META),
        pixels=None,
        text=text,
        loss_weights=torch.ones(count),
        num_global=count,
    )


def allowance_for(asked: Any) -> Allowance:
    """Returns what comes on top: all of CUDA's context, or its rest where the limit is what it has left free (auto)."""
    found = Allowance.read()
    return Allowance(found.share, _REST_OF_CONTEXT_GIB) if asked == "auto" else found


def fitted_settings(trainer: NetworkTrainer, asked: Any) -> tuple[MemorySettings, QuantisationSettings]:
    """Returns the settings that ``--vram_gb`` leads to, the same on all processes; the run's own where it has no effect.

    Args:
        trainer: with its data built and no model read.
        asked: GiB, or ``auto``.

    Raises:
        SettingsError: the run does not fit with any.
    """
    shown = asked if isinstance(asked, str) else f"{asked:g}"
    if trainer.device.type != "cuda":
        logger.warning(
            "--vram_gb %s: no effect on the device %s, which has no memory of its own to fit into; the run goes on with the"
            " flags as they are",
            shown,
            trainer.device.type,
        )
        return trainer.config.memory, trainer.config.quantisation
    mine = free_gib(trainer.device) if isinstance(asked, str) else asked
    (limit_gib,) = min(trainer.processes.gather([mine]))
    fit = Fit(trainer, largest_batch(trainer), limit_gib, allowance_for(asked), f"--vram_gb {shown}")
    return fit.settings(fit.choose())
