"""Criteria of an evaluation: parsing, validation and application."""

from __future__ import annotations

import pytest

from ryzen_compile.artifacts.package.manifest import Estimate, MetricResult
from ryzen_compile.errors import UsageError
from ryzen_compile.evaluation.requirements import apply_requirements, check_requirements, parse_requirements


def make_result(name: str, candidate: float, baseline: float | None = None, group: str = "") -> MetricResult:
    estimate = None if baseline is None else Estimate(value=baseline)
    return MetricResult(name=name, group=group, count=1, baseline=estimate, method=None, candidate=Estimate(value=candidate))


@pytest.mark.parametrize(
    ("text", "candidate", "baseline", "met"),
    [
        ("perplexity<=1.01x", 2.02, 2.0, True),
        ("perplexity<=1.01x", 2.03, 2.0, False),
        ("perplexity <= 2.5", 2.4, 1.0, True),
        ("needle>=0.99x", 0.95, 0.96, False),
        ("needle>=0.99x", 0.95, 0.95, True),
        ("needle>=0.9", 0.89, 0.0, False),
        ("needle>=0.9", 0.9, 1.0, True),
        ("needle>=0.99x", 0.0, 0.0, False),
        ("repetition<=2x", 0.0, 0.0, True),
        ("kl<=2e-2", 0.02, None, True),
        ("rewrite-max-abs<=1e-3", 0.01, None, False),
    ],
)
def test_a_bound_is_a_number_or_a_multiple_of_the_value_of_the_baseline(
    text: str, candidate: float, baseline: float | None, met: bool
) -> None:
    name = text.replace(">", "<").partition("<")[0].strip()
    (result,) = apply_requirements([make_result(name, candidate, baseline)], parse_requirements([text]))
    assert result.met is met
    assert (result.required or "").replace(" ", "") in text.replace(" ", "").replace("2e-2", "0.02").replace("1e-3", "0.001")


def test_all_criteria_of_a_metric_apply_and_groups_are_only_reported() -> None:
    total, group, other = apply_requirements(
        [make_result("needle", 0.9, 1.0), make_result("needle", 0.1, 1.0, group="depth 0.0 to 0.2"), make_result("kl", 9.0)],
        parse_requirements(["needle>=0.8", "needle<=0.85"]),
    )
    assert (total.required, total.met) == (">= 0.8, <= 0.85", False)
    assert (group.required, group.met, other.required, other.met) == (None, True, None, True)


@pytest.mark.parametrize("text", ["needle", "needle=1", "needle>=", "needle>=abc", "needle>=nan", ">=1", "needle>=1y", "<=inf"])
def test_an_invalid_requirement_is_rejected(text: str) -> None:
    with pytest.raises(UsageError, match="is not a requirement"):
        parse_requirements(["kl<=1", text])


def test_unknown_metrics_and_multiples_of_metrics_without_a_baseline_are_rejected() -> None:
    with pytest.raises(UsageError, match="`perplexty` is not measured here") as caught:
        check_requirements(parse_requirements(["perplexty<=1"]), metric_names=["perplexity", "kl"], comparison_metrics=["kl"])
    assert "did you mean `perplexity`" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="the baseline has no value for it"):
        check_requirements(parse_requirements(["kl<=1x"]), metric_names=["perplexity", "kl"], comparison_metrics=["kl"])
    check_requirements(
        parse_requirements(["kl<=1", "perplexity<=1x"]), metric_names=["perplexity", "kl"], comparison_metrics=["kl"]
    )
