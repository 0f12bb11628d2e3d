"""BLAKE3 digests: a fingerprint of a model's semantics, and a digest of a model's files."""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from ryzen_compile.errors import ModelError, printable
from ryzen_compile.ir import protobuf_scan
from ryzen_compile.ir.analysis.op_traits import NONDETERMINISTIC_OPS
from ryzen_compile.ir.gc_pause import gc_paused
from ryzen_compile.ir.weight_files import WeightFile, resolve_external_data_file, resolve_model_file

if TYPE_CHECKING:
    import onnx_ir as ir

_STANDARD_DOMAINS = frozenset({"", "ai.onnx.ml"})
_MULTITHREAD_MIN_BYTES = 1 << 24
_EXPORT_AGAIN_HINT = "export the model again"


@dataclass(frozen=True)
class FileDigest:
    """The digest of a model's files, and the files as they were when they were read."""

    digest: str
    """BLAKE3, 64 hex digits."""
    files: tuple[WeightFile, ...]
    """The ONNX file, then the external data files."""

    def check_unchanged(self) -> None:
        """Raise ModelError if one of the files changed since it was read."""
        for file in self.files:
            file.check_unchanged()


def file_digest_hex(path: str | os.PathLike[str]) -> str:
    """Return the hex digest of `compute_file_digest`."""
    return compute_file_digest(path).digest


def compute_file_digest(path: str | os.PathLike[str]) -> FileDigest:
    """Compute the BLAKE3 digest of an ONNX file and of all external data that it refers to.

    Equal digests imply equal models, so a fingerprint that is cached under this digest makes loading unnecessary. Imports no
    ONNX library.

    Raises:
        ModelError: The file is not an ONNX file, or refers to data outside the model's folder or beyond the end of a file.
    """
    source = resolve_model_file(path)
    ranges: set[tuple[str, int, int]] = set()
    files: dict[str, WeightFile] = {}
    for tensor_location in protobuf_scan.read_skeleton(source).tensor_locations:
        if tensor_location.location is None:
            continue
        if tensor_location.location not in files:
            files[tensor_location.location] = resolve_external_data_file(
                source, tensor_location.tensor_name, tensor_location.location
            )
        size = files[tensor_location.location].size
        length = size - tensor_location.offset if tensor_location.length is None else tensor_location.length
        if length < 0 or tensor_location.offset + length > size:
            raise ModelError(
                f"the data of tensor `{printable(tensor_location.tensor_name)}` lies beyond the end of "
                f"`{printable(files[tensor_location.location].path)}`",
                hint="copy the whole file again",
            )
        ranges.add((tensor_location.location, tensor_location.offset, length))
    digest = _new_hasher(source.size + sum(length for _, _, length in ranges))
    for chunk in source.chunks(0, source.size):
        digest.update(chunk)
    for location, offset, length in sorted(ranges):
        digest.update(_encode(location, offset, length))
        for chunk in files[location].chunks(offset, length):
            digest.update(chunk)
    return FileDigest(digest.hexdigest(), (source, *files.values()))


def _new_hasher(size: int) -> blake3:
    """Return a hasher for `size` bytes: two threads from 16 MiB on, because starting them costs more than a small hash."""
    return blake3(max_threads=2 if size >= _MULTITHREAD_MIN_BYTES else 1)


