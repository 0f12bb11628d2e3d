"""Fingerprints: what a model means, and what a file holds, as one number each."""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from ryzen_compile.errors import ModelError, printable
from ryzen_compile.ir import protobuf_scan
from ryzen_compile.ir.gc_pause import gc_paused
from ryzen_compile.ir.weight_files import WeightFile, resolve_external_data_file, resolve_model_file

if TYPE_CHECKING:
    import onnx_ir as ir

_STANDARD_DOMAINS = frozenset({"", "ai.onnx.ml"})
_RANDOM_OPS = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout"}
)
_MULTITHREAD_MIN_BYTES = 1 << 24
_EXPORT_AGAIN_HINT = "export the model again"


@dataclass(frozen=True)
class FileDigest:
    """What a model's files held when they were read."""

    digest: str
    files: tuple[WeightFile, ...]

    def check_unchanged(self) -> None:
        """Raise ModelError where one of the files was written since."""
        for file in self.files:
            file.check_unchanged()


def file_digest_hex(path: str | os.PathLike[str]) -> str:
    """Return the digest of what `content_of` reads."""
    return compute_file_digest(path).digest


def compute_file_digest(path: str | os.PathLike[str]) -> FileDigest:
    """Read an ONNX file and all data in other files that it refers to, and return the BLAKE3 digest, in hex.

    Models with equal digests are equal: who knows the fingerprint of one need not load the other. Imports no ONNX library.
    Raises ModelError, as `load` does, for what is no ONNX file or refers to data outside of its folder.
    """
    source = resolve_model_file(path)
    ranges: set[tuple[str, int, int]] = set()
    files: dict[str, WeightFile] = {}
    for place in protobuf_scan.read_skeleton(source).tensor_locations:
        if place.location is None:
            continue
        if place.location not in files:
            files[place.location] = resolve_external_data_file(source, place.tensor_name, place.location)
        size = files[place.location].size
        length = size - place.offset if place.length is None else place.length
        if length < 0 or place.offset + length > size:
            raise ModelError(
                f"tensor `{printable(place.tensor_name)}` lies beyond the end of `{printable(files[place.location].path)}`",
                hint="copy the whole file again",
            )
        ranges.add((place.location, place.offset, length))
    digest = _new_hasher(source.size + sum(length for _, _, length in ranges))
    for chunk in source.chunks(0, source.size):
        digest.update(chunk)
    for location, offset, length in sorted(ranges):
        digest.update(_encode(location, offset, length))
        for chunk in files[location].chunks(offset, length):
            digest.update(chunk)
    return FileDigest(digest.hexdigest(), (source, *files.values()))


def _new_hasher(size: int) -> blake3:
    """Return an empty digest that suits `size` bytes: starting threads costs more than hashing what is small."""
    return blake3(max_threads=2 if size >= _MULTITHREAD_MIN_BYTES else 1)


def fingerprint(model: ir.Model) -> str:
    """Return the BLAKE3 digest, in hex, of what `model` means: its structure and every byte of the weights that it uses.

    It tells apart ops, their versions and attributes, the wiring, the values of weights, and the names, types and shapes of
    inputs and outputs. It is the same wherever the weights lie, whatever inner values and nodes are called, in whichever order
    nodes stand, and whatever else the model carries: documentation, metadata, nodes that no output needs.

    Raises:
        ModelError: A value comes from nowhere or from itself.
    """
    with gc_paused():
        return _fingerprint(model)


def _fingerprint(model: ir.Model) -> str:
    calls = {
        identifier: {node.op_identifier() for node in function.all_nodes()} & model.functions.keys()
        for identifier, function in model.functions.items()
    }
    functions: dict[ir.OperatorIdentifier, bytes] = {}
    contents: dict[Any, bytes] = {}
    try:
        for identifier in TopologicalSorter(calls).static_order():
            function = model.functions[identifier]
            body = _GraphHasher(functions, function.opset_imports, contents)
            parameters = [(name, body.encode_attribute(function.attributes[name], 0)) for name in sorted(function.attributes)]
            functions[identifier] = _digest(_encode(parameters), body.hash_graph(function.graph, 0))
    except CycleError:
        raise ModelError("the model's functions call each other in a circle", hint=_EXPORT_AGAIN_HINT) from None
    outside = [(value.name, f"{value.type} {value.shape}") for value in (*_graph_inputs(model.graph), *model.graph.outputs)]
    return _digest(_encode(outside), _GraphHasher(functions, model.opset_imports, contents).hash_graph(model.graph, 0)).hex()


