"""Comparison of the outputs of an exported graph with those of its module, on inputs of several shapes."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ryzen_compile.backends.onnxruntime.graph_runs import GraphRun, graph_runs
from ryzen_compile.data.fixed_values import format_values, with_values
from ryzen_compile.data.size_search import SizeLimit, find_limits, search_ranges
from ryzen_compile.data.synthetic import synthesize
from ryzen_compile.data.validation import check_shapes
from ryzen_compile.errors import AccuracyError, RyzenError
from ryzen_compile.exporter.dynamic_shapes import SizeRange, format_dynamic
from ryzen_compile.ir.analysis.control_flow import combinations_of, find_control_values
from ryzen_compile.processes.limits import ResourceLimits
from ryzen_compile.progress import Progress, SilentProgress, StageItems, counted
from ryzen_compile.spec.interface import Inputs, Interface, RunFunction
from ryzen_compile.spec.profile import Shape, default_sizes, format_shape, input_shapes
from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    import onnx_ir as ir

Array = np.ndarray[Any, Any]

TOLERANCES = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-3}
"""The default maximum difference by element type, relative to the largest magnitude of the output (at least 1): about 1,000
epsilon for float32, 2 epsilon for half types, whose sums are rounded once. Applies if neither the recipe nor the user gives a
bound. Outputs of all other types must be equal."""
RMS_TOLERANCES = {"float64": 3e-11, "float32": 3e-5}
"""The default bound of the root mean square of the differences, relative to that of the output (at least 1). Rounding errors
of deep models reach the bound of single elements, but their mean stays well below this one: 1e-5 for 18 layers in float32."""

_MAX_HINT_SECONDS = 120.0
"""The time in seconds after which the search for sizes at which graph and module agree begins no further run."""


class CaseError(AccuracyError):
    """In one case, a graph fails or its outputs differ from those of its module.

    `agreeing_inputs` are those of an earlier case in which they agree, or None.
    """

    def __init__(self, message: str, *, hint: str | None = None, agreeing_inputs: Inputs | None) -> None:
        super().__init__(message, hint=hint)
        self.agreeing_inputs = agreeing_inputs


class _SearchTimeoutError(Exception):
    """A search took longer than `_MAX_HINT_SECONDS`."""


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


def control_inputs(model: ir.Model, interface: Interface, sample: Inputs, run: RunFunction) -> Iterator[tuple[str, Inputs]]:
    """Yield (source, inputs): `sample` with other values of the inputs that determine what runs, as far as `run` takes them.

    These are single bools, whether or not the graph has a branch, since tracing may have kept only one, and the inputs of
    the branches and loops of the graph.
    """
    flags = {
        spec.name: (0, 1)
        for spec in interface.inputs
        if spec.dtype == "bool" and spec.role == "values" and spec.dims is not None and all(dim == 1 for dim in spec.dims)
    }
    for values in combinations_of({**flags, **find_control_values(model, interface)}):
        inputs = with_values(sample, values)
        try:
            run(inputs)
        except RyzenError:
            continue
        yield format_values(inputs, values), inputs


def find_size_limits(interface: Interface, sample: Inputs, run: RunFunction, *, seed: int) -> tuple[SizeLimit, ...]:
    """Return the limits of the sizes that a module accepts, found by running it; empty if there are none.

    Dims whose range is given keep it. If the module does not run with the sizes of `sample`, the result is empty: the
    comparison reports why.
    """
    known = check_shapes(interface, {name: array.shape for name, array in sample.items()})

    def trial(sizes: Mapping[str, int]) -> str | None:
        try:
            run(synthesize(interface, input_shapes(interface, sizes), seed=seed, rows="mixed"))
        except RyzenError as error:
            return error.message
        return None

    return search_ranges(interface, known, trial)


def _test_shapes(interface: Interface) -> list[dict[str, Shape]]:
    """Return shapes with every dynamic size at its minimum, and shapes with different sizes a little above."""
    lowest = default_sizes(interface)[0]
    shape_sets: list[dict[str, Shape]] = []
    for steps in ((0,), (2, 6, 4, 5)):
        sizes = {
            dim: max(low, min(low + steps[index % len(steps)], interface.max_sizes.get(dim, sys.maxsize)))
            for index, (dim, low) in enumerate(lowest.items())
        }
        shapes = input_shapes(interface, sizes)
        if shapes not in shape_sets:
            shape_sets.append(shapes)
    return shape_sets


def compare_with_module(
    graph: Path,
    module: RunFunction,
    cases: Iterable[tuple[str, Inputs]],
    interface: Interface,
    *,
    max_abs: float | None,
    limits: ResourceLimits | None = None,
    progress: Progress | None = None,
) -> tuple[int, tuple[Deviation, ...]]:
    """Run graph and module on each case; return the number of cases and the largest deviation of each output.

    The graph runs in a child process within `limits`.

    Raises:
        CaseError: An output differs by more than its bound, or the graph fails on a case.
        AccuracyError: There are no cases or outputs.
        BackendError: ONNX Runtime cannot load the graph, or the child process crashed or exceeded a limit.
        RyzenError: The module fails on a case.
    """
    worst: dict[str, Deviation] = {}
    cases = list(cases)
    agreeing_inputs: Inputs | None = None
    progress = progress or SilentProgress()
    samples = [inputs for _, inputs in cases]
    with (
        graph_runs(graph, samples, map_weights=True, limits=limits, progress=progress, title="run the graph") as runs,
        progress.stage("run the module", StageItems("cases", len(cases))) as stage,
    ):
        for (source, inputs), run in counted(zip(cases, runs, strict=True), stage):
            case = f"{source}, {_format_sizes(interface, inputs)}"
            try:
                deviations = _deviations(graph, run, module, inputs, case, max_abs)
            except AccuracyError as error:
                raise CaseError(error.message, hint=error.hint, agreeing_inputs=agreeing_inputs) from error
            except RyzenError as error:
                raise RyzenError(error.message, hint=_module_hint(interface)) from error
            for deviation in deviations:
                name = deviation.output
                if name not in worst or deviation.bound_fraction > worst[name].bound_fraction:
                    worst[name] = deviation
            agreeing_inputs = agreeing_inputs or inputs
    if not worst:
        raise AccuracyError("the exported graph was not compared with the module: there are no cases", hint="provide samples")
    return len(cases), tuple(worst.values())


def _deviations(
    graph: Path, run: GraphRun, module: RunFunction, inputs: Inputs, case: str, max_abs: float | None
) -> list[Deviation]:
    """Return the deviation of every output of a run of `graph` in one case.

    Raises:
        AccuracyError: An output differs by more than its bound, or the graph fails.
        RyzenError: The module fails.
    """
    try:
        expected_outputs = module(inputs)
    except RyzenError as error:
        raise RyzenError(f"{error.message} ({case})") from error
    if run.error is not None:
        reason = run.error.replace(f"`{graph.absolute()}`", f"`{graph.name}`")  # its folder is a temporary one
        raise AccuracyError(f"the exported graph fails on inputs that the module accepts ({case}): {reason}")
    outputs = run.outputs()
    return [_compare_output(name, outputs[name], expected, max_abs, case) for name, expected in expected_outputs.items()]


def _module_hint(interface: Interface) -> str | None:
    """Return the hint for a module that fails within the recorded sizes."""
    known = interface.typical_sizes
    ranges = {dim: SizeRange(size, interface.max_sizes.get(dim)) for dim, size in known.items()}
    hints = [f"give the sizes that the module accepts, as in `{format_dynamic(interface, ranges)}`"] if known else []
    hints += [
        f"`{spec.name}` was drawn from {spec.low or 0:g}..{1 if spec.high is None else spec.high:g}: return sample inputs with "
        "the values that the module accepts"
        for spec in interface.inputs
        if spec.role == "values" and spec.dtype.startswith(("int", "uint"))
    ]
    return "; or ".join(hints) or None


def sizes_hint(
    graph: Path,
    module: RunFunction,
    agreeing_inputs: Inputs,
    interface: Interface,
    *,
    max_abs: float | None,
    limits: ResourceLimits | None = None,
) -> str | None:
    """Return the --dynamic options with which graph and module agree, found by running both.

    `agreeing_inputs` are those of a `CaseError`. The result is None if the sizes are not the cause, or if the search takes
    longer than two minutes. The graph runs in a child process within `limits`.
    """
    known = check_shapes(interface, {name: array.shape for name, array in agreeing_inputs.items()})
    deadline = time.perf_counter() + _MAX_HINT_SECONDS

    def trial(sizes: Mapping[str, int]) -> str | None:
        if time.perf_counter() > deadline:
            raise _SearchTimeoutError
        inputs = synthesize(interface, input_shapes(interface, sizes), seed=0, rows="mixed")
        try:
            with graph_runs(graph, [inputs], limits=limits) as (run,):
                _deviations(graph, run, module, inputs, "", max_abs)
        except RyzenError as error:
            return error.message
        return None

    lowest = default_sizes(interface)[0]
    above = {dim: min(known[dim] + 6, interface.max_sizes.get(dim, sys.maxsize)) for dim in lowest}
    try:
        if not lowest or trial(known) is not None:
            return None
        low = {limit.dim: limit.size for limit in find_limits(known, lowest, "min", trial)}
        high = {limit.dim: limit.size for limit in find_limits(known, above, "max", trial)}
    except _SearchTimeoutError:
        return None
    fixed = [dim for dim in lowest if low.get(dim) == high.get(dim) == known[dim]]
    ranges = {
        dim: SizeRange(low.get(dim, interface.min_sizes.get(dim)), high.get(dim, interface.max_sizes.get(dim)))
        for dim in lowest
        if dim in low or dim in high
    }
    if not ranges:
        return None
    options = format_dynamic(interface, ranges, omit=fixed) or "no --dynamic"
    reason = f": the graph has the sample's size of {', '.join(f'`{dim}`' for dim in fixed)} only" if fixed else ""
    return f"use {options}{reason}"


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
    if max_abs is None and expected.size and expected.dtype.name in RMS_TOLERANCES:
        _check_rms(name, np.where(equal, 0.0, difference), expected, case)
    return Deviation(output=name, dtype=expected.dtype.name, max_abs=worst, bound=bound, case=case)


def _check_rms(name: str, difference: Array, expected: Array, case: str) -> None:
    """Raise AccuracyError if the root mean square of `difference`, which is finite, exceeds the bound for `expected`."""
    finite = _to_float64(expected[np.isfinite(expected)])
    rms = math.sqrt(float(np.mean(np.square(difference))))
    scale = math.sqrt(float(np.mean(np.square(finite)))) if finite.size else 0.0
    bound = RMS_TOLERANCES[expected.dtype.name] * max(1.0, scale)
    if not rms <= bound:
        raise AccuracyError(
            f"output `{name}` of the exported graph differs from that of the module by {rms:.3g} in the root mean square, more "
            f"than the accepted {bound:.3g} ({case})",
            hint="give a larger difference with --max-abs, or check forward for data-dependent control flow",
        )


def _to_float64(array: Array) -> Array:
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def _max_magnitude(array: Array) -> float:
    finite = np.abs(_to_float64(array))
    return float(finite[np.isfinite(finite)].max(initial=0.0))
