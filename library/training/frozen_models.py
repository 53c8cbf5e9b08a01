"""The frozen models of a run: read when they are first needed, kept where they compute, and let go of in between.

Here too is what they give for a batch: from the caches, or computed for it. All of this is policy that holds for every
model family, between its hooks (:class:`ModelFamily`) and the steps of a run
(:class:`~library.training.network_trainer.NetworkTrainer`). Modules that import torch are imported where they are used.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from library.errors import SettingsError
from library.training.arguments import TrainConfig
from library.training.base_weights import BaseWeights
from library.training.hooks import ModelFamily, PictureEncoder, Reading, TextEncoder
from library.training.out_of_memory import raise_where_a_caption_was_too_long

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from library.data.items import Batch
    from library.memory.block_stream import BlockStream
    from library.memory.settings import Quantisation

_SPARE_BYTES = 2**30
"""Device memory that must never have been needed if the autoencoder is to stay there between previews."""


class FrozenModels(ModelFamily):
    """A model family's three models on a run's device.

    Attributes:
        config: the run's settings.
        device: where models compute; set before one is read.
        weight_dtype: of the text encoder and the large model; set before one is read.
        text_encoder: None while it is not read or let go.
        text_stream: of the text encoder's layers, where they are streamed.
        autoencoder: likewise.
        model: the large one.
        base_weights: what is merged into models as they are read.
    """

    device: torch.device
    weight_dtype: torch.dtype

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.text_encoder: TextEncoder | None = None
        self.text_stream: BlockStream | None = None
        self.autoencoder: PictureEncoder | None = None
        self.model: nn.Module | None = None
        self.base_weights = BaseWeights(config.network, self.empty_text_encoder, self.empty_model)

    def load_models(self) -> None:
        """Reads the models that training needs; what was cached is not needed any more."""
        import torch

        from library.memory.prepare import place

        caches_text = self.config.data.cache_text_encoder_outputs
        # Streamed blocks never go to the device as a whole; which ones they are shows when the model is there.
        home = torch.device("cpu") if self.config.memory.blocks_to_swap else self.device
        reading = self._reading(self.base_weights.transformer_change(), self.config.quantisation.transformer, home)
        model = self.load_model(self.weight_dtype, reading)
        text_encoder = None if caches_text else self._read_text_encoder().model
        self.base_weights.merge_into_models(model, text_encoder, self.weight_dtype)
        self.model = place(model, self.device, besides=self._streamed_blocks())
        if not caches_text:
            self.ready_text_encoder()
        if not self.config.data.cache_latents:
            self.ready_autoencoder()

    def ready_text_encoder(self) -> TextEncoder:
        """Returns the text encoder on the device, read when it is first needed."""
        from library.memory.prepare import stream_weights

        encoder = self._read_text_encoder()
        if not self._streams_text_encoder:
            encoder.place(self.device)
            return encoder
        if self.text_stream is None:
            self.text_stream = stream_weights(encoder.blocks, self.device, "layers of Gemma2")
        encoder.place(self.device, besides=encoder.blocks)
        return encoder

    @property
    def _streams_text_encoder(self) -> bool:
        """Whether the text encoder's layers are streamed: all or none, so that it needs less memory than the model that is
        trained, whatever that one's precision is and however many of its blocks are streamed."""
        from library.memory.prepare import can_stream

        asked = bool(self.config.memory.blocks_to_swap)
        return asked and not self.config.trains_text_encoder and can_stream(self.device)

    def encode_captions(self, captions: Sequence[str], template: Any = None) -> list[Tensor]:
        """Returns the text encoder's features of captions that are encoded ahead of training.

        Args:
            captions: one batch.
            template: of texts that are no captions.

        Raises:
            SettingsError: memory is too small for one of them.
        """
        encoder = self.ready_text_encoder()
        try:
            return encoder.encode(captions, template)
        except RuntimeError as error:
            raise_where_a_caption_was_too_long(error, captions, self.config, self.device)
            raise

    def _read_text_encoder(self) -> TextEncoder:
        import torch

        if self.text_encoder is None:
            kind = self.config.quantisation.text_encoder
            home = torch.device("cpu") if self._streams_text_encoder else self.device
            reading = self._reading(self.base_weights.text_encoder_change(), kind, home)
            self.text_encoder = self.load_text_encoder(self.weight_dtype, reading)
        return self.text_encoder

    def _reading(
        self, change: Callable[[str, Tensor], Tensor], kind: Quantisation | None, home: torch.device
    ) -> Reading:
        """Returns what is done with weights as they are read: merge into a tensor, quantise its block and leave it there."""
        import torch

        from library.memory.quantised import finish_of

        if self.base_weights.merge_behind_reading:
            home = torch.device("cpu")  # that is where they merge
        return Reading(change, finish_of(kind, self.device, home, self.config.memory.in_halves))

    def ready_autoencoder(self) -> PictureEncoder:
        """Returns the autoencoder on the device, read when it is first needed."""
        if self.autoencoder is None:
            self.autoencoder = self.load_autoencoder(self.autoencoder_dtype)
        self._to_device(self.autoencoder.model)
        return self.autoencoder

    @property
    def autoencoder_dtype(self) -> torch.dtype:
        """The autoencoder's precision."""
        import torch

        return torch.float32 if self.config.memory.no_half_vae else self.weight_dtype

    def encode_pictures(self, pixels: Tensor) -> Tensor:
        """Returns the latents of pixels (B,3,H,W), which may be on the CPU.

        Raises:
            SettingsError: the device's memory is too small for one picture.
        """
        import torch

        from library.shortage import is_out_of_memory

        try:
            return self.ready_autoencoder().encode(pixels)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            remedies = ["a smaller --resolution needs less memory"]
            if self.autoencoder_dtype == torch.float32 and not self.config.memory.in_halves:  # of cards without bf16
                remedies.insert(0, "bf16 (--mixed_precision bf16 without --no_half_vae) needs half of it")
            if not self.config.memory.vae_tiling:
                remedies.insert(0, "--vae_tiling encodes large pictures in tiles")
            if not self.config.data.cache_latents:
                remedies.insert(0, "--cache_latents encodes before the large model is there")
            height, width = pixels.shape[-2:]
            raise SettingsError(
                f"the device's memory is too small to encode a picture of {width}x{height} pixels: {', '.join(remedies)}"
            ) from error

    def latents_of(self, batch: Batch) -> Tensor:
        """Returns a batch's latents (B,C,H,W) float32 on the device: from the cache, or encoded now."""
        from library.lumina.placement import copied_to

        if batch.latents is not None:
            return copied_to(batch.latents, self.device).float()
        if batch.pixels is None:
            raise RuntimeError("a batch holds neither latents nor pixels")
        return self.encode_pictures(batch.pixels).float()

    def caption_features(self, batch: Batch, samples: Sequence[int] | None = None) -> list[Tensor]:
        """Returns the features (L_i,D) of a batch's captions, or of some samples' captions, on the device.

        They are the cached ones, or encoded now; with gradients where the text encoder is trained and the caller wants any.
        """
        import torch

        from library.lumina.placement import copied_to

        samples = range(len(batch.draws)) if samples is None else samples
        if batch.text is not None:
            return [copied_to(batch.text[index], self.device).to(self.weight_dtype) for index in samples]
        # A caller that wants no gradients gets none, whatever is trained.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.trains_text_encoder):
            return self.ready_text_encoder().encode([batch.draws[index].caption for index in samples])

    def _put_autoencoder_away(self, has_trained: bool) -> None:
        """Takes the autoencoder off the device after previews, unless training needs it or there is memory to spare.

        There is where some of the memory was never needed so far.

        Args:
            has_trained: whether there was a step; before the first one nobody knows what training needs.
        """
        from library.memory.room import never_needed_bytes

        if not self.config.data.cache_latents or self.autoencoder is None:
            return
        on_device = next(self.autoencoder.model.parameters()).device.type != "cpu"
        if on_device and (not has_trained or never_needed_bytes(self.device) < _SPARE_BYTES):
            self.autoencoder.model.to("cpu")
            self._free()

    def _streamed_blocks(self) -> list[nn.Module]:
        from library.memory.prepare import streamed_blocks

        return streamed_blocks(self.streamable_blocks(), self.config.memory.blocks_to_swap, self.device)

    def _to_device(self, model: nn.Module) -> None:
        if next(model.parameters()).device != self.device:
            model.to(self.device)

    def _free(self) -> None:
        import torch

        from library.memory.host_memory import give_freed_memory_back

        gc.collect()
        give_freed_memory_back()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
