"""Weighted captions: the marks, the tokens they reach, and what they do to features."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from lora_helpers import fill, small_next_dit
from models_helpers import tiny_models, write_tiny_files

from library.lumina.gemma2 import Gemma2Encoder, GemmaTokenizer, build_gemma2
from library.lumina.loading import gemma2_fingerprint, inspect_models
from library.lumina.weighted_captions import WeightedTokenizer, parse_weights, weigh
from networks import lora_lumina


def runs(caption: str) -> list[tuple[str, float]]:
    """Returns stretches of text with one weight each."""
    text, weights = parse_weights(caption)
    assert len(text) == len(weights)
    result: list[tuple[str, float]] = []
    for character, weight in zip(text, weights, strict=True):
        if result and result[-1][1] == round(weight, 6):
            result[-1] = (result[-1][0] + character, round(weight, 6))
        else:
            result.append((character, round(weight, 6)))
    return result


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("", []),
        ("a red disc", [("a red disc", 1.0)]),
        ("a (red) disc", [("a ", 1.0), ("red", 1.1), (" disc", 1.0)]),
        ("a [red] disc", [("a ", 1.0), ("red", 0.909091), (" disc", 1.0)]),
        ("a (red:1.3) disc", [("a ", 1.0), ("red", 1.3), (" disc", 1.0)]),
        ("(red: 0 )", [("red", 0.0)]),
        ("(red:.5), (blue:-1)", [("red", 0.5), (", ", 1.0), ("blue", -1.0)]),
        ("((red))", [("red", 1.21)]),
        ("(a (red:2) disc:1.5)", [("a ", 1.5), ("red", 3.0), (" disc", 1.5)]),
        ("[(red:1.5)]", [("red", 1.363636)]),
        (r"a \(red\) \[x\] \\", [(r"a (red) [x] " + "\\", 1.0)]),
        (r"(red \(dark\):1.2)", [("red (dark)", 1.2)]),
        ("(red, blue", [("red, blue", 1.1)]),  # as shuffling may leave it
        ("red:1.3), blue]", [("red:1.3), blue]", 1.0)]),
        ("a ratio of 4:3", [("a ratio of 4:3", 1.0)]),
        ("(red:fast)", [("red:fast", 1.1)]),
        ("(red]", [("red]", 1.1)]),
        ("[red:1.3)", [("red:1.3)", 0.909091)]),
    ],
)
def test_marks(caption: str, expected: list[tuple[str, float]]) -> None:
    assert runs(caption) == expected


@pytest.fixture(scope="module")
def tokenizer() -> WeightedTokenizer:
    return WeightedTokenizer(tiny_models().tokenizer, 64)


@pytest.mark.parametrize("system_prompt", ["", "Draw (well). <Prompt Start> "])
def test_tokens_are_those_of_the_plain_text(tokenizer: WeightedTokenizer, system_prompt: str) -> None:
    plain = GemmaTokenizer(tiny_models().tokenizer, 64)
    marked, text = f"{system_prompt}a (red:1.5) [disc] \\(x\\) ünï 漢字", f"{system_prompt}a red disc (x) ünï 漢字"
    assert tokenizer.encode(marked) == plain.encode(text)
    assert tokenizer.count(marked) == plain.count(text) == tokenizer.counts([marked])[0]
    assert plain.weights(marked) is None


@pytest.mark.parametrize("system_prompt", ["", "Draw (well). <Prompt Start> "])
@pytest.mark.parametrize("word", ["red", "漢字 ünï", "x  y\n"])
def test_weights_reach_the_tokens_of_their_words_and_no_others(
    tokenizer: WeightedTokenizer, system_prompt: str, word: str
) -> None:
    text = f"{system_prompt}a 漢 ({word}:1.5) disc"
    weights, ids = tokenizer.weights(text), tokenizer.encode(text)
    assert weights is not None
    assert len(weights) == len(ids)
    data = f"{system_prompt}a 漢 {word} disc".encode()
    first = len(f"{system_prompt}a 漢 ".encode())
    word_bytes = set(range(first, first + len(word.encode())))
    for (begin, end), weight in zip(tokenizer._spans(data.decode()), weights[1:], strict=True):
        filled = {index for index in range(begin, end) if not data[index : index + 1].isspace()}
        assert round(weight, 6) == (1.5 if (filled or set(range(begin, end))) <= word_bytes else 1.0)
    assert sum(weight != 1 for weight in weights) >= len(word.split())


def test_what_is_cut_off_has_no_weight() -> None:
    tokenizer = WeightedTokenizer(tiny_models().tokenizer, 3)
    assert len(tokenizer.weights("(a red disc on a blue background)") or []) == 3


def test_texts_without_marks_have_no_weights(tokenizer: WeightedTokenizer) -> None:
    assert tokenizer.weights("a red disc") is None
    assert tokenizer.weights("") is None
    assert tokenizer.weights("(x) <Prompt Start> a red disc") is None


def _encoder(tokenizer: GemmaTokenizer) -> Gemma2Encoder:
    models = tiny_models()
    tensors = {name: models.gemma2[name].clone() for name in models.gemma2_config.tensor_shapes()}
    return Gemma2Encoder(build_gemma2(models.gemma2_config, tensors), tokenizer, "")


def test_features_move_away_from_an_empty_texts() -> None:
    # defect 32: --weighted_captions ended every run
    models = tiny_models()
    weighted, plain = _encoder(WeightedTokenizer(models.tokenizer, 64)), _encoder(GemmaTokenizer(models.tokenizer, 64))
    with torch.no_grad():
        # Together with a longer caption, so that both are padded.
        (feature, other) = weighted.encode(["a (red:1.5) disc", "a yellow cross, drawn in the centre of a picture"])
        (expected, expected_other) = plain.encode(["a red disc", "a yellow cross, drawn in the centre of a picture"])
        ids = [plain.tokenizer.bos_id] + [plain.tokenizer.pad_id] * (len(feature) - 1)
        empty = plain.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        (neutral,) = weighted.encode(["a (red:1) disc"])
    weights = weighted.tokenizer.weights("a (red:1.5) disc")
    assert weights is not None
    is_red = torch.tensor(weights) != 1
    moved = empty + 1.5 * (expected - empty)
    # The batch has a row more, which changes sums in their last bits.
    torch.testing.assert_close(feature[~is_red], expected[~is_red], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(feature[is_red], moved[is_red], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other, expected_other, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(neutral, expected, rtol=1e-4, atol=1e-5)


def test_dropouts_of_the_empty_text_belong_to_samples() -> None:
    models = tiny_models()
    encoder, dit = _encoder(WeightedTokenizer(models.tokenizer, 64)), small_next_dit()
    network = lora_lumina.create_network(1.0, 4, 4.0, None, [encoder.model], dit, neuron_dropout=0.5)
    network.apply_to([encoder.model], dit, True, False)
    fill(network)
    network.train()
    captions, keys = ["a (red:1.5) disc", "a [blue] one"], torch.tensor([11, 12])
    network.set_dropout_keys(keys)
    together = encoder.encode(captions)
    for index, feature in enumerate(together):
        network.set_dropout_keys(keys[index : index + 1])
        (alone,) = encoder.encode(captions[index : index + 1])
        torch.testing.assert_close(feature, alone, rtol=1e-4, atol=1e-5)  # float32, in a batch of another size
        network.set_dropout_keys(keys[index : index + 1] + 5)
        (other,) = encoder.encode(captions[index : index + 1])
        assert (feature - other).norm() > 0.01 * feature.norm()


def test_the_transformer_sees_it_and_would_not_see_a_scale() -> None:
    torch.manual_seed(0)
    norm = torch.nn.RMSNorm(32, eps=1e-5)  # how the caption embedder begins
    feature, empty = torch.randn(4, 32), torch.randn(4, 32)
    weights = [1.0, 1.3, 1.3, 1.0]
    seen, scaled = norm(weigh(feature, empty, weights)), norm(feature * torch.tensor(weights)[:, None])
    # The norm's epsilon, 1e-5 beside a mean square of about 1, is all that a scale changes.
    torch.testing.assert_close(scaled, norm(feature), rtol=1e-4, atol=1e-5)
    assert (seen - norm(feature)).abs()[1:3].max() > 0.05
    assert torch.equal(seen[[0, 3]], norm(feature)[[0, 3]])


def test_gradients_reach_the_text_encoder() -> None:
    feature = torch.ones(2, 4, requires_grad=True)
    weigh(feature, torch.zeros(2, 4), [1.0, 1.5]).sum().backward()
    assert feature.grad is not None
    assert feature.grad[:, 0].tolist() == [1.0, 1.5]


def test_caches_are_told_apart(tmp_path: Path) -> None:
    paths = write_tiny_files(tmp_path)
    prints = {
        gemma2_fingerprint(
            inspect_models(dataclasses.replace(paths, weighted_captions=weighted)), torch.float32, 64, ""
        )
        for weighted in (False, True)
    }
    assert len(prints) == 2


def test_what_is_cut_off_is_told_without_marks() -> None:
    text = r"You are <Prompt Start> a (red:1.3) disc \(round\), [blue] background, more and more words"
    plain = "You are <Prompt Start> a red disc (round), blue background, more and more words"
    proto = tiny_models().tokenizer
    assert WeightedTokenizer(proto, 999).parts(text) == (text, "")
    for limit in range(2, GemmaTokenizer(proto, 999).count(plain)):
        kept, cut = WeightedTokenizer(proto, limit).parts(text)
        assert (kept, cut) == GemmaTokenizer(proto, limit).parts(plain)
        assert kept + cut == plain
