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
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.errors import SettingsError
from library.memory.block_stream import streamed_bytes
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
from library.training.optimizers import clip_gradients

if TYPE_CHECKING:
    from library.data.items import Batch
    from library.training.network_trainer import NetworkTrainer

logger = logging.getLogger(__name__)

META = torch.device("meta")
_FREE_SHARE = 0.97
"""Of what ``auto`` finds free: a card that also draws a screen needs a little more now and then."""
_CONTEXT_IS_THERE_GIB = 0.0  # what is free is counted after CUDA's context has been made
_AUTOENCODER_BYTES_PX = 520
"""Device memory for encoding a pixel, for each byte of a number: 1.01 GiB for 1024 x 1024 px in bf16
(``library/lumina/autoencoder.py``)."""
_CAPTIONS_AT_ONCE = 8  # as ``--text_encoder_batch_size`` where it is left out
_EXTRA_STATES = {"prodigy": 2, "dadaptadam": 1, "dadaptadan": 3, "dadaptadampreprint": 1}
"""Tensors of a parameter's size that an optimizer keeps beyond AdamW's two."""


class Fit:
    """What was found out about a run's memory."""

    def __init__(self, trainer: NetworkTrainer, batch: Batch, allowance: Allowance) -> None:
        """Takes the trainer before it has read a model, and the largest batch it will train on."""
        self._trainer = trainer
        self._batch = batch
        self._allowance = allowance
        self._found: dict[Row, list[Choice]] = {}

    def choices(self, row: Row) -> list[Choice]:
        """Returns a row with every number of streamed blocks that makes a difference and that the user left open."""
        if row not in self._found:
            need = rehearse(self._trainer, row, self._batch)
            asked = self._trainer.config.memory.blocks_to_swap
            streamed = [asked] if asked else [0, *range(3, len(need.blocks) + 1)]
            self._found[row] = list(choices(row, need, self._allowance, streamed))
        return self._found[row]

    def of_quality(self, open_rows: Sequence[Row], kind: Quantisation | None) -> list[Choice]:
        """Returns all choices with one kind of weights."""
        return [choice for row in open_rows if row.quantisation == kind for choice in self.choices(row)]


def fit_to(trainer: NetworkTrainer, batch: Batch, limit_gib: float, allowance: Allowance, asked: str) -> Row:
    """Returns the fastest memory flags with which the run fits, and says what they are and what else would fit.

    Args:
        trainer: before it has read a model.
        batch: the largest one of the run.
        limit_gib: of the card.
        allowance: what is needed beside tensors.
        asked: the flag, for messages.

    Raises:
        SettingsError: nothing fits.
    """
    fit = Fit(trainer, batch, allowance)
    open_rows = _open_rows(trainer)
    kinds = list(dict.fromkeys(row.quantisation for row in open_rows))
    everything: list[Choice] = []
    for kind in kinds:
        found = fit.of_quality(open_rows, kind)
        # Before the large model is read, captions and pictures are encoded, each by its own model alone.
        before = _encoding_gib(trainer, _quantisation(trainer, kind, limit_gib, allowance), batch, allowance)
        found = [dataclasses.replace(choice, gib=max(choice.gib, before)) for choice in found]
        everything += found
        best = fastest(found, limit_gib)
        if best is not None:
            _report(trainer, best, found, limit_gib, asked, allowance)
            return best.row
    least = min(everything, key=lambda choice: choice.gib)
    width, height = _size_px(batch)
    raise SettingsError(
        f"{asked}: this run does not fit into {limit_gib:.1f} GiB; the least that it needs is {least.gib:.1f} GiB, with"
        f" {in_flags(trainer, least.row, limit_gib, allowance) or 'no further flag'}. Its largest batch has"
        f" {len(batch.draws)} pictures of {width}x{height} pixels: lower --resolution, --train_batch_size or --network_dim"
        f"{_instead_of_given(trainer)}"
    )


def settings_for(
    trainer: NetworkTrainer, row: Row, limit_gib: float, allowance: Allowance
) -> tuple[MemorySettings, QuantisationSettings]:
    """Returns the run's settings with a row's flags."""
    return row.applied_to(trainer.config.memory), _quantisation(trainer, row.quantisation, limit_gib, allowance)


