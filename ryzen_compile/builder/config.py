"""Wishes: what the user asked for, and what it comes to: backends, profiles, plans and the key of the result."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ryzen_compile.backends.builder_options import parse_options
from ryzen_compile.builder import cache_keys, default_pipelines, sources
from ryzen_compile.builder.target_assignment import TargetGroup, UnsupportedTarget, assign
from ryzen_compile.data import loading
from ryzen_compile.errors import PipelineError
from ryzen_compile.numerics.criteria import Criteria, default_criteria, load_criteria
from ryzen_compile.spec import profile
from ryzen_compile.spec.target import parse_targets

if TYPE_CHECKING:
    from ryzen_compile.artifacts.cache.key import CacheKey
    from ryzen_compile.artifacts.cache.store import Store
    from ryzen_compile.builder.default_pipelines import Precision, VariantPipeline
    from ryzen_compile.builder.sources import SourceGraph
    from ryzen_compile.progress import Progress
    from ryzen_compile.spec.profile import Profile


@dataclass(frozen=True, kw_only=True)
class ResourceLimits:
    """How much one engine's build may take."""

    memory_bytes: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """What to build, as the user asked for it."""

    gpu: str = "auto"
    """Targets separated by commas: `cpu`, `sm89`, `rtx4090`, `sm89@windows`, `auto`."""
    backend: str | None = None
    """The only backend to use; None: whichever can."""
    passes: str | None = None
    """`fold,attention,precision{to=fp16}`; `none` for none; None: the passes that suit each backend."""
    precision: Precision | None = None
    """What engines compute in; None: what the model has."""
    min_shapes: Sequence[str] = ()
    """Each is one profile's, as trtexec spells it: `ids:1x8,mask:1x8`."""
    opt_shapes: Sequence[str] = ()
    max_shapes: Sequence[str] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    """Builder options by trtexec's names: {"builderOptimizationLevel": "5"}."""
    compare: bool = True
    """Whether every variant is compared with its source over the grid of profiles."""
    criteria: str | os.PathLike[str] | None = None
    """A success_criteria.toml; None: the project's."""
    data: str | None = None
    """Samples for calibration and comparison: FILE.npz, FILE.py[:FUNCTION] or recipe:NAME; None: seeded ones."""
    seed: int = 0
    limits: ResourceLimits = ResourceLimits()


@dataclass(frozen=True, kw_only=True)
class PlannedVariant:
    """A variant to make, and the lots to build from it."""

    pipeline: VariantPipeline
    target_groups: tuple[TargetGroup, ...]


@dataclass(frozen=True, kw_only=True)
class ResolvedBuild:
    """Wishes made concrete: everything that decides the result."""

    config: BuildConfig
    sources: tuple[SourceGraph, ...]
    profiles: Mapping[str, tuple[Profile, ...]]
    """By the names of the graphs."""
    planned_variants: Mapping[str, tuple[PlannedVariant, ...]]
    """By the names of the graphs; the portable variant comes last, so that engines are on their way before it is made."""
    target_groups: tuple[TargetGroup, ...]
    unsupported_targets: tuple[UnsupportedTarget, ...]
    options: Mapping[str, cache_keys.BuilderOptions]
    """Builder options by backend, as accepted."""
    samples_digest: str
    """What decides the samples, in short."""
    criteria: Criteria
    """What variants are held to."""

    @property
    def cache_key(self) -> CacheKey:
        """The cache key of the package."""
        return cache_keys.package_key(
            self.sources,
            {name: [one.pipeline for one in planned] for name, planned in self.planned_variants.items()},
            self.profiles,
            self.target_groups,
            self.unsupported_targets,
            self.options,
            samples_digest=self.samples_digest,
            comparison=self._comparison_part(),
        )

    def _comparison_part(self) -> str:
        if not self.config.compare:
            return "none"
        held_to = msgspec.json.encode((self.criteria.tolerances, self.criteria.output_tolerances)).decode()
        return f"{self.samples_digest}, criteria {self.criteria.name} {held_to}, by {_onnxruntime_version()}"


def _onnxruntime_version() -> str:
    """Return the version of ONNX Runtime, which runs the comparisons, without importing it."""
    from importlib.metadata import PackageNotFoundError, version

    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return "no ONNX Runtime"


def resolve(files: Mapping[str, Path], config: BuildConfig, store: Store | None, progress: Progress) -> ResolvedBuild:
    """Make `wishes` concrete for these files; raises a RyzenError that names what cannot be had."""
    lots, misfits = assign(parse_targets(config.gpu), config.backend)
    found = sources.read(files, store)
    planned = {source.name: _plan_variants(source, config, lots) for source in found}
    return ResolvedBuild(
        config=config,
        sources=found,
        profiles={source.name: _resolve_profiles(source, config, progress) for source in found},
        planned_variants=planned,
        target_groups=lots,
        unsupported_targets=misfits,
        options=_accept_options(lots, config.options),
        samples_digest=loading.samples_digest(config.data, [source.summary.interface for source in found], seed=config.seed),
        criteria=load_criteria(Path(config.criteria)) if config.criteria is not None else default_criteria(),
    )


def _accept_options(target_groups: Sequence[TargetGroup], raw: Mapping[str, str]) -> dict[str, cache_keys.BuilderOptions]:
    """Accept builder options for every backend that builds; ONNX Runtime is asked only where it is alone."""
    backends = list(dict.fromkeys(lot.backend for lot in target_groups))
    builders = [backend for backend in backends if backend != "onnxruntime"] or backends
    return {backend: parse_options(backend, raw if backend in builders else {}) for backend in backends}


def _resolve_profiles(source: SourceGraph, config: BuildConfig, progress: Progress) -> tuple[Profile, ...]:
    interface = source.summary.interface
    resolved = profile.resolve_profiles(
        interface, min_shapes=config.min_shapes, opt_shapes=config.opt_shapes, max_shapes=config.max_shapes
    )
    asked = config.min_shapes or config.opt_shapes or config.max_shapes
    if not asked and any(spec.is_dynamic for spec in interface.inputs):
        progress.message(f"{source.name}: no shapes were given, so they are derived: {resolved[0]}")
    return resolved


def _plan_variants(
    source: SourceGraph, config: BuildConfig, target_groups: Sequence[TargetGroup]
) -> tuple[PlannedVariant, ...]:
    dealt: dict[str, list[TargetGroup]] = {"onnxruntime": []}
    for lot in target_groups:
        dealt.setdefault(lot.backend, []).append(lot)
    planned = tuple(
        PlannedVariant(
            pipeline=default_pipelines.pipeline_for(
                backend, passes=config.passes, precision=config.precision, source_half_precision=source.summary.half_precision
            ),
            target_groups=tuple(group),
        )
        for backend, group in sorted(dealt.items(), key=lambda item: item[0] == "onnxruntime")
    )
    first = [pass_ for pass_ in planned[0].pipeline.passes if pass_.changes_interface]
    if first:
        spelt = ",".join(map(str, first))
        raise PipelineError(
            f"`{first[0].name}` gives the model other inputs and states, and a build keeps those that its source has",
            hint=f"run it first: ryzen-compile rewrite {source.file_name} decode.onnx --passes '{spelt}', and build decode.onnx",
        )
    return planned
