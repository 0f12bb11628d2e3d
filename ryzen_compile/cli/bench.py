"""Time a package or a model here, alone or in turns with another."""

from __future__ import annotations

from typing import Any

import click

from ryzen_compile.cli.build_options import SEED, FiniteFloat, check_data_excludes_shapes, validate_shapes
from ryzen_compile.cli.console import ConsoleProgress, console_options, emit, format_table


@click.command("bench")
@click.argument("candidate")
@click.option("--against", metavar="OTHER", help="Another package or ONNX file, timed in turns with the first.")
@click.option("--graph", help="The graph to time, where a package holds several.")
@click.option(
    "--shapes", metavar="NAME:1x8,...", callback=validate_shapes, help="The shapes to time [what the package is tuned for]."
)
@click.option("--data", metavar="SAMPLES", help="FILE.npz, FILE.py[:FUNCTION] or recipe:NAME [seeded values].")
@click.option("--warm-up", metavar="MS", type=FiniteFloat(0), default=200.0, show_default=True)
@click.option("--duration", metavar="SECONDS", type=FiniteFloat(0), default=3.0, show_default=True)
@click.option("--iterations", type=click.IntRange(1), default=10, show_default=True, help="At least so many of each.")
@click.option("--seed", type=SEED, default=0, show_default=True)
@console_options
def command(
    candidate: str,
    against: str | None,
    graph: str | None,
    shapes: str | None,
    data: str | None,
    warm_up: float,
    duration: float,
    iterations: int,
    seed: int,
    verbosity: int,
    as_json: bool,
) -> None:
    """Time SUBJECT, a package or an ONNX file, on this machine: median, p99 and throughput.

    With --against the two run in turns on the same feed, and the ratio is the median over the turns.
    """
    check_data_excludes_shapes(data, shapes)

    from contextlib import ExitStack

    from ryzen_compile.runtime.bench import BenchConfig, open_runner, run_interleaved

    talk = ConsoleProgress(verbosity)
    with ExitStack() as stack:
        contenders = [stack.enter_context(open_runner(one, graph=graph)) for one in (candidate, against) if one]
        feed = contenders[0].make_inputs(data=data, shapes=shapes, seed=seed)
        for one in contenders:
            talk.message(f"{one.name}: {one.description}")
        for text in filter(None, (candidate, against)):
            if warning := _accuracy_warning(text, graph):
                talk.message(warning)
        clock = BenchConfig(warm_up_seconds=warm_up / 1000, seconds=duration, min_iterations=iterations)
        result = run_interleaved(contenders, feed, clock)
    if as_json:
        emit(result)
        return
    rows: list[tuple[Any, ...]] = [
        (one.name, f"{one.median_ms:.3f} ms", f"{one.p99_ms:.3f} ms", f"{one.per_second:.1f}/s", f"{one.runs} runs")
        for one in result.timings
    ]
    click.echo(format_table(rows, header=("", "median", "p99", "throughput", "")))
    if result.ratio is not None:
        first, second = (one.name for one in result.timings)
        click.echo(f"{first} takes {result.ratio:.3f} of the time of {second} (median of the turns; {result.spread})")


def _accuracy_warning(path: str, graph: str | None) -> str | None:
    """Return the warning of a package that is timed; None for a model."""
    from pathlib import Path

    from ryzen_compile.artifacts.package.read import read_package
    from ryzen_compile.cli.report import accuracy_warning
    from ryzen_compile.runtime.choose import choose

    if not Path(path).is_dir():
        return None
    manifest = read_package(path).manifest
    _, choice = choose(manifest, graph, None)
    return accuracy_warning(manifest, choice.path)
