"""Build a package of engines from an ONNX file."""

from __future__ import annotations

from typing import Any

import click

from ryzen_compile.cli.build_options import (
    GIGABYTES,
    SECONDS,
    builder_options,
    data_options,
    parse_model_arguments,
    pop_builder_options,
    shape_options,
)
from ryzen_compile.cli.console import ConsoleProgress, console_options, emit


@click.command("build")
@click.argument("model", nargs=-1, required=True)
@click.option("-o", "--output", metavar="PACKAGE", help="Where to write the package [MODEL.ryzen].")
@click.option(
    "--gpu", default="auto", show_default=True, help="Targets: cpu, sm89, rtx4090, sm89@windows, auto; commas between."
)
@click.option("--backend", help="Use this backend only.")
@click.option("-p", "--passes", help="Passes, as `fold,precision{to=fp16}`; `none` for none [those that suit the backend].")
@shape_options
@data_options
@click.option("--compare/--no-compare", default=True, help="Compare every variant with its source before it ships.")
@click.option("--allow-partial", is_flag=True, help="Exit with 0 when some targets were refused.")
@click.option("--memory-limit", metavar="GB", type=GIGABYTES, help="The most that one engine's build may take.")
@click.option("--time-limit", metavar="SECONDS", type=SECONDS, help="The longest that one engine's build may take.")
@click.option("--cache", metavar="DIR", help="The folder of earlier builds [the user's cache folder].")
@click.option("--no-cache", is_flag=True, help="Neither look into the cache nor add to it.")
@builder_options
@console_options
def command(
    model: tuple[str, ...],
    output: str | None,
    allow_partial: bool,
    memory_limit: float | None,
    time_limit: float | None,
    cache: str | None,
    no_cache: bool,
    verbosity: int,
    as_json: bool,
    **config_fields: Any,
) -> None:
    """Build a package from MODEL, an ONNX file or a folder of them; or from graphs, as prefill=prefill.onnx decode=decode.onnx.

    Builder options carry trtexec's names. A target that cannot be built for is recorded with its reason and the others ship;
    the exit code is then 1, unless --allow-partial.
    """
    talk = ConsoleProgress(verbosity)
    files = parse_model_arguments(model)
    options, precision = pop_builder_options(config_fields, talk)

    from ryzen_compile.builder.build import build
    from ryzen_compile.builder.config import BuildConfig, ResourceLimits
    from ryzen_compile.cli import report

    limits = ResourceLimits(memory_bytes=round(memory_limit * 1e9) if memory_limit else None, seconds=time_limit)
    package = build(
        files,
        output,
        config=BuildConfig(**config_fields, precision=precision, options=options, limits=limits),  # type: ignore[arg-type]
        allow_partial=allow_partial,
        cache=False if no_cache else cache,
        progress=talk,
    )
    if as_json:
        emit({"path": str(package.path), "manifest": package.manifest})
    elif verbosity >= 0:
        click.echo(report.format_package(package))
