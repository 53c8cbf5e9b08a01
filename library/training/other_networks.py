"""What network modules of others (LyCORIS, for one) need, and what they leave to the trainer to notice.

They know sd-scripts' trainers: computing under autocast, ``network_dropout`` under the name ``dropout``, and a caller that
prints what a file did not fit. Whether a module is one of others is :attr:`NetworkBuilder.has_companion`.
"""

from __future__ import annotations

import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import NetworkError, SettingsError, UserError, some

if TYPE_CHECKING:
    import torch

_OF_WRONG_VALUES: tuple[type[Exception], ...] = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    TypeError,
    ValueError,
)


def run_under_autocast(models: Iterable[Any], device: torch.device, dtype: torch.dtype) -> None:
    """Makes models compute under autocast: the networks' parameters may be float32 beside weights in ``dtype``.

    Args:
        models: modules whose ``forward`` is wrapped.
        device: where they compute.
        dtype: of their weights; in float32 there is nothing to cast.
    """
    import torch

    if dtype == torch.float32:
        return
    for model in models:
        model.forward = torch.autocast(device.type, dtype)(model.forward)


@contextmanager
def refusing(what: str, *further: type[Exception]) -> Iterator[None]:
    """Turns errors that wrong values make in other people's code into the user's.

    What a module finds wrong it tells by whatever error comes first, a ``KeyError`` for an unknown name.

    Args:
        what: begins the message: the flags, and what cannot be done with them.
        further: kinds of errors that mean the same here.

    Raises:
        SettingsError: the code ended with such an error.
    """
    try:
        yield
    except UserError:
        raise
    except _OF_WRONG_VALUES + further as error:
        raise SettingsError(f"{what}: {in_short(error)}") from error


def in_short(error: BaseException) -> str:
    """Returns what an error says and which line raised it; that line itself where it says nothing."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [str(last.line)]
    says = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
    return f"{type(error).__name__}: {says} ({Path(last.filename).name}, line {last.lineno})"


def require_loaded(result: Any, file: Path) -> None:
    """Makes sure that a network took all of a LoRA file, and the file held all of the network.

    Args:
        result: of the network's ``load_weights``: what torch's ``load_state_dict`` returns, or LyCORIS' form of it.
        file: the LoRA file.

    Raises:
        NetworkError: it did not.
    """
    found = result if isinstance(result, Mapping) else vars(result) if hasattr(result, "missing_keys") else {}
    lists = {name.replace("_", " "): names for name, names in found.items()}
    missing, unexpected = (list(lists.get(f"{kind} keys") or ()) for kind in ("missing", "unexpected"))
    problems = [f"no value for {len(missing)} tensors ({some(missing)})"] if missing else []
    if unexpected:
        problems.append(f"{len(unexpected)} tensors that this network does not have ({some(unexpected)})")
    if problems:
        raise NetworkError(
            f"LoRA file {file} does not fit: it has {'; '.join(problems)}. Use the --network_args that it was made with, or"
            " --dim_from_weights"
        )


def require_all_taken(network: Any, tensors: Collection[str] | None, file: Path) -> None:
    """Makes sure that a network made from a LoRA file has a module for each of the file's.

    Args:
        network: has ``text_encoder_loras`` and ``unet_loras`` as sd-scripts' networks do; others are taken on trust.
        tensors: names of the file's tensors; a module's begin with its name and a dot.
        file: the LoRA file.

    Raises:
        NetworkError: some are left out.
    """
    made = [lora for part in ("text_encoder_loras", "unet_loras") for lora in getattr(network, part, ())]
    names = {getattr(lora, "lora_name", None) for lora in made}
    left = dict.fromkeys(module for module, dot, _ in (name.partition(".") for name in tensors or ()) if dot)
    left_out = [name for name in left if name not in names]
    if left_out and None not in names and hasattr(network, "unet_loras"):
        raise NetworkError(
            f"LoRA file {file} does not fit: it has {len(left_out)} modules that find no place in what this run trains or"
            f" reads ({some(left_out)}). Give a LoRA that was made for this model, with a text encoder's part only where the"
            " text encoder is trained too"
        )
