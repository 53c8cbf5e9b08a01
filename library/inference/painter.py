"""Prompts to PNG files."""

from __future__ import annotations

import logging
import random
import time
from pathlib import Path

from library.inference.loras import LoraFiles
from library.inference.models import DrawingModels
from library.inference.settings import PictureFlags
from library.picture_text import DrawnWith, picture_text, save_png
from library.prompts import Prompt

logger = logging.getLogger(__name__)


class Painter:
    """Draws one prompt after the other."""

    def __init__(self, models: DrawingModels, loras: LoraFiles, flags: PictureFlags) -> None:
        """Takes the models.

        Args:
            models: that draw.
            loras: of these models; prompts may change their multipliers.
            flags: what holds for all prompts: schedule, templates, the folder for pictures.
        """
        self._models, self._loras, self._flags = models, loras, flags

    def draw(self, prompt: Prompt) -> Path:
        """Draws one picture and returns its file.

        Raises:
            PromptError: its LoRA multipliers cannot be had.
            DrawingError: memory is too small, or the picture is not finite.
        """
        import torch

        from library.lumina.drawing import draw_latents, to_picture
        from library.lumina.sampler import SamplingOptions

        prompt = prompt.rounded()
        if prompt.multipliers:
            self._loras.set_multipliers(prompt.multipliers)
        seed = random.randrange(2**32) if prompt.seed is None else prompt.seed
        options = SamplingOptions.of_prompt(prompt, self._flags.discrete_flow_shift)
        num_tokens = self._num_tokens(prompt.prompt)
        models = self._models
        shorter, smaller = "a shorter prompt needs less", "a smaller --image_width and --image_height need less"
        with torch.no_grad(), models.enough_memory(f"a prompt of {num_tokens} tokens", shorter):
            positive, negative = models.encode(prompt.prompt, prompt.negative_prompt, self._flags.negative_template)
        with torch.no_grad(), models.enough_memory(f"a picture of {prompt.width}x{prompt.height}", smaller):
            size_px = (prompt.width, prompt.height)
            with models.on_device(models.dit):
                latents = draw_latents(models.dit, [positive], [negative], size_px, [seed], options, models.device)
            with models.on_device(models.autoencoder.model):
                picture = to_picture(models.autoencoder.decode, latents)
        path = self._free_path(seed)
        logger.info("Prompt: %s", prompt.prompt or "(none)")
        save_png(path, picture, picture_text(prompt, seed, self._drawn_with()))
        logger.info("Saved %s (seed %d)", path, seed)
        return path

    def _drawn_with(self) -> DrawnWith:
        flags = self._flags
        return DrawnWith(self._models.name, flags.discrete_flow_shift, flags.system_prompt, tuple(self._loras.in_use()))

    def _num_tokens(self, prompt: str) -> int:
        """Returns how many tokens of a prompt are read; warns where it has more."""
        encoder, longest = self._models.encoder, self._flags.gemma2_max_token_length
        num_tokens = encoder.tokenizer.count(encoder.template.text(prompt))
        if num_tokens > longest:
            logger.warning(
                "The prompt has %d tokens with its system prompt; what is behind the first %d is cut off"
                " (--gemma2_max_token_length)",
                num_tokens,
                longest,
            )
        return min(num_tokens, longest)

    def _free_path(self, seed: int) -> Path:
        name = f"image_{time.strftime('%Y%m%d%H%M%S')}_{seed}"
        path = self._flags.output_dir / f"{name}.png"
        number = 1
        while path.exists():
            number += 1
            path = self._flags.output_dir / f"{name}_{number}.png"
        return path
