"""What the log says of captions that are too long or too many."""

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
from data_helpers import build, make_pictures

from library.prompts import Prompt
from library.training.caption_report import (
    report_system_prompt,
    system_prompt_of_training,
    training_captions,
    warn_of_long_captions,
    warn_of_many_captions,
)


class WordTokenizer:
    """A token a word, and BOS; keeps what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def counts(self, texts: Sequence[str]) -> list[int]:
        self.asked += texts
        return [1 + len(text.split()) for text in texts]


def test_final_captions_are_counted_once_a_picture(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # defect 72: there, captions are cut off in silence
    make_pictures(tmp_path, {f"{name}.png": (64, 64) for name in "abcd"})
    (tmp_path / "a.txt").write_text("1 2 3 4 5 6 7", encoding="utf-8")
    (tmp_path / "b.txt").write_text("1\n1 2 3 {4|4 5 6 7 8 9} 5 6 7 8", encoding="utf-8")
    (tmp_path / "c.txt").write_text("1 2 3 4 5 6", encoding="utf-8")
    rules = {"caption_prefix": "one two", "enable_wildcard": True, "shuffle_caption": True, "cache_latents": True}
    data = build(tmp_path, **rules)
    warn_of_long_captions(training_captions(data), lambda text: f"system {text}", WordTokenizer(), 10, "captions")
    # a: BOS, the system prompt, the prefix and 7 words; b by its longest line and choice; c just fits.
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 4 captions are longer than --gemma2_max_token_length 10 with the system prompt; their ends are cut off: "
        "b.png (17 tokens), a.png (11 tokens). A larger --gemma2_max_token_length reads them whole"
    ]


def test_only_captions_that_could_be_too_long_are_tokenised() -> None:
    tokenizer = WordTokenizer()
    captions = [(str(number), ["x" * number]) for number in range(1, 300)]
    warn_of_long_captions(captions, lambda text: text, tokenizer, 256, "captions")
    assert tokenizer.asked == ["x" * number for number in range(255, 300)]
    warn_of_long_captions([("umlauts", ["ü" * 130])], lambda text: text, tokenizer, 256, "captions")
    assert tokenizer.asked[-1] == "ü" * 130  # two bytes each


def test_captions_that_are_always_dropped_are_not_counted(tmp_path: Path) -> None:
    make_pictures(tmp_path, {"a.png": (64, 64)})
    for rule in ({"caption_dropout_rate": 1.0}, {"caption_dropout_every_n_epochs": 1}):
        assert list(training_captions(build(tmp_path, cache_latents=True, **rule))) == []


def test_many_captions_are_named_with_the_flag_that_makes_them_few(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)  # whatever level a program that ran before has set
    make_pictures(tmp_path, {f"{number}.png": (64, 64) for number in range(10)})
    flags = {"shuffle_caption": True, "dataset_repeats": 2, "cache_latents": True}
    data = build(tmp_path, **flags)
    warn_of_many_captions(data, 6, lambda texts: len(list(texts)) * 2**24)
    assert [record.getMessage() for record in caplog.records] == [
        "Shuffled, chosen or growing captions give up to 120 different ones for 10 pictures in 6 epochs; each is encoded"
        " once and kept, about 1.9 GiB. With --caption_variants 1 it would be 10 captions, 160.0 MiB, with 4 it"
        " would be 40 captions, 640.0 MiB"
    ]
    caplog.clear()
    warn_of_many_captions(data, 6, lambda texts: len(list(texts)) * 2**20)  # 120 MiB are no reason to warn
    for same in ({"shuffle_caption": False}, {"caption_variants": 1}):
        warn_of_many_captions(build(tmp_path, **{**flags, **same}), 6, lambda texts: 1)
    assert not caplog.records


SAMPLE = [Prompt(prompt="a cat")]


def test_a_run_without_a_system_prompt_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_pictures(tmp_path, {"a.png": (64, 64), "b.png": (64, 64)})
    data = build(tmp_path)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        report_system_prompt("Draw.", "Draw.", data, SAMPLE)
        assert not caplog.records
        report_system_prompt("", "", data, SAMPLE)
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert '--system_prompt "You are an assistant' in record.getMessage()


def test_texts_that_bring_a_system_prompt_of_their_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_pictures(tmp_path, {"a.png": (64, 64), "b.png": (64, 64)})
    data = build(tmp_path, caption_prefix="Draw. <Prompt Start>")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        report_system_prompt("", "", data, SAMPLE)
        assert not caplog.records
        report_system_prompt("Draw.", "Draw.", data, [*SAMPLE, Prompt(prompt="Draw. <Prompt Start> a cat")])
    messages = [record.getMessage() for record in caplog.records]
    assert [message.split(", which")[0] for message in messages] == [
        "--system_prompt comes before 2 of the captions",
        "--system_prompt comes before 1 of the sample prompts",
    ]


def test_the_system_prompt_of_a_training_may_stand_in_its_captions(tmp_path: Path) -> None:
    """It is what a drawing is compared with."""
    make_pictures(tmp_path, {"a.png": (64, 64), "b.png": (64, 64)}, captions=False)
    (tmp_path / "a.txt").write_text("Draw. <Prompt Start> a cat", encoding="utf-8")
    items = build(tmp_path).items
    assert system_prompt_of_training("", items) == "Draw."  # b has no caption at all
    assert system_prompt_of_training("Paint.", items) == "Paint."
    (tmp_path / "b.txt").write_text("a dog", encoding="utf-8")
    assert system_prompt_of_training("", build(tmp_path).items) is None
    assert system_prompt_of_training("", build(tmp_path, caption_prefix="Paint. <Prompt Start>").items) == "Paint."
    (tmp_path / "a.txt").write_text("a cat", encoding="utf-8")
    assert system_prompt_of_training("", build(tmp_path).items) == ""
