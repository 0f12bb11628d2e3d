"""Fit the statistics that a pass takes to a model."""

from __future__ import annotations

import click

from ryzen_compile.cli.build_options import SEED
from ryzen_compile.cli.console import ConsoleProgress, console_options, emit


@click.command("calibrate")
@click.argument("model")
@click.argument("output")
@click.option("--for", "for_pass", required=True, metavar="PASS", help="The pass that takes them: kv-evict{score=kvzap}.")
@click.option("--data", required=True, metavar="SAMPLES", help="Documents: recipe:NAME, FILE.npz, FILE.py[:FUNCTION].")
@click.option("--documents", type=click.IntRange(1), default=64, show_default=True, help="How many of them, at most.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of a recipe's documents.")
@console_options
def command(
    model: str, output: str, for_pass: str, data: str, documents: int, seed: int, verbosity: int, as_json: bool
) -> None:
    """Fit to MODEL, a decoder as it was exported, what a pass takes from a file, and write that to OUTPUT.

    The file knows the weights that it was fitted to, and is refused for others.
    """
    from ryzen_compile.cli.output_paths import check_output

    check_output(output, source=model)

    from ryzen_compile.evaluation.calibrate import calibrate

    talk = ConsoleProgress(verbosity)
    says = calibrate(model, output, pass_spec=for_pass, data=data, documents=documents, seed=seed, progress=talk)
    if as_json:
        emit({"path": output, "message": says})
    elif verbosity >= 0:
        click.echo(f"{output}: {says}")
