"""Cache keys of packages and engines: everything that determines the result of a build, and nothing else."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from ryzen_compile import registry
from ryzen_compile.artifacts.cache.key import CacheKey
from ryzen_compile.artifacts.package.manifest import SCHEMA_VERSION
from ryzen_compile.backends.traits import find_traits, portable_backend
from ryzen_compile.ops.verification import all_ops_digest
from ryzen_compile.pipeline.pipeline_id import pipeline_fingerprint
from ryzen_compile.spec.target import detect_gpus
from ryzen_compile.utils.source_digest import package_digest, package_of

if TYPE_CHECKING:
    from ryzen_compile.builder.default_pipelines import VariantPipeline
    from ryzen_compile.builder.sources import SourceGraph
    from ryzen_compile.builder.target_assignment import TargetGroup, UnsupportedTarget
    from ryzen_compile.spec.passes import Pass
    from ryzen_compile.spec.profile import Profile

BuilderOptions = Mapping[str, str | int | float | bool | list[str]]

_NOT_USED_BY_BUILDS = frozenset({"cli", "report", "evaluation", "exporter", "runtime", "torch_module.py"})
"""Parts of `ryzen_compile` that do not influence a package."""
_NOT_USED_BY_ENGINES = _NOT_USED_BY_BUILDS | {"numerics"}
_GRAPH_LIBRARIES = ("numpy", "onnx", "onnx-ir", "onnxscript")
"""Distributions that read, evaluate and write graphs, in addition to those of the portable backend."""


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
    """Return the key of a package: its graphs, pipelines and engines, and whether and how variants are compared."""
    parts = {"tool": tool_version(), "ops": all_ops_digest(), "comparison": comparison}
    all_passes = [pass_ for source in sources for pipeline in pipelines[source.name] for pass_ in pipeline.passes]
    parts |= code_parts(all_passes, [group.backend for group in target_groups], exclude=_NOT_USED_BY_BUILDS)
    for source in sources:
        parts |= {
            f"graph {source.name}": source.summary.fingerprint,
            f"interface {source.name}": _digest(source.summary.interface),
            f"profiles {source.name}": _format_profiles(profiles[source.name]),
        }
        for pipeline in pipelines[source.name]:
            parts[f"passes {source.name}@{pipeline.id}@{pipeline.backend}"] = pipeline_fingerprint(pipeline.passes)
            if pipeline.needs_calibration:
                parts[f"samples {source.name}"] = samples_digest
            if pipeline.depends_on_node_names:
                parts[f"names {source.name}"] = source.summary.node_names_digest
    for group in target_groups:
        name = f"{group.backend} on {group.targets[0].os}"
        parts[f"targets {name}"] = " ".join(target.name for target in group.targets)
        parts[f"builder {name}"] = _builder_part(group, options[group.backend])
    if unsupported_targets:
        parts["refused"] = "; ".join(f"{unsupported.target}: {unsupported.reason}" for unsupported in unsupported_targets)
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
    """Return the key of one engine, which is independent of the package that it is built for."""
    parts = {
        "tool": tool_version(),
        "ops": all_ops_digest(),
        "what": "one engine",
        "graph": source.summary.fingerprint,
        "passes": pipeline_fingerprint(pipeline.passes),
        "profiles": _format_profiles(profiles),
        "targets": f"{' '.join(target.name for target in target_group.targets)} on {target_group.targets[0].os}",
        "built by": _builder_part(target_group, options),
    } | code_parts(pipeline.passes, [target_group.backend])
    if pipeline.needs_calibration:
        parts |= {"samples": samples_digest, "interface": _digest(source.summary.interface)}
    if pipeline.depends_on_node_names:
        parts["names"] = source.summary.node_names_digest
    return CacheKey(parts)


def code_parts(
    passes: Iterable[Pass] = (), backends: Iterable[str] = (), *, exclude: frozenset[str] = _NOT_USED_BY_ENGINES
) -> dict[str, str]:
    """Return the key parts for the code that rewrites and builds graphs.

    These are this tool, the packages of `passes` and of the backends called `backends`, and libraries. `exclude` holds the
    files and folders of this tool that do not influence the result.
    """
    values = [*passes, *map(registry.find_backend, backends)]
    classes = {cls for value in values for cls in type(value).__mro__}
    packages = {_package_of(cls.__module__) for cls in classes} - {"ryzen_compile"}
    external = sorted(package for package in packages if package not in sys.stdlib_module_names)
    return {
        "code ryzen_compile": package_digest("ryzen_compile", exclude=exclude),
        **{f"code {package}": package_digest(package) for package in external},
        "libraries": _library_versions(),
    }


_package_of = functools.cache(package_of)


@functools.cache
def _library_versions() -> str:
    from importlib.metadata import PackageNotFoundError, version

    versions = []
    for name in (*_GRAPH_LIBRARIES, *find_traits(portable_backend()).distributions):
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(versions)


def tool_version() -> str:
    """Return the version of this tool and of the manifest format that it writes."""
    from importlib.metadata import version

    return f"ryzen-compile {version('ryzen-compile')}, manifest {SCHEMA_VERSION}"


def _builder_part(target_group: TargetGroup, options: BuilderOptions) -> str:
    sorted_options = msgspec.json.encode(dict(sorted(options.items()))).decode()
    part = f"{target_group.backend} {target_group.version} {sorted_options}"
    traits = find_traits(target_group.backend)
    if traits.needs_gpu_to_build:
        gpus = sorted({f"{gpu.name}, driver {gpu.driver}" for gpu in detect_gpus()})
        part += f" on {'; '.join(gpus)}"
    if traits.supports_plugins:
        part += f"; {_kernel_compiler()}"
    return part


def _kernel_compiler() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"kernels by triton {version('triton')}"
    except PackageNotFoundError:
        return "no kernels"


def _format_profiles(profiles: tuple[Profile, ...]) -> str:
    # The text is readable, and the digest makes it exact: the text of many inputs with equal shapes names only two of them.
    return " | ".join(f"{profile} {_digest(profile)}" for profile in profiles) or "static"


def _digest(data: msgspec.Struct) -> str:
    import blake3

    # Decode once: a computed summary and its cached form are equal, but may spell the same number as 0 and as 0.0.
    normalized = msgspec.json.decode(msgspec.json.encode(data), type=type(data))
    return blake3.blake3(msgspec.json.encode(normalized)).hexdigest()[:16]
