"""Show what a package holds and what it is worth."""

from __future__ import annotations

import click

from ryzen_compile.cli.console import console_options, emit


@click.command("inspect")
@click.argument("package", required=False)
@click.option("--check", is_flag=True, help="Also check the digest of every file.")
@click.option("--schema", is_flag=True, help="Print the JSON Schema of manifests instead.")
@click.option("--kv", is_flag=True, help="Show the caches of a decoder instead; PACKAGE may then be an ONNX file.")
@console_options
def command(package: str | None, check: bool, schema: bool, kv: bool, verbosity: int, as_json: bool) -> None:
    """Show what PACKAGE holds: graphs, plans, engines, evidence, refusals."""
    from ryzen_compile.artifacts.package.read import read_package
    from ryzen_compile.cli import report
    from ryzen_compile.errors import UsageError, printable

    if schema:
        from ryzen_compile.artifacts.package.schema import schema as manifest_schema

        emit(manifest_schema())
        return
    if package is None:
        raise UsageError("no package is named", hint="ryzen-compile inspect model.ryzen")
    if kv:
        _print_kv_caches(package, as_json=as_json)
        return
    found = read_package(package)
    if check:
        found.check()
    if as_json:
        emit(found.manifest)
        return
    click.echo(report.format_package(found))
    if check:
        click.echo(f"\nall {len(found.manifest.files)} digests are right")
    for name in found.unlisted_files():
        click.echo(f"not part of the package: {printable(name)}")


def _print_kv_caches(path: str, *, as_json: bool) -> None:
    """Print the map of the caches of an ONNX file, or of every portable graph of a package."""
    from pathlib import Path

    from ryzen_compile import registry
    from ryzen_compile.artifacts.package.read import read_package
    from ryzen_compile.cli import report
    from ryzen_compile.ir.load import load
    from ryzen_compile.spec.kv_cache import KVCacheSpec

    files = {Path(path).name: Path(path)}
    if Path(path).is_dir():
        package = read_package(path)
        files = {
            graph.name: Path(package.path, variant.path)
            for graph in package.manifest.graphs
            for variant in graph.variants
            if variant.portable
        }
    reader = registry.find_pass("kv-static")
    maps = {name: reader.inspect(load(file)) for name, file in files.items()}
    if as_json:
        emit(maps)
        return
    for name, told in maps.items():
        if isinstance(told, KVCacheSpec):
            click.echo(report.format_kv_caches(name, told))
