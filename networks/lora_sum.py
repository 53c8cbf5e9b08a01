"""The sum of LoRAs as one LoRA, exactly, and a LoRA of a smaller rank that comes closest to it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library.errors import NetworkError
from networks.lora_files import Factors


@dataclass(frozen=True)
class Reduced:
    """LoRAs of a smaller rank.

    Attributes:
        factors: by kohya's names.
        kept: module -> norm of its new change of weights, relative to the old one's, in [0, 1].
    """

    factors: dict[str, Factors]
    kept: dict[str, float]


def at_strength(one: Factors, multiplier: float = 1.0) -> tuple[Tensor, Tensor]:
    """Returns float32 factors (r, in), (out, r) whose product is multiplier * alpha / r * up @ down.

    A power of two goes into down and the rest into up. So nothing is rounded where the strength is a power of two, and both
    leave the range of fp16 as late as can be.
    """
    strength = multiplier * one.alpha / one.down.shape[0]
    power = 2.0 ** round(math.log2(abs(strength)) / 2) if strength else 1.0
    return one.down * power, one.up * (strength / power)


def summed(loras: Sequence[tuple[Mapping[str, Factors], float]]) -> dict[str, Factors]:
    """Returns one LoRA whose change of the weights is the sum of several ones', each with its multiplier.

    Its rank in a module is the sum of theirs. Those with a multiplier of 0 are left out.

    Raises:
        NetworkError: they have a module in common, but not its shape.
    """
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for factors, multiplier in loras:
        for name, one in factors.items() if multiplier else ():
            down, up = at_strength(one, multiplier)
            others = parts.setdefault(name, [])
            if others and (others[0][0].shape[1], others[0][1].shape[0]) != (down.shape[1], up.shape[0]):
                raise NetworkError(
                    f"the files disagree about the shape of {name}: {others[0][1].shape[0]} x {others[0][0].shape[1]} and"
                    f" {up.shape[0]} x {down.shape[1]}; they are for different models"
                )
            others.append((down, up))
    return {
        name: _unscaled(torch.cat([down for down, _ in pairs]), torch.cat([up for _, up in pairs], dim=1))
        for name, pairs in parts.items()
    }


def reduced(factors: Mapping[str, Factors], rank: int) -> Reduced:
    """Returns LoRAs of at most this rank that come closest to the given ones in the Frobenius norm.

    They are the largest singular vectors, found in the r x r core between the factors' orthonormal bases. Modules of this
    rank or a smaller one stay as they are.

    Raises:
        NetworkError: a module has numbers that are not finite.
    """
    result = Reduced({}, {})
    for name, one in factors.items():
        if one.down.shape[0] <= rank:
            result.factors[name], result.kept[name] = one, 1.0
            continue
        down, up = (factor.double() for factor in at_strength(one))
        if not bool(torch.isfinite(down).all() and torch.isfinite(up).all()):
            raise NetworkError(
                f"the LoRA of {name} holds numbers that are not finite; a file is damaged, or --ratios are too large"
            )
        basis_in, core_in = torch.linalg.qr(down.T)  # (in, q), (q, r)
        basis_out, core_out = torch.linalg.qr(up)
        left, sizes, right = torch.linalg.svd(core_out @ core_in.T, full_matrices=False)
        halves = sizes[:rank].sqrt()
        result.factors[name] = _unscaled(
            (halves[:, None] * right[:rank] @ basis_in.T).float(), (basis_out @ left[:, :rank] * halves).float()
        )
        whole = float(sizes.norm())
        result.kept[name] = float(sizes[:rank].norm()) / whole if whole else 1.0
    return result


def _unscaled(down: Tensor, up: Tensor) -> Factors:
    return Factors(down.contiguous(), up.contiguous(), float(down.shape[0]))
