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
from ryzen_compile.artifacts.package.manifest import SCHEMA_VERSION, Graph, Manifest, Refused, Variant
from ryzen_compile.artifacts.package.write import Staging
from ryzen_compile.builder import cache_keys, sources, variants
from ryzen_compile.builder.config import Planned, Resolved, Wishes, resolve
from ryzen_compile.builder.engine_builder import Job, Yard
from ryzen_compile.data import loading
from ryzen_compile.errors import AccuracyError, BackendError, RyzenError, did_you_mean
from ryzen_compile.progress import Progress, Silent
from ryzen_compile.utils.record import utc_now

if TYPE_CHECKING:
    from ryzen_compile.artifacts.cache.key import Key
    from ryzen_compile.artifacts.package.read import Package
    from ryzen_compile.builder.sources import Model, Source
    from ryzen_compile.builder.target_assignment import Lot
    from ryzen_compile.spec.passes import Feed


def build(
    model: Model | Mapping[str, Model],
    output: str | os.PathLike[str] | None = None,
    *,
    wishes: Wishes | None = None,
    allow_partial: bool = False,
    cache: str | os.PathLike[str] | Literal[False] | None = None,
    progress: Progress | None = None,
    **wish: Any,
) -> Package:
    """Build a package from an ONNX file, from several by the names of their graphs or from a folder of them, and return it.

    The wishes can be given one by one: `build("model.onnx", gpu="cpu,sm89", precision="fp16")`. `output` defaults to the
    model's name with `.ryzen`. `cache` is the folder of what was built before; False: none.

    A target that cannot be built for is recorded with its reason and the others ship, and so does a variant that cannot be
    compared; unless `allow_partial` this then raises BackendError. A variant that misses its criteria ships with the
    measurements, and then raises AccuracyError. Raises a RyzenError for anything else that cannot be done, and then leaves
    nothing behind.
    """
    if wishes is None:
        wishes = _wishes(wish)
    elif wish:
        raise TypeError("give the wishes as one object or one by one, not both")
    files = sources.named(model)
    beside = Path(model) if isinstance(model, (str, os.PathLike)) else next(iter(files.values()))
    destination = Path(output) if output is not None else beside.with_suffix(".ryzen")
    progress = progress or Silent()
    store = None if cache is False else Store(cache, progress=progress)
    started = time.perf_counter()
    made = _Build(resolve(files, wishes, store, progress), destination, store, progress, started)
    package = made.run(allow_partial=allow_partial)
    objection = _objection(package.manifest, str(package.path), allow_partial=allow_partial, compare=wishes.compare)
    if objection is not None:
        raise objection
    return package


def _wishes(wish: Mapping[str, Any]) -> Wishes:
    known = [field.name for field in dataclasses.fields(Wishes)]
    for name in wish:
        if name not in known:
            raise TypeError(f"build() has no option `{name}`; {did_you_mean(name, known)}")
    return Wishes(**wish)


