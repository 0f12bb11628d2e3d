"""Resolution of a build configuration to backends, profiles, pipelines and a cache key."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ryzen_compile import registry
from ryzen_compile.backends.builder_options import parse_options
from ryzen_compile.backends.traits import find_traits, portable_backend
from ryzen_compile.builder import cache_keys, default_pipelines, sources
from ryzen_compile.builder.profile_trials import tried_shapes
from ryzen_compile.builder.target_assignment import TargetGroup, UnsupportedTarget, assign
from ryzen_compile.data import loading
from ryzen_compile.errors import PipelineError, UsageError
from ryzen_compile.numerics.criteria import Criteria, default_criteria, load_criteria
from ryzen_compile.pipeline.parser import parse
from ryzen_compile.pipeline.pipeline_id import pipeline_id
from ryzen_compile.spec.fidelity import AccuracyBudget, parse_budget
from ryzen_compile.spec.profile_request import ProfileRequest, parse_requests
from ryzen_compile.spec.target import parse_targets

if TYPE_CHECKING:
    from ryzen_compile.artifacts.cache.store import Store
    from ryzen_compile.builder.config import BuildConfig
    from ryzen_compile.builder.default_pipelines import VariantPipeline
    from ryzen_compile.builder.sources import SourceGraph
    from ryzen_compile.progress import Progress
    from ryzen_compile.spec.profile import Profile


@dataclass(frozen=True, kw_only=True)
class AccuracyPolicy:
    """What the variants of a build are compared with beside their source, and what their lossy passes may cost together."""

    budget: AccuracyBudget | None = None
    torch_baseline: str | None = None
    """A PyTorch module, FILE.py:FUNCTION or recipe:NAME; None: variants are compared with their source only."""


@dataclass(frozen=True, kw_only=True)
class PlannedVariant:
    """A variant to create, and the target groups to build engines for from it."""

    pipeline: VariantPipeline
    target_groups: tuple[TargetGroup, ...]
    pipeline_indices: tuple[int, ...] = (0,)
    """The requested pipelines that the variant is for, as indices of `BuildConfig.passes`: without conversions to half
    precision, several requested pipelines may have the same portable variant."""


@dataclass(frozen=True, kw_only=True)
class ResolvedBuild:
    """A resolved build configuration: everything that determines the result."""

    config: BuildConfig
    sources: tuple[SourceGraph, ...]
    profiles: Mapping[str, tuple[Profile, ...]]
    """Profiles by graph name."""
    planned_variants: Mapping[str, tuple[PlannedVariant, ...]]
    """Variants by graph name. The portable variants are last: engine builds start before they are created. The
    variants of a backend have the order of the requested pipelines."""
    target_groups: tuple[TargetGroup, ...]
    unsupported_targets: tuple[UnsupportedTarget, ...]
    options: Mapping[str, cache_keys.BuilderOptions]
    """Builder options by backend, as accepted by it."""
    samples_digest: str
    """A short digest of everything that determines the samples."""
    criteria: Criteria
    """The accuracy criteria for variants."""
    accuracy_policy: AccuracyPolicy
    text_files: Mapping[str, bytes]
    """The files of the tokenizer of the sources, {name: content}; empty if none has one."""

    @property
    def package_key(self) -> cache_keys.PackageKey:
        """The key of the package."""
        return cache_keys.package_key(
            self.sources,
            {name: [planned.pipeline for planned in variants] for name, variants in self.planned_variants.items()},
            self.profiles,
            self.target_groups,
            self.unsupported_targets,
            self.options,
            samples_digest=self.samples_digest,
            comparison=self._comparison_settings(),
        )

    def _comparison_settings(self) -> cache_keys.ComparisonSettings | None:
        if not self.config.compare:
            return None
        budget = self.accuracy_policy.budget
        return cache_keys.ComparisonSettings(
            samples=self.samples_digest,
            criteria=self.criteria,
            runtime=_comparing_distribution(),
            floor=str(budget) if budget is not None else None,
            baseline=self.torch_baseline_digest,
        )

    @functools.cached_property
    def torch_baseline_digest(self) -> str | None:
        """A digest of the PyTorch baseline; None if there is none."""
        reference = self.accuracy_policy.torch_baseline
        return _baseline_digest(reference) if reference is not None else None


def _baseline_digest(reference: str) -> str:
    """Return a digest of a PyTorch baseline: of a recipe's modules, or of the weights and source files of a script's module."""
    from importlib.metadata import version

    if registry.is_recipe_reference(reference):
        digest = registry.recipe_digest(reference)
    else:
        from ryzen_compile.torch_module import content_digest, load_module, suppress_output

        with suppress_output():
            digest = content_digest(load_module(reference).module)
    return f"{digest} by torch {version('torch')}"


def _comparing_distribution() -> str:
    """Return the distribution of the portable backend, which runs the comparisons, and its version, without importing it."""
    from importlib.metadata import PackageNotFoundError, version

    for name in find_traits(portable_backend()).distributions:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return "no ONNX Runtime"


def resolve(files: Mapping[str, Path], config: BuildConfig, store: Store | None, progress: Progress) -> ResolvedBuild:
    """Resolve `config` for `files`, which are ONNX files by graph name.

    Raises a RyzenError that names the setting that cannot be satisfied.
    """
    target_groups, unsupported = assign(parse_targets(config.gpu), config.backend)
    graphs = sources.read(files, store)
    text_files = sources.read_tokenizer(graphs)
    samples_digest = loading.samples_digest(config.data, [source.summary.interface for source in graphs], seed=config.seed)
    planned = {source.name: _plan_variants(source, config, target_groups) for source in graphs}
    shaped = [_resolve_shapes(source, config, samples_digest, store, progress) for source in graphs]
    return ResolvedBuild(
        config=config,
        sources=tuple(source for source, _ in shaped),
        profiles={source.name: profiles for source, profiles in shaped},
        planned_variants=planned,
        target_groups=target_groups,
        unsupported_targets=unsupported,
        options=_accept_options(target_groups, config.options),
        samples_digest=samples_digest,
        criteria=load_criteria(Path(config.criteria)) if config.criteria is not None else default_criteria(),
        accuracy_policy=_accuracy_policy(config),
        text_files=text_files,
    )


def _accuracy_policy(config: BuildConfig) -> AccuracyPolicy:
    if not config.compare and (config.accuracy_floor is not None or config.baseline is not None):
        raise UsageError(
            "an accuracy floor and a baseline are checked by the comparison, which is switched off",
            hint="leave out --no-compare, or leave out --accuracy-floor and --baseline",
        )
    if config.baseline is not None and not registry.is_module_reference(config.baseline):
        raise UsageError(
            f"`{config.baseline}` is not a PyTorch module",
            hint="give FILE.py:FUNCTION, recipe:NAME or hf:FOLDER as the baseline",
        )
    return AccuracyPolicy(
        budget=parse_budget(config.accuracy_floor) if config.accuracy_floor is not None else None,
        torch_baseline=config.baseline,
    )


def _accept_options(target_groups: Sequence[TargetGroup], raw: Mapping[str, str]) -> dict[str, cache_keys.BuilderOptions]:
    """Parse the builder options for every backend that accepts some; other backends receive them only if none accepts any."""
    backends = list(dict.fromkeys(group.backend for group in target_groups))
    receivers = [backend for backend in backends if find_traits(backend).accepts_builder_options] or backends
    return {backend: parse_options(backend, raw if backend in receivers else {}) for backend in backends}


def _resolve_shapes(
    source: SourceGraph, config: BuildConfig, samples_digest: str, store: Store | None, progress: Progress
) -> tuple[SourceGraph, tuple[Profile, ...]]:
    """Return `source` with the values that it runs with in its interface, and its profiles."""
    interface = source.summary.interface
    requests = parse_requests(
        interface, min_shapes=config.min_shapes, opt_shapes=config.opt_shapes, max_shapes=config.max_shapes
    )
    profiles: list[Profile] = []
    for request in requests or (ProfileRequest(),):
        is_static = not any(spec.is_dynamic for spec in interface.inputs)
        if (request.is_complete or is_static) and not source.summary.branch_values:
            profiles.append(request.profile(interface))
            continue
        tried, profile = tried_shapes(
            source,
            config,
            request,
            samples=samples_digest,
            runtime=_comparing_distribution(),
            store=store,
            progress=progress,
        )
        profiles.append(profile)
        source = dataclasses.replace(source, summary=msgspec.structs.replace(source.summary, interface=tried))
    return source, tuple(profiles)


def _plan_variants(
    source: SourceGraph, config: BuildConfig, target_groups: Sequence[TargetGroup]
) -> tuple[PlannedVariant, ...]:
    by_backend: dict[str, list[TargetGroup]] = {portable_backend(): []}
    for group in target_groups:
        by_backend.setdefault(group.backend, []).append(group)
    planned = tuple(
        variant
        for backend, groups in sorted(by_backend.items(), key=lambda item: item[0] == portable_backend())
        for variant in _plan_backend_variants(source, config, backend, tuple(groups))
    )
    _check_interface_is_kept(source, planned)
    return planned


def _plan_backend_variants(
    source: SourceGraph, config: BuildConfig, backend: str, target_groups: tuple[TargetGroup, ...]
) -> Iterator[PlannedVariant]:
    """Yield the variants for `backend`, one for each different pipeline, in the order of the requested pipelines."""
    pipelines = [
        default_pipelines.pipeline_for(
            backend,
            passes=passes,
            precision=config.precision,
            source_half_precision=source.summary.half_precision,
            contents=source.summary.contents,
        )
        for passes in _requested_pipelines(config)
    ]
    indices_by_id: dict[str, list[int]] = {}
    for index, pipeline in enumerate(pipelines):
        indices_by_id.setdefault(pipeline.id, []).append(index)
    for first, *others in indices_by_id.values():
        diagnostics = tuple(diagnostic for index in (first, *others) for diagnostic in pipelines[index].diagnostics)
        yield PlannedVariant(
            pipeline=dataclasses.replace(pipelines[first], diagnostics=tuple(dict.fromkeys(diagnostics))),
            target_groups=target_groups,
            pipeline_indices=(first, *others),
        )


def _requested_pipelines(config: BuildConfig) -> tuple[str | None, ...]:
    """Return the text of each requested pipeline. Raises UsageError if one is requested twice."""
    if config.passes is None or isinstance(config.passes, str):
        return (config.passes,)
    requested: dict[str, str] = {}
    for text in config.passes:
        name = pipeline_id(parse(text))
        if name in requested:
            raise UsageError(f"the pipelines `{requested[name]}` and `{text}` are the same", hint="leave one of them out")
        requested[name] = text
    return tuple(requested.values()) or (None,)


def _check_interface_is_kept(source: SourceGraph, planned: Sequence[PlannedVariant]) -> None:
    """Raise PipelineError if a pass changes the inputs or states of the model."""
    for variant in planned:
        changing = [pass_ for pass_ in variant.pipeline.passes if pass_.changes_interface]
        if changing:
            pass_specs = ",".join(map(str, changing))
            raise PipelineError(
                f"`{changing[0].name}` changes the inputs and states of the model, and a build keeps those of its source",
                hint="run the pass first: ryzen-compile rewrite "
                f"{source.file_name} decode.onnx --passes '{pass_specs}', then build decode.onnx",
            )
