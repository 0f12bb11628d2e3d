"""Show what a build would do: pipelines, properties of the model, and refused targets; builds nothing."""

from __future__ import annotations

from typing import Any

import click

from ryzen_compile.cli import build_options
from ryzen_compile.cli.console import ConsoleProgress, console_options, emit

SECTION = "Compile"


@click.command("explain")
@click.argument("model", nargs=-1, required=True)
@build_options.config_options
@build_options.builder_options
@console_options
def command(model: tuple[str, ...], verbosity: int, as_json: bool, **config_fields: Any) -> int:
    """Show what `build` would do with MODEL and why: pipelines, properties, moves, problems, targets, shapes.

    Exits with 1 if a pipeline cannot run or a target is refused.
    """
    progress = ConsoleProgress(verbosity)
    files = build_options.parse_model_arguments(model)
    options, precision = build_options.pop_builder_options(config_fields, progress)

    from ryzen_compile.builder.config import BuildConfig
    from ryzen_compile.builder.explain import explain
    from ryzen_compile.report import text as report

    config = BuildConfig(**config_fields, precision=precision, options=options)
    preview = explain(files, config, progress)
    if as_json:
        emit(preview, preview.diagnostics)
    else:
        click.echo(report.format_build_preview(preview))
    return 1 if any(diagnostic.severity == "error" for diagnostic in preview.diagnostics) else 0
