"""Show what a package holds and what it is worth."""

from __future__ import annotations

import click

from ryzen_compile.cli.console import emit, talk_options


@click.command("inspect")
@click.argument("package", required=False)
@click.option("--check", is_flag=True, help="Also check the digest of every file.")
@click.option("--schema", is_flag=True, help="Print the JSON Schema of manifests instead.")
@talk_options
def command(package: str | None, check: bool, schema: bool, verbosity: int, as_json: bool) -> None:
    """Show what PACKAGE holds: graphs, plans, engines, evidence, refusals."""
    from ryzen_compile.cli import report
    from ryzen_compile.errors import UsageError, shown
    from ryzen_compile.package.read import read

    if schema:
        from ryzen_compile.package.schema import schema as manifest_schema

        emit(manifest_schema())
        return
    if package is None:
        raise UsageError("no package is named", hint="ryzen-compile inspect model.ryzen")
    found = read(package)
    if check:
        found.check()
    if as_json:
        emit(found.manifest)
        return
    click.echo(report.of_package(found))
    if check:
        click.echo(f"\nall {len(found.manifest.files)} digests are right")
    for name in found.unlisted():
        click.echo(f"not part of the package: {shown(name)}")
