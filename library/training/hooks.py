"""What a model family fills in: its models, its loss, its previews. All policy is in ``NetworkTrainer``."""

from __future__ import annotations

import abc
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from library.prompts import Prompt

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from PIL.Image import Image
    from torch import Tensor, nn

    from library.data.debug_page import CaptionTokens
    from library.data.items import Batch


class TextEncoder(Protocol):
    """What the base needs of a text encoder."""

    @property
    def model(self) -> nn.Module:
        """The module that is trained on."""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The layers that hold most of the weights, in the order of a forward pass."""

    def place(self, device: torch.device, besides: Collection[nn.Module] = ()) -> None:
        """Moves to a device what is to compute there, but for those of its blocks whose weights are streamed."""

    def encode(self, captions: Sequence[str], template: Any = None) -> list[Tensor]:
        """Returns (L_i, D) features of each text's real tokens; as captions, or by the family's ``template`` of others."""


class PictureEncoder(Protocol):
    """What the base needs of an autoencoder."""

    @property
    def model(self) -> nn.Module:
        """The module that is moved between devices."""

    def encode(self, pixels: Tensor) -> Tensor:
        """Returns latents of pixels (B,3,H,W) in [-1, 1]."""

    def decode(self, latents: Tensor) -> Tensor:
        """Returns pixels (B,3,H,W), about in [-1, 1]."""


class Reading(NamedTuple):
    """What is done with a model's weights while they are read, so that it never has to fit as its file has it."""

    change: Callable[[str, Tensor], Tensor] | None = None
    """(a tensor's name, the tensor) -> the tensor that the model gets instead: base weights are merged."""
    finish: Callable[[nn.Module, Sequence[str]], None] | None = None
    """Quantises and places a block that was just read, given the paths of its large matrices."""


class Losses(NamedTuple):
    """What a training step learns from a batch."""

    values: Tensor
    """(B,) float32, one loss a sample, with gradients."""
    sigma: Tensor
    """(B,) float32, the noise level that each was measured at."""


class RehearsalSizes(NamedTuple):
    """Shapes of what a model is trained on."""

    latent_channels: int
    px_per_latent: int
    caption_tokens: int
    """Of the longest caption that there can be."""
    feature_width: int


class ModelFamily(abc.ABC):
    """The hooks of a model family."""

    @abc.abstractmethod
    def inspect_models(self) -> None:
        """Checks the model files without reading their weights."""

    @abc.abstractmethod
    def load_text_encoder(self, dtype: torch.dtype, reading: Reading) -> TextEncoder:
        """Returns the text encoder on the CPU (layers: where ``reading`` leaves them), frozen."""

    @abc.abstractmethod
    def text_fingerprint(self) -> str:
        """Returns what every cached text feature depends on apart from the caption."""

    @abc.abstractmethod
    def encode_prompts(self) -> None:
        """Encodes and keeps what :meth:`draw` needs of the prompts' texts, because the text encoder is let go next."""

    @abc.abstractmethod
    def load_autoencoder(self, dtype: torch.dtype) -> PictureEncoder:
        """Returns the autoencoder on the CPU, frozen."""

    @abc.abstractmethod
    def latent_fingerprint(self, size_px: tuple[int, int]) -> str:
        """Returns what the cached latents of pictures of this size (width, height) depend on apart from the picture."""

    @abc.abstractmethod
    def load_model(self, dtype: torch.dtype, reading: Reading) -> nn.Module:
        """Returns the model that the network is trained on, on the CPU (blocks: where ``reading`` leaves them), frozen."""

    @abc.abstractmethod
    def attention_heads(self) -> tuple[int, int, int]:
        """Returns the model's heads, key/value heads and head dimension; asked before the model is read."""

    @abc.abstractmethod
    def empty_text_encoder(self) -> nn.Module:
        """Returns the text encoder's model without weights (on the meta device)."""

    @abc.abstractmethod
    def empty_model(self) -> nn.Module:
        """Returns the model that the network is trained on without weights (on the meta device), frozen."""

    @abc.abstractmethod
    def rehearse_model(self, dtype: torch.dtype, attention: Any, reading: Reading) -> nn.Module:
        """Returns and keeps what :meth:`load_model` would, without weights (on the meta device), with an attention."""

    @abc.abstractmethod
    def rehearse_text_encoder(self, dtype: torch.dtype, reading: Reading) -> TextEncoder:
        """Returns a text encoder without weights that encodes on the meta device; what belongs on the GPU is there."""

    @abc.abstractmethod
    def rehearsal_sizes(self) -> RehearsalSizes:
        """Returns the shapes of latents and text features."""

    @abc.abstractmethod
    def longest_caption(self) -> str:
        """Returns a caption of as many tokens as the text encoder takes."""

    @abc.abstractmethod
    def autoencoder_numbers(self) -> int:
        """Returns how many numbers the autoencoder's weights are."""

    @abc.abstractmethod
    def check_captions(self) -> None:
        """Warns of captions that the text encoder cannot take whole."""

    @abc.abstractmethod
    def caption_tokens(self, caption: str) -> CaptionTokens:
        """Returns what the text encoder takes of a final caption."""

    @abc.abstractmethod
    def text_cache_bytes(self, captions: Iterable[str]) -> int:
        """Returns how many bytes the features of captions take."""

    @abc.abstractmethod
    def blocks(self) -> Iterable[nn.Module]:
        """Returns the blocks whose insides gradient checkpointing computes again in backward."""

    @abc.abstractmethod
    def streamable_blocks(self) -> Sequence[nn.Module]:
        """Returns the blocks of the large model that ``--blocks_to_swap`` counts, in the order of a forward pass."""

    @abc.abstractmethod
    def losses_of(self, batch: Batch) -> Losses:
        """Returns each sample's loss at a noise level that is drawn for it, with gradients."""

    @abc.abstractmethod
    def validation_losses(self, batch: Batch, sigmas: Sequence[float]) -> Tensor:
        """Returns each sample's loss at given noise levels, (B, len(sigmas)) float32, with noise that belongs to the
        picture alone, without gradients, masks and weights."""

    @abc.abstractmethod
    def draw(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Image]:
        """Returns the pictures of prompts of one size and one set of sampling options, drawn as one batch."""

    @abc.abstractmethod
    def model_metadata(self) -> dict[str, str | None]:
        """Returns the metadata entries (without ``ss_``) that are the family's: names of files, and how captions read."""

    @abc.abstractmethod
    def hashed_files(self) -> dict[str, Path]:
        """Returns the files whose hashes go into the metadata by the entries' names, ``sd_model`` for the base model; a
        model in a folder of several files is left out."""
