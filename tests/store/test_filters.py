import ast
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmh_milvus.errors import SettingsError
from cmh_milvus.store.filters import all_of, fill, literal

one_line = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"))
# What an attacker would write, between anything else.
hostile = st.lists(
    st.sampled_from(['"', "'", "\\", "{x}", "}", "(", "]", " or 1 == 1", '" or pk != "', "\\\\", "é漢🍎", "\t"])
    | one_line
).map("".join)


def strings_of(expression):
    """The string literals of an expression by a scanner of its own, and the rest with each of them as S."""
    rest, strings, i = "", [], 0
    while i < len(expression):
        if expression[i] != '"':
            rest += expression[i]
            i += 1
            continue
        value, i = "", i + 1
        while expression[i] != '"':
            i += expression[i] == "\\"
            value += expression[i]
            i += 1
        strings.append(value)
        rest, i = rest + "S", i + 1
    return rest, strings


@given(hostile, hostile)
def test_a_value_stays_one_literal(a, b):
    filled = fill("caption == {a} or (split in [{b}] and n < {n})", {"a": a, "b": b, "n": 3})
    assert strings_of(filled) == ("caption == S or (split in [S] and n < 3)", [a, b])


@given(hostile)
def test_a_filled_expression_is_sound_and_final(value):
    filled = fill("caption == {a}", {"a": value})
    assert fill(filled) == filled


@given(st.one_of(st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False), st.booleans()))
def test_numbers_round_trip(value):
    text = literal(value)
    assert {"true": True, "false": False}[text] if isinstance(value, bool) and value else True
    if not isinstance(value, bool):
        assert ast.literal_eval(text) == value


def test_numpy_scalars_are_what_they_hold():
    values = [np.float64(1.5), np.float32(0.25), np.int64(-3), np.uint8(7), np.bool_(True), np.str_('a"')]
    assert literal(values) == '[1.5, 0.25, -3, 7, true, "a\\""]'
    assert [literal(value) for value in values[:3]] == ["1.5", "0.25", "-3"]
    for value in (np.float64("nan"), np.uint64(2**63), np.datetime64("2020-01-01"), np.zeros(2)):
        with pytest.raises(SettingsError):
            literal(value)


def test_lists():
    assert literal(["a", 'b"']) == '["a", "b\\""]'
    assert literal((1, 2.5, True)) == "[1, 2.5, true]"


@pytest.mark.parametrize(
    "value", [None, "a\nb", "a\rb", "\ud800", math.nan, math.inf, 2**63, [], [[1]], {"a": 1}, b"a", object()]
)
def test_values_without_a_literal_are_refused(value):
    with pytest.raises(SettingsError):
        literal(value)


@pytest.mark.parametrize(
    ("expression", "params", "said"),
    [
        ("split == {s}", {}, "without a value"),
        ("split == {s}", None, "without a value"),
        ("n == 1", {"s": 1}, "no placeholder for s"),
        ('split == "{s}"', {"s": 1}, "without quotes"),
        ('split == "open', {}, "close each string"),
        ("split == 'open", {}, "close each string"),
        ("n == 1) or (n == 2", {}, "closes nothing"),
        ("(n in [1, 2)", {}, "closes nothing"),
        ("(n == 1", {}, "never closed"),
        ("n == {1}", {}, "opens or closes nothing"),
        ("n == {x", {"x": 1}, "opens or closes nothing"),
    ],
)
def test_malformed_expressions_are_refused(expression, params, said):
    with pytest.raises(SettingsError, match=said):
        fill(expression, params)


def test_braces_and_brackets_within_strings_are_text():
    expression = """caption == "a {x} ( \\" ]" and uri == '{y}'"""
    assert fill(expression) == expression


def test_conjunction():
    assert all_of("", " ") == ""
    assert all_of("", "a or b") == "a or b"
    assert all_of("a or b", "c") == "(a or b) and (c)"
