"""Agreement: whether an exported graph does what its module does, over feeds of several shapes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ryzen_compile import registry
from ryzen_compile.data.synthetic import synthesize
from ryzen_compile.data.validation import check_shapes
from ryzen_compile.errors import AccuracyError, BackendError, RyzenError
from ryzen_compile.spec.interface import Interface, resolve_dim
from ryzen_compile.spec.profile import Shape, format_shape
from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    from ryzen_compile.spec.passes import Inputs
    from ryzen_compile.torch_module import Runner

Array = np.ndarray[Any, Any]

TOLERANCES = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}
"""For each type the largest difference that is laid to rounding alone, in units of the output's largest magnitude (at least
1): about 100 times the type's epsilon in float32 and wider, 2 times in the half types, whose sums are rounded once. It is
what a module is held to whose recipe or user names no bound. All other types must be equal."""


class Deviation(Record, frozen=True):
    """How far one output of the graph was from the module's, at its worst."""

    output: str
    dtype: str
    max_abs: float
    bound: float
    """The largest difference that was accepted there."""
    case: str
    """The shapes at which it was worst."""

    @property
    def bound_fraction(self) -> float:
        """How much of the bound was used, in [0, 1]."""
        return self.max_abs / self.bound if self.bound else 0.0


def comparison_inputs(samples: Iterable[Inputs], interface: Interface, *, seed: int) -> Iterator[tuple[str, Inputs]]:
    """Yield what to compare on, and where it comes from: the samples, then synthetic feeds of mixed rows at two shapes."""
    for at, sample in enumerate(samples):
        yield f"sample {at}", sample
    for shapes in _test_shapes(interface):
        yield "synthetic", synthesize(interface, shapes, seed=seed, rows="mixed")


def _test_shapes(interface: Interface) -> list[dict[str, Shape]]:
    """Return the smallest shapes, all 1, and odd ones in which dimensions differ in size as far as their largest allows."""
    dims = dict.fromkeys(dim for spec in interface.inputs for dim in spec.dims or () if isinstance(dim, str) and "+" not in dim)
    found: list[dict[str, Shape]] = []
    for sizes in ((1,), (3, 7, 5, 6)):
        named = {dim: min(sizes[at % len(sizes)], interface.max_sizes.get(dim, 7)) for at, dim in enumerate(dims)}
        shapes = {spec.name: tuple(resolve_dim(dim, named) or 1 for dim in spec.dims or ()) for spec in interface.inputs}
        if shapes not in found:
            found.append(shapes)
    return found


def compare_with_module(
    graph: Path, module: Runner, cases: Iterable[tuple[str, Inputs]], interface: Interface, *, max_abs: float | None
) -> tuple[int, tuple[Deviation, ...]]:
    """Run graph and module on each case; return how many there were, and each output's worst deviation.

    Raises AccuracyError that names output, case, difference and bound where they part, or where nothing was compared, and
    BackendError where ONNX Runtime refuses the graph.
    """
    worst: dict[str, Deviation] = {}
    count = 0
    with registry.find_backend("onnxruntime").open(str(graph)) as session:
        taken = {spec.name for spec in session.inputs}
        for says, feed in cases:
            case = f"{says}, {_format_sizes(interface, feed)}"
            try:
                wanted = module(feed)
            except RyzenError as error:
                raise RyzenError(
                    f"{error.message} at {case}", hint="leave out of --dynamic what cannot have this size"
                ) from error
            try:
                got = session.run({name: array for name, array in feed.items() if name in taken})
            except BackendError as error:
                raise AccuracyError(f"the exported graph fails where the module runs ({case}): {error.message}") from error
            for name, expected in wanted.items():
                found = _compare_output(name, got[name], expected, max_abs, case)
                if name not in worst or found.bound_fraction > worst[name].bound_fraction:
                    worst[name] = found
            count += 1
    if not worst:
        raise AccuracyError("the exported graph was compared with the module on nothing", hint="give samples")
    return count, tuple(worst.values())


def _format_sizes(interface: Interface, inputs: Inputs) -> str:
    """Return `batch=3, seq=7`, or the first input's shape where no dimension has a name."""
    shapes = {name: array.shape for name, array in inputs.items()}
    sizes = check_shapes(interface, shapes)
    return ", ".join(f"{dim}={size}" for dim, size in sizes.items()) or format_shape(next(iter(shapes.values()), ()))


def _compare_output(name: str, actual: Array, expected: Array, max_abs: float | None, case: str) -> Deviation:
    """Measure one output of one case; raises AccuracyError where it is too far off, or of another shape or type."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise AccuracyError(
            f"output `{name}` of the exported graph is {actual.dtype.name} {format_shape(actual.shape)}, "
            f"the module's {expected.dtype.name} {format_shape(expected.shape)} ({case})"
        )
    unit, worst = TOLERANCES.get(expected.dtype.name, 0.0), 0.0
    bound = 0.0 if not unit else max_abs if max_abs is not None else unit * max(1.0, _max_magnitude(expected))
    if expected.size:
        with np.errstate(invalid="ignore"):
            apart = np.abs(_to_float64(actual) - _to_float64(expected))
        same = (actual == expected) | ((actual != actual) & (expected != expected))
        worst = float(np.where(same, 0.0, apart).max())
    if not worst <= bound:
        raise AccuracyError(
            f"output `{name}` of the exported graph differs from the module by {worst:.3g}, accepted is {bound:.3g} ({case})",
            hint="give --max-abs to accept more, or look for data-dependent control flow in forward",
        )
    return Deviation(output=name, dtype=expected.dtype.name, max_abs=worst, bound=bound, case=case)


def _to_float64(array: Array) -> Array:
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def _max_magnitude(array: Array) -> float:
    finite = np.abs(_to_float64(array))
    return float(finite[np.isfinite(finite)].max(initial=0.0))
