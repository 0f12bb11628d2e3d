"""The interface of a graph: read from the model's metadata if it is recorded there, else inferred from the graph."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

import msgspec

from ryzen_compile.errors import ModelError, printable
from ryzen_compile.ir.analysis.input_roles import infer_role
from ryzen_compile.ir.analysis.length_inputs import with_length_roles
from ryzen_compile.ir.analysis.states import infer_states, infer_sum_dims
from ryzen_compile.ir.analysis.window_caches import ROW_AXIS, find_window_caches
from ryzen_compile.ir.placeholder_dims import is_placeholder_dim_name
from ryzen_compile.spec.dims import Dim
from ryzen_compile.spec.interface import InputSpec, Interface, TensorSpec, find_interface_problem, with_dtypes
from ryzen_compile.spec.model_metadata import read_metadata, write_metadata

if TYPE_CHECKING:
    import onnx_ir as ir

_Spec = TypeVar("_Spec", bound=TensorSpec)

METADATA_KEY = "ryzen_compile.interface"
"""The key of the model metadata that holds the interface as JSON."""
SCHEMA_VERSION = 1
"""The schema version of the interface in the metadata."""


def interface_of(model: ir.Model) -> Interface:
    """Return the interface of `model`.

    The result is the interface that `write_interface` recorded. If none is recorded, names, types and shapes are those of the
    graph; a dynamic dimension without a name, or with a placeholder name such as `?`, gets a unique name from its tensor and
    axis, `x_dim0`. Roles, ranges, padding values and states are then inferred from the uses of each input, and roles from its
    name if the uses are inconclusive.

    Raises:
        ModelError: An input or an output has no element type, or the recorded interface cannot be read or contradicts the
            inputs and outputs of the graph. Its states and ranges would be lost if it were ignored.
    """
    declared = _declared_interface(model.graph)
    recorded = read_recorded_interface(model)
    if recorded is None:
        return _infer_interface(model, declared)
    contradiction = _find_contradiction(recorded, declared)
    if contradiction is not None:
        raise ModelError(
            f"the interface in the metadata does not match the graph: {contradiction}",
            hint=f"export the model again, or delete the metadata property `{METADATA_KEY}` to infer the interface",
        )
    if (problem := find_interface_problem(recorded)) is not None:
        raise ModelError(
            f"the interface in the metadata is inconsistent: {problem}",
            hint=f"export the model again, or delete the metadata property `{METADATA_KEY}` to infer the interface",
        )
    return recorded


def write_interface(model: ir.Model, interface: Interface) -> None:
    """Record `interface` in the metadata of `model`."""
    write_metadata(model, METADATA_KEY, interface, schema_version=SCHEMA_VERSION)


def declared_dtypes(model: ir.Model) -> dict[str, str]:
    """Return the element type of each input and output of the graph, by name, as the graph declares it."""
    declared = _declared_interface(model.graph)
    return {spec.name: spec.dtype for spec in (*declared.inputs, *declared.outputs)}


def record_declared_dtypes(model: ir.Model) -> None:
    """Record the element types of the graph's inputs and outputs in the recorded interface, if there is one.

    For rewrites that convert inputs or outputs: `interface_of` refuses an interface that contradicts the graph.
    """
    recorded = read_recorded_interface(model)
    if recorded is not None:
        write_interface(model, with_dtypes(recorded, declared_dtypes(model)))


def read_recorded_interface(model: ir.Model) -> Interface | None:
    """Return the interface that `write_interface` recorded, or None if there is none.

    The graph may have other inputs and outputs: see `interface_of`.

    Raises:
        ModelError: The recorded interface has another schema version, or cannot be decoded.
    """
    return read_metadata(model, METADATA_KEY, Interface, schema_version=SCHEMA_VERSION)


def _declared_interface(graph: ir.Graph) -> Interface:
    """Return the inputs and outputs as the graph declares them."""
    names = {
        dim.value
        for value in (*graph.inputs, *graph.outputs)
        for dim in value.shape or ()
        if not isinstance(dim, int) and dim.value is not None
    }
    inputs = [_tensor_spec(value, names) for value in graph.inputs if not value.is_initializer()]
    return Interface(
        inputs=tuple(InputSpec(name=spec.name, dtype=spec.dtype, dims=spec.dims) for spec in inputs),
        outputs=tuple(_tensor_spec(value, names) for value in graph.outputs),
    )


def _tensor_spec(value: ir.Value, used_names: set[str]) -> TensorSpec:
    """Return the spec of `value`; names that are generated for dimensions without a name are added to `used_names`."""
    if value.type is None or value.type.dtype.name == "UNDEFINED":
        raise ModelError(
            f"`{printable(value.name)}` has no element type", hint="run onnx.shape_inference on the model, or export it again"
        )
    dims: list[Dim] = []
    for axis, dim in enumerate(value.shape or ()):
        if isinstance(dim, int) and dim >= 0:
            dims.append(dim)
        elif not isinstance(dim, int) and dim.value is not None and not is_placeholder_dim_name(dim.value):
            dims.append(dim.value)
        else:
            # `+` in a dimension's name means a sum.
            name = f"{str(value.name).replace('+', '_')}_dim{axis}"
            while name in used_names:
                name += "_"
            used_names.add(name)
            dims.append(name)
    return TensorSpec(name=value.name or "", dtype=_dtype_name(value.type), dims=None if value.shape is None else tuple(dims))


def _dtype_name(type_: ir.TypeProtocol) -> str:
    """Return the numpy name of a tensor's element type, or `sequence(float32)`, `optional(float32)`, `sparse(float32)`."""
    import onnx_ir as ir

    if isinstance(type_, ir.TensorType):
        return "string" if type_.dtype == ir.DataType.STRING else str(type_.dtype.numpy())
    if isinstance(type_, ir.SparseTensorType):
        return f"sparse({_dtype_name(ir.TensorType(type_.dtype))})"
    inner = type_.elem_type
    assert not isinstance(inner, ir.DataType)
    return f"{'sequence' if isinstance(type_, ir.SequenceType) else 'optional'}({_dtype_name(inner)})"


