"""Write a package to one file for transport."""

from __future__ import annotations

from pathlib import Path

import click

from ryzen_compile.cli.console import console_options, emit
from ryzen_compile.report.formatting import format_size

SECTION = "Manage files"


@click.command("pack")
@click.argument("package")
@click.argument("file", required=False)
@console_options
def command(package: str, file: str | None, verbosity: int, as_json: bool) -> None:
    """Write PACKAGE to one FILE [PACKAGE.tar] and verify every digest."""
    from ryzen_compile.artifacts.package.pack import pack
    from ryzen_compile.artifacts.package.read import read_package

    path = pack(read_package(package), file or f"{package.rstrip('/')}.tar")
    size_bytes = Path(path).stat().st_size
    if as_json:
        emit({"path": str(path), "size_bytes": size_bytes})
    elif verbosity >= 0:
        click.echo(f"{path}  {format_size(size_bytes)}")
