"""Custom ops as TensorRT plugins: the kernel is baked into the engine, which then needs neither Python nor a library.

What TensorRT asks of a plugin (`tensorrt.plugin`: register, autotune, aot_impl) follows from the declaration of the op. The
functions get their signatures made, because TensorRT reads them: real types, no defaults, no text annotations.
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
"""Element type -> what TensorRT's combinations of types call it."""

_MAX_SHARED_MEMORY_BYTES = 48 << 10
"""The shared memory that every launch may have. For more the driver must be asked, and TensorRT is not known to ask."""

_CORNERS = {"min": "smallest", "opt": "tuned", "max": "largest"}
"""The shapes of a profile, and what messages call them."""


def register_plugin(op: Op, trt: typing.Any, trtp: typing.Any, *, sm: int, store: typing.Any) -> None:
    """Let TensorRT take nodes of `op` as plugins whose kernels are compiled for `sm`.

    `trt` is the module tensorrt, `trtp` its tensorrt.plugin; `store` keeps compiled kernels, or is None.
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
        tensor, count = trtp.TensorDesc, len(self.op.inputs)
        ports = [_parameter(port.name, tensor) for port in self.op.inputs]
        numbers = [_parameter(one.name, one.type_) for one in self.op.attributes]
        outputs = types.GenericAlias(tuple, (tensor,) * len(self.op.outputs))
        found = types.GenericAlias(tuple, (str, str, trtp.KernelLaunchParams, trtp.SymIntExprs))
        combinations = types.GenericAlias(list, (trtp.AutoTuneCombination,))

        def describe(*given: typing.Any, **named: typing.Any) -> typing.Any:
            return self.output_descriptors(given[:count], self._attributes(given[count:], named))

        def choices(*given: typing.Any, **named: typing.Any) -> typing.Any:
            return self.autotune(given[:count], given[-1])

        def compiled(*given: typing.Any, **named: typing.Any) -> typing.Any:
            return self.aot_impl(given[:count], self._attributes(given[count:-2], named), given[-1])

        _set_signature(describe, [*ports, *numbers], outputs)
        _set_signature(choices, [*ports, *numbers, _parameter("outputs", outputs)], combinations)
        _set_signature(compiled, [*ports, *numbers, _parameter("outputs", outputs), _parameter("tactic", int)], found)
        trtp.register(name)(describe)
        trtp.autotune(name)(choices)
        trtp.aot_impl(name)(compiled)

    def output_descriptors(self, inputs: typing.Any, attributes: dict[str, typing.Any]) -> typing.Any:
        """Return what the outputs are: shapes as symbols, types, and which input each is written over."""
        by_name = {port.name: tensor for port, tensor in zip(self.op.inputs, inputs, strict=True)}
        known = self.op.bind_dims({name: self._symbolic_shape(tensor) for name, tensor in by_name.items()}, attributes)
        elements = self._element_types(inputs)
        shapes = self.op.output_shapes(known, self.shape_arithmetic)
        outputs = []
        for port in self.op.outputs:
            if port.aliases_input is not None:
                outputs.append(by_name[port.aliases_input].aliased())
                continue
            shape = tuple(self.trtp.ShapeExpr(size) for size in shapes[port.name])
            outputs.append(self.trtp.from_shape_expr(shape, self._data_type(self.op.dtype_of(port, elements))))
        return tuple(outputs)

    def autotune(self, inputs: typing.Any, outputs: typing.Any) -> typing.Any:
        """Return the one combination of types that the network has, and the tactics that TensorRT may time for it."""
        self._element_types(inputs)
        combination = self.trtp.AutoTuneCombination()
        for place, tensor in enumerate((*inputs, *outputs)):
            combination.pos([place], _TYPES[self.element_names[tensor.dtype]], "LINEAR")
        assert self.op.kernel is not None
        combination.tactics([*range(1, len(self.op.kernel.tactics) + 1)])
        return [combination]

    def aot_impl(self, inputs: typing.Any, attributes: dict[str, typing.Any], tactic: int) -> typing.Any:
        """Return the kernel of a tactic, how it is launched, and the scalars that it is given.

        It serves all shapes of the profile. Raises ShapeError where one of them is beyond what the op can do, and BackendError
        where the kernel needs more shared memory than a launch may have.
        """
        names = [port.name for port in self.op.inputs]
        bounds = {corner: self._dims_at(inputs, attributes, corner) for corner in _CORNERS}
        known = self.op.bind_dims(
            {name: self._symbolic_shape(tensor) for name, tensor in zip(names, inputs, strict=True)}, attributes
        )
        sizes = {name: size for name, size in bounds["max"].items() if name not in attributes and isinstance(size, int)}
        instance = Specialization(self.op, self._element_types(inputs), attributes, sizes, max(tactic, 1) - 1)
        for name in sorted(instance.kernel.static_dims):
            if not isinstance(known[name], int):
                raise ShapeError(f"{self.op.name}: {name} must be known when the engine is built", hint="fix that dimension")
        scalars = instance.scalars(known, self.shape_arithmetic)
        sixteenths = tuple(
            name
            for name, value in zip(instance.kernel.scalars, scalars, strict=True)
            if isinstance(value, int) and value % 16 == 0
        )
        instance = dataclasses.replace(instance, divisible_by_16=sixteenths)
        kernel = compile_all([instance], [self.sm], store=self.store)[0, self.sm]
        if kernel.shared_bytes > _MAX_SHARED_MEMORY_BYTES:
            raise BackendError(
                f"{instance} needs {kernel.shared_bytes} bytes of shared memory, and a launch by TensorRT has {_MAX_SHARED_MEMORY_BYTES}",
                hint="lower the largest shapes of the profile",
            )
        launch = self.trtp.KernelLaunchParams()
        launch.grid_x, launch.grid_y, launch.grid_z = instance.grid(known, self.shape_arithmetic)
        launch.block_x, launch.shared_mem = kernel.threads, kernel.shared_bytes
        more = self.trtp.SymIntExprs(len(scalars))
        for place, scalar in enumerate(scalars):
            more[place] = self.trtp.SymInt32(scalar)
        return kernel.name, kernel.ptx, launch, more

    def _attributes(self, positional: typing.Any, named: dict[str, typing.Any]) -> dict[str, typing.Any]:
        """Return the attributes by name: TensorRT gives them by name to one function and in order to another."""
        return named or {one.name: value for one, value in zip(self.op.attributes, positional, strict=False)}

    def _element_types(self, inputs: typing.Any) -> dict[str, str]:
        """Return the element type of each type variable. Raises BackendError for one that the op does not take."""
        found: dict[str, str] = {}
        for port, tensor in zip(self.op.inputs, inputs, strict=True):
            element = self.element_names.get(tensor.dtype)
            allowed = self.op.type_constraints.get(port.type_str, (port.type_str,))
            if element not in allowed or found.setdefault(port.type_str, element) != element:
                raise BackendError(f"{self.op.name}: `{port.name}` is {tensor.dtype}, and must be one of {', '.join(allowed)}")
        return {variable: found[variable] for variable in self.op.type_variables}

    def _data_type(self, element: str) -> typing.Any:
        return getattr(self.trt.DataType, _TYPES[element].replace("FP32", "FLOAT").replace("FP16", "HALF"))

    def _symbolic_shape(self, tensor: typing.Any) -> list[typing.Any]:
        """Return the shape of a tensor, as integers where it is known and as TensorRT's symbols elsewhere."""
        return [size if size.is_fake or not size.is_constant else int(size.constant_value()) for size in tensor.shape_expr]

    def _dims_at(self, inputs: typing.Any, attributes: dict[str, typing.Any], corner: str) -> dict[str, typing.Any]:
        """Return what the dims are at a corner of the profile. Raises ShapeError that names the corner."""
        shapes = {}
        for port, tensor in zip(self.op.inputs, inputs, strict=True):
            bounds = getattr(tensor.shape, corner) if tensor.shape.is_dynamic else tensor.shape
            shapes[port.name] = [int(size) for size in bounds]
        try:
            return self.op.bind_dims(shapes, attributes)
        except ShapeError as error:
            raise ShapeError(
                f"at the {_CORNERS[corner]} shapes of the profile: {error.message}",
                hint=f"change the {_CORNERS[corner]} shapes that the model's inputs may have",
            ) from error

    def _constant_or_symbolic(self, plain: typing.Any, symbolic: typing.Any) -> typing.Any:
        return lambda one, other: (plain if isinstance(one, int) and isinstance(other, int) else symbolic)(one, other)


def _parameter(name: str, annotation: typing.Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)


def _set_signature(function: typing.Any, parameters: list[inspect.Parameter], returns: typing.Any) -> None:
    function.__signature__ = inspect.Signature(parameters, return_annotation=returns)
