"""Prompt lines and files."""

import logging
from pathlib import Path

import pytest

from library.prompts import TYPED_OPTIONS, Prompt, PromptError, parse_line, read_prompt_file


def test_all_options_of_a_line() -> None:
    line = "a cat, sitting --n dog -- ugly --w 512 --h 768 --d 0 --s 20 --l 4.5 --ctr 0.5 --rcfg 0"
    assert parse_line(line, Prompt(), "x") == Prompt("a cat, sitting", "dog -- ugly", 512, 768, 0, 20, 4.5, 0.5, 0.0)


@pytest.mark.parametrize(
    ("line", "prompt"),
    [
        ("s 3 cats", "s 3 cats"),  # the text itself is never read as an option
        ("well--known place", "well--known place"),
        ("--d 3", ""),
        ("a -- b", "a -- b"),
    ],
)
def test_text_is_not_an_option(line: str, prompt: str) -> None:
    # defect 41
    assert parse_line(line, Prompt(), "x").prompt == prompt


def test_wrong_values_name_line_and_option() -> None:
    with pytest.raises(PromptError, match=r"p\.txt, line 3: --w 'wide' is not valid: a whole number is expected"):
        parse_line("a --w wide", Prompt(), "p.txt, line 3")
    with pytest.raises(PromptError, match="1 to 1000"):
        parse_line("a --s 0", Prompt(), "x")


def test_foreign_options_are_named_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    parsed = parse_line("a --ss euler --g 3 --m 1 --qq 1 --w 64", Prompt(), "x")
    assert parsed == Prompt("a", width=64)
    texts = [record.getMessage() for record in caplog.records]
    assert texts == [
        "x: --ss has no effect for this model",
        "x: --g has no effect for this model",
        "x: --m has no effect in previews, which have no LoRA files",
        "x: --qq is no option and is left out",
    ]


def test_interactive_options() -> None:
    parsed = parse_line("a --g 2 --m 0.5,1 --n -", Prompt(negative_prompt="old"), "x", TYPED_OPTIONS)
    assert parsed == Prompt("a", "", scale=2.0, multipliers=(0.5, 1.0))


def test_sizes_become_multiples_of_16_with_a_notice(caplog: pytest.LogCaptureFixture) -> None:
    # defect 8
    rounded = Prompt(width=1000, height=1024).rounded()
    assert (rounded.width, rounded.height) == (992, 1024)
    assert "1000x1024 becomes 992x1024" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert Prompt().rounded() == Prompt()
    assert not caplog.records


def test_the_three_file_forms_agree(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("# first\n\na cat --w 512 --h 512 --d 1\nein Hund ü --w 512 --h 512\n", "utf-8")
    (tmp_path / "p.toml").write_text(
        '[prompt]\nwidth = 512\nheight = 512\n[[prompt.subset]]\nprompt = "a cat"\nseed = 1\n'
        '[[prompt.subset]]\nprompt = "ein Hund ü"\n',
        "utf-8",
    )
    (tmp_path / "p.json").write_text(
        '[{"prompt": "a cat", "width": 512, "height": 512, "seed": 1}, "ein Hund ü --w 512 --h 512"]', "utf-8"
    )
    expected = [Prompt("a cat", width=512, height=512, seed=1), Prompt("ein Hund ü", width=512, height=512)]
    for name in ("p.txt", "p.toml", "p.json"):
        assert read_prompt_file(tmp_path / name) == expected


def test_toml_subset_overrides_common_keys(tmp_path: Path) -> None:
    # defect 41
    (tmp_path / "p.toml").write_text(
        '[prompt]\nscale = 2\n[[prompt.subset]]\nprompt = "a"\nscale = 3\n[[prompt.subset]]\nprompt = "b"\n', "utf-8"
    )
    assert [prompt.scale for prompt in read_prompt_file(tmp_path / "p.toml")] == [3.0, 2.0]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.txt", "# nothing\n", "holds no prompt"),
        ("p.csv", "a", "neither .txt, .toml nor .json"),
        ("p.toml", "[prompt", "cannot be read"),
        ("p.toml", '[[prompt.subset]]\npromt = "a"', "did you mean 'prompt'"),
        ("p.toml", '[[prompt.subset]]\nwidth = "wide"', "width = 'wide'"),
        ("p.json", '{"prompt": "a"}', "no list"),
        ("p.json", "[", "cannot be read"),
        ("p.json", "[5]", "no prompt"),
        ("p.json", '[{"prompt": 3}]', "prompt = 3 is no text"),
        ("p.toml", 'prompt = "x"', "[[prompt.subset]]"),
        ("p.txt", "a --d 99999999999999999999", "seeds go from 0"),
    ],
)
def test_wrong_files(tmp_path: Path, name: str, content: str, says: str) -> None:
    # defect 41, for one that is of none of these kinds
    (tmp_path / name).write_text(content, "utf-8")
    with pytest.raises(PromptError) as caught:
        read_prompt_file(tmp_path / name)
    assert says in str(caught.value)
    assert name in str(caught.value)


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(PromptError, match="save it as UTF-8"):
        read_prompt_file(tmp_path / "p.txt")


def test_an_empty_file_is_wrong_only_where_something_is_drawn(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("# nothing yet\n", encoding="utf-8")
    with pytest.raises(PromptError, match="holds no prompt"):
        read_prompt_file(file)
    assert read_prompt_file(file, may_be_empty=True) == []


def test_seed_zero_is_a_seed_and_no_seed_is_none(tmp_path: Path) -> None:
    # defect 40
    (tmp_path / "p.txt").write_text("a --d 0\nb\n", "utf-8")
    (tmp_path / "p.toml").write_text(
        '[[prompt.subset]]\nprompt = "a"\nseed = 0\n[[prompt.subset]]\nprompt = "b"', "utf-8"
    )
    (tmp_path / "p.json").write_text('[{"prompt": "a", "seed": 0}, "b"]', "utf-8")
    for name in ("p.txt", "p.toml", "p.json"):
        assert [prompt.seed for prompt in read_prompt_file(tmp_path / name)] == [0, None]


def test_seed_minus_one_is_no_seed(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a --d -1 --w 512\n", "utf-8")
    (tmp_path / "p.toml").write_text('[prompt]\nseed = 3\n[[prompt.subset]]\nprompt = "a"\nseed = -1', "utf-8")
    (tmp_path / "p.json").write_text('[{"prompt": "a", "seed": -1}]', "utf-8")
    for name in ("p.txt", "p.toml", "p.json"):
        assert [prompt.seed for prompt in read_prompt_file(tmp_path / name)] == [None]
    assert parse_line("a --d -1", Prompt(seed=3), "prompt", TYPED_OPTIONS).seed is None
    with pytest.raises(PromptError, match="-1 is none"):
        parse_line("a --d -2", Prompt(), "prompt")
