"""One LoRA module: its mathematics, its dropouts and its merging into the weight that it stands beside.

out = base(x) + up(down(x)) * multiplier * alpha / rank, with ``down`` (r,in) and ``up`` (out,r).

Shapes: B samples, S tokens, r rank. Modules that work on time embeddings see (B,in), all others (B,S,in).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.lora_dropout import NEURON, RANK, WHOLE_MODULE, DropoutKeys, kept, number_of
from networks.lora_product import FrozenProduct, LinearWithLoRA, frozen_product, is_observed


class _AddUp(torch.autograd.Function):
    """base + hidden up', written over ``base``: one matrix product that adds, without a tensor of that size between.

    ``base`` (...,out) is a Linear's fresh output, which nobody else needs; ``hidden`` (...,r), ``up`` (out,r).
    """

    @staticmethod
    def forward(ctx: Any, base: Tensor, hidden: Tensor, up: Tensor) -> Tensor:
        ctx.mark_dirty(base)
        ctx.save_for_backward(hidden, up)
        base.view(-1, base.shape[-1]).addmm_(hidden.reshape(-1, hidden.shape[-1]), up.t())
        return base

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden, up = ctx.saved_tensors
        (gradient,) = gradients
        of_up = gradient.reshape(-1, gradient.shape[-1]).t() @ hidden.reshape(-1, hidden.shape[-1])
        return gradient, gradient @ up, of_up


class LoRAModule(nn.Module):
    """A LoRA beside one Linear; :meth:`apply_to` puts it in place.

    Parameters are float32 and used in the dtype of the input. The Linear is not a submodule of the LoRA nor the LoRA
    of the Linear, so both keep their own state-dict keys.
    """

    alpha: Tensor
    dropout_number: Tensor

    def __init__(
        self,
        lora_name: str,
        org_module: nn.Module,
        *,
        rank: int,
        alpha: float | None = None,
        multiplier: float = 1.0,
        dropout: float | None = None,
        rank_dropout: float | None = None,
        module_dropout: float | None = None,
        dropout_keys: DropoutKeys | None = None,
    ) -> None:
        """Makes the factors: ``lora_down`` uniform as in ``nn.Linear``, ``lora_up`` zero.

        The initial values depend on ``torch.initial_seed()`` and the name alone, not on other modules.

        Args:
            lora_name: name in files.
            org_module: the Linear.
            rank: r.
            alpha: strength is alpha / rank; None or 0 means alpha = rank.
            multiplier: factor on the LoRA's part of the output.
            dropout: share of rank activations that is dropped in training.
            rank_dropout: share of ranks that is dropped in training, for each sample.
            module_dropout: share of samples for which the whole module is dropped in training.
            dropout_keys: where the keys of the batch are found.
        """
        super().__init__()
        self.lora_name = lora_name
        self._org = (org_module,)  # in a tuple, so that it is not registered as a submodule
        self._org_forward: Callable[..., Tensor] | None = None
        self._frozen: tuple[FrozenProduct | None] = (None,)  # as above
        self.multiplier = multiplier
        self.dropout, self.rank_dropout, self.module_dropout = (
            dropout or 0.0,
            rank_dropout or 0.0,
            module_dropout or 0.0,
        )
        self.dropout_keys = dropout_keys or DropoutKeys()
        self.lora_dim = rank
        # A tensor: as a Python number it would be a constant of the compiled graph, and each block would get its own.
        self.register_buffer("dropout_number", torch.tensor(number_of(lora_name)), persistent=False)
        self._strength = _float32(alpha or rank)
        self.register_buffer("alpha", torch.tensor(self._strength, dtype=torch.float32))
        self.register_load_state_dict_post_hook(_take_alpha_from_buffer)
        self._make_factors()

    def _make_factors(self) -> None:
        self.lora_down = _empty_linear(self.in_features, self.lora_dim)
        self.lora_up = self._make_up()
        generator = torch.Generator().manual_seed(number_of("lora", torch.initial_seed(), self.lora_name))
        nn.init.kaiming_uniform_(self.lora_down.weight, a=5**0.5, generator=generator)
        for parameter in self.lora_up.parameters():
            nn.init.zeros_(parameter)

    def _make_up(self) -> nn.Module:
        return _empty_linear(self.lora_dim, self.out_features)

    @property
    def org_module(self) -> nn.Module:
        """The Linear that the LoRA stands beside."""
        return self._org[0]

    @property
    def in_features(self) -> int:
        """Width of the Linear's input."""
        return int(getattr(self.org_module, "in_features"))  # noqa: B009 - quantised Linears have it too

    @property
    def out_features(self) -> int:
        """Width of the Linear's output."""
        return int(getattr(self.org_module, "out_features"))  # noqa: B009

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self._strength / self.lora_dim

    @property
    def rank_text(self) -> str:
        """The rank as the log shows it."""
        return str(self.lora_dim)

    def set_alpha(self, alpha: float) -> None:
        """Sets alpha, in the buffer that is saved and in the scale that is used."""
        self._strength = _float32(alpha)
        self.alpha.fill_(self._strength)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRAModule:
        super()._apply(fn, recurse)
        # Alpha stays float32 when the network is cast: a rounded alpha would be another strength after a resume.
        if self.alpha.dtype != torch.float32:
            self.alpha = torch.full((), self._strength, dtype=torch.float32, device=self.alpha.device)
        return self

    def apply_to(self) -> None:
        """Puts the LoRA in place: the Linear's ``forward`` becomes the LoRA's."""
        if self._org_forward is not None:
            raise RuntimeError(f"{self.lora_name} is applied already")
        # One function has steps of its own; of a subclass that changes one, each is called.
        is_plain = type(self)._add_up is LoRAModule._add_up and type(self)._drop is LoRAModule._drop
        self._frozen = (frozen_product(self.org_module) if is_plain else None,)
        self._org_forward = self.org_module.forward
        self.org_module.forward = self.forward

    def remove(self) -> None:
        """Undoes :meth:`apply_to`; of several LoRAs beside one Linear, the last one that was applied goes first."""
        if self._org_forward is None or self.org_module.forward != self.forward:
            raise RuntimeError(f"{self.lora_name} is not the last LoRA that was applied to its Linear")
        if getattr(self._org_forward, "__func__", None) is type(self.org_module).forward:
            del self.org_module.forward  # its class has it
        else:
            self.org_module.forward = self._org_forward
        self._org_forward, self._frozen = None, (None,)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the Linear's output with the LoRA's part added; ``x`` is (B,in) or (B,S,in)."""
        if self._org_forward is None:
            raise RuntimeError(f"{self.lora_name} is not applied to its Linear")
        if self._is_one_function():
            (frozen,) = self._frozen
            strength, operands = self.multiplier * self.scale, frozen.operands()  # type: ignore[union-attr]
            if not any(operand.requires_grad for operand in operands):  # it may be trained since the LoRA was attached
                return LinearWithLoRA.apply(x, self.lora_down.weight, self.lora_up.weight, strength, frozen, *operands)
        base = self._org_forward(x)
        if self.multiplier == 0:
            return base
        hidden = F.linear(x, self.lora_down.weight.to(x.dtype))  # (B,r) or (B,S,r)
        # The factor goes onto the rank activations, the smallest tensor there is.
        hidden = self._drop(hidden) * (self.multiplier * self.scale)
        return self._add_up(base, hidden.to(base.dtype))

    def _is_one_function(self) -> bool:
        """Whether the Linear and the LoRA are computed as one function: in training without dropouts, not compiled.

        A compiler fuses by itself; and a pass without gradients makes no nodes. Autocast, which other trainers use, knows
        single operations alone.
        """
        return (
            not torch.compiler.is_compiling()
            and self._frozen[0] is not None
            and torch.is_grad_enabled()
            and self.multiplier != 0
            and not (self.training and self._drops)
            and not torch._C._is_any_autocast_enabled()
        )

    @property
    def _drops(self) -> bool:
        return bool(self.dropout or self.rank_dropout or self.module_dropout)

    def _add_up(self, base: Tensor, hidden: Tensor) -> Tensor:
        """Returns ``base`` + up(hidden)."""
        weight: Tensor = self.lora_up.weight  # type: ignore[assignment]
        if torch.compiler.is_compiling() or base._is_view() or is_observed():  # somebody else may hold it
            return base + hidden @ weight.t().to(hidden.dtype, memory_format=torch.contiguous_format)
        return _AddUp.apply(base, hidden, weight.to(hidden.dtype))

    def _drop(self, hidden: Tensor) -> Tensor:
        """Returns the rank activations with what is dropped set to zero; what is kept is scaled up by 1 / (1 - p)."""
        if not self.training or not self._drops:
            return hidden
        keys = self.dropout_keys.keys
        if keys is None:
            raise RuntimeError("dropout needs set_dropout_keys() before each forward pass in training")
        if keys.shape[0] != hidden.shape[0]:
            raise RuntimeError(f"{keys.shape[0]} dropout keys do not fit a batch of {hidden.shape[0]}")
        keys = keys.to(hidden.device)
        ones = [1] * (hidden.dim() - 2)
        if self.dropout:
            # Row-major (token, rank): a token's draw does not depend on how far the batch is padded.
            mask = kept(keys, self.dropout_number, NEURON, hidden[0].numel(), self.dropout).view(hidden.shape)
            hidden = hidden * mask * (1 / (1 - self.dropout))
        if self.rank_dropout:
            mask = kept(keys, self.dropout_number, RANK, hidden.shape[-1], self.rank_dropout)
            hidden = hidden * mask.view(-1, *ones, hidden.shape[-1]) * (1 / (1 - self.rank_dropout))
        if self.module_dropout:
            # A dropped module is left out as a whole and the others are not scaled up, as in the reference program.
            hidden = hidden * kept(keys, self.dropout_number, WHOLE_MODULE, 1, self.module_dropout).view(-1, *ones, 1)
        return hidden

    def factors(self) -> list[tuple[Tensor, Tensor]]:
        """Returns the (down, up) pairs whose products are the LoRA's parts of the weight; views of the parameters."""
        return [(self.lora_down.weight, self.lora_up.weight)]  # type: ignore[list-item]

    def fused(self) -> tuple[Tensor, Tensor]:
        """Returns detached ``down`` (r,in) and ``up`` (out,r) as files hold them."""
        return self.lora_down.weight.detach(), self.lora_up.weight.detach()  # type: ignore[operator]

    def load(self, down: Tensor, up: Tensor, alpha: float) -> None:
        """Copies factors of the right shapes, as files hold them, and sets alpha."""
        with torch.no_grad():
            self.lora_down.weight.copy_(down)
            self._load_up(up)
        self.set_alpha(alpha)

    def _load_up(self, up: Tensor) -> None:
        self.lora_up.weight.copy_(up)  # type: ignore[operator]

    def file_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Returns the shapes of ``down`` and ``up`` in files."""
        return (self.lora_dim, self.in_features), (self.out_features, self.lora_dim)

    @torch.no_grad()
    def merge(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> None:
        """Gives the Linear the weight of :meth:`merged`.

        Args:
            dtype: dtype of the new weight; None keeps the weight's.
            device: where the product is computed; None means where the weight is.
        """
        if self._org_forward is not None:
            raise RuntimeError(f"{self.lora_name} is applied; merging it as well would count it twice")
        weight = self.org_module.weight
        # One in another form, such as quantised or fp16 with bounds of its own, is no parameter.
        if not isinstance(weight, nn.Parameter) or weight.element_size() < 2:
            raise RuntimeError(f"{self.lora_name}: a quantised weight takes no merge; merge before quantising")
        merged = self.merged(weight, dtype, device)
        if merged is not weight:
            self.org_module.weight = nn.Parameter(merged, requires_grad=weight.requires_grad)

    @torch.no_grad()
    def merged(
        self, weight: Tensor, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """Returns a weight with multiplier * alpha / rank * up @ down added, summed in float32 and rounded once.

        The weight itself, which may be mapped from a file, is not written to; it is returned where nothing changes.

        Args:
            weight: (out,in) of the Linear that the LoRA is for.
            dtype: of the result; None keeps the weight's.
            device: where the product is computed; None means where the weight is.
        """
        if self.multiplier == 0 and dtype in (None, weight.dtype):
            return weight
        place = weight.device if device is None else torch.device(device)
        down, up = (factor.to(place, torch.float32) for factor in self.fused())
        merged = weight.to(place, torch.float32) + (self.multiplier * self.scale) * (up @ down)
        return merged.to(device=weight.device, dtype=dtype or weight.dtype)


class SplitLoRAModule(LoRAModule):
    """Three LoRAs of equal rank beside a Linear that holds query, key and value rows: each reaches its own rows only.

    It equals one LoRA of rank 3r whose ``up`` is block-diagonal, and that is what files hold; with alpha three times
    as large the strength alpha / rank is the same. The three ``down`` factors are rows of one matrix, so that x is
    read once.
    """

    def __init__(self, lora_name: str, org_module: nn.Module, *, rows: Sequence[int], **settings: Any) -> None:
        """Makes the factors.

        Args:
            lora_name: name in files.
            org_module: the Linear.
            rows: how many rows of the Linear are queries, keys and values.
            **settings: as for :class:`LoRAModule`; ``rank`` and ``alpha`` are those of one of the three.
        """
        self.rows = tuple(rows)
        self.part_rank = int(settings.pop("rank"))
        alpha = settings.pop("alpha", None)
        parts = len(self.rows)
        super().__init__(
            lora_name, org_module, rank=parts * self.part_rank, alpha=parts * alpha if alpha else None, **settings
        )

    def _make_up(self) -> nn.Module:
        return nn.ModuleList(_empty_linear(self.part_rank, rows) for rows in self.rows)

    @property
    def rank_text(self) -> str:
        """The rank as the log shows it."""
        return f"{len(self.rows)} x {self.part_rank}"

    def _up_weights(self) -> list[Tensor]:
        return list(self.lora_up.parameters())

    def _add_up(self, base: Tensor, hidden: Tensor) -> Tensor:
        parts = zip(hidden.split(self.part_rank, dim=-1), self._up_weights(), strict=True)
        return base + torch.cat([F.linear(part, up.to(part.dtype)) for part, up in parts], dim=-1)

    def factors(self) -> list[tuple[Tensor, Tensor]]:
        """Returns the (down, up) pairs of q, k and v; views of the parameters."""
        return list(zip(self.lora_down.weight.split(self.part_rank), self._up_weights(), strict=True))

    def fused(self) -> tuple[Tensor, Tensor]:
        """Returns detached ``down`` (3r,in) and the block-diagonal ``up`` (out,3r)."""
        return self.lora_down.weight.detach(), torch.block_diag(*(up.detach() for up in self._up_weights()))

    def _load_up(self, up: Tensor) -> None:
        for part, block in zip(self._up_weights(), _diagonal_blocks(up, self.rows, self.part_rank), strict=True):
            part.copy_(block)


def is_block_diagonal(up: Tensor, rows: Sequence[int]) -> bool:
    """Returns whether ``up`` (out,R) is made of len(rows) diagonal blocks of equal rank and zeros beside them."""
    if up.shape[1] % len(rows) or up.shape[0] != sum(rows):
        return False
    blocks = _diagonal_blocks(up, rows, up.shape[1] // len(rows))
    return bool(torch.equal(torch.block_diag(*blocks), up))


def _diagonal_blocks(up: Tensor, rows: Sequence[int], rank: int) -> list[Tensor]:
    parts = up.split(list(rows), dim=0)
    return [part[:, number * rank : (number + 1) * rank] for number, part in enumerate(parts)]


def _empty_linear(in_features: int, out_features: int) -> nn.Linear:
    # Without nn.Linear's own initialisation, which would take numbers from the global generator.
    return torch.nn.utils.skip_init(nn.Linear, in_features, out_features, bias=False, dtype=torch.float32)


def _float32(value: float) -> float:
    # The value that the buffer will hold, so that a run that is resumed computes with the same strength.
    return float(torch.tensor(value, dtype=torch.float32))


def _take_alpha_from_buffer(module: nn.Module, incompatible_keys: Any) -> None:
    if isinstance(module, LoRAModule):
        module._strength = float(module.alpha)
