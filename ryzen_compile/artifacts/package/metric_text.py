"""Texts of the metrics of a comparison: one value, and the worst value of each metric over all outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ryzen_compile.artifacts.package.manifest import MetricRecord


def format_value(metric: MetricRecord) -> str:
    """Return the worst value of a metric, with the digits that distinguish it from the best one."""
    return f"{metric.worst:.7g}" if "cosine" in metric.name else f"{metric.worst:.3g}"


def format_worst(metrics: Iterable[MetricRecord]) -> str:
    """Return `worst max_abs 1e-06 (<= 0.001), cosine ...`: the worst value of each metric over all outputs.

    Metrics without a criterion and those of rows of a batch are left out. Empty if no metric is left.
    """
    worst: dict[str, MetricRecord] = {}
    for metric in metrics:
        if metric.required is None or metric.name.startswith("batch_invariance"):
            continue
        previous = worst.setdefault(metric.name, metric)
        is_minimum = metric.required.startswith(">")
        if (metric.worst < previous.worst) if is_minimum else (metric.worst > previous.worst):
            worst[metric.name] = metric
    values = [f"{name} {format_value(metric)} ({metric.required})" for name, metric in worst.items()]
    return f"worst {', '.join(values)}" if values else ""
