"""Candidates of a package: its shipped files, run after a digest check; engines that cannot run here are listed as such."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ryzen_compile import registry
from ryzen_compile.artifacts.package.manifest import EngineRecord, GraphRecord, VariantRecord
from ryzen_compile.artifacts.package.read import Package, read_package
from ryzen_compile.artifacts.package.reference import PackageReference, Selection, select
from ryzen_compile.backends.cuda_device import CudaDevice, current_device
from ryzen_compile.errors import UsageError
from ryzen_compile.numerics.candidate import Candidate, OpenFunction
from ryzen_compile.numerics.onnx_candidates import as_run_function, describe_graph, open_graph
from ryzen_compile.runtime.choose import incompatibility, needs_gpu
from ryzen_compile.spec.interface import RunFunction
from ryzen_compile.spec.target import Gpu, detect_gpus
from ryzen_compile.utils.machine import processor_name


def package_candidates(reference: PackageReference) -> tuple[Candidate, ...]:
    """Return the candidates that `reference` names and that can be executed here, in the order of the manifest.

    Every selected variant is a candidate, and so is every selected engine that this machine can run. Variants with the same
    file are one candidate. An engine that this machine cannot run is listed in `not_executed` of the variant that it was
    compiled from. Raises UsageError for unknown names and if only engines are selected and none can run here, PackageError if
    the package is damaged.
    """
    package = read_package(reference.path)
    candidates: list[Candidate] = []
    not_executable: list[str] = []
    gpus = detect_gpus()
    device = current_device(gpus)
    for selection in select(package.manifest, reference):
        candidates += _graph_candidates(package, selection, gpus, device, not_executable)
    if not candidates:
        raise UsageError(
            f"`{reference.path}@{reference.selector}` cannot be executed here: {'; '.join(not_executable)}",
            hint="choose a variant instead",
        )
    return tuple(candidates)


def _graph_candidates(
    package: Package,
    selection: Selection,
    gpus: Sequence[Gpu],
    device: CudaDevice | None,
    not_executable: list[str],
) -> Iterator[Candidate]:
    """Yield the candidates of one graph; the selected engines that cannot run here are added to `not_executable`."""
    graph = selection.graph
    engines = [engine for engine in package.manifest.engines if engine.graph == graph.name]
    reasons = {engine.path: incompatibility(engine, gpus, device) for engine in engines}
    for path in dict.fromkeys(variant.path for variant in selection.variants):
        same_file = [variant for variant in graph.variants if variant.path == path]
        compiled_from = {(variant.name, variant.backend) for variant in same_file}
        not_executed = tuple(
            f"{engine.path}: {reason}"
            for engine in engines
            if (engine.variant, engine.backend) in compiled_from and (reason := reasons[engine.path]) is not None
        )
        yield _variant_candidate(package, graph, same_file, not_executed)
    for engine in selection.engines:
        reason = reasons[engine.path]
        if reason is None:
            machine = device.name if device is not None and needs_gpu(engine) else processor_name()
            yield _engine_candidate(package, graph, engine, machine)
        else:
            not_executable.append(f"{engine.path}: {reason}")


def _variant_candidate(
    package: Package, graph: GraphRecord, same_file: Sequence[VariantRecord], not_executed: tuple[str, ...]
) -> Candidate:
    """Return the graph of the variants `same_file`, which have one file, as a candidate."""
    variant = same_file[0]
    has_other_file = any(other.name == variant.name and other.path != variant.path for other in graph.variants)
    return Candidate(
        name=_candidate_name(package, graph, f"{variant.name}@{variant.backend}" if has_other_file else variant.name),
        description=f"{package.path.name}: {describe_graph(variant.path, variant.precision)}",
        interface=graph.interface,
        open=_open_verified(
            package, (variant.path, *variant.weights), open_graph(package.path / variant.path, variant.precision)
        ),
        precision=variant.precision,
        profiles=graph.profiles,
        can_be_baseline=any(other.portable for other in same_file),
        graph=graph.name,
        model_file=package.path / variant.path,
        package_file=variant.path,
        accuracy_floor=variant.accuracy_floor,
        not_executed=not_executed,
    )


def _engine_candidate(package: Package, graph: GraphRecord, engine: EngineRecord, machine: str) -> Candidate:
    variant = package.manifest.variant_of(engine)

    @contextmanager
    def open_engine() -> Iterator[RunFunction]:
        with registry.find_backend(engine.backend).open(str(package.path / engine.path)) as session:
            yield as_run_function(session)

    return Candidate(
        name=_candidate_name(package, graph, Path(engine.path).stem),
        description=f"{package.path.name}: {engine.path}, by {engine.backend} {engine.backend_version}",
        interface=graph.interface,
        open=_open_verified(package, (engine.path,), open_engine),
        precision=variant.precision,
        machine=machine,
        profiles=engine.profiles,
        graph=graph.name,
        model_file=package.path / variant.path,
        package_file=engine.path,
        accuracy_floor=variant.accuracy_floor,
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


def find_variant(reference: PackageReference) -> tuple[GraphRecord, VariantRecord]:
    """Return the first variant that a comparison of `reference` runs; raises UsageError for unknown names and for engines."""
    package_file = package_candidates(reference)[0].package_file
    for record in read_package(reference.path).manifest.graphs:
        for variant in record.variants:
            if variant.path == package_file:
                return record, variant
    raise UsageError(f"`{reference.selector}` is an engine", hint="choose the variant that it was compiled from")
