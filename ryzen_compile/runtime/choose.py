"""The choice of the file of a package that runs a graph on this machine, with the reasons against the other files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ryzen_compile import registry
from ryzen_compile.backends.cuda_device import CudaDevice, current_device
from ryzen_compile.backends.traits import portable_backend
from ryzen_compile.errors import PackageError, UsageError, did_you_mean
from ryzen_compile.spec.target import detect_gpus, host_os

if TYPE_CHECKING:
    from ryzen_compile.artifacts.package.manifest import EngineRecord, GraphRecord, Manifest, VariantRecord
    from ryzen_compile.spec.target import Gpu


@dataclass(frozen=True, kw_only=True)
class EngineChoice:
    """The file and the backend that run a graph on this machine."""

    backend: str
    path: str
    """The engine or the portable graph, relative to the package."""
    files: tuple[str, ...]
    """Every file that loading reads, relative to the package; their digests are checked first."""
    summary: str
    """The chosen file, the backend and the reason, in one line."""
    rejected: tuple[str, ...]
    """The engines that were not chosen, each with the reason."""
    gpu: str | None = None
    """The name of the GPU that executes the engine; None for a portable graph."""


def choose(manifest: Manifest, graph: str | None, backend: str | None) -> tuple[GraphRecord, EngineChoice]:
    """Return the record of `graph` and the file that runs it: an engine that fits, else the portable graph.

    An engine fits if it was built for the CPU or for exactly the compute capability of the GPU that executes it, for the
    operating system of this machine, and by the installed release of its backend. The executing GPU is CUDA's current device:
    an engine for another GPU of the machine does not fit. If several engines fit, the first one in the package is chosen; a
    narrower precision or a newer backend is no reason to prefer an engine: neither guarantees that it is faster or more
    accurate.

    `backend` restricts the choice to one backend. Raises UsageError for a graph that the package does not contain, PackageError
    if no file of the graph can run on this machine.
    """
    record = _find_graph(manifest, graph)
    gpus = detect_gpus()
    device = current_device(gpus)
    fitting: list[EngineRecord] = []
    rejected: list[str] = []
    for engine in manifest.engines:
        if engine.graph != record.name or backend not in (None, engine.backend):
            continue
        reason = incompatibility(engine, gpus, device)
        if reason is None:
            fitting.append(engine)
        else:
            rejected.append(f"{engine.path}: {reason}")
    if fitting:
        return record, _choose_engine(fitting, device, rejected)
    portable = portable_backend()
    if backend in (None, portable):
        for variant in record.variants:
            if variant.portable:
                summary = f"{variant.path} by {portable}"
                if rejected:
                    summary += f", as no engine can run here: {'; '.join(rejected)}"
                return record, EngineChoice(
                    backend=portable,
                    path=variant.path,
                    files=_files(variant),
                    summary=summary,
                    rejected=tuple(rejected),
                )
    raise PackageError(
        f"nothing in this package can run `{record.name}` on this machine" + "".join(f"; {reason}" for reason in rejected),
        hint="build it for this machine: --gpu auto" + (f", or do not select the backend `{backend}`" if backend else ""),
    )


def _choose_engine(fitting: Sequence[EngineRecord], device: CudaDevice | None, rejected: Sequence[str]) -> EngineChoice:
    """Return the choice of the first of the engines that fit this machine; `device` executes those that need a GPU."""
    engine, *others = fitting
    rank = f"the first of {len(fitting)} engines built" if others else "built"
    gpu = device if needs_gpu(engine) else None
    return EngineChoice(
        backend=engine.backend,
        path=engine.path,
        files=(engine.path,),
        summary=f"{engine.path} by {engine.backend}, {rank} for {f'sm{gpu.sm}, on {gpu.name}' if gpu else 'cpu'}",
        rejected=(
            *rejected,
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
        files=tuple(dict.fromkeys(file for choice in choices for file in choice.files)),
        summary="; ".join(choice.summary for choice in choices),
        rejected=tuple(reason for choice in choices for reason in choice.rejected),
        gpu=choices[0].gpu,
    )


def _files(variant: VariantRecord) -> tuple[str, ...]:
    return (variant.path, *variant.weights)


def _find_graph(manifest: Manifest, name: str | None) -> GraphRecord:
    names = [graph.name for graph in manifest.graphs]
    if name is None and len(names) == 1:
        return manifest.graphs[0]
    if name is None:
        raise UsageError("this package contains several graphs", hint=f"name one of {', '.join(names)}")
    if name not in names:
        raise UsageError(f"this package contains no graph `{name}`", hint=did_you_mean(name, names))
    return manifest.graph(name)


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
    if engine.backend not in registry.names("backends"):
        return f"the engine needs the backend `{engine.backend}`, which is not installed"
    capabilities = registry.find_backend(engine.backend).probe()
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
