"""Keys: everything that decides what a build makes, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from ryzen_compile.artifacts.cache.key import CacheKey
from ryzen_compile.artifacts.package.manifest import SCHEMA_VERSION
from ryzen_compile.ops.verification import all_ops_digest
from ryzen_compile.spec.target import detect_gpus

if TYPE_CHECKING:
    from ryzen_compile.builder.default_pipelines import VariantPipeline
    from ryzen_compile.builder.sources import SourceGraph
    from ryzen_compile.builder.target_assignment import TargetGroup, UnsupportedTarget
    from ryzen_compile.spec.profile import Profile

BuilderOptions = Mapping[str, str | int | float | bool | list[str]]


def package_key(
    sources: Sequence[SourceGraph],
    pipelines: Mapping[str, Sequence[VariantPipeline]],
    profiles: Mapping[str, tuple[Profile, ...]],
    target_groups: Sequence[TargetGroup],
    unsupported_targets: Sequence[UnsupportedTarget],
    options: Mapping[str, BuilderOptions],
    *,
    samples_digest: str,
    comparison: str,
) -> CacheKey:
    """Return the key of a whole package: its graphs, plans, engines, and whether and how they are compared."""
    parts = {"tool": tool_version(), "ops": all_ops_digest(), "comparison": comparison}
    for source in sources:
        parts |= {
            f"graph {source.name}": source.summary.fingerprint,
            f"interface {source.name}": _digest(source.summary.interface),
            f"profiles {source.name}": _format_profiles(profiles[source.name]),
        }
        for plan in pipelines[source.name]:
            parts[f"passes {source.name}.{plan.variant}"] = plan.fingerprint()
            if plan.needs_calibration:
                parts[f"samples {source.name}"] = samples_digest
            if plan.depends_on_node_names:
                parts[f"names {source.name}"] = source.summary.node_names_digest
    for lot in target_groups:
        where = f"{lot.backend} on {lot.targets[0].os}"
        parts[f"targets {where}"] = " ".join(target.name for target in lot.targets)
        parts[f"builder {where}"] = _builder_part(lot, options[lot.backend])
    if unsupported_targets:
        parts["refused"] = "; ".join(f"{misfit.target}: {misfit.reason}" for misfit in unsupported_targets)
    return CacheKey(parts)


def engine_key(
    source: SourceGraph,
    pipeline: VariantPipeline,
    profiles: tuple[Profile, ...],
    target_group: TargetGroup,
    options: BuilderOptions,
    *,
    samples_digest: str,
) -> CacheKey:
    """Return the key of one engine, whatever package it is built for."""
    parts = {
        "tool": tool_version(),
        "ops": all_ops_digest(),
        "what": "one engine",
        "graph": source.summary.fingerprint,
        "passes": pipeline.fingerprint(),
        "profiles": _format_profiles(profiles),
        "targets": " ".join(target.name for target in target_group.targets),
        "built by": _builder_part(target_group, options),
    }
    if pipeline.needs_calibration:
        parts |= {"samples": samples_digest, "interface": _digest(source.summary.interface)}
    if pipeline.depends_on_node_names:
        parts["names"] = source.summary.node_names_digest
    return CacheKey(parts)


def tool_version() -> str:
    """Return the version of this tool, and of the manifests it writes."""
    from importlib.metadata import version

    return f"ryzen-compile {version('ryzen-compile')}, manifest {SCHEMA_VERSION}"


def _builder_part(target_group: TargetGroup, options: BuilderOptions) -> str:
    spelt = f"{target_group.backend} {target_group.version} {msgspec.json.encode(dict(sorted(options.items()))).decode()}"
    if target_group.backend == "tensorrt":  # it times kernels on the GPU that is present
        here = sorted({f"{gpu.name}, driver {gpu.driver}" for gpu in detect_gpus()})
        return f"{spelt} on {'; '.join(here)}; {_kernel_compiler()}"
    return spelt


def _kernel_compiler() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"kernels by triton {version('triton')}"
    except PackageNotFoundError:
        return "no kernels"


def _format_profiles(profiles: tuple[Profile, ...]) -> str:
    # For eyes, and exact: of many inputs of the same shapes the words name two.
    return " | ".join(f"{profile} {_digest(profile)}" for profile in profiles) or "static"


def _digest(data: msgspec.Struct) -> str:
    import blake3

    # As it reads back: what was learnt just now and what the cache remembers of it are equal, and may spell a number 0 and 0.0.
    remembered = msgspec.json.decode(msgspec.json.encode(data), type=type(data))
    return blake3.blake3(msgspec.json.encode(remembered)).hexdigest()[:16]
