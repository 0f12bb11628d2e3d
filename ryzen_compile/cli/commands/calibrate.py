"""Fit the statistics that a pass reads from a file to a model."""

from __future__ import annotations

import click

from ryzen_compile.cli.build_options import SAMPLES_HELP, SEED, limit_options
from ryzen_compile.cli.console import ConsoleProgress, console_options, emit

SECTION = "Compile"


@click.command("calibrate")
@click.argument("model")
@click.argument("output")
@click.option("--for", "for_pass", required=True, metavar="PASS", help="The pass that reads them: kv-evict{score=kvzap}.")
@click.option("--data", required=True, metavar="SAMPLES", help=f"Documents: {SAMPLES_HELP}.")
@click.option("--documents", type=click.IntRange(1), default=64, show_default=True, help="The maximum number of documents.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="The seed of a recipe's documents.")
@limit_options
@console_options
def command(
    model: str,
    output: str,
    for_pass: str,
    data: str,
    documents: int,
    seed: int,
    memory_limit_bytes: int | None,
    time_limit_seconds: float | None,
    verbosity: int,
    as_json: bool,
) -> None:
    """Fit the statistics that a pass needs to MODEL, a decoder as exported, and write them to OUTPUT.

    The file records the weights that it was fitted to, and passes refuse it for others.
    """
    from ryzen_compile.builder.calibrate import calibrate
    from ryzen_compile.processes.limits import ResourceLimits

    summary = calibrate(
        model,
        output,
        pass_spec=for_pass,
        data=data,
        documents=documents,
        seed=seed,
        limits=ResourceLimits(memory_bytes=memory_limit_bytes, seconds=time_limit_seconds),
        progress=ConsoleProgress(verbosity),
    )
    if as_json:
        emit({"path": output, "message": summary})
    elif verbosity >= 0:
        click.echo(f"{output}: {summary}")
