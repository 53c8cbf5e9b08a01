"""Which texts get the system prompt."""

import itertools

import pytest

from library.lumina.prompt_template import PromptTemplate

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
