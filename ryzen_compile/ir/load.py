"""Load an ONNX file: the structure into memory, the weights where they are."""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import math
import os
import threading
from collections.abc import Iterator, Sequence

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from ryzen_compile.errors import ModelError, printable
from ryzen_compile.ir import protobuf_scan
from ryzen_compile.ir.gc_pause import gc_paused
from ryzen_compile.ir.weight_files import WeightFile, resolve_external_data_file, resolve_model_file
from ryzen_compile.ir.weights import GRAPH_ATTRIBUTE_TYPES, FileTensor, attribute_graphs, tensor_slots

_COMPLEX_TYPES = frozenset({ir.DataType.COMPLEX64, ir.DataType.COMPLEX128})
_TYPED_DATA_FIELDS = {
    ir.DataType.FLOAT: "float_data",
    ir.DataType.COMPLEX64: "float_data",
    ir.DataType.DOUBLE: "double_data",
    ir.DataType.COMPLEX128: "double_data",
    ir.DataType.INT64: "int64_data",
    ir.DataType.UINT32: "uint64_data",
    ir.DataType.UINT64: "uint64_data",
}
"""In which field of its message a tensor of a type has its values, where these are not raw; all others: `int32_data`."""
_MAX_DIMS = 64
"""Of one tensor: numpy's bound."""
_EXPORT_AGAIN_HINT = "export the model again"


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Load the model at `path`.

    Weights stay in their files and are read when asked for; those files must stay as they are while the model is in use. The
    nodes of each graph are in topological order.

    Raises:
        ModelError: It is not a whole and consistent ONNX model, or refers to data outside of its folder.
    """
    source = resolve_model_file(path)
    with _add_path_to_errors(source), gc_paused(), _suppress_onnx_ir_logs():
        skeleton = protobuf_scan.read_skeleton(source)
        proto = onnx.ModelProto.FromString(skeleton.proto)
        if proto.graph.sparse_initializer:
            raise ModelError("sparse initialisers are not supported", hint="make them dense")
        _check_unique_names(proto.graph)
        model = ir.serde.deserialize_model(proto)
        _bind_weights(model, source, skeleton.tensor_locations)
        _check_graph_structure(model)
    return model


@contextlib.contextmanager
def _add_path_to_errors(source: WeightFile) -> Iterator[None]:
    """Turn what goes wrong within into a ModelError that names the file."""
    try:
        yield
    except ModelError as error:
        path = printable(source.path)
        if path in error.message:
            raise
        raise ModelError(f"`{path}`: {error.message}", hint=error.hint) from None
    except (DecodeError, ir.serde.SerdeError) as error:
        raise ModelError(
            f"`{printable(source.path)}` is not a valid ONNX model: {root_cause(error)}", hint=_EXPORT_AGAIN_HINT
        ) from None


def root_cause(error: BaseException) -> str:
    """Return in one line what an error of onnx_ir, which wraps each in the next, began with."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(printable(error).split())[:300] or type(error).__name__


@contextlib.contextmanager
def _suppress_onnx_ir_logs() -> Iterator[None]:
    """Keep onnx_ir from logging what is refused here with an error."""
    logger, here = logging.getLogger(ir.serde.__name__), threading.get_ident()

    def from_elsewhere(record: logging.LogRecord) -> bool:
        return record.thread != here

    logger.addFilter(from_elsewhere)
    try:
        yield
    finally:
        logger.removeFilter(from_elsewhere)


