"""List the largest weights of an ONNX file."""

from __future__ import annotations

import click

from ryzen_compile.cli.console import console_options, emit
from ryzen_compile.report.formatting import format_size, format_table

SECTION = "Inspect"


@click.command("acme-weights")
@click.argument("model")
@click.option("--top", type=click.IntRange(1), default=10, show_default=True, help="The number of weights to list.")
@console_options
def command(model: str, top: int, verbosity: int, as_json: bool) -> None:
    """List the weights of the ONNX file MODEL by size, the largest first."""
    from ryzen_compile.ir.load import load

    sizes = {name: value.const_value.nbytes for name, value in load(model).graph.initializers.items() if value.const_value}
    largest = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:top]
    if as_json:
        emit({"weights": dict(largest)})
    else:
        click.echo(format_table([(name, format_size(size)) for name, size in largest]))
