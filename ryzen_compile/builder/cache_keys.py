"""Keys: everything that decides what a build makes, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from ryzen_compile.artifacts.cache.key import Key
from ryzen_compile.artifacts.package.manifest import SCHEMA_VERSION
from ryzen_compile.ops.verification import digest_of_all
from ryzen_compile.spec.target import detect

if TYPE_CHECKING:
    from ryzen_compile.builder.default_pipelines import Plan
    from ryzen_compile.builder.sources import Source
    from ryzen_compile.builder.target_assignment import Lot, Misfit
    from ryzen_compile.spec.profile import Profile

Options = Mapping[str, str | int | float | bool | list[str]]


def of_package(
    found: Sequence[Source],
    planned: Mapping[str, Sequence[Plan]],
    profiles: Mapping[str, tuple[Profile, ...]],
    lots: Sequence[Lot],
    misfits: Sequence[Misfit],
    options: Mapping[str, Options],
    *,
    samples: str,
    comparison: str,
) -> Key:
    """Return the key of a whole package: its graphs, plans, engines, and whether and how they are compared."""
    parts = {"tool": tool(), "ops": digest_of_all(), "comparison": comparison}
    for source in found:
        parts |= {
            f"graph {source.name}": source.known.fingerprint,
            f"interface {source.name}": _digest(source.known.interface),
            f"profiles {source.name}": _spell(profiles[source.name]),
        }
        for plan in planned[source.name]:
            parts[f"passes {source.name}.{plan.variant}"] = plan.key()
            if plan.calibrates:
                parts[f"samples {source.name}"] = samples
            if plan.selects:
                parts[f"names {source.name}"] = source.known.names
    for lot in lots:
        where = f"{lot.backend} on {lot.targets[0].os}"
        parts[f"targets {where}"] = " ".join(target.name for target in lot.targets)
        parts[f"builder {where}"] = _builder(lot, options[lot.backend])
    if misfits:
        parts["refused"] = "; ".join(f"{misfit.target}: {misfit.reason}" for misfit in misfits)
    return Key(parts)


def of_engine(source: Source, plan: Plan, profiles: tuple[Profile, ...], lot: Lot, options: Options, *, samples: str) -> Key:
    """Return the key of one engine, whatever package it is built for."""
    parts = {
        "tool": tool(),
        "ops": digest_of_all(),
        "what": "one engine",
        "graph": source.known.fingerprint,
        "passes": plan.key(),
        "profiles": _spell(profiles),
        "targets": " ".join(target.name for target in lot.targets),
        "built by": _builder(lot, options),
    }
    if plan.calibrates:
        parts |= {"samples": samples, "interface": _digest(source.known.interface)}
    if plan.selects:
        parts["names"] = source.known.names
    return Key(parts)


def tool() -> str:
    """Return the version of this tool, and of the manifests it writes."""
    from importlib.metadata import version

    return f"ryzen-compile {version('ryzen-compile')}, manifest {SCHEMA_VERSION}"


def _builder(lot: Lot, options: Options) -> str:
    spelt = f"{lot.backend} {lot.version} {msgspec.json.encode(dict(sorted(options.items()))).decode()}"
    if lot.backend == "tensorrt":  # it times kernels on the GPU that is present
        here = sorted({f"{gpu.name}, driver {gpu.driver}" for gpu in detect()})
        return f"{spelt} on {'; '.join(here)}; {_kernels()}"
    return spelt


def _kernels() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"kernels by triton {version('triton')}"
    except PackageNotFoundError:
        return "no kernels"


def _spell(profiles: tuple[Profile, ...]) -> str:
    # For eyes, and exact: of many inputs of the same shapes the words name two.
    return " | ".join(f"{profile} {_digest(profile)}" for profile in profiles) or "static"


def _digest(data: msgspec.Struct) -> str:
    import blake3

    # As it reads back: what was learnt just now and what the cache remembers of it are equal, and may spell a number 0 and 0.0.
    remembered = msgspec.json.decode(msgspec.json.encode(data), type=type(data))
    return blake3.blake3(msgspec.json.encode(remembered)).hexdigest()[:16]
