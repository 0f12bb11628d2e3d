"""Extract a package from a file that `pack` wrote, with every digest verified."""

from __future__ import annotations

import click

from ryzen_compile.cli.console import console_options, emit

SECTION = "Manage files"


@click.command("unpack")
@click.argument("file")
@click.argument("package", required=False)
@console_options
def command(file: str, package: str | None, verbosity: int, as_json: bool) -> None:
    """Extract PACKAGE [FILE without .tar] from FILE; nothing is written unless every digest is correct."""
    from ryzen_compile.artifacts.package.diagnostics import package_diagnostics
    from ryzen_compile.artifacts.package.pack import unpack
    from ryzen_compile.errors import PackageError, UsageError
    from ryzen_compile.report import text as report

    if package is None and not file.endswith(".tar"):
        raise UsageError("no path for the package is given", hint=f"ryzen-compile unpack {file} model.ryzen")
    try:
        extracted = unpack(file, package or file.removesuffix(".tar"))
    except PackageError as error:
        if error.diagnostics[0].code != "output-exists":
            raise
        hint = f"give another path: ryzen-compile unpack {file} PACKAGE"
        raise PackageError(error.message, hint=hint, code="output-exists") from error
    if as_json:
        emit(
            {"path": str(extracted.path), "manifest": extracted.manifest},
            package_diagnostics(extracted.manifest, severity="warning"),
        )
    elif verbosity >= 0:
        click.echo((report.format_package if verbosity > 0 else report.format_package_brief)(extracted))
