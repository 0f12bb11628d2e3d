"""Changes of a graph that were made one after the other."""

from __future__ import annotations

from ryzen_compile.spec.passes import Change


def test_the_combined_change_names_the_nodes_that_differ_at_the_end() -> None:
    first = Change(inserted=("a", "b"), removed=("old",), changed=("c", "d"), summary="first", notes=("n",), unmet_hint="hint")
    later = Change(inserted=("e",), removed=("b", "c"), changed=("d",), summary="later", notes=("m",), warnings=("w",))
    assert first.then(later) == Change(
        inserted=("a", "e"),
        removed=("old", "c"),
        changed=("d",),
        summary="first; later",
        notes=("n", "m"),
        warnings=("w",),
        unmet_hint="hint",
    )


def test_a_change_that_did_nothing_has_no_part_in_the_summary() -> None:
    nothing, something = Change(summary="no layer matches"), Change(changed=("a",), summary="1 layer")
    assert nothing.then(something).summary == something.then(nothing).summary == "1 layer"
    assert nothing.then(Change(summary="no mask either")).summary == "no mask either"
