"""Run the implementations of an op that work on a CPU, and compare them with an oracle; used by the tests of all ops.

An oracle is a slow function in numpy, float64 and Python loops, written from the formula and sharing no code with the op.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ryzen_compile.errors import BackendError
from ryzen_compile.kernels import Interpreter, Specialization
from ryzen_compile.ops.equivalence import ReferenceRunner, cast_inputs, find_mismatch
from ryzen_compile.registry import find_op
from ryzen_compile.spec.op import Op
from support.examples import examples

Arrays = Mapping[str, np.ndarray[Any, Any]]
Attributes = Mapping[str, int | float]
Oracle = Callable[[Arrays, Attributes], Arrays]
"""(inputs cast to the element types of the op and then to float64, attributes) -> the exact outputs by name."""
OutputCheck = Callable[[Arrays, Arrays], str | None]
"""(inputs, outputs of one implementation) -> a description of an error, or None."""

_MUTANTS = itertools.count()


@dataclass(frozen=True, kw_only=True)
class OpCase:
    """Inputs on which the implementations of an op are compared with an oracle."""

    inputs: Arrays
    attributes: Attributes = field(default_factory=dict)
    type_bindings: Mapping[str, str] = field(default_factory=lambda: {"T": "float32"})


Mutants = Mapping[str, Mapping[str, Mapping[str, str | tuple[str, ...]]]]
"""Op -> `kernel` or `reference` -> text that occurs once in its source -> replacements, each of which makes a mutant."""
MismatchFinder = Callable[["OpImplementations", Op], str | None]
"""Returns the first error of an implementation of the op, or of a mutant of it, on the cases of a test module, or None."""


def op_inputs(
    op: Op,
    dims: Mapping[str, int],
    attributes: Attributes | None = None,
    random: np.random.Generator | None = None,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the op's own inputs drawn from `random`, by default a generator with `seed`; the caller may change them."""
    assert op.make_inputs is not None
    return dict(op.make_inputs(random or np.random.default_rng(seed), dims, attributes or {}))


