"""The forms in which programs want LoRA files, made from factors: sd-scripts, ComfyUI, diffusers.

========== =================================================== ========== ======== =====================
form       a module's key                                      alpha      q, k, v  Gemma2's modules
========== =================================================== ========== ======== =====================
sd-scripts ``lora_unet_layers_0_attention_qkv.lora_down.``     as it is   fused    as they are
comfyui    ``diffusion_model.layers.0.attention.qkv.lora_A.``  as it is   fused    ``text_encoders. ...``
diffusers  ``transformer.layers.0.attn.to_q.lora_A.``          in factors apart    left out
========== =================================================== ========== ======== =====================

diffusers' loader of this model takes no alphas among the weights, and no text encoder. Where ranks differ, versions of it
disagree about the strength (up to 0.35 all modules get the alpha of the first one's rank, in 0.42 each its own), so all
modules of a file for it get the same rank, by factors of zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from library.errors import NetworkError, some
from networks.lora_files import Factors, guess, qkv_rows_in, to_factors
from networks.lora_keys import comfyui_name, diffusers_name, is_fused, is_text_encoder, model_path
from networks.lora_sum import at_strength

# Words of --save_precision.
PRECISION = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Form:
    """A LoRA in one form.

    Attributes:
        tensors: what the file holds.
        left_out: kohya's names of the modules that the form has no place for.
    """

    tensors: dict[str, Tensor]
    left_out: Sequence[str] = ()


def form_of(keys: Sequence[str]) -> str:
    """Returns whose names a LoRA file's keys are, for messages."""
    starts = (("lora_unet_", "lora_te"), "sd-scripts"), (("diffusion_model.", "text_encoders."), "ComfyUI")
    for prefix, program in (*starts, (("transformer.",), "diffusers")):
        if all(key.startswith(prefix) for key in keys):
            return program
    return "other programs"


def factors_of(tensors: Mapping[str, Tensor], source: str) -> dict[str, Factors]:
    """Returns the modules of a LoRA file in any form, by kohya's names, without knowing the model's sizes.

    Args:
        tensors: the file's.
        source: the file, for messages.

    Raises:
        NetworkError: it is no LoRA, or holds modules that neither Lumina's transformer nor Gemma2 has.
    """
    factors = to_factors(tensors, qkv_rows_in(tensors, source), source)
    unknown = [name for name in factors if model_path(name) is None]
    other_model = guess(tensors)  # tells one whose modules have the same names by their sizes
    if unknown or other_model or not factors:
        what = "sizes are not this model's" if factors else "it holds nothing"
        if unknown:
            what = f"{len(unknown)} of {len(factors)} modules are none of this model ({some(unknown)})"
        raise NetworkError(f"{source}: {what}{other_model}; give a LoRA that was made for Lumina Image 2.0")
    return factors


def dtype_of(*files: Mapping[str, Tensor]) -> torch.dtype:
    """Returns the dtype that holds the factors of LoRA files exactly; fp8, which has no room for a strength, counts as bf16.

    Args:
        *files: their tensors.
    """
    given = (tensor.dtype for tensors in files for key, tensor in tensors.items() if not key.endswith(".alpha"))
    return reduce(torch.promote_types, (torch.bfloat16 if dtype.itemsize == 1 else dtype for dtype in given))


def to_form(factors: Mapping[str, Factors], form: str, dtype: torch.dtype, source: str) -> Form:
    """Returns a LoRA in the form of a program; its product, alpha / rank * up @ down, is the same in all.

    Nothing is rounded but by ``dtype``, and by an alpha / rank that is no power of two where it goes into the factors.

    Args:
        factors: modules of Lumina's transformer and Gemma2 by kohya's names, see :func:`factors_of`.
        form: one of ``FORMS``.
        dtype: of the factors in the file.
        source: the file that they are from, for messages.

    Raises:
        NetworkError: a fused Linear has no shape of this model, numbers are not finite, or nothing is left.
    """
    made = FORMS[form](factors, source)
    if not made.tensors:
        raise NetworkError(
            f"{source}: nothing is left for {form}, which takes no LoRA of Gemma2, and there is no other"
        )
    cast = {
        key: tensor if key.endswith(".alpha") else tensor.to(dtype).contiguous() for key, tensor in made.tensors.items()
    }
    wrong = [key for key, tensor in cast.items() if not bool(torch.isfinite(tensor.float()).all())]
    if wrong:
        raise NetworkError(
            f"{source}: {len(wrong)} of {len(cast)} tensors would hold numbers that are not finite ({some(wrong)});"
            " if the file itself is sound, give --save_precision bf16 or float, which have a wider range"
        )
    return Form(cast, made.left_out)


def _sd_scripts(factors: Mapping[str, Factors], source: str) -> Form:
    return Form(_with_alphas(factors, "lora_down", "lora_up"))


def _comfyui(factors: Mapping[str, Factors], source: str) -> Form:
    return Form(_with_alphas({comfyui_name(name): one for name, one in factors.items()}, "lora_A", "lora_B"))


def _with_alphas(modules: Mapping[str, Factors], down: str, up: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for key, one in modules.items():
        tensors[f"{key}.alpha"] = torch.tensor(one.alpha)
        tensors[f"{key}.{down}.weight"], tensors[f"{key}.{up}.weight"] = one.down, one.up
    return tensors


def _diffusers(factors: Mapping[str, Factors], source: str) -> Form:
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, one in factors.items():
        if is_text_encoder(name):
            continue
        down, up = at_strength(one)
        if not is_fused(name):
            pairs[diffusers_name(name)] = down, up
            continue
        for part, of_part in zip("qkv", _split(name, down, up, source), strict=True):
            if of_part is not None:
                pairs[diffusers_name(name, part)] = of_part
    rank = max((down.shape[0] for down, _ in pairs.values()), default=0)
    tensors: dict[str, Tensor] = {}
    for key, (down, up) in pairs.items():
        more = rank - down.shape[0]
        tensors[f"{key}.lora_A.weight"] = torch.cat([down, down.new_zeros(more, down.shape[1])])
        tensors[f"{key}.lora_B.weight"] = torch.cat([up, up.new_zeros(up.shape[0], more)], dim=1)
    return Form(tensors, [name for name in factors if is_text_encoder(name)])


def _split(name: str, down: Tensor, up: Tensor, source: str) -> list[tuple[Tensor, Tensor] | None]:
    """Returns the factors of q, k and v out of those of the fused Linear.

    Where each rank acts on one of them alone, as after joining separate ones, each gets its own ranks and one without any
    is None; else all share ``down``.
    """
    query = down.shape[1]
    rest = up.shape[0] - query
    if rest <= 0 or rest % 2:
        raise NetworkError(
            f"{source}: the LoRA of {name} has {query} inputs and {up.shape[0]} outputs, which are no queries, keys and"
            " values of this model; it is a LoRA for another one"
        )
    ups = up.split([query, rest // 2, rest // 2])
    acts = torch.stack([part.any(dim=0) for part in ups])  # (3, rank): on which of them each rank acts
    if bool((acts.sum(dim=0) > 1).any()) or not bool(acts.any()):
        return [(down, part) for part in ups]
    return [(down[own], part[:, own]) if bool(own.any()) else None for own, part in zip(acts, ups, strict=True)]


FORMS: dict[str, Callable[[Mapping[str, Factors], str], Form]] = {
    "sd-scripts": _sd_scripts,
    "comfyui": _comfyui,
    "diffusers": _diffusers,
}
