"""Write a package into one file, for transport."""

from __future__ import annotations

from pathlib import Path

import click

from ryzen_compile.cli.console import console_options, emit, format_size


@click.command("pack")
@click.argument("package")
@click.argument("file", required=False)
@console_options
def command(package: str, file: str | None, verbosity: int, as_json: bool) -> None:
    """Write PACKAGE into one FILE [PACKAGE.tar]; every digest is checked on the way."""
    from ryzen_compile.artifacts.package.pack import pack
    from ryzen_compile.artifacts.package.read import read_package

    place = pack(read_package(package), file or f"{package.rstrip('/')}.tar")
    bytes_ = Path(place).stat().st_size
    if as_json:
        emit({"path": str(place), "size_bytes": bytes_})
    elif verbosity >= 0:
        click.echo(f"{place}  {format_size(bytes_)}")