class _Build:
    """One build of what is resolved."""

    def __init__(self, order: Resolved, destination: Path, store: Store | None, progress: Progress, started: float) -> None:
        self._order = order
        self._destination = destination
        self._store = store
        self._progress = progress
        self._started = started

    def run(self, *, allow_partial: bool) -> Package:
        """Return the package: from the cache where that holds one of the same key, else built.

        One that there is an objection to does not take the place of another: it goes beside it.
        """
        key = self._order.key
        for name, planned in self._order.planned.items():
            for note in dict.fromkeys(note for one in planned for note in one.plan.notes):
                self._progress.say(f"{name}: {note}")
        with ExitStack() as resources:
            if self._store is not None:
                resources.enter_context(self._store.lock(key))
            staging = resources.enter_context(Staging(self._destination))
            recalled = self._recall(key, staging)
            if recalled is not None:
                return self._commit(staging, recalled, allow_partial)
            backends = [lot.backend for lot in self._order.lots]
            yard = resources.enter_context(Yard(staging, backends, self._progress, self._store))
            manifest = self._make(key, staging, yard)
            if self._store is not None and self._is_complete(manifest):
                files = {file.path: file.sha256 for file in staging.files}
                self._store.put(key, staging.folder, files, msgspec.json.encode(manifest))
            return self._commit(staging, manifest, allow_partial)

    def _commit(self, staging: Staging, manifest: Manifest, allow_partial: bool) -> Package:
        compare = self._order.wishes.compare
        if _objection(manifest, "", allow_partial=allow_partial, compare=compare) is not None:
            staging.spare()
        return staging.commit(msgspec.structs.replace(manifest, name=staging.destination.stem))

    def _is_complete(self, manifest: Manifest) -> bool:
        """Whether all that was asked for was done. What was not is tried again by the next build: the reason may be gone."""
        compared = not self._order.wishes.compare or not any(
            variant.not_compared for graph in manifest.graphs for variant in graph.variants
        )
        return compared and not manifest.refused

    def _recall(self, key: Key, staging: Staging) -> Manifest | None:
        hit = self._store.get(key) if self._store is not None else None
        if self._store is None or hit is None:
            return None
        with self._progress.stage("fetch from the cache"):
            try:
                manifest = msgspec.json.decode(hit.payload, type=Manifest)
            except msgspec.ValidationError:
                return None  # kept by a version whose manifests were others
            if not self._store.restore(hit, staging.folder, staging.finished):
                return None
        for file in hit.files:
            staging.add(file.path, sha256=file.sha256)
        self._progress.say(f"the same was built at {manifest.made_at}: taken from the cache")
        files = {source.name: source.file for source in self._order.sources}
        graphs = tuple(_renamed(graph, files[graph.name]) for graph in manifest.graphs)
        return msgspec.structs.replace(manifest, name=self._destination.stem, graphs=graphs)

    def _make(self, key: Key, staging: Staging, yard: Yard) -> Manifest:
        order = self._order
        work = variants.Work(staging=staging, samples=self._samples, seed=order.wishes.seed, progress=self._progress)
        made: dict[str, list[Variant]] = {}
        outcomes = []
        for source in order.sources:
            for planned in order.planned[source.name]:
                variant = variants.make(work, source, planned)
                made.setdefault(source.name, []).append(variant)
                outcomes += [yard.order(self._job(source, planned, variant, lot)) for lot in planned.lots]
        if self._store is not None:
            self._store.keep(staging.folder, {file.path: file.sha256 for file in staging.files})
        graphs = [self._graph(source, made[source.name], staging) for source in order.sources]
        done = [outcome.result() for outcome in outcomes]
        yard.dismiss()
        refused = [*self._misfits(), *(refused for one in done for refused in one.refused)]
        unserved = {one.graph for one in refused if one.backend == "onnxruntime" and one.target.is_cpu}
        return Manifest(
            schema_version=SCHEMA_VERSION,
            name=self._destination.stem,
            key=key.digest,
            inputs=dict(key.parts),
            graphs=tuple(_unserved(graph) if graph.name in unserved else graph for graph in graphs),
            engines=tuple(engine for one in done for engine in one.engines),
            refused=tuple(refused),
            files=(),
            made_by=cache_keys.tool(),
            made_at=utc_now(),
            seconds=round(time.perf_counter() - self._started, 3),
        )

    def _job(self, source: Source, planned: Planned, variant: Variant, lot: Lot) -> Job:
        order = self._order
        profiles, options = order.profiles[source.name], order.options[lot.backend]
        return Job(
            source=source,
            variant=variant,
            lot=lot,
            profiles=profiles,
            options=options,
            limits=order.wishes.limits,
            key=lambda lot: cache_keys.of_engine(source, planned.plan, profiles, lot, options, samples=order.samples),
        )

    def _samples(self, source: Source) -> Sequence[Feed]:
        """Return what passes calibrate on: the user's samples, else seeded ones at the tuned shapes."""
        from ryzen_compile.data.synthetic import synthesize

        wishes, interface = self._order.wishes, source.known.interface
        if wishes.data is not None:
            return list(loading.named(wishes.data, interface, seed=wishes.seed))
        tuned = self._order.profiles[source.name][0].opt
        return [synthesize(interface, tuned, seed=wishes.seed + at, rows="mixed") for at in range(4)]

    def _graph(self, source: Source, made: Sequence[Variant], staging: Staging) -> Graph:
        return Graph(
            name=source.name,
            interface=source.known.interface,
            profiles=self._order.profiles[source.name],
            fingerprint=source.known.fingerprint,
            source=source.file,
            variants=tuple(self._checked(source, variant, staging) for variant in made),
        )

    def _checked(self, source: Source, variant: Variant, staging: Staging) -> Variant:
        """Return `variant` with how far it is from its source, or with the reason why that is not known."""
        if not self._order.wishes.compare:
            return msgspec.structs.replace(variant, not_compared="the build was asked not to")
        from ryzen_compile.builder.accuracy import accuracy_of

        try:
            accuracy = accuracy_of(staging.folder / variant.path, source, self._order, self._progress)
        except BackendError as error:
            reason = staging.relative(error.says)
            self._progress.say(f"{variant.path} is not compared: {reason}")
            portable = variant.portable and _opens(staging.folder / variant.path)
            return msgspec.structs.replace(variant, not_compared=reason, portable=portable)
        return msgspec.structs.replace(variant, accuracy=(accuracy,))

    def _misfits(self) -> list[Refused]:
        return [
            Refused(target=misfit.target, graph=source.name, backend=misfit.backend, reason=misfit.reason, hint=misfit.hint)
            for source in self._order.sources
            for misfit in self._order.misfits
        ]


