"""Run a package or an ONNX file once and show or save its outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ryzen_compile.cli.build_options import SAMPLES_HELP, SEED, check_data_excludes_shapes, limit_options, validate_shapes
from ryzen_compile.cli.console import ConsoleProgress, console_options, emit
from ryzen_compile.errors import UsageError
from ryzen_compile.report.formatting import format_table

if TYPE_CHECKING:
    from ryzen_compile.runtime.single_run import OutputSummary

SECTION = "Run"


@click.command("run")
@click.argument("package")
@click.argument("texts", metavar="[TEXT]...", nargs=-1)
@click.option("--graph", help="The graph to run, if the package holds several.")
@click.option("--variant", help="The variant to run, or the beginning of its name [the first].")
@click.option("--backend", help="Use only this backend.")
@click.option("--data", metavar="SAMPLES", help=f"{SAMPLES_HELP} [random values].")
@click.option(
    "--shapes",
    metavar="NAME:1x8,...",
    callback=validate_shapes,
    help="The shapes of random values [the opt shapes of the package].",
)
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option("--save-inputs", metavar="FILE.npz", help="Save the inputs, in a form that --data accepts.")
@click.option("--save-outputs", metavar="FILE.npz", help="Save the outputs.")
@limit_options
@console_options
def command(
    memory_limit_bytes: int | None, time_limit_seconds: float | None, verbosity: int, as_json: bool, **request_fields: Any
) -> None:
    """Run PACKAGE (model.ryzen, model.ryzen#GRAPH@VARIANT, or an ONNX file) once and show its outputs: on the first sample,
    or on each TEXT as a row, if the package holds the tokenizer of a text encoder.

    A FILE.py in --data is executed.
    """
    check_data_excludes_shapes(request_fields["data"], request_fields["shapes"])
    if request_fields["texts"] and (request_fields["data"], request_fields["shapes"]) != (None, None):
        raise UsageError("TEXT replaces --data and --shapes", hint="give either texts or --data")

    from ryzen_compile.processes.limits import ResourceLimits
    from ryzen_compile.runtime.single_run import RunRequest, run_once

    result = run_once(
        RunRequest(**request_fields),
        limits=ResourceLimits(memory_bytes=memory_limit_bytes, seconds=time_limit_seconds),
        progress=ConsoleProgress(verbosity),
    )
    if as_json:
        emit(result)
    else:
        rows = [(output.name, f"{output.dtype}{list(output.shape)}", _format_values(output)) for output in result.outputs]
        click.echo(format_table(rows))


def _format_values(output: OutputSummary) -> str:
    if output.first is not None:
        return ", ".join(output.first)
    values = {"min": output.min, "mean": output.mean, "max": output.max}
    statistics = [f"{name} {value:.6g}" for name, value in values.items() if value is not None]
    return ", ".join(statistics + ([f"{output.not_finite} not finite"] if output.not_finite else []))
