"""Time a package or a model here, alone or in turns with another."""

from __future__ import annotations

from typing import Any

import click

from ryzen_compile.cli.build_options import SEED, Amount, check_one_source, held_shapes
from ryzen_compile.cli.console import Talk, emit, table, talk_options


@click.command("bench")
@click.argument("subject")
@click.option("--against", metavar="OTHER", help="Another package or ONNX file, timed in turns with the first.")
@click.option("--graph", help="The graph to time, where a package holds several.")
@click.option(
    "--shapes", metavar="NAME:1x8,...", callback=held_shapes, help="The shapes to time [what the package is tuned for]."
)
@click.option("--data", metavar="SAMPLES", help="FILE.npz, FILE.py[:FUNCTION] or recipe:NAME [seeded values].")
@click.option("--warm-up", metavar="MS", type=Amount(0), default=200.0, show_default=True)
@click.option("--duration", metavar="SECONDS", type=Amount(0), default=3.0, show_default=True)
@click.option("--iterations", type=click.IntRange(1), default=10, show_default=True, help="At least so many of each.")
@click.option("--seed", type=SEED, default=0, show_default=True)
@talk_options
def command(
    subject: str,
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
    check_one_source(data, shapes)

    from contextlib import ExitStack

    from ryzen_compile.runtime.bench import Clock, ready, take_turns

    talk = Talk(verbosity)
    with ExitStack() as stack:
        contenders = [stack.enter_context(ready(one, graph=graph)) for one in (subject, against) if one]
        feed = contenders[0].feed(data=data, shapes=shapes, seed=seed)
        for one in contenders:
            talk.say(f"{one.name}: {one.says}")
        for text in filter(None, (subject, against)):
            if warning := _missed(text, graph):
                talk.say(warning)
        clock = Clock(warm_up_seconds=warm_up / 1000, seconds=duration, iterations=iterations)
        result = take_turns(contenders, feed, clock)
    if as_json:
        emit(result)
        return
    rows: list[tuple[Any, ...]] = [
        (one.name, f"{one.median_ms:.3f} ms", f"{one.p99_ms:.3f} ms", f"{one.per_second:.1f}/s", f"{one.runs} runs")
        for one in result.timings
    ]
    click.echo(table(rows, header=("", "median", "p99", "throughput", "")))
    if result.ratio is not None:
        first, second = (one.name for one in result.timings)
        click.echo(f"{first} takes {result.ratio:.3f} of the time of {second} (median of the turns; {result.spread})")


def _missed(text: str, graph: str | None) -> str | None:
    """Return the warning of a package that is timed; None for a model."""
    from pathlib import Path

    from ryzen_compile.artifacts.package.read import read
    from ryzen_compile.cli.report import missed
    from ryzen_compile.runtime.choose import choose

    if not Path(text).is_dir():
        return None
    manifest = read(text).manifest
    _, choice = choose(manifest, graph, None)
    return missed(manifest, choice.path)
