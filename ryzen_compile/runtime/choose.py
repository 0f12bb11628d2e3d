"""Which file of a package serves a graph on this machine, and why not the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ryzen_compile import registry
from ryzen_compile.errors import PackageError, UsageError, did_you_mean
from ryzen_compile.spec.target import detect_gpus, host_os

if TYPE_CHECKING:
    from ryzen_compile.artifacts.package.manifest import EngineRecord, GraphRecord, Manifest, VariantRecord
    from ryzen_compile.spec.target import Gpu


@dataclass(frozen=True, kw_only=True)
class EngineChoice:
    """What serves a graph here."""

    backend: str
    path: str
    """Relative to the package."""
    files: tuple[str, ...]
    """Every file that is read: their digests are checked first."""
    summary: str
    """What was chosen and why, in one line."""
    rejected: tuple[str, ...]
    """What was not chosen, each with its reason."""


def choose(manifest: Manifest, graph: str | None, backend: str | None) -> tuple[GraphRecord, EngineChoice]:
    """Return the graph and what serves it here: the best engine for a GPU of this machine, else the portable graph.

    `backend` limits the choice to one backend. Raises UsageError for a graph that the package does not hold and PackageError
    when nothing in it can run here.
    """
    chosen = _find_graph(manifest, graph)
    gpus = detect_gpus()
    passed_over: list[str] = []
    for engine in manifest.engines:
        if engine.graph != chosen.name or backend not in (None, engine.backend):
            continue
        reason = incompatibility(engine, gpus)
        if reason is None:
            on = next(gpu.name for gpu in gpus if gpu.sm in {target.sm for target in engine.targets})
            says = f"{engine.path} by {engine.backend} on {on}"
            return chosen, EngineChoice(
                backend=engine.backend, path=engine.path, files=(engine.path,), summary=says, rejected=tuple(passed_over)
            )
        passed_over.append(f"{engine.path}: {reason}")
    if backend in (None, "onnxruntime"):
        for variant in chosen.variants:
            if variant.portable:
                says = f"{variant.path} by onnxruntime"
                if passed_over:
                    says += f", because no engine fits: {'; '.join(passed_over)}"
                return chosen, EngineChoice(
                    backend="onnxruntime",
                    path=variant.path,
                    files=_files(variant),
                    summary=says,
                    rejected=tuple(passed_over),
                )
    raise PackageError(
        f"nothing in this package can run `{chosen.name}` here" + "".join(f"; {reason}" for reason in passed_over),
        hint="build it for this machine: --gpu auto" + (f", or leave out the backend `{backend}`" if backend else ""),
    )


def merge_choices(choices: Sequence[EngineChoice]) -> EngineChoice:
    """Return one choice that tells of all `choices`, whose graphs one engine runs."""
    if len(choices) == 1:
        return choices[0]
    return EngineChoice(
        backend=choices[0].backend,
        path=choices[0].path,
        files=tuple(dict.fromkeys(file for one in choices for file in one.files)),
        summary="; ".join(one.summary for one in choices),
        rejected=tuple(reason for one in choices for reason in one.rejected),
    )


def _files(variant: VariantRecord) -> tuple[str, ...]:
    return (variant.path, *variant.weights)


def _find_graph(manifest: Manifest, name: str | None) -> GraphRecord:
    names = [graph.name for graph in manifest.graphs]
    if name is None and len(names) == 1:
        return manifest.graphs[0]
    if name is None:
        raise UsageError("this package holds several graphs", hint=f"name one of {', '.join(names)}")
    if name not in names:
        raise UsageError(f"this package holds no graph `{name}`", hint=did_you_mean(name, names))
    return manifest.graph(name)


def incompatibility(engine: EngineRecord, gpus: tuple[Gpu, ...]) -> str | None:
    """Return why `engine` cannot run here, or None."""
    built_for = ", ".join(map(str, engine.targets))
    if not gpus:
        return f"built for {built_for}, and no GPU driver is here"
    if host_os() not in {target.os for target in engine.targets}:
        return f"built for {built_for}, this is {host_os()}"
    if not {gpu.sm for gpu in gpus} & {target.sm for target in engine.targets}:
        return f"built for {built_for}, this machine has {', '.join(f'{gpu.name} (sm{gpu.sm})' for gpu in gpus)}"
    capabilities = registry.find_backend(engine.backend).probe()
    if not capabilities.can_run:
        return f"{engine.backend}: {capabilities.message}"
    if capabilities.version is not None and _release_version(capabilities.version) != _release_version(engine.backend_version):
        return f"built by {engine.backend} {engine.backend_version}, this machine has {capabilities.version}"
    return None


def _release_version(version: str) -> tuple[str, ...]:
    """Return the parts of a version that an engine is bound to: TensorRT plans load in the release that built them."""
    return tuple(version.split(".")[:3])
