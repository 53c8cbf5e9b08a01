"""``--vram_gb``: rehearses a run's own step with every set of memory flags, and takes the fastest one that fits.

A rehearsal is the real thing on the meta device, where tensors have no memory: the run's model, network, dtype and
optimizer, its loss, its checkpointing and offload, on as many pictures of the largest bucket as a batch can have, with
captions of the longest length. Only attention kernels and copies to the host are stand-ins (``memory/rehearsal.py``).
Streaming changes nothing in a step but where weights lie, so it is arithmetic (:class:`~library.memory.fit.Need`).

Previews are not part of it: one that finds too little memory is left out with a warning, and the training goes on.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import logging
import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.errors import SettingsError
from library.lumina.autoencoder import TILE_PX, WHOLE_PX
from library.memory.block_stream import NUM_SLOTS, streamed_bytes
from library.memory.fit import (
    CHECKPOINTING,
    COMPUTE_FLOPS,
    GIB,
    MEMORY_BYTES,
    QUALITY,
    Allowance,
    Choice,
    Need,
    Row,
    choices,
    fastest,
    ring_bytes,
    rows,
)
from library.memory.live_bytes import LiveBytes, Speed, bytes_of
from library.memory.prepare import prepare_blocks
from library.memory.quantised import quantise_block
from library.memory.rehearsal import RehearsedAttention, RehearsedTransport
from library.memory.settings import MemorySettings, Quantisation, QuantisationSettings
from library.memory.transport import Lane
from library.training.hooks import Reading
from library.training.network_building import NetworkBuilder
from library.training.optimizer_names import OPTIMIZERS
from library.training.optimizers import clip_gradients

if TYPE_CHECKING:
    from library.data.items import Batch
    from library.training.arguments import TrainConfig
    from library.training.network_trainer import NetworkTrainer

logger = logging.getLogger(__name__)

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(MemorySettings)}
META = torch.device("meta")
_FREE_SHARE = 0.97
"""Of what ``auto`` finds free: a card that also draws a screen needs a little more now and then."""
_REST_OF_CONTEXT_GIB = 0.2  # what is free is counted when CUDA's context is there, but kernels are loaded on first use
_AUTOENCODER_BYTES_PX = 520
"""Device memory for encoding a pixel, for each byte of a number: 1.01 GiB for 1024 x 1024 px in bf16
(``library/lumina/autoencoder.py``)."""
_CAPTIONS_AT_ONCE = 8  # as ``--text_encoder_batch_size`` where it is left out
_EXTRA_STATES = {
    "Prodigy": 2,
    "DAdaptAdaGrad": 1,
    "DAdaptAdam": 1,
    "DAdaptAdamPreprint": 1,
    "DAdaptAdan": 3,
    "DAdaptAdanIP": 3,
    "DAdaptSGD": 1,
}
"""Tensors of a parameter's size that an optimizer's class keeps beyond AdamW's two."""


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
        width, height = _size_px(self._batch)
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
            settings = _settings_of(self._config, kind)
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


def _settings_of(config: TrainConfig, kind: Quantisation | None) -> QuantisationSettings:
    """Returns the settings of a kind of weights: the user's own where they say so already."""
    if kind == config.quantisation.transformer:
        return config.quantisation
    if kind == "nf4":
        return QuantisationSettings(nf4_base=True)
    # A Gemma2 that stays on the device beside the model is halved too.
    stays = not config.data.cache_text_encoder_outputs
    return QuantisationSettings(fp8_base=stays, fp8_base_unet=not stays)


# ---- what a step needs ----


def rehearse(trainer: NetworkTrainer, row: Row, batch: Batch) -> Need:
    """Returns what one step with a row's flags needs; ``row.blocks_to_swap`` is not looked at.

    Args:
        trainer: with its settings; models, network and device of its own are neither needed nor touched.
        row: which flags.
        batch: what to train on; values do not matter.
    """
    counter = LiveBytes(META, Speed(COMPUTE_FLOPS, MEMORY_BYTES))
    run = _rehearsing(trainer, row)
    config = run.config
    expands = len(batch.draws) > 1 or trainer.weight_dtype == torch.float32
    attention = RehearsedAttention(counter, expands)
    run.model = run.rehearse_model(run.weight_dtype, attention, _reading(config.quantisation.transformer))
    encoders, text_layers = [], ()
    if not config.data.cache_text_encoder_outputs:
        run.text_encoder = run.rehearse_text_encoder(run.weight_dtype, _reading(config.quantisation.text_encoder))
        encoders = [run.text_encoder.model]
        if not config.trains_text_encoder:
            text_layers = tuple(map(streamed_bytes, run.text_encoder.blocks))
    weights = sum(bytes_of((*m.parameters(), *m.buffers()), META) for m in (run.model, *encoders))
    blocks = tuple(streamed_bytes(block) for block in run.streamable_blocks())
    transport = RehearsedTransport(META)
    try:
        # A network module may draw its first values from torch's generator: the real one is to find it as it was.
        with torch.random.fork_rng(devices=[]), run.networks.rehearsing():
            run.network = run.networks.make(encoders if config.trains_text_encoder else [], run.model)
            optimizer, trained, forward_s = _rehearsed_step(run, batch, counter, transport)
    except RuntimeError as error:
        if run.networks.has_companion:
            raise
        raise SettingsError(
            f"--vram_gb: the network of --network_module {config.network.network_module} cannot be tried on a model"
            f" without weights ({next(iter(str(error).splitlines()), type(error).__name__)}), so what the run needs is not"
            " known; leave --vram_gb out and choose flags by the table in docs/memory.md"
        ) from error
    besides = _besides(run, optimizer)
    step = counter.peak
    if not config.data.cache_latents:
        encoder = autoencoder_bytes(run, batch)
        weights += run.autoencoder_numbers() * run.autoencoder_dtype.itemsize
        step = max(step, trained + encoder)
    return Need(
        weights,
        trained + besides,
        step + besides,
        blocks,
        forward_s,
        counter.seconds - forward_s,
        transport.num_bytes[Lane.OUT],
        transport.num_bytes[Lane.BACK],
        text_layers,
    )


