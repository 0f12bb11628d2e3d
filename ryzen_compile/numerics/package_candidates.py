"""The subjects of a package: its shipped bytes, digests checked; what cannot run here is named, never counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ryzen_compile import registry
from ryzen_compile.artifacts.package.manifest import Engine, Graph, Variant
from ryzen_compile.artifacts.package.read import Package, read
from ryzen_compile.errors import UsageError, did_you_mean
from ryzen_compile.numerics.candidate import Open, Run, Subject
from ryzen_compile.numerics.onnx_candidates import feeding, open_graph, spell_graph
from ryzen_compile.runtime.choose import misfit
from ryzen_compile.spec.target import Gpu, detect


def of_package(path: Path, *, graph: str | None = None, which: str | None = None) -> tuple[Subject, ...]:
    """Return what of the package at `path` can be executed here, in the order of the manifest.

    `graph` limits it to one graph; `which` to a variant by its name, or to engines by a backend, a file name or a path. Each
    variant of a graph is a subject; so is each engine that this machine can run. An engine that it cannot run is named in
    `not_executed` of the variant that it was built from. Raises UsageError for unknown names, PackageError for damage.
    """
    package = read(path)
    graphs = package.manifest.graphs
    if graph is not None and graph not in {one.name for one in graphs}:
        raise UsageError(f"`{path}` holds no graph `{graph}`", hint=did_you_mean(graph, [one.name for one in graphs]))
    found: list[Subject] = []
    absent: list[str] = []
    gpus = detect()
    for one in graphs:
        if graph is None or one.name == graph:
            found += _of_graph(package, one, which, gpus, absent)
    if found:
        return tuple(found)
    if absent:
        raise UsageError(f"`{path}@{which}` cannot be executed here: {'; '.join(absent)}", hint="name a variant instead")
    known = [variant.name for one in graphs for variant in one.variants]
    known += [word for engine in package.manifest.engines for word in (engine.backend, Path(engine.path).name)]
    raise UsageError(
        f"`{path}` holds no variant or engine `{which}`", hint=did_you_mean(which or "", list(dict.fromkeys(known)))
    )


def _of_graph(package: Package, graph: Graph, which: str | None, gpus: Sequence[Gpu], absent: list[str]) -> Iterator[Subject]:
    engines = [engine for engine in package.manifest.engines if engine.graph == graph.name]
    reasons = {engine.path: misfit(engine, tuple(gpus)) for engine in engines}
    for variant in graph.variants:
        built = [engine for engine in engines if engine.variant == variant.name]
        waiting = tuple(f"{engine.path}: {reason}" for engine in built if (reason := reasons[engine.path]) is not None)
        if which in (None, variant.name):
            yield _of_variant(package, graph, variant, waiting)
    for engine in engines:
        if which in (None, engine.backend, engine.path, Path(engine.path).name, Path(engine.path).stem):
            reason = reasons[engine.path]
            if reason is None:
                yield _of_engine(package, graph, engine, gpus)
            else:
                absent.append(f"{engine.path}: {reason}")


def _of_variant(package: Package, graph: Graph, variant: Variant, waiting: tuple[str, ...]) -> Subject:
    path = package.path / variant.path
    return Subject(
        name=_name(package, graph, variant.name),
        executed=f"{package.path.name}: {spell_graph(variant.path, variant.precision)}",
        interface=graph.interface,
        open=_verified(package, (variant.path, *variant.weights), open_graph(path, variant.precision)),
        precision=variant.precision,
        profiles=graph.profiles,
        portable=variant.portable,
        graph=graph.name,
        part=variant.path,
        not_executed=waiting,
    )


def _of_engine(package: Package, graph: Graph, engine: Engine, gpus: Sequence[Gpu]) -> Subject:
    sms = {target.sm for target in engine.targets}
    device = next(gpu.name for gpu in gpus if gpu.sm in sms)
    precision = next(variant.precision for variant in graph.variants if variant.name == engine.variant)

    @contextmanager
    def opened() -> Iterator[Run]:
        with registry.find_backend(engine.backend).open(str(package.path / engine.path)) as session:
            yield feeding(session)

    return Subject(
        name=_name(package, graph, Path(engine.path).stem),
        executed=f"{package.path.name}: {engine.path}, by {engine.backend} {engine.backend_version}",
        interface=graph.interface,
        open=_verified(package, (engine.path,), opened),
        precision=precision,
        where=device,
        profiles=engine.profiles,
        graph=graph.name,
        part=engine.path,
    )


def _verified(package: Package, files: Sequence[str], open_: Open) -> Open:
    """Let `open_` run only after the digests of `files` were checked."""

    @contextmanager
    def opened() -> Iterator[Run]:
        package.verify_digests(*files)
        with open_() as run:
            yield run

    return opened


def _name(package: Package, graph: Graph, what: str) -> str:
    several = len(package.manifest.graphs) > 1
    return f"{package.path}{f'#{graph.name}' if several else ''}@{what}"


def variant_of(path: Path, *, graph: str | None = None, which: str | None = None) -> tuple[Graph, Variant]:
    """Return the variant that a comparison of this package runs first; raises UsageError for unknown names."""
    package = read(path)
    part = of_package(path, graph=graph, which=which)[0].part
    for one in package.manifest.graphs:
        for variant in one.variants:
            if variant.path == part:
                return one, variant
    raise UsageError(f"`{path}@{which}` is an engine", hint="name the variant that it was built from")
