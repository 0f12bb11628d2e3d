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

from ryzen_compile.errors import ModelError, shown
from ryzen_compile.ir import protobuf_scan
from ryzen_compile.ir.gc_pause import collection_paused
from ryzen_compile.ir.weight_files import Source, external_source, model_source
from ryzen_compile.ir.weights import GRAPHS, FileTensor, graphs_of, slots

_COMPLEX = frozenset({ir.DataType.COMPLEX64, ir.DataType.COMPLEX128})
_OWN_FIELD = {
    ir.DataType.FLOAT: "float_data",
    ir.DataType.COMPLEX64: "float_data",
    ir.DataType.DOUBLE: "double_data",
    ir.DataType.COMPLEX128: "double_data",
    ir.DataType.INT64: "int64_data",
    ir.DataType.UINT32: "uint64_data",
    ir.DataType.UINT64: "uint64_data",
}
"""In which field of its message a tensor of a type has its values, where these are not raw; all others: `int32_data`."""
_MOST_DIMS = 64
"""Of one tensor: numpy's bound."""
_AGAIN = "export the model again"


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Load the model at `path`.

    Weights stay in their files and are read when asked for; those files must stay as they are while the model is in use. The
    nodes of each graph are in topological order.

    Raises:
        ModelError: It is not a whole and consistent ONNX model, or refers to data outside of its folder.
    """
    source = model_source(path)
    with _named(source), collection_paused(), _quiet():
        skeleton = protobuf_scan.read(source)
        proto = onnx.ModelProto.FromString(skeleton.proto)
        if proto.graph.sparse_initializer:
            raise ModelError("sparse initialisers are not supported", hint="make them dense")
        _check_names(proto.graph)
        model = ir.serde.deserialize_model(proto)
        _bind(model, source, skeleton.places)
        _check_wiring(model)
    return model


@contextlib.contextmanager
def _named(source: Source) -> Iterator[None]:
    """Turn what goes wrong within into a ModelError that names the file."""
    try:
        yield
    except ModelError as error:
        path = shown(source.path)
        if path in error.says:
            raise
        raise ModelError(f"`{path}`: {error.says}", hint=error.hint) from None
    except (DecodeError, ir.serde.SerdeError) as error:
        raise ModelError(f"`{shown(source.path)}` is not a valid ONNX model: {root_cause(error)}", hint=_AGAIN) from None


def root_cause(error: BaseException) -> str:
    """Return in one line what an error of onnx_ir, which wraps each in the next, began with."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(shown(error).split())[:300] or type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep onnx_ir from logging what is refused here with an error."""
    logger, here = logging.getLogger(ir.serde.__name__), threading.get_ident()

    def from_elsewhere(record: logging.LogRecord) -> bool:
        return record.thread != here

    logger.addFilter(from_elsewhere)
    try:
        yield
    finally:
        logger.removeFilter(from_elsewhere)


def _bind(model: ir.Model, source: Source, places: Sequence[protobuf_scan.Place]) -> None:
    """Put file tensors where the skeleton has placeholders, and check all others."""
    files: dict[str, Source] = {}
    bound: list[FileTensor] = []
    for slot in slots(model):
        tensor = slot.tensor
        if not isinstance(tensor, ir.ExternalTensor):
            _check_values(tensor)
            continue
        index = protobuf_scan.placeholder_index(os.fspath(tensor.location))
        place = places[index] if index is not None else protobuf_scan.Place(tensor.name, "", 0, None)
        file = source
        if place.location is not None:
            if place.location not in files:
                files[place.location] = external_source(source, place.tensor, place.location)
            file = files[place.location]
        bound.append(_file_tensor(tensor, file, place))
        slot.put(bound[-1])
    _check_overlaps(bound)


def _count(name: str, dtype: ir.DataType, dims: Sequence[int]) -> int:
    """Return how many elements a tensor has by its type and shape."""
    if len(dims) > _MOST_DIMS or any(dim < 0 for dim in dims):
        raise ModelError(f"tensor `{shown(name)}` cannot have the shape {list(dims[:_MOST_DIMS])}", hint=_AGAIN)
    if dtype == ir.DataType.UNDEFINED:
        raise ModelError(f"tensor `{shown(name)}` has no type", hint=_AGAIN)
    return math.prod(dims)


def _misfit(tensor: ir.TensorProtocol, needs: int, has: int, what: str) -> ModelError:
    spelt = f"{tensor.dtype}{list(tensor.shape.numpy())}"
    return ModelError(f"tensor `{shown(tensor.name)}` is {spelt}: that is {needs} {what}, it has {has}", hint=_AGAIN)


