"""Execution of kernels on the CPU by Triton's interpreter, with the argument list of a launch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ryzen_compile.kernels.specialization import Specialization
from ryzen_compile.kernels.triton_child import GUARD
from ryzen_compile.kernels.triton_process import TritonProcess
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.utils.closeable import Closeable

if TYPE_CHECKING:
    import numpy as np

    Arrays = Mapping[str, np.ndarray[Any, Any]]


class Interpreter(Closeable):
    """Runs kernels in a child process without a GPU, slowly, and detects writes next to tensors. A context manager.

    A kernel that reads or writes far outside of its tensors may crash the child process; the next run starts a new one.
    """

    def __init__(self) -> None:
        """Start the child process."""
        self._process = TritonProcess(interpret=True)

    def run(self, specialization: Specialization, inputs: Arrays) -> dict[str, np.ndarray[Any, Any]]:
        """Run the op's kernel and return its outputs by name; an output that aliases an input starts as a copy of the input.

        Raises ShapeError if the inputs violate the op's declaration, BackendError if the kernel fails or writes outside of
        its tensors.
        """
        import numpy as np

        op = specialization.op
        dims = op.bind_dims({name: array.shape for name, array in inputs.items()}, specialization.attributes)
        shapes = op.output_shapes(dims)
        arrays, pointers, blobs, outputs = [], {}, [], {}

        def add_buffer(name: str, dtype: str, data: bytes) -> None:
            arrays.append({"name": name, "bytes": len(data)})
            blobs.append(data)
            pointers[name] = {"buffer": name, "element": dtype}

        for param in op.inputs:
            dtype = op.dtype_of(param, specialization.type_bindings)
            add_buffer(param.name, dtype, np.ascontiguousarray(inputs[param.name], numpy_dtype(dtype)).tobytes())
        for param in op.outputs:
            dtype = op.dtype_of(param, specialization.type_bindings)
            outputs[param.name] = np.empty(shapes[param.name], numpy_dtype(dtype))
            if param.aliases_input is None:
                add_buffer(param.name, dtype, bytes([GUARD]) * outputs[param.name].nbytes)
            else:
                pointers[param.name] = {"buffer": param.aliases_input, "element": dtype}
        grid = specialization.grid(dims)
        request = {
            "source": specialization.kernel.source,
            "arrays": arrays,
            "pointers": pointers,
            "scalars": dict(zip(specialization.kernel.scalars, specialization.scalars(dims), strict=True)),
            "constants": specialization.constants,
            "grid": grid,
            "returns": [pointers[param.name]["buffer"] for param in op.outputs],
        }
        if 0 in grid:  # an empty grid leaves all buffers unchanged
            initial_data = dict(zip((array["name"] for array in arrays), blobs, strict=True))
            results = [initial_data[name] for name in request["returns"]]
        else:
            if self._process.has_exited:
                self._process.close()
                self._process = TritonProcess(interpret=True)
            _, results = self._process.request(request, blobs)
        return {
            name: np.frombuffer(data, array.dtype).reshape(array.shape)
            for (name, array), data in zip(outputs.items(), results, strict=True)
        }

    def close(self) -> None:
        """Free the resources."""
        self._process.close()
