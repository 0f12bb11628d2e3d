"""Tests of cache keys: everything that determines the result is part of the key, and nothing else."""

from __future__ import annotations

import msgspec
import pytest

from ryzen_compile.builder import cache_keys
from ryzen_compile.builder.default_pipelines import pipeline_for
from ryzen_compile.builder.sources import GraphSummary, SourceGraph
from ryzen_compile.spec.interface import InputSpec, Interface
from ryzen_compile.spec.legalization_pass import GraphContents
from ryzen_compile.spec.profile import Profile


def test_a_computed_and_a_cached_summary_have_the_same_key() -> None:
    spec = InputSpec(name="mask", dtype="int64", dims=("batch",), role="mask", padding_value=0, low=0, high=1)
    computed = GraphSummary(
        fingerprint="f",
        interface=Interface(inputs=(spec,), outputs=()),
        half_precision=None,
        contents=GraphContents(),
        node_names_digest="n",
        metadata_digest="m",
    )
    cached = msgspec.json.decode(msgspec.json.encode(computed), type=GraphSummary)
    assert msgspec.json.encode(computed) != msgspec.json.encode(cached)
    keys = [
        cache_keys.package_key(
            [SourceGraph(name="model", path="m.onnx", summary=summary)],
            {"model": []},
            {"model": ()},
            [],
            [],
            {},
            samples_digest="",
            comparison=None,
        )
        for summary in (computed, cached)
    ]
    assert keys[0].cache_key.parts == keys[1].cache_key.parts
    assert keys[0].cache_key.digest == keys[1].cache_key.digest


def key_digest(profiles: tuple[Profile, ...] = (), *, names: str = "n", passes: str = "fold") -> str:
    summary = GraphSummary(
        fingerprint="f",
        interface=Interface(inputs=(), outputs=()),
        half_precision=None,
        contents=GraphContents(),
        node_names_digest=names,
        metadata_digest="m",
    )
    source = SourceGraph(name="model", path="m.onnx", summary=summary)
    pipeline = pipeline_for("tensorrt-rtx", passes=passes, precision=None, source_half_precision=None)
    key = cache_keys.package_key(
        [source], {"model": [pipeline]}, {"model": profiles}, [], [], {}, samples_digest="", comparison=None
    )
    return key.cache_key.digest


def test_the_shape_of_every_input_is_part_of_the_key() -> None:
    names = [f"a{index}" for index in range(12)]

    def profile(large: set[str]) -> tuple[Profile, ...]:
        smallest = dict.fromkeys(names, (1,))
        return (Profile(min=smallest, opt=smallest, max={name: (64,) if name in large else (8,) for name in names}),)

    odd_names = {f"a{index}" for index in range(1, 12, 2)}
    first, second = profile(odd_names), profile(odd_names - {"a5"} | {"a6"})
    assert str(first[0]) == str(second[0]), "only the abbreviated text is the same"
    assert key_digest(first) != key_digest(second)


@pytest.mark.parametrize(
    ("passes", "same"),
    [
        ("fold", True),
        ("fold,precision{to=fp16}", True),
        ("precision{to=fp16,keep=[foo]}", False),
        ("precision{to=fp16,force=[foo]}", False),
    ],
)
def test_node_names_are_part_of_the_key_if_a_pass_selects_nodes_by_name(passes: str, same: bool) -> None:
    assert (key_digest(names="1", passes=passes) == key_digest(names="2", passes=passes)) == same
