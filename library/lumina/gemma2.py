"""Captions -> text features: the input of Gemma-2-2B's last layer, for real tokens only.

Lumina Image 2.0 was trained on ``hidden_states[-2]``, so the last layer and the final norm are never needed: the model
is built without that layer, and its norm passes everything through. Attention is transformers' eager one, which honours
the model's soft-capping; the model is causal, so padding behind a caption cannot reach its tokens and needs no mask.

The embedding, 256,000 rows and in bf16 1.1 of the model's 4.7 GiB, stays in the host's memory wherever the model computes: a
batch needs a few hundred of its rows, and a model file that is mapped into memory is then read in these places alone. It
stays in the file's dtype too, and the rows that are needed are converted: the usual file is fp16, and all of it would
have to be read and copied for a run in bf16.

Shapes: B captions, L tokens of the longest, L_i real tokens of caption i, D width (2304).
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library.importing import uncollected_imports
from library.lumina.configs import Gemma2TextConfig
from library.lumina.filling import BlockFinish
from library.lumina.placement import copied_to
from library.lumina.prompt_template import PromptTemplate
from library.lumina.quiet import quiet_libraries
from library.lumina.tokenizer import GemmaTokenizer
from library.lumina.weighted_captions import weigh

__all__ = [
    "BLOCKS",
    "EMBEDDING",
    "LARGE_MATRICES",
    "Gemma2Encoder",
    "GemmaTokenizer",
    "PromptTemplate",
    "build_gemma2",
    "complete_gemma2",
    "empty_gemma2",
    "pad_features",
    "rehearsed_gemma2",
]

EMBEDDING = "embed_tokens.weight"
"""Name of the tensor that is used in whatever dtype it has."""
BLOCKS = r"layers\.\d+"
"""Pattern of the layers' paths."""
LARGE_MATRICES = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
"""Paths within a layer of the matrices that hold nearly all its weights."""


def empty_gemma2(config: Gemma2TextConfig) -> nn.Module:
    """Returns transformers' ``Gemma2Model`` without its last layer and final norm, on the meta device."""
    with quiet_libraries():
        with uncollected_imports():
            from transformers import Gemma2Config, Gemma2Model

        settings = Gemma2Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers_used,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            hidden_activation=config.hidden_activation,
            query_pre_attn_scalar=config.query_pre_attn_scalar,
            attn_logit_softcapping=config.attn_logit_softcapping,
            sliding_window=config.sliding_window,
            use_cache=False,
            attn_implementation="eager",
        )
        with torch.device("meta"):
            model = Gemma2Model(settings)
        model.norm = nn.Identity()
    return model


