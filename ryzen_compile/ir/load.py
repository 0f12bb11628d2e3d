"""Loading of ONNX files: the structure is read into memory, the weights stay in their files."""

from __future__ import annotations

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
from ryzen_compile.ir.graph_checks import (
    EXPORT_AGAIN_HINT,
    MAX_DIMS,
    check_declarations,
    check_graphs,
    make_node_names_unique,
    sort_graphs,
)
from ryzen_compile.ir.interface_metadata import read_recorded_interface
from ryzen_compile.ir.output_shapes import correct_output_shapes
from ryzen_compile.ir.placeholder_dims import remove_placeholder_dim_names
from ryzen_compile.ir.traversal import all_graphs
from ryzen_compile.ir.validity import find_contradicting_output, find_invalidity, without_declared_shapes
from ryzen_compile.ir.weight_files import WeightFile, resolve_external_data_file, resolve_model_file
from ryzen_compile.ir.weights import FileTensor, tensor_slots
from ryzen_compile.spec.kv_cache import read_kv_cache_spec

_COMPLEX_TYPES = frozenset({ir.DataType.COMPLEX64, ir.DataType.COMPLEX128})
MAX_IR_VERSION = 13
"""The newest version of the ONNX file format that ONNX Runtime 1.31 reads; onnx 1.23 writes version 14 by default."""
UNNAMED_GRAPH = "graph"
"""The name of a graph whose file gives it none: `onnx.checker` requires one."""
_TYPED_DATA_FIELDS = {
    ir.DataType.FLOAT: "float_data",
    ir.DataType.COMPLEX64: "float_data",
    ir.DataType.DOUBLE: "double_data",
    ir.DataType.COMPLEX128: "double_data",
    ir.DataType.INT64: "int64_data",
    ir.DataType.UINT32: "uint64_data",
    ir.DataType.UINT64: "uint64_data",
}
"""The typed data field of TensorProto by element type; all other types use `int32_data`."""


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Load the model at `path`.

    Weights stay in their files and are read on access; the files must not change while the model is in use. The nodes of each
    graph are sorted topologically. Placeholder names of dimensions, such as `?`, are removed. Declared shapes that contradict
    shape inference are corrected for outputs, unless ryzen-compile recorded the interface, and removed for inner values. Nodes
    with the name of an earlier node of the same graph are renamed. The version of the file format is at most `MAX_IR_VERSION`.

    Raises:
        ModelError: The file is not a complete and consistent ONNX model, is refused by `onnx.checker`, refers to data outside
            its folder, or has metadata of ryzen-compile that cannot be read.
    """
    source = resolve_model_file(path)
    with _add_path_to_errors(source), gc_paused(), _suppress_onnx_ir_logs():
        skeleton = protobuf_scan.read_skeleton(source)
        proto = onnx.ModelProto.FromString(skeleton.proto)
        check_declarations(proto)
        if not proto.graph.name:
            proto.graph.name = UNNAMED_GRAPH
        model = ir.serde.deserialize_model(proto)
        model.ir_version = min(model.ir_version, MAX_IR_VERSION)
        if sort_graphs(model):
            proto = ir.serde.serialize_model(model)
        _bind_weights(model, source, skeleton.tensor_locations)
        check_graphs(model)
        make_node_names_unique(model)
        recorded = read_recorded_interface(model)
        _check_validity(model, proto, trusts_outputs=recorded is not None)
        remove_placeholder_dim_names(model)
        if recorded is None:
            correct_output_shapes(model, proto)
        read_kv_cache_spec(model)
    return model


@contextlib.contextmanager
def _add_path_to_errors(source: WeightFile) -> Iterator[None]:
    """Convert errors within the block to ModelErrors that name the file."""
    try:
        yield
    except ModelError as error:
        path = printable(source.path)
        if path in error.message:
            raise
        raise ModelError(f"`{path}`: {error.message}", hint=error.hint) from None
    except UnicodeError as error:
        raise ModelError(
            f"`{printable(source.path)}` has a text that is not UTF-8: {root_cause(error)}", hint=EXPORT_AGAIN_HINT
        ) from None
    except (DecodeError, ir.serde.SerdeError) as error:
        if isinstance(cause := _first_error(error), NotImplementedError):
            unsupported = printable(cause).partition(".")[0]
            raise ModelError(
                f"`{printable(source.path)}`: {unsupported}", hint="export the model without this feature of ONNX"
            ) from None
        raise ModelError(
            f"`{printable(source.path)}` is not a valid ONNX model: {root_cause(error)}", hint=EXPORT_AGAIN_HINT
        ) from None


def root_cause(error: BaseException) -> str:
    """Return the first error of a chain on one line, at most 300 characters: onnx_ir wraps each error in another one."""
    error = _first_error(error)
    return " ".join(printable(error).split())[:300] or type(error).__name__


def _first_error(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextlib.contextmanager
def _suppress_onnx_ir_logs() -> Iterator[None]:
    """Suppress log records of onnx_ir from this thread: the same problems are raised as errors."""
    logger, current_thread = logging.getLogger(ir.serde.__name__), threading.get_ident()

    def is_other_thread(record: logging.LogRecord) -> bool:
        return record.thread != current_thread

    logger.addFilter(is_other_thread)
    try:
        yield
    finally:
        logger.removeFilter(is_other_thread)


def _check_validity(model: ir.Model, proto: onnx.ModelProto, *, trusts_outputs: bool) -> None:
    """Raise ModelError if `onnx.checker` refuses `model`, which was read from `proto`.

    If only declared shapes of inner values (and, without `trusts_outputs`, of outputs) are wrong, remove those of inner values.
    """
    if (problem := find_invalidity(proto)) is None:
        return
    is_shape_wrong = find_invalidity(without_declared_shapes(proto, outputs=not trusts_outputs)) is None
    if not is_shape_wrong or find_contradicting_output(proto.graph) is not None:
        raise ModelError(f"it is not valid ONNX: {problem}", hint=EXPORT_AGAIN_HINT)
    outputs = set(model.graph.outputs)
    for graph in all_graphs(model):
        for node in graph:
            for value in node.outputs:
                if value not in outputs:
                    value.shape = None


def _bind_weights(model: ir.Model, source: WeightFile, locations: Sequence[protobuf_scan.TensorLocation]) -> None:
    """Replace the placeholders of the skeleton with file tensors, and check all other tensors."""
    files: dict[str, WeightFile] = {}
    file_tensors: list[FileTensor] = []
    for slot in tensor_slots(model):
        tensor = slot.tensor
        if not isinstance(tensor, ir.ExternalTensor):
            _check_element_count(tensor)
            continue
        index = protobuf_scan.placeholder_index(os.fspath(tensor.location))
        location = locations[index] if index is not None else protobuf_scan.TensorLocation(tensor.name, "", 0, None)
        file = source
        if location.location is not None:
            if location.location not in files:
                files[location.location] = resolve_external_data_file(source, location.tensor_name, location.location)
            file = files[location.location]
        file_tensors.append(_file_tensor(tensor, file, location))
        slot.replace(file_tensors[-1])
    _check_overlaps(file_tensors)


def _element_count(name: str, dtype: ir.DataType, dims: Sequence[int]) -> int:
    """Return the number of elements of a tensor with these dims; raises ModelError for an invalid type or shape."""
    if len(dims) > MAX_DIMS or any(dim < 0 for dim in dims):
        raise ModelError(
            f"tensor `{printable(name)}` has the invalid shape {list(dims[:MAX_DIMS])}: at most {MAX_DIMS} dimensions, each "
            "at least 0, are allowed",
            hint=EXPORT_AGAIN_HINT,
        )
    if dtype == ir.DataType.UNDEFINED:
        raise ModelError(f"tensor `{printable(name)}` has no element type", hint=EXPORT_AGAIN_HINT)
    return math.prod(dims)


def _size_mismatch(tensor: ir.TensorProtocol, expected: int, actual: int, unit: str) -> ModelError:
    declared = f"{tensor.dtype}{list(tensor.shape.numpy())}"
    return ModelError(
        f"tensor `{printable(tensor.name)}` of type {declared} must have {expected} {unit} (got {actual})",
        hint=EXPORT_AGAIN_HINT,
    )


def _file_tensor(tensor: ir.ExternalTensor, file: WeightFile, location: protobuf_scan.TensorLocation) -> FileTensor:
    count = _element_count(tensor.name, tensor.dtype, tensor.shape.numpy())
    if tensor.dtype == ir.DataType.STRING:
        raise ModelError(
            f"string tensor `{printable(tensor.name)}` has raw or external data, which ONNX does not allow",
            hint=EXPORT_AGAIN_HINT,
        )
    expected = math.ceil(count * tensor.dtype.bitwidth / 8)
    if location.length is not None and location.length != expected:
        raise _size_mismatch(tensor, expected, location.length, "bytes")
    if location.offset + expected > file.size:
        raise ModelError(
            f"tensor `{printable(tensor.name)}` is at bytes {location.offset} to {location.offset + expected} of "
            f"`{printable(file.path)}`, which has only {file.size} bytes",
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
    """Raise ModelError if the number of values of an inline tensor does not match its shape."""
    if isinstance(tensor, ir.StringTensor):
        if (expected := _element_count(tensor.name or "", tensor.dtype, tensor.shape.numpy())) != (
            actual := len(tensor.string_data())
        ):
            raise _size_mismatch(tensor, expected, actual, "strings")
    elif isinstance(tensor, ir.TensorProtoTensor):
        proto = tensor.raw
        try:
            dtype = ir.DataType(proto.data_type)
        except ValueError:
            raise ModelError(
                f"tensor `{printable(proto.name)}` has the unknown element type {proto.data_type}", hint=EXPORT_AGAIN_HINT
            ) from None
        expected = _element_count(proto.name, dtype, proto.dims)
        if proto.HasField("raw_data"):
            expected = math.ceil(expected * dtype.bitwidth / 8)
            if expected != (actual := len(proto.raw_data)):
                raise _size_mismatch(tensor, expected, actual, "bytes")
            return
        if dtype in _COMPLEX_TYPES:
            expected *= 2
        elif dtype.bitwidth < 8 and dtype.bitwidth != 6:
            expected = math.ceil(expected * dtype.bitwidth / 8)
        counts = {field: len(getattr(proto, field)) for field in ("int32_data", *_TYPED_DATA_FIELDS.values())}
        actual = counts.pop(_TYPED_DATA_FIELDS.get(dtype, "int32_data"))
        if any(counts.values()):
            raise ModelError(
                f"tensor `{printable(proto.name)}` of type {dtype} has values in the field of another type",
                hint=EXPORT_AGAIN_HINT,
            )
        if expected != actual:
            raise _size_mismatch(tensor, expected, actual, "values")


def _check_overlaps(tensors: Sequence[FileTensor]) -> None:
    """Raise ModelError if two tensors share some but not all of their bytes: the file is damaged or malicious."""
    ranges = sorted(
        (
            (tensor.source.device, tensor.source.inode, tensor.offset, tensor.offset + tensor.nbytes, index)
            for index, tensor in enumerate(tensors)
            if tensor.nbytes
        )
    )
    for left, right in itertools.pairwise(ranges):
        if left[:2] == right[:2] and right[2] < left[3] and left[2:4] != right[2:4]:
            first, second = tensors[left[4]], tensors[right[4]]
            raise ModelError(
                f"tensors `{printable(first.name)}` and `{printable(second.name)}` partly overlap in "
                f"`{printable(first.source.path)}`",
                hint=EXPORT_AGAIN_HINT,
            )
