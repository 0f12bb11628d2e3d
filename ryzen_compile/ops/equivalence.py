"""Whether the lives of an op agree: its reference on ONNX Runtime, its kernel under Triton's interpreter or on a GPU."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnx

from ryzen_compile.backends.api import Session
from ryzen_compile.backends.onnxruntime.backend import OnnxRuntime
from ryzen_compile.spec import dim_expr
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.spec.op import Op, TensorParam
from ryzen_compile.spec.profile import Profile

Arrays = Mapping[str, np.ndarray[Any, Any]]


def single_op_model(
    op: Op,
    type_bindings: Mapping[str, str],
    attributes: Mapping[str, int | float],
    fixed_dims: Mapping[str, int] | None = None,
    *,
    rank: int = 2,
) -> onnx.ModelProto:
    """Return a model of one node of `op`, its reference with it; dims that are not in `fixed` are symbols.

    `rank` is how many dimensions a `...` stands for.
    """
    from onnx import helper

    known: dict[str, Any] = {**(fixed_dims or {}), **attributes}

    def info(port: TensorParam, shape: list[int | str]) -> onnx.ValueInfoProto:
        element = helper.np_dtype_to_tensor_dtype(numpy_dtype(op.dtype_of(port, type_bindings)))
        return helper.make_tensor_value_info(port.name, element, shape)

    def shape(port: TensorParam) -> list[int | str]:
        tokens = port.dims.replace("...", " ".join(f"R{axis}" for axis in range(rank))).split()
        return [known.get(token, token) if token.isidentifier() else f"{port.name}_{i}" for i, token in enumerate(tokens)]

    names = [port.name for port in op.inputs], [port.name for port in op.outputs]
    node = helper.make_node(op.name, *names, name="node", domain=op.domain, **op.node_attributes(attributes))
    proto = op.function_proto()
    graph = helper.make_graph(
        [node],
        op.name,
        [info(port, shape(port)) for port in op.inputs],
        [info(port, shape(port)) for port in op.outputs],
    )
    opsets = [*proto.opset_import, helper.make_opsetid(op.domain, op.version)]
    opsets = [*{opset.domain: opset for opset in opsets}.values()]
    return helper.make_model(graph, functions=[proto], opset_imports=opsets, ir_version=10)


class ReferenceRunner:
    """Runs the references of ops on ONNX Runtime, on the CPU. Use it in `with`."""

    def __init__(self) -> None:
        """Have no session yet; each is made when it is first needed, and kept."""
        self._sessions: dict[str, Session] = {}
        self._stack = ExitStack()
        self._backend = OnnxRuntime(device="cpu")

    def run(
        self, op: Op, type_bindings: Mapping[str, str], attributes: Mapping[str, int | float], inputs: Arrays
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Return the outputs of the op's reference by name. `inputs` are cast to the element types."""
        rank = max(
            (np.ndim(inputs[port.name]) - len(port.dims.split()) + 1 for port in op.inputs if "..." in port.dims), default=1
        )
        key = repr((str(op), sorted(type_bindings.items()), sorted(attributes.items()), rank))
        if key not in self._sessions:
            model = single_op_model(op, type_bindings, attributes, rank=rank)
            self._sessions[key] = self._stack.enter_context(_open_session(model, self._backend))
        feed = {port.name: inputs[port.name].astype(numpy_dtype(op.dtype_of(port, type_bindings))) for port in op.inputs}
        return dict(self._sessions[key].run(feed))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()


@contextmanager
def _open_session(model: onnx.ModelProto, backend: OnnxRuntime) -> Iterator[Session]:
    with tempfile.TemporaryDirectory(prefix="ryzen-compile-") as folder:
        path = Path(folder, "op.onnx")
        path.write_bytes(model.SerializeToString())
        with backend.open(str(path)) as session:
            yield session


def cast_inputs(op: Op, type_bindings: Mapping[str, str], inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
    """Return `inputs` in the element types of the ports: what every life is given."""
    return {port.name: inputs[port.name].astype(numpy_dtype(op.dtype_of(port, type_bindings))) for port in op.inputs}


def find_mismatch(
    op: Op, type_bindings: Mapping[str, str], actual: Arrays, expected: Arrays, *, tolerance_factor: float = 1
) -> str | None:
    """Return where `found` is further from `exact` than `slack` times the op's tolerance allows, or None.

    Floating point outputs may be off by t * (1 + |exact|), t being the tolerance of the type variable `T`, or of float32 where
    an output is of that type; integers must be equal. NaN agrees with NaN, an infinity with itself.
    """
    assert op.tolerance is not None
    for port in op.outputs:
        element = op.dtype_of(port, type_bindings)
        one, other = np.asarray(actual[port.name]), np.asarray(expected[port.name])
        if one.shape != other.shape:
            return f"`{port.name}` is of shape {list(one.shape)}, not {list(other.shape)}"
        if one.dtype.kind in "iub":
            off = one != other
        else:
            one, other = one.astype(np.float64), other.astype(np.float64)
            tolerance = tolerance_factor * op.tolerance[element]
            with np.errstate(invalid="ignore"):
                near = np.isfinite(other) & (np.abs(one - other) <= tolerance * (1 + np.abs(other)))
            off = ~(near | (one == other) | (np.isnan(one) & np.isnan(other)))
        if off.any():
            at = tuple(int(axis) for axis in np.argwhere(off)[0])
            count = f"{int(off.sum())} of {off.size} elements"
            return f"`{port.name}` differs in {count}; at {list(at)} it is {one[at]}, not {other[at]}"
    return None


def single_op_profile(op: Op, dim_ranges: Mapping[str, tuple[int, int, int]], *, rank: int = 2) -> Profile:
    """Return the profile of `model_of` for dims between (smallest, tuned, largest)."""
    corners = []
    for corner in range(3):
        known: dict[str, Any] = {name: sizes[corner] for name, sizes in dim_ranges.items()}
        known["..."] = tuple(known.get(f"R{axis}", known.get("ROWS", 1) if axis == 0 else 1) for axis in range(rank))
        corners.append({port.name: dim_expr.shape_of(port.dims, known) for port in op.inputs})
    low, tuned, high = corners
    return Profile(min=low, opt=tuned, max=high)
