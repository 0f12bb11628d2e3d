"""Keys of the jobs of a build: for each kind, everything that determines its result, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import msgspec

from ryzen_compile.backends.traits import find_traits
from ryzen_compile.builder.code_key import NOT_USED_BY_BUILDS, CodeKey, code_key
from ryzen_compile.jobs.job import JobKey
from ryzen_compile.numerics.criteria import Criteria
from ryzen_compile.pipeline.pipeline_id import pipeline_fingerprint
from ryzen_compile.spec.target import detect_gpus
from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    from ryzen_compile.builder.default_pipelines import VariantPipeline
    from ryzen_compile.builder.sources import SourceGraph
    from ryzen_compile.builder.target_assignment import TargetGroup, UnsupportedTarget
    from ryzen_compile.spec.interface import Interface
    from ryzen_compile.spec.passes import Pass
    from ryzen_compile.spec.profile import Profile
    from ryzen_compile.spec.target import Target

BuilderOptions = Mapping[str, str | int | float | bool | list[str]]


class BuilderKey(Record, frozen=True):
    """The builder of an engine and what it builds for."""

    targets: tuple[str, ...]
    version: str
    options: dict[str, str | int | float | bool | list[str]]
    gpus: tuple[str, ...] | None = None
    """The GPUs of this machine with their drivers, for a backend that times kernels on them; None: it does not."""
    kernel_compiler: str | None = None
    """The compiler of custom ops, for a backend whose engines contain their kernels."""


class EngineKey(JobKey, frozen=True):
    """The key of one engine, which is independent of the package that it is built for and of how its graph was made."""

    kind: ClassVar[str] = "engine"

    code: CodeKey
    graph: str
    """The sha256 of the graph's file, which contains the digests of its weight files."""
    profiles: tuple[str, ...]
    backend: str
    os: str
    builder: BuilderKey


class VariantKey(JobKey, frozen=True):
    """The key of one variant, which is independent of the names of the graph and of the package."""

    kind: ClassVar[str] = "variant"

    code: CodeKey
    graph: str
    """The fingerprint of the source graph."""
    interface: str
    """A digest of the interface."""
    metadata: str
    """A digest of the other metadata of the source graph, such as its KV cache specification."""
    passes: str
    """The text of the pipeline."""
    backend: str
    targets: tuple[str, ...]
    seed: int
    saves_checkpoints: bool
    """Whether the checkpoints around lossy passes are part of the result."""
    samples: str | None = None
    """The samples, if a pass measures the graph on them."""
    samples_profile: str | None = None
    """The profile at whose opt shapes samples are generated, if a pass measures the graph on them."""
    node_names: str | None = None
    """A digest of the node names, if a pass selects nodes by name."""


class ComparisonKey(JobKey, frozen=True):
    """The key of one comparison, of a graph with another graph or with a PyTorch module."""

    kind: ClassVar[str] = "comparison"

    code: CodeKey
    candidate: str
    """The sha256 of the graph's file, which contains the digests of its weight files."""
    candidate_name: str
    """The name of the graph in the record of the comparison."""
    baseline: str
    """The sha256 of a graph's file, the fingerprint of a source graph, or a digest of a PyTorch module."""
    baseline_name: str
    torch_passes: str | None
    """The text of the passes whose methods are applied to the PyTorch module; None: the baseline is a graph."""
    interface: str
    """A digest of the interface."""
    profiles: tuple[str, ...]
    samples: str
    criteria: Criteria
    machine: str
    """The processor."""


class ComparisonSettings(Record, frozen=True):
    """How the variants of a package are compared."""

    samples: str
    criteria: Criteria
    runtime: str
    """The distribution that runs the graphs, with its version."""
    floor: str | None = None
    """The accuracy floor of every pipeline."""
    baseline: str | None = None
    """A digest of the PyTorch baseline."""


class GraphKey(Record, frozen=True):
    """One graph of a package and the pipelines of its variants."""

    fingerprint: str
    interface: str
    """A digest of the interface."""
    metadata: str
    """A digest of the other metadata of the graph, such as its KV cache specification."""
    profiles: tuple[str, ...]
    passes: dict[str, str]
    """{name of the variant, with its backend: text of the pipeline}."""
    samples: str | None = None
    """The samples, if a pass measures the graph on them."""
    node_names: str | None = None
    """A digest of the node names, if a pass selects nodes by name."""


class PackageKey(JobKey, frozen=True):
    """The key of a package: its graphs, pipelines and engines, and whether and how variants are compared."""

    kind: ClassVar[str] = "package"

    code: CodeKey
    comparison: ComparisonSettings | None
    """None: the variants are not compared."""
    graphs: dict[str, GraphKey]
    builders: dict[str, BuilderKey]
    """Builders by backend and operating system."""
    unsupported: dict[str, str]
    """{target that no backend supports: reason}."""


