"""Search for the sizes of dynamic dims with which a model runs, by running it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from ryzen_compile.utils.record import Record

TrialFunction = Callable[[Mapping[str, int]], str | None]
"""Runs a model once with a size for every dim; returns None, or the reason why the model does not run."""


class SizeLimit(Record, frozen=True):
    """The smallest or the largest size of one dim with which a model runs."""

    dim: str
    kind: Literal["min", "max"]
    size: int
    reason: str
    """Why the model does not run one size beyond the limit."""

    def __str__(self) -> str:
        beyond = "below" if self.kind == "min" else "above"
        return (
            f"`{self.dim}` {'starts' if self.kind == 'min' else 'ends'} at {self.size}: the model fails {beyond}: {self.reason}"
        )


def find_limits(
    known: Mapping[str, int], bounds: Mapping[str, int], kind: Literal["min", "max"], trial: TrialFunction
) -> tuple[SizeLimit, ...]:
    """Return the limits that keep a model from running with `bounds`; empty if it runs there.

    The model runs with the sizes `known`. Each dim is moved from there to its bound alone, by bisection: about log2 of the
    distance runs. Sizes between the limit and `known` are assumed to run. If the model does not run with all limits together,
    every dim is limited to its size in `known`.
    """
    reason = trial({**known, **bounds})
    if reason is None:
        return ()
    limits = [limit for dim, bound in bounds.items() if (limit := _limit_of(dim, known, bound, kind, trial)) is not None]
    together = {**known, **bounds, **{limit.dim: limit.size for limit in limits}}
    if limits and (reason := trial(together)) is None:
        return tuple(limits)
    return tuple(
        SizeLimit(dim=dim, kind=kind, size=known[dim], reason=reason) for dim, bound in bounds.items() if bound != known[dim]
    )


def _limit_of(
    dim: str, known: Mapping[str, int], bound: int, kind: Literal["min", "max"], trial: TrialFunction
) -> SizeLimit | None:
    """Return the limit of one dim, all others having their sizes in `known`; None if the model runs at its bound."""
    works, fails = known[dim], bound
    if works == fails or (reason := trial({**known, dim: fails})) is None:
        return None
    while abs(works - fails) > 1:
        middle = (works + fails) // 2
        failure = trial({**known, dim: middle})
        if failure is None:
            works = middle
        else:
            fails, reason = middle, failure
    return SizeLimit(dim=dim, kind=kind, size=works, reason=reason)
