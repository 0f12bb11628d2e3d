"""Build: wishes to a package, by way of variants and engines; or the same package from the cache."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from ryzen_compile import registry
from ryzen_compile.artifacts.cache.store import Store
from ryzen_compile.artifacts.package.manifest import SCHEMA_VERSION, GraphRecord, Manifest, RefusedTarget, VariantRecord
from ryzen_compile.artifacts.package.write import Staging
from ryzen_compile.builder import cache_keys, sources, variants
from ryzen_compile.builder.config import BuildConfig, PlannedVariant, ResolvedBuild, resolve
from ryzen_compile.builder.engine_builder import EngineBuilder, EngineJob
from ryzen_compile.data import loading
from ryzen_compile.errors import AccuracyError, BackendError, RyzenError, did_you_mean
from ryzen_compile.progress import Progress, SilentProgress
from ryzen_compile.utils.record import utc_now

if TYPE_CHECKING:
    from ryzen_compile.artifacts.cache.key import CacheKey
    from ryzen_compile.artifacts.package.read import Package
    from ryzen_compile.builder.sources import Model, SourceGraph
    from ryzen_compile.builder.target_assignment import TargetGroup
    from ryzen_compile.spec.passes import Inputs


def build(
    model: Model | Mapping[str, Model],
    output: str | os.PathLike[str] | None = None,
    *,
    config: BuildConfig | None = None,
    allow_partial: bool = False,
    cache: str | os.PathLike[str] | Literal[False] | None = None,
    progress: Progress | None = None,
    **config_fields: Any,
) -> Package:
    """Build a package from an ONNX file, from several by the names of their graphs or from a folder of them, and return it.

    The wishes can be given one by one: `build("model.onnx", gpu="cpu,sm89", precision="fp16")`. `output` defaults to the
    model's name with `.ryzen`. `cache` is the folder of what was built before; False: none.

    A target that cannot be built for is recorded with its reason and the others ship, and so does a variant that cannot be
    compared; unless `allow_partial` this then raises BackendError. A variant that misses its criteria ships with the
    measurements, and then raises AccuracyError. Raises a RyzenError for anything else that cannot be done, and then leaves
    nothing behind.
    """
    if config is None:
        config = _config_from_fields(config_fields)
    elif config_fields:
        raise TypeError("give the wishes as one object or one by one, not both")
    files = sources.graph_files(model)
    beside = Path(model) if isinstance(model, (str, os.PathLike)) else next(iter(files.values()))
    destination = Path(output) if output is not None else beside.with_suffix(".ryzen")
    progress = progress or SilentProgress()
    store = None if cache is False else Store(cache, progress=progress)
    started = time.perf_counter()
    made = _BuildRunner(resolve(files, config, store, progress), destination, store, progress, started)
    package = made.run(allow_partial=allow_partial)
    objection = _error_for(package.manifest, str(package.path), allow_partial=allow_partial, compare=config.compare)
    if objection is not None:
        raise objection
    return package


def _config_from_fields(fields: Mapping[str, Any]) -> BuildConfig:
    known = [field.name for field in dataclasses.fields(BuildConfig)]
    for name in fields:
        if name not in known:
            raise TypeError(f"build() has no option `{name}`; {did_you_mean(name, known)}")
    return BuildConfig(**fields)


class _BuildRunner:
    """One build of what is resolved."""

    def __init__(
        self, build: ResolvedBuild, destination: Path, store: Store | None, progress: Progress, started: float
    ) -> None:
        self._build = build
        self._destination = destination
        self._store = store
        self._progress = progress
        self._started = started

    def run(self, *, allow_partial: bool) -> Package:
        """Return the package: from the cache where that holds one of the same key, else built.

        One that there is an objection to does not take the place of another: it goes beside it.
        """
        key = self._build.cache_key
        for name, planned in self._build.planned_variants.items():
            for note in dict.fromkeys(note for one in planned for note in one.pipeline.notes):
                self._progress.message(f"{name}: {note}")
        with ExitStack() as resources:
            if self._store is not None:
                resources.enter_context(self._store.lock(key))
            staging = resources.enter_context(Staging(self._destination))
            recalled = self._fetch_cached(key, staging)
            if recalled is not None:
                return self._commit(staging, recalled, allow_partial)
            backends = [lot.backend for lot in self._build.target_groups]
            yard = resources.enter_context(EngineBuilder(staging, backends, self._progress, self._store))
            manifest = self._build_manifest(key, staging, yard)
            if self._store is not None and self._is_complete(manifest):
                files = {file.path: file.sha256 for file in staging.files}
                self._store.put(key, staging.folder, files, msgspec.json.encode(manifest))
            return self._commit(staging, manifest, allow_partial)

    def _commit(self, staging: Staging, manifest: Manifest, allow_partial: bool) -> Package:
        compare = self._build.config.compare
        if _error_for(manifest, "", allow_partial=allow_partial, compare=compare) is not None:
            staging.divert_to_rejected()
        return staging.commit(msgspec.structs.replace(manifest, name=staging.destination.stem))

    def _is_complete(self, manifest: Manifest) -> bool:
        """Whether all that was asked for was done. What was not is tried again by the next build: the reason may be gone."""
        compared = not self._build.config.compare or not any(
            variant.not_compared_reason for graph in manifest.graphs for variant in graph.variants
        )
        return compared and not manifest.refused_targets

    def _fetch_cached(self, key: CacheKey, staging: Staging) -> Manifest | None:
        hit = self._store.get(key) if self._store is not None else None
        if self._store is None or hit is None:
            return None
        with self._progress.stage("fetch from the cache"):
            try:
                manifest = msgspec.json.decode(hit.payload, type=Manifest)
            except msgspec.ValidationError:
                return None  # kept by a version whose manifests were others
            if not self._store.restore(hit, staging.folder, staging.fsync_async):
                return None
        for file in hit.files:
            staging.add(file.path, sha256=file.sha256)
        self._progress.message(f"the same was built at {manifest.created_at}: taken from the cache")
        files = {source.name: source.file_name for source in self._build.sources}
        graphs = tuple(_with_source_name(graph, files[graph.name]) for graph in manifest.graphs)
        return msgspec.structs.replace(manifest, name=self._destination.stem, graphs=graphs)

    def _build_manifest(self, key: CacheKey, staging: Staging, engine_builder: EngineBuilder) -> Manifest:
        order = self._build
        work = variants.VariantContext(
            staging=staging, samples=self._calibration_samples, seed=order.config.seed, progress=self._progress
        )
        made: dict[str, list[VariantRecord]] = {}
        outcomes = []
        for source in order.sources:
            for planned in order.planned_variants[source.name]:
                variant = variants.build_variant(work, source, planned)
                made.setdefault(source.name, []).append(variant)
                outcomes += [
                    engine_builder.submit(self._engine_job(source, planned, variant, lot)) for lot in planned.target_groups
                ]
        if self._store is not None:
            self._store.add_blobs(staging.folder, {file.path: file.sha256 for file in staging.files})
        graphs = [self._graph_record(source, made[source.name], staging) for source in order.sources]
        done = [outcome.result() for outcome in outcomes]
        engine_builder.shutdown()
        refused = [*self._unsupported_targets(), *(refused for one in done for refused in one.refused)]
        unserved = {one.graph for one in refused if one.backend == "onnxruntime" and one.target.is_cpu}
        return Manifest(
            schema_version=SCHEMA_VERSION,
            name=self._destination.stem,
            key=key.digest,
            key_parts=dict(key.parts),
            graphs=tuple(_without_portable_variants(graph) if graph.name in unserved else graph for graph in graphs),
            engines=tuple(engine for one in done for engine in one.engines),
            refused_targets=tuple(refused),
            files=(),
            created_by=cache_keys.tool_version(),
            created_at=utc_now(),
            seconds=round(time.perf_counter() - self._started, 3),
        )

    def _engine_job(
        self, source: SourceGraph, planned: PlannedVariant, variant: VariantRecord, target_group: TargetGroup
    ) -> EngineJob:
        order = self._build
        profiles, options = order.profiles[source.name], order.options[target_group.backend]
        return EngineJob(
            source=source,
            variant=variant,
            target_group=target_group,
            profiles=profiles,
            options=options,
            limits=order.config.limits,
            cache_key=lambda lot: cache_keys.engine_key(
                source, planned.pipeline, profiles, lot, options, samples_digest=order.samples_digest
            ),
        )

    def _calibration_samples(self, source: SourceGraph) -> Sequence[Inputs]:
        """Return what passes calibrate on: the user's samples, else seeded ones at the tuned shapes."""
        from ryzen_compile.data.synthetic import synthesize

        wishes, interface = self._build.config, source.summary.interface
        if wishes.data is not None:
            return list(loading.load_samples(wishes.data, interface, seed=wishes.seed))
        tuned = self._build.profiles[source.name][0].opt
        return [synthesize(interface, tuned, seed=wishes.seed + at, rows="mixed") for at in range(4)]

    def _graph_record(self, source: SourceGraph, variant_records: Sequence[VariantRecord], staging: Staging) -> GraphRecord:
        return GraphRecord(
            name=source.name,
            interface=source.summary.interface,
            profiles=self._build.profiles[source.name],
            fingerprint=source.summary.fingerprint,
            source_file=source.file_name,
            variants=tuple(self._compared(source, variant, staging) for variant in variant_records),
        )

    def _compared(self, source: SourceGraph, variant: VariantRecord, staging: Staging) -> VariantRecord:
        """Return `variant` with how far it is from its source, or with the reason why that is not known."""
        if not self._build.config.compare:
            return msgspec.structs.replace(variant, not_compared_reason="the build was asked not to")
        from ryzen_compile.builder.accuracy import measure_accuracy

        try:
            accuracy = measure_accuracy(staging.folder / variant.path, source, self._build, self._progress)
        except BackendError as error:
            reason = staging.strip_staging_prefix(error.message)
            self._progress.message(f"{variant.path} is not compared: {reason}")
            portable = variant.portable and _is_loadable(staging.folder / variant.path)
            return msgspec.structs.replace(variant, not_compared_reason=reason, portable=portable)
        return msgspec.structs.replace(variant, accuracy=(accuracy,))

    def _unsupported_targets(self) -> list[RefusedTarget]:
        return [
            RefusedTarget(
                target=misfit.target, graph=source.name, backend=misfit.backend, reason=misfit.reason, hint=misfit.hint
            )
            for source in self._build.sources
            for misfit in self._build.unsupported_targets
        ]


