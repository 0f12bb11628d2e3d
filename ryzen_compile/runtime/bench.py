"""Benchmarks: times packages and models on the same inputs in alternation, so that drift affects all of them equally."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ryzen_compile import registry
from ryzen_compile.artifacts.package.reference import input_digests, parse_load_request
from ryzen_compile.backends.traits import portable_backend
from ryzen_compile.data.random_inputs import random_inputs, random_inputs_hint
from ryzen_compile.diagnostic import Diagnostic
from ryzen_compile.errors import RyzenError, UsageError, default_hint
from ryzen_compile.jobs.executor import LocalExecutor
from ryzen_compile.jobs.job import Job, JobKey, JobOutput, Resources, runs
from ryzen_compile.processes.limits import ResourceLimits
from ryzen_compile.processes.operation import performing
from ryzen_compile.progress import Progress, StageItems
from ryzen_compile.runtime.load import load
from ryzen_compile.spec import profile
from ryzen_compile.utils.record import Record
from ryzen_compile.utils.summarized import Summarized

if TYPE_CHECKING:
    from ryzen_compile.spec.interface import Interface
    from ryzen_compile.spec.profile import Profile


class BenchConfig(Record, frozen=True):
    """The duration of a benchmark. Raises UsageError for numbers out of range."""

    warm_up_seconds: float
    """The warm-up of each runner, in seconds."""
    seconds: float
    """The timed duration per runner, in seconds."""
    min_iterations: int
    """The minimum number of timed runs of each runner, at least 1."""

    def __post_init__(self) -> None:
        for name, minimum in (("warm_up_seconds", 0), ("seconds", 0), ("min_iterations", 1)):
            value = getattr(self, name)
            if not minimum <= value < math.inf:
                raise UsageError(f"`{name}` must be a finite number of at least {minimum} (got {value:g})")


class Timing(Record, frozen=True):
    """The duration of a run of one runner, from host arrays to host arrays."""

    name: str
    description: str
    """The file, the backend and the device that ran."""
    runs: int
    median_ms: float
    p99_ms: float
    min_ms: float
    per_second: float
    """Sequential runs per second."""


class Timings(Summarized, Record, frozen=True):
    """The timings of all runners on the same inputs."""

    timings: tuple[Timing, ...]
    shapes: dict[str, tuple[int, ...]]
    """{input name: shape}."""
    ratio: float | None = None
    """The duration of the first runner divided by that of the second: the median over the iterations; None for one runner."""
    spread: str = ""
    """The interquartile range of the ratios, as text."""
    batch: int = 1
    """The samples of one run: the size of the batch dim; 1 without one."""

    @property
    def summary(self) -> str:
        """The median of each runner, and their ratio."""
        medians = ", ".join(f"{timing.name} {timing.median_ms:.3g} ms" for timing in self.timings)
        return medians if self.ratio is None else f"{medians}, ratio {self.ratio:.3g}"

    def _details(self) -> list[str]:
        return [
            f"{timing.name}: {timing.description}, p99 {timing.p99_ms:.3g} ms, {timing.per_second:.1f} runs/s"
            for timing in self.timings
        ]


@dataclass(frozen=True, kw_only=True)
class BenchRunner:
    """A loaded package or model."""

    name: str
    description: str
    interface: Interface
    profiles: tuple[Profile, ...]
    run: Callable[[Mapping[str, Any]], Any]
    warnings: tuple[Diagnostic, ...] = ()
    """The criteria that the package does not meet."""

    def make_inputs(self, *, data: str | None, shapes: str | None, seed: int) -> dict[str, Any]:
        """Return {input name: array}: the first sample of `data`, else random values of `shapes`, else of the optimum."""
        from ryzen_compile.data.loading import load_samples

        if data is not None:
            return dict(next(iter(load_samples(data, self.interface, seed=seed))))
        return random_inputs(self.interface, self.profiles, shapes=shapes, seed=seed)


@contextmanager
def open_runner(
    source: str | os.PathLike[str], *, graph: str | None = None, variant: str | None = None
) -> Iterator[BenchRunner]:
    """Load a package, with #GRAPH and @VARIANT, or an ONNX file, and yield its runner.

    Raises RyzenError if it cannot be loaded.
    """
    request = parse_load_request(os.fspath(source), graph=graph, variant=variant)
    if request.path.is_dir():
        with load(request.path, graph=request.graph, variant=request.variant, backend=request.backend) as engine:
            yield BenchRunner(
                name=Path(source).name,
                description=engine.choice.summary,
                interface=engine.interface,
                profiles=engine.profiles,
                run=engine.run,
                warnings=engine.choice.warnings,
            )
        return
    path = Path(source)
    if not path.is_file():
        raise RyzenError(f"there is no package or model `{source}`", hint="pass a .ryzen folder or an .onnx file")
    from ryzen_compile.ir.interface_metadata import interface_of
    from ryzen_compile.ir.load import load as load_graph

    interface = interface_of(load_graph(path))
    backend = portable_backend()
    with registry.find_backend(backend).open(str(path)) as session:
        yield BenchRunner(
            name=path.name,
            description=f"{path.name} by {backend}",
            interface=interface,
            profiles=(profile.derive_profile(interface),),
            run=session.run,
        )


class BenchKey(JobKey, frozen=True):
    """What is timed. The times also depend on the state of the machine, so no result is reused."""

    kind: ClassVar[str] = "measurement"

    candidates: tuple[str, ...]
    """The digests of the packages and ONNX files."""
    graph: str | None
    variant: str | None
    shapes: str | None
    data: str | None
    seed: int
    config: BenchConfig


class BenchJob(Job[Timings], frozen=True, kw_only=True):
    """Time packages and ONNX files on the same inputs, while no other job runs."""

    result_type: ClassVar[Any] = Timings
    cacheable: ClassVar[bool] = False
    isolated: ClassVar[bool] = True

    key: BenchKey
    candidates: tuple[str, ...]
    """The packages, with #GRAPH and @VARIANT, and ONNX files, in the folder of the job."""