def _encode(*parts: Any) -> bytes:
    """Return bytes that no other parts have."""
    return repr(parts).encode("utf-8", "backslashreplace")


def _digest(*parts: bytes) -> bytes:
    digest: bytes = blake3(b"".join([len(part).to_bytes(8, "little") + part for part in parts])).digest()
    return digest


def _graph_inputs(graph: ir.Graph) -> list[ir.Value]:
    """Return the inputs that a caller gives: before IR version 4 initialisers had to be listed among them too."""
    return [value for value in graph.inputs if not value.is_initializer()]


def _node_subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    import onnx_ir as ir

    for attr in node.attributes.values():
        if attr.type == ir.AttributeType.GRAPH and not attr.is_ref():
            yield attr.value
        elif attr.type == ir.AttributeType.GRAPHS and not attr.is_ref():
            yield from attr.value


class _GraphHasher:
    """The digests of the values of a graph or a function: of what computes each of them, down to inputs and weights."""

    def __init__(
        self,
        function_digests: Mapping[ir.OperatorIdentifier, bytes],
        opsets: Mapping[str, int],
        tensor_digests: dict[Any, bytes],
    ) -> None:
        self.function_digests = function_digests
        self.opsets = opsets
        self.tensor_digests = tensor_digests
        """Digests of the bytes of tensors, by where these lie."""
        self.value_digests: dict[ir.Value, bytes] = {}
        self.captured_values: dict[ir.Graph, list[ir.Value]] = {}
        """The outer values that the outputs of a graph depend on."""
        self.unique_ids = itertools.count()

    def hash_graph(self, graph: ir.Graph, depth: int) -> bytes:
        """Return the digest of a graph that lies in `depth` others, and whose outer values are known."""
        inputs = _graph_inputs(graph)
        for index, value in enumerate(inputs):
            self.value_digests[value] = _digest(b"input", _encode(depth, index))
        self._hash_values(graph.outputs, depth)
        return _digest(b"graph", _encode(len(inputs)), *(self.value_digests[value] for value in graph.outputs))

    def _hash_values(self, outputs: Sequence[ir.Value], depth: int) -> None:
        values = self.value_digests
        begun: set[ir.Node] = set()
        stack = list(reversed(outputs))
        while stack:
            value = stack[-1]
            if value in values:
                stack.pop()
                continue
            node = value.producer()
            if node is None:
                if value.const_value is None:
                    raise ModelError(f"nothing produces `{printable(value.name)}`", hint=_EXPORT_AGAIN_HINT)
                values[value] = self.hash_tensor(value.const_value)
                continue
            missing = [needed for needed in self._dependencies(node) if needed not in values]
            if not missing:
                self._hash_node(node, depth)
            elif node in begun:
                raise ModelError(f"node `{printable(node.name)}` waits for its own output", hint=_EXPORT_AGAIN_HINT)
            else:
                begun.add(node)
                stack.extend(reversed(missing))

    def _dependencies(self, node: ir.Node) -> list[ir.Value]:
        """Return what `node` reads, also from within its graphs."""
        found = [value for value in node.inputs if value is not None]
        for graph in _node_subgraphs(node):
            if graph not in self.captured_values:
                self.captured_values[graph] = self._find_captured_values(graph)
            found.extend(self.captured_values[graph])
        return found

    def _find_captured_values(self, graph: ir.Graph) -> list[ir.Value]:
        """Find the outer values that the outputs of `graph` depend on, in the order that its wiring gives."""
        found: dict[ir.Value, None] = {}
        seen: set[ir.Node] = set()
        stack = list(reversed(graph.outputs))
        while stack:
            value = stack.pop()
            node = value.producer()
            if value.graph is not graph:
                found[value] = None
            elif node is not None and node not in seen:
                seen.add(node)
                stack.extend(reversed(self._dependencies(node)))
        return list(found)

    def _hash_node(self, node: ir.Node, depth: int) -> None:
        values, attributes = self.value_digests, node.attributes
        domain, op_type, _ = identifier = node.op_identifier()
        constant = attributes.get("value") if op_type == "Constant" and not domain else None
        if constant is not None and constant.type.name == "TENSOR" and not constant.is_ref():
            values[node.outputs[0]] = self.hash_tensor(constant.value)
            return
        function = self.function_digests.get(identifier, b"")
        # Two draws differ though all about them is the same, and so may two calls of what is not known here.
        known = domain in _STANDARD_DOMAINS and op_type not in _RANDOM_OPS and not function
        digest = _digest(
            _encode(
                identifier,
                self.opsets.get(domain),
                [(name, self.encode_attribute(attributes[name], depth)) for name in sorted(attributes)],
                [value is not None for value in node.inputs],
                [bool(value.name) for value in node.outputs],
                None if known else next(self.unique_ids),
            ),
            function,
            *[values[value] for value in node.inputs if value is not None],
        )
        for index, value in enumerate(node.outputs):
            values[value] = digest + index.to_bytes(4, "little")

    def encode_attribute(self, attr: ir.Attr, depth: int) -> tuple[Any, ...]:
        """Return what `attr` holds as plain data."""
        import onnx_ir as ir

        kind, value = attr.type, attr.value
        if attr.is_ref():
            return kind.name, "ref", attr.ref_attr_name
        if kind == ir.AttributeType.FLOAT:
            value = ctypes.c_float(value).value
        elif kind == ir.AttributeType.FLOATS:
            value = [ctypes.c_float(item).value for item in value]
        elif kind == ir.AttributeType.TENSOR:
            value = self.hash_tensor(value)
        elif kind == ir.AttributeType.TENSORS:
            value = [self.hash_tensor(item) for item in value]
        elif kind == ir.AttributeType.GRAPH:
            value = self.hash_graph(value, depth + 1)
        elif kind == ir.AttributeType.GRAPHS:
            value = [self.hash_graph(item, depth + 1) for item in value]
        elif kind == ir.AttributeType.TYPE_PROTO:
            value = f"{value.type} {value.shape}"
        elif kind == ir.AttributeType.TYPE_PROTOS:
            value = [f"{item.type} {item.shape}" for item in value]
        return kind.name, value

    def hash_tensor(self, tensor: ir.TensorProtocol) -> bytes:
        """Return the digest of a tensor: of its type, its shape and its bytes."""
        import onnx_ir as ir

        from ryzen_compile.ir.weights import FileTensor

        # By far most tensors are small constants in the structure: they are spelt without the way over onnx_ir's objects.
        if isinstance(tensor, ir.TensorProtoTensor):
            kind, dims = tensor.raw.data_type, tuple(tensor.raw.dims)
        else:
            kind, dims = tensor.dtype.value, tuple(tensor.shape.numpy())
        where = (tensor.source, tensor.offset, tensor.nbytes) if isinstance(tensor, FileTensor) else id(tensor)
        if where not in self.tensor_digests:
            self.tensor_digests[where] = _tensor_data_digest(tensor)
        return _digest(b"tensor", _encode(kind, dims), self.tensor_digests[where])


def _tensor_data_digest(tensor: ir.TensorProtocol) -> bytes:
    import onnx_ir as ir

    from ryzen_compile.ir.weights import FileTensor, chunks

    content: bytes
    if isinstance(tensor, ir.TensorProtoTensor):
        content = blake3(tensor.tobytes()).digest()
        return content
    if tensor.dtype == ir.DataType.STRING:
        return _digest(*(bytes(text) for text in tensor.numpy().reshape(-1)))
    if isinstance(tensor, FileTensor) and "blake3" in tensor.digests:
        return bytes.fromhex(tensor.digests["blake3"])
    digest = _new_hasher(tensor.nbytes)
    for chunk in chunks(tensor):
        digest.update(chunk)
    if isinstance(tensor, FileTensor):
        tensor.digests["blake3"] = digest.hexdigest()
    content = digest.digest()
    return content
