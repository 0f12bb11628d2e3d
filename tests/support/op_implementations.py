"""The lives of an op that a CPU can run, held against an oracle of its own: what every op's tests are made of.

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
"""(inputs as every life gets them, attributes) -> the exact outputs by name."""
OutputCheck = Callable[[Arrays, Arrays], str | None]
"""(inputs, outputs of one life) -> what is wrong with them, or None."""

_MUTANTS = itertools.count()


class OpImplementations:
    """The runners, started once for many checks."""

    def __init__(self, folder: Path) -> None:
        """Use `folder` for mutants; it is on the path of the interpreter."""
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
        """Return where a life disagrees with `oracle` or displeases `judge`, or None.

        Of the kernel's tactics every one is run that differs in more than what Triton's interpreter knows nothing of: warps.
        `inputs` default to what the op itself draws for `seed`.
        """
        if inputs is None:
            assert op.make_inputs is not None
            inputs = op.make_inputs(np.random.default_rng(seed), dims, attributes)
        given = cast_inputs(op, type_bindings, inputs)
        exact = oracle({name: _to_float64(array) for name, array in given.items()}, attributes) if oracle else None

        def wrong(found: Arrays) -> str | None:
            if output_check is not None and (said := output_check(given, found)) is not None:
                return said
            return find_mismatch(op, type_bindings, found, exact) if exact is not None else None

        if (said := wrong(self.references.run(op, type_bindings, attributes, given))) is not None:
            return f"{op.name} {dict(type_bindings)} {dict(dims)} {dict(attributes)}: the reference: {said}"
        ran: list[dict[str, int | float]] = []
        for tactic in range(len(op.kernel.tactics) if op.kernel and kernel else 0):
            instance = Specialization(op, type_bindings, attributes, dims, tactic)
            if instance.constants in ran:
                continue
            ran.append(instance.constants)
            if (said := wrong(self.interpreter.run(instance, given))) is not None:
                return f"{instance}: the kernel: {said}"
        return None

    def detects_mutation(self, op: Op, part: str, old: str, new: str, check: Callable[[Op], str | None]) -> bool:
        """Tell whether `check` notices that `old` reads `new` in the source of the op's `part`, kernel or reference."""
        with self._mutant(op, part, old, new) as mutant:
            try:
                return check(mutant) is not None
            except BackendError:  # a wild write, or a node that fails
                return True

    @contextmanager
    def _mutant(self, op: Op, part: str, old: str, new: str) -> Iterator[Op]:
        where = op.kernel.source if part == "kernel" and op.kernel else op.reference
        module, _, name = where.partition(":")
        spec = importlib.util.find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        source = Path(spec.origin).read_text(encoding="utf-8")
        assert source.count(old) == 1, f"{old!r} is {source.count(old)} times in {module}"
        mutant = f"mutant_{next(_MUTANTS)}"
        (self.folder / f"{mutant}.py").write_text(source.replace(old, new), encoding="utf-8")
        importlib.invalidate_caches()
        changed = f"{mutant}:{name}"
        if part == "kernel":
            assert op.kernel is not None
            yield dataclasses.replace(op, kernel=dataclasses.replace(op.kernel, source=changed))
        else:
            # Sessions are kept by name, so that a mutant must be run by runners of its own.
            kept, self.references = self.references, ReferenceRunner()
            try:
                yield dataclasses.replace(op, reference=changed)
            finally:
                self.references.__exit__(None, None, None)
                self.references = kept


def _to_float64(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return integers as they are and everything else as float64."""
    return array if array.dtype.kind in "iub" else array.astype(np.float64)