def bench(
    candidates: Sequence[str],
    *,
    graph: str | None = None,
    variant: str | None = None,
    shapes: str | None = None,
    data: str | None = None,
    seed: int = 0,
    config: BenchConfig,
    limits: ResourceLimits | None = None,
    progress: Progress,
) -> Timings:
    """Time `candidates`, packages with #GRAPH and @VARIANT or ONNX files, on the inputs of the first one, in a child process.

    `data` and `shapes` are as in `BenchRunner.make_inputs`. What runs, and whether it misses its criteria, is reported to
    `progress`. Raises UsageError for both `data` and `shapes`, RyzenError if a candidate cannot be loaded or run.
    """
    if data is not None and shapes is not None:
        raise UsageError(
            "--shapes is for random values, and the samples of --data have their own shapes", hint="leave one of the two out"
        )
    paths = [parse_load_request(candidate, graph=graph, variant=variant).path for candidate in candidates]
    inputs = input_digests(*paths)
    key = BenchKey(
        candidates=tuple(inputs.values()), graph=graph, variant=variant, shapes=shapes, data=data, seed=seed, config=config
    )
    job = BenchJob(key=key, inputs=inputs, resources=Resources.within(limits, exclusive=True), candidates=tuple(candidates))
    return LocalExecutor(None, progress).run(job, Path()).result


@runs(BenchJob)
def run_bench_job(job: BenchJob, folder: Path, progress: Progress) -> JobOutput[Timings]:
    """Load the candidates and time them in alternation."""
    key = job.key
    with ExitStack() as stack:
        runners = [
            stack.enter_context(open_runner(str(folder / candidate), graph=key.graph, variant=key.variant))
            for candidate in job.candidates
        ]
        inputs = runners[0].make_inputs(data=key.data, shapes=key.shapes, seed=key.seed)
        for runner in runners:
            progress.report(Diagnostic(code="engine-chosen", severity="info", message=runner.description, location=runner.name))
            for warning in runner.warnings:
                progress.report(warning)
        hint = random_inputs_hint(runners[0].interface, inputs)
        with default_hint(hint) if key.data is None else nullcontext():
            return JobOutput(result=run_interleaved(runners, inputs, key.config, progress))


def run_interleaved(
    runners: Sequence[BenchRunner], inputs: Mapping[str, Any], config: BenchConfig, progress: Progress
) -> Timings:
    """Time `runners` on `inputs`, one run each per iteration, for the duration and the number of iterations in `config`."""
    shapes = profile.format_shapes(inputs)
    names = " and ".join(runner.name for runner in runners)
    iteration_seconds = 0.0
    with progress.stage(f"warm up {names}"):
        for runner in runners:
            deadline = time.perf_counter() + config.warm_up_seconds
            with performing(f"running {runner.name} for the first time, on {shapes}"):
                seconds = _time_run(runner, inputs)
            while time.perf_counter() < deadline:
                seconds = _time_run(runner, inputs)
            iteration_seconds += seconds
    iterations: list[list[float]] = []
    duration = config.seconds * len(runners)
    # The duration determines the number of iterations, unless they are slow.
    is_slow = iteration_seconds * config.min_iterations > duration
    title = f"time {names}" if is_slow else f"time {names} for {duration:g} s"
    count = config.min_iterations if is_slow else None
    with (
        progress.stage(title, StageItems("iterations", count)) as stage,
        performing(f"running {names}, on {shapes}"),
    ):
        deadline = time.perf_counter() + duration
        while len(iterations) < config.min_iterations or time.perf_counter() < deadline:
            iterations.append([_time_run(runner, inputs) for runner in runners])
            stage.advance()
    ratios = [seconds[0] / seconds[1] for seconds in iterations] if len(runners) > 1 else []
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else []
    return Timings(
        timings=tuple(_summarize(runner, [seconds[index] for seconds in iterations]) for index, runner in enumerate(runners)),
        shapes={name: tuple(array.shape) for name, array in inputs.items()},
        ratio=statistics.median(ratios) if ratios else None,
        spread=f"interquartile range {quartiles[0]:.3f} to {quartiles[2]:.3f}" if quartiles else "",
        batch=runners[0].interface.batch_size({name: array.shape for name, array in inputs.items()}),
    )


def _time_run(runner: BenchRunner, inputs: Mapping[str, Any]) -> float:
    start_time = time.perf_counter()
    runner.run(inputs)
    return time.perf_counter() - start_time


def _summarize(runner: BenchRunner, seconds: Sequence[float]) -> Timing:
    ordered = sorted(seconds)
    return Timing(
        name=runner.name,
        description=runner.description,
        runs=len(ordered),
        median_ms=statistics.median(ordered) * 1000,
        p99_ms=ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1000,
        min_ms=ordered[0] * 1000,
        per_second=len(ordered) / sum(ordered),
    )
