"""The interface of a graph: read from the model where it was recorded, else inferred from the graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

import msgspec

from ryzen_compile.errors import ModelError, shown
from ryzen_compile.ir.analysis.input_roles import role_of
from ryzen_compile.ir.analysis.states import states_of, sums_of
from ryzen_compile.spec.interface import Dim, InputSpec, Interface, TensorSpec

if TYPE_CHECKING:
    import onnx_ir as ir

_Spec = TypeVar("_Spec", bound=TensorSpec)

KEY = "ryzen_compile.interface"
"""Under this key a model's metadata holds its interface, as JSON."""


def interface_of(model: ir.Model) -> Interface:
    """Return what a caller of `model` needs to know.

    That is what `attach` wrote, as long as the graph still has these inputs and outputs. Otherwise types, shapes and names are
    the graph's; an axis of unknown size without a name is called by its tensor and number, `x_0`; roles, ranges and states are
    inferred from what the graph does with its inputs, and from their names where that does not tell.

    Raises:
        ModelError: An input or an output has no type.
    """
    seen = _seen(model.graph)
    recorded = _recorded(model)
    return recorded if recorded is not None and _agrees(recorded, seen) else _inferred(model.graph, seen)


def attach(model: ir.Model, interface: Interface) -> None:
    """Record `interface` in the metadata of `model`."""
    model.metadata_props[KEY] = msgspec.json.encode(interface).decode()


def _recorded(model: ir.Model) -> Interface | None:
    try:
        return msgspec.json.decode(model.metadata_props.get(KEY, ""), type=Interface)
    except (msgspec.DecodeError, UnicodeError):
        return None


def _seen(graph: ir.Graph) -> Interface:
    """Return the inputs and outputs as the graph declares them."""
    names = {
        str(dim.value) for value in (*graph.inputs, *graph.outputs) for dim in value.shape or () if not isinstance(dim, int)
    }
    inputs = [_spec(value, names) for value in graph.inputs if not value.is_initializer()]
    return Interface(
        inputs=tuple(InputSpec(name=spec.name, dtype=spec.dtype, dims=spec.dims) for spec in inputs),
        outputs=tuple(_spec(value, names) for value in graph.outputs),
    )


def _spec(value: ir.Value, taken: set[str]) -> TensorSpec:
    """Describe `value`; `taken` holds the names of dimensions so far, and gains those that are made up here."""
    if value.type is None or value.type.dtype.name == "UNDEFINED":
        raise ModelError(f"`{shown(value.name)}` has no type", hint="run onnx.shape_inference on the model, or export it again")
    dims: list[Dim] = []
    for axis, dim in enumerate(value.shape or ()):
        if isinstance(dim, int) and dim >= 0:
            dims.append(dim)
        elif not isinstance(dim, int) and dim.value:
            dims.append(str(dim.value))
        else:
            name = f"{value.name}_{axis}"
            while name in taken:
                name += "_"
            taken.add(name)
            dims.append(name)
    return TensorSpec(name=value.name or "", dtype=_dtype(value.type), dims=None if value.shape is None else tuple(dims))


def _dtype(kind: ir.TypeProtocol) -> str:
    """Return the numpy name of a tensor's type; else `sequence(float32)`, `optional(float32)`, `sparse(float32)`."""
    import onnx_ir as ir

    if isinstance(kind, ir.TensorType):
        return "string" if kind.dtype == ir.DataType.STRING else str(kind.dtype.numpy())
    if isinstance(kind, ir.SparseTensorType):
        return f"sparse({_dtype(ir.TensorType(kind.dtype))})"
    inner = kind.elem_type
    assert not isinstance(inner, ir.DataType)
    return f"{'sequence' if isinstance(kind, ir.SequenceType) else 'optional'}({_dtype(inner)})"


def _agrees(recorded: Interface, seen: Interface) -> bool:
    """Whether the tensors are the same. The name of a dynamic dimension may be another: graphs often have none."""
    pairs = [(recorded.inputs, seen.inputs), (recorded.outputs, seen.outputs)]
    return all(len(told) == len(true) and all(map(_alike, told, true)) for told, true in pairs)


def _alike(told: TensorSpec, true: TensorSpec) -> bool:
    if (told.name, told.dtype) != (true.name, true.dtype):
        return False
    if told.dims is None or true.dims is None:
        return True
    return len(told.dims) == len(true.dims) and all(
        one == other or (isinstance(one, str) and isinstance(other, str))
        for one, other in zip(told.dims, true.dims, strict=True)
    )


def _inferred(graph: ir.Graph, seen: Interface) -> Interface:
    states = states_of(graph, seen)
    sums = sums_of(seen, states)
    seen = msgspec.structs.replace(seen, inputs=_respelt(seen.inputs, sums), outputs=_respelt(seen.outputs, sums))
    carried = {state.input for state in states}
    inputs = tuple(
        msgspec.structs.replace(spec, role="state") if spec.name in carried else role_of(value, spec)
        for value, spec in zip((value for value in graph.inputs if not value.is_initializer()), seen.inputs, strict=True)
    )
    return msgspec.structs.replace(seen, inputs=inputs, states=states, batch=_batch(seen.inputs))


def _respelt(specs: tuple[_Spec, ...], sums: dict[str, str]) -> tuple[_Spec, ...]:
    return tuple(
        msgspec.structs.replace(spec, dims=tuple(sums.get(str(dim), dim) for dim in spec.dims)) if spec.dims else spec
        for spec in specs
    )


def _batch(inputs: Iterable[TensorSpec]) -> str | None:
    first = {spec.dims[0] if spec.dims else None for spec in inputs if spec.dims != ()}
    batch = first.pop() if len(first) == 1 else None
    return batch if isinstance(batch, str) else None
