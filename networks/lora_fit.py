"""Whether a LoRA file's factors fit a network, and what to say where they do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from library.errors import NetworkError, some
from networks.lora import LoRAModule, SplitLoRAModule, is_block_diagonal
from networks.lora_files import Factors, guess


def require_fit(
    factors: Mapping[str, Factors],
    modules: Mapping[str, LoRAModule],
    text_encoder_prefix: str,
    tensors: Mapping[str, Tensor],
    source: str,
) -> None:
    """Checks that a file holds every module of a network, of its shape, and nothing else.

    Args:
        factors: the file's, by kohya's names.
        modules: the network's, by the same names.
        text_encoder_prefix: names that begin so belong to the text encoder.
        tensors: what the factors came from, for the guess what the file is.
        source: the file, for messages.

    Raises:
        NetworkError: it does not; the message counts and names what is wrong.
    """
    problems = []
    unexpected = [name for name in factors if name not in modules]
    missing = [name for name in modules if name not in factors]
    misshaped = [
        f"{name} {_shapes(one)} instead of {modules[name].file_shapes()}"
        for name, one in factors.items()
        if name in modules and _shapes(one) != modules[name].file_shapes()
    ]
    if unexpected:
        problems.append(f"{len(unexpected)} modules that this network does not have ({some(unexpected)})")
    if missing:
        problems.append(f"no weights for {len(missing)} modules ({some(missing)})")
    if misshaped:
        problems.append(f"{len(misshaped)} modules of other shapes ({some(misshaped)})")
    if problems:
        what = guess(tensors) if unexpected or missing else ""
        if _holds_text_encoder_alone(unexpected, modules, f"{text_encoder_prefix}_"):
            remedy = (
                "It holds a LoRA of the text encoder, which this run does not train: train it too, or use another file."
            )
        elif len(unexpected) == len(factors):
            remedy = "Give a LoRA that was made for this model."
        elif misshaped or unexpected:
            remedy = "--dim_from_weights takes modules, ranks and alphas from the file."
        else:
            remedy = "Use the --network_args that the file was made with, or --dim_from_weights."
        raise NetworkError(f"LoRA file {source} does not fit: it has {'; '.join(problems)}{what}. {remedy}")
    for name, one in factors.items():
        lora = modules[name]
        if isinstance(lora, SplitLoRAModule):
            require_split(one.up, lora.rows, name, source)


def require_split(up: Tensor, rows: Sequence[int], name: str, source: str) -> None:
    """Checks that a fused ``up`` is made of separate LoRAs for q, k and v.

    Raises:
        NetworkError: it is not.
    """
    if not is_block_diagonal(up, rows):
        raise NetworkError(
            f"LoRA file {source}: {name} was not trained with split_qkv (its lora_up is not block-diagonal); leave"
            " split_qkv out"
        )


def _shapes(one: Factors) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(one.down.shape), tuple(one.up.shape)


def _holds_text_encoder_alone(unexpected: Sequence[str], modules: Mapping[str, LoRAModule], prefix: str) -> bool:
    """Whether all that is too much belongs to a text encoder that the network does not reach."""
    if not unexpected or any(name.startswith(prefix) for name in modules):
        return False
    return all(name.startswith(prefix) for name in unexpected)