def _is_loadable(graph: Path) -> bool:
    try:
        with registry.find_backend("onnxruntime").open(str(graph)):
            return True
    except BackendError:
        return False


def _with_source_name(graph: GraphRecord, file_name: str) -> GraphRecord:
    """Return a graph from the cache that came from a file of another name then."""
    old = graph.source_file
    if old == file_name:
        return graph
    variants = tuple(
        msgspec.structs.replace(
            variant,
            accuracy=tuple(
                msgspec.structs.replace(one, baseline=file_name + one.baseline.removeprefix(old)) for one in variant.accuracy
            ),
        )
        for variant in graph.variants
    )
    return msgspec.structs.replace(graph, source_file=file_name, variants=variants)


def _without_portable_variants(graph: GraphRecord) -> GraphRecord:
    """Return a graph that ONNX Runtime refuses: none of its variants is portable."""
    return msgspec.structs.replace(
        graph, variants=tuple(msgspec.structs.replace(variant, portable=False) for variant in graph.variants)
    )


def _error_for(manifest: Manifest, package_path: str, *, allow_partial: bool, compare: bool) -> RyzenError | None:
    """Return what is wrong with a package: a target refused, a variant that misses its criteria or could not be compared."""
    if manifest.refused_targets and not allow_partial:
        return BackendError(
            "; ".join(f"`{one.target}` was refused by {one.backend}: {one.reason}" for one in manifest.refused_targets)
            + f"; the rest is in {package_path}",
            hint=next(
                (one.hint for one in manifest.refused_targets if one.hint), "leave the target out, or give --allow-partial"
            ),
        )
    uncompared = [
        f"`{variant.path}` could not be compared: {variant.not_compared_reason}"
        for graph in manifest.graphs
        for variant in graph.variants
        if variant.not_compared_reason
    ]
    if compare and uncompared and not allow_partial:
        return BackendError(
            f"{'; '.join(uncompared)}; {package_path} holds the package",
            hint="build it with --no-compare, or give --allow-partial, if it is to be used all the same",
        )
    missed = list(_unmet_criteria(manifest))
    if missed:
        return AccuracyError(
            "; ".join(missed) + f"; {package_path} holds the package and the measurements",
            hint="name the first node that parts with `ryzen-compile compare --bisect`, or give other --criteria",
        )
    return None


def _unmet_criteria(manifest: Manifest) -> Iterator[str]:
    for graph in manifest.graphs:
        for variant in graph.variants:
            for accuracy in variant.accuracy:
                for metric in accuracy.metrics:
                    if not metric.met:
                        says = f"{metric.output} {metric.name} {metric.required} with {metric.worst:g} ({metric.case})"
                        yield f"`{variant.path}` misses {says}"
                yield from (f"`{variant.path}`: {fault}" for fault in accuracy.faults)
