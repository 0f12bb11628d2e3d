"""Variants: a graph rewritten by one pipeline, stored with the package's shared weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from ryzen_compile import registry
from ryzen_compile.artifacts.package import layout
from ryzen_compile.artifacts.package.manifest import VariantRecord
from ryzen_compile.builder.accuracy import Checkpoints, GraphFile, accuracy_checks, check_floors, checkpoint_name, variant_floor
from ryzen_compile.builder.cache_keys import VariantKey, variant_key
from ryzen_compile.builder.default_pipelines import order_and_validate
from ryzen_compile.errors import InvalidGraphError, PipelineError
from ryzen_compile.jobs.job import Job, JobOutput, Resources, runs
from ryzen_compile.pipeline.ordering import Move
from ryzen_compile.pipeline.parser import parse
from ryzen_compile.pipeline.pass_manager import find_invalid_pass, run_passes, satisfied_properties
from ryzen_compile.pipeline.pipeline_id import option_files, pipeline_id
from ryzen_compile.spec.fidelity import Lossy
from ryzen_compile.spec.interface import Interface
from ryzen_compile.spec.pass_record import PassRecord
from ryzen_compile.spec.passes import PassContext, recorded_spec
from ryzen_compile.spec.profile import Profile
from ryzen_compile.spec.target import Target
from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    import onnx_ir as ir

    from ryzen_compile.artifacts.package.write import Staging
    from ryzen_compile.builder.accuracy import AccuracyCheck
    from ryzen_compile.builder.resolve import PlannedVariant, ResolvedBuild
    from ryzen_compile.builder.sources import SourceGraph
    from ryzen_compile.jobs.executor import Executor
    from ryzen_compile.progress import Progress
    from ryzen_compile.spec.passes import Pass

CHECKPOINTS_DIR = "checkpoints"
"""The folder, next to the files of the package, for checkpoints: graphs between the passes. It is not part of the package."""

_GRAPH, _WEIGHTS = "graph.onnx", "weights"


class VariantResult(Record, frozen=True):
    """A graph that was rewritten. Its files are `graph.onnx`, `weights/<sha256>`, and the checkpoints in `checkpoints/`."""

    name: str
    """The id of the pipeline, after its passes were ordered."""
    moves: tuple[Move, ...]
    """The passes that were moved, each with the reason."""
    passes: tuple[PassRecord, ...]
    weights: tuple[str, ...]
    """The sha256 of the weight files that the graph reads."""
    checkpoints: tuple[int, ...]
    """The checkpoints, by the number of finished passes."""
    state_dtypes: dict[str, str]
    """As in VariantRecord."""


class VariantJob(Job[VariantResult], frozen=True, kw_only=True):
    """Rewrite one graph by one pipeline."""

    result_type: ClassVar[Any] = VariantResult

    key: VariantKey
    source: str
    """The path of the source graph, in the folder of the job or absolute."""
    output: str
    """The path of the variant, in the folder of the job."""
    checkpoints_dir: str
    """The folder for the checkpoints, in the folder of the job."""
    passes: tuple[str, ...]
    """The specs of the passes."""
    interface: Interface
    targets: tuple[Target, ...]
    profiles: tuple[Profile, ...]
    data: str | None
    """The user's samples, for passes that measure the graph, which must exist where the job runs; None: random ones."""

    @property
    def label(self) -> str:
        """The path that the variant has if no other backend has one of the same name, and the backend."""
        backend = self.key.backend
        return f"{self.output.removesuffix(f'@{backend}.onnx')}.onnx for {backend}"

    def path_of(self, name: str) -> str:
        """Return the path of the graph, of a weight file in the package's weight store, or of a checkpoint."""
        folder, _, file = name.partition("/")
        if folder == CHECKPOINTS_DIR:
            return f"{self.checkpoints_dir}/{file}"
        return layout.weight_path(file) if folder == _WEIGHTS else self.output


