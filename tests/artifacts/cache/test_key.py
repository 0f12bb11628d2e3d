from __future__ import annotations

import itertools

from ryzen_compile.artifacts.cache.key import Difference, Key, differences


def test_the_digest_does_not_depend_on_the_order_of_the_parts() -> None:
    parts = {"graph": "a", "passes": "b", "targets": "c"}
    digests = {Key(dict(order)).digest for order in itertools.permutations(parts.items())}
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
    assert len({Key(parts).digest for parts in keys}) == len(keys)


def test_differences_name_the_part_and_both_values() -> None:
    found = differences({"same": "1", "other": "old", "gone": "x"}, {"new": "y", "same": "1", "other": "now"})
    assert found == (
        Difference(part="new", was=None, now="y"),
        Difference(part="other", was="old", now="now"),
        Difference(part="gone", was="x", now=None),
    )
    assert [str(difference) for difference in found] == ["new: is new: y", "other: was old, is now", "gone: has gone: x"]
