"""Candidates of a package: its shipped files, run after a digest check; engines that cannot run here are listed as such."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ryzen_compile import registry
from ryzen_compile.artifacts.package.manifest import EngineRecord, GraphRecord, VariantRecord
from ryzen_compile.artifacts.package.read import Package, read_package
from ryzen_compile.artifacts.package.reference import PackageReference, find_graph, matching_name, split_selector
from ryzen_compile.backends.cuda_device import CudaDevice, current_device
from ryzen_compile.errors import UsageError, did_you_mean
from ryzen_compile.numerics.candidate import Candidate, OpenFunction, RunFunction, processor_name
from ryzen_compile.numerics.onnx_candidates import as_run_function, describe_graph, open_graph
from ryzen_compile.runtime.choose import incompatibility, needs_gpu
from ryzen_compile.spec.target import Gpu, detect_gpus


def package_candidates(reference: PackageReference) -> tuple[Candidate, ...]:
    """Return the candidates that `reference` names and that can be executed here, in the order of the manifest.

    Without a selector, every variant of a graph is a candidate, and so is every engine that this machine can run. A selector is

    * `VARIANT` or `VARIANT@BACKEND`: a variant, and the engines compiled from it. The name may be a beginning that no other
      variant has;
    * `BACKEND`: the engines of a backend; of the portable backend, the variants that it runs;
    * a file: the name or path of a graph or an engine.

    Variants with the same file are one candidate. An engine that this machine cannot run is listed in `not_executed` of the
    variant that it was compiled from. Raises UsageError for unknown names, PackageError if the package is damaged.
    """
    package = read_package(reference.path)
    manifest = package.manifest
    graphs = manifest.graphs if reference.graph is None else (find_graph(manifest, reference.graph),)
    candidates: list[Candidate] = []
    not_executable: list[str] = []
    gpus = detect_gpus()
    device = current_device(gpus)
    for record in graphs:
        selection = _select(record, [engine for engine in manifest.engines if engine.graph == record.name], reference.selector)
        candidates += _graph_candidates(package, record, selection, gpus, device, not_executable)
    if candidates:
        return tuple(candidates)
    if not_executable:
        raise UsageError(
            f"`{reference.path}@{reference.selector}` cannot be executed here: {'; '.join(not_executable)}",
            hint="choose a variant instead",
        )
    names = [variant.name for record in graphs for variant in record.variants]
    names += [name for engine in manifest.engines for name in (engine.backend, Path(engine.path).name)]
    raise UsageError(
        f"`{reference.path}` contains no variant or engine `{reference.selector}`",
        hint=did_you_mean(reference.selector or "", list(dict.fromkeys(names))),
    )


@dataclass(frozen=True, kw_only=True)
class _Selection:
    """The selected variants and engines of one graph."""

    variants: Sequence[VariantRecord]
    engines: Sequence[EngineRecord]


def _select(graph: GraphRecord, engines: Sequence[EngineRecord], selector: str | None) -> _Selection:
    if selector is None:
        return _Selection(variants=graph.variants, engines=engines)
    by_file = _Selection(
        variants=[variant for variant in graph.variants if _is_file(selector, variant.path)],
        engines=[engine for engine in engines if _is_file(selector, engine.path)],
    )
    if by_file.variants or by_file.engines:
        return by_file
    text, backend = split_selector(selector)
    variants = [variant for variant in graph.variants if backend in (None, variant.backend)]
    engines = [engine for engine in engines if backend in (None, engine.backend)]
    if text is None:
        return _Selection(variants=[variant for variant in variants if variant.portable], engines=engines)
    name = matching_name((variant.name for variant in variants), text)
    return _Selection(
        variants=[variant for variant in variants if variant.name == name],
        engines=[engine for engine in engines if engine.variant == name],
    )


def _is_file(selector: str, path: str) -> bool:
    return selector in (path, Path(path).name, Path(path).stem)


def _graph_candidates(
    package: Package,
    graph: GraphRecord,
    selection: _Selection,
    gpus: Sequence[Gpu],
    device: CudaDevice | None,
    not_executable: list[str],
) -> Iterator[Candidate]:
    """Yield the candidates of one graph; the selected engines that cannot run here are added to `not_executable`."""
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
        portable=any(other.portable for other in same_file),
        graph=graph.name,
        package_file=variant.path,
        not_executed=not_executed,
    )


def _engine_candidate(package: Package, graph: GraphRecord, engine: EngineRecord, machine: str) -> Candidate:
    @contextmanager
    def open_engine() -> Iterator[RunFunction]:
        with registry.find_backend(engine.backend).open(str(package.path / engine.path)) as session:
            yield as_run_function(session)

    return Candidate(
        name=_candidate_name(package, graph, Path(engine.path).stem),
        description=f"{package.path.name}: {engine.path}, by {engine.backend} {engine.backend_version}",
        interface=graph.interface,
        open=_open_verified(package, (engine.path,), open_engine),
        precision=package.manifest.variant_of(engine).precision,
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


def find_variant(reference: PackageReference) -> tuple[GraphRecord, VariantRecord]:
    """Return the first variant that a comparison of `reference` runs; raises UsageError for unknown names and for engines."""
    package_file = package_candidates(reference)[0].package_file
    for record in read_package(reference.path).manifest.graphs:
        for variant in record.variants:
            if variant.path == package_file:
                return record, variant
    raise UsageError(f"`{reference.selector}` is an engine", hint="choose the variant that it was compiled from")
