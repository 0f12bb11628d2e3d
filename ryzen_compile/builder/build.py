"""Build a package: rewrite sources to variants, compile engines, compare; or fetch an identical package from the cache."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import msgspec

from ryzen_compile.artifacts.cache.store import Store
from ryzen_compile.artifacts.package import diagnostics, layout
from ryzen_compile.artifacts.package.manifest import (
    SCHEMA_VERSION,
    AccuracyRecord,
    GraphRecord,
    Manifest,
    RefusedTarget,
    VariantRecord,
)
from ryzen_compile.artifacts.package.write import Staging
from ryzen_compile.backends.onnxruntime.graph_runs import graph_runs
from ryzen_compile.backends.traits import portable_backend
from ryzen_compile.builder import accuracy, cache_keys, sources, variants
from ryzen_compile.builder.cache_keys import PackageKey
from ryzen_compile.builder.code_key import tool_version
from ryzen_compile.builder.config import BuildConfig
from ryzen_compile.builder.engine_builder import EngineJob, EngineWorkers, PlannedEngine, build_engine
from ryzen_compile.builder.resolve import PlannedVariant, ResolvedBuild, resolve
from ryzen_compile.builder.source_runs import source_failure
from ryzen_compile.builder.variants import VariantJob, run_variant_job
from ryzen_compile.diagnostic import Diagnostic
from ryzen_compile.errors import AccuracyError, BackendError, RyzenError
from ryzen_compile.jobs.executor import LocalExecutor
from ryzen_compile.jobs.isolated import run_isolated
from ryzen_compile.jobs.job import Job, JobOutput
from ryzen_compile.processes.limits import ResourceLimits
from ryzen_compile.progress import Progress, SilentProgress
from ryzen_compile.spec.profile import Profile, format_profile
from ryzen_compile.utils.record import utc_now

if TYPE_CHECKING:
    import onnx_ir as ir

    from ryzen_compile.artifacts.package.read import Package
    from ryzen_compile.builder.accuracy import AccuracyCheck
    from ryzen_compile.builder.sources import SourceGraph
    from ryzen_compile.builder.variants import BuiltVariant
    from ryzen_compile.spec.interface import Interface
    from ryzen_compile.utils.files import StrPath


def build(
    model: StrPath | Mapping[str, StrPath],
    output: str | os.PathLike[str] | None = None,
    *,
    config: BuildConfig,
    allow_partial: bool = False,
    cache: str | os.PathLike[str] | Literal[False] | None = None,
    progress: Progress | None = None,
) -> Package:
    """Build a package; `ryzen_compile.api.build` documents the arguments, the exceptions and what is written."""
    files = sources.graph_files(model)
    default_name = Path(model) if isinstance(model, (str, os.PathLike)) else next(iter(files.values()))
    destination = Path(output) if output is not None else default_name.with_suffix(".ryzen")
    progress = progress or SilentProgress()
    store = None if cache is False else Store(cache, progress=progress)
    started = time.perf_counter()
    runner = _BuildRunner(resolve(files, config, store, progress), destination, store, progress, started)
    package = runner.run(allow_partial=allow_partial)
    for warning in diagnostics.pass_warnings(package.manifest):
        progress.report(warning)
    error = _error_for(
        package.manifest,
        str(package.path),
        allow_partial=allow_partial,
        compare=config.compare,
        random_values=config.data is None and not package.manifest.text_files,
    )
    if error is not None:
        raise error
    return package


class PackageJob(Job[Manifest], frozen=True):
    """Create the contents of a package from the results of other jobs. It runs only in the process that resolved the build."""

    result_type: ClassVar[Any] = Manifest

    key: PackageKey

    def reuse_message(self, result: Manifest) -> str:
        """Return the message that names the time of the earlier build."""
        return f"taken from the cache: an identical build of {result.created_at}"


class _BuildRunner:
    """Runs one resolved build."""

    def __init__(
        self, build: ResolvedBuild, destination: Path, store: Store | None, progress: Progress, started: float
    ) -> None:
        self._build = build
        self._destination = destination
        self._store = store
        self._progress = progress
        self._started = started
        self._measured: dict[AccuracyCheck, AccuracyRecord] = {}
        self._source_failures: dict[str, str | None] = {}
        """Why each source of a failed comparison does not run itself, by graph name; None: it runs."""

    def run(self, *, allow_partial: bool) -> Package:
        """Return the package: from the cache if it holds one of the same key, otherwise built.

        A package that fails the build does not replace an existing one: it is written next to it.
        """
        job = PackageJob(key=self._build.package_key)
        for name, planned_variants in self._build.planned_variants.items():
            for diagnostic in dict.fromkeys(item for planned in planned_variants for item in planned.pipeline.diagnostics):
                self._progress.report(dataclasses.replace(diagnostic, location=name))
        with ExitStack() as resources:
            if self._store is not None:
                resources.enter_context(self._store.lock(job.key.cache_key))
            staging = resources.enter_context(Staging(self._destination))
            executor = LocalExecutor(
                self._store,
                self._progress,
                functions={PackageJob: lambda job, folder, progress: self._assemble(job, staging)},
                on_restored=staging.fsync_async,
            )
            output = executor.run(job, staging.folder)
            added = {file.path for file in staging.files}
            for path in output.files.keys() - added:
                staging.add(path, sha256=output.files[path])
            return self._commit(staging, self._with_requested_names(output.result), allow_partial)

    def _commit(self, staging: Staging, manifest: Manifest, allow_partial: bool) -> Package:
        compare = self._build.config.compare
        if _error_for(manifest, "", allow_partial=allow_partial, compare=compare, random_values=False) is not None:
            staging.divert_to_rejected()
        return staging.commit(msgspec.structs.replace(manifest, name=staging.destination.stem))

    def _assemble(self, job: PackageJob, staging: Staging) -> JobOutput[Manifest]:
        """Create the contents of the package by jobs for its variants, engines and comparisons."""
        backends = [group.backend for group in self._build.target_groups]
        with ExitStack() as resources:
            workers = resources.enter_context(EngineWorkers(backends))
            executor = resources.enter_context(
                LocalExecutor(
                    self._store,
                    self._progress,
                    functions={
                        EngineJob: workers.run,
                        VariantJob: functools.partial(run_variant_job, load=self._load_source),
                        accuracy.ComparisonJob: self._run_comparison,
                    },
                    on_restored=staging.fsync_async,
                    on_abort=workers.kill,
                )
            )
            manifest = self._build_manifest(job.key, staging, executor, workers)
        shutil.rmtree(staging.folder / variants.CHECKPOINTS_DIR, ignore_errors=True)
        files = {file.path: file.sha256 for file in staging.files}
        return JobOutput(result=manifest, files=files, complete=self._is_complete(manifest))

    def _is_complete(self, manifest: Manifest) -> bool:
        """Return whether the package holds everything that was requested.

        An incomplete package is not cached: the next build tries the missing parts again, since their cause may be fixed.
        """
        compared = not self._build.config.compare or not any(
            variant.not_compared_reason for graph in manifest.graphs for variant in graph.variants
        )
        return compared and not manifest.refused_targets

    def _load_source(self, path: str) -> ir.Model:
        """Return a new copy of a source graph that shares its weights and their digests with the other copies."""
        return next(source for source in self._build.sources if source.absolute_path == path).load()

    def _run_comparison(self, job: accuracy.ComparisonJob, folder: Path, progress: Progress) -> JobOutput[AccuracyRecord]:
        """Run a comparison job. Raises ModelError if a source, which may be its baseline, changed since it was digested."""
        output = run_isolated(job, folder, progress)
        for source in self._build.sources:
            if source.file_digest is not None:
                source.file_digest.check_unchanged()
        return output

    def _with_requested_names(self, manifest: Manifest) -> Manifest:
        """Return `manifest`, which may come from the cache, with the name of this package and of its source files."""
        files = {source.name: source.file_name for source in self._build.sources}
        graphs = tuple(_with_source_name(graph, files[graph.name]) for graph in manifest.graphs)
        return msgspec.structs.replace(manifest, name=self._destination.stem, graphs=graphs)

    def _build_manifest(self, key: PackageKey, staging: Staging, executor: LocalExecutor, workers: EngineWorkers) -> Manifest:
        build = self._build
        built_variants: dict[str, list[BuiltVariant]] = {}
        futures = []
        for source in build.sources:
            built = built_variants[source.name] = []
            for planned in build.planned_variants[source.name]:
                variant = variants.build_variant(build, source, planned, built, executor, staging)
                built.append(variant)
                for move in variant.moves:
                    self._progress.report(dataclasses.replace(move.diagnostic(), location=source.name))
                futures += [
                    executor.submit(functools.partial(build_engine, engine, executor, staging))
                    for engine in self._planned_engines(source, planned, variant)
                ]
        shutdown = executor.submit(workers.shutdown)  # after the last engine: comparisons need the memory
        graphs = [self._graph_record(source, built_variants[source.name], executor, staging) for source in build.sources]
        outcomes = [future.result() for future in futures]
        shutdown.result()
        refused = [*self._unsupported_targets(), *(target for outcome in outcomes for target in outcome.refused)]
        on_cpu = [entry for entry in refused if entry.backend == portable_backend() and entry.target.is_cpu]
        return Manifest(
            schema_version=SCHEMA_VERSION,
            name=self._destination.stem,
            key=key.cache_key.digest,
            key_parts=dict(key.cache_key.parts),
            graphs=tuple(_without_refused(graph, on_cpu) for graph in graphs),
            engines=tuple(engine for outcome in outcomes for engine in outcome.engines),
            refused_targets=tuple(refused),
            files=(),
            created_by=tool_version(),
            created_at=utc_now(),
            seconds=round(time.perf_counter() - self._started, 3),
            text_files=self._add_text_files(staging),
        )

    def _add_text_files(self, staging: Staging) -> tuple[str, ...]:
        """Add the tokenizer of the sources to the package and return its paths."""
        paths = []
        for file_name, content in sorted(self._build.text_files.items()):
            path = layout.text_path(file_name)
            staging.path(path).write_bytes(content)
            staging.add(path)
            paths.append(path)
        return tuple(paths)

    def _planned_engines(self, source: SourceGraph, planned: PlannedVariant, variant: BuiltVariant) -> Iterator[PlannedEngine]:
        profiles = self._build.profiles[source.name]
        for group in planned.target_groups:
            yield PlannedEngine(
                graph=source.name,
                variant=variant.record,
                key=cache_keys.engine_key(variant.sha256, profiles, group, self._build.options[group.backend]),
                targets=group.targets,
                profiles=profiles,
                limits=self._build.config.limits,
            )

    def _graph_record(
        self, source: SourceGraph, built_variants: Sequence[BuiltVariant], executor: LocalExecutor, staging: Staging
    ) -> GraphRecord:
        return GraphRecord(
            name=source.name,
            interface=source.summary.interface,
            profiles=self._build.profiles[source.name],
            fingerprint=source.summary.fingerprint,
            source_file=source.file_name,
            variants=tuple(
                self._compared(source, variant, executor, staging) for variant in variants.with_portable_forms(built_variants)
            ),
        )

    def _compared(self, source: SourceGraph, built: BuiltVariant, executor: LocalExecutor, staging: Staging) -> VariantRecord:
        """Return the record of `built` with its accuracy, or with the reason why it was not compared."""
        variant = built.record
        if not self._build.config.compare:
            if variant.precision != "fp32":
                message = f"{variant.precision} without a comparison: an overflow or a wrong result remains unnoticed"
                self._progress.report(
                    Diagnostic(
                        code="not-compared",
                        severity="warning",
                        message=message,
                        location=variant.path,
                        hint="leave out --no-compare",
                    )
                )
            return msgspec.structs.replace(variant, not_compared_reason="comparison is switched off for this build")
        try:
            for check in built.checks:
                if check not in self._measured:  # variants of several backends may have the same file
                    job = accuracy.comparison_job(check, source, self._build)
                    self._measured[check] = executor.run(job, staging.folder).result
        except BackendError as error:
            reason, hint = self._explain_failure(source, error)
            return msgspec.structs.replace(
                variant,
                not_compared_reason=staging.strip_staging_prefix(reason),
                not_compared_hint=hint,
                portable=variant.portable and _is_loadable(staging.folder / variant.path, self._build.config.limits),
            )
        records = [accuracy.with_check(self._measured[check], check) for check in built.checks]
        records_with_losses = accuracy.with_loss_shares(built.checks, records, self._build.accuracy_policy.budget)
        return msgspec.structs.replace(variant, accuracy=records_with_losses)

    def _explain_failure(self, source: SourceGraph, error: BackendError) -> tuple[str, str | None]:
        """Return why a comparison failed, and what to do: a source that does not run itself is named, not its variant."""
        profiles = self._build.profiles[source.name]
        if source.name not in self._source_failures:
            self._source_failures[source.name] = source_failure(source, profiles, self._build.config, self._progress)
        failure = self._source_failures[source.name]
        if failure is None:
            return error.message.replace(source.absolute_path, source.file_name), error.hint
        hint = _inputs_hint(source.summary.interface, profiles[0], has_samples=self._build.config.data is not None)
        return f"the source `{source.file_name}` itself fails {failure}", hint

    def _unsupported_targets(self) -> list[RefusedTarget]:
        return [
            RefusedTarget(
                target=unsupported.target,
                graph=source.name,
                variant=None,
                backend=unsupported.backend,
                reason=unsupported.reason,
                hint=unsupported.hint,
            )
            for source in self._build.sources
            for unsupported in self._build.unsupported_targets
        ]


def _inputs_hint(interface: Interface, profile: Profile, *, has_samples: bool) -> str:
    """Return what to give for a source that does not run at its shapes."""
    if not any(spec.is_dynamic for spec in interface.inputs):
        return "give samples with which the source runs" if has_samples else "give valid inputs with --data"
    form = format_profile(Profile(min=profile.opt, opt=profile.opt, max=profile.opt), interface)
    hint = f"give --min-shapes, --opt-shapes and --max-shapes at which the source runs, in the form {form}"
    return hint if has_samples else f"{hint}, or valid inputs with --data"


def _is_loadable(graph: Path, limits: ResourceLimits) -> bool:
    try:
        with graph_runs(graph, (), limits=limits):
            return True
    except BackendError:
        return False


def _with_source_name(graph: GraphRecord, file_name: str) -> GraphRecord:
    """Return a cached graph record with `file_name` in place of the name that the source file had when it was cached."""
    old_name = graph.source_file
    if old_name == file_name:
        return graph
    variants = tuple(
        msgspec.structs.replace(
            variant,
            accuracy=tuple(
                msgspec.structs.replace(accuracy, baseline=file_name + accuracy.baseline.removeprefix(old_name))
                if accuracy.baseline.startswith(old_name)
                else accuracy
                for accuracy in variant.accuracy
            ),
        )
        for variant in graph.variants
    )
    return msgspec.structs.replace(graph, source_file=file_name, variants=variants)


def _without_refused(graph: GraphRecord, refused: Sequence[RefusedTarget]) -> GraphRecord:
    """Return `graph` with the variants that the portable backend refused, as listed in `refused`, not marked as portable."""
    names = {entry.variant for entry in refused if entry.graph == graph.name}
    kept = [variant.portable and not names & {None, variant.name} for variant in graph.variants]
    return msgspec.structs.replace(
        graph,
        variants=tuple(
            msgspec.structs.replace(variant, portable=portable) for variant, portable in zip(graph.variants, kept, strict=True)
        ),
    )


def _error_for(
    manifest: Manifest, package_path: str, *, allow_partial: bool, compare: bool, random_values: bool
) -> RyzenError | None:
    """Return the error that a package raises, with a diagnostic for every problem, or None.

    Problems are refused targets, variants that could not be compared, and variants that do not meet their criteria.
    """
    refused = () if allow_partial else diagnostics.refused_targets(manifest, severity="error")
    not_compared = diagnostics.missing_comparisons(manifest, severity="error") if compare and not allow_partial else ()
    unmet = diagnostics.unmet_criteria(manifest, severity="error", random_values=random_values)
    problems = (*refused, *not_compared, *unmet)
    if not problems:
        return None
    written = Diagnostic(
        code="package-written",
        severity="info",
        message="the package was written, with its measurements, although the build failed",
        location=package_path,
    )
    error_type = BackendError if refused or not_compared else AccuracyError
    return error_type.of([*problems, written])
