"""Tests of the parsing of dynamic dimensions."""

from __future__ import annotations

import pytest

from ryzen_compile.errors import UsageError
from ryzen_compile.exporter import parse_dynamic
from ryzen_compile.exporter.dynamic_shapes import check_dynamic


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


def test_axis_beyond_the_rank_is_refused() -> None:
    with pytest.raises(UsageError, match="axis 2 of input `ids` does not exist: the input has 2 dimensions"):
        check_dynamic({"ids": {2: "a"}}, {"ids": 2})
