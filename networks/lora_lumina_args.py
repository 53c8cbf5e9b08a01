"""The arguments of ``networks.lora_lumina`` and the tables that give them their meaning; torch is not needed here.

``--network_args`` brings texts. :func:`check_network_args` turns them into :class:`NetworkArgs` or refuses them, and a
trainer can call it before it imports torch or opens a model. It finds this module by name: ``<network module>_args``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from library.errors import NetworkError, nearest
from networks.lora_table import Component, Table, assign

LUMINA = Table(
    model="the Lumina transformer",
    prefix="lora_unet",
    sections=(
        "context_refiner",
        "noise_refiner",
        "layers",
        "final_layer",
        "x_embedder",
        "t_embedder",
        "cap_embedder",
    ),
    components=(
        Component("attention", r"layers\.\d+\.attention\.(qkv|out)", ("attn_dim",)),
        Component("mlp", r"layers\.\d+\.feed_forward\.w[123]", ("mlp_dim",)),
        Component("modulation", r"layers\.\d+\.adaLN_modulation\.1", ("mod_dim",)),
        # Inside the refiners the narrower setting wins: refiner_dim before the ranks by kind.
        Component(
            "refiner attention", r"(noise|context)_refiner\.\d+\.attention\.(qkv|out)", ("refiner_dim", "attn_dim")
        ),
        Component("refiner mlp", r"(noise|context)_refiner\.\d+\.feed_forward\.w[123]", ("refiner_dim", "mlp_dim")),
        Component("refiner modulation", r"noise_refiner\.\d+\.adaLN_modulation\.1", ("refiner_dim", "mod_dim")),
        Component("final layer", r"final_layer\.linear"),
        Component("final layer modulation", r"final_layer\.adaLN_modulation\.1", ("mod_dim",)),
        Component("image embedder", r"x_embedder", ("embedder_dims[x]",), on_by_default=False),
        Component("time embedder", r"t_embedder\.mlp\.[02]", ("embedder_dims[t]",), on_by_default=False),
        Component("caption embedder", r"cap_embedder\.1", ("embedder_dims[cap]",), on_by_default=False),
    ),
    fused_qkv=r"(layers|noise_refiner|context_refiner)\.\d+\.attention\.qkv",
)

GEMMA2 = Table(
    model="Gemma2",
    prefix="lora_te",
    sections=("layers",),
    components=(
        Component("Gemma2 attention", r"layers\.\d+\.self_attn\.[qkvo]_proj"),
        Component("Gemma2 mlp", r"layers\.\d+\.mlp\.(gate|up|down)_proj"),
    ),
)

TRAIN_BLOCKS: dict[str, tuple[str, ...] | None] = {
    "all": None,
    "transformer": ("layers",),
    "refiners": ("noise_refiner", "context_refiner"),
    "noise_refiner": ("noise_refiner",),
    "context_refiner": ("context_refiner",),
}

_BLOCK_LINEARS = ("attention.qkv", "attention.out", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
# Every kind of Linear that a Lumina transformer has, once: enough to see whether a rank argument can reach anything.
LINEAR_KINDS: tuple[str, ...] = (
    "x_embedder",
    "t_embedder.mlp.0",
    "t_embedder.mlp.2",
    "cap_embedder.1",
    *(f"{block}.0.{linear}" for block in ("context_refiner", "noise_refiner", "layers") for linear in _BLOCK_LINEARS),
    "noise_refiner.0.adaLN_modulation.1",
    "layers.0.adaLN_modulation.1",
    "final_layer.linear",
    "final_layer.adaLN_modulation.1",
)


_LARGEST_RANK = 16384  # the widest layer has fewer inputs and outputs


def _rank(text: str) -> int:
    rank = int(text)
    if not 0 <= rank <= _LARGEST_RANK:
        raise ValueError
    return rank


def _embedder_ranks(text: str) -> tuple[int, int, int]:
    x, t, cap = (_rank(part) for part in text.strip().removeprefix("[").removesuffix("]").split(","))
    return x, t, cap


def _probability(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise ValueError
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not (value > 0 and math.isfinite(value)):
        raise ValueError
    return value


def _boolean(text: str) -> bool:
    return {"true": True, "1": True, "false": False, "0": False}[text.lower()]


def _blocks(text: str) -> str:
    if text not in TRAIN_BLOCKS:
        raise ValueError
    return text


def _indices(text: str) -> frozenset[int] | None:
    if text == "all":
        return None
    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        start, end = _rank(first), _rank(last if dash else first)
        if end < start:
            raise ValueError
        numbers.update(range(start, end + 1))
    return frozenset(numbers)


_EXPECTED: dict[Callable[[str], Any], str] = {
    _rank: f"a whole number from 0 (which leaves the component out) to {_LARGEST_RANK}",
    _embedder_ranks: f"three whole numbers from 0 to {_LARGEST_RANK}, such as [4,4,4] (image, time, caption; 0 = none)",
    _probability: "a number from 0 to below 1",
    _positive: "a number above 0",
    _boolean: "true or false",
    _indices: "numbers and ranges of them such as 0-3,8,20-25, or all",
    _blocks: f"one of {', '.join(TRAIN_BLOCKS)}",
}


def _argument(parse: Callable[[str], Any], default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"parse": parse, "help": help})


@dataclasses.dataclass(frozen=True)
class NetworkArgs:
    """``--network_args``, checked. None means: not given."""

    attn_dim: int | None = _argument(_rank, None, "rank of attention (qkv, out), in the refiners too")
    mlp_dim: int | None = _argument(_rank, None, "rank of the feed-forward layers (w1, w2, w3), in the refiners too")
    mod_dim: int | None = _argument(_rank, None, "rank of the adaLN modulation in blocks and final layer")
    refiner_dim: int | None = _argument(
        _rank, None, "rank of everything inside the refiners; wins over the three above"
    )
    embedder_dims: tuple[int, int, int] | None = _argument(
        _embedder_ranks, None, "ranks [x,t,cap] of the image, time and caption embedders, which are off by default"
    )
    train_blocks: str = _argument(
        _blocks, "all", "which blocks are trained; embedder_dims and Gemma2 do not depend on it"
    )
    train_block_indices: frozenset[int] | None = _argument(
        _indices, None, "which of the main blocks (0 to 25) are trained; refiners and the rest do not depend on it"
    )
    split_qkv: bool = _argument(_boolean, False, "train q, k and v of each attention as LoRAs of their own")
    rank_dropout: float | None = _argument(_probability, None, "share of ranks that is dropped, for each sample")
    module_dropout: float | None = _argument(
        _probability, None, "share of LoRA modules that is dropped, for each sample"
    )
    loraplus_lr_ratio: float | None = _argument(_positive, None, "LoRA+: learning rate of lora_up / that of lora_down")
    loraplus_unet_lr_ratio: float | None = _argument(_positive, None, "the same for the transformer alone")
    loraplus_text_encoder_lr_ratio: float | None = _argument(_positive, None, "the same for Gemma2 alone")
    conv_dim: int | None = _argument(_rank, None, "without effect: Lumina has no convolutions")
    conv_alpha: float | None = _argument(float, None, "without effect: Lumina has no convolutions")
    verbose: bool = _argument(_boolean, False, "list every module in the log")

    @property
    def ranks(self) -> dict[str, int]:
        """The rank arguments that were given, by the names that the table's rows use."""
        given = {name: getattr(self, name) for name in ("attn_dim", "mlp_dim", "mod_dim", "refiner_dim")}
        if self.embedder_dims is not None:
            given |= {
                f"embedder_dims[{key}]": rank for key, rank in zip(("x", "t", "cap"), self.embedder_dims, strict=True)
            }
        return {name: rank for name, rank in given.items() if rank is not None}

    @property
    def blocks(self) -> tuple[str, ...] | None:
        """The sections that ``train_blocks`` leaves, or None for all."""
        return TRAIN_BLOCKS[self.train_blocks]

    @property
    def numbers(self) -> dict[str, frozenset[int]]:
        """Section -> numbers of its blocks that ``train_block_indices`` leaves."""
        return {} if self.train_block_indices is None else {"layers": self.train_block_indices}

    @property
    def without_effect(self) -> list[str]:
        """Arguments that were given and can do nothing."""
        return [name for name in ("conv_dim", "conv_alpha") if getattr(self, name) is not None]


