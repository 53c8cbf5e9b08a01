"""``--base_weights``: LoRA files that are merged into the models before training, as if they had been part of them.

The Next-DiT and Gemma2 are read one after the other, so a file is taken apart: into each model goes the part that is
for it, tensor by tensor as it is read and before anything is encoded, quantised or placed with it. The other model takes
part without weights, so that the whole file is checked each time. Network modules that cannot work on models without
weights merge right after a model is read.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.errors import NetworkError, SettingsError
from library.file_hashes import remembered
from library.files import read_safetensors_header, sha256_of_file
from library.training.other_networks import refusing, require_all_taken

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from library.training.settings import NetworkSettings

logger = logging.getLogger(__name__)

_TEXT_ENCODER_KEYS = "lora_te"  # what kohya's names of text encoder modules begin with


@dataclass(frozen=True)
class BaseWeight:
    """One file and the factor on its part."""

    file: Path
    multiplier: float

    def sha256(self) -> str:
        """Returns the hash of the file's content; made once for a file, then remembered."""
        return remembered("sha256", [self.file], lambda: sha256_of_file(self.file))


class BaseWeights:
    """All files of ``--base_weights``, in their order."""

    def __init__(
        self,
        settings: NetworkSettings,
        empty_text_encoder: Callable[[], nn.Module],
        empty_transformer: Callable[[], nn.Module],
    ) -> None:
        """Takes the settings; files are read by :meth:`check`.

        Args:
            settings: names the files, the multipliers (1 where left out) and the network module that knows the files.
            empty_text_encoder: returns the text encoder without weights (on the meta device).
            empty_transformer: returns the transformer without weights.
        """
        given = settings.base_weights_multiplier
        multipliers = [*given, *[1.0] * (len(settings.base_weights) - len(given))]
        self.weights = [BaseWeight(*pair) for pair in zip(settings.base_weights, multipliers, strict=True)]
        self._module_name = str(settings.network_module)
        self._empty_text_encoder = empty_text_encoder
        self._empty_transformer = empty_transformer
        self._reaching_text_encoder: list[BaseWeight] = []
        self._fits_without_weights = False

    def check(self, fits_without_weights: bool, text_is_cached: bool) -> None:
        """Makes sure that every file can be merged, before anything is encoded.

        Args:
            fits_without_weights: the network module can work on models without weights; others are only checked as
                far as a file's keys tell.
            text_is_cached: captions are encoded before the transformer is read.

        Raises:
            SettingsError: the network module cannot merge.
            NetworkError: a file does not fit the models.
        """
        self._reaching_text_encoder.clear()
        if not self.weights:
            return
        self._fits_without_weights = fits_without_weights
        if not hasattr(self._module(), "create_network_from_weights"):
            raise SettingsError(
                f"--base_weights: --network_module {self._module_name} cannot read LoRA files into a network (it has no"
                " create_network_from_weights), so it cannot merge them; use networks.lora_lumina"
            )
        for weight in self.weights:
            if not fits_without_weights and weight.multiplier not in (0, 1):
                raise SettingsError(
                    f"--base_weights_multiplier: --network_module {self._module_name} is not known to go by it when it"
                    f" merges (LyCORIS does not), and {weight.multiplier:g} is given for {weight.file}; give 1, or 0 to"
                    " leave the file out, or use networks.lora_lumina"
                )
            if fits_without_weights:
                network, _ = self._network(weight, self._empty_text_encoder(), self._empty_transformer())
                reaches = bool(network.text_encoder_loras)
            else:
                reaches = _has_text_encoder_keys(weight.file)
                if reaches and text_is_cached:
                    raise SettingsError(
                        f"--base_weights: {weight.file} changes Gemma2, whose outputs are cached before"
                        f" --network_module {self._module_name} can merge it; leave out --cache_text_encoder_outputs or"
                        " use networks.lora_lumina"
                    )
            if reaches and weight.multiplier:
                self._reaching_text_encoder.append(weight)

    @property
    def merge_behind_reading(self) -> bool:
        """Whether :meth:`merge_into_models` has something to do, on the CPU."""
        return bool(self.weights) and not self._fits_without_weights

    def text_encoder_change(self) -> Callable[[str, Tensor], Tensor]:
        """Returns what each tensor of the text encoder becomes as it is read, a function of its name and itself."""
        return self._change(self._reaching_text_encoder, of_text_encoder=True)

    def transformer_change(self) -> Callable[[str, Tensor], Tensor]:
        """Returns what each tensor of the transformer becomes as it is read, a function of its name and itself."""
        return self._change(self.weights, of_text_encoder=False)

    def _change(self, weights: Sequence[BaseWeight], of_text_encoder: bool) -> Callable[[str, Tensor], Tensor]:
        from library.lumina.filling import in_turn

        changes = []
        for weight in weights if self._fits_without_weights else ():
            encoder, model = self._empty_text_encoder(), self._empty_transformer()
            network, _ = self._network(weight, encoder, model)
            found = network.weight_changes(encoder if of_text_encoder else model)
            if found:
                _log_merge(weight, len(found), "Gemma2" if of_text_encoder else "the Next-DiT")
            changes.append(found)
        return in_turn(changes)

    def merge_into_models(self, model: nn.Module, text_encoder: nn.Module | None, dtype: torch.dtype) -> None:
        """Merges into the models, which were just read, what no tensor was changed by.

        Does nothing but for network modules that cannot work on models without weights.

        Args:
            model: the transformer.
            text_encoder: None where it is not read now.
            dtype: of the models.
        """
        for weight in [] if self._fits_without_weights else [one for one in self.weights if one.multiplier]:
            reaches = weight in self._reaching_text_encoder
            self._merge(weight, text_encoder if reaches else None, model, dtype)

    def text_fingerprint(self) -> str:
        """Returns what text features depend on of these files: "" where none of them changes the text encoder."""
        return "".join(f"+{weight.sha256()}*{weight.multiplier!r}" for weight in self._reaching_text_encoder)

    def metadata(self) -> dict[str, str]:
        """Returns the metadata entry (without ``ss_``) that says what was merged; empty where nothing was."""
        if not self.weights:
            return {}
        entries = [
            {"name": weight.file.name, "multiplier": weight.multiplier, "sha256": weight.sha256()}
            for weight in self.weights
        ]
        return {"base_weights": json.dumps(entries, ensure_ascii=False)}

    def _module(self) -> Any:
        return importlib.import_module(self._module_name)

    def _network(self, weight: BaseWeight, text_encoder: nn.Module | None, model: nn.Module) -> tuple[Any, Any]:
        """Returns the network of a file for these models, and the file's tensors."""
        encoders: Sequence[nn.Module] = [] if text_encoder is None else [text_encoder]
        try:
            network, tensors = self._module().create_network_from_weights(
                weight.multiplier, str(weight.file), None, encoders, model, for_inference=True
            )
            if not self._fits_without_weights:
                require_all_taken(network, tensors, weight.file)
        except NetworkError as error:
            raise NetworkError(f"--base_weights: {error}") from error
        needed = "weight_changes" if self._fits_without_weights else "merge_to"
        if not callable(getattr(network, needed, None)):
            raise SettingsError(
                f"--base_weights: the network of --network_module {self._module_name} cannot be merged (it has no"
                f" {needed}); use networks.lora_lumina"
            )
        return network, tensors

    def _merge(self, weight: BaseWeight, text_encoder: nn.Module | None, model: nn.Module, dtype: torch.dtype) -> None:
        with refusing(f"--base_weights: --network_module {self._module_name} cannot merge {weight.file}"):
            network, tensors = self._network(weight, text_encoder, model)
            encoders = [] if text_encoder is None else [text_encoder]
            num_modules = network.merge_to(encoders, model, tensors, dtype, "cpu")
        if num_modules != 0:
            _log_merge(weight, num_modules, "the models")


def _log_merge(weight: BaseWeight, num_modules: int | None, into: str) -> None:
    count = "" if num_modules is None else f"{num_modules} modules of "
    logger.info("Merging %s%s into %s, multiplier %g", count, weight.file.name, into, weight.multiplier)


def _has_text_encoder_keys(file: Path) -> bool:
    if file.suffix.lower() != ".safetensors":
        return True  # not known without reading it
    try:
        header, _ = read_safetensors_header(file)
    except (OSError, ValueError) as error:
        raise NetworkError(f"--base_weights: {file} cannot be read: {error}") from error
    return any(key.startswith(_TEXT_ENCODER_KEYS) for key in header)