def build_gemma2(config: Gemma2TextConfig, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Returns transformers' ``Gemma2Model`` without its last layer and final norm, frozen, in evaluation mode.

    Args:
        config: of the whole checkpoint.
        tensors: what ``config.tensor_shapes`` names; used in place.
    """
    model = empty_gemma2(config)
    model.load_state_dict(tensors, strict=True, assign=True)
    return complete_gemma2(config, model)


def complete_gemma2(config: Gemma2TextConfig, model: Any) -> nn.Module:
    """Fills in what no checkpoint holds, and returns the model frozen and in evaluation mode.

    Args:
        config: of the whole checkpoint.
        model: of :func:`empty_gemma2`, with all that a checkpoint holds.
    """
    with quiet_libraries():
        # These are not in the checkpoint, so they were left without values: the rotary frequencies and sqrt(width).
        model.rotary_emb = type(model.rotary_emb)(model.config)
        if isinstance(getattr(model.embed_tokens, "embed_scale", None), Tensor):
            model.embed_tokens.embed_scale = torch.tensor(config.hidden_size**0.5)
    empty = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if empty:
        raise RuntimeError(f"this version of transformers has tensors of Gemma2 that are not filled: {empty}")
    return model.requires_grad_(False).eval()


def rehearsed_gemma2(
    config: Gemma2TextConfig,
    dtype: torch.dtype,
    tokenizer: GemmaTokenizer,
    template: PromptTemplate,
    finish: BlockFinish | None = None,
) -> Gemma2Encoder:
    """Returns an encoder without weights on the meta device, whose embedding is on the CPU and takes no memory.

    Args:
        config: of the whole checkpoint.
        dtype: of weights and features.
        tokenizer: text -> tokens.
        template: the system prompts of captions.
        finish: quantises a layer.
    """
    model: Any = empty_gemma2(config).to(dtype).requires_grad_(False).eval()
    for layer in model.layers:
        if finish is not None:
            finish(layer, LARGE_MATRICES)
    embedding = model.embed_tokens
    rows = torch.zeros(1, config.hidden_size, dtype=dtype).expand(config.vocab_size, -1)
    embedding.weight = nn.Parameter(rows, requires_grad=False)
    if isinstance(getattr(embedding, "embed_scale", None), Tensor):
        embedding.embed_scale = torch.tensor(config.hidden_size**0.5)
    # Making masks reads values, which are not there; eager attention takes none as well.
    model.forward = functools.partial(model.forward, attention_mask={"full_attention": None, "sliding_attention": None})
    encoder = Gemma2Encoder(model, tokenizer, template)
    encoder.place(torch.device("meta"))
    return encoder


class Gemma2Encoder:
    """The text encoder with its tokenizer and prompt template.

    Attributes:
        model: transformers' ``Gemma2Model`` (25 layers, no final norm). Move it with :meth:`place`; its dtype is chosen
            when it is loaded (converting it later would round the rotary frequencies too).
        tokenizer: text -> tokens.
        template: the system prompts of captions.
    """

    def __init__(self, model: nn.Module, tokenizer: GemmaTokenizer, template: PromptTemplate | str) -> None:
        """Puts the encoder together; ``template`` may be the system prompt of captions that are not empty."""
        self.model: Any = model
        self.tokenizer = tokenizer
        self.template = template if isinstance(template, PromptTemplate) else PromptTemplate(template)
        self._device: torch.device = next(model.parameters()).device

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self._device

    @property
    def blocks(self) -> list[nn.Module]:
        """The decoder layers, in order: what is alike and takes most of the memory."""
        return list(self.model.layers)

    def place(self, device: torch.device, besides: Collection[nn.Module] = ()) -> None:
        """Has the model compute on a device: moves everything there but the embedding.

        Args:
            device: where to.
            besides: those of :attr:`blocks` that stay where they are, because their weights are streamed.
        """
        if device == self._device:
            return
        stays = {id(self.model.embed_tokens), *map(id, besides)}
        for part in (*self.blocks, *(part for part in self.model.children() if part is not self.model.layers)):
            if id(part) not in stays:
                part.to(device)
        self._device = device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the layers' weights and of the features; the embedding may have another one."""
        return self.model.layers[0].input_layernorm.weight.dtype

    def encode(self, captions: Sequence[str], template: PromptTemplate | None = None) -> list[Tensor]:
        """Returns one feature tensor (L_i,D) for each caption, on the model's device, in its dtype.

        All captions are one batch, so captions of like length cost least; where one does not fit into the device's memory,
        and no gradients are taken, it is halved. Gradients flow to what the caller made trainable, unless the caller turned
        them off.

        Args:
            captions: texts without the system prompt.
            template: instead of the encoder's own, for negative prompts.

        Raises:
            torch.OutOfMemoryError: a caption alone does not fit, or a batch with gradients.
        """
        if not captions:
            return []
        template = self.template if template is None else template
        try:
            return self._encode(captions, template)
        except torch.OutOfMemoryError:
            if len(captions) == 1 or torch.is_grad_enabled():
                raise
        # Out of the handler: an exception that is being handled holds the tensors of its frames.
        half = len(captions) // 2
        return self.encode(captions[:half], template) + self.encode(captions[half:], template)

    def _encode(self, captions: Sequence[str], template: PromptTemplate) -> list[Tensor]:
        texts = [template.text(caption) for caption in captions]
        tokens = [self.tokenizer.encode(text) for text in texts]
        weights = [self.tokenizer.weights(text) for text in texts]
        longest = max(map(len, tokens))
        padded = [ids + [self.tokenizer.pad_id] * (longest - len(ids)) for ids in tokens]
        empty = [self.tokenizer.bos_id] + [self.tokenizer.pad_id] * (longest - 1)
        if not any(weights):
            hidden, empties = self._hidden(padded), None
        elif torch.is_grad_enabled():
            # A network may be trained, whose dropouts belong to the samples of a batch: each has an empty text of its own.
            hidden, empties = self._hidden(padded), self._hidden([empty] * len(padded))
        else:
            hidden = self._hidden([*padded, empty])
            empties = hidden[-1:].expand(len(padded), -1, -1)
        # Cloned: a view would keep the whole padded batch in memory.
        features = [hidden[index, : len(ids)].clone() for index, ids in enumerate(tokens)]
        return [
            feature if weight is None or empties is None else weigh(feature, empties[index, : len(weight)], weight)
            for index, (feature, weight) in enumerate(zip(features, weights, strict=True))
        ]

    def _hidden(self, tokens: list[list[int]]) -> Tensor:
        """Returns what the last layer gives (B,L,D) for tokens (B,L)."""
        embedded = copied_to(self._embedded(torch.tensor(tokens)), self.device)
        return self.model(inputs_embeds=embedded, use_cache=False).last_hidden_state

    def _embedded(self, tokens: Tensor) -> Tensor:
        """Returns what goes into the first layer (B,L,D) for tokens (B,L), in our dtype, where the embedding is."""
        embedding = self.model.embed_tokens
        used, places = torch.unique(tokens.to(embedding.weight.device), return_inverse=True)
        rows = embedding.weight[used].to(self.dtype)
        # The module scales by sqrt(D) too. Its weight is frozen, so that nothing is lost by giving it another one.
        return torch.func.functional_call(embedding, {"weight": rows}, (places,))


def pad_features(features: Sequence[Tensor], multiple_of: int = 1) -> tuple[Tensor, Tensor | None]:
    """Returns features of different lengths as one batch, and which of its tokens are real.

    Args:
        features: (L_i,D) each.
        multiple_of: the common length is rounded up to a multiple of this (few different shapes to compile for).

    Returns:
        (B,L,D) with zeros behind each caption, and (B,L) bool, or None where nothing was padded.
    """
    lengths = [feature.shape[0] for feature in features]
    longest = -(-max(lengths) // multiple_of) * multiple_of
    batch = torch.stack([F.pad(feature, (0, 0, 0, longest - feature.shape[0])) for feature in features])
    if min(lengths) == longest:
        return batch, None
    index = torch.arange(longest)
    mask = index[None, :] < torch.tensor(lengths)[:, None]
    return batch, copied_to(mask, batch.device)
