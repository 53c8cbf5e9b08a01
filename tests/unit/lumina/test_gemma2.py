from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from models_helpers import tiny_models, write_tiny_files
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from library.lumina.gemma2 import Gemma2Encoder, GemmaTokenizer, PromptTemplate, build_gemma2, pad_features
from library.lumina.loading import inspect_models, load_gemma2

CAPTIONS = ["a red disc on a blue background", "", "ring", "a yellow cross, drawn in the centre of a dark picture"]


@pytest.fixture(scope="module")
def encoder() -> Gemma2Encoder:
    models = tiny_models()
    tensors = {name: models.gemma2[name].clone() for name in models.gemma2_config.tensor_shapes()}
    tokenizer = GemmaTokenizer(models.tokenizer, max_tokens=40)
    return Gemma2Encoder(build_gemma2(models.gemma2_config, tensors), tokenizer, "Draw well.")


def test_features_equal_the_whole_models_hidden_states() -> None:
    """The whole model has one layer more and a final norm; its second last hidden states are what Lumina takes."""
    from transformers import Gemma2Config, Gemma2Model

    models = tiny_models()
    config = models.gemma2_config
    whole = Gemma2Model(
        Gemma2Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            query_pre_attn_scalar=config.query_pre_attn_scalar,
            sliding_window=config.sliding_window,
            attn_implementation="eager",
        )
    ).eval()
    whole.load_state_dict(models.gemma2)
    # Attention logits near the cap, so that soft-capping matters.
    sharp = {name: tensor * 6 if "q_proj" in name else tensor for name, tensor in models.gemma2.items()}
    whole.load_state_dict(sharp)
    ours = build_gemma2(config, {name: sharp[name] for name in config.tensor_shapes()})
    input_ids = torch.tensor([GemmaTokenizer(models.tokenizer, 64).encode(CAPTIONS[3])])
    with torch.no_grad():
        expected = whole(input_ids, output_hidden_states=True).hidden_states[-2]
        features = ours(input_ids=input_ids, use_cache=False).last_hidden_state
        assert torch.equal(features, expected)
        ours.config.attn_logit_softcapping = None
        for layer in ours.layers:
            layer.self_attn.attn_logit_softcapping = None
        uncapped = ours(input_ids=input_ids, use_cache=False).last_hidden_state
    assert (uncapped - expected).abs().max() > 1e-3


def test_only_real_tokens_come_back_and_a_batch_changes_nothing(encoder: Gemma2Encoder) -> None:
    features = encoder.encode(CAPTIONS)
    texts = [PromptTemplate("Draw well.").text(caption) for caption in CAPTIONS]
    assert [feature.shape for feature in features] == [(len(encoder.tokenizer.encode(text)), 32) for text in texts]
    for caption, feature in zip(CAPTIONS, features, strict=True):
        (alone,) = encoder.encode([caption])
        # Float32; matrix products of another shape sum in another order.
        torch.testing.assert_close(feature, alone, atol=1e-4, rtol=1e-4)
        assert feature.untyped_storage().nbytes() == feature.numel() * 4


def test_the_system_prompt_is_left_out_for_empty_captions_and_can_be_replaced(encoder: Gemma2Encoder) -> None:
    assert encoder.encode([""])[0].shape[0] == 1  # BOS
    with_prompt, without = encoder.encode(["a cat"])[0], encoder.encode(["a cat"], PromptTemplate())[0]
    assert without.shape[0] == len(encoder.tokenizer.encode("a cat")) < with_prompt.shape[0]
    assert encoder.encode([]) == []


def test_a_batch_that_does_not_fit_is_halved(encoder: Gemma2Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    forward = encoder.model.forward

    def small_device(inputs_embeds: torch.Tensor, **options: bool) -> object:
        sizes.append(len(inputs_embeds))
        if sizes[-1] > largest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(inputs_embeds=inputs_embeds, **options)

    expected = encoder.encode(CAPTIONS)
    monkeypatch.setattr(encoder.model, "forward", small_device)
    largest = 2
    with torch.no_grad():
        found = encoder.encode(CAPTIONS)
    assert sizes == [4, 2, 2]
    for feature, other in zip(found, expected, strict=True):
        # Float32; matrix products of another shape sum in another order.
        torch.testing.assert_close(feature, other, atol=1e-4, rtol=1e-4)
    largest = 0
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError):
        encoder.encode(CAPTIONS)
    assert sizes[3:] == [4, 2, 1]
    largest = 2
    with pytest.raises(torch.OutOfMemoryError):  # with gradients, halves would need as much together
        encoder.encode(CAPTIONS)


def test_nothing_is_trainable_until_the_caller_says_so(encoder: Gemma2Encoder) -> None:
    assert not encoder.encode(["a cat"])[0].requires_grad
    weight = encoder.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    try:
        encoder.encode(["a cat", "a red disc"])[1].square().sum().backward()
        assert weight.grad is not None
        assert weight.grad.abs().max() > 0
    finally:
        weight.grad = None
        weight.requires_grad_(False)


