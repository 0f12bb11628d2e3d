from __future__ import annotations

import msgspec
import pytest

from ryzen_compile.builder import cache_keys
from ryzen_compile.builder.default_pipelines import pipeline_for
from ryzen_compile.builder.sources import GraphSummary, SourceGraph
from ryzen_compile.spec.interface import InputSpec, Interface
from ryzen_compile.spec.profile import Profile


def test_what_was_learnt_and_what_is_remembered_of_it_make_one_key() -> None:
    spec = InputSpec(name="mask", dtype="int64", dims=("batch",), role="mask", low=0, high=1)
    learnt = GraphSummary(
        fingerprint="f", interface=Interface(inputs=(spec,), outputs=()), half_precision=None, node_names_digest="n"
    )
    remembered = msgspec.json.decode(msgspec.json.encode(learnt), type=GraphSummary)
    assert msgspec.json.encode(learnt) != msgspec.json.encode(remembered)
    found = [
        cache_keys.package_key(
            [SourceGraph(name="model", path="m.onnx", summary=known)],
            {"model": []},
            {"model": ()},
            [],
            [],
            {},
            samples_digest="",
            comparison="",
        )
        for known in (learnt, remembered)
    ]
    assert found[0].parts == found[1].parts
    assert found[0].digest == found[1].digest


def of_one(profiles: tuple[Profile, ...] = (), *, names: str = "n", passes: str = "fold") -> str:
    known = GraphSummary(
        fingerprint="f", interface=Interface(inputs=(), outputs=()), half_precision=None, node_names_digest=names
    )
    source = SourceGraph(name="model", path="m.onnx", summary=known)
    plan = pipeline_for("tensorrt-rtx", passes=passes, precision=None, source_half_precision=None)
    key = cache_keys.package_key([source], {"model": [plan]}, {"model": profiles}, [], [], {}, samples_digest="", comparison="")
    return key.digest


def test_shapes_of_many_inputs_are_part_of_the_key_one_by_one() -> None:
    names = [f"a{at}" for at in range(12)]

    def profile(large: set[str]) -> tuple[Profile, ...]:
        low = dict.fromkeys(names, (1,))
        return (Profile(min=low, opt=low, max={name: (64,) if name in large else (8,) for name in names}),)

    odd = {f"a{at}" for at in range(1, 12, 2)}
    one, other = profile(odd), profile(odd - {"a5"} | {"a6"})
    assert str(one[0]) == str(other[0]), "the words are the same, and only the words"
    assert of_one(one) != of_one(other)


@pytest.mark.parametrize(
    ("passes", "same"),
    [
        ("fold", True),
        ("fold,precision{to=fp16}", True),
        ("precision{to=fp16,keep=[foo]}", False),
        ("precision{to=fp16,force=[foo]}", False),
    ],
)
def test_the_names_of_nodes_are_part_of_the_key_where_a_pass_goes_by_them(passes: str, same: bool) -> None:
    assert (of_one(names="1", passes=passes) == of_one(names="2", passes=passes)) == same
