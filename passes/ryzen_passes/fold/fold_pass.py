"""The walk: every node once, in order, each with what is known of its operands by then."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from ryzen_compile.ir.edit.insertion import Names
from ryzen_passes.fold import integer_contents, simplify, value_info
from ryzen_passes.fold.constant_evaluation import compute
from ryzen_passes.fold.cse_keys import constant_key, expression_key
from ryzen_passes.fold.duplicate_weights import duplicates
from ryzen_passes.fold.inference import infer
from ryzen_passes.fold.node_reading import nested
from ryzen_passes.fold.schema import conforms
from ryzen_passes.fold.stats import Tally
from ryzen_passes.fold.symbols import Sizes
from ryzen_passes.fold.value_info import Known


@dataclass
class Scope:
    """The graph that is walked, and what is at hand in it and in those around it."""

    graph: ir.Graph
    opset: int
    holds_initializers: bool
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


class Walk:
    """One walk over the graphs of a model, which rewrites them on its way."""

    def __init__(self, model: ir.Model, tally: Tally) -> None:
        self._functions = model.functions
        self._initializers = model.ir_version >= 4
        self.sizes = Sizes()
        self._known: dict[ir.Value, Known] = {}
        self._tally = tally
        self._superseded: dict[ir.Value, ir.Value] = {}
        """What took the place of a value that was met before."""
        self._model = model

    @functools.cached_property
    def _names(self) -> Names:
        return Names(self._model)

    def run(self) -> bool:
        """Walk the main graph with all that is nested in it, then each function; tell whether that changed anything."""
        before = self._tally.rewrites()
        graph = self._model.graph
        for value in graph.inputs:
            self._known[value] = self._declared(value)
        for old, new in duplicates(graph):
            if old.uses():
                self._replace(old, new)
                self._tally.duplicates += 1
        self._graph(Scope(graph, _opset(graph.opset_imports), self._initializers))
        for function in self._functions.values():
            self._graph(Scope(function.graph, _opset(function.opset_imports), holds_initializers=False))
        return self._tally.rewrites() > before

    def _declared(self, value: ir.Value) -> Known:
        dtype = value.type.dtype if isinstance(value.type, ir.TensorType) else None
        shape = value.shape if dtype is not None else None
        return Known(dtype, None if shape is None else tuple(self.sizes.named(dim) for dim in shape))

    def look(self, value: ir.Value) -> Known:
        """Return what is known of `value`."""
        found = self._known.get(value)
        if found is None:
            dtype = value.type.dtype if isinstance(value.type, ir.TensorType) else None
            found = self._known[value] = Known(dtype)
        return found

    def _graph(self, scope: Scope) -> None:
        for value in scope.graph.initializers.values():
            if value.const_value is None or value.is_graph_input() or value.const_value.dtype == ir.DataType.STRING:
                continue
            self._known[value] = value_info.constant(value.const_value)
            if scope.holds_initializers and value.const_value.nbytes <= value_info.SMALL and not value.is_graph_output():
                key = constant_key(value.const_value)
                other = scope.find(key)
                if other is None:
                    scope.expressions[key] = (value,)
                elif value.uses():
                    self._replace(value, other[0])
                    self._tally.duplicates += 1
        for node in list(scope.graph):
            self._node(node, scope)

    def _node(self, node: ir.Node, scope: Scope) -> None:
        if node.op_type == "Constant" and not node.domain:
            self._constant(node, scope)
            return
        if graphs := nested(node):
            if not self._decided_branch(node, scope):
                for graph in graphs:
                    self._graph(Scope(graph, scope.opset, self._initializers, scope))
            return
        if node.domain or node.op_identifier() in self._functions or not conforms(node, scope.opset):
            return
        key = expression_key(node)
        if key is not None:
            if (values := scope.find(key)) is not None:
                current = [self._superseded.get(value, value) for value in values]
                replaced = [self._supersede(old, new, node) for old, new in zip(node.outputs, current, strict=True)]
                self._tally.expressions += any(replaced)
                return
            scope.expressions[key] = tuple(node.outputs)
        self._standard(node, scope)

    def _standard(self, node: ir.Node, scope: Scope) -> None:
        operands = [None if value is None else self.look(value) for value in node.inputs]
        outputs = infer(node, operands, self.sizes, scope.opset)
        same = simplify.same_as(node, operands, outputs, self.look, scope.opset)
        if same is not None:
            if self._supersede(node.outputs[0], same, node):
                self._tally.identities += 1
            return
        if len(outputs) == 1 and (elements := integer_contents.follow(node, operands, outputs[0])) is not None:
            outputs[0].content = elements
        for value, output in zip(node.outputs, outputs, strict=True):
            self._known[value] = output
        if self._computed(node, operands, outputs, scope) or self._at_hand(node, outputs[0], scope):
            return
        self._shorten(node, operands, scope)

    def _constant(self, node: ir.Node, scope: Scope) -> None:
        tensor = value_info.attribute_tensor(node)
        value = node.outputs[0]
        if tensor is None:
            return
        key = constant_key(tensor)
        if not value.is_graph_output() and (scope.holds_initializers or scope.find(key) is not None):
            self._replace(value, self._hold(tensor, value, scope, key))
            self._tally.constants += 1
        else:
            self._known[value] = value_info.constant(tensor)
            scope.expressions.setdefault(key, (value,))

    def _hold(self, tensor: ir.TensorProtocol, namesake: ir.Value, scope: Scope, key: Hashable = None) -> ir.Value:
        """Return a value that holds `tensor`: one that is at hand, or a new one with the name of `namesake`."""
        key = key or constant_key(tensor)
        if (values := scope.find(key)) is not None:
            return values[0]
        # An output keeps its name for itself.
        name = self._names.new(f"{namesake.name}_value") if namesake.is_graph_output() else namesake.name
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor)
        if scope.holds_initializers:
            scope.graph.register_initializer(value)
        else:
            node = ir.node("Constant", [], {"value": tensor}, outputs=[value], name=self._names.new(f"{name}/Constant"))
            first = next(iter(scope.graph))
            scope.graph.insert_before(first, node)
            self._tally.insert(node)
        self._known[value] = value_info.constant(tensor)
        scope.expressions[key] = (value,)
        return value

    def _computed(self, node: ir.Node, operands: Sequence[Known | None], outputs: Sequence[Known], scope: Scope) -> bool:
        tensors: list[ir.TensorProtocol] | None
        first = outputs[0]
        if len(outputs) == 1 and (elements := first.ints()) is not None and first.dims is not None and first.dtype is not None:
            tensors = [ir.Tensor(np.array(elements, first.dtype.numpy()).reshape(first.dims))]  # type: ignore[arg-type]
        else:
            tensors = compute(node, operands, outputs, scope.opset)
        if tensors is None:
            return False
        for value, tensor in zip(node.outputs, tensors, strict=True):
            if value.uses() or value.is_graph_output():
                self._supersede(value, self._hold(tensor, value, scope), node)
        self._tally.constants += 1
        return True

    def _at_hand(self, node: ir.Node, output: Known, scope: Scope) -> bool:
        """Use a value that already holds the same sizes, in the same type and rank; else offer this one."""
        if output.content is None or output.dims is None or len(node.outputs) != 1:
            return False
        key = ("holds", output.dtype, output.dims, output.content)
        if (values := scope.find(key)) is not None:
            self._supersede(node.outputs[0], values[0], node)
            self._tally.shapes += 1
            return True
        scope.expressions[key] = (node.outputs[0],)
        return False

    def _shorten(self, node: ir.Node, operands: Sequence[Known | None], scope: Scope) -> None:
        if node.op_type in ("Reshape", "Expand") and (shape := simplify.shorter_shape(node, operands)) is not None:
            namesake = node.inputs[1]
            if namesake is not None:
                tensor = ir.Tensor(np.array(shape, np.int64))
                fresh = ir.Value(name=self._names.new(f"{node.outputs[0].name}_shape"))
                node.replace_input_with(1, self._hold(tensor, fresh, scope))
                self._tally.change(node)
                self._tally.shapes += 1
        if node.op_type == "Reshape" and (source := simplify.merged_view(node, operands)) is not None:
            node.replace_input_with(0, source)
            self._tally.change(node)
            self._tally.merged += 1
        dims = operands[0].dims if operands and operands[0] is not None else None
        if node.op_type == "Transpose" and dims is not None and (merged := simplify.merged_perm(node, len(dims))) is not None:
            source, perm = merged
            if perm == tuple(range(len(dims))):
                self._supersede(node.outputs[0], source, node)
            else:
                node.replace_input_with(0, source)
                node.attributes["perm"] = ir.AttrInt64s("perm", perm)
                self._tally.change(node)
            self._tally.merged += 1

    def _decided_branch(self, node: ir.Node, scope: Scope) -> bool:
        """Put the branch of an If in its place where the condition is known."""
        if node.op_type != "If" or node.domain or node.inputs[0] is None:
            return False
        condition = self.look(node.inputs[0]).ints()
        if condition is None or len(condition) != 1:
            return False
        branch = node.attributes["then_branch" if condition[0] else "else_branch"].as_graph()
        if (
            any(_is_elsewhere(value, branch) for value in branch.outputs)
            or not scope.holds_initializers
            and branch.initializers
        ):
            return False
        results = list(branch.outputs)
        branch.outputs.clear()
        nodes = list(branch)
        branch.remove(nodes)
        for value in list(branch.initializers.values()):
            del branch.initializers[value.name or ""]
            value.name = self._names.new(value.name or "")
            scope.graph.register_initializer(value)
            if value.const_value is not None and value.const_value.dtype != ir.DataType.STRING:
                self._known[value] = value_info.constant(value.const_value)
        for inner in nodes:
            inner.name = self._names.new(inner.name or inner.op_type)
            for value in inner.outputs:
                if value.name:
                    value.name = self._names.new(value.name)
        scope.graph.insert_before(node, nodes)
        for old, new in zip(node.outputs, results, strict=True):
            self._supersede(old, new, node)
        self._tally.branches += 1
        for inner in nodes:
            self._tally.insert(inner)
            self._node(inner, scope)
        return True

    def _supersede(self, old: ir.Value, new: ir.Value, node: ir.Node) -> bool:
        """Let `new` take the place of `old`, an output of `node`; return False where that changes nothing.

        An output of the graph keeps its name: `new` takes it over where it may, else an Identity gives it.
        """
        self._superseded[old] = new
        if not old.is_graph_output():
            self._replace(old, new)
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
            copy = ir.node("Identity", [new], outputs=[replacement], name=self._names.new(f"{old.name}/Identity"))
            graph.insert_after(node, copy)
            self._tally.insert(copy)
        for at in places:
            graph.outputs[at] = replacement
        self._replace(old, new)
        return True

    def _replace(self, old: ir.Value, new: ir.Value) -> None:
        for user, index in old.uses():
            user.replace_input_with(index, new)


def _opset(imports: Mapping[str, int]) -> int:
    """Return the version of the standard operators; where none is imported, no standard operator is known."""
    return imports.get("", imports.get("ai.onnx", 0))


def _is_elsewhere(value: ir.Value, graph: ir.Graph) -> bool:
    """Tell whether an output of `graph` is neither computed nor held in it."""
    producer = value.producer()
    return not value.is_initializer() and (producer is None or producer.graph is not graph)
