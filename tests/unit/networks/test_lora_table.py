import re

import pytest

from library.errors import NetworkError
from networks.lora_lumina_args import GEMMA2, LINEAR_KINDS, LUMINA
from networks.lora_table import Component, Table, assign


def table(*components):
    return Table("the model", "lora_unet", ("b", "a"), components)


def test_sections_decide_the_order_and_model_order_within():
    rows = table(Component("all", r"[ab]\.\d\.[xy]"))
    found = assign(rows, ["a.0.y", "a.0.x", "b.1.x", "b.0.x"], {}, 4)
    assert [one.path for one in found] == ["b.1.x", "b.0.x", "a.0.y", "a.0.x"]
    assert found[0].lora_name == "lora_unet_b_1_x"


@pytest.mark.parametrize(
    ("components", "message"),
    [
        ([Component("one", r"a\.0")], "'a.1' belongs to no component"),
        ([Component("one", r"a\.\d"), Component("two", r"a\.1")], "'a.1' belongs to one and two"),
    ],
)
def test_a_linear_of_no_or_two_rows_is_an_error_that_names_it(components, message):
    with pytest.raises(NetworkError, match=re.escape(message)):
        assign(table(*components), ["a.0", "a.1"], {}, 4)


def test_two_linears_of_one_name_are_an_error():
    with pytest.raises(NetworkError, match=r"'a\.x_0' and 'a\.x\.0' would both be named 'lora_unet_a_x_0'"):
        assign(table(Component("all", r"a\.x[._]0")), ["a.x_0", "a.x.0"], {}, 4)


def test_the_first_given_rank_argument_wins_and_zero_leaves_out():
    rows = table(Component("narrow", "a.0", ("narrow_dim", "wide_dim")), Component("wide", "a.1", ("wide_dim",)))
    assert [one.rank for one in assign(rows, ["a.0", "a.1"], {"wide_dim": 3, "narrow_dim": 2}, 4)] == [2, 3]
    assert [one.path for one in assign(rows, ["a.0", "a.1"], {"wide_dim": 3, "narrow_dim": 0}, 4)] == ["a.1"]
    assert [one.rank for one in assign(rows, ["a.0", "a.1"], {}, 4)] == [4, 4]


def test_a_rank_that_reaches_nothing_is_an_error_that_says_why():
    rows = table(Component("one", "a.0", ("narrow_dim", "wide_dim")))
    with pytest.raises(NetworkError, match=r"wide_dim=3 reaches no module, because narrow_dim takes precedence"):
        assign(rows, ["a.0"], {"wide_dim": 3, "narrow_dim": 2}, 4)
    with pytest.raises(NetworkError, match=r"wide_dim=3 reaches no module, because train_blocks leaves only b"):
        assign(rows, ["a.0"], {"wide_dim": 3}, 4, blocks=("b",))


def test_rows_that_are_off_by_default_need_their_argument_and_ignore_blocks():
    rows = table(Component("extra", "a.0", ("extra_dim",), on_by_default=False), Component("rest", "b.0"))
    assert [one.path for one in assign(rows, ["a.0", "b.0"], {}, 4)] == ["b.0"]
    assert [one.path for one in assign(rows, ["a.0", "b.0"], {"extra_dim": 2}, 4, blocks=("b",))] == ["b.0", "a.0"]


NUMBERED = ["b.0.x", "b.1.x", "a.0.x", "a.1.x", "a.2.x", "a.extra"]


def test_numbers_choose_among_the_blocks_of_their_section_alone():
    rows = table(Component("all", r"[ab]\.\d\.x"), Component("extra", r"a\.extra", ("extra_dim",), on_by_default=False))
    found = [one.path for one in assign(rows, NUMBERED, {"extra_dim": 2}, 4, numbers={"a": {0, 2}})]
    assert found == ["b.0.x", "b.1.x", "a.0.x", "a.2.x", "a.extra"]
    found = [one.path for one in assign(rows, NUMBERED, {}, 4, blocks=("a",), numbers={"a": {1}})]
    assert found == ["a.1.x"]


def test_a_number_that_no_block_has_is_an_error():
    rows = table(Component("all", r"[ab]\.\d\.x"), Component("extra", r"a\.extra", on_by_default=False))
    with pytest.raises(NetworkError, match=r"3 blocks in a, counted from 0, and so none of the number 3"):
        assign(rows, NUMBERED, {}, 4, numbers={"a": {1, 3}})


def test_every_row_of_the_lumina_table_is_reached_by_the_linear_kinds():
    reached = {LUMINA.component_of(path).name for path in LINEAR_KINDS}
    assert reached == {row.name for row in LUMINA.components}


def test_component_names_are_unique():
    for rows in (LUMINA, GEMMA2):
        assert len({row.name for row in rows.components}) == len(rows.components)
