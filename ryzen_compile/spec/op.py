"""A custom op, declared once: its signature, its meaning, its kernel. All that becomes of it is derived from here."""

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
    """A named tensor of a signature: `Port("cache", "T", "B H S D")`."""

    name: str
    type_str: str
    """The type variable that it shares with the ports of the same letter, or an element type by its numpy name."""
    dims: str
    """Its dimensions by name, outermost first. `...` in front is any number of them, whose product is known as `ROWS`."""
    description: str = ""
    optional: bool = False
    aliases_input: str | None = None
    """Of an output: the input that a kernel writes it over. What it does not write keeps the input's value."""


@dataclass(frozen=True)
class AttributeParam:
    """A number that is fixed when a node is made."""

    name: str
    type_: type[int] | type[float]
    minimum: float
    maximum: float
    description: str


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """A Triton kernel that does the whole op in one launch.

    Its parameters are, by name and in this order, the inputs, the `scalars`, the outputs and the `constants`: TensorRT hands
    over the first three so, and the constants are compiled in.
    """

    source: str
    """`module:function`."""
    scalars: Mapping[str, str]
    """Parameter -> expression over the dims: what it is told of the shapes, as 32-bit integers."""
    constants: Mapping[str, str] = field(default_factory=dict)
    """Parameter -> expression over dims, attributes and `size_T` (the bytes of an element of T).

    Of a dim that is not in `exact` they see the largest that there may be.
    """
    static_dims: frozenset[str] = frozenset()
    """The dims that must be known when the kernel is compiled."""
    grid: tuple[str, ...]
    """How many programs, along at most three axes: expressions over dims, attributes, constants and what the tactic says."""
    tactics: tuple[Mapping[str, int], ...] = ({"num_warps": 4},)
    """The ways to run it, all of the same result: constants of their own, and Triton's `num_warps` and `num_stages`."""


InputFactory = Callable[["np.random.Generator", Mapping[str, int], Mapping[str, float]], Mapping[str, "np.ndarray[Any, Any]"]]
"""(random, dims, attributes) -> an array for every input port, floating point ones as float64."""