def package_key(
    sources: Sequence[SourceGraph],
    pipelines: Mapping[str, Sequence[VariantPipeline]],
    profiles: Mapping[str, tuple[Profile, ...]],
    target_groups: Sequence[TargetGroup],
    unsupported_targets: Sequence[UnsupportedTarget],
    options: Mapping[str, BuilderOptions],
    *,
    samples_digest: str,
    comparison: ComparisonSettings | None,
) -> PackageKey:
    """Return the key of a package."""
    all_passes = [pass_ for source in sources for pipeline in pipelines[source.name] for pass_ in pipeline.passes]
    return PackageKey(
        code=code_key(all_passes, [group.backend for group in target_groups], exclude=NOT_USED_BY_BUILDS),
        comparison=comparison,
        graphs={
            source.name: GraphKey(
                fingerprint=source.summary.fingerprint,
                interface=_digest(source.summary.interface),
                metadata=source.summary.metadata_digest,
                profiles=_format_profiles(profiles[source.name]),
                passes={
                    f"{pipeline.id}@{pipeline.backend}": pipeline_fingerprint(pipeline.passes)
                    for pipeline in pipelines[source.name]
                },
                samples=samples_digest if any(pipeline.needs_calibration for pipeline in pipelines[source.name]) else None,
                node_names=source.summary.node_names_digest
                if any(pipeline.depends_on_node_names for pipeline in pipelines[source.name])
                else None,
            )
            for source in sources
        },
        builders={
            f"{group.backend} on {group.targets[0].os}": _builder_key(group, options[group.backend]) for group in target_groups
        },
        unsupported={str(unsupported.target): unsupported.reason for unsupported in unsupported_targets},
    )


def variant_key(
    source: SourceGraph,
    pipeline: VariantPipeline,
    targets: Sequence[Target],
    profiles: tuple[Profile, ...],
    *,
    samples_digest: str,
    seed: int,
    saves_checkpoints: bool,
) -> VariantKey:
    """Return the key of a variant of `source`."""
    return VariantKey(
        code=code_key(pipeline.passes),
        graph=source.summary.fingerprint,
        interface=_digest(source.summary.interface),
        metadata=source.summary.metadata_digest,
        passes=pipeline_fingerprint(pipeline.passes),
        backend=pipeline.backend,
        targets=tuple(f"{target.name} on {target.os}" for target in targets),
        seed=seed,
        saves_checkpoints=saves_checkpoints,
        samples=samples_digest if pipeline.needs_calibration else None,
        samples_profile=_format_profiles(profiles[:1])[0] if pipeline.needs_calibration else None,
        node_names=source.summary.node_names_digest if pipeline.depends_on_node_names else None,
    )


def comparison_key(
    *,
    candidate: str,
    candidate_name: str,
    baseline: str,
    baseline_name: str,
    torch_passes: Sequence[Pass] | None,
    interface: Interface,
    profiles: tuple[Profile, ...],
    samples: str,
    criteria: Criteria,
    machine: str,
) -> ComparisonKey:
    """Return the key of a comparison; the arguments are as in `ComparisonKey`."""
    return ComparisonKey(
        code=code_key(torch_passes or (), exclude=NOT_USED_BY_BUILDS),
        candidate=candidate,
        candidate_name=candidate_name,
        baseline=baseline,
        baseline_name=baseline_name,
        torch_passes=None if torch_passes is None else pipeline_fingerprint(torch_passes),
        interface=_digest(interface),
        profiles=_format_profiles(profiles),
        samples=samples,
        criteria=criteria,
        machine=machine,
    )


def engine_key(
    graph_sha256: str, profiles: tuple[Profile, ...], target_group: TargetGroup, options: BuilderOptions
) -> EngineKey:
    """Return the key of the engine for `target_group` of the graph in a file with this digest."""
    return EngineKey(
        code=code_key(backends=[target_group.backend]),
        graph=graph_sha256,
        profiles=_format_profiles(profiles),
        backend=target_group.backend,
        os=target_group.targets[0].os,
        builder=_builder_key(target_group, options),
    )


def _builder_key(target_group: TargetGroup, options: BuilderOptions) -> BuilderKey:
    traits = find_traits(target_group.backend)
    gpus = None
    if traits.needs_gpu_to_build:
        gpus = tuple(sorted({f"{gpu.name}, driver {gpu.driver}" for gpu in detect_gpus()}))
    return BuilderKey(
        targets=tuple(target.name for target in target_group.targets),
        version=target_group.version,
        options=dict(options),
        gpus=gpus,
        kernel_compiler=_kernel_compiler() if traits.supports_plugins else None,
    )


def _kernel_compiler() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"triton {version('triton')}"
    except PackageNotFoundError:
        return "none"


def _format_profiles(profiles: tuple[Profile, ...]) -> tuple[str, ...]:
    # The text is readable, and the digest makes it exact: the text of many inputs with equal shapes names only two of them.
    return tuple(f"{profile} {_digest(profile)}" for profile in profiles)


def _digest(data: msgspec.Struct) -> str:
    import blake3

    # Decode once: a computed summary and its cached form are equal, but may spell the same number as 0 and as 0.0.
    normalized = msgspec.json.decode(msgspec.json.encode(data), type=type(data))
    return blake3.blake3(msgspec.json.encode(normalized)).hexdigest()[:16]
