"""Runs the implementations of an op that work on a CPU and compares them with an oracle; used by the tests of all ops.

An oracle is a slow function in numpy, float64 and Python loops, written from the formula and sharing no code with the op.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ryzen_compile.errors import BackendError
from ryzen_compile.kernels import Interpreter, Specialization
from ryzen_compile.ops.equivalence import ReferenceRunner, cast_inputs, find_mismatch
from ryzen_compile.spec.op import Op

Arrays = Mapping[str, np.ndarray[Any, Any]]
Attributes = Mapping[str, int | float]
Oracle = Callable[[Arrays, Attributes], Arrays]
"""(inputs cast to the element types of the op and then to float64, attributes) -> the exact outputs by name."""
OutputCheck = Callable[[Arrays, Arrays], str | None]
"""(inputs, outputs of one implementation) -> a description of an error, or None."""

_MUTANTS = itertools.count()


class OpImplementations:
    """The runners of references and kernels, started once for many checks."""

    def __init__(self, folder: Path) -> None:
        """Use `folder` for mutants; it is added to the import path, also of the interpreter."""
        self.folder = folder
        sys.path.insert(0, str(folder))
        self.references, self.interpreter = ReferenceRunner(), Interpreter()

    def close(self) -> None:
        self.references.__exit__(None, None, None)
        self.interpreter.__exit__(None, None, None)
        sys.path.remove(str(self.folder))

    def check(
        self,
        op: Op,
        oracle: Oracle | None,
        *,
        dims: Mapping[str, int],
        attributes: Attributes,
        type_bindings: Mapping[str, str],
        inputs: Arrays | None = None,
        seed: int = 0,
        output_check: OutputCheck | None = None,
        kernel: bool = True,
    ) -> str | None:
        """Return the first error that `oracle` or `output_check` finds in an implementation of `op`, or None.

        Tactics of the kernel that differ only in warps or stages, which Triton's interpreter ignores, are run once. `inputs`
        default to the op's own random inputs for `seed`.
        """
        if inputs is None:
            assert op.make_inputs is not None
            inputs = op.make_inputs(np.random.default_rng(seed), dims, attributes)
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

    def detects_mutation(self, op: Op, part: str, old: str, new: str, check: Callable[[Op], str | None]) -> bool:
        """Return whether `check` fails if `old` is replaced by `new` in the source of the op's `part`: kernel or reference."""
        with self._mutant(op, part, old, new) as mutant:
            try:
                return check(mutant) is not None
            except BackendError:  # an invalid write, or a node that fails
                return True

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
                self.references.__exit__(None, None, None)
                self.references = previous


def _to_float64(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return integers unchanged and all other arrays as float64."""
    return array if array.dtype.kind in "iub" else array.astype(np.float64)
