"""Which file of a package serves a graph on this machine, and why not the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ryzen_compile import registry
from ryzen_compile.errors import PackageError, UsageError, did_you_mean
from ryzen_compile.spec.target import detect, here

if TYPE_CHECKING:
    from ryzen_compile.artifacts.package.manifest import Engine, Graph, Manifest, Variant
    from ryzen_compile.spec.target import Gpu


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What serves a graph here."""

    backend: str
    path: str
    """Relative to the package."""
    files: tuple[str, ...]
    """Every file that is read: their digests are checked first."""
    says: str
    """What was chosen and why, in one line."""
    passed_over: tuple[str, ...]
    """What was not chosen, each with its reason."""


def choose(manifest: Manifest, graph: str | None, backend: str | None) -> tuple[Graph, Choice]:
    """Return the graph and what serves it here: the best engine for a GPU of this machine, else the portable graph.

    `backend` limits the choice to one backend. Raises UsageError for a graph that the package does not hold and PackageError
    when nothing in it can run here.
    """
    chosen = _graph(manifest, graph)
    gpus = detect()
    passed_over: list[str] = []
    for engine in manifest.engines:
        if engine.graph != chosen.name or backend not in (None, engine.backend):
            continue
        reason = misfit(engine, gpus)
        if reason is None:
            on = next(gpu.name for gpu in gpus if gpu.sm in {target.sm for target in engine.targets})
            says = f"{engine.path} by {engine.backend} on {on}"
            return chosen, Choice(
                backend=engine.backend, path=engine.path, files=(engine.path,), says=says, passed_over=tuple(passed_over)
            )
        passed_over.append(f"{engine.path}: {reason}")
    if backend in (None, "onnxruntime"):
        for variant in chosen.variants:
            if variant.portable:
                says = f"{variant.path} by onnxruntime"
                if passed_over:
                    says += f", because no engine fits: {'; '.join(passed_over)}"
                return chosen, Choice(
                    backend="onnxruntime",
                    path=variant.path,
                    files=_files(variant),
                    says=says,
                    passed_over=tuple(passed_over),
                )
    raise PackageError(
        f"nothing in this package can run `{chosen.name}` here" + "".join(f"; {reason}" for reason in passed_over),
        hint="build it for this machine: --gpu auto" + (f", or leave out the backend `{backend}`" if backend else ""),
    )


def together(choices: Sequence[Choice]) -> Choice:
    """Return one choice that tells of all `choices`, whose graphs one engine runs."""
    if len(choices) == 1:
        return choices[0]
    return Choice(
        backend=choices[0].backend,
        path=choices[0].path,
        files=tuple(dict.fromkeys(file for one in choices for file in one.files)),
        says="; ".join(one.says for one in choices),
        passed_over=tuple(reason for one in choices for reason in one.passed_over),
    )


def _files(variant: Variant) -> tuple[str, ...]:
    return (variant.path, *variant.weights)


def _graph(manifest: Manifest, name: str | None) -> Graph:
    names = [graph.name for graph in manifest.graphs]
    if name is None and len(names) == 1:
        return manifest.graphs[0]
    if name is None:
        raise UsageError("this package holds several graphs", hint=f"name one of {', '.join(names)}")
    if name not in names:
        raise UsageError(f"this package holds no graph `{name}`", hint=did_you_mean(name, names))
    return manifest.graph(name)


def misfit(engine: Engine, gpus: tuple[Gpu, ...]) -> str | None:
    """Return why `engine` cannot run here, or None."""
    built_for = ", ".join(map(str, engine.targets))
    if not gpus:
        return f"built for {built_for}, and no GPU driver is here"
    if here() not in {target.os for target in engine.targets}:
        return f"built for {built_for}, this is {here()}"
    if not {gpu.sm for gpu in gpus} & {target.sm for target in engine.targets}:
        return f"built for {built_for}, this machine has {', '.join(f'{gpu.name} (sm{gpu.sm})' for gpu in gpus)}"
    capabilities = registry.find_backend(engine.backend).probe()
    if not capabilities.can_run:
        return f"{engine.backend}: {capabilities.says}"
    if capabilities.version is not None and _release(capabilities.version) != _release(engine.backend_version):
        return f"built by {engine.backend} {engine.backend_version}, this machine has {capabilities.version}"
    return None


def _release(version: str) -> tuple[str, ...]:
    """Return the parts of a version that an engine is bound to: TensorRT plans load in the release that built them."""
    return tuple(version.split(".")[:3])
