"""Comparison of an op's implementations: the reference on ONNX Runtime, the kernel under Triton's interpreter or on a GPU."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ryzen_compile.backends.api import Session
from ryzen_compile.backends.onnxruntime.backend import OnnxRuntime
from ryzen_compile.spec import dim_expr
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.spec.op import Op, TensorParam
from ryzen_compile.spec.profile import Profile
from ryzen_compile.utils.closeable import Closeable

Arrays = Mapping[str, np.ndarray[Any, Any]]


def single_op_model(
    op: Op,
    type_bindings: Mapping[str, str],
    attributes: Mapping[str, int | float],
    fixed_dims: Mapping[str, int] | None = None,
    *,
    rank: int = 2,
) -> onnx.ModelProto:
    """Return a model with one node of `op` and its reference function; dims that are not in `fixed_dims` are dynamic.

    `rank` is the number of dims that a `...` stands for.
    """
    from onnx import helper

    values: dict[str, Any] = {**(fixed_dims or {}), **attributes}

    def value_info(param: TensorParam, shape: list[int | str]) -> onnx.ValueInfoProto:
        element_type = helper.np_dtype_to_tensor_dtype(numpy_dtype(op.dtype_of(param, type_bindings)))
        return helper.make_tensor_value_info(param.name, element_type, shape)

    def shape(param: TensorParam) -> list[int | str]:
        tokens = param.dims.replace("...", " ".join(f"R{axis}" for axis in range(rank))).split()
        return [
            values.get(token, token) if token.isidentifier() else f"{param.name}_{index}" for index, token in enumerate(tokens)
        ]

    names = [param.name for param in op.inputs], [param.name for param in op.outputs]
    node = helper.make_node(op.name, *names, name="node", domain=op.domain, **op.node_attributes(attributes))
    proto = op.function_proto()
    graph = helper.make_graph(
        [node],
        op.name,
        [value_info(param, shape(param)) for param in op.inputs],
        [value_info(param, shape(param)) for param in op.outputs],
    )
    opsets = [*proto.opset_import, helper.make_opsetid(op.domain, op.version)]
    opsets = [*{opset.domain: opset for opset in opsets}.values()]
    return helper.make_model(graph, functions=[proto], opset_imports=opsets, ir_version=10)


class ReferenceRunner(Closeable):
    """Runs the references of ops on ONNX Runtime, on the CPU. A context manager."""

    def __init__(self) -> None:
        """Create a runner without sessions; a session is created on the first run of an op and cached."""
        self._sessions: dict[str, Session] = {}
        self._stack = ExitStack()
        self._backend = OnnxRuntime(device="cpu")

    def run(
        self, op: Op, type_bindings: Mapping[str, str], attributes: Mapping[str, int | float], inputs: Arrays
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Return the outputs of the op's reference by name; `inputs` are cast to the bound element types."""
        rank = max(
            (np.ndim(inputs[param.name]) - len(param.dims.split()) + 1 for param in op.inputs if "..." in param.dims), default=1
        )
        key = repr((str(op), sorted(type_bindings.items()), sorted(attributes.items()), rank))
        if key not in self._sessions:
            model = single_op_model(op, type_bindings, attributes, rank=rank)
            self._sessions[key] = self._stack.enter_context(_open_session(model, self._backend))
        cast = {param.name: inputs[param.name].astype(numpy_dtype(op.dtype_of(param, type_bindings))) for param in op.inputs}
        return dict(self._sessions[key].run(cast))

    def close(self) -> None:
        """Free the resources."""
        self._stack.close()


@contextmanager
def _open_session(model: onnx.ModelProto, backend: OnnxRuntime) -> Iterator[Session]:
    with tempfile.TemporaryDirectory(prefix="ryzen-compile-") as folder:
        path = Path(folder, "op.onnx")
        path.write_bytes(model.SerializeToString())
        with backend.open(str(path)) as session:
            yield session


def cast_inputs(op: Op, type_bindings: Mapping[str, str], inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
    """Return `inputs` cast to the element types of the op's inputs, as every implementation receives them."""
    return {param.name: inputs[param.name].astype(numpy_dtype(op.dtype_of(param, type_bindings))) for param in op.inputs}


def find_mismatch(
    op: Op, type_bindings: Mapping[str, str], actual: Arrays, expected: Arrays, *, tolerance_factor: float = 1
) -> str | None:
    """Return a sentence that locates the first difference between `actual` and `expected`, or None if they match.

    Floating-point outputs match within `tolerance_factor` * t * (1 + |expected|), where t is the op's tolerance for the
    output's element type. Integers must be equal. NaN matches NaN, and an infinity matches itself.
    """
    assert op.tolerance is not None
    for param in op.outputs:
        dtype = op.dtype_of(param, type_bindings)
        array, reference = np.asarray(actual[param.name]), np.asarray(expected[param.name])
        if array.shape != reference.shape:
            return f"`{param.name}` has shape {list(array.shape)}, expected {list(reference.shape)}"
        if array.dtype.kind in "iub":
            differs = array != reference
        else:
            array, reference = array.astype(np.float64), reference.astype(np.float64)
            tolerance = tolerance_factor * op.tolerance[dtype]
            with np.errstate(invalid="ignore"):
                close = np.isfinite(reference) & (np.abs(array - reference) <= tolerance * (1 + np.abs(reference)))
            differs = ~(close | (array == reference) | (np.isnan(array) & np.isnan(reference)))
        if differs.any():
            index = tuple(int(position) for position in np.argwhere(differs)[0])
            count = f"{int(differs.sum())} of {differs.size} elements"
            return f"`{param.name}` differs in {count}; at {list(index)} it is {array[index]}, expected {reference[index]}"
    return None


def single_op_profile(op: Op, dim_ranges: Mapping[str, tuple[int, int, int]], *, rank: int = 2) -> Profile:
    """Return the profile of `single_op_model` for dims with the ranges (minimum, optimum, maximum)."""
    shapes = []
    for index in range(3):
        dims: dict[str, Any] = {name: sizes[index] for name, sizes in dim_ranges.items()}
        dims["..."] = tuple(dims.get(f"R{axis}", dims.get("ROWS", 1) if axis == 0 else 1) for axis in range(rank))
        shapes.append({param.name: dim_expr.shape_of(param.dims, dims) for param in op.inputs})
    low, optimum, high = shapes
    return Profile(min=low, opt=optimum, max=high)
