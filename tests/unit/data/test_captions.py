from pathlib import Path
from typing import Any

import pytest

from library.data.captions import (
    WarmUp,
    caption_varies,
    final_caption,
    kept_lines,
    leaves_lines_out,
    longest_captions,
    read_lines,
    undropped_caption,
    variant_caption,
    warm_up_at,
    warm_up_steps,
)
from library.data.config import SubsetConfig
from library.errors import DatasetError


def _subset(**changes: Any) -> SubsetConfig:
    return SubsetConfig(image_dir=Path("pictures"), **changes)


def _draws(subset: SubsetConfig, raw: str, count: int = 200, epoch: int = 1) -> list[str]:
    return [final_caption(subset, raw, epoch, key) for key in range(count)]


def test_without_rules_the_text_stays_as_it_is() -> None:
    assert final_caption(_subset(), "a  cat ,dog,, {x|y}", 1, 5) == "a  cat ,dog,, {x|y}"


def test_prefix_and_suffix_are_joined_by_one_space() -> None:
    subset = _subset(caption_prefix="photo,", caption_suffix=", 4k")
    assert final_caption(subset, "cat", 1, 0) == "photo, cat , 4k"
    assert final_caption(subset, "", 1, 0) == "photo, , 4k"


def test_equal_keys_give_equal_captions_and_other_keys_others() -> None:
    subset = _subset(shuffle_caption=True)
    raw = "a, b, c, d, e, f"
    assert _draws(subset, raw) == _draws(subset, raw)
    assert len(set(_draws(subset, raw))) > 100


def test_shuffle_keeps_the_first_tags_and_joins_with_comma_and_space() -> None:
    subset = _subset(shuffle_caption=True, keep_tokens=2, caption_separator=";")
    captions = _draws(subset, "one;  two ; three;four;;")
    assert all(caption.startswith("one, two, ") for caption in captions)
    assert {tuple(sorted(caption.split(", "))) for caption in captions} == {("four", "one", "three", "two")}
    assert len(set(captions)) == 2


def test_keep_tokens_separator_fixes_head_and_tail() -> None:
    subset = _subset(shuffle_caption=True, keep_tokens_separator="|||", keep_tokens=1)
    captions = set(_draws(subset, "h1, h2 ||| x, y ||| t1, t2"))
    assert captions == {"h1, h2, x, y, t1, t2", "h1, h2, y, x, t1, t2"}


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("head ||| rest, more", "head, rest, more"),
        ("head,|||rest ||| tail", "head, rest, tail"),
        ("|||rest", "rest"),
        ("a ||| b ||| c ||| d", "a, b, c, d"),
        ("a natural sentence; with marks|||x", "a natural sentence; with marks, x"),
    ],
)
def test_keep_tokens_separator_never_stays_in_the_text(raw: str, expected: str) -> None:
    # defect 57
    assert final_caption(_subset(keep_tokens_separator="|||"), raw, 1, 0) == expected
    assert all(
        "|||" not in caption for caption in _draws(_subset(keep_tokens_separator="|||", shuffle_caption=True), raw)
    )


def test_dropout_rate_drops_about_that_share_of_captions() -> None:
    dropped = sum(not caption for caption in _draws(_subset(caption_dropout_rate=0.3), "cat", count=2000))
    # Standard deviation of 2000 draws at 0.3 is 20.5; five of them.
    assert abs(dropped - 600) < 103
    assert set(_draws(_subset(caption_dropout_rate=1.0), "cat")) == {""}


def test_every_nth_epoch_is_dropped_counting_from_one() -> None:
    subset = _subset(caption_dropout_every_n_epochs=3)
    assert [final_caption(subset, "cat", epoch, 0) for epoch in range(1, 8)] == [
        "cat",
        "cat",
        "",
        "cat",
        "cat",
        "",
        "cat",
    ]
    shuffled = _subset(caption_dropout_every_n_epochs=2, shuffle_caption=True)
    assert final_caption(shuffled, "a, b", 2, 0) == ""


def test_tag_dropout_spares_the_kept_tags() -> None:
    subset = _subset(caption_tag_dropout_rate=0.5, keep_tokens=1)
    captions = _draws(subset, "keep, a, b")
    assert set(captions) == {"keep, a, b", "keep, a", "keep, b", "keep"}
    assert set(_draws(_subset(caption_tag_dropout_rate=1.0, keep_tokens=1), "keep, a")) == {"keep"}