def fingerprint(model: ir.Model) -> str:
    """Return the BLAKE3 digest, in hex, of the semantics of `model`: its structure and every byte of the weights that it uses.

    The fingerprint depends on ops, op versions, attributes, data flow, weight values, and the names, types and shapes of
    inputs and outputs. It does not depend on the storage location of weights, the names of inner values and nodes, the order
    of nodes, documentation, metadata, or nodes that no output depends on.

    Raises:
        ModelError: A value has no producer or depends on itself, or model functions call each other in a cycle.
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
        raise ModelError("the model's functions call each other in a cycle", hint=_EXPORT_AGAIN_HINT) from None
    boundary = [(value.name, f"{value.type} {value.shape}") for value in (*_graph_inputs(model.graph), *model.graph.outputs)]
    return _digest(_encode(boundary), _GraphHasher(functions, model.opset_imports, contents).hash_graph(model.graph, 0)).hex()


def _encode(*parts: Any) -> bytes:
    """Return an injective encoding of `parts` as bytes."""
    return repr(parts).encode("utf-8", "backslashreplace")


def _digest(*parts: bytes) -> bytes:
    digest: bytes = blake3(b"".join([len(part).to_bytes(8, "little") + part for part in parts])).digest()
    return digest


def _graph_inputs(graph: ir.Graph) -> list[ir.Value]:
    """Return the inputs that a caller provides: before IR version 4, initializers had to be listed among the inputs too."""
    return [value for value in graph.inputs if not value.is_initializer()]


class _GraphHasher:
    """Computes the digest of each value of a graph or function from its producer, down to inputs and weights."""

    def __init__(
        self,
        function_digests: Mapping[ir.OperatorIdentifier, bytes],
        opsets: Mapping[str, int],
        tensor_digests: dict[Any, bytes],
    ) -> None:
        self.function_digests = function_digests
        self.opsets = opsets
        self.tensor_digests = tensor_digests
        """Digests of tensor bytes, by storage location."""
        self.value_digests: dict[ir.Value, bytes] = {}
        self.captured_values: dict[ir.Graph, list[ir.Value]] = {}
        """The outer values that the outputs of a graph depend on."""
        self.unique_ids = itertools.count()

    def hash_graph(self, graph: ir.Graph, depth: int) -> bytes:
        """Return the digest of a graph at nesting `depth`; the digests of its captured outer values must exist already."""
        inputs = _graph_inputs(graph)
        for index, value in enumerate(inputs):
            self.value_digests[value] = _digest(b"input", _encode(depth, index))
        self._hash_values(graph.outputs, depth)
        return _digest(b"graph", _encode(len(inputs)), *(self.value_digests[value] for value in graph.outputs))

    def _hash_values(self, outputs: Sequence[ir.Value], depth: int) -> None:
        values = self.value_digests
        started: set[ir.Node] = set()
        stack = list(reversed(outputs))
        while stack:
            value = stack[-1]
            if value in values:
                stack.pop()
                continue
            node = value.producer()
            if node is None:
                if value.const_value is None:
                    raise ModelError(f"value `{printable(value.name)}` has no producer", hint=_EXPORT_AGAIN_HINT)
                values[value] = self.hash_tensor(value.const_value)
                continue
            missing = [dependency for dependency in self._dependencies(node) if dependency not in values]
            if not missing:
                self._hash_node(node, depth)
            elif node in started:
                raise ModelError(f"node `{printable(node.name)}` depends on its own output", hint=_EXPORT_AGAIN_HINT)
            else:
                started.add(node)
                stack.extend(reversed(missing))

    def _dependencies(self, node: ir.Node) -> list[ir.Value]:
        """Return the values that `node` reads, including those that its subgraphs capture."""
        from ryzen_compile.ir.traversal import node_subgraphs

        dependencies = [value for value in node.inputs if value is not None]
        for graph in node_subgraphs(node):
            if graph not in self.captured_values:
                self.captured_values[graph] = self._find_captured_values(graph)
            dependencies.extend(self.captured_values[graph])
        return dependencies

    def _find_captured_values(self, graph: ir.Graph) -> list[ir.Value]:
        """Return the outer values that the outputs of `graph` depend on, in the order of a depth-first traversal."""
        captured: dict[ir.Value, None] = {}
        seen: set[ir.Node] = set()
        stack = list(reversed(graph.outputs))
        while stack:
            value = stack.pop()
            node = value.producer()
            if value.graph is not graph:
                captured[value] = None
            elif node is not None and node not in seen:
                seen.add(node)
                stack.extend(reversed(self._dependencies(node)))
        return list(captured)

    def _hash_node(self, node: ir.Node, depth: int) -> None:
        values, attributes = self.value_digests, node.attributes
        domain, op_type, _ = identifier = node.op_identifier()
        constant = attributes.get("value") if op_type == "Constant" and not domain else None
        if constant is not None and constant.type.name == "TENSOR" and not constant.is_ref():
            values[node.outputs[0]] = self.hash_tensor(constant.value)
            return
        function = self.function_digests.get(identifier, b"")
        # Two random draws with equal inputs and attributes differ, and so may two calls of an unknown op.
        deterministic = domain in _STANDARD_DOMAINS and op_type not in NONDETERMINISTIC_OPS and not function
        digest = _digest(
            _encode(
                identifier,
                self.opsets.get(domain),
                [(name, self.encode_attribute(attributes[name], depth)) for name in sorted(attributes)],
                [value is not None for value in node.inputs],
                [bool(value.name) for value in node.outputs],
                None if deterministic else next(self.unique_ids),
            ),
            function,
            *[values[value] for value in node.inputs if value is not None],
        )
        for index, value in enumerate(node.outputs):
            values[value] = digest + index.to_bytes(4, "little")

    def encode_attribute(self, attr: ir.Attr, depth: int) -> tuple[Any, ...]:
        """Return the content of `attr` as plain data."""
        import onnx_ir as ir

        attr_type, value = attr.type, attr.value
        if attr.is_ref():
            return attr_type.name, "ref", attr.ref_attr_name
        if attr_type == ir.AttributeType.FLOAT:
            value = ctypes.c_float(value).value
        elif attr_type == ir.AttributeType.FLOATS:
            value = [ctypes.c_float(item).value for item in value]
        elif attr_type == ir.AttributeType.TENSOR:
            value = self.hash_tensor(value)
        elif attr_type == ir.AttributeType.TENSORS:
            value = [self.hash_tensor(item) for item in value]
        elif attr_type == ir.AttributeType.GRAPH:
            value = self.hash_graph(value, depth + 1)
        elif attr_type == ir.AttributeType.GRAPHS:
            value = [self.hash_graph(item, depth + 1) for item in value]
        elif attr_type == ir.AttributeType.TYPE_PROTO:
            value = f"{value.type} {value.shape}"
        elif attr_type == ir.AttributeType.TYPE_PROTOS:
            value = [f"{item.type} {item.shape}" for item in value]
        return attr_type.name, value

    def hash_tensor(self, tensor: ir.TensorProtocol) -> bytes:
        """Return the digest of a tensor's type, shape and bytes."""
        import onnx_ir as ir

        from ryzen_compile.ir.weights import FileTensor

        # Most tensors are small constants in the proto: reading its fields is faster than creating onnx_ir objects.
        if isinstance(tensor, ir.TensorProtoTensor):
            dtype, dims = tensor.raw.data_type, tuple(tensor.raw.dims)
        else:
            dtype, dims = tensor.dtype.value, tuple(tensor.shape.numpy())
        key = (tensor.source, tensor.offset, tensor.nbytes) if isinstance(tensor, FileTensor) else id(tensor)
        if key not in self.tensor_digests:
            self.tensor_digests[key] = _tensor_data_digest(tensor)
        return _digest(b"tensor", _encode(dtype, dims), self.tensor_digests[key])


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