def check_network_args(args: Mapping[str, str]) -> NetworkArgs:
    """Returns ``--network_args`` with their types.

    Args:
        args: name -> text, as they come from ``name=value``.

    Raises:
        NetworkError: an argument is unknown, has the wrong type, is out of range, or reaches no module.
    """
    fields = {field.name: field for field in dataclasses.fields(NetworkArgs)}
    values: dict[str, Any] = {}
    for name, given in args.items():
        if name == "dropout":
            raise NetworkError(
                f"--network_args: dropout={given} is not an argument here; use --network_dropout={given}"
            )
        if name not in fields:
            raise NetworkError(
                f"--network_args: {name}={given} is not known{nearest(name, fields)}; known are {', '.join(fields)}"
            )
        parse = fields[name].metadata["parse"]
        try:
            values[name] = parse(str(given).strip())
        except (ValueError, KeyError) as error:
            raise NetworkError(
                f"--network_args: {name}={given} is not valid; expected {_EXPECTED.get(parse, 'a number')}"
            ) from error
    checked = NetworkArgs(**values)
    assign(LUMINA, LINEAR_KINDS, checked.ranks, default_rank=1, blocks=checked.blocks)
    if checked.numbers and checked.blocks is not None and "layers" not in checked.blocks:
        raise NetworkError(
            f"--network_args: train_block_indices chooses main blocks, and train_blocks={checked.train_blocks} trains"
            " none of them; leave one of the two out"
        )
    return checked
