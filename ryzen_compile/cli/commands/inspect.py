"""Show the contents of a package, its accuracy and its provenance."""

from __future__ import annotations

import click

from ryzen_compile.cli.console import console_options, emit

SECTION = "Inspect"


@click.command("inspect")
@click.argument("package", required=False)
@click.option("--check", is_flag=True, help="Also verify the digest of every file.")
@click.option("--schema", is_flag=True, help="Print the JSON Schema of manifests instead.")
@click.option("--kv", is_flag=True, help="Show the KV caches of a decoder instead; PACKAGE may be an ONNX file.")
@console_options
def command(package: str | None, check: bool, schema: bool, kv: bool, verbosity: int, as_json: bool) -> None:
    """Show the contents of PACKAGE: graphs, pipelines, accuracy, engines, provenance and refused targets."""
    from ryzen_compile.artifacts.package.read import read_package
    from ryzen_compile.errors import UsageError, printable
    from ryzen_compile.report import text as report

    if schema:
        from ryzen_compile.artifacts.package.schema import schema as manifest_schema

        emit(manifest_schema())
        return
    if package is None:
        raise UsageError("no package is given", hint="ryzen-compile inspect model.ryzen")
    if kv:
        _print_kv_caches(package, as_json=as_json)
        return
    contents = read_package(package)
    if check:
        contents.check()
    if as_json:
        emit(contents.manifest)
        return
    click.echo(report.format_package(contents))
    if check:
        click.echo(f"\nall {len(contents.manifest.files)} digests are correct")
    for name in contents.unlisted_files():
        click.echo(f"not part of the package: {printable(name)}")


def _print_kv_caches(path: str, *, as_json: bool) -> None:
    """Print the KV caches of an ONNX file, or of every portable graph of a package."""
    from pathlib import Path

    from ryzen_compile import registry
    from ryzen_compile.artifacts.package.read import read_package
    from ryzen_compile.ir.load import load
    from ryzen_compile.report import text as report
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
    kv_static = registry.find_pass("kv-static")
    specs = {name: kv_static.inspect(load(file)) for name, file in files.items()}
    if as_json:
        emit(specs)
        return
    for name, spec in specs.items():
        if isinstance(spec, KVCacheSpec):
            click.echo(report.format_kv_caches(name, spec))
