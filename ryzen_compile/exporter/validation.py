"""Comparison of the outputs of an exported graph with those of its module, on inputs of several shapes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ryzen_compile import registry
from ryzen_compile.backends.traits import portable_backend
from ryzen_compile.data.synthetic import synthesize
from ryzen_compile.data.validation import check_shapes
from ryzen_compile.errors import AccuracyError, BackendError, RyzenError
from ryzen_compile.spec.dims import resolve_dim
from ryzen_compile.spec.interface import Inputs, Interface, RunFunction
from ryzen_compile.spec.profile import Shape, format_shape
from ryzen_compile.utils.record import Record

Array = np.ndarray[Any, Any]

TOLERANCES = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}
"""The default maximum difference by element type, relative to the largest magnitude of the output (at least 1): about 100
epsilon for float32 and wider types, 2 epsilon for half types, whose sums are rounded once. Applies if neither the recipe nor
the user gives a bound. Outputs of all other types must be equal."""


class Deviation(Record, frozen=True):
    """The largest deviation of one output of the graph from that of the module."""

    output: str
    dtype: str
    max_abs: float
    """The maximum absolute difference in that case."""
    bound: float
    """The accepted difference in that case."""
    case: str
    """The case with the largest fraction of the bound."""

    @property
    def bound_fraction(self) -> float:
        """The difference as a fraction of the bound, in [0, 1]."""
        return self.max_abs / self.bound if self.bound else 0.0


def comparison_inputs(samples: Iterable[Inputs], interface: Interface, *, seed: int) -> Iterator[tuple[str, Inputs]]:
    """Yield (source, inputs) for the comparison: the samples, then synthetic inputs with mixed rows for two sets of shapes."""
    for index, sample in enumerate(samples):
        yield f"sample {index}", sample
    for shapes in _test_shapes(interface):
        yield "synthetic", synthesize(interface, shapes, seed=seed, rows="mixed")


def _test_shapes(interface: Interface) -> list[dict[str, Shape]]:
    """Return shapes with all dynamic sizes 1, and shapes with different sizes up to the maximum of each dimension."""
    dims = dict.fromkeys(dim for spec in interface.inputs for dim in spec.dims or () if isinstance(dim, str) and "+" not in dim)
    shape_sets: list[dict[str, Shape]] = []
    for sizes in ((1,), (3, 7, 5, 6)):
        dim_sizes = {dim: min(sizes[index % len(sizes)], interface.max_sizes.get(dim, 7)) for index, dim in enumerate(dims)}
        shapes = {spec.name: tuple(resolve_dim(dim, dim_sizes) or 1 for dim in spec.dims or ()) for spec in interface.inputs}
        if shapes not in shape_sets:
            shape_sets.append(shapes)
    return shape_sets


def compare_with_module(
    graph: Path, module: RunFunction, cases: Iterable[tuple[str, Inputs]], interface: Interface, *, max_abs: float | None
) -> tuple[int, tuple[Deviation, ...]]:
    """Run graph and module on each case; return the number of cases and the largest deviation of each output.

    Raises:
        AccuracyError: An output differs by more than its bound, the graph fails on a case, or there are no cases or outputs.
        BackendError: ONNX Runtime cannot load the graph.
        RyzenError: The module fails on a case.
    """
    worst: dict[str, Deviation] = {}
    count = 0
    with registry.find_backend(portable_backend()).open(str(graph)) as session:
        graph_inputs = {spec.name for spec in session.inputs}
        for source, inputs in cases:
            case = f"{source}, {_format_sizes(interface, inputs)}"
            try:
                expected_outputs = module(inputs)
            except RyzenError as error:
                raise RyzenError(
                    f"{error.message} ({case})", hint="omit from --dynamic the dimensions that do not support this size"
                ) from error
            try:
                outputs = session.run({name: array for name, array in inputs.items() if name in graph_inputs})
            except BackendError as error:
                raise AccuracyError(
                    f"the exported graph fails on inputs that the module accepts ({case}): {error.message}",
                    hint="omit from --dynamic the dimensions that the graph does not support",
                ) from error
            for name, expected in expected_outputs.items():
                deviation = _compare_output(name, outputs[name], expected, max_abs, case)
                if name not in worst or deviation.bound_fraction > worst[name].bound_fraction:
                    worst[name] = deviation
            count += 1
    if not worst:
        raise AccuracyError("the exported graph was not compared with the module: there are no cases", hint="provide samples")
    return count, tuple(worst.values())


def _format_sizes(interface: Interface, inputs: Inputs) -> str:
    """Return `batch=3, seq=7`, or the first input's shape if there are no named dimensions."""
    shapes = {name: array.shape for name, array in inputs.items()}
    sizes = check_shapes(interface, shapes)
    return ", ".join(f"{dim}={size}" for dim, size in sizes.items()) or format_shape(next(iter(shapes.values()), ()))


def _compare_output(name: str, actual: Array, expected: Array, max_abs: float | None, case: str) -> Deviation:
    """Return the deviation of one output in one case; raises AccuracyError if it exceeds the bound or shape or type differ."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise AccuracyError(
            f"output `{name}` of the exported graph is {actual.dtype.name} {format_shape(actual.shape)}, "
            f"but that of the module is {expected.dtype.name} {format_shape(expected.shape)} ({case})"
        )
    tolerance, worst = TOLERANCES.get(expected.dtype.name, 0.0), 0.0
    bound = 0.0 if not tolerance else max_abs if max_abs is not None else tolerance * max(1.0, _max_magnitude(expected))
    if expected.size:
        with np.errstate(invalid="ignore"):
            difference = np.abs(_to_float64(actual) - _to_float64(expected))
        equal = (actual == expected) | ((actual != actual) & (expected != expected))
        worst = float(np.where(equal, 0.0, difference).max())
    if not worst <= bound:
        raise AccuracyError(
            f"output `{name}` of the exported graph differs from that of the module by {worst:.3g}, more than the accepted "
            f"{bound:.3g} ({case})",
            hint="increase --max-abs, or check forward for data-dependent control flow",
        )
    return Deviation(output=name, dtype=expected.dtype.name, max_abs=worst, bound=bound, case=case)


def _to_float64(array: Array) -> Array:
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def _max_magnitude(array: Array) -> float:
    finite = np.abs(_to_float64(array))
    return float(finite[np.isfinite(finite)].max(initial=0.0))
