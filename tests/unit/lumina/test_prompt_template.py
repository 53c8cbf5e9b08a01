"""Which texts get the system prompt."""

import itertools

import pytest

from library.inference.settings import PictureFlags
from library.lumina.prompt_template import (
    MARK,
    PromptTemplate,
    plain_system_prompt,
    say_what_was_left_out,
    system_prompt_of,
)
from library.lumina.settings import ModelSettings

FULL = "Draw well. <Prompt Start> a cat"


@pytest.mark.parametrize(
    ("template", "filled", "empty"),
    [
        (PromptTemplate.of_captions("Draw well."), FULL, ""),
        (PromptTemplate.of_captions("Draw well.", on_empty=True), FULL, "Draw well. <Prompt Start> "),
        (PromptTemplate.of_captions(""), "a cat", ""),
        (PromptTemplate.of_captions("", on_empty=True), "a cat", ""),
        # defect 58: an empty text has none, whether it is a dropped caption, a prompt or a negative prompt
        (PromptTemplate.of_negatives("Draw well."), "a cat", ""),
        (PromptTemplate.of_negatives("Draw well.", on_filled=True), FULL, ""),
        (PromptTemplate.of_negatives("Draw well.", on_empty=True), "a cat", "Draw well. <Prompt Start> "),
        (PromptTemplate.of_negatives("Draw well.", on_empty=True, on_filled=True), FULL, "Draw well. <Prompt Start> "),
    ],
)
def test_what_is_encoded(template: PromptTemplate, filled: str, empty: str) -> None:
    assert template.text("a cat") == filled
    assert template.text("") == empty


def test_templates_that_give_other_texts_have_other_fingerprints() -> None:
    # defect 42
    templates = [PromptTemplate(filled, empty) for filled in ("", "A", "B") for empty in ("", "A", "B")]
    for first, second in itertools.combinations(templates, 2):
        assert first.fingerprint != second.fingerprint


def test_existing_caches_of_the_official_rule_stay_valid() -> None:
    assert PromptTemplate.of_captions("Draw well.").fingerprint == "Draw well."


@pytest.mark.parametrize("end", ["", f" {MARK}", f"{MARK} ", f" {MARK}\n", f" {MARK} {MARK} "])
def test_the_mark_is_put_behind_a_system_prompt_once(end: str) -> None:
    """ComfyUI's users know system prompt and mark as one text."""
    given = f"Draw well.{end}"
    for used in (ModelSettings(system_prompt=given).system_prompt, PictureFlags(system_prompt=given).system_prompt):
        assert PromptTemplate.of_captions(used).text("a cat") == FULL
        assert PromptTemplate.of_captions(used).fingerprint == "Draw well."


def test_other_system_prompts_stay_as_they_are() -> None:
    for given in ("", " Draw. ", f"{MARK} in front", "<prompt start>"):
        assert plain_system_prompt(given) == given
    assert plain_system_prompt(MARK) == ""


def test_leaving_the_mark_out_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        say_what_was_left_out("Draw.", "Draw.")
        assert not caplog.records
        say_what_was_left_out(f"Draw. {MARK}", "Draw.")
    assert 'the <Prompt Start> at its end is left out, because it is added anyway; used is "Draw."' in caplog.text


def test_the_system_prompt_of_a_text() -> None:
    assert system_prompt_of(FULL) == "Draw well."
    assert system_prompt_of("a cat") == system_prompt_of("") == ""
