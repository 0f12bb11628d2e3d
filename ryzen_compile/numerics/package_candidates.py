"""Candidates of a package: its shipped files, run after a digest check; engines that cannot run here are listed as such."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ryzen_compile import registry
from ryzen_compile.artifacts.package.manifest import EngineRecord, GraphRecord, VariantRecord
from ryzen_compile.artifacts.package.read import Package, read_package
from ryzen_compile.backends.cuda_device import CudaDevice, current_device
from ryzen_compile.errors import UsageError, did_you_mean
from ryzen_compile.numerics.candidate import Candidate, OpenFunction, RunFunction, processor_name
from ryzen_compile.numerics.onnx_candidates import as_run_function, describe_graph, open_graph
from ryzen_compile.runtime.choose import incompatibility, needs_gpu
from ryzen_compile.spec.target import Gpu, detect_gpus


def package_candidates(path: Path, *, graph: str | None = None, selector: str | None = None) -> tuple[Candidate, ...]:
    """Return the candidates of the package at `path` that can be executed here, in the order of the manifest.

    `graph` restricts them to one graph; `selector` to a variant by name, or to engines by backend, file name or path. Every
    variant of a graph is a candidate, and so is every engine that this machine can run. An engine that this machine cannot
    run is listed in `not_executed` of the variant that it was built from. Raises UsageError for unknown names, PackageError
    if the package is damaged.
    """
    package = read_package(path)
    graphs = package.manifest.graphs
    graph_names = [record.name for record in graphs]
    if graph is not None and graph not in graph_names:
        raise UsageError(f"`{path}` contains no graph `{graph}`", hint=did_you_mean(graph, graph_names))
    candidates: list[Candidate] = []
    not_executable: list[str] = []
    gpus = detect_gpus()
    device = current_device(gpus)
    for record in graphs:
        if graph is None or record.name == graph:
            candidates += _graph_candidates(package, record, selector, gpus, device, not_executable)
    if candidates:
        return tuple(candidates)
    if not_executable:
        raise UsageError(
            f"`{path}@{selector}` cannot be executed here: {'; '.join(not_executable)}", hint="choose a variant instead"
        )
    selectors = [variant.name for record in graphs for variant in record.variants]
    selectors += [name for engine in package.manifest.engines for name in (engine.backend, Path(engine.path).name)]
    raise UsageError(
        f"`{path}` contains no variant or engine `{selector}`",
        hint=did_you_mean(selector or "", list(dict.fromkeys(selectors))),
    )


def _graph_candidates(
    package: Package,
    graph: GraphRecord,
    selector: str | None,
    gpus: Sequence[Gpu],
    device: CudaDevice | None,
    not_executable: list[str],
) -> Iterator[Candidate]:
    """Yield the candidates of one graph; the selected engines that cannot run here are added to `not_executable`."""
    engines = [engine for engine in package.manifest.engines if engine.graph == graph.name]
    reasons = {engine.path: incompatibility(engine, gpus, device) for engine in engines}
    for variant in graph.variants:
        if selector in (None, variant.name):
            not_executed = tuple(
                f"{engine.path}: {reason}"
                for engine in engines
                if engine.variant == variant.name and (reason := reasons[engine.path]) is not None
            )
            yield _variant_candidate(package, graph, variant, not_executed)
    for engine in engines:
        if selector in (None, engine.backend, engine.path, Path(engine.path).name, Path(engine.path).stem):
            reason = reasons[engine.path]
            if reason is None:
                machine = device.name if device is not None and needs_gpu(engine) else processor_name()
                yield _engine_candidate(package, graph, engine, machine)
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


def _engine_candidate(package: Package, graph: GraphRecord, engine: EngineRecord, machine: str) -> Candidate:
    precision = next(variant.precision for variant in graph.variants if variant.name == engine.variant)

    @contextmanager
    def open_engine() -> Iterator[RunFunction]:
        with registry.find_backend(engine.backend).open(str(package.path / engine.path)) as session:
            yield as_run_function(session)

    return Candidate(
        name=_candidate_name(package, graph, Path(engine.path).stem),
        description=f"{package.path.name}: {engine.path}, by {engine.backend} {engine.backend_version}",
        interface=graph.interface,
        open=_open_verified(package, (engine.path,), open_engine),
        precision=precision,
        machine=machine,
        profiles=engine.profiles,
        graph=graph.name,
        package_file=engine.path,
    )


def _open_verified(package: Package, files: Sequence[str], open_: OpenFunction) -> OpenFunction:
    """Return `open_` preceded by a digest check of `files`."""

    @contextmanager
    def verify_and_open() -> Iterator[RunFunction]:
        package.verify_digests(*files)
        with open_() as run:
            yield run

    return verify_and_open


def _candidate_name(package: Package, graph: GraphRecord, part_name: str) -> str:
    has_several_graphs = len(package.manifest.graphs) > 1
    return f"{package.path}{f'#{graph.name}' if has_several_graphs else ''}@{part_name}"


def find_variant(path: Path, *, graph: str | None = None, selector: str | None = None) -> tuple[GraphRecord, VariantRecord]:
    """Return the first variant that a comparison of this package runs; raises UsageError for unknown names and for engines."""
    package = read_package(path)
    package_file = package_candidates(path, graph=graph, selector=selector)[0].package_file
    for record in package.manifest.graphs:
        for variant in record.variants:
            if variant.path == package_file:
                return record, variant
    raise UsageError(f"`{path}@{selector}` is an engine", hint="choose the variant that it was built from")