@runs(VariantJob)
def run_variant_job(
    job: VariantJob, folder: Path, progress: Progress, *, load: Callable[[str], ir.Model] | None = None
) -> JobOutput[VariantResult]:
    """Run the pipeline and write the result. `load` returns a new copy of the source; by default it is read from its file.

    Raises PipelineError if the pipeline cannot run or its result is invalid, and ModelError if the source cannot be read.
    """
    from ryzen_compile.ir.load import load as load_file
    from ryzen_compile.ir.save import save_to_store

    def load_source() -> ir.Model:
        return load(job.source) if load is not None else load_file(folder / job.source)

    model = load_source()
    requested = parse(",".join(job.passes))
    properties = registry.properties_of(requested)
    passes, moves = order_and_validate(requested, satisfied_properties(model, properties))
    checkpoints = Checkpoints(passes, folder / job.checkpoints_dir)
    context = _pass_context(job, model, folder, progress)
    on_pass_end = checkpoints.on_pass_end if job.key.saves_checkpoints else None
    try:
        pass_log = run_passes(model, passes, context, properties, on_pass_end=on_pass_end)
        state_dtypes = _write_interface(model, job.interface)
        with progress.stage(f"write {job.label}"):
            file = folder / job.output
            stored = save_to_store(model, file, folder / layout.WEIGHTS_DIR, threshold_bytes=layout.MIN_WEIGHT_FILE_BYTES)
    except InvalidGraphError as error:
        raise find_invalid_pass(error, load_source(), passes, context, properties) from error
    files = {_GRAPH: stored.sha256, **{f"{_WEIGHTS}/{weight.sha256}": weight.sha256 for weight in stored.weights}}
    for finished, checkpoint in checkpoints.saved.items():
        files[f"{CHECKPOINTS_DIR}/{checkpoint_name(finished)}"] = checkpoint.sha256
        files |= {f"{CHECKPOINTS_DIR}/{weight.path}": weight.sha256 for weight in checkpoint.weights}
    result = VariantResult(
        name=pipeline_id(passes),
        moves=moves,
        passes=pass_log,
        weights=tuple(weight.sha256 for weight in stored.weights),
        checkpoints=tuple(checkpoints.saved),
        state_dtypes=state_dtypes,
    )
    return JobOutput(result=result, files=files)


def _pass_context(job: VariantJob, model: ir.Model, folder: Path, progress: Progress) -> PassContext:
    from ryzen_compile.builder.calibration_samples import CalibrationSamples, calibration_samples, text_tokenizer
    from ryzen_compile.pipeline.activation_statistics import mean_cosines, second_moments
    from ryzen_compile.pipeline.range_measurement import measure_ranges

    graph = folder / job.source
    calibration = CalibrationSamples(samples=(), origin="given")
    if job.key.samples is not None:
        # Without the library `tokenizers`, samples are random, which the package reports.
        uses_texts = job.data is None and find_spec("tokenizers") is not None
        tokenizer = text_tokenizer(model, graph) if uses_texts else None
        calibration = calibration_samples(
            job.interface, job.profiles[0], data=job.data, graph=graph, seed=job.key.seed, tokenizer=tokenizer
        )
    return PassContext(
        backend=job.key.backend,
        targets=job.targets,
        interface=job.interface,
        samples=calibration.samples,
        samples_origin=calibration.origin,
        measure_ranges=functools.partial(measure_ranges, limits=job.resources.limits, progress=progress),
        measure_second_moments=functools.partial(
            second_moments, interface=job.interface, limits=job.resources.limits, progress=progress
        ),
        measure_cosines=functools.partial(
            mean_cosines, interface=job.interface, limits=job.resources.limits, progress=progress
        ),
        seed=job.key.seed,
        progress=progress,
    )


def _write_interface(model: ir.Model, original: Interface) -> dict[str, str]:
    """Write the source's interface to the variant, with the element types of the variant's inputs and outputs.

    Return the element types of the states whose type differs from the source, by state name. Raises PipelineError if an input
    or output of the source is gone.
    """
    from ryzen_compile.ir.interface_metadata import declared_dtypes, write_interface
    from ryzen_compile.spec.interface import with_dtypes

    dtypes = declared_dtypes(model)
    if missing := [spec.name for spec in (*original.inputs, *original.outputs) if spec.name not in dtypes]:
        raise PipelineError(
            f"the passes remove `{missing[0]}` from the inputs and outputs of the model, and a build keeps those of its source",
            hint="run them first, with `ryzen-compile rewrite`, then build the result",
        )
    write_interface(model, with_dtypes(original, dtypes))
    return {
        state.name: dtype for state in original.states if (dtype := dtypes[state.input]) != original.input(state.input).dtype
    }


@dataclass(frozen=True, kw_only=True)
class BuiltVariant:
    """A variant that was written, and the comparisons that check it."""

    record: VariantRecord
    sha256: str
    """The digest of the graph's file."""
    pipeline_indices: tuple[int, ...]
    """As in PlannedVariant."""
    moves: tuple[Move, ...]
    """As in VariantResult."""
    checks: tuple[AccuracyCheck, ...]
    """Empty if the variants are not compared."""