def test_wildcards_choose_and_doubled_braces_stay() -> None:
    subset = _subset(enable_wildcard=True)
    assert set(_draws(subset, "a {red|green|} {cat|dog}")) == {
        f"a {colour} {animal}" for colour in ("red", "green", "") for animal in ("cat", "dog")
    }
    assert set(_draws(subset, "{{a|b}} c")) == {"{a|b} c"}


def test_wildcard_takes_a_random_line_and_the_prefix_goes_to_each() -> None:
    subset = _subset(enable_wildcard=True, caption_prefix="my")
    assert set(_draws(subset, "first\nsecond\nthird")) == {"my first", "my second", "my third"}


def test_secondary_separator_is_replaced_last() -> None:
    subset = _subset(shuffle_caption=True, secondary_separator=";;;")
    assert set(_draws(subset, "sky;;;cloud, tree")) == {"sky,cloud, tree", "tree, sky,cloud"}
    assert final_caption(_subset(secondary_separator=";;;"), "a;;;b", 1, 0) == "a,b"


def test_caption_varies_is_true_exactly_where_draws_differ() -> None:
    cases = [
        (_subset(), "a, b", False),
        (_subset(enable_wildcard=True), "a, b", False),
        (_subset(enable_wildcard=True), "{a|b}", True),
        (_subset(enable_wildcard=True), "a\nb", True),
        (_subset(enable_wildcard=True, caption_prefix="{x|y}"), "a", True),
        (_subset(shuffle_caption=True), "a, b", True),
        (_subset(caption_tag_dropout_rate=0.5), "a, b", True),
        (_subset(caption_dropout_rate=0.5), "a, b", True),
        (_subset(caption_dropout_every_n_epochs=2), "a, b", False),
    ]
    for subset, raw, varies in cases:
        assert caption_varies(subset, raw) is varies
        assert (len(set(_draws(subset, raw))) > 1) is varies


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"\xef\xbb\xbf a cat \r\n\r\n a dog\r\n", ["a cat", "a dog"]),
        (b"\n\n  second line is first\n", ["second line is first"]),
        ("猫、かわいい".encode(), ["猫、かわいい"]),
        (b"", []),
        (b" \n\t\n", []),
    ],
)
def test_read_lines(tmp_path: Path, content: bytes, lines: list[str]) -> None:
    (tmp_path / "a.b.txt").write_bytes(content)
    assert read_lines(tmp_path / "a.b.png", ".txt") == lines


@pytest.mark.parametrize(
    ("rules", "kept", "cut"),
    [
        ({}, ["a cat,"], True),
        ({"enable_wildcard": True}, ["a cat,", "a {red|blue} dog"], False),
        ({"join_caption_lines": True}, ["a cat, a {red|blue} dog"], False),
        ({"join_caption_lines": True, "enable_wildcard": True}, ["a cat, a {red|blue} dog"], False),
    ],
)
def test_which_lines_are_used(rules: dict[str, bool], kept: list[str], cut: bool) -> None:
    subset, lines = _subset(**rules), ["a cat,", "a {red|blue} dog"]
    assert kept_lines(subset, lines) == kept
    assert leaves_lines_out(subset, lines) is cut
    assert kept_lines(subset, []) == []
    assert kept_lines(subset, lines[:1]) == ["a cat,"]
    assert not leaves_lines_out(subset, lines[:1])


def test_joined_lines_are_not_chosen_from_and_their_braces_are() -> None:
    subset = _subset(enable_wildcard=True, join_caption_lines=True)
    (raw,) = kept_lines(subset, ["a {red|", "blue} cat", "sits"])
    assert set(_draws(subset, raw)) == {"a red cat sits", "a  blue cat sits"}


def test_a_face_suffix_of_the_picture_is_left_out_of_the_caption_name(tmp_path: Path) -> None:
    (tmp_path / "me.txt").write_text("someone", encoding="utf-8")
    assert read_lines(tmp_path / "me_0010_0020_0100_0100.png", ".txt") == ["someone"]
    assert read_lines(tmp_path / "me_0010_0020.png", ".txt") == []


def test_a_caption_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(DatasetError, match=r"a\.txt is not UTF-8 text \(byte 2\)"):
        read_lines(tmp_path / "a.png", ".txt")


def test_a_caption_with_nul_bytes_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("a cat".encode("utf-16-le"))
    with pytest.raises(DatasetError, match=r"a\.txt holds NUL bytes"):
        read_lines(tmp_path / "a.png", ".txt")