def _opens(graph: Path) -> bool:
    try:
        with registry.find_backend("onnxruntime").open(str(graph)):
            return True
    except BackendError:
        return False


def _renamed(graph: Graph, file: str) -> Graph:
    """Return a graph from the cache that came from a file of another name then."""
    old = graph.source
    if old == file:
        return graph
    variants = tuple(
        msgspec.structs.replace(
            variant,
            accuracy=tuple(
                msgspec.structs.replace(one, baseline=file + one.baseline.removeprefix(old)) for one in variant.accuracy
            ),
        )
        for variant in graph.variants
    )
    return msgspec.structs.replace(graph, source=file, variants=variants)


def _unserved(graph: Graph) -> Graph:
    """Return a graph that ONNX Runtime refuses: none of its variants is portable."""
    return msgspec.structs.replace(
        graph, variants=tuple(msgspec.structs.replace(variant, portable=False) for variant in graph.variants)
    )


def _objection(manifest: Manifest, place: str, *, allow_partial: bool, compare: bool) -> RyzenError | None:
    """Return what is wrong with a package: a target refused, a variant that misses its criteria or could not be compared."""
    if manifest.refused and not allow_partial:
        return BackendError(
            "; ".join(f"`{one.target}` was refused by {one.backend}: {one.reason}" for one in manifest.refused)
            + f"; the rest is in {place}",
            hint=next((one.hint for one in manifest.refused if one.hint), "leave the target out, or give --allow-partial"),
        )
    uncompared = [
        f"`{variant.path}` could not be compared: {variant.not_compared}"
        for graph in manifest.graphs
        for variant in graph.variants
        if variant.not_compared
    ]
    if compare and uncompared and not allow_partial:
        return BackendError(
            f"{'; '.join(uncompared)}; {place} holds the package",
            hint="build it with --no-compare, or give --allow-partial, if it is to be used all the same",
        )
    missed = list(_missed(manifest))
    if missed:
        return AccuracyError(
            "; ".join(missed) + f"; {place} holds the package and the measurements",
            hint="name the first node that parts with `ryzen-compile compare --bisect`, or give other --criteria",
        )
    return None


def _missed(manifest: Manifest) -> Iterator[str]:
    for graph in manifest.graphs:
        for variant in graph.variants:
            for accuracy in variant.accuracy:
                for metric in accuracy.metrics:
                    if not metric.met:
                        says = f"{metric.output} {metric.name} {metric.required} with {metric.worst:g} ({metric.case})"
                        yield f"`{variant.path}` misses {says}"
                yield from (f"`{variant.path}`: {fault}" for fault in accuracy.faults)
