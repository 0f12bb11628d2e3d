"""Kernels on the CPU: Triton's interpreter, with the arguments that a launch would have."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ryzen_compile.kernels.specialization import Specialization
from ryzen_compile.kernels.triton_child import GUARD
from ryzen_compile.kernels.triton_process import TritonProcess
from ryzen_compile.spec.dtypes import numpy_dtype

if TYPE_CHECKING:
    import numpy as np

    Arrays = Mapping[str, np.ndarray[Any, Any]]


class Interpreter:
    """Runs kernels without a GPU, slowly. Memory around every tensor is watched. Use it in `with`.

    A kernel that reads or writes far outside of its tensors may kill the process; the next run starts another.
    """

    def __init__(self) -> None:
        """Start the process that it runs in."""
        self._process = TritonProcess(interpret=True)

    def run(self, specialization: Specialization, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """Return the outputs of the op's kernel by name; an output that is written over an input starts as a copy of it.

        Raises BackendError where the kernel fails or writes outside of its tensors.
        """
        import numpy as np

        op = specialization.op
        known = op.bind_dims({name: array.shape for name, array in inputs.items()}, specialization.attributes)
        shapes = op.output_shapes(known)
        arrays, pointers, blobs, outputs = [], {}, [], {}

        def hold(name: str, element: str, data: bytes) -> None:
            arrays.append({"name": name, "bytes": len(data)})
            blobs.append(data)
            pointers[name] = {"buffer": name, "element": element}

        for port in op.inputs:
            element = op.dtype_of(port, specialization.type_bindings)
            hold(port.name, element, np.ascontiguousarray(inputs[port.name], numpy_dtype(element)).tobytes())
        for port in op.outputs:
            element = op.dtype_of(port, specialization.type_bindings)
            outputs[port.name] = np.empty(shapes[port.name], numpy_dtype(element))
            if port.aliases_input is None:
                hold(port.name, element, bytes([GUARD]) * outputs[port.name].nbytes)
            else:
                pointers[port.name] = {"buffer": port.aliases_input, "element": element}
        grid = specialization.grid(known)
        order = {
            "source": specialization.kernel.source,
            "arrays": arrays,
            "pointers": pointers,
            "scalars": dict(zip(specialization.kernel.scalars, specialization.scalars(known), strict=True)),
            "constants": specialization.constants,
            "grid": grid,
            "returns": [pointers[port.name]["buffer"] for port in op.outputs],
        }
        if 0 in grid:  # a launch of no programs is none
            given = dict(zip((array["name"] for array in arrays), blobs, strict=True))
            results = [given[name] for name in order["returns"]]
        else:
            if self._process.has_exited:
                self._process.close()
                self._process = TritonProcess(interpret=True)
            _, results = self._process.request(order, blobs)
        return {
            name: np.frombuffer(data, array.dtype).reshape(array.shape)
            for (name, array), data in zip(outputs.items(), results, strict=True)
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.close()
