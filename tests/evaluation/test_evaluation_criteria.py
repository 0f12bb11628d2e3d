"""Criteria of an evaluation: what is read, what is refused, and what is met."""

from __future__ import annotations

import pytest

from ryzen_compile.artifacts.package.manifest import Estimate, MetricResult
from ryzen_compile.errors import UsageError
from ryzen_compile.evaluation.criteria import apply_requirements, check_requirements, parse_requirements


def found(name: str, subject: float, baseline: float | None = None, part: str = "") -> MetricResult:
    figure = None if baseline is None else Estimate(value=baseline)
    return MetricResult(name=name, group=part, count=1, baseline=figure, method=None, candidate=Estimate(value=subject))


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
def test_a_criterion_is_a_number_or_a_multiple_of_the_baselines(
    text: str, subject: float, baseline: float | None, met: bool
) -> None:
    name = text.replace(">", "<").partition("<")[0].strip()
    (one,) = apply_requirements([found(name, subject, baseline)], parse_requirements([text]))
    assert one.met is met
    assert (one.required or "").replace(" ", "") in text.replace(" ", "").replace("2e-2", "0.02").replace("1e-3", "0.001")


def test_all_that_is_required_of_a_measure_counts_and_parts_are_told() -> None:
    whole, part, other = apply_requirements(
        [found("needle", 0.9, 1.0), found("needle", 0.1, 1.0, part="depth 0.0 to 0.2"), found("kl", 9.0)],
        parse_requirements(["needle>=0.8", "needle<=0.85"]),
    )
    assert (whole.required, whole.met) == (">= 0.8, <= 0.85", False)
    assert (part.required, part.met, other.required, other.met) == (None, True, None, True)


@pytest.mark.parametrize("text", ["needle", "needle=1", "needle>=", "needle>=abc", "needle>=nan", ">=1", "needle>=1y", "<=inf"])
def test_what_is_no_criterion_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no criterion"):
        parse_requirements(["kl<=1", text])


def test_measures_that_are_not_there_are_refused_and_multiples_of_what_has_no_baseline() -> None:
    with pytest.raises(UsageError, match="`perplexty` is not measured here") as error:
        check_requirements(parse_requirements(["perplexty<=1"]), metric_names=["perplexity", "kl"], comparison_metrics=["kl"])
    assert "did you mean `perplexity`" in (error.value.hint or "")
    with pytest.raises(UsageError, match="has no such figure"):
        check_requirements(parse_requirements(["kl<=1x"]), metric_names=["perplexity", "kl"], comparison_metrics=["kl"])
    check_requirements(
        parse_requirements(["kl<=1", "perplexity<=1x"]), metric_names=["perplexity", "kl"], comparison_metrics=["kl"]
    )
