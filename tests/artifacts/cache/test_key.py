"""Tests of cache keys."""

from __future__ import annotations

import itertools

from ryzen_compile.artifacts.cache.key import CacheKey, KeyDifference, key_differences


def test_digest_is_independent_of_the_order_of_the_parts() -> None:
    parts = {"graph": "a", "passes": "b", "targets": "c"}
    digests = {CacheKey("engine", dict(order)).digest for order in itertools.permutations(parts.items())}
    assert len(digests) == 1
    assert len(digests.pop()) == 64


def test_digest_depends_on_the_kind_and_on_every_part_and_its_boundaries() -> None:
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
    digests = {CacheKey(kind, parts).digest for kind in ("engine", "package") for parts in keys}
    assert len(digests) == 2 * len(keys)


def test_differences_have_the_part_and_both_values() -> None:
    differences = key_differences(
        {"same": "1", "changed": "old", "removed": "x"}, {"added": "y", "same": "1", "changed": "new"}
    )
    assert differences == (
        KeyDifference(part="added", cached=None, current="y"),
        KeyDifference(part="changed", cached="old", current="new"),
        KeyDifference(part="removed", cached="x", current=None),
    )
    assert [str(difference) for difference in differences] == [
        "added: added: y",
        "changed: changed from old to new",
        "removed: removed: x",
    ]