def in_flags(trainer: NetworkTrainer, row: Row, limit_gib: float, allowance: Allowance) -> str:
    """Returns a row as a user would type it: every memory flag that is on."""
    memory, quantisation = settings_for(trainer, row, limit_gib, allowance)
    parts = []
    for settings, names in (
        (quantisation, ("fp8_base", "fp8_base_unet", "fp8_fast", "nf4_base")),
        (memory, [*CHECKPOINTING["full"], "blocks_to_swap", "cpu_offload_checkpointing"]),
    ):
        for name in names:
            value = getattr(settings, name)
            if value:
                parts.append(f"--{name}" if value is True else f"--{name}={value}")
    return " ".join(parts)


def _report(
    trainer: NetworkTrainer, best: Choice, found: Sequence[Choice], limit_gib: float, asked: str, allowance: Allowance
) -> None:
    def shown(choice: Choice) -> str:
        return in_flags(trainer, choice.row, limit_gib, allowance) or "no memory flag"

    others = []
    for row in dict.fromkeys(dataclasses.replace(choice.row, blocks_to_swap=0) for choice in found):
        of_row = [choice for choice in found if dataclasses.replace(choice.row, blocks_to_swap=0) == row]
        other = fastest([choice for choice in of_row if choice.row != best.row], limit_gib)
        if other is not None:
            others.append(f"{shown(other)} ({other.gib:.1f} GiB, {other.seconds / best.seconds:.2f} x the time)")
    logger.info(
        "%s: this run is taken to be fastest with %s, at up to %.1f of %.1f GiB. %s",
        asked,
        shown(best),
        best.gib,
        limit_gib,
        f"Would fit too: {', '.join(others)}" if others else "Nothing else fits",
    )
    if best.row.quantisation is not None and trainer.config.quantisation.transformer is None:
        logger.warning(
            "%s: the frozen weights are kept in %s, because the run does not fit with exact ones; see docs/low_precision.md",
            asked,
            best.row.quantisation,
        )


def _open_rows(trainer: NetworkTrainer) -> list[Row]:
    """Returns the rows that the user's own flags leave."""
    config = trainer.config
    given = config.quantisation.transformer
    level = "full" if config.memory.gradient_checkpointing else None
    kinds: list[Quantisation | None] = [given]
    if given is None and trainer.networks.has_companion:  # other networks know no quantised weights
        kinds = [kind for kind in QUALITY if kind != "nf4" or importlib.util.find_spec("bitsandbytes") is not None]
    return [row for row in rows(kinds) if level in (None, row.checkpointing) and _may_offload(row, config.memory)]


def _may_offload(row: Row, given: MemorySettings) -> bool:
    """Whether a row offloads as the user asked; unasked, only what checkpointing keeps.

    Without checkpointing everything that blocks save, 10 GB and more a picture, would have to be pinned in host memory.
    """
    return row.offload if given.cpu_offload_checkpointing else not row.offload or row.checkpointing != "none"


def _quantisation(
    trainer: NetworkTrainer, kind: Quantisation | None, limit_gib: float, allowance: Allowance
) -> QuantisationSettings:
    """Returns the settings of a kind; Gemma2 is quantised too only where it would not fit otherwise."""
    settings = trainer.config.quantisation
    if kind == settings.transformer:
        return settings
    if kind == "nf4":
        return QuantisationSettings(nf4_base=True)
    exact = QuantisationSettings(fp8_base_unet=True)
    encoder = _encoder_bytes(trainer, exact.text_encoder)
    return exact if allowance.with_allowance(encoder) <= limit_gib else QuantisationSettings(fp8_base=True)


