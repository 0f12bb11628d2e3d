"""A custom op, declared once: its signature and its meaning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir


@dataclass(frozen=True)
class Port:
    """A named tensor of a signature: `Port("cache", "T", "B H S D")`."""

    name: str
    element: str
    """The type variable that it shares with the ports of the same letter."""
    dims: str
    """Its dimensions by name, outermost first."""
    optional: bool = False


@dataclass(frozen=True, kw_only=True)
class Op:
    """A node that passes insert.

    `reference` is the meaning: an ONNX function of standard ops. Every backend that knows the op no better runs it, and
    whatever else claims to be the op is tested against it.
    """

    domain: str
    name: str
    version: int
    says: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    elements: Mapping[str, tuple[str, ...]]
    """For each type variable the element types it may take, by their numpy names."""
    reference: Callable[[], onnx.FunctionProto]
    native: frozenset[str] = frozenset()
    """The backends that import the op by its name and never read the reference."""

    def __str__(self) -> str:
        return f"{self.domain}::{self.name}"

    def function(self) -> ir.Function:
        """Return the reference as a model-local function; its inputs must be the declared ones, in order."""
        import onnx_ir as ir

        function = ir.serde.deserialize_function(self.reference())
        declared, meant = [port.name for port in self.inputs], [value.name for value in function.inputs]
        if declared != meant:
            raise ValueError(f"{self}: declared with inputs {declared}, but its reference takes {meant}")
        return function

    def add_to(self, model: ir.Model) -> None:
        """Let `model` hold nodes of this op and run them anywhere."""
        function = self.function()
        model.graph.opset_imports[self.domain] = self.version
        model.functions[function.identifier()] = function
