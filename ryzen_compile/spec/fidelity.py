"""Fidelity: what a pass declares about its effect on accuracy, and therefore how a build checks it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ryzen_compile.errors import UsageError

COMPARISON_METRICS = {"cosine": (-1.0, 1.0), "top1": (0.0, 1.0), "snr_db": (-math.inf, math.inf)}
"""Metrics with their range that a comparison of two graphs measures; a larger value is better for each.

cosine: smallest cosine similarity of a vector of an output with that of the source. top1: share of rows with the same argmax
as the source. snr_db: signal-to-noise ratio of an output in dB, -20 log10(||output - source|| / ||source||).
"""

EVALUATION_METRICS = {"perplexity_ratio": (0.0, math.inf)}
"""Metrics with their range that only `evaluate` measures, on text; a larger value is better for each.

perplexity_ratio: perplexity of the baseline divided by that of the rewritten decoder.
"""


@dataclass(frozen=True)
class Exact:
    """The pass changes no result beyond rounding: its output is checked by the numeric criteria of the model's precision."""

    def __str__(self) -> str:
        return "exact"


@dataclass(frozen=True)
class Tolerance:
    """The pass lowers the precision: its output is checked by the numeric criteria of that precision, as fp16 or bf16."""

    def __str__(self) -> str:
        return "within the numeric criteria"


@dataclass(frozen=True)
class Lossy:
    """The pass trades accuracy for size or speed: its output is checked by its own metric and floor, not by numeric criteria.

    Raises ValueError for an unknown metric and for a floor outside the metric's range.
    """

    metric: str
    """A key of `COMPARISON_METRICS` or `EVALUATION_METRICS`."""
    floor: float | None
    """The smallest value of the metric that is accepted, measured against the source model. None: the pass sets no floor; the
    accuracy budget of the pipeline or the criteria of an evaluation decide, and a build without a budget refuses the pass."""

    def __post_init__(self) -> None:
        metrics = COMPARISON_METRICS | EVALUATION_METRICS
        if self.metric not in metrics:
            raise ValueError(f"there is no metric `{self.metric}` for lossy passes: use one of {', '.join(metrics)}")
        low, high = metrics[self.metric]
        if self.floor is not None and not (math.isfinite(self.floor) and low <= self.floor <= high):
            raise ValueError(f"the floor of `{self.metric}` must be a number in [{low:g}, {high:g}] (got {self.floor!r})")

    def __str__(self) -> str:
        return f"lossy: {self.metric}" + (f" >= {self.floor:g}" if self.floor is not None else " without a floor")


Fidelity = Exact | Tolerance | Lossy
"""What a pass does to accuracy."""


@dataclass(frozen=True)
class AccuracyBudget:
    """What the lossy passes of a pipeline may cost together: a floor for the finished variant, measured against the source.

    Raises ValueError for a metric that a comparison does not measure and for a floor outside the metric's range.
    """

    metric: str
    """A key of `COMPARISON_METRICS`."""
    floor: float
    """The smallest accepted value of the metric."""

    def __post_init__(self) -> None:
        if self.metric not in COMPARISON_METRICS:
            raise ValueError(f"a build does not measure `{self.metric}`: use one of {', '.join(COMPARISON_METRICS)}")
        Lossy(self.metric, self.floor)

    @property
    def loss(self) -> float:
        """The loss that the pipeline may cause, at least 0."""
        return loss_of(self.metric, self.floor)

    def __str__(self) -> str:
        return f"{self.metric} >= {self.floor:g}"


def loss_of(metric: str, value: float) -> float:
    """Return the loss that a value of a comparison metric stands for: 0 for a graph that equals its source.

    cosine and top1: 1 - value. snr_db: the ratio of noise power to signal power, 10 ** (-value / 10), which adds up over
    passes whose errors are independent.
    """
    return 10 ** (-value / 10) if metric == "snr_db" else 1.0 - value


def parse_budget(text: str) -> AccuracyBudget:
    """Return the budget that `text` spells as METRIC=FLOOR, such as `cosine=0.99`. Raises UsageError if it spells none."""
    metric, _, number = text.partition("=")

    def invalid(reason: object) -> UsageError:
        return UsageError(f"the accuracy floor `{text}` is invalid: {reason}", hint="write METRIC=FLOOR: cosine=0.99")

    try:
        floor = float(number)
    except ValueError:
        raise invalid(f"`{number}` is not a number") from None
    try:
        return AccuracyBudget(metric.strip(), floor)
    except ValueError as error:
        raise invalid(error) from None
