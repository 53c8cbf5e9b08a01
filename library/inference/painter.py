"""Prompts to PNG files."""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.inference.loras import LoraFiles
from library.inference.models import DrawingModels
from library.inference.settings import PictureFlags
from library.lumina.prompt_template import MARK, warn_of_two_marks
from library.picture_text import DrawnWith, picture_text, save_png
from library.prompts import Prompt, batches_of

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

logger = logging.getLogger(__name__)

Features = dict[tuple[tuple[float, ...], str, bool], "Tensor"]
"""(multipliers of the LoRA files, text, whether it is a negative prompt) -> its features (L,cap_dim), in host memory."""


class Painter:
    """Draws prompts: first every text is encoded, then the pictures are drawn."""

    def __init__(self, models: DrawingModels, loras: LoraFiles, flags: PictureFlags) -> None:
        """Takes the models.

        Args:
            models: that draw.
            loras: of these models; prompts may change their multipliers.
            flags: what holds for all prompts: schedule, templates, the folder for pictures.
        """
        self._models, self._loras, self._flags = models, loras, flags
        self._told: set[str] = set()
        self._doubled: set[str] = set()

    def draw(self, prompts: Sequence[Prompt], features: Features | None = None, name: str = "") -> list[Path]:
        """Draws a picture of each prompt and returns the files in the prompts' order.

        Args:
            prompts: what to draw; without a seed, one is drawn.
            features: of all prompts' texts, from :meth:`encode`; encoded where left out.
            name: begins the files' names; ``image_`` and the time where left out.

        Raises:
            PromptError: the LoRA multipliers of a prompt cannot be had.
            DrawingError: memory is too small, or a picture is not finite.
        """
        prompts = [prompt.rounded() for prompt in prompts]
        features = self.encode(prompts) if features is None else features
        seeds = [random.randrange(2**32) if prompt.seed is None else prompt.seed for prompt in prompts]
        name = name or f"image_{time.strftime('%Y%m%d%H%M%S')}"
        files: dict[int, Path] = {}
        for batch in batches_of(prompts, self._flags.batch_size):
            pictures = self._draw_batch(
                [prompts[index] for index in batch], [seeds[index] for index in batch], features
            )
            for index, picture in zip(batch, pictures, strict=True):
                number = f"_{index:03d}" if len(prompts) > 1 else ""
                path = self._free_path(f"{name}{number}_{seeds[index]}")
                logger.info("Prompt: %s", prompts[index].prompt or "(none)")
                save_png(path, picture, picture_text(prompts[index], seeds[index], self._drawn_with()))
                counted = f", {len(files) + 1} of {len(prompts)}" if len(prompts) > 1 else ""
                logger.info("Saved %s (seed %d)%s", path, seeds[index], counted)
                files[index] = path
        return [files[index] for index in range(len(prompts))]

    def encode(self, prompts: Sequence[Prompt]) -> Features:
        """Returns the features of prompts and their negative prompts.

        Each text is encoded once, or once with each multipliers where a LoRA changes the text encoder.

        Raises:
            PromptError: the LoRA multipliers of a prompt cannot be had.
            DrawingError: memory is too small.
        """
        import torch

        models, template = self._models, self._flags.negative_template
        self._tell_system_prompts({prompt.prompt for prompt in prompts})
        features: Features = {}
        groups: dict[tuple[float, ...], list[Prompt]] = {}
        for prompt in prompts:
            groups.setdefault(prompt.multipliers if self._loras.change_text else (), []).append(prompt)
        for multipliers, drawn in groups.items():
            self._loras.set_multipliers(multipliers)
            texts = list(dict.fromkeys(prompt.prompt for prompt in drawn))
            negatives = list(dict.fromkeys(prompt.negative_prompt for prompt in drawn))
            longest = max(self._num_tokens(text) for text in texts)
            remedy = "a shorter prompt needs less"
            with torch.no_grad(), models.enough_memory(f"a prompt of {longest} tokens", remedy):
                encoded, against = models.encode(texts, negatives, template)
            found, avoided = dict(zip(texts, encoded, strict=True)), dict(zip(negatives, against, strict=True))
            for prompt in drawn:
                features[prompt.multipliers, prompt.prompt, False] = found[prompt.prompt]
                features[prompt.multipliers, prompt.negative_prompt, True] = avoided[prompt.negative_prompt]
        return features

    @contextlib.contextmanager
    def beside(self, lora: Path) -> Iterator[Any]:
        """Has the network of a further LoRA file attached while the block runs.

        Raises:
            DrawingError: memory is too small for it.
        """
        with contextlib.ExitStack() as attached:
            with self._models.enough_memory(f"the LoRA {lora}"):
                network = attached.enter_context(self._loras.beside(lora))
            yield network

    def _draw_batch(self, prompts: Sequence[Prompt], seeds: Sequence[int], features: Features) -> list[Image]:
        """Returns the pictures of prompts of one size and with equal options."""
        import torch

        from library.lumina.drawing import draw_latents, to_pictures
        from library.lumina.sampler import SamplingOptions

        first, models = prompts[0], self._models
        self._loras.set_multipliers(first.multipliers)
        options = SamplingOptions.of_prompt(first, self._flags.discrete_flow_shift)
        positive = [features[prompt.multipliers, prompt.prompt, False] for prompt in prompts]
        negative = [features[prompt.multipliers, prompt.negative_prompt, True] for prompt in prompts]
        size = f"{first.width}x{first.height}"
        what, smaller = f"a picture of {size}", "a smaller --image_width and --image_height need less"
        if len(prompts) > 1:
            what, smaller = f"{len(prompts)} pictures of {size} at a time", "a smaller --batch_size needs less"
        with torch.no_grad(), models.enough_memory(what, smaller):
            with models.on_device(models.dit):
                size_px = (first.width, first.height)
                latents = draw_latents(models.dit, positive, negative, size_px, seeds, options, models.device)
            with models.on_device(models.autoencoder.model):
                return to_pictures(models.autoencoder.decode, latents)

    def _drawn_with(self) -> DrawnWith:
        flags = self._flags
        return DrawnWith(self._models.name, flags.discrete_flow_shift, flags.system_prompt, tuple(self._loras.in_use()))

    def _tell_system_prompts(self, prompts: set[str]) -> None:
        """Warns of prompts with a system prompt inside beside that of the flag, and of LoRAs trained with another one."""
        template = self._flags.caption_template
        for prompt in sorted(prompts):
            self._loras.tell_system_prompts(template.text(prompt))
        doubled = {prompt for prompt in prompts - self._doubled if template.filled and MARK in prompt}
        self._doubled |= doubled
        warn_of_two_marks(len(doubled), "prompts")

    def _num_tokens(self, prompt: str) -> int:
        """Returns how many tokens of a prompt are read; warns where it has more."""
        encoder, longest = self._models.encoder, self._flags.gemma2_max_token_length
        num_tokens = encoder.tokenizer.count(encoder.template.text(prompt))
        if num_tokens > longest and prompt not in self._told:
            self._told.add(prompt)
            logger.warning(
                "The prompt has %d tokens with its system prompt; what is behind the first %d is cut off"
                " (--gemma2_max_token_length)",
                num_tokens,
                longest,
            )
        return min(num_tokens, longest)

    def _free_path(self, name: str) -> Path:
        path = self._flags.output_dir / f"{name}.png"
        number = 1
        while path.exists():
            number += 1
            path = self._flags.output_dir / f"{name}_{number}.png"
        return path
