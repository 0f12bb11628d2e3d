"""The subjects of a package: its shipped bytes, digests checked; what cannot run here is named, never counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ryzen_compile import registry
from ryzen_compile.artifacts.package.manifest import EngineRecord, GraphRecord, VariantRecord
from ryzen_compile.artifacts.package.read import Package, read_package
from ryzen_compile.errors import UsageError, did_you_mean
from ryzen_compile.numerics.candidate import Candidate, OpenFunction, RunFunction
from ryzen_compile.numerics.onnx_candidates import as_run_function, describe_graph, open_graph
from ryzen_compile.runtime.choose import incompatibility
from ryzen_compile.spec.target import Gpu, detect_gpus


def package_candidates(path: Path, *, graph: str | None = None, selector: str | None = None) -> tuple[Candidate, ...]:
    """Return what of the package at `path` can be executed here, in the order of the manifest.

    `graph` limits it to one graph; `which` to a variant by its name, or to engines by a backend, a file name or a path. Each
    variant of a graph is a subject; so is each engine that this machine can run. An engine that it cannot run is named in
    `not_executed` of the variant that it was built from. Raises UsageError for unknown names, PackageError for damage.
    """
    package = read_package(path)
    graphs = package.manifest.graphs
    if graph is not None and graph not in {one.name for one in graphs}:
        raise UsageError(f"`{path}` holds no graph `{graph}`", hint=did_you_mean(graph, [one.name for one in graphs]))
    found: list[Candidate] = []
    absent: list[str] = []
    gpus = detect_gpus()
    for one in graphs:
        if graph is None or one.name == graph:
            found += _graph_candidates(package, one, selector, gpus, absent)
    if found:
        return tuple(found)
    if absent:
        raise UsageError(f"`{path}@{selector}` cannot be executed here: {'; '.join(absent)}", hint="name a variant instead")
    known = [variant.name for one in graphs for variant in one.variants]
    known += [word for engine in package.manifest.engines for word in (engine.backend, Path(engine.path).name)]
    raise UsageError(
        f"`{path}` holds no variant or engine `{selector}`", hint=did_you_mean(selector or "", list(dict.fromkeys(known)))
    )


def _graph_candidates(
    package: Package, graph: GraphRecord, selector: str | None, gpus: Sequence[Gpu], not_executable: list[str]
) -> Iterator[Candidate]:
    engines = [engine for engine in package.manifest.engines if engine.graph == graph.name]
    reasons = {engine.path: incompatibility(engine, tuple(gpus)) for engine in engines}
    for variant in graph.variants:
        built = [engine for engine in engines if engine.variant == variant.name]
        waiting = tuple(f"{engine.path}: {reason}" for engine in built if (reason := reasons[engine.path]) is not None)
        if selector in (None, variant.name):
            yield _variant_candidate(package, graph, variant, waiting)
    for engine in engines:
        if selector in (None, engine.backend, engine.path, Path(engine.path).name, Path(engine.path).stem):
            reason = reasons[engine.path]
            if reason is None:
                yield _engine_candidate(package, graph, engine, gpus)
            else:
                not_executable.append(f"{engine.path}: {reason}")


def _variant_candidate(
    package: Package, graph: GraphRecord, variant: VariantRecord, not_executed: tuple[str, ...]
) -> Candidate:
    path = package.path / variant.path
    return Candidate(
        name=_candidate_name(package, graph, variant.name),
        description=f"{package.path.name}: {describe_graph(variant.path, variant.precision)}",
        interface=graph.interface,
        open=_open_verified(package, (variant.path, *variant.weights), open_graph(path, variant.precision)),
        precision=variant.precision,
        profiles=graph.profiles,
        portable=variant.portable,
        graph=graph.name,
        package_file=variant.path,
        not_executed=not_executed,
    )


def _engine_candidate(package: Package, graph: GraphRecord, engine: EngineRecord, gpus: Sequence[Gpu]) -> Candidate:
    sms = {target.sm for target in engine.targets}
    device = next(gpu.name for gpu in gpus if gpu.sm in sms)
    precision = next(variant.precision for variant in graph.variants if variant.name == engine.variant)

    @contextmanager
    def opened() -> Iterator[RunFunction]:
        with registry.find_backend(engine.backend).open(str(package.path / engine.path)) as session:
            yield as_run_function(session)

    return Candidate(
        name=_candidate_name(package, graph, Path(engine.path).stem),
        description=f"{package.path.name}: {engine.path}, by {engine.backend} {engine.backend_version}",
        interface=graph.interface,
        open=_open_verified(package, (engine.path,), opened),
        precision=precision,
        machine=device,
        profiles=engine.profiles,
        graph=graph.name,
        package_file=engine.path,
    )


def _open_verified(package: Package, files: Sequence[str], open_: OpenFunction) -> OpenFunction:
    """Let `open_` run only after the digests of `files` were checked."""

    @contextmanager
    def opened() -> Iterator[RunFunction]:
        package.verify_digests(*files)
        with open_() as run:
            yield run

    return opened


def _candidate_name(package: Package, graph: GraphRecord, part_name: str) -> str:
    several = len(package.manifest.graphs) > 1
    return f"{package.path}{f'#{graph.name}' if several else ''}@{part_name}"


def find_variant(path: Path, *, graph: str | None = None, selector: str | None = None) -> tuple[GraphRecord, VariantRecord]:
    """Return the variant that a comparison of this package runs first; raises UsageError for unknown names."""
    package = read_package(path)
    part = package_candidates(path, graph=graph, selector=selector)[0].package_file
    for one in package.manifest.graphs:
        for variant in one.variants:
            if variant.path == part:
                return one, variant
    raise UsageError(f"`{path}@{selector}` is an engine", hint="name the variant that it was built from")
