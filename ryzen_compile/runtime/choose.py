"""The choice of the file of a package that runs a graph on this machine, with the reasons against the other files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ryzen_compile import registry
from ryzen_compile.artifacts.package.diagnostics import accuracy_warning
from ryzen_compile.artifacts.package.reference import default_variant, find_graph, find_variant_name
from ryzen_compile.backends.cuda_device import CudaDevice, current_device
from ryzen_compile.backends.traits import portable_backend
from ryzen_compile.errors import PackageError
from ryzen_compile.spec.target import detect_gpus, host_os

if TYPE_CHECKING:
    from ryzen_compile.artifacts.package.manifest import EngineRecord, GraphRecord, Manifest, VariantRecord
    from ryzen_compile.diagnostic import Diagnostic
    from ryzen_compile.spec.target import Gpu


@dataclass(frozen=True, kw_only=True)
class EngineChoice:
    """The file and the backend that run a graph on this machine."""

    backend: str
    path: str
    """The engine or the portable variant, relative to the package."""
    files: tuple[str, ...]
    """Every file that loading reads, relative to the package; their digests are checked first."""
    summary: str
    """The chosen file, the backend and the reason, in one line."""
    not_chosen: tuple[str, ...]
    """The engines that were not chosen, each with the reason."""
    variant: str | None = None
    """The name of the variant; None for a file that is not part of a package."""
    gpu: str | None = None
    """The name of the GPU that executes the engine; None for a portable variant."""
    warnings: tuple[Diagnostic, ...] = ()
    """The criteria that the file does not meet."""


def choose(manifest: Manifest, graph: str | None, variant: str | None, backend: str | None) -> tuple[GraphRecord, EngineChoice]:
    """Return the record of `graph` and the file that runs it: an engine that fits, else the portable variant.

    `variant` is the name of a variant, or a beginning of it that no other variant has; only its engines, or its graph if it is
    portable, are chosen. Without it, the variants are the defaults: the first of each backend.

    An engine fits if it was built for the CPU or for exactly the compute capability of the GPU that executes it, for the
    operating system of this machine, and by the installed release of its backend. The executing GPU is CUDA's current device:
    an engine for another GPU of the machine does not fit. If several engines fit, the first one in the package is chosen; a
    narrower precision or a newer backend is no reason to prefer an engine: neither guarantees that it is faster or more
    accurate.

    `backend` restricts the choice to one backend. Raises UsageError for a graph or a variant that the package does not contain,
    PackageError if no file of the graph, or of the variant, can run on this machine.
    """
    record, choice = _choose_file(manifest, graph, variant, backend)
    warning = accuracy_warning(manifest, choice.path)
    return record, replace(choice, warnings=() if warning is None else (warning,))


def _choose_file(
    manifest: Manifest, graph: str | None, variant: str | None, backend: str | None
) -> tuple[GraphRecord, EngineChoice]:
    """Return the choice of `choose` without its warnings."""
    record = find_graph(manifest, graph)
    name = find_variant_name(record, variant) if variant is not None else None
    gpus = detect_gpus()
    device = current_device(gpus)
    fitting: list[EngineRecord] = []
    incompatible: list[str] = []
    not_chosen: list[str] = []
    for engine in manifest.engines:
        if engine.graph != record.name or backend not in (None, engine.backend):
            continue
        if engine.variant != _selected_name(record, name, engine.backend):
            not_chosen.append(f"{engine.path}: {_reason_against(name)}")
        elif (reason := incompatibility(engine, gpus, device)) is not None:
            incompatible.append(f"{engine.path}: {reason}")
        else:
            fitting.append(engine)
    if fitting:
        return record, _choose_engine(record, fitting, device, [*incompatible, *not_chosen], is_named=name is not None)
    portable = portable_backend()
    selected = _selected_name(record, name, portable)
    for variant_record in record.variants:
        if variant_record.portable and variant_record.name == selected and backend in (None, portable):
            summary = (
                f"{variant_record.path} by {portable}{_describe_variant(record, variant_record, is_named=name is not None)}"
            )
            if incompatible:
                summary += f", as no engine can run here: {'; '.join(incompatible)}"
            return record, EngineChoice(
                backend=portable,
                path=variant_record.path,
                variant=variant_record.name,
                files=_files(variant_record),
                summary=summary,
                not_chosen=(*incompatible, *not_chosen),
            )
    raise _nothing_runs(record, name, backend, incompatible)


def _selected_name(graph: GraphRecord, name: str | None, backend: str) -> str | None:
    """Return the name of the variant for `backend` to choose: `name`, or that of the default; None if there is none."""
    default = default_variant(graph.variants, backend)
    return name if name is not None or default is None else default.name


def _reason_against(name: str | None) -> str:
    if name is None:
        return "its variant is not the default; it is loaded by name"
    return f"it is of another variant than `{name}`"


def _describe_variant(graph: GraphRecord, variant: VariantRecord, *, is_named: bool) -> str:
    """Return why `variant` is chosen as a part of a summary; empty if its backend has no other."""
    count = sum(other.backend == variant.backend for other in graph.variants)
    if is_named:
        return f", variant {variant.name} as named"
    return f", variant {variant.name}, the default of {count}" if count > 1 else ""


def _nothing_runs(graph: GraphRecord, name: str | None, backend: str | None, incompatible: Sequence[str]) -> PackageError:
    part = f"`{graph.name}`" if name is None else f"variant `{name}` of `{graph.name}`"
    hints = ["build it for this machine: --gpu auto"]
    if backend:
        hints.append(f"do not select the backend `{backend}`")
    portable_forms = {variant.portable_form for variant in graph.variants if variant.name == name} - {None, name}
    hints += [f"load `{form}`, its portable variant" for form in sorted(filter(None, portable_forms))]
    return PackageError(
        f"nothing in this package can run {part} on this machine" + "".join(f"; {reason}" for reason in incompatible),
        hint=", or ".join(hints),
    )


def _choose_engine(
    graph: GraphRecord, fitting: Sequence[EngineRecord], device: CudaDevice | None, not_chosen: Sequence[str], *, is_named: bool
) -> EngineChoice:
    """Return the choice of the first of the engines that fit this machine; `device` executes those that need a GPU."""
    engine, *others = fitting
    rank = f"the first of {len(fitting)} engines built" if others else "built"
    gpu = device if needs_gpu(engine) else None
    variant = next(item for item in graph.variants if (item.name, item.backend) == (engine.variant, engine.backend))
    reason = _describe_variant(graph, variant, is_named=is_named)
    return EngineChoice(
        backend=engine.backend,
        path=engine.path,
        variant=engine.variant,
        files=(engine.path,),
        summary=f"{engine.path} by {engine.backend}{reason}, {rank} for {f'sm{gpu.sm}, on {gpu.name}' if gpu else 'cpu'}",
        not_chosen=(
            *not_chosen,
            *(f"{other.path}: it can run here, but `{engine.path}` comes first in the package" for other in others),
        ),
        gpu=gpu.name if gpu else None,
    )


def merge_choices(choices: Sequence[EngineChoice]) -> EngineChoice:
    """Return one choice that combines `choices`, those of the step graphs that one engine runs."""
    if len(choices) == 1:
        return choices[0]
    return EngineChoice(
        backend=choices[0].backend,
        path=choices[0].path,
        variant=choices[0].variant,
        files=tuple(dict.fromkeys(file for choice in choices for file in choice.files)),
        summary="; ".join(choice.summary for choice in choices),
        not_chosen=tuple(reason for choice in choices for reason in choice.not_chosen),
        gpu=choices[0].gpu,
        warnings=tuple(warning for choice in choices for warning in choice.warnings),
    )


def _files(variant: VariantRecord) -> tuple[str, ...]:
    return (variant.path, *variant.weights)


def incompatibility(engine: EngineRecord, gpus: Sequence[Gpu], device: CudaDevice | None) -> str | None:
    """Return why `engine` cannot run in this process on a machine with `gpus`, or None if it can.

    `device` is the GPU that executes engines, see `backends.cuda_device.current_device`; None if there is no GPU.
    """
    targets = " or ".join(map(str, engine.targets))
    sms = {target.sm for target in engine.targets}
    on_gpu = needs_gpu(engine)
    if on_gpu and device is None and gpus:
        return f"the engine needs {targets}, and CUDA_VISIBLE_DEVICES hides every GPU from this process"
    if on_gpu and device is None:
        return f"the engine needs {targets}, and no NVIDIA driver was found"
    if host_os() not in {target.os for target in engine.targets}:
        return f"the engine needs {targets}, and this machine runs {host_os()}"
    if on_gpu and device is not None and device.sm not in sms:
        reason = f"the engine needs {targets}, and the current GPU is {device.name} (sm{device.sm})"
        if any(gpu.sm in sms for gpu in gpus):
            reason += "; set CUDA_VISIBLE_DEVICES to use another GPU of this machine"
        return reason
    backend = registry.backends().get(engine.backend)
    if backend is None:
        not_installed = f"the engine needs the backend `{engine.backend}`, which is not installed"
        return registry.broken_members("backends").get(engine.backend, not_installed)
    capabilities = backend.probe()
    if not capabilities.can_run:
        return f"`{engine.backend}` cannot run engines on this machine: {capabilities.message}"
    if capabilities.version is not None and _release_version(capabilities.version) != _release_version(engine.backend_version):
        return f"the engine needs {engine.backend} {engine.backend_version}, and this machine has {capabilities.version}"
    return None


def needs_gpu(engine: EngineRecord) -> bool:
    """Return whether `engine` was built for GPUs only."""
    return not any(target.is_cpu for target in engine.targets)


def _release_version(version: str) -> tuple[str, ...]:
    """Return the first three parts of a version: a TensorRT plan can be loaded only by the release that built it."""
    return tuple(version.split(".")[:3])