def _file_tensor(tensor: ir.ExternalTensor, file: Source, place: protobuf_scan.Place) -> FileTensor:
    count = _count(tensor.name, tensor.dtype, tensor.shape.numpy())
    if tensor.dtype == ir.DataType.STRING:
        raise ModelError(f"tensor `{shown(tensor.name)}`: strings have neither raw nor external data", hint=_AGAIN)
    needs = math.ceil(count * tensor.dtype.bitwidth / 8)
    if place.length is not None and place.length != needs:
        raise _misfit(tensor, needs, place.length, "bytes")
    if place.offset + needs > file.size:
        raise ModelError(
            f"tensor `{shown(tensor.name)}` lies in bytes {place.offset} to {place.offset + needs} of `{shown(file.path)}`, "
            f"which has {file.size}",
            hint="copy the whole file again",
        )
    return FileTensor(
        file,
        place.offset,
        tensor.dtype,
        tensor.shape,
        name=tensor.name,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props) or None,
    )


def _check_values(tensor: ir.TensorProtocol) -> None:
    """Refuse a tensor in the structure whose values are more or fewer than its shape says."""
    if isinstance(tensor, ir.StringTensor):
        if (needs := _count(tensor.name or "", tensor.dtype, tensor.shape.numpy())) != (has := len(tensor.string_data())):
            raise _misfit(tensor, needs, has, "strings")
    elif isinstance(tensor, ir.TensorProtoTensor):
        proto = tensor.raw
        try:
            dtype = ir.DataType(proto.data_type)
        except ValueError:
            raise ModelError(f"tensor `{shown(proto.name)}` has the unknown type {proto.data_type}", hint=_AGAIN) from None
        needs = _count(proto.name, dtype, proto.dims)
        if proto.HasField("raw_data"):
            needs = math.ceil(needs * dtype.bitwidth / 8)
            if needs != (has := len(proto.raw_data)):
                raise _misfit(tensor, needs, has, "bytes")
            return
        if dtype in _COMPLEX:
            needs *= 2
        elif dtype.bitwidth < 8 and dtype.bitwidth != 6:
            needs = math.ceil(needs * dtype.bitwidth / 8)
        counts = {field: len(getattr(proto, field)) for field in ("int32_data", *_OWN_FIELD.values())}
        has = counts.pop(_OWN_FIELD.get(dtype, "int32_data"))
        if any(counts.values()):
            raise ModelError(f"tensor `{shown(proto.name)}`: its values are not of its type {dtype}", hint=_AGAIN)
        if needs != has:
            raise _misfit(tensor, needs, has, "values")


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
                f"tensors `{shown(one.name)}` and `{shown(other.name)}` overlap in `{shown(one.source.path)}`", hint=_AGAIN
            )


def _check_names(proto: onnx.GraphProto) -> None:
    for what, names in (("input", proto.input), ("initialiser", proto.initializer)):
        count = collections.Counter(item.name for item in names)
        for name, times in count.items():
            if times > 1:
                raise ModelError(f"there are {times} {what}s called `{shown(name)}`", hint=_AGAIN)


def _check_text(*texts: object) -> None:
    """Refuse names that protobuf hands on as bytes because they are not UTF-8."""
    for text in texts:
        if isinstance(text, bytes):
            raise ModelError(f"the name {text!r} is not UTF-8", hint=_AGAIN)


def _check_wiring(model: ir.Model) -> None:
    """Refuse values that come from nowhere, and put the nodes in order where they are not."""
    if not model.graph.outputs:
        raise ModelError("the graph has no outputs", hint=_AGAIN)
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        if not _is_ordered(graph, set()):
            try:
                graph.sort()
            except ValueError:
                raise ModelError(f"the nodes of `{shown(graph.name)}` wait for each other in a circle", hint=_AGAIN) from None


def _is_ordered(graph: ir.Graph, known: set[ir.Value]) -> bool:
    known.update(graph.inputs, graph.initializers.values())
    ordered = True
    _check_text(graph.name, *[value.name for value in (*graph.inputs, *graph.initializers.values())])
    for node in graph:
        _check_text(node.name, node.domain, node.op_type, *[value.name for value in node.outputs])
        for attr in node.attributes.values():
            if attr.type == ir.AttributeType.UNDEFINED:
                raise ModelError(f"attribute `{shown(attr.name)}` of node `{shown(node.name)}` has no type", hint=_AGAIN)
            if attr.type in GRAPHS:
                for inner in graphs_of(attr):
                    ordered &= _is_ordered(inner, known)
        for value in node.inputs:
            if value is not None and value not in known:
                if value.producer() is None:
                    reader = f"node `{shown(node.name)}` ({shown(node.op_type)})"
                    raise ModelError(f"{reader} reads `{shown(value.name)}`, which nothing produces", hint=_AGAIN)
                ordered = False
        known.update(node.outputs)
    for value in graph.outputs:
        if value not in known:
            raise ModelError(f"nothing produces the output `{shown(value.name)}`", hint=_AGAIN)
    return ordered
