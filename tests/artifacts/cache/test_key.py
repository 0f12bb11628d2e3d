from __future__ import annotations

import itertools

from ryzen_compile.artifacts.cache.key import CacheKey, KeyDifference, key_differences


def test_the_digest_does_not_depend_on_the_order_of_the_parts() -> None:
    parts = {"graph": "a", "passes": "b", "targets": "c"}
    digests = {CacheKey(dict(order)).digest for order in itertools.permutations(parts.items())}
    assert len(digests) == 1
    assert len(digests.pop()) == 64


def test_the_digest_depends_on_every_part_and_on_where_it_ends() -> None:
    keys = [
        {},
        {"a": ""},
        {"": "a"},
        {"a": "b"},
        {"ab": ""},
        {"a": "b", "c": "d"},
        {"a": 'b","c","d'},
        {"a": "bcd"},
        {"a": "B"},
    ]
    assert len({CacheKey(parts).digest for parts in keys}) == len(keys)


def test_differences_name_the_part_and_both_values() -> None:
    found = key_differences({"same": "1", "other": "old", "gone": "x"}, {"new": "y", "same": "1", "other": "now"})
    assert found == (
        KeyDifference(part="new", cached=None, current="y"),
        KeyDifference(part="other", cached="old", current="now"),
        KeyDifference(part="gone", cached="x", current=None),
    )
    assert [str(difference) for difference in found] == ["new: is new: y", "other: was old, is now", "gone: has gone: x"]
