"""Show the contents of a package, or what an ONNX file takes and returns."""

from __future__ import annotations

import click

from ryzen_compile.cli.console import console_options, emit, print_json
from ryzen_compile.diagnostic import Diagnostic

SECTION = "Inspect"


@click.command("inspect")
@click.argument("package", required=False)
@click.option("--check", is_flag=True, help="Also verify the digest of every file.")
@click.option("--schema", is_flag=True, help="Print the JSON Schema of manifests instead.")
@click.option("--kv", is_flag=True, help="Show the KV caches of a decoder instead; PACKAGE may be an ONNX file.")
@console_options
def command(package: str | None, check: bool, schema: bool, kv: bool, verbosity: int, as_json: bool) -> None:
    """Show the contents of PACKAGE, or of an ONNX file: graphs, pipelines, accuracy, engines, provenance and refused targets.

    model.ryzen#GRAPH@VARIANT shows one graph or one variant.
    """
    from ryzen_compile.artifacts.package.diagnostics import package_diagnostics
    from ryzen_compile.artifacts.package.read import Package, read_package
    from ryzen_compile.artifacts.package.reference import parse_package_reference, restrict
    from ryzen_compile.errors import UsageError, printable
    from ryzen_compile.report import text as report
    from ryzen_compile.report.diagnostics import format_diagnostics
    from ryzen_compile.utils.files import is_onnx_file

    if schema:
        from ryzen_compile.artifacts.package.schema import schema as manifest_schema

        print_json(manifest_schema())
        return
    if package is None:
        raise UsageError("no package is given", hint="ryzen-compile inspect model.ryzen")
    is_file = is_onnx_file(package)
    if check and (kv or is_file):
        raise UsageError(
            f"--check verifies the digests of a package{', and an ONNX file has none' if is_file else ''}",
            hint=f"leave {'--kv' if kv and not is_file else '--check'} out",
        )
    if kv:
        _print_kv_caches(package, as_json=as_json)
        return
    if is_file:
        _print_onnx_file(package, as_json=as_json)
        return
    reference = parse_package_reference(package)
    contents = read_package(reference.path)
    if check:
        contents.check()
    shown = Package(contents.path, restrict(contents.manifest, reference), contents.inode_id)
    unlisted = [
        Diagnostic(code="unlisted-file", severity="warning", message="not part of the package", location=printable(name))
        for name in contents.unlisted_files()
    ]
    if as_json:
        emit(
            {"path": str(shown.path), "manifest": shown.manifest},
            (*package_diagnostics(shown.manifest, severity="warning"), *unlisted),
        )
        return
    click.echo(report.format_package(shown) if verbosity > 0 else report.format_package_brief(contents, shown.manifest))
    if check:
        click.echo(f"\nall {len(contents.manifest.files)} digests are correct")
    if unlisted:
        click.echo(format_diagnostics(unlisted))


def _print_onnx_file(path: str, *, as_json: bool) -> None:
    """Print what an ONNX file takes and returns, and the ops that it holds."""
    from collections import Counter

    from ryzen_compile.ir.analysis.constants import constant_node_tensor
    from ryzen_compile.ir.interface_metadata import interface_of
    from ryzen_compile.ir.load import load
    from ryzen_compile.report.formatting import format_size
    from ryzen_compile.report.text import format_role

    model = load(path)
    interface = interface_of(model)
    ops = Counter(node.op_type for node in model.graph.all_nodes())
    constants = [tensor for node in model.graph.all_nodes() if (tensor := constant_node_tensor(node)) is not None]
    weights = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    weight_bytes = sum(tensor.nbytes for tensor in (*weights, *constants))
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx"))
    if as_json:
        emit({"path": path, "interface": interface, "opset": opset, "ops": dict(ops), "weight_bytes": weight_bytes})
        return
    version = "no standard opset" if opset is None else f"opset {opset}"
    click.echo(f"{path}: {version}, {ops.total()} nodes, {format_size(weight_bytes)} of weights")
    click.echo("\n".join(f"  input {spec}, {format_role(spec)}" for spec in interface.inputs))
    click.echo("\n".join(f"  output {spec}" for spec in interface.outputs))
    click.echo("  ops " + ", ".join(f"{name} {count}" for name, count in ops.most_common()))
    click.echo(f"next: ryzen-compile build {path} --gpu cpu")


def _print_kv_caches(text: str, *, as_json: bool) -> None:
    """Print the KV caches of an ONNX file, or of the selected variants of a package, by default the portable ones."""
    from pathlib import Path

    from ryzen_compile import registry
    from ryzen_compile.artifacts.package.read import read_package
    from ryzen_compile.artifacts.package.reference import parse_package_reference, select
    from ryzen_compile.ir.load import load
    from ryzen_compile.report import text as report
    from ryzen_compile.spec.kv_cache import KVCacheSpec
    from ryzen_compile.spec.pass_abilities import Inspectable

    reference = parse_package_reference(text)
    files = {Path(text).name: Path(text)}
    if reference.path.is_dir():
        package = read_package(reference.path)
        variants = [
            (selection.graph.name, variant)
            for selection in select(package.manifest, reference)
            for variant in selection.variants
            if variant.portable or reference.selector is not None
        ]
        graphs = [graph for graph, _ in variants]
        files = {
            graph if graphs.count(graph) == 1 else f"{graph}@{variant.name}": Path(package.path, variant.path)
            for graph, variant in variants
        }
    kv_static = registry.find_pass("kv-static")
    assert issubclass(kv_static, Inspectable)
    specs = {name: kv_static.inspect(load(file)) for name, file in files.items()}
    if as_json:
        emit({"kv_caches": specs})
        return
    for name, spec in specs.items():
        if isinstance(spec, KVCacheSpec):
            click.echo(report.format_kv_caches(name, spec))
