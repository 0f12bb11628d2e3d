"""Custom op declarations: signature, reference function and kernel; plugins, models and tests are derived from them."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ryzen_compile.errors import RyzenError, ShapeError, UsageError, did_you_mean
from ryzen_compile.spec import dim_expr

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import onnx_ir as ir

HALF = ("float16", "bfloat16")
FLOATS = ("float32", *HALF)


@dataclass(frozen=True)
class TensorParam:
    """A named input or output of an op: `TensorParam("cache", "T", "B H S D")`."""

    name: str
    type_str: str
    """A type variable, shared by all tensors of the same variable, or an element type by its numpy name."""
    dims: str
    """Dims by name, outermost first. A leading `...` stands for any number of dims; their product is called `ROWS`."""
    description: str = ""
    optional: bool = False
    aliases_input: str | None = None
    """For an output: the input whose buffer it shares. Elements that the kernel does not write keep the input's value."""


@dataclass(frozen=True)
class AttributeParam:
    """A numeric attribute of an op, set when a node is created; its value lies in [`minimum`, `maximum`]."""

    name: str
    type_: type[int] | type[float]
    minimum: float
    maximum: float
    description: str


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """A Triton kernel that computes the op in one launch.

    Its parameters are, by name and in this order, the inputs, the `scalars`, the outputs and the `constants`. TensorRT passes
    the first three groups in this order; the constants are compiled in.
    """

    source: str
    """The kernel function as `module:function`."""
    scalars: Mapping[str, str]
    """Parameter -> expression over the dims; passed at launch as a 32-bit integer."""
    constants: Mapping[str, str] = field(default_factory=dict)
    """Parameter -> expression over dims, attributes and `size_T` (bytes per element of T).

    For a dim that is not in `static_dims` the expression uses the maximum size.
    """
    static_dims: frozenset[str] = frozenset()
    """The dims whose sizes must be known when the kernel is compiled."""
    grid: tuple[str, ...]
    """Number of programs along one to three axes: expressions over dims, attributes, constants and tactic constants."""
    tactics: tuple[Mapping[str, int], ...] = ({"num_warps": 4},)
    """The configurations of the kernel, which all compute the same result: additional constants, and Triton's `num_warps` and
    `num_stages`."""


InputFactory = Callable[["np.random.Generator", Mapping[str, int], Mapping[str, float]], Mapping[str, "np.ndarray[Any, Any]"]]
"""(random generator, dims, attributes) -> an array for every input by name; floating-point inputs are float64."""