def test_the_dtype_of_the_weights_is_that_of_the_features() -> None:
    models = tiny_models()
    tensors = {name: models.gemma2[name].bfloat16() for name in models.gemma2_config.tensor_shapes()}
    encoder = Gemma2Encoder(build_gemma2(models.gemma2_config, tensors), GemmaTokenizer(models.tokenizer, 40), "")
    assert encoder.dtype == encoder.encode(["a cat"])[0].dtype == torch.bfloat16
    assert encoder.model.rotary_emb.inv_freq.dtype == torch.float32
    assert encoder.model.embed_tokens.weight.data_ptr() == tensors["embed_tokens.weight"].data_ptr()


def test_padding_marks_what_is_real() -> None:
    short, long = torch.ones(2, 3), torch.full((5, 3), 2.0)
    batch, mask = pad_features([short, long])
    assert batch.shape == (2, 5, 3)
    assert mask is not None
    assert mask.tolist() == [[True] * 2 + [False] * 3, [True] * 5]
    assert torch.equal(batch[0, :2], short)
    assert batch[0, 2:].abs().max() == 0
    assert pad_features([long, long])[1] is None
    batch, mask = pad_features([long], multiple_of=4)
    assert batch.shape == (1, 8, 3)
    assert mask is not None
    assert mask.sum() == 5
    assert pad_features([torch.ones(8, 3)], multiple_of=4)[1] is None


class _CopiedTo:
    """Stands for copies to a device: nothing is moved, and what was asked for is kept."""

    def __init__(self) -> None:
        self.copied: list[tuple[torch.Size, torch.device]] = []

    def __call__(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        self.copied.append((tensor.shape, device))
        return tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_apart_gives_the_same_bits_and_stays_where_it_is(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tiny_models()
    tensors = {name: models.gemma2[name].to(dtype) for name in models.gemma2_config.tensor_shapes()}
    encoder = Gemma2Encoder(build_gemma2(models.gemma2_config, tensors), GemmaTokenizer(models.tokenizer, 40), "")
    texts = ["a red disc", "ring"]
    tokens = [encoder.tokenizer.encode(text) for text in texts]
    longest = max(map(len, tokens))
    ids = torch.tensor([row + [encoder.tokenizer.pad_id] * (longest - len(row)) for row in tokens])
    expected = encoder.model(input_ids=ids, use_cache=False).last_hidden_state
    copies = _CopiedTo()
    monkeypatch.setattr("library.lumina.gemma2.copied_to", copies)
    features = encoder.encode(texts)
    for row, feature in enumerate(features):
        assert torch.equal(feature, expected[row, : len(tokens[row])])
    assert copies.copied == [(torch.Size([2, longest, 32]), torch.device("cpu"))]
    # The meta device stands for another one: what computes goes there, the embedding does not.
    encoder.place(torch.device("meta"))
    assert encoder.device.type == "meta"
    assert encoder.model.embed_tokens.weight.device.type == "cpu"
    assert encoder.model.rotary_emb.inv_freq.device.type == "meta"
    assert {tensor.device.type for block in encoder.blocks for tensor in block.parameters()} == {"meta"}
    assert len(encoder.blocks) == models.gemma2_config.num_layers_used


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_the_embedding_is_left_in_the_file_and_gives_the_same_bits(tmp_path: Path, stored: torch.dtype) -> None:
    """It is a quarter of the model, and captions need a few hundred of its rows: a copy would be made for nothing."""
    paths = write_tiny_files(tmp_path, stored)
    features = {}
    for mmap in (True, False):
        files = inspect_models(dataclasses.replace(paths, mmap=mmap))
        encoder = load_gemma2(files, torch.bfloat16, 40, "Draw well.")
        assert encoder.model.embed_tokens.weight.dtype == (stored if mmap else torch.bfloat16)
        assert {tensor.dtype for block in encoder.blocks for tensor in block.parameters()} == {torch.bfloat16}
        features[mmap] = encoder.encode(CAPTIONS)
    for left, converted in zip(features[True], features[False], strict=True):
        assert left.dtype == torch.bfloat16
        assert torch.equal(left, converted)


def test_a_scaled_embedding_is_converted(tmp_path: Path) -> None:
    paths = write_tiny_files(tmp_path)
    assert paths.gemma2 is not None
    tensors = {name: tensor.clone() for name, tensor in load_file(paths.gemma2).items()}
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[name.replace("weight", "scale_weight")] = torch.tensor(0.5)
    with safe_open(paths.gemma2, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, paths.gemma2, metadata)
    embedding = load_gemma2(inspect_models(paths), torch.bfloat16, 40, "").model.embed_tokens.weight
    assert torch.equal(embedding, (tensors[name].float() * 0.5).bfloat16())


def test_streamed_layers_stay_where_they_are() -> None:
    models = tiny_models()
    tensors = {name: models.gemma2[name] for name in models.gemma2_config.tensor_shapes()}
    encoder = Gemma2Encoder(build_gemma2(models.gemma2_config, tensors), GemmaTokenizer(models.tokenizer, 40), "")
    encoder.place(torch.device("meta"), besides=encoder.blocks[1:])
    devices = [{tensor.device.type for tensor in block.parameters()} for block in encoder.blocks]
    assert devices == [{"meta"}, {"cpu"}, {"cpu"}]
    assert encoder.device.type == encoder.model.rotary_emb.inv_freq.device.type == "meta"
    assert encoder.model.embed_tokens.weight.device.type == "cpu"
