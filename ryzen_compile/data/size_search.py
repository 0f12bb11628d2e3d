"""Search for the sizes of dynamic dims with which a model runs, by running it."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

import msgspec

from ryzen_compile.spec.interface import Interface
from ryzen_compile.spec.profile import default_sizes
from ryzen_compile.utils.record import Record

TrialFunction = Callable[[Mapping[str, int]], str | None]
"""Runs a model once with a size for every dim; returns None, or the reason why the model does not run."""


CaseFunction = Callable[[Mapping[str, int], int], str | None]
"""Runs one of several cases, given by its index, with a size for every dim; returns None, or why it does not run."""

MAX_TRIAL_SECONDS = 20.0
"""The longest estimated run, in seconds, with which a largest size is tried, and the longest search for sizes of more cases."""
_LENGTHS = (64, 256, 32, 512, 16, 1024, 8, 4096, 4, 16384)
"""The lengths that are tried, in this order, if a model does not run with the typical sizes."""
_SHORT_LENGTHS = (2, 1)
"""The lengths that are tried last: engines are tuned for the size that is found."""
_MAX_SUBSET_DIMS = 4
"""The most lengths of which every subset is tried with size 1; of more, single ones are."""


class SizeLimit(Record, frozen=True):
    """The smallest or the largest size of one dim with which a model runs."""

    dim: str
    kind: Literal["min", "max"]
    size: int
    reason: str
    """Why the model does not run with a size beyond the limit."""

    def __str__(self) -> str:
        verb, beyond = ("starts", "below") if self.kind == "min" else ("ends", "above")
        return f"`{self.dim}` {verb} at {self.size}: {beyond} it, {self.reason}"


class RunningSizes(Record, frozen=True):
    """Sizes with which a model runs."""

    sizes: dict[str, int]
    cases: tuple[int, ...]
    """The indices of the cases that run with them."""


def find_running_sizes(
    interface: Interface,
    others: Iterable[Mapping[str, int]],
    case_count: int,
    trial: CaseFunction,
    *,
    is_too_large: TrialFunction,
) -> RunningSizes | None:
    """Return sizes with which the most cases run, the first of several; None if none runs with any sizes.

    The typical sizes of the interface are tried first, then `others`, sizes of some dims, then other lengths for all dims but
    those of size 1, then for some of them, the others having size 1: the batch of an input may not be its first axis. Sizes are
    within the ranges that the interface records. The search ends when all cases run, or after `MAX_TRIAL_SECONDS` if some do.
    """
    started = time.perf_counter()
    best: RunningSizes | None = None
    typical = default_sizes(interface)[1]
    tried = set[tuple[int, ...]]()
    for candidate in _candidate_sizes(typical, others):
        sizes = {
            dim: min(max(candidate[dim], interface.min_sizes.get(dim, 0)), interface.max_sizes.get(dim, sys.maxsize))
            for dim in typical
        }
        if tuple(sizes.values()) in tried:
            continue
        tried.add(tuple(sizes.values()))
        if best is not None and time.perf_counter() - started > MAX_TRIAL_SECONDS:
            break
        if sizes != typical and is_too_large(sizes) is not None:
            continue
        cases = tuple(index for index in range(case_count) if trial(sizes, index) is None)
        if len(cases) > (len(best.cases) if best is not None else 0):
            best = RunningSizes(sizes=sizes, cases=cases)
        if len(cases) == case_count:
            break
    return best


def _candidate_sizes(typical: Mapping[str, int], others: Iterable[Mapping[str, int]]) -> Iterator[Mapping[str, int]]:
    """Yield sizes to try, from the most to the least likely."""
    yield typical
    yield from ({**typical, **sizes} for sizes in others)
    lengths = [dim for dim, size in typical.items() if size != 1]
    counts = range(len(lengths)) if len(lengths) <= _MAX_SUBSET_DIMS else (0, 1)
    for count in counts:
        for single in itertools.combinations(reversed(lengths), count):
            several = [dim for dim in lengths if dim not in single]
            yield from ({**typical, **dict.fromkeys(single, 1), **dict.fromkeys(several, size)} for size in _LENGTHS)
    yield from ({**typical, **dict.fromkeys(lengths, size)} for size in _SHORT_LENGTHS)


def search_ranges(
    interface: Interface,
    known: Mapping[str, int],
    trial: TrialFunction,
    *,
    is_too_large: TrialFunction | None = None,
) -> tuple[SizeLimit, ...]:
    """Return the limits within the derived range of every dim, found by running the model.

    The result is empty if there are none, or if the model does not run with the sizes `known`. Dims whose minimum or maximum
    the interface records keep it. `is_too_large` is a check without a run: the largest sizes are reduced until they pass it,
    and until a run takes no longer than `MAX_TRIAL_SECONDS`, estimated from a run with the sizes `known`. Without it, the
    largest sizes are not tried where they would take longer.
    """
    lowest, _, highest = default_sizes(interface)
    low = {dim: size for dim, size in lowest.items() if dim not in interface.min_sizes and size < known[dim]}
    high = {dim: size for dim, size in highest.items() if dim not in interface.max_sizes and size > known[dim]}
    if not low and not high:
        return ()
    seconds = math.inf
    for _ in range(2 if high else 1):  # the first run is slower
        started = time.perf_counter()
        if trial(known) is not None:
            return ()
        seconds = min(seconds, time.perf_counter() - started)

    def is_too_slow(sizes: Mapping[str, int]) -> str | None:
        estimate = seconds * math.prod(size / max(1, known[dim]) for dim, size in sizes.items())
        if estimate <= MAX_TRIAL_SECONDS:
            return None
        return f"a run would take about {estimate:.0f} s, more than {MAX_TRIAL_SECONDS:.0f} s"

    reduced: tuple[SizeLimit, ...] = ()
    if is_too_large is not None:
        reduced = _reduce(known, high, "max", lambda sizes: is_too_large(sizes) or is_too_slow(sizes))
    elif is_too_slow(high) is not None:
        high = {}
    high |= {limit.dim: limit.size for limit in reduced}
    minima = find_limits(known, low, "min", trial) if low else ()
    maxima = find_limits(known, high, "max", trial) if high else ()
    found = {limit.dim for limit in maxima}
    return (*minima, *(limit for limit in reduced if limit.dim not in found), *maxima)


def with_limits(interface: Interface, limits: Iterable[SizeLimit]) -> Interface:
    """Return `interface` with the limits in its ranges of sizes."""
    limits = tuple(limits)
    return msgspec.structs.replace(
        interface,
        min_sizes=interface.min_sizes | {limit.dim: limit.size for limit in limits if limit.kind == "min"},
        max_sizes=interface.max_sizes | {limit.dim: limit.size for limit in limits if limit.kind == "max"},
    )


def find_limits(
    known: Mapping[str, int], bounds: Mapping[str, int], kind: Literal["min", "max"], trial: TrialFunction
) -> tuple[SizeLimit, ...]:
    """Return the limits that keep a model from running with `bounds`; empty if it runs there.

    The model runs with the sizes `known`. Each dim is moved from there to its bound alone, by bisection: about log2 of the
    distance runs. Dims that cannot be moved alone and have the same size are moved together: the model may require equal sizes.
    Sizes between the limit and `known` are assumed to run. If the model does not run with all limits together,
    the dim that is farthest from its size in `known` is moved halfway back, until it runs. It runs once with the same sizes.
    """
    trial = _run_once(trial)
    if trial({**known, **bounds}) is None:
        return ()
    limits = {
        dim: limit for dim, bound in bounds.items() if (limit := _limit_of((dim,), known, bound, kind, trial)) is not None
    }
    stuck = [dim for dim, limit in limits.items() if limit.size == known[dim]]
    for size in dict.fromkeys(known[dim] for dim in stuck):
        dims = [dim for dim in stuck if known[dim] == size]
        joint = _limits_of_equal_dims(dims, known, bounds, kind, trial) if len(dims) > 1 else None
        if joint is not None:
            limits = {dim: limit for dim, limit in limits.items() if dim not in dims} | joint
    together = {**bounds, **{dim: limit.size for dim, limit in limits.items()}}
    return tuple({**limits, **{limit.dim: limit for limit in _reduce(known, together, kind, trial)}}.values())


def _run_once(trial: TrialFunction) -> TrialFunction:
    """Return `trial` with its results kept by sizes."""
    results: dict[frozenset[tuple[str, int]], str | None] = {}

    def kept(sizes: Mapping[str, int]) -> str | None:
        key = frozenset(sizes.items())
        if key not in results:
            results[key] = trial(sizes)
        return results[key]

    return kept


def _reduce(
    known: Mapping[str, int], bounds: Mapping[str, int], kind: Literal["min", "max"], trial: TrialFunction
) -> tuple[SizeLimit, ...]:
    """Move the dim that is farthest from its size in `known` halfway back until the trial succeeds; return the moved dims."""
    sizes, limits = dict(bounds), dict[str, SizeLimit]()
    while sizes and (failure := trial({**known, **sizes})) is not None:
        dim = max(sizes, key=lambda dim: max(sizes[dim], known[dim]) / max(1, min(sizes[dim], known[dim])))
        if sizes[dim] == known[dim]:
            break
        sizes[dim] = max(known[dim], sizes[dim] // 2) if kind == "max" else min(known[dim], max(1, sizes[dim]) * 2)
        limits[dim] = SizeLimit(dim=dim, kind=kind, size=sizes[dim], reason=failure)
    return tuple(limits.values())


def _limits_of_equal_dims(
    dims: Sequence[str], known: Mapping[str, int], bounds: Mapping[str, int], kind: Literal["min", "max"], trial: TrialFunction
) -> dict[str, SizeLimit] | None:
    """Return the limits of dims that must be equal, found by moving them together; None if they do not move."""
    bound = min(bounds[dim] for dim in dims) if kind == "max" else max(bounds[dim] for dim in dims)
    limit = _limit_of(dims, known, bound, kind, trial)
    if limit is not None:
        return None if limit.size == known[dims[0]] else {dim: msgspec.structs.replace(limit, dim=dim) for dim in dims}
    reason = f"it must equal `{next(dim for dim in dims if bounds[dim] == bound)}`"
    return {dim: SizeLimit(dim=dim, kind=kind, size=bound, reason=reason) for dim in dims if bounds[dim] != bound}


def _limit_of(
    dims: Sequence[str], known: Mapping[str, int], bound: int, kind: Literal["min", "max"], trial: TrialFunction
) -> SizeLimit | None:
    """Return the limit of dims of one size, all others having their sizes in `known`; None if the model runs at their bound."""
    works, fails = known[dims[0]], bound
    if works == fails or (reason := trial({**known, **dict.fromkeys(dims, fails)})) is None:
        return None
    while abs(works - fails) > 1:
        middle = (works + fails) // 2
        failure = trial({**known, **dict.fromkeys(dims, middle)})
        if failure is None:
            works = middle
        else:
            fails, reason = middle, failure
    return SizeLimit(dim=dims[0], kind=kind, size=works, reason=reason)
