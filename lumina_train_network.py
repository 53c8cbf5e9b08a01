"""Trains a LoRA for Lumina Image 2.0.

    accelerate launch lumina_train_network.py --pretrained_model_name_or_path ... --dataset_config ... --output_dir ...

See docs/lumina_train_network.md.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):
    sys.exit("This program needs Python 3.11 or newer; this is Python %d.%d." % sys.version_info[:2])

import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from library.console import run_program, set_up_logging
from library.errors import SettingsError
from library.lumina.prompt_template import PromptTemplate
from library.memory.device_memory import let_segments_grow
from library.memory.settings import check_blocks_to_swap
from library.prompts import Prompt
from library.training.arguments import parse_arguments
from library.training.hooks import Losses, Reading, RehearsalSizes
from library.training.network_trainer import NetworkTrainer

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor, nn

    from library.data.debug_page import CaptionTokens
    from library.data.items import Batch
    from library.lumina.autoencoder import Autoencoder
    from library.lumina.configs import NextDiTConfig
    from library.lumina.gemma2 import Gemma2Encoder

logger = logging.getLogger(__name__)

_TRAINED_TOKENS = 256  # its authors cut captions off there; its position tables were made for 300


class LuminaNetworkTrainer(NetworkTrainer):
    """Trains on Next-DiT and, where captions are not cached, on Gemma2."""

    def inspect_models(self) -> None:
        from library.lumina.loading import ModelPaths, inspect_models

        settings = self.config.model
        self.files = inspect_models(
            ModelPaths(
                dit=Path(settings.pretrained_model_name_or_path or ""),
                gemma2=settings.gemma2,
                ae=settings.ae,
                tokenizer_dir=settings.tokenizer_cache_dir,
                mmap=not settings.disable_mmap_load_safetensors,
                weighted_captions=settings.weighted_captions,
            )
        )
        check_blocks_to_swap(self.config.memory.blocks_to_swap, self.files.dit.config.num_layers)
        # A tokenizer that is missing must show now, not when the captions' turn comes.
        self.tokenizer = self.files.load_tokenizer(settings.gemma2_max_token_length)
        self._explain_settings()
        self._prompt_features: dict[Prompt, tuple[Tensor, Tensor]] = {}

    def _explain_settings(self) -> None:
        flow, data, given = self.config.flow, self.config.data, self.config.given
        if self.config.model.gemma2_max_token_length > _TRAINED_TOKENS:
            logger.info(
                "--gemma2_max_token_length %d: the released Lumina Image 2.0 has seen no captions of more than %d tokens;"
                " longer ones are read whole, and how well it follows them is for the training to show",
                self.config.model.gemma2_max_token_length,
                _TRAINED_TOKENS,
            )
        if data.cache_text_encoder_outputs and not self.config.network.network_train_unet_only:
            logger.info("Gemma2 is not trained, because --cache_text_encoder_outputs keeps its outputs as they are")
        if self.config.trains_text_encoder:
            logger.info("Gemma2 gets a LoRA too, which ComfyUI does not use; --network_train_unet_only leaves it out")
        if flow.timestep_sampling in ("nextdit_shift", "flux_shift") and "discrete_flow_shift" in given:
            logger.info(
                "--discrete_flow_shift %g is the previews' shift; training with %s takes its shift from the picture's size",
                flow.discrete_flow_shift,
                flow.timestep_sampling,
            )
        if flow.model_prediction_type == "additive":
            logger.info(
                "--model_prediction_type additive adds the same to both sides of the loss: it trains as raw does"
            )

    # ---- models ----

    def load_text_encoder(self, dtype: torch.dtype, reading: Reading) -> Gemma2Encoder:
        from library.lumina.loading import load_gemma2

        limit, template = self.config.model.gemma2_max_token_length, self._caption_template()
        return load_gemma2(self.files, dtype, limit, template, self.processes.is_main, *reading)

    def _caption_template(self) -> PromptTemplate:
        settings = self.config.model
        return PromptTemplate.of_captions(settings.system_prompt, settings.system_prompt_on_empty_caption)

    def _negative_template(self) -> PromptTemplate:
        settings = self.config.model
        return PromptTemplate.of_negatives(settings.system_prompt, settings.system_prompt_on_empty_caption)

    def text_fingerprint(self) -> str:
        return self._text_fingerprint(self._caption_template())

    def _text_fingerprint(self, template: PromptTemplate) -> str:
        from library.lumina.loading import gemma2_fingerprint

        if not self.config.data.cache_text_encoder_outputs_to_disk:
            return f"this run, {template.fingerprint}"  # gigabytes need not be hashed for what ends with the run
        max_tokens = self.config.model.gemma2_max_token_length
        of_gemma2 = gemma2_fingerprint(self.files, self.weight_dtype, max_tokens, template.fingerprint)
        kinds = [self.config.quantisation.text_encoder, "fp16" if self.config.memory.in_halves else None]
        return of_gemma2 + self.base_weights.text_fingerprint() + "".join(f"+{kind}" for kind in kinds if kind)

    def load_autoencoder(self, dtype: torch.dtype) -> Autoencoder:
        from library.lumina.loading import load_autoencoder

        return load_autoencoder(self.files.ae, dtype, self.processes.is_main, self.config.memory.vae_tiling)

    def latent_fingerprint(self, size_px: tuple[int, int]) -> str:
        from library.lumina.autoencoder import is_cut
        from library.lumina.loading import autoencoder_fingerprint

        if not self.config.data.cache_latents_to_disk:
            return "this run"
        tiled = self.config.memory.vae_tiling and is_cut(*size_px)
        return autoencoder_fingerprint(self.files.ae, self.autoencoder_dtype, tiled)

    def load_model(self, dtype: torch.dtype, reading: Reading) -> nn.Module:
        from library.lumina.loading import load_next_dit

        self.dit = load_next_dit(self.files.dit, dtype, self.attention.function, self.processes.is_main, *reading)
        return self.dit

    def attention_heads(self) -> tuple[int, int, int]:
        sizes = self.files.dit.config
        return sizes.num_heads, sizes.num_kv_heads, sizes.head_dim

    def empty_text_encoder(self) -> nn.Module:
        from library.lumina.gemma2 import empty_gemma2

        return empty_gemma2(self.files.gemma2.config)

    def empty_model(self) -> nn.Module:
        import torch

        from library.lumina.next_dit import NextDiT

        with torch.device("meta"):
            return NextDiT(self.dit_config()).requires_grad_(False)

    def dit_config(self) -> NextDiTConfig:
        """Returns the sizes of the Next-DiT."""
        return self.files.dit.config

    def rehearse_model(self, dtype: torch.dtype, attention: Any, reading: Reading) -> nn.Module:
        import torch

        from library.lumina.next_dit import LARGE_MATRICES, NextDiT

        with torch.device("meta"):
            self.dit = NextDiT(self.dit_config(), attention).to(dtype).requires_grad_(False).eval()
        for block in (*self.dit.noise_refiner, *self.dit.context_refiner, *self.dit.layers):
            if reading.finish is not None:
                reading.finish(block, LARGE_MATRICES)
        return self.dit

    def rehearse_text_encoder(self, dtype: torch.dtype, reading: Reading) -> Gemma2Encoder:
        from library.lumina.gemma2 import rehearsed_gemma2

        return rehearsed_gemma2(
            self.files.gemma2.config, dtype, self.tokenizer, self._caption_template(), reading.finish
        )

    def rehearsal_sizes(self) -> RehearsalSizes:
        ae = self.files.ae.config
        px_per_latent = 2 ** (len(ae.block_out_channels) - 1)
        limit = self.config.model.gemma2_max_token_length
        return RehearsalSizes(ae.latent_channels, px_per_latent, limit, self.files.gemma2.config.hidden_size)

    def longest_caption(self) -> str:
        return "a " * self.config.model.gemma2_max_token_length

    def autoencoder_numbers(self) -> int:
        return sum(math.prod(shape) for shape in self.files.ae.config.tensor_shapes().values())

    def streamable_blocks(self) -> Sequence[nn.Module]:
        return list(self.dit.layers)

    def blocks(self) -> Iterable[nn.Module]:
        yield from (*self.dit.noise_refiner, *self.dit.context_refiner, *self.dit.layers)
        if self.config.trains_text_encoder:
            yield from self.ready_text_encoder().model.get_submodule("layers").children()

    def check_captions(self) -> None:
        from library.training.caption_report import report_system_prompt, training_captions, warn_of_long_captions

        given = self.config.given.get("system_prompt", "")
        report_system_prompt(given, self.config.model.system_prompt, self.data, self.prompts)
        template, limit = self._caption_template(), self.config.model.gemma2_max_token_length
        if template.filled and self.tokenizer.count(template.text(".")) > limit:
            raise SettingsError(
                f"--system_prompt fills the {limit} tokens of --gemma2_max_token_length, so that no caption is read at"
                " all; shorten it or raise the limit"
            )
        warn_of_long_captions(training_captions(self.data), template.text, self.tokenizer, limit, "captions")
        numbered = list(enumerate(self.prompts, start=1))
        prompts = [(f"prompt {number}", [prompt.prompt]) for number, prompt in numbered]
        warn_of_long_captions(prompts, template.text, self.tokenizer, limit, "sample prompts")
        negatives = [(f"prompt {number}", [prompt.negative_prompt]) for number, prompt in numbered]
        against = self._negative_template().text
        warn_of_long_captions(negatives, against, self.tokenizer, limit, "negative sample prompts")

    def caption_tokens(self, caption: str) -> CaptionTokens:
        from library.data.debug_page import CaptionTokens

        whole = self._caption_template().text(caption)
        num_in_front = len(whole) - len(caption)
        kept, cut = self.tokenizer.parts(whole)
        shown, num_kept = (kept + cut)[num_in_front:], max(0, len(kept) - num_in_front)
        return CaptionTokens(shown[:num_kept], shown[num_kept:], self.tokenizer.count(whole), self.tokenizer.max_tokens)

    def text_cache_bytes(self, captions: Iterable[str]) -> int:
        limit, template = self.config.model.gemma2_max_token_length, self._caption_template()
        counts = self.tokenizer.counts([template.text(caption) for caption in captions])
        return sum(min(count, limit) for count in counts) * self.files.gemma2.config.hidden_size * 2  # bfloat16

    # ---- one training step ----

    # Nothing here waits for the device, so that the host stays ahead of it: what goes there is copied from pinned memory.

    def losses_of(self, batch: Batch) -> Losses:
        import torch

        from library import keyed_random
        from library.lumina import flow
        from library.lumina.placement import copied_to
        from library.training.noise import input_noise, noise_levels, noise_of
        from library.training.output_preservation import indices_of

        settings, device = self.config.flow, self.device
        keys = [draw.key for draw in batch.draws]
        if hasattr(self.network, "set_dropout_keys"):
            dropout_keys = [keyed_random.key("dropout", key) for key in keys]
            self.network.set_dropout_keys(copied_to(torch.tensor(dropout_keys, dtype=torch.int64), device))
        latents = self.latents_of(batch)  # (B,C,H,W) float32
        noise = noise_of("noise", keys, latents)
        sigma = noise_levels(settings, keys, latents)
        noisy = flow.add_noise(latents, input_noise(settings, keys, noise), sigma)
        target = flow.target_of(settings, latents, noise)
        preserved = indices_of(batch.preserves_output)
        if preserved:
            # Before the forward pass that keeps its activations, so that the two are never in memory together.
            indices = copied_to(torch.tensor(preserved), device)
            base = self._base_velocity(batch, preserved, noisy[indices], sigma[indices])
            wanted = flow.prediction_of(settings, base, noisy[indices], sigma[indices])
            target = target.index_put((indices,), wanted)
        velocity = self._velocity(noisy, sigma, self.caption_features(batch))
        prediction = flow.prediction_of(settings, velocity, noisy, sigma)
        losses = flow.loss_between(settings, prediction, target, sigma)
        by_area = self.config.data.normalize_masked_loss
        return Losses(flow.mean_of_samples(losses, batch.masks, by_area), sigma)

    def validation_losses(self, batch: Batch, sigmas: Sequence[float]) -> Tensor:
        import torch

        from library.lumina import flow
        from library.training.noise import noise_of

        with torch.no_grad():
            latents = self.latents_of(batch)
            noise = noise_of("validation noise", [draw.key for draw in batch.draws], latents)
            features = self.caption_features(batch)
            columns = []
            for level in sigmas:
                sigma = torch.full((len(batch.draws),), level, device=self.device)
                noisy = flow.add_noise(latents, noise, sigma)
                velocity = self._velocity(noisy, sigma, features)
                losses = flow.loss_map(self.config.flow, velocity, latents, noise, noisy, sigma)
                columns.append(flow.mean_of_samples(losses))
            return torch.stack(columns, dim=1)

    def _velocity(self, noisy: Tensor, sigma: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Returns the model's output (B,C,H,W) for noisy latents and each sample's text features."""
        from library.lumina import flow
        from library.lumina.gemma2 import pad_features

        return self.dit(noisy.to(self.dit.dtype), flow.lumina_time(sigma), *pad_features(features))

    def _base_velocity(self, batch: Batch, samples: Sequence[int], noisy: Tensor, sigma: Tensor) -> Tensor:
        """Returns the output that the models have without the network, for some of a batch's samples."""
        import torch

        from library.training.output_preservation import without_network

        with torch.no_grad(), without_network(self.network):
            return self._velocity(noisy, sigma, self.caption_features(batch, samples))

    # ---- previews ----

    def encode_prompts(self) -> None:
        if not self.prompts:
            return
        positive = self.data.extra_text(
            [prompt.prompt for prompt in self.prompts],
            self.encode_captions,
            self.text_fingerprint(),
            self.processes.sharing(),
            "sample prompts",
        )
        # As in sd-scripts, the system prompt is not part of the negative prompt.
        template = self._negative_template()
        negative = self.data.extra_text(
            [prompt.negative_prompt for prompt in self.prompts],
            lambda texts: self.encode_captions(texts, template),
            self._text_fingerprint(template),
            self.processes.sharing(),
            "negative prompts",
        )
        self._prompt_features.update(zip(self.prompts, zip(positive, negative, strict=True), strict=True))

    def _features_of(self, prompt: Prompt) -> tuple[Tensor, Tensor]:
        """Returns the features of a prompt and its negative prompt: cached, or by the text encoder as it now is."""
        import torch

        cached = self._prompt_features.get(prompt)
        if cached is not None:
            return cached
        encoder = self.ready_text_encoder()
        with torch.no_grad():
            (positive,) = encoder.encode([prompt.prompt])
            (negative,) = encoder.encode([prompt.negative_prompt], self._negative_template())
        if not self.config.trains_text_encoder:  # it would give the same at the next event
            self._prompt_features[prompt] = (positive, negative)
        return positive, negative

    def draw(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Image]:
        from library.lumina.drawing import draw_latents, to_pictures
        from library.lumina.sampler import SamplingOptions

        features = [self._features_of(prompt) for prompt in prompts]
        first = prompts[0]
        latents = draw_latents(
            self.dit,
            [positive for positive, _ in features],
            [negative for _, negative in features],
            (first.width, first.height),
            seeds,
            SamplingOptions.of_prompt(first, self.config.flow.discrete_flow_shift),
            self.device,
            show_progress=self.processes.is_main,
        )
        return to_pictures(self.ready_autoencoder().decode, latents)

    # ---- metadata ----

    def model_metadata(self) -> dict[str, str | None]:
        from library.training.caption_report import system_prompt_of_training

        return {
            "system_prompt": system_prompt_of_training(self.config.model.system_prompt, self.data.items),
            "sd_model_name": self.files.dit.path.name,
            "gemma2_name": self.files.gemma2.path.name,
            "ae_name": self.files.ae.path.name,
        }

    def hashed_files(self) -> dict[str, Path]:
        files = {
            "sd_model": self.files.dit.single_file,
            "gemma2": self.files.gemma2.single_file,
            "ae": self.files.ae.single_file,
        }
        return {model: file for model, file in files.items() if file is not None}


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, trains, and reports what the user can mend."""
    config = parse_arguments(argv)
    if config is None:
        return
    log = config.log
    set_up_logging(log.console_log_level, log.console_log_file, log.console_log_simple)
    let_segments_grow()
    LuminaNetworkTrainer(config).train()


if __name__ == "__main__":
    run_program(main)
