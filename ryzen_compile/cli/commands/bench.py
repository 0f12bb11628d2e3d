"""Measure the run time of a package or a model on this machine, alone or interleaved with another."""

from __future__ import annotations

from typing import Any

import click

from ryzen_compile.cli.build_options import SAMPLES_HELP, SEED, FiniteFloat, limit_options, validate_shapes
from ryzen_compile.cli.console import ConsoleProgress, console_options, emit
from ryzen_compile.report.formatting import format_table

SECTION = "Run"


@click.command("bench")
@click.argument("candidate")
@click.option(
    "--against", metavar="OTHER", help="Another package, variant or ONNX file; its runs alternate with those of CANDIDATE."
)
@click.option("--graph", help="The graph to time, if a package holds several.")
@click.option("--variant", help="The variant to time, or the beginning of its name [the first].")
@click.option(
    "--shapes", metavar="NAME:1x8,...", callback=validate_shapes, help="The shapes to time [the opt shapes of the package]."
)
@click.option("--data", metavar="SAMPLES", help=f"{SAMPLES_HELP} [random values].")
@click.option("--warm-up", metavar="MS", type=FiniteFloat(0), default=200.0, show_default=True)
@click.option("--duration", metavar="SECONDS", type=FiniteFloat(0), default=3.0, show_default=True)
@click.option("--iterations", type=click.IntRange(1), default=10, show_default=True, help="The minimum number of runs of each.")
@click.option("--seed", type=SEED, default=0, show_default=True)
@limit_options
@console_options
def command(
    candidate: str,
    against: str | None,
    graph: str | None,
    variant: str | None,
    shapes: str | None,
    data: str | None,
    warm_up: float,
    duration: float,
    iterations: int,
    seed: int,
    memory_limit_bytes: int | None,
    time_limit_seconds: float | None,
    verbosity: int,
    as_json: bool,
) -> None:
    """Measure CANDIDATE on this machine: median, p99 and throughput.

    CANDIDATE is a package (model.ryzen, model.ryzen#GRAPH@VARIANT) or an ONNX file.

    With --against, runs of the two alternate on the same inputs, and the ratio is the median over the alternations.
    """
    from ryzen_compile import api

    result = api.bench(
        candidate,
        against=against,
        graph=graph,
        variant=variant,
        shapes=shapes,
        data=data,
        warm_up_seconds=warm_up / 1000,
        seconds=duration,
        min_iterations=iterations,
        seed=seed,
        memory_limit_bytes=memory_limit_bytes,
        time_limit_seconds=time_limit_seconds,
        progress=ConsoleProgress(verbosity),
    )
    if as_json:
        emit(result)
        return
    rows: list[tuple[Any, ...]] = [
        (
            timing.name,
            f"{timing.median_ms:.3f} ms",
            f"{timing.p99_ms:.3f} ms",
            f"{timing.per_second:.1f} runs/s",
            f"{timing.per_second * result.batch:.1f} samples/s",
            f"{timing.runs} runs",
        )
        for timing in result.timings
    ]
    click.echo(format_table(rows, header=("", "median", "p99", "throughput", f"batch {result.batch}", "")))
    if result.ratio is not None:
        first, second = (timing.name for timing in result.timings)
        click.echo(f"{first} takes {result.ratio:.3f} of the time of {second} (median of the alternations; {result.spread})")
