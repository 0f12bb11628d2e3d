"""List what `--gpu` takes, and the GPUs of this machine."""

from __future__ import annotations

import click

from ryzen_compile.cli.console import console_options, emit, format_table


@click.command("targets")
@console_options
def command(verbosity: int, as_json: bool) -> None:
    """List what `--gpu` takes: names, compute capability, memory and bandwidth, and which backends build for it here."""
    from ryzen_compile import registry
    from ryzen_compile.spec.target import ARCHITECTURES, detect_gpus, products

    backends = {name: registry.find_backend(name).probe() for name in registry.names("backends")}
    here = detect_gpus()
    builders = {sm: [name for name, can in backends.items() if can.available and sm in can.sms] for sm in sorted(ARCHITECTURES)}
    if as_json:
        emit({"here": here, "builders": {f"sm{sm}": names for sm, names in builders.items()}, "products": products()})
        return
    for gpu in here:
        click.echo(f"here: {gpu.name} (sm{gpu.sm}, {gpu.memory_bytes / 1e9:.0f} GB, driver {gpu.driver})")
    if not here:
        click.echo("here: no NVIDIA GPU; `--gpu auto` builds for the CPU, `--gpu sm86,sm89,sm120` cross-compiles")
    click.echo()
    rows = [(f"sm{sm}", name, ", ".join(builders[sm]) or "no backend here") for sm, name in sorted(ARCHITECTURES.items())]
    click.echo(format_table([("cpu", "", "onnxruntime"), *rows], header=("target", "architecture", "built here by")))
    click.echo()
    products_ = sorted(products().items(), key=lambda item: (item[1].sm, item[0]))
    lines = [
        (key, f"sm{one.sm}", f"{one.memory_gb:g} GB", f"{one.bandwidth_gb_s:g} GB/s", one.description) for key, one in products_
    ]
    click.echo(format_table(lines, header=("product", "is", "memory", "bandwidth", "")))
    click.echo("\nAppend @windows to build for that system: sm89@windows")