def test_only_line_ends_end_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("a\u2028b\rc".encode())
    assert read_lines(tmp_path / "a.png", ".txt") == ["a\u2028b", "c"]


def _warming(subset: SubsetConfig, raw: str, num_steps: int) -> list[str]:
    return [final_caption(subset, raw, 1, 5, warm_up_at(subset, step, num_run_steps=100)) for step in range(num_steps)]


def test_the_number_of_tags_grows_with_the_optimizer_steps() -> None:
    subset = _subset(token_warmup_min=1, token_warmup_step=8, keep_tokens=1)
    # 4 free tags grow from 1 by 3 * step / 8; the kept tag is always there.
    assert [caption.count(",") for caption in _warming(subset, "k,a,b,c,d", 10)] == [1, 1, 1, 2, 2, 2, 3, 3, 4, 4]
    assert _warming(subset, "k,a,b,c,d", 4)[3] == "k, a, b"  # without shuffling the first ones
    assert _warming(subset, "k,a,b,c,d", 9)[8] == "k, a, b, c, d"  # and joined alike when all are there


def test_a_warm_up_ends_with_the_ordinary_caption() -> None:
    growing = _subset(token_warmup_min=0, token_warmup_step=5, shuffle_caption=True, caption_tag_dropout_rate=0.2)
    steady = _subset(shuffle_caption=True, caption_tag_dropout_rate=0.2)
    assert [final_caption(growing, "a, b, c, d, e", 1, key) for key in range(50)] == _draws(steady, "a, b, c, d, e", 50)
    assert _warming(growing, "a, b, c, d, e", 1) == [""]


def test_few_tags_are_all_shown_from_the_first_step() -> None:
    assert _warming(_subset(token_warmup_min=3, token_warmup_step=8), "a, b", 1) == ["a, b"]


def test_a_warm_up_below_one_is_a_share_of_the_run() -> None:
    # defect 28: there it is 0 where the run's length does not reach the dataset
    assert warm_up_steps(_subset(token_warmup_step=0.25), 90) == 22
    assert warm_up_steps(_subset(token_warmup_step=7), 90) == 7
    assert warm_up_at(_subset(token_warmup_step=0.25), 21, 90) == WarmUp(21, 22)
    assert warm_up_at(_subset(token_warmup_step=0.25), 22, 90) is None
    assert warm_up_at(_subset(), 0, 90) is None


def test_variants_are_few_and_belong_to_the_text() -> None:
    subset = _subset(shuffle_caption=True, enable_wildcard=True)
    raw = "a, b, c, d, {e|f}"
    used = {final_caption(subset, raw, epoch, epoch, variant=epoch % 3) for epoch in range(1, 40)}
    assert used == {variant_caption(subset, raw, number) for number in range(3)}
    assert len(used) == 3
    # Whole captions are dropped showing by showing.
    subset = _subset(shuffle_caption=True, caption_dropout_rate=0.5)
    drawn = [final_caption(subset, raw, 1, key, variant=0) for key in range(400)]
    assert set(drawn) == {"", variant_caption(subset, raw, 0)}
    assert abs(drawn.count("") - 200) < 50  # standard deviation 10; five of them


def test_epoch_zero_drops_nothing() -> None:
    # defect 29: 0 is divisible by every number of epochs
    subset = _subset(caption_dropout_every_n_epochs=2)
    assert undropped_caption(subset, "a", 0) == final_caption(subset, "a", 0, 0) == "a"
    assert undropped_caption(subset, "a", 2) is None


def test_the_undropped_caption_takes_the_first_of_everything() -> None:
    subset = _subset(shuffle_caption=True, caption_tag_dropout_rate=0.9, caption_dropout_rate=1.0, enable_wildcard=True)
    assert undropped_caption(subset, "b, a, {x|y}\nother", 1) == "b, a, x"


def test_longest_captions_are_at_least_as_long_as_every_draw() -> None:
    subset = _subset(
        caption_prefix="the", shuffle_caption=True, enable_wildcard=True, secondary_separator=";", token_warmup_step=3
    )
    raw = "{a|bb|cccc} {{x}}, y;z\nsecond, line of {d|ee}"
    longest = longest_captions(subset, raw)
    assert longest == ["the cccc {x}, y,z", "the second, line of ee"]
    assert max(map(len, _draws(subset, raw))) == max(map(len, longest))
    assert longest_captions(_subset(), "a {x|yy}") == ["a {x|yy}"]
