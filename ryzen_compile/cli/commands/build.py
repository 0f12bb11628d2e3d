"""Build a package of engines from an ONNX file."""

from __future__ import annotations

from typing import Any

import click

from ryzen_compile.cli.build_options import (
    builder_options,
    config_options,
    limit_options,
    parse_model_arguments,
    pop_builder_options,
)
from ryzen_compile.cli.console import ConsoleProgress, console_options, emit, print_errors
from ryzen_compile.errors import RyzenError, UsageError

SECTION = "Compile"


@click.command("build")
@click.argument("model", nargs=-1)
@click.option("--onnx", "onnx_file", metavar="FILE", help="MODEL, as trtexec names it.")
@click.option("-o", "--output", "--saveEngine", metavar="PACKAGE", help="Where to write the package [MODEL.ryzen].")
@config_options
@click.option(
    "--allow-partial", is_flag=True, help="Exit with 0 although targets were refused or variants could not be compared."
)
@limit_options
@click.option("--cache", metavar="DIR", help="The folder of the build cache [the user's cache folder].")
@click.option("--no-cache", is_flag=True, help="Neither read from the cache nor write to it.")
@builder_options
@console_options
def command(
    model: tuple[str, ...],
    onnx_file: str | None,
    output: str | None,
    allow_partial: bool,
    memory_limit_bytes: int | None,
    time_limit_seconds: float | None,
    cache: str | None,
    no_cache: bool,
    verbosity: int,
    as_json: bool,
    **config_fields: Any,
) -> int:
    """Build a package from MODEL: an ONNX file, a folder of ONNX files, or graphs as prefill=prefill.onnx decode=decode.onnx.

    Builder options have trtexec's names. A target that cannot be built for is recorded with its reason, and the package is
    written without it; the exit code is then 1, unless --allow-partial is given. A FILE.py in --data or --baseline is executed.
    """
    progress = ConsoleProgress(verbosity)
    if bool(model) == (onnx_file is not None):
        raise UsageError("give one model", hint="ryzen-compile build model.onnx, or as in trtexec --onnx=model.onnx")
    files = parse_model_arguments(model or (str(onnx_file),))
    options, precision = pop_builder_options(config_fields, progress)

    from ryzen_compile import api
    from ryzen_compile.artifacts.package.diagnostics import package_diagnostics
    from ryzen_compile.artifacts.package.read import read_package
    from ryzen_compile.report import text as report

    try:
        package = api.build(
            files,
            output,
            **config_fields,
            precision=precision,
            options=options,
            memory_limit_bytes=memory_limit_bytes,
            time_limit_seconds=time_limit_seconds,
            allow_partial=allow_partial,
            cache=False if no_cache else cache,
            progress=progress,
        )
    except RyzenError as error:
        written = next((diagnostic for diagnostic in error.diagnostics if diagnostic.code == "package-written"), None)
        if written is None or written.location is None:
            raise
        package = read_package(written.location)
        if not as_json and verbosity >= 0 and report.has_met_variant(package.manifest):
            click.echo(report.format_package_brief(package, with_refusals=False))
        print_errors(error.diagnostics, as_json=as_json, data={"path": str(package.path), "manifest": package.manifest})
        return error.exit_code
    if as_json:
        emit(
            {"path": str(package.path), "manifest": package.manifest},
            package_diagnostics(package.manifest, severity="warning"),
        )
    elif verbosity >= 0:
        click.echo((report.format_package if verbosity > 0 else report.format_package_brief)(package))
    return 0