def _find_contradiction(recorded: Interface, declared: Interface) -> str | None:
    """Return the first tensor that differs; names of dynamic dimensions may differ, as graphs often lack them."""
    sides: list[tuple[str, Sequence[TensorSpec], Sequence[TensorSpec]]] = [
        ("input", recorded.inputs, declared.inputs),
        ("output", recorded.outputs, declared.outputs),
    ]
    for side, recorded_specs, declared_specs in sides:
        for recorded_spec, declared_spec in itertools.zip_longest(recorded_specs, declared_specs):
            if recorded_spec is None or declared_spec is None or not _same_tensor(recorded_spec, declared_spec):
                places = [f"`{spec}`" if spec is not None else "absent" for spec in (recorded_spec, declared_spec)]
                return f"an {side} is {places[0]} in the metadata and {places[1]} in the graph"
    return None


def _same_tensor(recorded: TensorSpec, declared: TensorSpec) -> bool:
    if (recorded.name, recorded.dtype) != (declared.name, declared.dtype):
        return False
    if recorded.dims is None or declared.dims is None:
        return True
    return len(recorded.dims) == len(declared.dims) and all(
        recorded_dim == declared_dim or (isinstance(recorded_dim, str) and isinstance(declared_dim, str))
        for recorded_dim, declared_dim in zip(recorded.dims, declared.dims, strict=True)
    )


def _infer_interface(model: ir.Model, declared: Interface) -> Interface:
    graph, functions = model.graph, model.functions.values()
    states = infer_states(graph, declared)
    sum_dims = infer_sum_dims(declared, states)
    declared = msgspec.structs.replace(
        declared, inputs=_with_sum_dims(declared.inputs, sum_dims), outputs=_with_sum_dims(declared.outputs, sum_dims)
    )
    state_inputs = {state.input for state in states}
    inputs = tuple(
        msgspec.structs.replace(spec, role="state") if spec.name in state_inputs else infer_role(value, spec, graph, functions)
        for value, spec in zip((value for value in graph.inputs if not value.is_initializer()), declared.inputs, strict=True)
    )
    inputs = with_length_roles(graph, inputs)
    rows = _window_cache_rows(graph, inputs)
    return msgspec.structs.replace(
        declared,
        inputs=inputs,
        states=states,
        batch=_infer_batch_dim(declared.inputs),
        min_sizes=rows,
        typical_sizes=rows,
        max_sizes=rows,
    )


def _window_cache_rows(graph: ir.Graph, inputs: Iterable[InputSpec]) -> dict[str, int]:
    """Return the sizes of the dims of caches of window size: the window, which every runtime takes."""
    windows = {value.name: caches.window for caches in find_window_caches(graph) for value in caches.pasts}
    rows: dict[str, int] = {}
    for spec in inputs:
        dim = spec.dims[ROW_AXIS] if spec.name in windows and spec.dims is not None and len(spec.dims) > ROW_AXIS else None
        if isinstance(dim, str):
            rows[dim] = max(rows.get(dim, 0), windows[spec.name])
    return rows


def _with_sum_dims(specs: tuple[_Spec, ...], sum_dims: dict[str, str]) -> tuple[_Spec, ...]:
    return tuple(
        msgspec.structs.replace(spec, dims=tuple(sum_dims.get(str(dim), dim) for dim in spec.dims)) if spec.dims else spec
        for spec in specs
    )


def _infer_batch_dim(inputs: Iterable[TensorSpec]) -> str | None:
    first_dims = {spec.dims[0] if spec.dims else None for spec in inputs if spec.dims != ()}
    batch = first_dims.pop() if len(first_dims) == 1 else None
    return batch if isinstance(batch, str) else None
