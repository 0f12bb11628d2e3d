"""Custom ops as TensorRT plugins: the compiled kernel is embedded in the engine, which needs neither Python nor a library.

The functions that a TensorRT plugin consists of (`tensorrt.plugin`: register, autotune, aot_impl) are derived from the
declaration of the op. TensorRT reads their signatures, which must have real annotation types (not strings) and no defaults, so
the signatures are created explicitly and this module does not import `annotations` from `__future__`.
"""

import dataclasses
import inspect
import types
import typing

from ryzen_compile.errors import BackendError, ShapeError
from ryzen_compile.kernels import Specialization, compile_all
from ryzen_compile.spec import dim_expr
from ryzen_compile.spec.op import Op

_TYPES = {
    "float32": "FP32",
    "float16": "FP16",
    "bfloat16": "BF16",
    "int8": "INT8",
    "int32": "INT32",
    "int64": "INT64",
    "bool": "BOOL",
}
"""Element types -> their names in TensorRT's autotune combinations."""

_MAX_SHARED_MEMORY_BYTES = 48 << 10
"""The shared memory that every kernel launch may use. More needs a driver call, which TensorRT is not known to make."""

_CORNERS = {"min": "smallest", "opt": "tuned", "max": "largest"}
"""The corners of a profile -> their names in messages."""


def register_plugin(op: Op, trt: typing.Any, trtp: typing.Any, *, sm: int, store: typing.Any) -> None:
    """Register `op` as a TensorRT plugin whose kernels are compiled for the compute capability `sm`.

    `trt` is the module `tensorrt`, `trtp` its `tensorrt.plugin`; `store` caches compiled kernels, or is None.
    """
    _OpPlugin(op, trt, trtp, sm, store).register()


