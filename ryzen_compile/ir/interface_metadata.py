"""The interface of a graph: read from the model where it was recorded, else inferred from the graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

import msgspec

from ryzen_compile.errors import ModelError, printable
from ryzen_compile.ir.analysis.input_roles import infer_role
from ryzen_compile.ir.analysis.states import infer_states, infer_sum_dims
from ryzen_compile.spec.interface import Dim, InputSpec, Interface, TensorSpec

if TYPE_CHECKING:
    import onnx_ir as ir

_Spec = TypeVar("_Spec", bound=TensorSpec)

METADATA_KEY = "ryzen_compile.interface"
"""Under this key a model's metadata holds its interface, as JSON."""


def interface_of(model: ir.Model) -> Interface:
    """Return what a caller of `model` needs to know.

    That is what `attach` wrote, as long as the graph still has these inputs and outputs. Otherwise types, shapes and names are
    the graph's; an axis of unknown size without a name is called by its tensor and number, `x_0`; roles, ranges and states are
    inferred from what the graph does with its inputs, and from their names where that does not tell.

    Raises:
        ModelError: An input or an output has no type.
    """
    seen = _declared_interface(model.graph)
    recorded = _read_recorded(model)
    return recorded if recorded is not None and _matches_graph(recorded, seen) else _infer_interface(model.graph, seen)


def write_interface(model: ir.Model, interface: Interface) -> None:
    """Record `interface` in the metadata of `model`."""
    model.metadata_props[METADATA_KEY] = msgspec.json.encode(interface).decode()


def _read_recorded(model: ir.Model) -> Interface | None:
    try:
        return msgspec.json.decode(model.metadata_props.get(METADATA_KEY, ""), type=Interface)
    except (msgspec.DecodeError, UnicodeError):
        return None


def _declared_interface(graph: ir.Graph) -> Interface:
    """Return the inputs and outputs as the graph declares them."""
    names = {
        str(dim.value) for value in (*graph.inputs, *graph.outputs) for dim in value.shape or () if not isinstance(dim, int)
    }
    inputs = [_tensor_spec(value, names) for value in graph.inputs if not value.is_initializer()]
    return Interface(
        inputs=tuple(InputSpec(name=spec.name, dtype=spec.dtype, dims=spec.dims) for spec in inputs),
        outputs=tuple(_tensor_spec(value, names) for value in graph.outputs),
    )


def _tensor_spec(value: ir.Value, used_names: set[str]) -> TensorSpec:
    """Describe `value`; `taken` holds the names of dimensions so far, and gains those that are made up here."""
    if value.type is None or value.type.dtype.name == "UNDEFINED":
        raise ModelError(
            f"`{printable(value.name)}` has no type", hint="run onnx.shape_inference on the model, or export it again"
        )
    dims: list[Dim] = []
    for axis, dim in enumerate(value.shape or ()):
        if isinstance(dim, int) and dim >= 0:
            dims.append(dim)
        elif not isinstance(dim, int) and dim.value:
            dims.append(str(dim.value))
        else:
            name = f"{value.name}_{axis}"
            while name in used_names:
                name += "_"
            used_names.add(name)
            dims.append(name)
    return TensorSpec(name=value.name or "", dtype=_dtype_name(value.type), dims=None if value.shape is None else tuple(dims))


def _dtype_name(type_: ir.TypeProtocol) -> str:
    """Return the numpy name of a tensor's type; else `sequence(float32)`, `optional(float32)`, `sparse(float32)`."""
    import onnx_ir as ir

    if isinstance(type_, ir.TensorType):
        return "string" if type_.dtype == ir.DataType.STRING else str(type_.dtype.numpy())
    if isinstance(type_, ir.SparseTensorType):
        return f"sparse({_dtype_name(ir.TensorType(type_.dtype))})"
    inner = type_.elem_type
    assert not isinstance(inner, ir.DataType)
    return f"{'sequence' if isinstance(type_, ir.SequenceType) else 'optional'}({_dtype_name(inner)})"


def _matches_graph(recorded: Interface, declared: Interface) -> bool:
    """Whether the tensors are the same. The name of a dynamic dimension may be another: graphs often have none."""
    pairs = [(recorded.inputs, declared.inputs), (recorded.outputs, declared.outputs)]
    return all(len(told) == len(true) and all(map(_same_tensor, told, true)) for told, true in pairs)


def _same_tensor(recorded: TensorSpec, declared: TensorSpec) -> bool:
    if (recorded.name, recorded.dtype) != (declared.name, declared.dtype):
        return False
    if recorded.dims is None or declared.dims is None:
        return True
    return len(recorded.dims) == len(declared.dims) and all(
        one == other or (isinstance(one, str) and isinstance(other, str))
        for one, other in zip(recorded.dims, declared.dims, strict=True)
    )


def _infer_interface(graph: ir.Graph, declared: Interface) -> Interface:
    states = infer_states(graph, declared)
    sums = infer_sum_dims(declared, states)
    declared = msgspec.structs.replace(
        declared, inputs=_with_sum_dims(declared.inputs, sums), outputs=_with_sum_dims(declared.outputs, sums)
    )
    carried = {state.input for state in states}
    inputs = tuple(
        msgspec.structs.replace(spec, role="state") if spec.name in carried else infer_role(value, spec)
        for value, spec in zip((value for value in graph.inputs if not value.is_initializer()), declared.inputs, strict=True)
    )
    return msgspec.structs.replace(declared, inputs=inputs, states=states, batch=_infer_batch_dim(declared.inputs))


def _with_sum_dims(specs: tuple[_Spec, ...], sums: dict[str, str]) -> tuple[_Spec, ...]:
    return tuple(
        msgspec.structs.replace(spec, dims=tuple(sums.get(str(dim), dim) for dim in spec.dims)) if spec.dims else spec
        for spec in specs
    )


def _infer_batch_dim(inputs: Iterable[TensorSpec]) -> str | None:
    first = {spec.dims[0] if spec.dims else None for spec in inputs if spec.dims != ()}
    batch = first.pop() if len(first) == 1 else None
    return batch if isinstance(batch, str) else None