def _bind_weights(model: ir.Model, source: WeightFile, locations: Sequence[protobuf_scan.TensorLocation]) -> None:
    """Put file tensors where the skeleton has placeholders, and check all others."""
    files: dict[str, WeightFile] = {}
    bound: list[FileTensor] = []
    for slot in tensor_slots(model):
        tensor = slot.tensor
        if not isinstance(tensor, ir.ExternalTensor):
            _check_element_count(tensor)
            continue
        index = protobuf_scan.placeholder_index(os.fspath(tensor.location))
        place = locations[index] if index is not None else protobuf_scan.TensorLocation(tensor.name, "", 0, None)
        file = source
        if place.location is not None:
            if place.location not in files:
                files[place.location] = resolve_external_data_file(source, place.tensor_name, place.location)
            file = files[place.location]
        bound.append(_file_tensor(tensor, file, place))
        slot.replace(bound[-1])
    _check_overlaps(bound)


def _element_count(name: str, dtype: ir.DataType, dims: Sequence[int]) -> int:
    """Return how many elements a tensor has by its type and shape."""
    if len(dims) > _MAX_DIMS or any(dim < 0 for dim in dims):
        raise ModelError(f"tensor `{printable(name)}` cannot have the shape {list(dims[:_MAX_DIMS])}", hint=_EXPORT_AGAIN_HINT)
    if dtype == ir.DataType.UNDEFINED:
        raise ModelError(f"tensor `{printable(name)}` has no type", hint=_EXPORT_AGAIN_HINT)
    return math.prod(dims)


def _size_mismatch(tensor: ir.TensorProtocol, expected: int, actual: int, unit: str) -> ModelError:
    spelt = f"{tensor.dtype}{list(tensor.shape.numpy())}"
    return ModelError(
        f"tensor `{printable(tensor.name)}` is {spelt}: that is {expected} {unit}, it has {actual}", hint=_EXPORT_AGAIN_HINT
    )


def _file_tensor(tensor: ir.ExternalTensor, file: WeightFile, location: protobuf_scan.TensorLocation) -> FileTensor:
    count = _element_count(tensor.name, tensor.dtype, tensor.shape.numpy())
    if tensor.dtype == ir.DataType.STRING:
        raise ModelError(
            f"tensor `{printable(tensor.name)}`: strings have neither raw nor external data", hint=_EXPORT_AGAIN_HINT
        )
    needs = math.ceil(count * tensor.dtype.bitwidth / 8)
    if location.length is not None and location.length != needs:
        raise _size_mismatch(tensor, needs, location.length, "bytes")
    if location.offset + needs > file.size:
        raise ModelError(
            f"tensor `{printable(tensor.name)}` lies in bytes {location.offset} to {location.offset + needs} of `{printable(file.path)}`, "
            f"which has {file.size}",
            hint="copy the whole file again",
        )
    return FileTensor(
        file,
        location.offset,
        tensor.dtype,
        tensor.shape,
        name=tensor.name,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props) or None,
    )


def _check_element_count(tensor: ir.TensorProtocol) -> None:
    """Refuse a tensor in the structure whose values are more or fewer than its shape says."""
    if isinstance(tensor, ir.StringTensor):
        if (needs := _element_count(tensor.name or "", tensor.dtype, tensor.shape.numpy())) != (
            has := len(tensor.string_data())
        ):
            raise _size_mismatch(tensor, needs, has, "strings")
    elif isinstance(tensor, ir.TensorProtoTensor):
        proto = tensor.raw
        try:
            dtype = ir.DataType(proto.data_type)
        except ValueError:
            raise ModelError(
                f"tensor `{printable(proto.name)}` has the unknown type {proto.data_type}", hint=_EXPORT_AGAIN_HINT
            ) from None
        needs = _element_count(proto.name, dtype, proto.dims)
        if proto.HasField("raw_data"):
            needs = math.ceil(needs * dtype.bitwidth / 8)
            if needs != (has := len(proto.raw_data)):
                raise _size_mismatch(tensor, needs, has, "bytes")
            return
        if dtype in _COMPLEX_TYPES:
            needs *= 2
        elif dtype.bitwidth < 8 and dtype.bitwidth != 6:
            needs = math.ceil(needs * dtype.bitwidth / 8)
        counts = {field: len(getattr(proto, field)) for field in ("int32_data", *_TYPED_DATA_FIELDS.values())}
        has = counts.pop(_TYPED_DATA_FIELDS.get(dtype, "int32_data"))
        if any(counts.values()):
            raise ModelError(
                f"tensor `{printable(proto.name)}`: its values are not of its type {dtype}", hint=_EXPORT_AGAIN_HINT
            )
        if needs != has:
            raise _size_mismatch(tensor, needs, has, "values")


