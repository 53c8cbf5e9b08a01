"""Writes the trained network to a LoRA file, and its moving average beside it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from library.errors import UserError
from library.files import write_with
from library.training.arguments import TrainConfig
from library.training.metadata import RunMetadata
from library.training.output_files import companion
from library.training.weights import Weights

logger = logging.getLogger(__name__)

_PRECISION = {None: None, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class LoraWriter:
    """Writes LoRA files; called with (file, step, number of finished epochs)."""

    def __init__(self, config: TrainConfig, network: Any, weights: Weights, metadata: RunMetadata) -> None:
        self._config = config
        self._network = network
        self._weights = weights
        self._metadata = metadata

    def __call__(self, path: Path, step: int, epoch: int) -> None:
        """Writes the file, and with ``--ema_decay`` the average's.

        Raises:
            UserError: the network holds numbers that are not finite; nothing is written.
            OSError: the file cannot be written.
        """
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self._network.parameters()):
            raise UserError(
                f"the LoRA of step {step} holds numbers that are not finite, so it is not saved; a lower --learning_rate"
                " usually helps"
            )
        output = self._config.output
        dtype = _PRECISION[output.save_precision]
        entries = self._metadata.at(step, epoch)
        with self._weights.in_use():
            self._save(path, dtype, entries)
        if not self._weights.has_average:
            return
        if not output.no_metadata:
            entries |= {"ss_ema_decay": str(self._config.optimizer.ema_decay)}
        with self._weights.in_use(averaged=True):
            self._save(companion(path), dtype, entries)
        logger.info("Saved %s", companion(path))

    def _save(self, path: Path, dtype: torch.dtype | None, entries: Mapping[str, str]) -> None:
        # Network modules of others write right into the file that they are given, and add entries of their own.
        write_with(path, lambda temporary: self._network.save_weights(str(temporary), dtype, dict(entries)))
