"""What is known of an op on this machine: which of its lives were held against which, where, and when.

It is kept in the cache by a digest of the op's declaration and sources: a change to any of them leaves nothing known.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import product

import msgspec
import numpy as np

from ryzen_compile.artifacts.cache.store import Store
from ryzen_compile.errors import AccuracyError
from ryzen_compile.kernels import SMS, Instance, Interpreter, compile_all, is_compiled
from ryzen_compile.kernels.aot import source_digest
from ryzen_compile.kernels.specialization import typical
from ryzen_compile.ops.equivalence import References, disagreement, rounded
from ryzen_compile.progress import Progress, Silent
from ryzen_compile.spec.op import Op
from ryzen_compile.utils.record import Record, utc_now

_MEMO = "op-evidence"
_LAYOUT = 2
"""Changes when what a check does changes."""
_SEEDS = range(2)


class Check(Record, frozen=True):
    """A kernel that did what the reference says."""

    where: str
    """`interpreter`, or the name of a GPU."""
    cases: int
    """How many inputs both were given, over types, dims and tactics."""
    made_at: str
    """UTC, ISO 8601."""
    versions: dict[str, str]


class Evidence(Record, frozen=True):
    """What is known of an op."""

    op: str
    checks: tuple[Check, ...] = ()
    compiled: dict[str, int] = {}
    """Compute capability -> how many of `kernels` the cache has for it."""
    kernels: int = 0
    """How many kernels the op's typical dims come to: one for each choice of types and tactic."""

    def says(self) -> str:
        """Return it in one line."""
        if not self.kernels:
            return "no kernel: every runtime runs its reference"
        whole = [sm for sm, count in self.compiled.items() if count == self.kernels]
        checks = [f"checked on {check.where}: {check.cases} cases, {check.made_at[:10]}" for check in self.checks]
        return "; ".join(
            [f"compiled for {','.join(whole)}" if whole else "not compiled here", *(checks or ["not checked here"])]
        )


def of(op: Op, store: Store) -> Evidence:
    """Return what the cache knows of `op`."""
    if op.kernel is None:
        return Evidence(op=op.name)
    checks = _remembered(op, store)
    instances = [*typical(op)]
    compiled = {f"sm{sm}": sum(is_compiled(one, sm, store) for one in instances) for sm in SMS}
    return Evidence(op=op.name, checks=checks, compiled=compiled, kernels=len(instances))


def compile_op(op: Op, sms: tuple[int, ...], store: Store, progress: Progress | None = None) -> int:
    """Compile every typical instance of `op` for `sms`; returns how many kernels there are."""
    return len(compile_all([*typical(op)], sms, store=store, progress=progress))


def check(op: Op, store: Store, progress: Progress | None = None) -> Check | None:
    """Hold the op's kernel, under Triton's interpreter, against its reference on ONNX Runtime, and remember that it agreed.

    Both may be as far from the exact result as the op's tolerance says, so twice that from each other. Returns None for an op
    without a kernel; raises AccuracyError that says where they differ.
    """
    if op.kernel is None:
        return None
    told = progress or Silent()
    count = 0
    with References() as references, Interpreter() as interpreter:
        for instance in small(op):
            assert op.draw is not None
            for seed in _SEEDS:
                drawn = op.draw(np.random.default_rng(seed), instance.dims, instance.attributes)
                given = rounded(op, instance.elements, drawn)
                meant = references.run(op, instance.elements, instance.attributes, given)
                found = interpreter.run(instance, given)
                if (said := disagreement(op, instance.elements, found, meant, slack=2)) is not None:
                    raise AccuracyError(f"{instance}: kernel and reference disagree: {said}")
                count += 1
        told.say(f"{op.name}: kernel and reference agree in {count} cases")
    done = Check(where="interpreter", cases=count, made_at=utc_now(), versions=_versions())
    remember(op, done, store)
    return done


def small(op: Op) -> Iterator[Instance]:
    """Yield the op at its small cases: every choice of element types, every tactic that changes more than warps."""
    for case, choice in product(op.cases, product(*(op.elements[variable] for variable in op.variables))):
        attributes, sizes = split(op, case)
        seen: list[Mapping[str, int | float]] = []
        for tactic in range(len(op.kernel.tactics) if op.kernel else 0):
            instance = Instance(op, dict(zip(op.variables, choice, strict=True)), attributes, sizes, tactic)
            if instance.constants not in seen:
                seen.append(instance.constants)
                yield instance


def split(op: Op, case: Mapping[str, float]) -> tuple[dict[str, int | float], dict[str, int]]:
    """Return the attributes and the dims of a case."""
    attributes = {one.name: one.kind(case[one.name]) for one in op.attributes}
    return attributes, {name: int(value) for name, value in case.items() if name not in attributes}


def remember(op: Op, done: Check, store: Store) -> None:
    """Keep a check, in place of an earlier one of the same place."""
    kept = [one for one in _remembered(op, store) if one.where != done.where]
    store.memoize(_MEMO, digest(op), msgspec.json.encode([*kept, done]).decode())


def _remembered(op: Op, store: Store) -> tuple[Check, ...]:
    text = store.memo(_MEMO, digest(op))
    try:
        return msgspec.json.decode(text, type=tuple[Check, ...]) if text is not None else ()
    except msgspec.DecodeError:  # of another version
        return ()


def digest_of_all() -> str:
    """Return a digest of every op that is known here: what a graph that holds some of them may mean and become."""
    from ryzen_compile import registry

    return hashlib.sha256(repr([digest(op) for op in registry.ops().values()]).encode()).hexdigest()[:16]


def digest(op: Op) -> str:
    """Return a digest of the op's package, its declaration in it, and of the versions of what runs its lives."""
    sources = [op.reference.partition(":")[0], *([op.kernel.source.partition(":")[0]] if op.kernel else [])]
    return hashlib.sha256(repr((_LAYOUT, str(op), op.version, _versions(), source_digest(*sources))).encode()).hexdigest()


def _versions() -> dict[str, str]:
    """Return the versions of what runs the lives of an op."""
    found = {}
    for name in ("triton", "torch", "onnxruntime", "onnxruntime-gpu"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
