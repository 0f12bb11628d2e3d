"""Tests of text reports."""

from __future__ import annotations

import pytest

from ryzen_compile.report.text import format_pass_estimate
from ryzen_compile.spec.passes import PassEstimate


@pytest.mark.parametrize(
    ("estimate", "expected"),
    [
        (PassEstimate(), "no change in nodes or bytes expected"),
        (PassEstimate(reason="0 softmaxes"), "no change in nodes or bytes expected (0 softmaxes)"),
        (PassEstimate(nodes=-3, reason="counted on a folded copy"), "-3 nodes, counted on a folded copy"),
        (PassEstimate(weight_bytes=-514), "-514 B of weights"),
        (PassEstimate(weight_bytes=-10_000_000, state_bytes=2_500), "-10.0 MB of weights, +2.5 kB of states"),
    ],
)
def test_an_estimate_shows_every_effect_with_its_sign_and_unit(estimate: PassEstimate, expected: str) -> None:
    assert format_pass_estimate(estimate) == expected
