"""Wishes: what the user asked for, and what it comes to: backends, profiles, plans and the key of the result."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from ryzen_compile.backends.builder_options import accept
from ryzen_compile.builder import cache_keys, default_pipelines, sources
from ryzen_compile.builder.target_assignment import Lot, Misfit, assign
from ryzen_compile.data import loading
from ryzen_compile.errors import PlanError
from ryzen_compile.numerics.criteria import Criteria, defaults, load
from ryzen_compile.spec import profile
from ryzen_compile.spec.target import parse_all

if TYPE_CHECKING:
    from ryzen_compile.artifacts.cache.key import Key
    from ryzen_compile.artifacts.cache.store import Store
    from ryzen_compile.builder.default_pipelines import Plan, Precision
    from ryzen_compile.builder.sources import Source
    from ryzen_compile.progress import Progress
    from ryzen_compile.spec.profile import Profile


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much one engine's build may take."""

    memory_bytes: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Wishes:
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
    limits: Limits = Limits()


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A variant to make, and the lots to build from it."""

    plan: Plan
    lots: tuple[Lot, ...]


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """Wishes made concrete: everything that decides the result."""

    wishes: Wishes
    sources: tuple[Source, ...]
    profiles: Mapping[str, tuple[Profile, ...]]
    """By the names of the graphs."""
    planned: Mapping[str, tuple[Planned, ...]]
    """By the names of the graphs; the portable variant comes last, so that engines are on their way before it is made."""
    lots: tuple[Lot, ...]
    misfits: tuple[Misfit, ...]
    options: Mapping[str, cache_keys.Options]
    """Builder options by backend, as accepted."""
    samples: str
    """What decides the samples, in short."""
    criteria: Criteria
    """What variants are held to."""

    @property
    def key(self) -> Key:
        """The cache key of the package."""
        return cache_keys.of_package(
            self.sources,
            {name: [one.plan for one in planned] for name, planned in self.planned.items()},
            self.profiles,
            self.lots,
            self.misfits,
            self.options,
            samples=self.samples,
            comparison=self._comparison(),
        )

    def _comparison(self) -> str:
        if not self.wishes.compare:
            return "none"
        held_to = msgspec.json.encode((self.criteria.limits, self.criteria.outputs)).decode()
        return f"{self.samples}, criteria {self.criteria.name} {held_to}, by {_runtime()}"


def _runtime() -> str:
    """Return the version of ONNX Runtime, which runs the comparisons, without importing it."""
    from importlib.metadata import PackageNotFoundError, version

    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return "no ONNX Runtime"


def resolve(files: Mapping[str, Path], wishes: Wishes, store: Store | None, progress: Progress) -> Resolved:
    """Make `wishes` concrete for these files; raises a RyzenError that names what cannot be had."""
    lots, misfits = assign(parse_all(wishes.gpu), wishes.backend)
    found = sources.read(files, store)
    planned = {source.name: _planned(source, wishes, lots) for source in found}
    return Resolved(
        wishes=wishes,
        sources=found,
        profiles={source.name: _profiles(source, wishes, progress) for source in found},
        planned=planned,
        lots=lots,
        misfits=misfits,
        options=_options(lots, wishes.options),
        samples=loading.digest(wishes.data, [source.known.interface for source in found], seed=wishes.seed),
        criteria=load(Path(wishes.criteria)) if wishes.criteria is not None else defaults(),
    )


def _options(lots: Sequence[Lot], raw: Mapping[str, str]) -> dict[str, cache_keys.Options]:
    """Accept builder options for every backend that builds; ONNX Runtime is asked only where it is alone."""
    backends = list(dict.fromkeys(lot.backend for lot in lots))
    builders = [backend for backend in backends if backend != "onnxruntime"] or backends
    return {backend: accept(backend, raw if backend in builders else {}) for backend in backends}


def _profiles(source: Source, wishes: Wishes, progress: Progress) -> tuple[Profile, ...]:
    interface = source.known.interface
    resolved = profile.resolve(interface, smallest=wishes.min_shapes, tuned=wishes.opt_shapes, largest=wishes.max_shapes)
    asked = wishes.min_shapes or wishes.opt_shapes or wishes.max_shapes
    if not asked and any(spec.is_dynamic for spec in interface.inputs):
        progress.say(f"{source.name}: no shapes were given, so they are derived: {resolved[0]}")
    return resolved


def _planned(source: Source, wishes: Wishes, lots: Sequence[Lot]) -> tuple[Planned, ...]:
    dealt: dict[str, list[Lot]] = {"onnxruntime": []}
    for lot in lots:
        dealt.setdefault(lot.backend, []).append(lot)
    planned = tuple(
        Planned(
            plan=default_pipelines.plan_for(
                backend, passes=wishes.passes, precision=wishes.precision, half_source=source.known.half
            ),
            lots=tuple(group),
        )
        for backend, group in sorted(dealt.items(), key=lambda item: item[0] == "onnxruntime")
    )
    first = [pass_ for pass_ in planned[0].plan.passes if pass_.changes_interface]
    if first:
        spelt = ",".join(map(str, first))
        raise PlanError(
            f"`{first[0].name}` gives the model other inputs and states, and a build keeps those that its source has",
            hint=f"run it first: ryzen-compile rewrite {source.file} decode.onnx --passes '{spelt}', and build decode.onnx",
        )
    return planned
