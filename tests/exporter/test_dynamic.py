"""The spelling of dynamic dimensions."""

from __future__ import annotations

import pytest

from ryzen_compile.errors import UsageError
from ryzen_compile.exporter import parse_dynamic
from ryzen_compile.exporter.dynamic_shapes import check_dynamic


def test_axes_are_named_by_input() -> None:
    assert parse_dynamic(["ids:0=batch,1=seq", "scope/x:0:2= past + seq "]) == {
        "ids": {0: "batch", 1: "seq"},
        "scope/x:0": {2: "past+seq"},
    }


@pytest.mark.parametrize("text", ["ids", "ids:", ":0=a", "ids:0", "ids:a=0", "ids:-1=a", "ids:0=", "ids:0=1", "ids:0=a,"])
def test_what_cannot_be_read_is_refused_with_the_spelling(text: str) -> None:
    with pytest.raises(UsageError, match="write INPUT:0=batch,1=seq"):
        parse_dynamic([text])


def test_an_axis_has_one_name() -> None:
    with pytest.raises(UsageError, match="axis 0 is named twice"):
        parse_dynamic(["ids:0=a,0=b"])


def test_an_axis_beyond_the_rank_is_refused() -> None:
    with pytest.raises(UsageError, match="`ids` has 2 dimensions, and none with index 2"):
        check_dynamic({"ids": {2: "a"}}, {"ids": 2})