def _instead_of_given(trainer: NetworkTrainer) -> str:
    memory = trainer.config.memory
    names = [
        name
        for name in ("blocks_to_swap", "gradient_checkpointing", "cpu_offload_checkpointing")
        if getattr(memory, name)
    ]
    if trainer.config.quantisation.transformer is not None:
        names.append("fp8_base" if trainer.config.quantisation.transformer != "nf4" else "nf4_base")
    return f", or leave out what was given beside it ({', '.join(f'--{name}' for name in names)})" if names else ""


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
    encoders = []
    if not config.data.cache_text_encoder_outputs:
        run.text_encoder = run.rehearse_text_encoder(run.weight_dtype, _reading(config.quantisation.text_encoder))
        encoders = [run.text_encoder.model]
    weights = sum(bytes_of((*m.parameters(), *m.buffers()), META) for m in (run.model, *encoders))
    blocks = tuple(streamed_bytes(block) for block in run.streamable_blocks())
    with run.networks.rehearsing():
        run.network = run.networks.make(encoders if config.trains_text_encoder else [], run.model)
    transport = RehearsedTransport(META)
    with counter:
        run.network.to(META, torch.bfloat16 if config.memory.full_bf16 else torch.float32)
        prepare_blocks(
            run.blocks(),
            config.memory,
            META,
            resident=run.network.parameters(),
            preserve_rng_state=not hasattr(run.network, "set_dropout_keys"),
            transport=transport,
        )
        optimizer = optimizer_with_states(run.network)
        trained = counter.live
        counter.reset_peak()
        counter.seconds = 0.0
        forward_s = one_step(run, batch, optimizer, counter)
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
    )


def _rehearsing(trainer: NetworkTrainer, row: Row) -> NetworkTrainer:
    """Returns a trainer of the same run with a row's flags, on the meta device."""
    config = trainer.config
    quantisation = config.quantisation
    if row.quantisation != quantisation.transformer:
        quantisation = {
            None: QuantisationSettings(),
            "fp8": QuantisationSettings(fp8_base_unet=True),
            "fp8_fast": QuantisationSettings(fp8_base_unet=True, fp8_fast=True),
            "nf4": QuantisationSettings(nf4_base=True),
        }[row.quantisation]
    run = copy.copy(trainer)
    memory = dataclasses.replace(row.applied_to(config.memory), blocks_to_swap=None)
    run.config = dataclasses.replace(config, memory=memory, quantisation=quantisation)
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
    copies = _EXTRA_STATES.get(settings.resolved_optimizer.lower(), 0) + (settings.ema_decay is not None)
    copies += run.config.schedule.gradient_accumulation_steps > 1  # gradients are there during the forward pass
    copies += run.num_processes > 1  # the buckets that gradients are exchanged in
    return copies * size


# ---- what comes before the training ----


def _encoding_gib(
    trainer: NetworkTrainer, quantisation: QuantisationSettings, batch: Batch, allowance: Allowance
) -> float:
    """Returns what filling the caches needs."""
    needs = [0]
    if trainer.config.data.cache_latents:
        weights = trainer.autoencoder_numbers() * trainer.autoencoder_dtype.itemsize
        needs.append(weights + autoencoder_bytes(trainer, batch))
    if trainer.config.data.cache_text_encoder_outputs:
        needs.append(_encoder_bytes(trainer, quantisation.text_encoder))
    return allowance.with_allowance(max(needs))


def _encoder_bytes(trainer: NetworkTrainer, kind: Quantisation | None) -> int:
    """Returns what encoding captions of the longest length needs."""
    encoder = trainer.rehearse_text_encoder(trainer.weight_dtype, _reading(kind))
    counter = LiveBytes(META)
    with torch.no_grad(), counter:
        encoder.encode([trainer.longest_caption()] * _CAPTIONS_AT_ONCE)
    return bytes_of((*encoder.model.parameters(), *encoder.model.buffers()), META) + counter.peak


def autoencoder_bytes(trainer: NetworkTrainer, batch: Batch) -> int:
    """Returns what encoding one picture needs beside the weights; several that do not fit are encoded one by one."""
    width, height = _size_px(batch)
    return width * height * _AUTOENCODER_BYTES_PX * trainer.autoencoder_dtype.itemsize


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
    """Returns what comes on top: CUDA's context too, unless the limit is what it has left free."""
    found = Allowance.read()
    return Allowance(found.share, _CONTEXT_IS_THERE_GIB) if asked == "auto" else found
