"""`FoldIteration`: one traversal of a model by the pass `fold`, which visits every node once in graph order."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.analysis import data_propagation, value_info
from ryzen_compile.ir.analysis.constants import constant_node_tensor
from ryzen_compile.ir.analysis.op_schemas import find_violation, op_schema
from ryzen_compile.ir.analysis.op_traits import NONDETERMINISTIC_OPS
from ryzen_compile.ir.analysis.symbols import SymbolTable
from ryzen_compile.ir.analysis.value_info import ValueInfo
from ryzen_compile.ir.edit.insertion import NameAllocator
from ryzen_compile.ir.traversal import node_subgraphs
from ryzen_passes.fold import simplify
from ryzen_passes.fold.constant_evaluation import LimitExceeded, evaluate
from ryzen_passes.fold.cse_keys import constant_key, expression_key
from ryzen_passes.fold.duplicate_weights import find_duplicates
from ryzen_passes.fold.shape_inference import infer
from ryzen_passes.fold.stats import FoldStats, node_label


@dataclass
class Scope:
    """A graph that is folded, and the expressions and constants that are available in it and in its outer graphs."""

    graph: ir.Graph
    opset: int
    allows_initializers: bool
    """False in a function body, and for IR versions below 4, in which every initializer must be a graph input."""
    outer: Scope | None = None
    expressions: dict[Hashable, tuple[ir.Value, ...]] = field(default_factory=dict)
    """Key to available values: node outputs by op, operands and attributes; constants by contents."""

    def find(self, key: Hashable) -> tuple[ir.Value, ...] | None:
        """Return the values for `key` that are available in this scope or an outer one, else None."""
        scope: Scope | None = self
        while scope is not None:
            if (values := scope.expressions.get(key)) is not None:
                return values
            scope = scope.outer
        return None


class FoldIteration:
    """One folding iteration: traverses all graphs of a model once and rewrites them."""

    def __init__(self, model: ir.Model, stats: FoldStats) -> None:
        self._functions = model.functions
        self._allows_initializers = model.ir_version >= 4
        self.symbols = SymbolTable()
        self._infos: dict[ir.Value, ValueInfo] = {}
        self._stats = stats
        self._replacements: dict[ir.Value, ir.Value] = {}
        """Replaced value to its replacement."""
        self._model = model

    @functools.cached_property
    def _names(self) -> NameAllocator:
        return NameAllocator(self._model)

    @property
    def replacements(self) -> Mapping[ir.Value, ir.Value]:
        """The values that this iteration replaced, with their replacements, which may have been replaced themselves."""
        return self._replacements

    def run(self) -> bool:
        """Fold the main graph with its subgraphs, then each function; return whether anything changed."""
        before = self._stats.rewrite_count()
        self._stats.not_evaluated.clear()
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
        """Return the info of `value`; its type only if nothing else was inferred."""
        info = self._infos.get(value)
        if info is None:
            dtype = value.type.dtype if isinstance(value.type, ir.TensorType) else None
            info = self._infos[value] = ValueInfo(dtype)
        return info

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
                available = scope.find(key)
                if available is None:
                    scope.expressions[key] = (value,)
                elif value.uses():
                    self._replace_uses(value, available[0])
                    self._stats.duplicates += 1
        for node in list(scope.graph):
            self._fold_node(node, scope)

    def _fold_node(self, node: ir.Node, scope: Scope) -> None:
        if node.op_type == "Constant" and not node.domain:
            self._fold_constant_node(node, scope)
            return
        if graphs := node_subgraphs(node):
            if not self._inline_constant_if(node, scope):
                if self._is_constant(node):
                    self._stats.not_evaluated[node_label(node)] = "nodes with subgraphs are never evaluated"
                for graph in graphs:
                    self._fold_graph(Scope(graph, scope.opset, self._allows_initializers, scope))
            return
        if node.op_identifier() in self._functions:
            if self._is_constant(node):
                self._stats.not_evaluated[node_label(node)] = "local functions are never evaluated"
            return
        schema = op_schema("", node.op_type, scope.opset)
        if node.domain or schema is None or find_violation(node, schema) is not None:
            return
        key = expression_key(node)
        if key is not None:
            if (values := scope.find(key)) is not None:
                current = [self._replacements.get(value, value) for value in values]
                was_replaced = [self._replace_output(old, new, node) for old, new in zip(node.outputs, current, strict=True)]
                self._stats.expressions += any(was_replaced)
                return
            scope.expressions[key] = tuple(node.outputs)
        self._fold_standard_op(node, scope)

    def _is_constant(self, node: ir.Node) -> bool:
        """Return whether all inputs of `node`, and all values that its subgraphs read from outer graphs, are constant."""
        nodes = [node, *(inner_node for graph in node_subgraphs(node) for inner_node in graph.all_nodes())]
        graphs = [graph for inner_node in nodes for graph in node_subgraphs(inner_node)]
        local = {value for graph in graphs for value in (*graph.inputs, *graph.initializers.values())}
        local |= {value for inner_node in nodes[1:] for value in inner_node.outputs}
        read = {value for inner_node in nodes for value in inner_node.inputs if value is not None}
        read |= {value for graph in graphs for value in graph.outputs}
        is_random = any(inner_node.op_type in NONDETERMINISTIC_OPS for inner_node in nodes)
        return bool(read) and not is_random and all(self.lookup_info(value).tensor is not None for value in read - local)

    def _fold_standard_op(self, node: ir.Node, scope: Scope) -> None:
        operands = [None if value is None else self.lookup_info(value) for value in node.inputs]
        outputs = infer(node, operands, self.symbols, scope.opset)
        context = simplify.NodeContext(operands, outputs, scope.opset, self.lookup_info)
        equivalent = simplify.equivalent_input(node, context)
        if equivalent is not None:
            if self._replace_output(node.outputs[0], equivalent, node):
                self._stats.identities += 1
            return
        if len(outputs) == 1 and (elements := data_propagation.propagate(node, operands, outputs[0], self.symbols)) is not None:
            outputs[0].elements = elements
        for value, output in zip(node.outputs, outputs, strict=True):
            self._infos[value] = output
        if self._try_evaluate(node, operands, outputs, scope) or self._try_reuse_equal_elements(node, outputs[0], scope):
            return
        self._simplify_shape_ops(node, context, scope)

    def _fold_constant_node(self, node: ir.Node, scope: Scope) -> None:
        tensor = constant_node_tensor(node)
        value = node.outputs[0]
        if tensor is None or tensor.dtype == ir.DataType.STRING:
            return
        key = constant_key(tensor)
        if not value.is_graph_output() and (scope.allows_initializers or scope.find(key) is not None):
            self._replace_uses(value, self._materialize_constant(tensor, value, scope, key))
            self._stats.constants += 1
        else:
            self._infos[value] = value_info.constant_info(tensor)
            scope.expressions.setdefault(key, (value,))

    def _materialize_constant(
        self, tensor: ir.TensorProtocol, name_source: ir.Value, scope: Scope, key: Hashable = None
    ) -> ir.Value:
        """Return a value with the contents of `tensor`: an available one, or a new one with the name of `name_source`."""
        key = key or constant_key(tensor)
        if (values := scope.find(key)) is not None:
            return values[0]
        # The name of a graph output must stay with the output.
        name = self._names.allocate(f"{name_source.name}_value") if name_source.is_graph_output() else name_source.name
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
        tensors: list[ir.TensorProtocol] | LimitExceeded | None
        first = outputs[0]
        if len(outputs) == 1 and (elements := first.ints()) is not None and first.dims is not None and first.dtype is not None:
            tensors = [ir.Tensor(np.array(elements, first.dtype.numpy()).reshape(first.dims))]  # type: ignore[arg-type]
        else:
            tensors = evaluate(node, operands, outputs, scope.opset, self._stats.budget)
        if isinstance(tensors, LimitExceeded):
            self._stats.not_evaluated[node_label(node)] = tensors.reason
            return False
        if tensors is None:
            return False
        for value, tensor in zip(node.outputs, tensors, strict=True):
            if value.uses() or value.is_graph_output():
                self._replace_output(value, self._materialize_constant(tensor, value, scope), node)
        self._stats.constants += 1
        return True

    def _try_reuse_equal_elements(self, node: ir.Node, output: ValueInfo, scope: Scope) -> bool:
        """Replace an output by an available value with equal type, dims and elements; if there is none, register the output."""
        if output.elements is None or output.dims is None or len(node.outputs) != 1:
            return False
        key = ("elements", output.dtype, output.dims, output.elements)
        if (values := scope.find(key)) is not None:
            self._replace_output(node.outputs[0], values[0], node)
            self._stats.shape_computations += 1
            return True
        scope.expressions[key] = (node.outputs[0],)
        return False

    def _simplify_shape_ops(self, node: ir.Node, context: simplify.NodeContext, scope: Scope) -> None:
        if node.op_type not in simplify.SHAPE_OPS:
            return
        shape = simplify.SHAPE_OPERAND_RULES.apply(node, context).result
        if shape is not None:
            tensor = ir.Tensor(np.array(shape, np.int64))
            name_source = ir.Value(name=self._names.allocate(f"{node.outputs[0].name}_shape"))
            node.replace_input_with(1, self._materialize_constant(tensor, name_source, scope))
            self._stats.record_changed(node)
            self._stats.shape_computations += 1
        merged = simplify.MERGE_RULES.apply(node, context).result
        if merged is None:
            return
        self._stats.merged_views += 1
        if merged.perm is not None and merged.perm == tuple(range(len(merged.perm))):
            self._replace_output(node.outputs[0], merged.source, node)
            return
        node.replace_input_with(0, merged.source)
        if merged.perm is not None:
            node.attributes["perm"] = ir.AttrInt64s("perm", merged.perm)
        self._stats.record_changed(node)

    def _inline_constant_if(self, node: ir.Node, scope: Scope) -> bool:
        """Replace an If with a constant condition by its branch; return whether that was done."""
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
        for inner_node in nodes:
            inner_node.name = self._names.allocate(inner_node.name or inner_node.op_type)
            for value in inner_node.outputs:
                if value.name:
                    value.name = self._names.allocate(value.name)
        scope.graph.insert_before(node, nodes)
        for old, new in zip(node.outputs, results, strict=True):
            self._replace_output(old, new, node)
        self._stats.inlined_branches += 1
        for inner_node in nodes:
            self._stats.record_inserted(inner_node)
            self._fold_node(inner_node, scope)
        return True

    def _replace_output(self, old: ir.Value, new: ir.Value, node: ir.Node) -> bool:
        """Replace `old`, an output of `node`, by `new`; return False if nothing changes.

        A graph output keeps its name: `new` is renamed if possible, else an Identity with that name is inserted.
        """
        self._replacements[old] = new
        if not old.is_graph_output():
            self._replace_uses(old, new)
            return True
        graph = node.graph
        assert graph is not None
        can_rename = new.producer() is not None and new.graph is graph and not new.is_graph_output()
        if not can_rename and node.op_type == "Identity" and not node.domain:
            return False
        output_indices = [index for index, output in enumerate(graph.outputs) if output is old]
        if can_rename:
            replacement = new
            new.name, new.type, new.shape = old.name, old.type or new.type, old.shape
        else:
            replacement = ir.Value(name=old.name, type=old.type, shape=old.shape)
            identity = ir.node("Identity", [new], outputs=[replacement], name=self._names.allocate(f"{old.name}/Identity"))
            graph.insert_after(node, identity)
            self._stats.record_inserted(identity)
        for index in output_indices:
            graph.outputs[index] = replacement
        self._replace_uses(old, new)
        return True

    def _replace_uses(self, old: ir.Value, new: ir.Value) -> None:
        for user, index in old.uses():
            user.replace_input_with(index, new)


def _opset(imports: Mapping[str, int]) -> int:
    """Return the imported version of the standard domain; 0, which has no ops, if it is not imported."""
    return imports.get("", imports.get("ai.onnx", 0))


def _is_from_outer_scope(value: ir.Value, graph: ir.Graph) -> bool:
    """Return whether `value`, an output of `graph`, is neither a node output nor an initializer of `graph`."""
    producer = value.producer()
    return not value.is_initializer() and (producer is None or producer.graph is not graph)
