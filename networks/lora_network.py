"""A LoRA network: all LoRA modules of a run, made from plans, and what a trainer does with them.

The names and call forms are those of sd-scripts-style network modules, so that a trainer treats this network and
third-party ones alike. Nothing here knows a model: :mod:`networks.lora_plan` says beside which Linears modules are made.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from library import files
from library.errors import NetworkError
from networks.lora import LoRAModule, SplitLoRAModule
from networks.lora_dropout import DropoutKeys
from networks.lora_files import Factors, content_hashes, drop_unused_layers, read_lora_file, to_factors
from networks.lora_fit import require_fit
from networks.lora_plan import Plan, Planned

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dropouts:
    """Shares that are dropped in training; 0 switches a kind off."""

    neuron: float = 0.0
    rank: float = 0.0
    module: float = 0.0


@dataclass(frozen=True)
class LoraPlus:
    """LoRA+ (Hayou et al. 2024): learning rate of ``lora_up`` over that of ``lora_down``; None: no difference."""

    unet: float | None = None
    text_encoder: float | None = None


class ComponentSummary(NamedTuple):
    """One line of the trainer's summary."""

    component: str
    num_modules: int
    ranks: str
    num_parameters: int


class LoRANetwork(nn.Module):
    """The LoRA modules of a transformer (``unet_loras``) and of its text encoder (``text_encoder_loras``)."""

    def __init__(
        self,
        plans: Sequence[Plan],
        text_encoder_prefix: str,
        *,
        multiplier: float = 1.0,
        dropouts: Dropouts | None = None,
        lora_plus: LoraPlus | None = None,
        text_encoder_layers: int = 0,
        qkv_rows: tuple[int, int, int] | None = None,
    ) -> None:
        """Makes the modules; they take effect with :meth:`apply_to` or :meth:`merge_to`.

        Args:
            plans: what to make, the text encoder first, as files are ordered.
            text_encoder_prefix: names that begin so belong to the text encoder.
            multiplier: factor on every module's part.
            dropouts: what is dropped in training.
            lora_plus: learning-rate ratios.
            text_encoder_layers: how many layers the text encoder has; a file's layers from there on are not used.
            qkv_rows: rows of the fused Linears, for files with separate q, k and v.

        Raises:
            NetworkError: there is nothing to make.
        """
        super().__init__()
        self.multiplier = multiplier
        self.lora_plus = lora_plus or LoraPlus()
        self.dropout_keys = DropoutKeys()
        self.text_encoder_loras: list[LoRAModule] = []
        self.unet_loras: list[LoRAModule] = []
        self._components: dict[str, str] = {}
        self._frozen: set[str] = set()
        self._text_encoder_prefix = text_encoder_prefix
        self._text_encoder_layers = text_encoder_layers
        self._qkv_rows = qkv_rows
        for plan in plans:
            group = self.text_encoder_loras if plan.table.prefix == text_encoder_prefix else self.unet_loras
            for planned in plan.modules:
                group.append(self._make(planned, dropouts or Dropouts()))
        if not self._components:
            raise NetworkError(
                "the network has no LoRA module: every rank is 0, or nothing of what is trained is left;"
                " give --network_dim or one of the ranks in --network_args a value above 0"
            )

    def _make(self, planned: Planned, dropouts: Dropouts) -> LoRAModule:
        assignment = planned.assignment
        settings: dict[str, Any] = {
            "rank": assignment.rank,
            "alpha": planned.alpha,
            "multiplier": self.multiplier,
            "dropout": dropouts.neuron,
            "rank_dropout": dropouts.rank,
            "module_dropout": dropouts.module,
            "dropout_keys": self.dropout_keys,
        }
        if planned.split_rows is None:
            lora = LoRAModule(assignment.lora_name, planned.linear, **settings)
        else:
            lora = SplitLoRAModule(assignment.lora_name, planned.linear, rows=planned.split_rows, **settings)
        self.add_module(assignment.lora_name, lora)
        self._components[assignment.lora_name] = assignment.component.name
        return lora

    @property
    def loras(self) -> list[LoRAModule]:
        """All modules, the text encoder's first."""
        return self.text_encoder_loras + self.unet_loras

    # ---- putting it in place

    def apply_to(
        self,
        text_encoders: Any = None,
        unet: Any = None,
        apply_text_encoder: bool = True,
        apply_unet: bool = True,
    ) -> None:
        """Attaches the modules to the models that they were made for.

        Args:
            text_encoders: not used; the modules know their Linears.
            unet: not used.
            apply_text_encoder: False forgets the text encoder's modules.
            apply_unet: False forgets the transformer's modules.

        Raises:
            NetworkError: nothing is left.
        """
        if not apply_text_encoder:
            self._forget(self.text_encoder_loras)
        if not apply_unet:
            self._forget(self.unet_loras)
        if not self.loras:
            raise NetworkError(
                "nothing is left to train: neither the transformer's nor the text encoder's LoRA is used"
            )
        for lora in self.loras:
            lora.apply_to()

    def remove(self) -> None:
        """Undoes :meth:`apply_to`: the models are as they were. What was attached last is removed first."""
        for lora in self.loras:
            lora.remove()

    def _forget(self, loras: list[LoRAModule]) -> None:
        for lora in loras:
            delattr(self, lora.lora_name)
            del self._components[lora.lora_name]
        loras.clear()

    def set_multiplier(self, multiplier: float) -> None:
        """Sets the factor on every module's part; 0 gives the base model's output bit for bit."""
        self.multiplier = multiplier
        for lora in self.loras:
            lora.multiplier = multiplier

    def set_dropout_keys(self, keys: Tensor | None) -> None:
        """Sets the keys (B,) int64 of the batch's samples; dropouts are functions of them (:mod:`networks.lora_dropout`)."""
        self.dropout_keys.keys = keys

    def is_mergeable(self) -> bool:
        """Returns True: LoRA is a sum of weights."""
        return True

    def merge_to(
        self,
        text_encoders: Any = None,
        unet: Any = None,
        weights_sd: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> int:
        """Adds multiplier * alpha / rank * up @ down to the weights of the models that the network was made for.

        A model without weights (on the meta device) stays as it is: it stands in for one that is not read now.

        Args:
            text_encoders: not used; the modules know their Linears.
            unet: not used.
            weights_sd: LoRA tensors to load first; None merges what the network holds.
            dtype: dtype of the merged weights; None keeps each weight's.
            device: where the products are computed; None means where each weight is.

        Returns:
            How many modules were merged.
        """
        if weights_sd is not None:
            self.load_tensors(weights_sd, "the given weights")
        loras = [lora for lora in self.loras if not getattr(lora.org_module.weight, "is_meta", False)]
        for lora in loras:
            lora.merge(dtype, device)
        logger.debug("merged %d LoRA modules into the model, multiplier %g", len(loras), self.multiplier)
        return len(loras)

    def weight_changes(self, model: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
        """Returns how merging changes each weight of a model, by the weight's name, for a model that is being read.

        Args:
            model: one that the network was made for; it may be without weights (on the meta device).

        Returns:
            Functions from a weight as it was read to the merged one, in the same dtype; see :meth:`LoRAModule.merged`.
        """
        paths = {id(module): path for path, module in model.named_modules()}
        reached = [lora for lora in self.loras if id(lora.org_module) in paths]
        return {f"{paths[id(lora.org_module)]}.weight": lora.merged for lora in reached}

    # ---- files

    def load_weights(self, file: str | Path) -> None:
        """Loads a LoRA file, whatever program's key names it has; every module must be in it and nothing else.

        Raises:
            NetworkError: the file cannot be read, or does not fit; the message counts and names what is wrong.
        """
        self.load_tensors(read_lora_file(Path(file)), str(file))
        logger.debug("loaded %d LoRA modules from %s", len(self.loras), file)

    def load_tensors(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Loads a LoRA file's tensors; see :meth:`load_weights`."""
        factors = to_factors(tensors, self._qkv_rows, source)
        factors = drop_unused_layers(factors, self._text_encoder_prefix, self._text_encoder_layers, source)
        self.load_factors(factors, tensors, source)

    def load_factors(self, factors: Mapping[str, Factors], tensors: Mapping[str, Tensor], source: str) -> None:
        """Loads factors that go by kohya's names; ``tensors`` are what they came from, for the guess in messages."""
        modules = {lora.lora_name: lora for lora in self.loras}
        require_fit(factors, modules, self._text_encoder_prefix, tensors, source)
        for name, one in factors.items():
            modules[name].load(one.down, one.up, one.alpha)

    def file_state_dict(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Returns the tensors that a file holds, on the CPU: alpha, ``lora_down``, ``lora_up`` of each module."""
        state: dict[str, Tensor] = {}
        for lora in self.loras:
            down, up = lora.fused()
            for suffix, tensor in (("alpha", lora.alpha), ("lora_down.weight", down), ("lora_up.weight", up)):
                saved = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
                state[f"{lora.lora_name}.{suffix}"] = saved
        return state

    def save_weights(
        self, file: str | Path, dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Writes the LoRA under kohya's names, atomically.

        A ``.safetensors`` file gets the metadata and two hashes of its content; others (``.ckpt``, ``.pt``) are written
        by ``torch.save`` and hold no metadata.

        Args:
            file: where to.
            dtype: dtype in the file; None keeps float32 (or what the network was cast to).
            metadata: entries of the file's header, texts.
        """
        path = Path(file)
        state = self.file_state_dict(dtype)
        if path.suffix.lower() == ".safetensors":
            given = dict(metadata or {})
            files.write_safetensors(path, state, given | content_hashes(state, given))
        else:
            files.write_with(path, lambda temporary: torch.save(state, temporary))

    # ---- training

    def prepare_optimizer_params_with_multiple_te_lrs(
        self,
        text_encoder_lr: float | Sequence[float] | None,
        unet_lr: float | None,
        default_lr: float | None,
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Returns the optimizer's parameter groups and their descriptions.

        A group whose learning rate is 0 or None is left out and frozen: it gets no gradient and does not count when
        gradients are clipped.

        Args:
            text_encoder_lr: of the text encoder's modules; a list's first entry counts, None means ``default_lr``.
            unet_lr: of the transformer's modules; None means ``default_lr``.
            default_lr: for what has none of its own.

        Raises:
            NetworkError: every group is left out.
        """
        if isinstance(text_encoder_lr, Sequence):
            text_encoder_lr = text_encoder_lr[0] if text_encoder_lr else None
        parts = (
            ("textencoder", self.text_encoder_loras, text_encoder_lr, self.lora_plus.text_encoder, "--text_encoder_lr"),
            ("unet", self.unet_loras, unet_lr, self.lora_plus.unet, "--unet_lr"),
        )
        groups: list[dict[str, Any]] = []
        descriptions: list[str] = []
        self._frozen = set()
        for description, loras, own_lr, ratio, flag in parts:
            lr = default_lr if own_lr is None else own_lr
            if not loras:
                continue
            if not lr:
                self._frozen |= {lora.lora_name for lora in loras}
                logger.info("%d LoRA modules (%s) are not trained: %s is %s", len(loras), description, flag, lr)
                continue
            for suffix, params, factor in _lora_plus_groups(loras, ratio):
                groups.append({"params": params, "lr": lr * factor})
                descriptions.append(description + suffix)
        self.prepare_grad_etc()
        if not groups:
            raise NetworkError(
                "no learning rate is above 0, so nothing would be trained; set --learning_rate, --unet_lr or"
                " --text_encoder_lr"
            )
        return groups, descriptions

    def prepare_grad_etc(self, text_encoder: Any = None, unet: Any = None) -> None:
        """Makes all modules trainable but those whose learning rate is 0."""
        for lora in self.loras:
            lora.requires_grad_(lora.lora_name not in self._frozen)

    def enable_gradient_checkpointing(self) -> None:
        """Does nothing: what a LoRA recomputes belongs to the block that it stands in."""

    def on_epoch_start(self, text_encoder: Any = None, unet: Any = None) -> None:
        """Switches the dropouts on."""
        self.train()

    def get_trainable_params(self) -> Iterator[nn.Parameter]:
        """Yields the parameters that are trained."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    @torch.no_grad()
    def apply_max_norm_regularization(
        self, max_norm_value: float, device: torch.device | str | None = None
    ) -> tuple[int, float, float]:
        """Scales modules whose weight alpha / rank * up @ down has a Frobenius norm above the limit down to it.

        The norm is read off two r x r products: |up @ down|^2 = sum((up' up) * (down down')). All modules are measured
        and scaled on the device; it is waited for once, at the end.

        Args:
            max_norm_value: the limit.
            device: not used; each module is measured where it is.

        Returns:
            How many modules were scaled, and the mean and the largest norm after it.
        """
        norms, scaled = [], []
        for lora in self.loras:
            if lora.lora_name in self._frozen:
                continue
            for down, up in lora.factors():
                inner = (up.float().T @ up.float()) * (down.float() @ down.float().T)
                norm = inner.sum().clamp(min=0).sqrt() * abs(lora.scale)
                ratio = (max_norm_value / norm).clamp(max=1)
                up.mul_(ratio.sqrt())
                down.mul_(ratio.sqrt())
                norms.append(norm * ratio)
                scaled.append(ratio < 1)
        results = torch.stack(norms).cpu(), torch.stack(scaled).cpu()
        return int(results[1].sum()), float(results[0].mean()), float(results[0].max())

    def describe(self) -> list[ComponentSummary]:
        """Returns what is trained, by component: number of modules, ranks, number of parameters."""
        rows: dict[str, list[LoRAModule]] = {}
        for lora in self.loras:
            if lora.lora_name not in self._frozen:
                rows.setdefault(self._components[lora.lora_name], []).append(lora)
        return [
            ComponentSummary(
                component,
                len(loras),
                ", ".join(dict.fromkeys(lora.rank_text for lora in loras)),
                sum(parameter.numel() for lora in loras for parameter in lora.parameters()),
            )
            for component, loras in rows.items()
        ]

    def log_modules(self) -> None:
        """Lists every module in the log."""
        for lora in self.loras:
            logger.info("%s: rank %s, alpha / rank %g", lora.lora_name, lora.rank_text, lora.scale)


def _lora_plus_groups(loras: list[LoRAModule], ratio: float | None) -> list[tuple[str, list[nn.Parameter], float]]:
    if ratio is None:
        return [("", [parameter for lora in loras for parameter in lora.parameters()], 1.0)]
    return [
        ("", [parameter for lora in loras for parameter in lora.lora_down.parameters()], 1.0),
        (" plus", [parameter for lora in loras for parameter in lora.lora_up.parameters()], ratio),
    ]
