"""Timing: packages and models run on one feed, in turns, so that drift falls on all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ryzen_compile import registry
from ryzen_compile.errors import RyzenError
from ryzen_compile.runtime.load import load
from ryzen_compile.spec import profile
from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    from ryzen_compile.spec.interface import Interface
    from ryzen_compile.spec.profile import Profile


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """How long to run."""

    warm_up_seconds: float
    seconds: float
    """Of each contender."""
    min_iterations: int
    """At least, of each contender."""


class Timing(Record, frozen=True):
    """How long one run takes, from host arrays to host arrays."""

    name: str
    served_by: str
    runs: int
    median_ms: float
    p99_ms: float
    min_ms: float
    per_second: float
    """Runs a second, one after the other."""


class Timings(Record, frozen=True):
    """What was timed, side by side."""

    timings: tuple[Timing, ...]
    shapes: dict[str, tuple[int, ...]]
    ratio: float | None = None
    """Time of the first over the second: the median over the turns."""
    spread: str = ""
    """The middle half of the turns."""


@dataclass(frozen=True, kw_only=True)
class BenchRunner:
    """Something that is ready to run."""

    name: str
    description: str
    interface: Interface
    profiles: tuple[Profile, ...]
    run: Callable[[Mapping[str, Any]], Any]

    def make_inputs(self, *, data: str | None, shapes: str | None, seed: int) -> dict[str, Any]:
        """Return one feed: the first sample of `data`, else seeded values of `shapes`, else of the tuned shapes."""
        from ryzen_compile.data.loading import load_samples
        from ryzen_compile.data.synthetic import synthesize

        if data is not None:
            return dict(next(iter(load_samples(data, self.interface, seed=seed))))
        wanted = (
            self.profiles[0].opt if shapes is None else profile.resolve_profiles(self.interface, opt_shapes=[shapes])[0].opt
        )
        return dict(synthesize(self.interface, wanted, seed=seed, rows="mixed"))


@contextmanager
def open_runner(source: str, *, graph: str | None = None) -> Iterator[BenchRunner]:
    """Make a package or an ONNX file ready to run; raises RyzenError."""
    path = Path(source)
    if path.is_dir():
        with load(path, graph=graph) as engine:
            yield BenchRunner(
                name=path.name,
                description=engine.choice.summary,
                interface=engine.interface,
                profiles=engine.profiles,
                run=engine.run,
            )
        return
    if not path.is_file():
        raise RyzenError(f"there is no package or model `{source}`", hint="give a .ryzen folder or an .onnx file")
    from ryzen_compile.ir.interface_metadata import interface_of
    from ryzen_compile.ir.load import load as load_graph

    interface = interface_of(load_graph(path))
    with registry.find_backend("onnxruntime").open(str(path)) as session:
        yield BenchRunner(
            name=path.name,
            description=f"{path.name} by onnxruntime",
            interface=interface,
            profiles=(profile.derive_profile(interface),),
            run=session.run,
        )


def run_interleaved(runners: Sequence[BenchRunner], inputs: Mapping[str, Any], config: BenchConfig) -> Timings:
    """Run the contenders in turns on `feed` until the clock is content."""
    for one in runners:
        until = time.perf_counter() + config.warm_up_seconds
        one.run(inputs)
        while time.perf_counter() < until:
            one.run(inputs)
    turns: list[list[float]] = []
    until = time.perf_counter() + config.seconds * len(runners)
    while len(turns) < config.min_iterations or time.perf_counter() < until:
        turns.append([_time_run(one, inputs) for one in runners])
    ratios = [turn[0] / turn[1] for turn in turns] if len(runners) > 1 else []
    quarters = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else []
    return Timings(
        timings=tuple(_summarize(one, [turn[at] for turn in turns]) for at, one in enumerate(runners)),
        shapes={name: tuple(array.shape) for name, array in inputs.items()},
        ratio=statistics.median(ratios) if ratios else None,
        spread=f"half of them between {quarters[0]:.3f} and {quarters[2]:.3f}" if quarters else "",
    )


def _time_run(runner: BenchRunner, inputs: Mapping[str, Any]) -> float:
    started = time.perf_counter()
    runner.run(inputs)
    return time.perf_counter() - started


def _summarize(runner: BenchRunner, seconds: Sequence[float]) -> Timing:
    ordered = sorted(seconds)
    return Timing(
        name=runner.name,
        served_by=runner.description,
        runs=len(ordered),
        median_ms=statistics.median(ordered) * 1000,
        p99_ms=ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1000,
        min_ms=ordered[0] * 1000,
        per_second=len(ordered) / sum(ordered),
    )
