"""Which prompts are drawn, how often, from which seeds; and what is told of flags that change nothing."""

from pathlib import Path

import pytest

from library.errors import SettingsError
from library.inference.requests import asked_prompts, check_together
from library.inference.settings import CompareFlags, PictureFlags
from library.prompts import MAX_SEED, PromptError


def test_one_prompt_and_several_pictures_of_it() -> None:
    (one,) = asked_prompts(PictureFlags(prompt="a", seed=3), {"prompt"})
    assert (one.prompt, one.seed) == ("a", 3)
    found = asked_prompts(PictureFlags(prompt="a", seed=3, images_per_prompt=3), ())
    assert [prompt.seed for prompt in found] == [3, 4, 5]
    drawn = [prompt.seed for prompt in asked_prompts(PictureFlags(images_per_prompt=2), ())]
    assert None not in drawn
    assert drawn[1] == drawn[0] + 1  # type: ignore[operator]
    last = [prompt.seed for prompt in asked_prompts(PictureFlags(seed=MAX_SEED, images_per_prompt=2), ())]
    assert last == [MAX_SEED, 0]


def test_a_file_takes_what_it_leaves_out_from_the_flags(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "p.txt"
    file.write_text("a --w 64 --d 5 --m 0.5,1\nb --n soft\n--d 1\n", encoding="utf-8")
    flags = PictureFlags(
        from_file=file, negative_prompt="bad", image_width=128, image_height=96, seed=7, steps=4, images_per_prompt=2
    )
    found = asked_prompts(flags, {"from_file"})
    assert not caplog.text
    assert [(prompt.prompt, prompt.negative_prompt, prompt.seed) for prompt in found] == [
        ("a", "bad", 5),
        ("a", "bad", 6),
        ("b", "soft", 7),
        ("b", "soft", 8),
        ("", "bad", 1),
        ("", "bad", 2),
    ]
    assert [(prompt.width, prompt.height, prompt.sample_steps) for prompt in found[::2]] == [
        (64, 96, 4),
        (128, 96, 4),
        (128, 96, 4),
    ]
    assert [prompt.multipliers for prompt in found[::2]] == [(0.5, 1.0), (), ()]
    asked_prompts(flags, {"from_file", "prompt"})
    assert "--prompt: no effect beside --from_file" in caplog.text


def test_tables_have_multipliers_too(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_text('[{"prompt": "a", "multipliers": "0.5,1"}, {"prompt": "b", "multipliers": 0.25}]', "utf-8")
    found = asked_prompts(PictureFlags(from_file=file), ())
    assert [prompt.multipliers for prompt in found] == [(0.5, 1.0), (0.25,)]
    assert {prompt.prompt for prompt in found} == {"a", "b"}


def test_errors_name_the_flag_of_this_program(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("# nothing", encoding="utf-8")
    with pytest.raises(PromptError, match=r"^--from_file: .*p\.txt holds no prompt; add one, or leave --from_file out"):
        asked_prompts(PictureFlags(from_file=tmp_path / "p.txt"), ())
    with pytest.raises(SettingsError, match=r"^--from_file: .* is no file"):
        PictureFlags(from_file=tmp_path)
    comparison = CompareFlags(compare_lora_weights=(tmp_path / "p.txt",))
    with pytest.raises(SettingsError, match=r"^--interactive and --compare_lora_weights: "):
        check_together(PictureFlags(interactive=True), comparison, ())
    with pytest.raises(SettingsError, match="leave one of the two out"):
        PictureFlags(from_file=tmp_path / "p.txt", interactive=True)
    for name in ("images_per_prompt", "batch_size"):
        with pytest.raises(SettingsError, match=f"--{name}: 0 must be above 0"):
            PictureFlags(**{name: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a zorp --d 5 --n bad", "--d and --n in it"),
        ("a zorp --W 64", "--W in it"),
        ("--d 5", "--d in it"),
        ("a well--known --zorp, 3 -- d", ""),
    ],
)
def test_options_in_a_prompt_are_told(text: str, named: str, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("prompt", "negative_prompt"):
        caplog.clear()
        (found,) = asked_prompts(PictureFlags(**{name: text}), {name})  # type: ignore[arg-type]
        assert getattr(found, name) == text
        if named:
            assert f"--{name} has {named}, drawn as text; such options work in the lines of --from_file" in caplog.text
        else:
            assert not caplog.text


def test_what_the_interactive_program_does_not_use_is_told(caplog: pytest.LogCaptureFixture) -> None:
    check_together(PictureFlags(interactive=True, batch_size=2), CompareFlags(), {"interactive", "batch_size"})
    assert "--batch_size: no effect with --interactive" in caplog.text
    caplog.clear()
    check_together(PictureFlags(batch_size=2), CompareFlags(), {"batch_size"})
    assert not caplog.text
