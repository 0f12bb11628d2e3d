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
from ryzen_compile.kernels import SMS, Interpreter, Specialization, compile_all, is_compiled
from ryzen_compile.kernels.aot import source_digest
from ryzen_compile.kernels.specialization import typical_specializations
from ryzen_compile.ops.equivalence import ReferenceRunner, cast_inputs, find_mismatch
from ryzen_compile.progress import Progress, SilentProgress
from ryzen_compile.spec.op import Op
from ryzen_compile.utils.record import Record, utc_now

_CACHE_KIND = "op-evidence"
_FORMAT_VERSION = 2
"""Changes when what a check does changes."""
_SEEDS = range(2)


class OpCheck(Record, frozen=True):
    """A kernel that did what the reference says."""

    machine: str
    """`interpreter`, or the name of a GPU."""
    cases: int
    """How many inputs both were given, over types, dims and tactics."""
    timestamp: str
    """UTC, ISO 8601."""
    versions: dict[str, str]


class OpVerification(Record, frozen=True):
    """What is known of an op."""

    op: str
    checks: tuple[OpCheck, ...] = ()
    compiled_counts: dict[str, int] = {}
    """Compute capability -> how many of `kernels` the cache has for it."""
    kernel_count: int = 0
    """How many kernels the op's typical dims come to: one for each choice of types and tactic."""

    def summary(self) -> str:
        """Return it in one line."""
        if not self.kernel_count:
            return "no kernel: every runtime runs its reference"
        whole = [sm for sm, count in self.compiled_counts.items() if count == self.kernel_count]
        checks = [f"checked on {check.machine}: {check.cases} cases, {check.timestamp[:10]}" for check in self.checks]
        return "; ".join(
            [f"compiled for {','.join(whole)}" if whole else "not compiled here", *(checks or ["not checked here"])]
        )


def load_verification(op: Op, store: Store) -> OpVerification:
    """Return what the cache knows of `op`."""
    if op.kernel is None:
        return OpVerification(op=op.name)
    checks = _load_checks(op, store)
    instances = [*typical_specializations(op)]
    compiled = {f"sm{sm}": sum(is_compiled(one, sm, store) for one in instances) for sm in SMS}
    return OpVerification(op=op.name, checks=checks, compiled_counts=compiled, kernel_count=len(instances))


def compile_op(op: Op, sms: tuple[int, ...], store: Store, progress: Progress | None = None) -> int:
    """Compile every typical instance of `op` for `sms`; returns how many kernels there are."""
    return len(compile_all([*typical_specializations(op)], sms, store=store, progress=progress))


def check_op(op: Op, store: Store, progress: Progress | None = None) -> OpCheck | None:
    """Hold the op's kernel, under Triton's interpreter, against its reference on ONNX Runtime, and remember that it agreed.

    Both may be as far from the exact result as the op's tolerance says, so twice that from each other. Returns None for an op
    without a kernel; raises AccuracyError that says where they differ.
    """
    if op.kernel is None:
        return None
    told = progress or SilentProgress()
    count = 0
    with ReferenceRunner() as references, Interpreter() as interpreter:
        for instance in test_specializations(op):
            assert op.make_inputs is not None
            for seed in _SEEDS:
                drawn = op.make_inputs(np.random.default_rng(seed), instance.dims, instance.attributes)
                given = cast_inputs(op, instance.type_bindings, drawn)
                meant = references.run(op, instance.type_bindings, instance.attributes, given)
                found = interpreter.run(instance, given)
                if (said := find_mismatch(op, instance.type_bindings, found, meant, tolerance_factor=2)) is not None:
                    raise AccuracyError(f"{instance}: kernel and reference disagree: {said}")
                count += 1
        told.message(f"{op.name}: kernel and reference agree in {count} cases")
    done = OpCheck(machine="interpreter", cases=count, timestamp=utc_now(), versions=_versions())
    save_check(op, done, store)
    return done


def test_specializations(op: Op) -> Iterator[Specialization]:
    """Yield the op at its small cases: every choice of element types, every tactic that changes more than warps."""
    for case, choice in product(op.test_cases, product(*(op.type_constraints[variable] for variable in op.type_variables))):
        attributes, sizes = split_case(op, case)
        seen: list[Mapping[str, int | float]] = []
        for tactic in range(len(op.kernel.tactics) if op.kernel else 0):
            instance = Specialization(op, dict(zip(op.type_variables, choice, strict=True)), attributes, sizes, tactic)
            if instance.constants not in seen:
                seen.append(instance.constants)
                yield instance


def split_case(op: Op, case: Mapping[str, float]) -> tuple[dict[str, int | float], dict[str, int]]:
    """Return the attributes and the dims of a case."""
    attributes = {one.name: one.type_(case[one.name]) for one in op.attributes}
    return attributes, {name: int(value) for name, value in case.items() if name not in attributes}


def save_check(op: Op, new_check: OpCheck, store: Store) -> None:
    """Keep a check, in place of an earlier one of the same place."""
    kept = [one for one in _load_checks(op, store) if one.machine != new_check.machine]
    store.cache_result(_CACHE_KIND, op_digest(op), msgspec.json.encode([*kept, new_check]).decode())


def _load_checks(op: Op, store: Store) -> tuple[OpCheck, ...]:
    text = store.cached_result(_CACHE_KIND, op_digest(op))
    try:
        return msgspec.json.decode(text, type=tuple[OpCheck, ...]) if text is not None else ()
    except msgspec.DecodeError:  # of another version
        return ()


def all_ops_digest() -> str:
    """Return a digest of every op that is known here: what a graph that holds some of them may mean and become."""
    from ryzen_compile import registry

    return hashlib.sha256(repr([op_digest(op) for op in registry.ops().values()]).encode()).hexdigest()[:16]


def op_digest(op: Op) -> str:
    """Return a digest of the op's package, its declaration in it, and of the versions of what runs its lives."""
    sources = [op.reference.partition(":")[0], *([op.kernel.source.partition(":")[0]] if op.kernel else [])]
    return hashlib.sha256(
        repr((_FORMAT_VERSION, str(op), op.version, _versions(), source_digest(*sources))).encode()
    ).hexdigest()


def _versions() -> dict[str, str]:
    """Return the versions of what runs the lives of an op."""
    found = {}
    for name in ("triton", "torch", "onnxruntime", "onnxruntime-gpu"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
