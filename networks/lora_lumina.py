"""LoRA for Lumina Image 2.0: the network module that ``--network_module networks.lora_lumina`` names.

What it reaches is data, see the tables in :mod:`networks.lora_lumina_args`; this file joins them with models and files.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from library.errors import NetworkError, some
from networks.lora_files import drop_unused_layers, guess, read_lora_file, to_factors
from networks.lora_lumina_args import GEMMA2, LUMINA, NetworkArgs, check_network_args
from networks.lora_network import Dropouts, LoRANetwork, LoraPlus
from networks.lora_plan import Plan, linears, plan_of, plan_of_file, qkv_rows
from networks.lora_table import assign

__all__ = ["GEMMA2", "LUMINA", "check_network_args", "create_network", "create_network_from_weights"]

logger = logging.getLogger(__name__)

DEFAULT_DIM = 4
DEFAULT_ALPHA = 1.0


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: Any,
    text_encoders: Sequence[nn.Module | None] | None,
    unet: nn.Module,
    neuron_dropout: float | None = None,
    **network_args: str,
) -> LoRANetwork:
    """Returns a new LoRA network for the given models.

    Args:
        multiplier: factor on the LoRA's part.
        network_dim: rank of every component that has none of its own; None means 4.
        network_alpha: strength is alpha / rank, for all ranks; None means 1, 0 means alpha = rank.
        vae: not used.
        text_encoders: Gemma2 models that get a LoRA; none or empty where Gemma2 is not trained.
        unet: the Lumina transformer.
        neuron_dropout: ``--network_dropout``.
        **network_args: texts, see :class:`networks.lora_lumina_args.NetworkArgs`.

    Raises:
        NetworkError: an argument is wrong, or a model is not what the tables are for.
    """
    args = _checked(network_args)
    dim = DEFAULT_DIM if network_dim is None else network_dim
    alpha = DEFAULT_ALPHA if network_alpha is None else network_alpha
    plans = []
    encoders = [linears(encoder) for encoder in text_encoders or () if encoder is not None]
    for encoder in encoders:
        plans.append(plan_of(GEMMA2, encoder, assign(GEMMA2, encoder, {}, dim), alpha, split=False))
    modules = linears(unet)
    assignments = assign(LUMINA, modules, args.ranks, dim, args.blocks, args.numbers)
    plans.append(plan_of(LUMINA, modules, assignments, alpha, split=args.split_qkv))
    return _network(plans, multiplier, neuron_dropout, args, _num_layers(encoders), qkv_rows(LUMINA, modules))


def create_network_from_weights(
    multiplier: float,
    file: str | Path | None,
    vae: Any,
    text_encoders: Sequence[nn.Module | None] | None,
    unet: nn.Module,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,
    neuron_dropout: float | None = None,
    **network_args: str,
) -> tuple[LoRANetwork, dict[str, Tensor]]:
    """Returns the network that a LoRA file holds, its weights loaded, and the file's tensors under kohya's names.

    Modules, ranks and alphas are the file's; the other network arguments (dropouts, LoRA+, split_qkv) count as usual.

    Args:
        multiplier: factor on the LoRA's part.
        file: LoRA file; may be None when ``weights_sd`` is given.
        vae: not used.
        text_encoders: Gemma2 models; needed where the file holds a LoRA for Gemma2.
        unet: the Lumina transformer.
        weights_sd: the file's tensors, where they are read already.
        for_inference: the network is in eval mode and needs no gradient.
        neuron_dropout: ``--network_dropout``.
        **network_args: texts, see :class:`networks.lora_lumina_args.NetworkArgs`.

    Raises:
        NetworkError: the file cannot be read or does not fit the models, or an argument is wrong.
    """
    args = _checked(network_args)
    _warn_of_what_the_file_decides(args)
    source = "the given weights" if file is None else str(file)
    if weights_sd is None:
        if file is None:
            raise RuntimeError("create_network_from_weights needs a file or weights_sd")
        weights_sd = read_lora_file(Path(file))
    modules = linears(unet)
    rows = qkv_rows(LUMINA, modules)
    encoders = [linears(encoder) for encoder in text_encoders or () if encoder is not None]
    num_layers = _num_layers(encoders)
    factors = drop_unused_layers(to_factors(weights_sd, rows, source), GEMMA2.prefix, num_layers, source)
    plans = [plan_of_file(GEMMA2, encoder, factors, split=False, source=source) for encoder in encoders]
    plans.append(plan_of_file(LUMINA, modules, factors, args.split_qkv, source))
    if not any(plan.modules for plan in plans):
        raise NetworkError(
            f"LoRA file {source} has no module of this model ({some(factors) or 'it is empty'}){guess(weights_sd)};"
            " give a LoRA that was made for it"
        )
    network = _network(plans, multiplier, neuron_dropout, args, num_layers, rows)
    network.load_factors(factors, weights_sd, source)
    if for_inference:
        network.eval().requires_grad_(False)
    return network, network.file_state_dict()


def _checked(network_args: Mapping[str, str]) -> NetworkArgs:
    args = check_network_args(network_args)
    for name in args.without_effect:
        logger.warning("--network_args: %s has no effect, because Lumina has no convolutions", name)
    return args


def _warn_of_what_the_file_decides(args: NetworkArgs) -> None:
    given = list(args.ranks) + ([] if args.blocks is None else ["train_blocks"])
    given += ["train_block_indices"] if args.numbers else []
    if given:
        logger.warning(
            "--network_args: %s: no effect, because modules and ranks are those of the LoRA file", ", ".join(given)
        )


def _num_layers(encoders: Sequence[Mapping[str, nn.Module]]) -> int:
    paths = [path for encoder in encoders for path in encoder]
    return 1 + max((int(match[1]) for path in paths if (match := re.match(r"layers\.(\d+)\.", path))), default=-1)


def _network(
    plans: Sequence[Plan],
    multiplier: float,
    neuron_dropout: float | None,
    args: NetworkArgs,
    text_encoder_layers: int,
    rows: tuple[int, int, int] | None,
) -> LoRANetwork:
    general = args.loraplus_lr_ratio
    network = LoRANetwork(
        plans,
        GEMMA2.prefix,
        multiplier=multiplier,
        dropouts=Dropouts(neuron_dropout or 0.0, args.rank_dropout or 0.0, args.module_dropout or 0.0),
        lora_plus=LoraPlus(
            unet=args.loraplus_unet_lr_ratio or general,
            text_encoder=args.loraplus_text_encoder_lr_ratio or general,
        ),
        text_encoder_layers=text_encoder_layers,
        qkv_rows=rows,
    )
    if args.loraplus_text_encoder_lr_ratio is not None and not network.text_encoder_loras:
        logger.warning("--network_args: loraplus_text_encoder_lr_ratio has no effect, because Gemma2 gets no LoRA")
    if args.verbose:
        network.log_modules()
    return network
