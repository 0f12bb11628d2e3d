"""Tests of the pass list parser: `parse` is the inverse of `str(pass)`."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ryzen_compile import registry
from ryzen_compile.errors import UsageError
from ryzen_compile.pipeline.parser import _parse_value, parse
from ryzen_compile.spec.passes import Change, Pass, PassContext, PassEstimate

REQUIRED_OPTIONS = {
    "precision": "precision{to=bf16}",
    "kv-static": "kv-static{capacity=64}",
    "kv-window": "kv-window{window=16}",
    "kv-select": "kv-select{selected-pages=4}",
}
"""Pass specs of the passes that have options without a default."""


@pytest.mark.parametrize("name", registry.names("passes"))
def test_every_pass_is_parsed_from_its_spec(name: str) -> None:
    text = REQUIRED_OPTIONS.get(name, name)
    assert [type(pass_) for pass_ in parse(text)] == [registry.find_pass(name)]
    (pass_,) = parse(text)
    assert parse(str(pass_)) == (pass_,)
    assert dataclasses.is_dataclass(pass_)
    assert registry.find_pass(name).__doc__


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Pass):
    """A pass with an option of each type."""

    name: ClassVar[str] = "options"
    word: str = ""
    on: bool = False
    ratio: float = 0.0
    words: tuple[str, ...] = ()

    def estimate(self, model: object, context: PassContext) -> PassEstimate:
        return PassEstimate()

    def rewrite(self, model: object, context: PassContext) -> Change:
        return Change()


@given(st.text(max_size=12), st.lists(st.text(min_size=1, max_size=6), max_size=3).map(tuple))
def test_any_string_option_survives_a_round_trip(word: str, words: tuple[str, ...]) -> None:
    from ryzen_compile.pipeline.parser import _split

    text = str(Options(word=word, words=words, on=True, ratio=0.25))
    assert text.startswith("options{")
    options = dict(part.split("=", 1) for part in _split(text[len("options{") : -1], text))
    assert _parse_value(options["on"], text) == "true"
    assert _parse_value(options.get("word", '""'), text) == word
    assert tuple(_parse_value(options.get("words", "[]"), text)) == words


def test_a_single_value_is_a_list_of_one() -> None:
    assert parse("kv-quant{protect=first}") == parse("kv-quant{protect=[first]}")
    assert parse("precision{to=fp16,keep=Exp}") == parse("precision{to=fp16,keep=[Exp]}")
    with pytest.raises(UsageError, match="protect"):
        parse("kv-quant{protect=}")


def test_options_with_their_default_value_are_omitted() -> None:
    assert str(Options()) == "options"
    assert str(Options(ratio=0.5)) == "options{ratio=0.5}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fodl", "no pass `fodl`"),
        ("fold{", "not closed|missing"),
        ("fold}", "closes no bracket"),
        ("fold,,fold", "nothing between two commas"),
        ("fold{color=red}", "no option `color`"),
        ('fold{"a', "quote is not closed"),
        ("precision{to=fp61}", r"`to` is one of fp16, bf16, fp32 \(got fp61\)"),
    ],
)
def test_a_spec_that_cannot_be_parsed_is_named(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(text)


@pytest.mark.parametrize("text", sorted(REQUIRED_OPTIONS.values()))
def test_a_missing_option_without_a_default_is_named(text: str) -> None:
    name, _, options = text.partition("{")
    option = options.partition("=")[0]
    with pytest.raises(UsageError, match=f"`{name}`: the option `{option}` of `{name}` is required") as caught:
        parse(name)
    assert f"{name}{{{option}=...}}" in str(caught.value.hint)


def test_an_empty_text_is_an_empty_pipeline() -> None:
    assert parse("") == ()
