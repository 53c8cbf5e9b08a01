"""What one step of a run needs: the step itself, rehearsed on the meta device, where tensors have no memory.

It is the real thing: the run's model, network, dtype and optimizer, its loss, its checkpointing and offload, on as many
pictures of the largest bucket as a batch can have, with captions of the longest length. Only attention kernels and copies
to the host are stand-ins (``memory/rehearsal.py``). Streaming changes nothing in a step but where weights lie, so it is
arithmetic (:class:`~library.memory.fit.Need`).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from library.errors import SettingsError
from library.lumina.autoencoder import TILE_PX, WHOLE_PX
from library.lumina.strips import STRIP_BYTES
from library.memory.attention_masks import AttentionFn
from library.memory.block_stream import streamed_bytes
from library.memory.fit import COMPUTE_FLOPS, MEMORY_BYTES, Need, Row, ring_bytes
from library.memory.half_attention import in_halves
from library.memory.live_bytes import LiveBytes, Speed, bytes_of
from library.memory.prepare import prepare_blocks
from library.memory.quantised import quantise_block
from library.memory.rehearsal import RehearsedAttention, RehearsedTransport
from library.memory.settings import Quantisation, QuantisationSettings
from library.memory.transport import Lane
from library.training.hooks import Reading
from library.training.network_building import NetworkBuilder
from library.training.optimizer_names import OPTIMIZERS
from library.training.optimizers import clip_gradients

if TYPE_CHECKING:
    from library.data.items import Batch
    from library.training.arguments import TrainConfig
    from library.training.network_trainer import NetworkTrainer

META = torch.device("meta")
_AUTOENCODER_BYTES_PX = 520
"""Device memory for encoding a pixel, for each byte of a number: 1.01 GiB for 1024 x 1024 px in bf16
(``library/lumina/autoencoder.py``)."""
_LARGEST_BYTES_PX = 2 * 128
"""Likewise of the encoder's largest convolution, its input and its output."""
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
    halves = config.memory.in_halves
    attention: AttentionFn = RehearsedAttention(counter, expands)
    attention = in_halves(attention) if halves else attention
    run.model = run.rehearse_model(run.weight_dtype, attention, reading_of(config.quantisation.transformer, halves))
    encoders: list[nn.Module] = []
    text_layers: tuple[int, ...] = ()
    if not config.data.cache_text_encoder_outputs:
        run.text_encoder = run.rehearse_text_encoder(
            run.weight_dtype, reading_of(config.quantisation.text_encoder, halves)
        )
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
    further = besides(run, optimizer)
    step = counter.peak
    if not config.data.cache_latents:
        encoder = autoencoder_bytes(run, batch)
        weights += run.autoencoder_numbers() * run.autoencoder_dtype.itemsize
        step = max(step, trained + encoder)
    return Need(
        weights,
        trained + further,
        step + further,
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
    run.config = dataclasses.replace(config, memory=memory, quantisation=settings_of(config, row.quantisation))
    run.networks = NetworkBuilder(run.config)
    run.device = META
    run.text_encoder, run.autoencoder = None, None
    return run


def reading_of(kind: Quantisation | None, in_halves: bool) -> Reading:
    if kind is None and not in_halves:
        return Reading()
    return Reading(finish=partial(quantise_block, kind=kind, device=META, in_halves=in_halves))


def optimizer_with_states(network: nn.Module) -> torch.optim.Optimizer:
    """Returns AdamW over the trained parameters, with the memory that it has from its first step on."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    # One kernel, as AdamW's step is on a GPU, needs less; but there is none for meta tensors, and others work so.
    optimizer = torch.optim.AdamW(parameters, foreach=True)
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


def besides(run: NetworkTrainer, optimizer: torch.optim.Optimizer) -> int:
    """Returns bytes that stay on the device and that the rehearsed step does not have."""
    settings = run.config.optimizer
    size = bytes_of((parameter for group in optimizer.param_groups for parameter in group["params"]), META)
    known = OPTIMIZERS.get(settings.resolved_optimizer.lower())
    class_name = settings.resolved_optimizer.rpartition(".")[2] if known is None else known.class_name
    copies = _EXTRA_STATES.get(class_name, 0) + (settings.ema_decay is not None)
    copies += run.config.schedule.gradient_accumulation_steps > 1  # gradients are there during the forward pass
    copies += run.processes.count > 1  # the buckets that gradients are exchanged in
    return copies * size


# ---- what comes before the training ----


def encoder_bytes(trainer: NetworkTrainer, kind: Quantisation | None) -> dict[bool, int]:
    """Returns what encoding captions of the longest length needs: with its layers streamed, all of them, or not."""
    encoder = trainer.rehearse_text_encoder(trainer.weight_dtype, reading_of(kind, trainer.config.memory.in_halves))
    counter = LiveBytes(META)
    with torch.no_grad(), counter:
        count = trainer.config.data.text_encoder_batch_size or _CAPTIONS_AT_ONCE
        encoder.encode([trainer.longest_caption()] * count)
    whole = bytes_of((*encoder.model.parameters(), *encoder.model.buffers()), META) + counter.peak
    layers = [streamed_bytes(layer) for layer in encoder.blocks]
    return {False: whole, True: whole - sum(layers) + ring_bytes(layers, len(layers))}


def autoencoder_bytes(trainer: NetworkTrainer, batch: Batch) -> int:
    """Returns what encoding one picture needs beside the weights; several that do not fit are encoded one by one."""
    num_px = math.prod(size_px(batch))
    if trainer.config.memory.vae_tiling and num_px > WHOLE_PX**2:
        num_px = TILE_PX**2
    size = trainer.autoencoder_dtype.itemsize
    # Beside it there is a strip of a convolution, or all of a small one, and what its kernel works with, as much again.
    return num_px * _AUTOENCODER_BYTES_PX * size + 2 * min(num_px * _LARGEST_BYTES_PX * size, STRIP_BYTES)


def size_px(batch: Batch) -> tuple[int, int]:
    return batch.draws[0].item.bucket_px


# ---- settings ----


def settings_of(config: TrainConfig, kind: Quantisation | None) -> QuantisationSettings:
    """Returns the settings of a kind of weights: the user's own where they say so already."""
    if kind == config.quantisation.transformer:
        return config.quantisation
    if kind == "nf4":
        return QuantisationSettings(nf4_base=True)
    # A Gemma2 that stays on the device beside the model is halved too.
    stays = not config.data.cache_text_encoder_outputs
    return QuantisationSettings(fp8_base=stays, fp8_base_unet=not stays)