def _check_overlaps(tensors: Sequence[FileTensor]) -> None:
    """Refuse tensors that share some bytes but not all: the file is damaged or made to deceive."""
    ranges = sorted(
        (
            (tensor.source.device, tensor.source.inode, tensor.offset, tensor.offset + tensor.nbytes, place)
            for place, tensor in enumerate(tensors)
            if tensor.nbytes
        )
    )
    for left, right in itertools.pairwise(ranges):
        if left[:2] == right[:2] and right[2] < left[3] and left[2:4] != right[2:4]:
            one, other = tensors[left[4]], tensors[right[4]]
            raise ModelError(
                f"tensors `{printable(one.name)}` and `{printable(other.name)}` overlap in `{printable(one.source.path)}`",
                hint=_EXPORT_AGAIN_HINT,
            )


def _check_unique_names(proto: onnx.GraphProto) -> None:
    for what, names in (("input", proto.input), ("initialiser", proto.initializer)):
        count = collections.Counter(item.name for item in names)
        for name, times in count.items():
            if times > 1:
                raise ModelError(f"there are {times} {what}s called `{printable(name)}`", hint=_EXPORT_AGAIN_HINT)


def _check_utf8(*texts: object) -> None:
    """Refuse names that protobuf hands on as bytes because they are not UTF-8."""
    for text in texts:
        if isinstance(text, bytes):
            raise ModelError(f"the name {text!r} is not UTF-8", hint=_EXPORT_AGAIN_HINT)


def _check_graph_structure(model: ir.Model) -> None:
    """Refuse values that come from nowhere, and put the nodes in order where they are not."""
    if not model.graph.outputs:
        raise ModelError("the graph has no outputs", hint=_EXPORT_AGAIN_HINT)
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        if not _is_topologically_sorted(graph, set()):
            try:
                graph.sort()
            except ValueError:
                raise ModelError(
                    f"the nodes of `{printable(graph.name)}` wait for each other in a circle", hint=_EXPORT_AGAIN_HINT
                ) from None


def _is_topologically_sorted(graph: ir.Graph, defined: set[ir.Value]) -> bool:
    defined.update(graph.inputs, graph.initializers.values())
    ordered = True
    _check_utf8(graph.name, *[value.name for value in (*graph.inputs, *graph.initializers.values())])
    for node in graph:
        _check_utf8(node.name, node.domain, node.op_type, *[value.name for value in node.outputs])
        for attr in node.attributes.values():
            if attr.type == ir.AttributeType.UNDEFINED:
                raise ModelError(
                    f"attribute `{printable(attr.name)}` of node `{printable(node.name)}` has no type", hint=_EXPORT_AGAIN_HINT
                )
            if attr.type in GRAPH_ATTRIBUTE_TYPES:
                for inner in attribute_graphs(attr):
                    ordered &= _is_topologically_sorted(inner, defined)
        for value in node.inputs:
            if value is not None and value not in defined:
                if value.producer() is None:
                    reader = f"node `{printable(node.name)}` ({printable(node.op_type)})"
                    raise ModelError(
                        f"{reader} reads `{printable(value.name)}`, which nothing produces", hint=_EXPORT_AGAIN_HINT
                    )
                ordered = False
        defined.update(node.outputs)
    for value in graph.outputs:
        if value not in defined:
            raise ModelError(f"nothing produces the output `{printable(value.name)}`", hint=_EXPORT_AGAIN_HINT)
    return ordered
