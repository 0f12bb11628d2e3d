"""Verification of ops on this machine: checks of kernels against references, and records of them.

The records are stored in the cache under a digest of the op's declaration and sources, so any change invalidates them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product

import msgspec
import numpy as np

from ryzen_compile.artifacts.cache.store import Store
from ryzen_compile.diagnostic import Diagnostic
from ryzen_compile.errors import AccuracyError
from ryzen_compile.kernels import SMS, Interpreter, Specialization, compile_all, is_compiled
from ryzen_compile.kernels.specialization import typical_specializations
from ryzen_compile.ops.digest import library_versions, op_digest
from ryzen_compile.ops.equivalence import ReferenceRunner, cast_inputs, find_mismatch
from ryzen_compile.progress import Progress, SilentProgress
from ryzen_compile.spec.op import Op
from ryzen_compile.utils.record import Record, utc_now

_CACHE_KIND = "op-verification"
_SEEDS = range(2)


class OpCheck(Record, frozen=True):
    """A passed check of an op's kernel against its reference."""

    machine: str
    """Where the kernel ran: `interpreter`, or the name of a GPU."""
    cases: int
    """Number of compared runs, over element types, dims and tactics."""
    timestamp: str
    """UTC, ISO 8601."""
    versions: dict[str, str]


class OpVerification(Record, frozen=True):
    """The checks and compiled kernels of an op in the cache."""

    op: str
    checks: tuple[OpCheck, ...] = ()
    compiled_counts: dict[str, int] = {}
    """Compute capability (`sm89`) -> number of the op's kernels that the cache contains for it."""
    kernel_count: int = 0
    """Number of kernels for the op's typical dims: one per combination of element types and tactic."""

    def summary(self) -> str:
        """Return a one-line summary."""
        if not self.kernel_count:
            return "no kernel: every runtime runs its reference"
        complete = [sm for sm, count in self.compiled_counts.items() if count == self.kernel_count]
        checks = [f"checked on {check.machine}: {check.cases} cases, {check.timestamp[:10]}" for check in self.checks]
        return "; ".join(
            [f"compiled for {','.join(complete)}" if complete else "not compiled here", *(checks or ["not checked here"])]
        )


def load_verification(op: Op, store: Store) -> OpVerification:
    """Return the verification state of `op` from the cache."""
    if op.kernel is None:
        return OpVerification(op=op.name)
    checks = _load_checks(op, store)
    specializations = [*typical_specializations(op)]
    compiled = {f"sm{sm}": sum(is_compiled(specialization, sm, store) for specialization in specializations) for sm in SMS}
    return OpVerification(op=op.name, checks=checks, compiled_counts=compiled, kernel_count=len(specializations))


def compile_op(op: Op, sms: tuple[int, ...], store: Store, progress: Progress | None = None) -> int:
    """Compile every typical specialization of `op` for `sms` and return the number of kernels. Raises BackendError."""
    return len(compile_all([*typical_specializations(op)], sms, store=store, progress=progress))


def check_op(op: Op, store: Store, progress: Progress | None = None) -> OpCheck | None:
    """Check the op's kernel under Triton's interpreter against its reference on ONNX Runtime, and store the check.

    Each may differ from the exact result by the op's tolerance, so they may differ from each other by twice the tolerance.
    Returns None for an op without a kernel. Raises AccuracyError with the location of a difference.
    """
    if op.kernel is None:
        return None
    reporter = progress or SilentProgress()
    count = 0
    with ReferenceRunner() as references, Interpreter() as interpreter:
        for specialization in test_specializations(op):
            assert op.make_inputs is not None
            for seed in _SEEDS:
                random_inputs = op.make_inputs(np.random.default_rng(seed), specialization.dims, specialization.attributes)
                inputs = cast_inputs(op, specialization.type_bindings, random_inputs)
                expected = references.run(op, specialization.type_bindings, specialization.attributes, inputs)
                actual = interpreter.run(specialization, inputs)
                if (
                    mismatch := find_mismatch(op, specialization.type_bindings, actual, expected, tolerance_factor=2)
                ) is not None:
                    raise AccuracyError(f"{specialization}: kernel and reference differ: {mismatch}")
                count += 1
        message = f"kernel and reference agree in {count} cases"
        reporter.report(Diagnostic(code="op-checked", severity="info", message=message, location=op.name))
    check = OpCheck(machine="interpreter", cases=count, timestamp=utc_now(), versions=dict(library_versions()))
    save_check(op, check, store)
    return check


def test_specializations(op: Op) -> Iterator[Specialization]:
    """Yield the specializations of the op's test cases, for every combination of element types.

    Tactics that differ only in `num_warps` or `num_stages` are yielded once.
    """
    for case, dtypes in product(op.test_cases, product(*(op.type_constraints[variable] for variable in op.type_variables))):
        attributes, sizes = split_case(op, case)
        seen: list[Mapping[str, int | float]] = []
        for tactic in range(len(op.kernel.tactics) if op.kernel else 0):
            specialization = Specialization(op, dict(zip(op.type_variables, dtypes, strict=True)), attributes, sizes, tactic)
            if specialization.constants not in seen:
                seen.append(specialization.constants)
                yield specialization


def split_case(op: Op, case: Mapping[str, float]) -> tuple[dict[str, int | float], dict[str, int]]:
    """Return the attributes and the dims of a test case."""
    attributes = {attribute.name: attribute.type_(case[attribute.name]) for attribute in op.attributes}
    return attributes, {name: int(value) for name, value in case.items() if name not in attributes}


def save_check(op: Op, new_check: OpCheck, store: Store) -> None:
    """Store a check, replacing an earlier check of the same machine."""
    other_checks = [check for check in _load_checks(op, store) if check.machine != new_check.machine]
    store.cache_result(_CACHE_KIND, op_digest(op), msgspec.json.encode([*other_checks, new_check]).decode())


def _load_checks(op: Op, store: Store) -> tuple[OpCheck, ...]:
    text = store.cached_result(_CACHE_KIND, op_digest(op))
    try:
        return msgspec.json.decode(text, type=tuple[OpCheck, ...]) if text is not None else ()
    except msgspec.DecodeError:  # written by another version
        return ()