class OpImplementations:
    """The runners of references and kernels, started once for many checks."""

    def __init__(self, folder: Path) -> None:
        """Use `folder` for mutants; it is added to the import path, also of the interpreter."""
        self.folder = folder
        sys.path.insert(0, str(folder))
        self.references, self.interpreter = ReferenceRunner(), Interpreter()
        self._unmodified_mismatches: dict[tuple[str, MismatchFinder], str | None] = {}

    def close(self) -> None:
        self.references.close()
        self.interpreter.close()
        sys.path.remove(str(self.folder))

    def check(
        self,
        op: Op,
        oracle: Oracle | None,
        *,
        dims: Mapping[str, int] | None = None,
        attributes: Attributes | None = None,
        type_bindings: Mapping[str, str] | None = None,
        inputs: Arrays | None = None,
        seed: int = 0,
        output_check: OutputCheck | None = None,
        kernel: bool = True,
    ) -> str | None:
        """Return the first error that `oracle` or `output_check` finds in an implementation of `op`, or None.

        Tactics of the kernel that differ only in warps or stages, which Triton's interpreter ignores, are run once. `inputs`
        default to the op's own random inputs for `dims` and `seed`, and `dims` to those of `inputs`.
        """
        attributes, type_bindings = attributes or {}, type_bindings or {}
        if inputs is None:
            assert dims is not None
            inputs = op_inputs(op, dims, attributes, seed=seed)
        elif dims is None:
            bound = op.bind_dims({name: array.shape for name, array in inputs.items()}, attributes)
            dims = {name: size for name, size in bound.items() if isinstance(size, int) and name not in attributes}
        cast = cast_inputs(op, type_bindings, inputs)
        expected = oracle({name: _to_float64(array) for name, array in cast.items()}, attributes) if oracle else None

        def find_error(outputs: Arrays) -> str | None:
            if output_check is not None and (error := output_check(cast, outputs)) is not None:
                return error
            return find_mismatch(op, type_bindings, outputs, expected) if expected is not None else None

        if (error := find_error(self.references.run(op, type_bindings, attributes, cast))) is not None:
            return f"{op.name} {dict(type_bindings)} {dict(dims)} {dict(attributes)}: the reference: {error}"
        seen: list[dict[str, int | float]] = []
        for tactic in range(len(op.kernel.tactics) if op.kernel and kernel else 0):
            specialization = Specialization(op, type_bindings, attributes, dims, tactic)
            if specialization.constants in seen:
                continue
            seen.append(specialization.constants)
            if (error := find_error(self.interpreter.run(specialization, cast))) is not None:
                return f"{specialization}: the kernel: {error}"
        return None

    def assert_matches(self, op: Op, oracle: Oracle | None, **case: Any) -> None:
        """Assert that `check` with these arguments finds no error."""
        assert (mismatch := self.check(op, oracle, **case)) is None, mismatch

    def assert_random_cases_match(
        self,
        op: Op,
        oracle: Oracle,
        cases: st.SearchStrategy[tuple[dict[str, int], dict[str, Any]]],
        *,
        counts: tuple[int, int],
        type_bindings: Mapping[str, str] | None = None,
    ) -> None:
        """Assert that the implementations match `oracle` on the op's own inputs for drawn pairs of dims and attributes.

        `counts` are the numbers of pairs in `make test`: for float32, or an op without type variables, and for other types.
        """
        is_float32 = (type_bindings or {}).get("T", "float32") == "float32"

        @settings(max_examples=examples(counts[0 if is_float32 else 1]))
        @given(case=cases, seed=st.integers(0, 2**32 - 1))
        def check(case: tuple[dict[str, int], dict[str, Any]], seed: int) -> None:
            dims, attributes = case
            self.assert_matches(op, oracle, dims=dims, attributes=attributes, type_bindings=type_bindings, seed=seed)

        check()

    def find_mismatch(self, op: Op, oracle: Oracle | None, cases: Iterable[OpCase]) -> str | None:
        """Return the first error of an implementation of `op` on `cases`, or None; `cases` is read only up to the error."""
        errors = (
            self.check(op, oracle, attributes=case.attributes, type_bindings=case.type_bindings, inputs=case.inputs)
            for case in cases
        )
        return next((error for error in errors if error is not None), None)

    def assert_mutant_is_detected(self, op: Op, part: str, old: str, new: str, find_mismatch: MismatchFinder) -> None:
        """Assert that `find_mismatch` finds no error in `op`, and one if `old` is `new` in the source of its `part`.

        `part` is `kernel` or `reference`. The unmodified op is checked once per `find_mismatch`, a function of a test module.
        """
        key = (op.name, find_mismatch)
        if key not in self._unmodified_mismatches:
            self._unmodified_mismatches[key] = find_mismatch(self, op)
        assert self._unmodified_mismatches[key] is None
        with self._mutant(op, part, old, new) as modified:
            with suppress(BackendError):  # an invalid write, or a node that fails
                assert find_mismatch(self, modified) is not None

    @contextmanager
    def _mutant(self, op: Op, part: str, old: str, new: str) -> Iterator[Op]:
        function_path = op.kernel.source if part == "kernel" and op.kernel else op.reference
        module, _, name = function_path.partition(":")
        spec = importlib.util.find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        source = Path(spec.origin).read_text(encoding="utf-8")
        assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {module}"
        mutant_module = f"mutant_{next(_MUTANTS)}"
        (self.folder / f"{mutant_module}.py").write_text(source.replace(old, new), encoding="utf-8")
        importlib.invalidate_caches()
        mutant_path = f"{mutant_module}:{name}"
        if part == "kernel":
            assert op.kernel is not None
            yield dataclasses.replace(op, kernel=dataclasses.replace(op.kernel, source=mutant_path))
        else:
            # Sessions are cached by op name, so that a mutant needs a runner of its own.
            previous, self.references = self.references, ReferenceRunner()
            try:
                yield dataclasses.replace(op, reference=mutant_path)
            finally:
                self.references.close()
                self.references = previous


def oracle_comparison(oracle: Oracle, cases: Callable[[Op], Iterable[OpCase]]) -> MismatchFinder:
    """Return a function that compares the implementations of an op with `oracle` on `cases`."""
    return lambda implementations, op: implementations.find_mismatch(op, oracle, cases(op))


def mutant_test(find_mismatch: MismatchFinder, mutants: Mutants) -> Callable[..., None]:
    """Return a test with one case per mutant; it fails if `find_mismatch` finds no error in the mutant, or one in the op."""
    cases = [
        pytest.param(op, part, old, new, id="-".join((part, old, new) if len(mutants) == 1 else (op, part, old, new)))
        for op, parts in mutants.items()
        for part, changes in parts.items()
        for old, replacements in changes.items()
        for new in ((replacements,) if isinstance(replacements, str) else replacements)
    ]

    @pytest.mark.parametrize(("op", "part", "old", "new"), cases)
    def test(implementations: OpImplementations, op: str, part: str, old: str, new: str) -> None:
        implementations.assert_mutant_is_detected(find_op(op), part, old, new, find_mismatch)

    return test


def _to_float64(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return integers unchanged and all other arrays as float64."""
    return array if array.dtype.kind in "iub" else array.astype(np.float64)