@dataclass(frozen=True, kw_only=True)
class Op:
    """A custom op that passes insert into models.

    `reference` defines the semantics: an ONNX function of standard ops. Backends without a native implementation run it, and
    every other implementation is tested against it.
    """

    domain: str
    name: str
    version: int
    description: str
    inputs: tuple[TensorParam, ...]
    outputs: tuple[TensorParam, ...]
    attributes: tuple[AttributeParam, ...] = ()
    type_constraints: Mapping[str, tuple[str, ...]]
    """Type variable -> the element types that it may take, by their numpy names."""
    reference: str
    """`module:name` of an onnxscript function, or of a function that returns an onnx.FunctionProto."""
    formula: str = ""
    """The computation in a few lines of mathematical notation."""
    dim_limits: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Dim -> (minimum, maximum), inclusive."""
    constraints: tuple[str, ...] = ()
    """Further conditions on dims and attributes: `sinks + recent <= C`."""
    tolerance: Mapping[str, float] | None = None
    """Element type of `T` -> t: the floating-point outputs of every implementation differ from the exact result x by at most
    t * (1 + |x|)."""
    kernel: KernelSpec | None = None
    bytes_moved: str | None = None
    """Minimum memory traffic in bytes: an expression over dims, attributes and `size_T`."""
    flops: str | None = None
    """Number of floating-point operations, for ops that are compute-bound; None for memory-bound ops."""
    typical_dims: Mapping[str, float] = field(default_factory=dict)
    """Typical dims and attributes; kernels are compiled and timed for these by default."""
    test_cases: tuple[Mapping[str, float], ...] = ()
    """Dims and attributes of test cases: small and irregular sizes, which an interpreter runs quickly."""
    make_inputs: InputFactory | None = None
    """Returns random inputs for tests."""

    def __str__(self) -> str:
        return f"{self.domain}::{self.name}"

    def __post_init__(self) -> None:
        names = [*(param.name for param in (*self.inputs, *self.outputs)), *(attribute.name for attribute in self.attributes)]
        if len({*names}) != len(names):
            raise ValueError(f"{self}: inputs, outputs and attributes must have distinct names")
        if self.kernel is not None and self.tolerance is None:
            raise ValueError(f"{self}: an op with a kernel must declare `tolerance`")

    @cached_property
    def type_variables(self) -> tuple[str, ...]:
        """The type variables, in the order of their first use in the inputs and outputs."""
        return tuple(
            dict.fromkeys(param.type_str for param in (*self.inputs, *self.outputs) if param.type_str in self.type_constraints)
        )

    def dtype_of(self, param: TensorParam, type_bindings: Mapping[str, str]) -> str:
        """Return the element type of `param` under the given type variable bindings."""
        return type_bindings.get(param.type_str, param.type_str)

    def check_attributes(self, attributes: Mapping[str, Any]) -> dict[str, Any]:
        """Return `attributes` converted and in declared order.

        Raises UsageError if an attribute is unknown, missing, of the wrong type or out of range.
        """
        declared = {attribute.name: attribute for attribute in self.attributes}
        for name in attributes:
            if name not in declared:
                raise UsageError(f"{self.name} has no attribute `{name}`", hint=did_you_mean(name, [*declared]))
        for name, attribute in declared.items():
            if name not in attributes:
                raise UsageError(f"{self.name} needs its attribute `{name}`: {attribute.description}")
            value = attributes[name]
            if isinstance(value, bool) or not isinstance(value, (int, attribute.type_)):
                raise UsageError(f"{self.name}: `{name}` is {value!r}, and must be of type {attribute.type_.__name__}")
            if not attribute.minimum <= value <= attribute.maximum:
                raise UsageError(
                    f"{self.name}: `{name}` is {value}, and must be in [{attribute.minimum:g}, {attribute.maximum:g}]"
                )
        return {name: attribute.type_(attributes[name]) for name, attribute in declared.items()}

    def bind_dims(self, shapes: Mapping[str, Any], attributes: Mapping[str, Any]) -> dict[str, Any]:
        """Return the sizes of the dims for inputs of these shapes, together with the attributes.

        Dims that are not integers are symbols and are not checked. Raises ShapeError if shapes contradict each other or
        violate the limits or constraints of the op.
        """
        dims: dict[str, Any] = dict(attributes)
        for param in self.inputs:
            if param.name in shapes:
                dim_expr.bind_dims(param.dims, shapes[param.name], dims, label=f"{self.name}: `{param.name}`")
            elif not param.optional:
                raise ShapeError(f"{self.name} needs its input `{param.name}` ({param.dims})")
        self.check_dims(dims)
        return dims

    def check_dims(self, dims: Mapping[str, Any]) -> None:
        """Raise ShapeError if dims and attributes violate the limits or constraints of the op; symbols are not checked."""
        for name, (lowest, highest) in self.dim_limits.items():
            if isinstance(dims.get(name), int) and not lowest <= dims[name] <= highest:
                raise ShapeError(f"{self.name}: {name} is {dims[name]}, and must be in [{lowest}, {highest}]")
        for constraint in self.constraints:
            values = {name: dims.get(name) for name in sorted(dim_expr.names_in(constraint))}
            if all(isinstance(value, (int, float)) for value in values.values()) and not dim_expr.evaluate(constraint, dims):
                listing = ", ".join(f"{name} = {value}" for name, value in values.items())
                raise ShapeError(f"{self.name} needs {constraint}, and here {listing}")

    def output_shapes(
        self, dims: Mapping[str, Any], arithmetic: dim_expr.Arithmetic = dim_expr.NUMERIC
    ) -> dict[str, tuple[Any, ...]]:
        """Return the shape of each output by name for the dims that `bind_dims` returned."""
        return {param.name: dim_expr.shape_of(param.dims, dims, arithmetic) for param in self.outputs}

    def function_proto(self) -> onnx.FunctionProto:
        """Return the reference as an ONNX function.

        Raises RyzenError if the reference cannot be loaded, or if its name, inputs or outputs differ from the declaration.
        """
        try:
            reference = pkgutil.resolve_name(self.reference)
        except (ImportError, AttributeError) as error:
            raise RyzenError(f"{self}: its reference `{self.reference}` cannot be loaded: {error}") from error
        function: onnx.FunctionProto = reference.to_function_proto() if hasattr(reference, "to_function_proto") else reference()
        for kind, params, actual in (("inputs", self.inputs, function.input), ("outputs", self.outputs, function.output)):
            if [param.name for param in params] != list(actual):
                raise RyzenError(
                    f"{self}: declared with {kind} {[param.name for param in params]}, but its reference has {list(actual)}"
                )
        if (function.domain, function.name) != (self.domain, self.name):
            raise RyzenError(f"{self}: its reference is called {function.domain}::{function.name}")
        return function

    def ir_function(self) -> ir.Function:
        """Return the reference as a model-local function of onnx_ir."""
        import onnx_ir as ir

        return ir.serde.deserialize_function(self.function_proto())

    def add_to(self, model: ir.Model) -> None:
        """Add the op's opset import and its reference function to `model`, so that nodes of the op run on every backend."""
        function = self.ir_function()
        model.graph.opset_imports[self.domain] = self.version
        model.functions[function.identifier()] = function

    def node_attributes(self, attributes: Mapping[str, Any]) -> dict[str, Any]:
        """Return the attributes of a node: the declared ones, and those that make TensorRT select the op's plugin.

        Other runtimes ignore the latter and run the reference.
        """
        return {**self.check_attributes(attributes), "plugin_namespace": self.domain, "plugin_version": "1", "aot": 1}
