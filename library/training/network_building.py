"""From ``--network_module`` and its flags to the network: found, checked, rehearsed, made and attached.

Modules are resolved by name, so that third-party network modules work too.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from library.errors import NetworkError, SettingsError
from library.training.arguments import TrainConfig
from library.training.other_networks import refusing, require_all_taken, require_loaded
from library.training.settings import NetworkSettings

if TYPE_CHECKING:
    from torch import nn

_DEFAULT_DIM = 4  # sd-scripts' rank where --network_dim is left out


class NetworkBuilder:
    """Makes the network of a run."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._settings = config.network

    def check_module(self) -> None:
        """Checks that the module exists, and its arguments, before anything heavy is imported.

        Raises:
            SettingsError: there is no such module.
            NetworkError: it refuses an argument.
        """
        name = self._settings.network_module
        if name is None:  # TrainConfig refuses that; stated for the type checker
            raise SettingsError("--network_module is missing")
        try:
            found = importlib.util.find_spec(name)
        except (ImportError, ValueError):  # a package that is not there, or no module's name at all
            found = None
        if found is None:
            raise SettingsError(
                f"--network_module: there is no Python module {name!r}; give networks.lora_lumina, or install the module's"
                " package (LyCORIS: lycoris_lora)"
            )
        if self.has_companion:
            importlib.import_module(f"{name}_args").check_network_args(self._settings.arguments())
        elif self._config.quantisation.transformer is not None:
            # It would pass the quantised Linears by, or take their codes for weights.
            given = self._config.quantisation
            flag = "nf4_base" if given.nf4_base else "fp8_base" if given.fp8_base else "fp8_base_unet"
            raise SettingsError(
                f"--{flag}: --network_module {name} is not known to work beside quantised weights (it has no companion"
                f" module {name}_args); use networks.lora_lumina, or leave --{flag} out"
            )
        elif self._config.memory.in_halves:
            raise SettingsError(
                f"--mixed_precision fp16: --network_module {name} is not known to work beside products in fp16 (it has no"
                f" companion module {name}_args); use networks.lora_lumina, or --mixed_precision bf16 or no"
            )

    @property
    def has_companion(self) -> bool:
        """Whether the network module brings a light companion, which checks its arguments before anything heavy is
        imported; such a module can also be built on models without weights."""
        return importlib.util.find_spec(f"{self._settings.network_module}_args") is not None

    @property
    def can_turn_out_wrong(self) -> bool:
        """Whether a rehearsal can show an argument that is wrong, or a LoRA file that does not fit."""
        if self._settings.dim_from_weights and not self.has_companion:
            return False  # LyCORIS leaves out without a word what it cannot make without weights
        return bool(self._settings.network_weights is not None or self._settings.network_args)

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """Lets networks be made for a try: what is wrong must show now, not when everything is encoded.

        Raises:
            SettingsError: the module is no network module.
        """
        name = str(self._settings.network_module)
        if not hasattr(importlib.import_module(name), "create_network"):
            raise SettingsError(
                f"--network_module: {name} is no network module (it has no create_network); give networks.lora_lumina"
            )
        networks_log, disabled = logging.getLogger(name.split(".")[0]), logging.root.manager.disable
        level = networks_log.level
        if self.has_companion:
            networks_log.setLevel(logging.ERROR)  # what it has to say it says when it is made in earnest
        else:
            logging.disable(max(disabled, logging.INFO))  # under whatever name; it may warn of a thing only once
        try:
            yield
        finally:
            networks_log.setLevel(level)
            logging.disable(disabled)

    def rehearse(self, trained_encoders: Sequence[nn.Module], model: nn.Module) -> None:
        """Makes the network on models without weights, to see whether it can be made.

        Raises:
            UserError: it cannot; see :meth:`make`.
        """
        import torch

        try:
            # The real one is to begin with the values that it would have without this.
            with torch.random.fork_rng(devices=[]):
                self.make(trained_encoders, model)
        except RuntimeError:
            if self.has_companion:
                raise
            # It looks at weights, as LyCORIS does for DoRA: what is wrong will show when there are some.

    def make(self, trained_encoders: Sequence[nn.Module], model: nn.Module | None) -> Any:
        """Returns the network, attached to the models.

        Args:
            trained_encoders: text encoders that get a part of the network.
            model: the large model.

        Raises:
            NetworkError: the network's arguments or ``--network_weights`` do not fit the models.
            SettingsError: a model that was to be trained gets no part of the network, or another's module ends with an
                error.
        """
        if self._settings.network_weights is None:
            return self._make(trained_encoders, model)
        try:
            return self._make(trained_encoders, model)
        except NetworkError as error:
            raise NetworkError(f"--network_weights: {error}") from error

    def _make(self, trained_encoders: Sequence[nn.Module], model: nn.Module | None) -> Any:
        settings = self._settings
        with self._errors_as_the_users():
            network, tensors = self._created(trained_encoders, model)
            network.apply_to(trained_encoders, model, bool(trained_encoders), self._config.trains_dit)
        self._check_reach(network, bool(trained_encoders))
        if settings.network_weights is None:
            return network
        if not settings.dim_from_weights:
            with self._errors_as_the_users(RuntimeError):  # torch's, for tensors of other shapes
                result = network.load_weights(str(settings.network_weights))
            require_loaded(result, settings.network_weights)
        elif not self.has_companion:
            require_all_taken(network, tensors, settings.network_weights)
        return network

    def _created(self, trained_encoders: Sequence[nn.Module], model: nn.Module | None) -> tuple[Any, Any]:
        """Returns the network, and the tensors of the file that it was made from, if it was."""
        settings = self._settings
        module = importlib.import_module(str(settings.network_module))
        arguments: dict[str, Any] = dict(settings.arguments())
        if settings.network_dropout is not None:
            arguments["neuron_dropout"] = settings.network_dropout
            if not self.has_companion:
                arguments.setdefault("dropout", settings.network_dropout)  # LyCORIS' word, which sd-scripts gives too
        if settings.dim_from_weights:
            made: tuple[Any, Any] = module.create_network_from_weights(
                1.0, str(settings.network_weights), None, trained_encoders, model, **arguments
            )
            return made
        return module.create_network(
            1.0, settings.network_dim, settings.network_alpha, None, trained_encoders, model, **arguments
        ), None

    def _check_reach(self, network: Any, trains_text_encoder: bool) -> None:
        settings = self._settings
        source = f"--dim_from_weights: {settings.network_weights}" if settings.dim_from_weights else None
        if trains_text_encoder and not getattr(network, "text_encoder_loras", True):
            raise SettingsError(
                f"{source or self._with_arguments} holds no LoRA for the text encoder, so there is none to train; add"
                " --network_train_unet_only or --cache_text_encoder_outputs"
            )
        reaches = any(True for _ in network.parameters())
        if self._config.trains_dit and not self.has_companion:
            reaches = reaches and bool(getattr(network, "unet_loras", True))
        if not reaches:
            raise SettingsError(
                f"{source or self._with_arguments} holds nothing for the transformer, so nothing of it would be trained;"
                " mend what says which modules are trained (LyCORIS: preset)"
            )

    @property
    def _with_arguments(self) -> str:
        given = " ".join(self._settings.network_args)
        return f"the network of --network_module {self._settings.network_module}" + (
            f" with --network_args {given}" if given else ""
        )

    def _errors_as_the_users(self, *further: type[Exception]) -> AbstractContextManager[None]:
        """See :func:`~library.training.other_networks.refusing`; our own modules say themselves what is wrong."""
        if self.has_companion:
            return nullcontext()
        weights = self._settings.network_weights
        source = f" and --network_weights {weights}" if weights is not None else ""
        return refusing(f"{self._with_arguments}{source} cannot be made", *further)


def rank_and_alpha(settings: NetworkSettings, network: Any) -> tuple[int | str, float | str]:
    """Returns rank and alpha for the metadata: of the file with ``--dim_from_weights``, "Dynamic" where they vary."""
    if not settings.dim_from_weights or not hasattr(network, "loras"):
        return settings.network_dim or _DEFAULT_DIM, settings.network_alpha
    # Modules of others need have neither: a matrix of differences has no rank.
    ranks = [lora.lora_dim for lora in network.loras if hasattr(lora, "lora_dim")]
    alphas = [float(lora.alpha) for lora in network.loras if hasattr(lora, "alpha")]
    return ranks[0] if len(set(ranks)) == 1 else "Dynamic", alphas[0] if len(set(alphas)) == 1 else "Dynamic"
