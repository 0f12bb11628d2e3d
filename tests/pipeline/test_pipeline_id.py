"""The pipeline id: different pipelines have different ids, which every file system accepts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support import fake_passes

from ryzen_compile.artifacts.package import layout
from ryzen_compile.pipeline.parser import parse
from ryzen_compile.pipeline.pipeline_id import MAX_ID_LENGTH, SOURCE_ID, pipeline_fingerprint, pipeline_id
from ryzen_compile.spec.passes import Pass


@dataclass(frozen=True, kw_only=True)
class Configurable(fake_passes.AbsToRelu):
    """A pass with options of every kind whose names are beginnings of each other."""

    name: ClassVar[str] = "configurable"

    to: str = "x"
    to_x: str = ""
    ratio: float = 0.5
    count: int = 0
    flag: bool = False
    items: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PassCalledSource(fake_passes.AbsToRelu):
    """A pass whose name is the id of the empty pipeline."""

    name: ClassVar[str] = "source"


TEXTS = st.one_of(st.text(max_size=12), st.text(alphabet="aAxX01_.-+~@,=", max_size=12))
PASSES: st.SearchStrategy[Pass] = st.one_of(
    st.builds(PassCalledSource),
    st.builds(fake_passes.AbsToRelu),
    st.builds(
        Configurable,
        to=TEXTS,
        to_x=TEXTS,
        ratio=st.floats(allow_nan=False),
        count=st.integers(),
        flag=st.booleans(),
        items=st.lists(TEXTS, max_size=3).map(tuple),
    ),
    st.builds(Configurable, to=TEXTS),
    st.builds(Configurable, ratio=st.floats(0, 1, width=16), count=st.integers(0, 99)),
)
PIPELINES = st.lists(PASSES, max_size=4)


@pytest.mark.parametrize(
    ("passes", "expected"),
    [
        ("none", "source"),
        ("fold", "fold"),
        ("fold,attention,precision{to=fp16}", "fold+attention+precision.to-fp16"),
        ("precision{to=bf16,io=true,range-margin=8}", "precision.to-bf16.io-true.range-margin-8.0"),
        ("fold,fold", "fold+fold"),
    ],
)
def test_an_id_spells_the_passes_and_the_options_that_differ_from_their_defaults(passes: str, expected: str) -> None:
    assert pipeline_id(parse(passes)) == expected


@pytest.mark.parametrize(
    ("passes", "beginning"),
    [
        ("precision{to=fp16,keep=[/enc/*,Conv]}", "precision.to-fp16.keep-enc_conv~"),
        ("kv-evict{budget=25%}", "kv-evict.budget-25pct~"),
        ("precision{to=fp16,keep=[A]}", "precision.to-fp16.keep-a~"),
    ],
)
def test_an_id_that_does_not_spell_the_pipeline_exactly_ends_with_a_digest(passes: str, beginning: str) -> None:
    assert re.fullmatch(re.escape(beginning) + "[0-9a-f]{12}", pipeline_id(parse(passes)))


@given(PIPELINES)
def test_an_id_is_a_file_name_of_bounded_length_on_every_file_system(passes: list[Pass]) -> None:
    name = pipeline_id(passes)
    assert re.fullmatch(r"[a-z0-9][a-z0-9+._~-]*[a-z0-9_]", name)
    assert len(name) <= MAX_ID_LENGTH
    assert layout.invalid_path_reason(layout.graph_path("g" * 64, name, "b" * 32)) is None
    assert layout.invalid_path_reason(layout.engine_path("g" * 64, name, "b" * 32, ("sm89@windows",) * 40)) is None


@given(PIPELINES, PIPELINES)
def test_different_pipelines_have_different_ids(one: list[Pass], other: list[Pass]) -> None:
    assume(pipeline_fingerprint(one) != pipeline_fingerprint(other))
    assert pipeline_id(one) != pipeline_id(other)


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=2, max_size=8, unique=True))
def test_ids_of_similar_values_differ(values: list[tuple[str, str]]) -> None:
    pipelines = {pipeline_fingerprint(passes): pipeline_id(passes) for passes in map(with_values, values)}
    assert len(set(pipelines.values())) == len(pipelines)


def with_values(values: tuple[str, str]) -> list[Pass]:
    return [Configurable(to=values[0], to_x=values[1])]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Configurable(to="x-1"), Configurable(to_x="1")),
        (Configurable(to="a.count-1"), Configurable(to="a", count=1)),
        (Configurable(to="a+configurable"), Configurable(to="a")),
        (Configurable(to="A"), Configurable(to="a")),
        (Configurable(items=("a", "b")), Configurable(items=("a_b",))),
        (Configurable(to="a" * 100), Configurable(to="a" * 101)),
        (Configurable(to="a/b"), Configurable(to="a-b")),
    ],
)
def test_values_that_read_alike_have_different_ids(one: Pass, other: Pass) -> None:
    assert pipeline_id([one]).casefold() != pipeline_id([other]).casefold()


def test_the_id_of_the_empty_pipeline_is_not_that_of_a_pass() -> None:
    assert pipeline_id([]) == SOURCE_ID
    assert pipeline_id([PassCalledSource()]).startswith(f"{SOURCE_ID}~")


def test_a_file_is_identified_by_its_content(tmp_path: Path) -> None:
    def name_of(file: str, content: bytes) -> str:
        (tmp_path / file).write_bytes(content)
        return pipeline_id([Configurable(to=str(tmp_path / file))])

    assert name_of("a.json", b"1") == name_of("b.json", b"1")
    assert name_of("a.json", b"1") != name_of("a.json", b"2")
    assert "json" not in name_of("a.json", b"1")


def test_a_value_of_a_fixed_set_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = parse("precision{to=fp16}")
    monkeypatch.chdir(tmp_path)
    Path("fp16").write_bytes(b"1")
    assert pipeline_id(passes) == "precision.to-fp16"
    assert pipeline_fingerprint(passes) == "precision{to=fp16}"
