"""The walk: every node once, in order, each with what is known of its operands by then."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.edit.insertion import NameAllocator
from ryzen_passes.fold import data_propagation, simplify, value_info
from ryzen_passes.fold.constant_evaluation import evaluate
from ryzen_passes.fold.cse_keys import constant_key, expression_key
from ryzen_passes.fold.duplicate_weights import find_duplicates
from ryzen_passes.fold.node_inputs import subgraphs
from ryzen_passes.fold.schema_check import matches_schema
from ryzen_passes.fold.shape_inference import infer
from ryzen_passes.fold.stats import FoldStats
from ryzen_passes.fold.symbol_table import SymbolTable
from ryzen_passes.fold.value_info import ValueInfo


@dataclass
class Scope:
    """The graph that is walked, and what is at hand in it and in those around it."""

    graph: ir.Graph
    opset: int
    allows_initializers: bool
    """False in the body of a function, and in models so old that every initializer must be an input."""
    outer: Scope | None = None
    expressions: dict[Hashable, tuple[ir.Value, ...]] = field(default_factory=dict)
    """What has been computed: outputs by op, operands and attributes; a value by what it holds."""

    def find(self, key: Hashable) -> tuple[ir.Value, ...] | None:
        """Return the values at hand for `key`."""
        scope: Scope | None = self
        while scope is not None:
            if (values := scope.expressions.get(key)) is not None:
                return values
            scope = scope.outer
        return None


class FoldPass:
    """One walk over the graphs of a model, which rewrites them on its way."""

    def __init__(self, model: ir.Model, stats: FoldStats) -> None:
        self._functions = model.functions
        self._allows_initializers = model.ir_version >= 4
        self.symbols = SymbolTable()
        self._infos: dict[ir.Value, ValueInfo] = {}
        self._stats = stats
        self._replacements: dict[ir.Value, ir.Value] = {}
        """What took the place of a value that was met before."""
        self._model = model

    @functools.cached_property
    def _names(self) -> NameAllocator:
        return NameAllocator(self._model)

    def run(self) -> bool:
        """Walk the main graph with all that is nested in it, then each function; tell whether that changed anything."""
        before = self._stats.rewrite_count()
        graph = self._model.graph
        for value in graph.inputs:
            self._infos[value] = self._declared_info(value)
        for old, new in find_duplicates(graph):
            if old.uses():
                self._replace_uses(old, new)
                self._stats.duplicates += 1
        self._fold_graph(Scope(graph, _opset(graph.opset_imports), self._allows_initializers))
        for function in self._functions.values():
            self._fold_graph(Scope(function.graph, _opset(function.opset_imports), allows_initializers=False))
        return self._stats.rewrite_count() > before

    def _declared_info(self, value: ir.Value) -> ValueInfo:
        dtype = value.type.dtype if isinstance(value.type, ir.TensorType) else None
        shape = value.shape if dtype is not None else None
        return ValueInfo(dtype, None if shape is None else tuple(self.symbols.declared_dim(dim) for dim in shape))

    def lookup_info(self, value: ir.Value) -> ValueInfo:
        """Return what is known of `value`."""
        found = self._infos.get(value)
        if found is None:
            dtype = value.type.dtype if isinstance(value.type, ir.TensorType) else None
            found = self._infos[value] = ValueInfo(dtype)
        return found

    def _fold_graph(self, scope: Scope) -> None:
        for value in scope.graph.initializers.values():
            if value.const_value is None or value.is_graph_input() or value.const_value.dtype == ir.DataType.STRING:
                continue
            self._infos[value] = value_info.constant_info(value.const_value)
            if (
                scope.allows_initializers
                and value.const_value.nbytes <= value_info.SMALL_CONSTANT_BYTES
                and not value.is_graph_output()
            ):
                key = constant_key(value.const_value)
                other = scope.find(key)
                if other is None:
                    scope.expressions[key] = (value,)
                elif value.uses():
                    self._replace_uses(value, other[0])
                    self._stats.duplicates += 1
        for node in list(scope.graph):
            self._fold_node(node, scope)

    def _fold_node(self, node: ir.Node, scope: Scope) -> None:
        if node.op_type == "Constant" and not node.domain:
            self._fold_constant_node(node, scope)
            return
        if graphs := subgraphs(node):
            if not self._inline_constant_if(node, scope):
                for graph in graphs:
                    self._fold_graph(Scope(graph, scope.opset, self._allows_initializers, scope))
            return
        if node.domain or node.op_identifier() in self._functions or not matches_schema(node, scope.opset):
            return
        key = expression_key(node)
        if key is not None:
            if (values := scope.find(key)) is not None:
                current = [self._replacements.get(value, value) for value in values]
                replaced = [self._replace_output(old, new, node) for old, new in zip(node.outputs, current, strict=True)]
                self._stats.expressions += any(replaced)
                return
            scope.expressions[key] = tuple(node.outputs)
        self._fold_standard_op(node, scope)

    def _fold_standard_op(self, node: ir.Node, scope: Scope) -> None:
        operands = [None if value is None else self.lookup_info(value) for value in node.inputs]
        outputs = infer(node, operands, self.symbols, scope.opset)
        same = simplify.equivalent_input(node, operands, outputs, self.lookup_info, scope.opset)
        if same is not None:
            if self._replace_output(node.outputs[0], same, node):
                self._stats.identities += 1
            return
        if len(outputs) == 1 and (elements := data_propagation.propagate(node, operands, outputs[0])) is not None:
            outputs[0].elements = elements
        for value, output in zip(node.outputs, outputs, strict=True):
            self._infos[value] = output
        if self._try_evaluate(node, operands, outputs, scope) or self._try_reuse_equal_elements(node, outputs[0], scope):
            return
        self._simplify_shape_ops(node, operands, scope)

    def _fold_constant_node(self, node: ir.Node, scope: Scope) -> None:
        tensor = value_info.constant_node_tensor(node)
        value = node.outputs[0]
        if tensor is None:
            return
        key = constant_key(tensor)
        if not value.is_graph_output() and (scope.allows_initializers or scope.find(key) is not None):
            self._replace_uses(value, self._materialize_constant(tensor, value, scope, key))
            self._stats.constants += 1
        else:
            self._infos[value] = value_info.constant_info(tensor)
            scope.expressions.setdefault(key, (value,))

    def _materialize_constant(
        self, tensor: ir.TensorProtocol, namesake: ir.Value, scope: Scope, key: Hashable = None
    ) -> ir.Value:
        """Return a value that holds `tensor`: one that is at hand, or a new one with the name of `namesake`."""
        key = key or constant_key(tensor)
        if (values := scope.find(key)) is not None:
            return values[0]
        # An output keeps its name for itself.
        name = self._names.allocate(f"{namesake.name}_value") if namesake.is_graph_output() else namesake.name
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor)
        if scope.allows_initializers:
            scope.graph.register_initializer(value)
        else:
            node = ir.node("Constant", [], {"value": tensor}, outputs=[value], name=self._names.allocate(f"{name}/Constant"))
            first = next(iter(scope.graph))
            scope.graph.insert_before(first, node)
            self._stats.record_inserted(node)
        self._infos[value] = value_info.constant_info(tensor)
        scope.expressions[key] = (value,)
        return value

    def _try_evaluate(
        self, node: ir.Node, operands: Sequence[ValueInfo | None], outputs: Sequence[ValueInfo], scope: Scope
    ) -> bool:
        tensors: list[ir.TensorProtocol] | None
        first = outputs[0]
        if len(outputs) == 1 and (elements := first.ints()) is not None and first.dims is not None and first.dtype is not None:
            tensors = [ir.Tensor(np.array(elements, first.dtype.numpy()).reshape(first.dims))]  # type: ignore[arg-type]
        else:
            tensors = evaluate(node, operands, outputs, scope.opset)
        if tensors is None:
            return False
        for value, tensor in zip(node.outputs, tensors, strict=True):
            if value.uses() or value.is_graph_output():
                self._replace_output(value, self._materialize_constant(tensor, value, scope), node)
        self._stats.constants += 1
        return True

    def _try_reuse_equal_elements(self, node: ir.Node, output: ValueInfo, scope: Scope) -> bool:
        """Use a value that already holds the same sizes, in the same type and rank; else offer this one."""
        if output.elements is None or output.dims is None or len(node.outputs) != 1:
            return False
        key = ("holds", output.dtype, output.dims, output.elements)
        if (values := scope.find(key)) is not None:
            self._replace_output(node.outputs[0], values[0], node)
            self._stats.shape_computations += 1
            return True
        scope.expressions[key] = (node.outputs[0],)
        return False

    def _simplify_shape_ops(self, node: ir.Node, operands: Sequence[ValueInfo | None], scope: Scope) -> None:
        if node.op_type in ("Reshape", "Expand") and (shape := simplify.constant_shape_operand(node, operands)) is not None:
            namesake = node.inputs[1]
            if namesake is not None:
                tensor = ir.Tensor(np.array(shape, np.int64))
                fresh = ir.Value(name=self._names.allocate(f"{node.outputs[0].name}_shape"))
                node.replace_input_with(1, self._materialize_constant(tensor, fresh, scope))
                self._stats.record_changed(node)
                self._stats.shape_computations += 1
        if node.op_type == "Reshape" and (source := simplify.merged_view(node, operands)) is not None:
            node.replace_input_with(0, source)
            self._stats.record_changed(node)
            self._stats.merged_views += 1
        dims = operands[0].dims if operands and operands[0] is not None else None
        if (
            node.op_type == "Transpose"
            and dims is not None
            and (merged := simplify.merged_transpose(node, len(dims))) is not None
        ):
            source, perm = merged
            if perm == tuple(range(len(dims))):
                self._replace_output(node.outputs[0], source, node)
            else:
                node.replace_input_with(0, source)
                node.attributes["perm"] = ir.AttrInt64s("perm", perm)
                self._stats.record_changed(node)
            self._stats.merged_views += 1

    def _inline_constant_if(self, node: ir.Node, scope: Scope) -> bool:
        """Put the branch of an If in its place where the condition is known."""
        if node.op_type != "If" or node.domain or node.inputs[0] is None:
            return False
        condition = self.lookup_info(node.inputs[0]).ints()
        if condition is None or len(condition) != 1:
            return False
        branch = node.attributes["then_branch" if condition[0] else "else_branch"].as_graph()
        if (
            any(_is_from_outer_scope(value, branch) for value in branch.outputs)
            or not scope.allows_initializers
            and branch.initializers
        ):
            return False
        results = list(branch.outputs)
        branch.outputs.clear()
        nodes = list(branch)
        branch.remove(nodes)
        for value in list(branch.initializers.values()):
            del branch.initializers[value.name or ""]
            value.name = self._names.allocate(value.name or "")
            scope.graph.register_initializer(value)
            if value.const_value is not None and value.const_value.dtype != ir.DataType.STRING:
                self._infos[value] = value_info.constant_info(value.const_value)
        for inner in nodes:
            inner.name = self._names.allocate(inner.name or inner.op_type)
            for value in inner.outputs:
                if value.name:
                    value.name = self._names.allocate(value.name)
        scope.graph.insert_before(node, nodes)
        for old, new in zip(node.outputs, results, strict=True):
            self._replace_output(old, new, node)
        self._stats.inlined_branches += 1
        for inner in nodes:
            self._stats.record_inserted(inner)
            self._fold_node(inner, scope)
        return True

    def _replace_output(self, old: ir.Value, new: ir.Value, node: ir.Node) -> bool:
        """Let `new` take the place of `old`, an output of `node`; return False where that changes nothing.

        An output of the graph keeps its name: `new` takes it over where it may, else an Identity gives it.
        """
        self._replacements[old] = new
        if not old.is_graph_output():
            self._replace_uses(old, new)
            return True
        graph = node.graph
        assert graph is not None
        ours = new.producer() is not None and new.graph is graph and not new.is_graph_output()
        if not ours and node.op_type == "Identity" and not node.domain:
            return False
        places = [at for at, output in enumerate(graph.outputs) if output is old]
        if ours:
            replacement = new
            new.name, new.type, new.shape = old.name, old.type or new.type, old.shape
        else:
            replacement = ir.Value(name=old.name, type=old.type, shape=old.shape)
            copy = ir.node("Identity", [new], outputs=[replacement], name=self._names.allocate(f"{old.name}/Identity"))
            graph.insert_after(node, copy)
            self._stats.record_inserted(copy)
        for at in places:
            graph.outputs[at] = replacement
        self._replace_uses(old, new)
        return True

    def _replace_uses(self, old: ir.Value, new: ir.Value) -> None:
        for user, index in old.uses():
            user.replace_input_with(index, new)


def _opset(imports: Mapping[str, int]) -> int:
    """Return the version of the standard operators; where none is imported, no standard operator is known."""
    return imports.get("", imports.get("ai.onnx", 0))


def _is_from_outer_scope(value: ir.Value, graph: ir.Graph) -> bool:
    """Tell whether an output of `graph` is neither computed nor held in it."""
    producer = value.producer()
    return not value.is_initializer() and (producer is None or producer.graph is not graph)
