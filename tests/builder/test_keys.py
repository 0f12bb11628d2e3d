from __future__ import annotations

import msgspec

from ryzen_compile.builder import keys
from ryzen_compile.builder.sources import Known, Source
from ryzen_compile.interface import InputSpec, Interface


def test_what_was_learnt_and_what_is_remembered_of_it_make_one_key() -> None:
    spec = InputSpec(name="mask", dtype="int64", dims=("batch",), role="mask", low=0, high=1)
    learnt = Known(fingerprint="f", interface=Interface(inputs=(spec,), outputs=()), half=None)
    remembered = msgspec.json.decode(msgspec.json.encode(learnt), type=Known)
    assert msgspec.json.encode(learnt) != msgspec.json.encode(remembered)
    found = [
        keys.of_package(
            [Source(name="model", path="m.onnx", known=known)],
            {"model": []},
            {"model": ()},
            [],
            [],
            {},
            samples="",
            comparison="",
        )
        for known in (learnt, remembered)
    ]
    assert found[0].parts == found[1].parts
    assert found[0].digest == found[1].digest
