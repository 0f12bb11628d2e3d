"""List the targets that `--gpu` accepts, and the GPUs of this machine."""

from __future__ import annotations

import click

from ryzen_compile.cli.console import ConsoleProgress, console_options, emit
from ryzen_compile.report.formatting import format_table

SECTION = "Inspect"


@click.command("targets")
@console_options
def command(verbosity: int, as_json: bool) -> None:
    """List the targets that `--gpu` accepts: compute capability, memory, bandwidth, and the backends that build for them."""
    from ryzen_compile import registry
    from ryzen_compile.backends.traits import traits_by_priority
    from ryzen_compile.spec.target import ARCHITECTURES, detect_gpus, products

    ConsoleProgress(verbosity).report_unavailable(registry.broken_members("backends").values())
    backends = {traits.name: registry.find_backend(traits.name).probe() for traits in traits_by_priority()}
    gpus = detect_gpus()
    builders = {
        sm: [name for name, capabilities in backends.items() if capabilities.available and sm in capabilities.sms]
        for sm in sorted(ARCHITECTURES)
    }
    if as_json:
        emit({"here": gpus, "builders": {f"sm{sm}": names for sm, names in builders.items()}, "products": products()})
        return
    for gpu in gpus:
        click.echo(f"this machine: {gpu.name} (sm{gpu.sm}, {gpu.memory_bytes / 1e9:.0f} GB, driver {gpu.driver})")
    if not gpus:
        click.echo("this machine: no NVIDIA GPU; `--gpu auto` builds for the CPU, `--gpu sm86,sm89,sm120` cross-compiles")
    click.echo()
    rows = [
        (f"sm{sm}", name, ", ".join(builders[sm]) or "no backend on this machine") for sm, name in sorted(ARCHITECTURES.items())
    ]
    cpu_builders = [name for name, capabilities in backends.items() if capabilities.available and capabilities.cpu]
    cpu_row = ("cpu", "", ", ".join(cpu_builders) or "no backend on this machine")
    click.echo(format_table([cpu_row, *rows], header=("target", "architecture", "backends on this machine")))
    click.echo()
    by_capability = sorted(products().items(), key=lambda item: (item[1].sm, item[0]))
    product_rows = [
        (name, f"sm{product.sm}", f"{product.memory_gb:g} GB", f"{product.bandwidth_gb_s:g} GB/s", product.description)
        for name, product in by_capability
    ]
    click.echo(format_table(product_rows, header=("product", "target", "memory", "bandwidth", "")))
    click.echo("\nAppend @windows to build for Windows: sm89@windows")