@dataclass(frozen=True, kw_only=True)
class Op:
    """A node that passes insert.

    `reference` is the meaning: an ONNX function of standard ops. Every backend that knows the op no better runs it, and
    whatever else claims to be the op is tested against it.
    """

    domain: str
    name: str
    version: int
    description: str
    inputs: tuple[TensorParam, ...]
    outputs: tuple[TensorParam, ...]
    attributes: tuple[AttributeParam, ...] = ()
    type_constraints: Mapping[str, tuple[str, ...]]
    """For each type variable the element types it may take, by their numpy names."""
    reference: str
    """`module:name` of an onnxscript function, or of a function that returns an onnx.FunctionProto."""
    formula: str = ""
    """What it computes, in a few lines of symbols."""
    dim_limits: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """The lowest and the highest of dims; what is beyond is refused."""
    constraints: tuple[str, ...] = ()
    """What else must hold of dims and attributes: `sinks + recent <= C`."""
    tolerance: Mapping[str, float] | None = None
    """Element type of `T` -> t: every life is within t * (1 + |exact|) of the exact result, in each floating point output."""
    kernel: KernelSpec | None = None
    bytes_moved: str | None = None
    """The bytes that must go through memory, at least: an expression over dims, attributes and `size_T`."""
    flops: str | None = None
    """The floating point operations, where they and not the bytes are the bound."""
    typical_dims: Mapping[str, float] = field(default_factory=dict)
    """Dims and attributes as they are in models: what kernels are compiled and timed for where nothing else is said."""
    test_cases: tuple[Mapping[str, float], ...] = ()
    """Dims and attributes to try the op with: small and odd, so that an interpreter runs them in a moment."""
    make_inputs: InputFactory | None = None
    """Makes inputs to try the op with."""
    native_backends: frozenset[str] = frozenset()
    """The backends that import the op by its name and never read the reference."""

    def __str__(self) -> str:
        return f"{self.domain}::{self.name}"

    def __post_init__(self) -> None:
        names = [*(port.name for port in (*self.inputs, *self.outputs)), *(one.name for one in self.attributes)]
        if len({*names}) != len(names):
            raise ValueError(f"{self}: two of its ports and attributes share a name")
        if self.kernel is not None and self.tolerance is None:
            raise ValueError(f"{self}: an op with a kernel says how far from the exact result it may be")

    @cached_property
    def type_variables(self) -> tuple[str, ...]:
        """Its type variables, in the order of the ports that bring them."""
        return tuple(
            dict.fromkeys(port.type_str for port in (*self.inputs, *self.outputs) if port.type_str in self.type_constraints)
        )

    def dtype_of(self, param: TensorParam, type_bindings: Mapping[str, str]) -> str:
        """Return the element type of `port` where the type variables are `elements`."""
        return type_bindings.get(param.type_str, param.type_str)

    def check_attributes(self, attributes: Mapping[str, Any]) -> dict[str, Any]:
        """Return `given` in the declared order; raises UsageError for one that is unknown, missing, or out of range."""
        known = {one.name: one for one in self.attributes}
        for name in attributes:
            if name not in known:
                raise UsageError(f"{self.name} has no attribute `{name}`", hint=did_you_mean(name, [*known]))
        for name, one in known.items():
            if name not in attributes:
                raise UsageError(f"{self.name} needs its attribute `{name}`: {one.description}")
            value = attributes[name]
            if isinstance(value, bool) or not isinstance(value, (int, one.type_)):
                raise UsageError(f"{self.name}: `{name}` is {value!r}, and must be of type {one.type_.__name__}")
            if not one.minimum <= value <= one.maximum:
                raise UsageError(f"{self.name}: `{name}` is {value}, and must be in [{one.minimum:g}, {one.maximum:g}]")
        return {name: one.type_(attributes[name]) for name, one in known.items()}

    def bind_dims(self, shapes: Mapping[str, Any], attributes: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the dims are for inputs of these shapes, with the attributes among them.

        Dims that are not integers are symbols, and are believed. Raises ShapeError where shapes contradict each other or are
        beyond what the op can do.
        """
        known: dict[str, Any] = dict(attributes)
        for port in self.inputs:
            if port.name in shapes:
                dim_expr.bind_dims(port.dims, shapes[port.name], known, label=f"{self.name}: `{port.name}`")
            elif not port.optional:
                raise ShapeError(f"{self.name} needs its input `{port.name}` ({port.dims})")
        self.check_dims(known)
        return known

    def check_dims(self, dims: Mapping[str, Any]) -> None:
        """Raise ShapeError where what is `known` of dims and attributes is beyond what the op can do."""
        for name, (lowest, highest) in self.dim_limits.items():
            if isinstance(dims.get(name), int) and not lowest <= dims[name] <= highest:
                raise ShapeError(f"{self.name}: {name} is {dims[name]}, and must be in [{lowest}, {highest}]")
        for needed in self.constraints:
            used = {name: dims.get(name) for name in sorted(dim_expr.names_in(needed))}
            if all(isinstance(value, (int, float)) for value in used.values()) and not dim_expr.evaluate(needed, dims):
                told = ", ".join(f"{name} = {value}" for name, value in used.items())
                raise ShapeError(f"{self.name} needs {needed}, and here {told}")

    def output_shapes(
        self, dims: Mapping[str, Any], arithmetic: dim_expr.Arithmetic = dim_expr.NUMERIC
    ) -> dict[str, tuple[Any, ...]]:
        """Return the shape of each output for the dims that `bind` returned."""
        return {port.name: dim_expr.shape_of(port.dims, dims, arithmetic) for port in self.outputs}

    def function_proto(self) -> onnx.FunctionProto:
        """Return the reference as ONNX has it; its inputs and outputs must be the declared ones, in order."""
        try:
            found = pkgutil.resolve_name(self.reference)
        except (ImportError, AttributeError) as error:
            raise RyzenError(f"{self}: its reference `{self.reference}` cannot be loaded: {error}") from error
        function: onnx.FunctionProto = found.to_function_proto() if hasattr(found, "to_function_proto") else found()
        for kind, ports, meant in (("inputs", self.inputs, function.input), ("outputs", self.outputs, function.output)):
            if [port.name for port in ports] != list(meant):
                raise RyzenError(
                    f"{self}: declared with {kind} {[port.name for port in ports]}, its reference has {list(meant)}"
                )
        if (function.domain, function.name) != (self.domain, self.name):
            raise RyzenError(f"{self}: its reference is called {function.domain}::{function.name}")
        return function

    def ir_function(self) -> ir.Function:
        """Return the reference as a model-local function."""
        import onnx_ir as ir

        return ir.serde.deserialize_function(self.function_proto())

    def add_to(self, model: ir.Model) -> None:
        """Let `model` hold nodes of this op and run them anywhere."""
        function = self.ir_function()
        model.graph.opset_imports[self.domain] = self.version
        model.functions[function.identifier()] = function

    def node_attributes(self, attributes: Mapping[str, Any]) -> dict[str, Any]:
        """Return the attributes of a node: the declared ones, and those by which TensorRT takes the op's plugin.

        Other runtimes do not know the latter, and run the reference.
        """
        return {**self.check_attributes(attributes), "plugin_namespace": self.domain, "plugin_version": "1", "aot": 1}