class _OpPlugin:
    def __init__(self, op: Op, trt: typing.Any, trtp: typing.Any, sm: int, store: typing.Any) -> None:
        self.op, self.trt, self.trtp, self.sm, self.store = op, trt, trtp, sm, store
        self.element_names = {self._data_type(name): name for name in _TYPES}
        self.shape_arithmetic = dim_expr.Arithmetic(
            ceil_div=self._constant_or_symbolic(dim_expr.NUMERIC.ceil_div, trtp.cdiv),
            minimum=self._constant_or_symbolic(min, trtp.min),
            maximum=self._constant_or_symbolic(max, trtp.max),
            constant=trtp.ShapeExpr,
        )

    def register(self) -> None:
        trtp, name = self.trtp, f"{self.op.domain}::{self.op.name}"
        tensor_desc, input_count = trtp.TensorDesc, len(self.op.inputs)
        inputs = [_parameter(param.name, tensor_desc) for param in self.op.inputs]
        attributes = [_parameter(attribute.name, attribute.type_) for attribute in self.op.attributes]
        outputs = types.GenericAlias(tuple, (tensor_desc,) * len(self.op.outputs))
        launch = types.GenericAlias(tuple, (str, str, trtp.KernelLaunchParams, trtp.SymIntExprs))
        combinations = types.GenericAlias(list, (trtp.AutoTuneCombination,))

        def register_op(*args: typing.Any, **kwargs: typing.Any) -> typing.Any:
            return self.output_descriptors(args[:input_count], self._attributes(args[input_count:], kwargs))

        def autotune(*args: typing.Any, **kwargs: typing.Any) -> typing.Any:
            return self.autotune(args[:input_count], args[-1])

        def aot_impl(*args: typing.Any, **kwargs: typing.Any) -> typing.Any:
            return self.aot_impl(args[:input_count], self._attributes(args[input_count:-2], kwargs), args[-1])

        _set_signature(register_op, [*inputs, *attributes], outputs)
        _set_signature(autotune, [*inputs, *attributes, _parameter("outputs", outputs)], combinations)
        _set_signature(aot_impl, [*inputs, *attributes, _parameter("outputs", outputs), _parameter("tactic", int)], launch)
        trtp.register(name)(register_op)
        trtp.autotune(name)(autotune)
        trtp.aot_impl(name)(aot_impl)

    def output_descriptors(self, inputs: typing.Any, attributes: dict[str, typing.Any]) -> typing.Any:
        """Return the descriptors of the outputs: symbolic shapes, types, and the input that an output aliases."""
        by_name = {param.name: tensor for param, tensor in zip(self.op.inputs, inputs, strict=True)}
        dims = self.op.bind_dims({name: self._symbolic_shape(tensor) for name, tensor in by_name.items()}, attributes)
        elements = self._element_types(inputs)
        shapes = self.op.output_shapes(dims, self.shape_arithmetic)
        outputs = []
        for param in self.op.outputs:
            if param.aliases_input is not None:
                outputs.append(by_name[param.aliases_input].aliased())
                continue
            shape = tuple(self.trtp.ShapeExpr(size) for size in shapes[param.name])
            outputs.append(self.trtp.from_shape_expr(shape, self._data_type(self.op.dtype_of(param, elements))))
        return tuple(outputs)

    def autotune(self, inputs: typing.Any, outputs: typing.Any) -> typing.Any:
        """Return the only combination of types, that of the network, with the tactics that TensorRT may time for it."""
        self._element_types(inputs)
        combination = self.trtp.AutoTuneCombination()
        for index, tensor in enumerate((*inputs, *outputs)):
            combination.pos([index], _TYPES[self.element_names[tensor.dtype]], "LINEAR")
        assert self.op.kernel is not None
        combination.tactics([*range(1, len(self.op.kernel.tactics) + 1)])
        return [combination]

    def aot_impl(self, inputs: typing.Any, attributes: dict[str, typing.Any], tactic: int) -> typing.Any:
        """Return the name and the PTX of the kernel of a tactic, its launch parameters and its scalar arguments.

        The kernel supports all shapes of the profile. Raises ShapeError if the op does not support one of them, BackendError
        if the kernel needs more shared memory than a launch may use.
        """
        names = [param.name for param in self.op.inputs]
        corner_dims = {corner: self._dims_at(inputs, attributes, corner) for corner in _CORNERS}
        dims = self.op.bind_dims(
            {name: self._symbolic_shape(tensor) for name, tensor in zip(names, inputs, strict=True)}, attributes
        )
        sizes = {name: size for name, size in corner_dims["max"].items() if name not in attributes and isinstance(size, int)}
        specialization = Specialization(self.op, self._element_types(inputs), attributes, sizes, max(tactic, 1) - 1)
        for name in sorted(specialization.kernel.static_dims):
            if not isinstance(dims[name], int):
                raise ShapeError(f"{self.op.name}: {name} must be known at build time", hint="make that dimension static")
        scalars = specialization.scalars(dims, self.shape_arithmetic)
        divisible_by_16 = tuple(
            name
            for name, value in zip(specialization.kernel.scalars, scalars, strict=True)
            if isinstance(value, int) and value % 16 == 0
        )
        specialization = dataclasses.replace(specialization, divisible_by_16=divisible_by_16)
        kernel = compile_all([specialization], [self.sm], store=self.store)[0, self.sm]
        if kernel.shared_bytes > _MAX_SHARED_MEMORY_BYTES:
            raise BackendError(
                f"{specialization} needs {kernel.shared_bytes} bytes of shared memory, "
                f"but a launch by TensorRT may use {_MAX_SHARED_MEMORY_BYTES} bytes",
                hint="lower the largest shapes of the profile",
            )
        launch = self.trtp.KernelLaunchParams()
        launch.grid_x, launch.grid_y, launch.grid_z = specialization.grid(dims, self.shape_arithmetic)
        launch.block_x, launch.shared_mem = kernel.threads, kernel.shared_bytes
        scalar_arguments = self.trtp.SymIntExprs(len(scalars))
        for index, scalar in enumerate(scalars):
            scalar_arguments[index] = self.trtp.SymInt32(scalar)
        return kernel.name, kernel.ptx, launch, scalar_arguments

    def _attributes(self, positional: typing.Any, named: dict[str, typing.Any]) -> dict[str, typing.Any]:
        """Return the attributes by name: TensorRT passes them by name to one function and by position to the other."""
        return named or {attribute.name: value for attribute, value in zip(self.op.attributes, positional, strict=False)}

    def _element_types(self, inputs: typing.Any) -> dict[str, str]:
        """Return {type variable: element type}. Raises BackendError for an element type that the op does not support."""
        elements: dict[str, str] = {}
        for param, tensor in zip(self.op.inputs, inputs, strict=True):
            element = self.element_names.get(tensor.dtype)
            allowed = self.op.type_constraints.get(param.type_str, (param.type_str,))
            if element not in allowed or elements.setdefault(param.type_str, element) != element:
                raise BackendError(f"{self.op.name}: `{param.name}` is {tensor.dtype}, and must be one of {', '.join(allowed)}")
        return {variable: elements[variable] for variable in self.op.type_variables}

    def _data_type(self, element: str) -> typing.Any:
        return getattr(self.trt.DataType, _TYPES[element].replace("FP32", "FLOAT").replace("FP16", "HALF"))

    def _symbolic_shape(self, tensor: typing.Any) -> list[typing.Any]:
        """Return the shape of a tensor: static sizes as integers, dynamic sizes as TensorRT's symbolic expressions."""
        return [size if size.is_fake or not size.is_constant else int(size.constant_value()) for size in tensor.shape_expr]

    def _dims_at(self, inputs: typing.Any, attributes: dict[str, typing.Any], corner: str) -> dict[str, typing.Any]:
        """Return the dims at a corner of the profile. Raises ShapeError, which names the corner, if the op rejects them."""
        shapes = {}
        for param, tensor in zip(self.op.inputs, inputs, strict=True):
            shape = getattr(tensor.shape, corner) if tensor.shape.is_dynamic else tensor.shape
            shapes[param.name] = [int(size) for size in shape]
        try:
            return self.op.bind_dims(shapes, attributes)
        except ShapeError as error:
            raise ShapeError(
                f"at the {_CORNERS[corner]} shapes of the profile: {error.message}",
                hint=f"change the {_CORNERS[corner]} shapes of the model inputs",
            ) from error

    def _constant_or_symbolic(self, constant: typing.Any, symbolic: typing.Any) -> typing.Any:
        """Return a binary function: `constant` if both operands are integers, else `symbolic`."""
        return lambda a, b: (constant if isinstance(a, int) and isinstance(b, int) else symbolic)(a, b)


def _parameter(name: str, annotation: typing.Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)


def _set_signature(function: typing.Any, parameters: list[inspect.Parameter], returns: typing.Any) -> None:
    function.__signature__ = inspect.Signature(parameters, return_annotation=returns)
