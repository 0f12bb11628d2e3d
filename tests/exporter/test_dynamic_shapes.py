"""Tests of the parsing of dynamic dimensions."""

from __future__ import annotations

import pytest

from ryzen_compile.errors import UsageError
from ryzen_compile.exporter import parse_dynamic
from ryzen_compile.exporter.dynamic_shapes import SizeRange, check_dynamic, expand_patterns, split_ranges


def test_axes_are_parsed_by_input() -> None:
    assert parse_dynamic(["ids:0=batch,1=seq", "scope/x:0:2= past + seq "]) == {
        "ids": {0: "batch", 1: "seq"},
        "scope/x:0": {2: "past+seq"},
    }


@pytest.mark.parametrize("text", ["ids", "ids:", ":0=a", "ids:0", "ids:a=0", "ids:-1=a", "ids:0=", "ids:0=1", "ids:0=a,"])
def test_invalid_syntax_is_refused_with_the_valid_syntax(text: str) -> None:
    with pytest.raises(UsageError, match="write INPUT:0=batch,1=seq"):
        parse_dynamic([text])


def test_axis_with_two_names_is_refused() -> None:
    with pytest.raises(UsageError, match="axis 0 is named twice"):
        parse_dynamic(["ids:0=a,0=b"])


def test_pattern_stands_for_all_inputs_that_it_matches() -> None:
    names = ["ids", "past.0", "past.1", "pas?"]
    dynamic = {"past.1": {0: "n"}, "past.*": {0: "batch", 2: "past"}, "pas?": {1: "m"}}
    assert expand_patterns(dynamic, names) == {
        "past.0": {0: "batch", 2: "past"},
        "past.1": {0: "n"},
        "pas?": {1: "m"},
    }
    with pytest.raises(UsageError, match=r"no input matches `key\*`"):
        expand_patterns({"key*": {0: "n"}}, names)


def test_axis_beyond_the_rank_is_refused() -> None:
    with pytest.raises(UsageError, match="axis 2 of input `ids` does not exist: the input has 2 dimensions"):
        check_dynamic({"ids": {2: "a"}}, {"ids": 2})


def test_axes_have_ranges_of_sizes() -> None:
    axes, ranges = split_ranges(parse_dynamic(["wave:0=batch,1=time:400..16000", "mask:1=time", "x:0=n:2..", "y:0=m: ..8"]))
    assert axes == {"wave": {0: "batch", 1: "time"}, "mask": {1: "time"}, "x": {0: "n"}, "y": {0: "m"}}
    assert ranges == {"time": SizeRange(400, 16000), "n": SizeRange(2, None), "m": SizeRange(None, 8)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x:0=n:5", "is not NAME or NAME:LOW..HIGH"),
        ("x:0=n:", "is not NAME or NAME:LOW..HIGH"),
        ("x:0=n:-1..4", "is not NAME or NAME:LOW..HIGH"),
        ("x:0=n:5..4", "the range is empty"),
        ("x:0=n+m:1..4", "a sum has no range of its own"),
    ],
)
def test_invalid_ranges_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_dynamic([text])


def test_two_ranges_of_one_dimension_are_refused() -> None:
    with pytest.raises(UsageError, match=r"dimension `n` has two ranges: 1..4 and 1..5"):
        split_ranges({"x": {0: "n:1..4"}, "y": {0: "n:1..5"}})