def _rehearsed_step(
    run: NetworkTrainer, batch: Batch, counter: LiveBytes, transport: RehearsedTransport
) -> tuple[torch.optim.Optimizer, int, float]:
    """Trains a step of the network just made; returns the optimizer, bytes that stay, and seconds of the forward pass."""
    with counter:
        run.network.to(META, torch.bfloat16 if run.config.memory.full_bf16 else torch.float32)
        prepare_blocks(
            run.blocks(),
            run.config.memory,
            META,
            resident=run.network.parameters(),
            preserve_rng_state=not hasattr(run.network, "set_dropout_keys"),
            transport=transport,
        )
        optimizer = optimizer_with_states(run.network)
        trained = counter.live
        counter.reset_peak()
        counter.seconds = 0.0
        return optimizer, trained, one_step(run, batch, optimizer, counter)


def _rehearsing(trainer: NetworkTrainer, row: Row) -> NetworkTrainer:
    """Returns a trainer of the same run with a row's flags, on the meta device."""
    config = trainer.config
    run = copy.copy(trainer)
    # What compiled blocks keep is not known here; it is less than this.
    memory = dataclasses.replace(row.applied_to(config.memory), blocks_to_swap=None, torch_compile=False)
    run.config = dataclasses.replace(config, memory=memory, quantisation=_settings_of(config, row.quantisation))
    run.networks = NetworkBuilder(run.config)
    run.device = META
    run.text_encoder, run.autoencoder = None, None
    return run


def _reading(kind: Quantisation | None) -> Reading:
    return Reading() if kind is None else Reading(finish=partial(quantise_block, kind=kind, device=META))


def optimizer_with_states(network: nn.Module) -> torch.optim.Optimizer:
    """Returns AdamW over the trained parameters, with the memory that it has from its first step on."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, foreach=True)  # what it takes by itself on a GPU
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def one_step(run: NetworkTrainer, batch: Batch, optimizer: torch.optim.Optimizer, counter: LiveBytes) -> float:
    """Trains one step and returns the seconds up to the end of the forward pass."""
    losses = run.losses_of(batch).values
    loss = (losses * batch.loss_weights.to(run.device)).sum() / len(batch.draws)
    forward_s = counter.seconds
    loss.backward()
    parameters: list[Any] = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    clip_gradients(parameters, run.config.optimizer.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return forward_s


def _besides(run: NetworkTrainer, optimizer: torch.optim.Optimizer) -> int:
    """Returns bytes that stay on the device and that the rehearsed step does not have."""
    settings = run.config.optimizer
    size = bytes_of((parameter for group in optimizer.param_groups for parameter in group["params"]), META)
    known = OPTIMIZERS.get(settings.resolved_optimizer.lower())
    class_name = settings.resolved_optimizer.rpartition(".")[2] if known is None else known.class_name
    copies = _EXTRA_STATES.get(class_name, 0) + (settings.ema_decay is not None)
    copies += run.config.schedule.gradient_accumulation_steps > 1  # gradients are there during the forward pass
    copies += run.num_processes > 1  # the buckets that gradients are exchanged in
    return copies * size


# ---- what comes before the training ----


def encoder_bytes(trainer: NetworkTrainer, kind: Quantisation | None) -> dict[bool, int]:
    """Returns what encoding captions of the longest length needs: with its layers streamed, all of them, or not."""
    encoder = trainer.rehearse_text_encoder(trainer.weight_dtype, _reading(kind))
    counter = LiveBytes(META)
    with torch.no_grad(), counter:
        count = trainer.config.data.text_encoder_batch_size or _CAPTIONS_AT_ONCE
        encoder.encode([trainer.longest_caption()] * count)
    whole = bytes_of((*encoder.model.parameters(), *encoder.model.buffers()), META) + counter.peak
    layers = [streamed_bytes(layer) for layer in encoder.blocks]
    return {False: whole, True: whole - sum(layers) + ring_bytes(layers, len(layers))}


def autoencoder_bytes(trainer: NetworkTrainer, batch: Batch) -> int:
    """Returns what encoding one picture needs beside the weights; several that do not fit are encoded one by one."""
    num_px = math.prod(_size_px(batch))
    if trainer.config.memory.vae_tiling and num_px > WHOLE_PX**2:
        num_px = TILE_PX**2
    return num_px * _AUTOENCODER_BYTES_PX * trainer.autoencoder_dtype.itemsize


def _size_px(batch: Batch) -> tuple[int, int]:
    return batch.draws[0].item.bucket_px


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