def build_variant(
    build: ResolvedBuild,
    source: SourceGraph,
    planned: PlannedVariant,
    earlier: Sequence[BuiltVariant],
    executor: Executor,
    staging: Staging,
) -> BuiltVariant:
    """Create a variant of `source` by a job and add it to the package.

    `earlier` has the variants of the graph that were built before. Raises PipelineError if the pipeline is, once ordered, that
    of an earlier variant for the same backend, or has a lossy pass that the build cannot check, and the errors of the job.
    """
    if build.config.compare:
        check_floors(planned.pipeline.passes, build.accuracy_policy)
    job = _variant_job(build, source, planned)
    output = executor.run(job, staging.folder)
    result, sha256 = output.result, output.files[_GRAPH]
    same_name = [variant for variant in earlier if variant.record.name == result.name]
    if any(variant.record.backend == job.key.backend for variant in same_name):
        pipeline = ",".join(record.pass_spec for record in result.passes)
        raise PipelineError(
            f"{source.name}: two pipelines are `{pipeline}` once their passes are ordered", hint="leave one of them out"
        )
    path = _move_to_final_path(staging, job, sha256, source.name, result.name, same_name)
    weights = tuple(layout.weight_path(digest) for digest in result.weights)
    for name, digest in ((path, sha256), *zip(weights, result.weights, strict=True)):
        staging.add(name, sha256=digest)
    passes = passes_in_order(planned.pipeline.passes, result.passes)
    record = VariantRecord(
        name=result.name,
        path=path,
        backend=job.key.backend,
        precision=planned.pipeline.precision,
        portable=planned.pipeline.portable,
        weights=weights,
        passes=result.passes,
        accuracy_floor=variant_floor(passes, result.passes, build.accuracy_policy.budget),
        state_dtypes=result.state_dtypes,
    )
    checks: tuple[AccuracyCheck, ...] = ()
    if build.config.compare:
        checkpoints = {finished: f"{CHECKPOINTS_DIR}/{checkpoint_name(finished)}" for finished in result.checkpoints}
        checks = accuracy_checks(
            passes,
            result.passes,
            {finished: GraphFile(path=job.path_of(name), digest=output.files[name]) for finished, name in checkpoints.items()},
            source=GraphFile(path=source.absolute_path, digest=source.summary.fingerprint),
            variant=GraphFile(path=path, digest=sha256),
            policy=build.accuracy_policy,
        )
    return BuiltVariant(
        record=record, sha256=sha256, pipeline_indices=planned.pipeline_indices, moves=result.moves, checks=checks
    )


def passes_in_order(passes: Sequence[Pass], pass_log: Sequence[PassRecord]) -> list[Pass]:
    """Return `passes` in the order of `pass_log`, which names them without the folders of files in their options."""
    by_spec = {recorded_spec(pass_): pass_ for pass_ in passes}
    return [by_spec[record.pass_spec] for record in pass_log]


def _variant_job(build: ResolvedBuild, source: SourceGraph, planned: PlannedVariant) -> VariantJob:
    pipeline, profiles = planned.pipeline, build.profiles[source.name]
    targets = tuple(target for group in planned.target_groups for target in group.targets)
    has_lossy = any(isinstance(pass_.fidelity, Lossy) for pass_ in pipeline.passes)
    option_digests = {path: digest for pass_ in pipeline.passes for path, digest in option_files(pass_).items()}
    return VariantJob(
        key=variant_key(
            source,
            pipeline,
            targets,
            profiles,
            samples_digest=build.samples_digest,
            seed=build.config.seed,
            saves_checkpoints=build.config.compare and has_lossy,
        ),
        inputs={source.absolute_path: source.summary.fingerprint, **option_digests},
        resources=Resources.within(build.config.limits),
        source=source.absolute_path,
        output=layout.graph_path(source.name, pipeline.id, pipeline.backend),
        checkpoints_dir=f"{CHECKPOINTS_DIR}/{source.name}.{pipeline.id}@{pipeline.backend}",
        passes=tuple(map(str, pipeline.passes)),
        interface=source.summary.interface,
        targets=targets,
        profiles=profiles,
        data=build.config.data,
    )


def _move_to_final_path(
    staging: Staging, job: VariantJob, sha256: str, graph: str, name: str, same_name: Sequence[BuiltVariant]
) -> str:
    """Move the graph of `job` and return its path in the package: that of an equal graph in `same_name`, else a new one.

    `same_name` has the variants of the same name for other backends. The path contains the backend only if they exist and
    differ.
    """
    file = staging.path(job.output)
    equal = next((variant.record.path for variant in same_name if variant.sha256 == sha256), None)
    if equal is not None:
        file.unlink()
        return equal
    path = layout.graph_path(graph, name, job.key.backend if same_name else None)
    file.rename(staging.path(path))
    return path


def with_portable_forms(built: Sequence[BuiltVariant]) -> tuple[BuiltVariant, ...]:
    """Return the variants of one graph, with the name of the portable variant of the same pipeline in their records."""
    names = {index: variant.record.name for variant in built if variant.record.portable for index in variant.pipeline_indices}
    return tuple(
        variant
        if variant.record.portable
        else replace(variant, record=msgspec.structs.replace(variant.record, portable_form=names[variant.pipeline_indices[0]]))
        for variant in built
    )
