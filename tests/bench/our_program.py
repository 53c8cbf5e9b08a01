"""The trainer of this project on models with random weights, for benchmarks: no files are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import presets
import torch
from torch import nn

from library.data.items import Batch
from library.lumina.configs import NextDiTConfig
from library.training.arguments import parse_arguments
from library.training.hooks import Reading
from library.training.processes import Processes
from library.training.report import RunPlan
from library.training.step import TrainStep
from lumina_train_network import LuminaNetworkTrainer

RANK = 8


class RandomModelTrainer(LuminaNetworkTrainer):
    """The trainer of a command line, on a model with random weights instead of files."""

    preset = "tiny"

    def inspect_models(self) -> None:
        """There are no files."""

    def attention_heads(self) -> tuple[int, int, int]:
        sizes = presets.config(self.preset)
        return sizes.num_heads, sizes.num_kv_heads, sizes.head_dim

    def dit_config(self) -> NextDiTConfig:
        return presets.config(self.preset)

    def load_model(self, dtype: torch.dtype, reading: Reading) -> nn.Module:
        sizes, attention = presets.config(self.preset), self.attention.function
        self.dit = presets.random_next_dit(sizes, dtype, attention, finish=reading.finish)
        return self.dit


def trainer_of(preset: str, precision: str, folder: Path, more: Sequence[str] = ()) -> RandomModelTrainer:
    """Returns a trainer that is ready for its first step; see :func:`unstarted` for the arguments."""
    trainer = unstarted(preset, precision, folder, more)
    trainer.start()
    trainer.plan = RunPlan(num_batches=1000, steps_per_epoch=1000, num_steps=1000, num_epochs=1)
    trainer.load_models()
    trainer.build_network()
    trainer.build_optimizer()
    return trainer


def unstarted(preset: str, precision: str, folder: Path, more: Sequence[str] = ()) -> RandomModelTrainer:
    """Returns a trainer that has its settings and nothing else.

    Args:
        preset: of the model.
        precision: bf16, fp16 or fp32.
        folder: for the run's files.
        more: further flags of the trainer.
    """
    argv = [
        "--pretrained_model_name_or_path=random",
        f"--train_data_dir={folder}",
        "--resolution=1024",
        f"--output_dir={folder}",
        "--network_module=networks.lora_lumina",
        f"--network_dim={RANK}",
        f"--network_alpha={RANK}",
        "--network_args",
        "mod_dim=0",
        "train_blocks=all",
        "--learning_rate=1e-4",
        "--timestep_sampling=nextdit_shift",
        f"--mixed_precision={'no' if precision == 'fp32' else precision}",
        "--cache_latents",
        "--cache_text_encoder_outputs",
        "--seed=1",
        *more,
    ]
    config = parse_arguments(argv)
    if config is None:
        raise SystemExit("--output_config has no place here")
    trainer = RandomModelTrainer(config)
    trainer.preset = preset
    trainer.dataset_configs = []
    return trainer


def batch_of(sizes: NextDiTConfig, width_px: int, height_px: int, captions: Sequence[int], step: int) -> Batch:
    """Returns a batch of random latents and text features, other ones for each step."""
    generator = torch.Generator().manual_seed(step)
    latents = torch.randn(len(captions), sizes.channels, height_px // 8, width_px // 8, generator=generator)
    text = tuple(torch.randn(length, sizes.cap_dim, generator=generator).bfloat16() for length in captions)
    item = SimpleNamespace(subset=SimpleNamespace(preserves_output=False), path=Path("random.png"))
    draws: Any = tuple(SimpleNamespace(item=item, key=step * 1000 + index) for index in range(len(captions)))
    return Batch(draws, latents.bfloat16(), None, text, torch.ones(len(captions)), len(captions))


def lora_ranks(network: Any, model: nn.Module) -> dict[str, int]:
    """Returns the rank beside each Linear of the model, by module name."""
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(lora.org_module)]: lora.lora_dim for lora in network.unet_loras}


class OurProgram:
    """A step of the trainer, as ``bench_step.py`` times it.

    Attributes:
        trainer: the trainer.
        device: where it trains.
        model: the frozen model.
        checkpointing: whether blocks are computed again in backward.
    """

    def __init__(self, preset: str, precision: str, folder: Path, more: Sequence[str]) -> None:
        """Makes the trainer ready for its first step; see :func:`unstarted` for the arguments."""
        self.trainer = trainer_of(preset, precision, folder, more)
        self.device: torch.device = self.trainer.device
        self.model: nn.Module = self.trainer.dit
        self.checkpointing: bool = self.trainer.config.memory.gradient_checkpointing
        self._step = TrainStep(self.trainer.losses_of, self.trainer.updater, Processes(self.trainer.accelerator))

    def step(self, batch: Batch, number: int) -> float:
        """Trains one step and returns its loss."""
        return float(self._step([batch], batch.num_global, number)["loss/current"])

    def ranks(self) -> dict[str, int]:
        """Returns the LoRA's rank beside each Linear."""
        return lora_ranks(self.trainer.network, self.model)
