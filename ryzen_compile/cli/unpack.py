"""Make a package of what `pack` wrote, believing nothing of it."""

from __future__ import annotations

import click

from ryzen_compile.cli.console import console_options, emit


@click.command("unpack")
@click.argument("file")
@click.argument("package", required=False)
@console_options
def command(file: str, package: str | None, verbosity: int, as_json: bool) -> None:
    """Make PACKAGE [FILE without .tar] of FILE; it appears whole, with every digest checked, or not at all."""
    from ryzen_compile.artifacts.package.pack import unpack
    from ryzen_compile.cli import report
    from ryzen_compile.errors import PackageError, UsageError

    if package is None and not file.endswith(".tar"):
        raise UsageError("no place for the package is named", hint=f"ryzen-compile unpack {file} model.ryzen")
    try:
        made = unpack(file, package or file.removesuffix(".tar"))
    except PackageError as error:
        if "--output" not in (error.hint or ""):
            raise
        raise PackageError(error.message, hint=f"name another place: ryzen-compile unpack {file} PACKAGE") from error
    if as_json:
        emit({"path": str(made.path), "manifest": made.manifest})
    elif verbosity >= 0:
        click.echo(report.format_package(made))
