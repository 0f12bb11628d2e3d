"""Tests of loading: all kinds of ONNX files are loaded, weights stay in their files, invalid files are refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper
from support import onnx_samples

from ryzen_compile.errors import ModelError
from ryzen_compile.ir.load import load
from ryzen_compile.ir.weights import FileTensor


def _load_error(path: Path | str) -> ModelError:
    with pytest.raises(ModelError) as caught:
        load(path)
    assert "\n" not in caught.value.message
    assert caught.value.hint
    return caught.value


def _weight(model: ir.Model, name: str) -> ir.TensorProtocol:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor


@pytest.mark.parametrize(
    "text",
    [onnx_samples.BRANCHES, onnx_samples.IR_VERSION_3, onnx_samples.STRINGS_AND_SEQUENCES],
    ids=["branches", "ir-version-3", "strings"],
)
def test_subgraphs_functions_strings_sequences_and_old_opsets_are_loaded(tmp_path: Path, text: str) -> None:
    proto = onnx_samples.model(text)
    model = load(onnx_samples.write(proto, tmp_path / "model.onnx"))
    assert [node.op_type for node in model.graph] == [node.op_type for node in proto.graph.node]
    assert len(model.functions) == len(proto.functions)
    assert model.opset_imports == {opset.domain: opset.version for opset in proto.opset_import}
    assert [value.name for value in model.graph.outputs] == [value.name for value in proto.graph.output]


@pytest.mark.parametrize("name", ["with space.onnx", "Mödell 模型.onnx", "two\nlines.onnx", "no suffix"])
def test_any_file_name_is_supported(tmp_path: Path, name: str) -> None:
    inline = load(onnx_samples.write(onnx_samples.linear(), tmp_path / name))
    external = load(onnx_samples.write_external(tmp_path / "sub dir\n2" / name, data=f"{name} dätä\n.bin"))
    for weight, value in onnx_samples.linear_weights().items():
        np.testing.assert_array_equal(_weight(inline, weight).numpy(), value)
        np.testing.assert_array_equal(_weight(external, weight).numpy(), value)


def test_large_weights_stay_in_the_file_and_small_ones_are_in_memory(tmp_path: Path) -> None:
    model = load(onnx_samples.write(onnx_samples.linear(), tmp_path / "model.onnx"))
    large = _weight(model, "w")
    assert isinstance(large, FileTensor)
    assert (tmp_path / "model.onnx").read_bytes()[large.offset : large.offset + large.nbytes] == large.tobytes()
    assert not isinstance(_weight(model, "b"), FileTensor)


@pytest.mark.parametrize("count", [300, 300_000], ids=["read", "mapped"])
def test_file_tensor_returns_the_written_values(tmp_path: Path, count: int) -> None:
    value = np.arange(count, dtype=np.float32)
    proto = onnx_samples.model(
        f'<ir_version: 10, opset_import: ["" : 21]> g (float[{count}] x) => (float[{count}] y) {{ y = Add (x, w) }}',
        {"w": value},
    )
    tensor = _weight(load(onnx_samples.write(proto, tmp_path / "m.onnx")), "w")
    assert isinstance(tensor, FileTensor)
    np.testing.assert_array_equal(tensor.numpy(), value)
    np.testing.assert_array_equal(np.asarray(tensor), value)
    assert not tensor.numpy().flags.writeable
    assert tensor.tobytes() == value.tobytes()
    with (tmp_path / "copy").open("wb") as file:
        tensor.tofile(file)
    assert (tmp_path / "copy").read_bytes() == value.tobytes()
    assert "m.onnx" in repr(tensor)


@pytest.mark.parametrize("element", ["BFLOAT16", "FLOAT16", "INT4", "UINT4", "FLOAT8E4M3FN", "BOOL", "COMPLEX64", "INT64"])
def test_every_element_type_is_read_from_a_file(tmp_path: Path, element: str) -> None:
    raw = bytes(range(2)) * 2048 if element == "BOOL" else bytes(range(256)) * 16
    dtype = ir.DataType[element]
    dims = [len(raw) * 8 // dtype.bitwidth]
    proto = onnx_samples.model('<ir_version: 10, opset_import: ["" : 21]> g (int64 x) => (int64 y) { y = Identity (x) }')
    proto.graph.initializer.append(onnx.TensorProto(name="w", data_type=dtype.value, dims=dims, raw_data=raw))
    tensor = _weight(load(onnx_samples.write(proto, tmp_path / "m.onnx")), "w")
    assert isinstance(tensor, FileTensor)
    expected = ir.TensorProtoTensor(proto.graph.initializer[0]).numpy()
    assert tensor.numpy().dtype == expected.dtype
    np.testing.assert_array_equal(tensor.numpy().view(np.uint8), expected.view(np.uint8))


def test_large_constants_in_nodes_and_subgraphs_stay_in_the_file_too(tmp_path: Path) -> None:
    value = np.arange(16384, dtype=np.float32)
    proto = onnx_samples.model(onnx_samples.BRANCHES)
    constant = helper.make_node("Constant", [], ["big"], value=numpy_helper.from_array(value))
    proto.graph.node.insert(0, constant)
    proto.graph.node[-2].attribute[0].g.node.insert(
        0, helper.make_node("Constant", [], ["inner_big"], value=constant.attribute[0].t)
    )
    model = load(onnx_samples.write(proto, tmp_path / "m.onnx"))
    constants = [node for node in model.graph.all_nodes() if node.op_type == "Constant" and node.outputs[0].name != "one"]
    assert len(constants) == 2
    for node in constants:
        assert isinstance(node.attributes["value"].value, FileTensor)
        np.testing.assert_array_equal(node.attributes["value"].value.numpy(), value)


def test_unsorted_nodes_are_sorted(tmp_path: Path) -> None:
    proto = onnx_samples.linear()
    proto.graph.node.reverse()
    assert [node.op_type for node in load(onnx_samples.write(proto, tmp_path / "m.onnx")).graph] == ["MatMul", "Add"]


def test_placeholder_names_of_dimensions_are_removed(tmp_path: Path) -> None:
    proto = onnx_samples.model(onnx_samples.BRANCHES)
    proto.graph.value_info.append(helper.make_tensor_value_info("two", 1, ["?", "?"]))
    for value in (*proto.graph.input, *proto.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_param"):
                dim.dim_param = "?"
    branch = next(node for node in proto.graph.node if node.op_type == "If").attribute[0].g
    branch.value_info.append(helper.make_tensor_value_info("inner", 1, ["unk__1", "M"]))
    model = load(onnx_samples.write(proto, tmp_path / "m.onnx"))
    shapes = {value.name: value.shape for node in model.graph.all_nodes() for value in node.outputs}
    shapes |= {value.name: value.shape for value in model.graph.inputs}
    expected = {"x": [None, 8], "two": [None, None], "y": [None, 8], "inner": [None, "M"]}
    assert {name: shapes[name] for name in expected} == {name: ir.Shape(dims) for name, dims in expected.items()}


@pytest.mark.parametrize("key", ["ryzen_compile.interface", "ryzen_compile.kv"])
def test_metadata_of_another_schema_version_is_refused(tmp_path: Path, key: str) -> None:
    proto = onnx_samples.linear()
    proto.metadata_props.add(key=key, value='{"schema_version": 99}')
    error = _load_error(onnx_samples.write(proto, tmp_path / "m.onnx"))
    assert f"m.onnx`: the model's metadata `{key}` has schema version 99" in error.message
    assert "upgrade ryzen-compile" in (error.hint or "")


def test_weights_with_identical_byte_ranges_are_loaded(tmp_path: Path) -> None:
    path = onnx_samples.write_external(tmp_path / "m.onnx")
    proto = onnx.load(path, load_external_data=False)
    tied = proto.graph.initializer.add()
    tied.CopyFrom(proto.graph.initializer[0])
    tied.name = "tied"
    assert _weight(load(onnx_samples.write(proto, path)), "tied").tobytes() == onnx_samples.linear_weights()["w"].tobytes()


def test_model_and_data_behind_links_of_a_download_cache_are_loaded(tmp_path: Path) -> None:
    onnx_samples.write_external(tmp_path / "blobs" / "model")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.onnx").symlink_to("../blobs/model")
    (tmp_path / "snapshot" / "data.bin").symlink_to("../blobs/data.bin")
    assert _weight(load(tmp_path / "snapshot" / "model.onnx"), "b").tobytes() == onnx_samples.linear_weights()["b"].tobytes()


def test_external_data_without_length_has_the_length_of_the_shape(tmp_path: Path) -> None:
    model = load(
        onnx_samples.write_external(tmp_path / "m.onnx", w={"offset": None, "length": None}, b={"checksum": "0" * 40, "odd": 1})
    )
    assert _weight(model, "w").tobytes() == onnx_samples.linear_weights()["w"].tobytes()


_MEASURE = """
import sys
from ryzen_compile.ir.load import load
def peak():
    return int(next(line for line in open("/proc/self/status") if "VmHWM" in line).split()[1]) // 1024
before = peak()
model = load(sys.argv[1])
print(before, peak())
"""


@pytest.mark.parametrize("external", [False, True], ids=["inline", "external"])
def test_loading_needs_no_memory_for_weights(tmp_path: Path, external: bool) -> None:
    """Load an inline weight of 1.5 GB, and an external one of 6 GB; both files are sparse."""
    count = (6 << 30 if external else 3 << 29) // 4
    proto = onnx_samples.model('<ir_version: 10, opset_import: ["" : 21]> g (float[1] x) => (float[1] y) { y = Add (x, x) }')
    path, weight = tmp_path / "m.onnx", onnx.TensorProto(name="w", data_type=1, dims=[count])
    if external:
        weight.data_location = onnx.TensorProto.EXTERNAL
        weight.external_data.add(key="location", value="m.data")
        proto.graph.initializer.append(weight)
        onnx_samples.write(proto, path)
        (tmp_path / "m.data").touch()
        os.truncate(tmp_path / "m.data", count * 4)
    else:
        _write_with_hole(path, proto, weight, count * 4)
    completed = subprocess.run([sys.executable, "-c", _MEASURE, path], capture_output=True, text=True, check=True)
    before, after = map(int, completed.stdout.split())
    assert after - before < 20


def _write_with_hole(path: Path, proto: onnx.ModelProto, weight: onnx.TensorProto, size: int) -> None:
    """Write `proto` with an additional weight of `size` zero bytes as raw data, as a sparse file."""

    def varint(value: int) -> bytes:
        return varint_with_continuation(value) if value > 127 else bytes([value])

    def varint_with_continuation(value: int) -> bytes:
        return bytes([value & 127 | 128]) + varint(value >> 7)

    header = weight.SerializeToString() + b"\x4a" + varint(size)
    header = b"\x2a" + varint(len(header) + size) + header
    header = b"\x3a" + varint(len(header) + size) + header
    content = proto.SerializeToString() + header
    path.write_bytes(content)
    os.truncate(path, len(content) + size)


def test_invalid_path_is_refused(tmp_path: Path) -> None:
    assert "No such file" in _load_error(tmp_path / "missing.onnx").message
    assert "is a folder" in _load_error(tmp_path).message
    assert "null" in _load_error("nul\0byte.onnx").message
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in _load_error(tmp_path / "pipe").message
    (tmp_path / "empty.onnx").touch()
    assert "is empty" in _load_error(tmp_path / "empty.onnx").message


@pytest.mark.parametrize(
    "content",
    [
        np.random.default_rng(0).bytes(4096),
        b"# a text file\n" * 40,
        b"PK\x03\x04" + bytes(200),
        numpy_helper.from_array(np.arange(9.0)).SerializeToString(),
        helper.make_node("Add", ["a", "b"], ["c"]).SerializeToString(),
        b'{"model": 1}',
        b"\x08\x0a" * 500,
        b"\xff" * 64,
        b"\x3a",
    ],
    ids=["random", "text", "zip", "tensor", "node", "json", "numbers", "ones", "tag"],
)
def test_other_file_formats_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    assert "is not an ONNX file, or is incomplete" in _load_error(tmp_path / "m.onnx").message


def test_git_lfs_pointer_has_a_specific_hint(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    assert _load_error(tmp_path / "m.onnx").hint == "run `git lfs pull`"


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    content = onnx_samples.linear().SerializeToString()
    for length in [*range(1, 40), *range(len(content) - 40, len(content)), *range(40, len(content), 97)]:
        (tmp_path / "m.onnx").write_bytes(content[:length])
        _load_error(tmp_path / "m.onnx")


def test_too_deeply_nested_messages_are_refused(tmp_path: Path) -> None:
    graph = helper.make_graph([], "g", [], [helper.make_tensor_value_info("y", 1, [1])], doc_string="long" * 9999)
    inner = graph.SerializeToString()

    def field(number: int, body: bytes) -> bytes:
        size, encoded_size = len(body), b""
        while size > 127:
            encoded_size, size = encoded_size + bytes([size & 127 | 128]), size >> 7
        return bytes([number << 3 | 2]) + encoded_size + bytes([size]) + body

    for _ in range(2000):
        inner = field(1, field(5, field(6, inner)))
    (tmp_path / "m.onnx").write_bytes(b"\x08\x0a" + field(7, inner) + b"\x42\x02\x10\x15")
    _load_error(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"location": "/etc/passwd"}, "outside the model's folder"),
        ({"location": "../secret.bin"}, "outside the model's folder"),
        ({"location": "sub/../../secret.bin"}, "outside the model's folder"),
        ({"location": "..\\secret.bin"}, "outside the model's folder"),
        ({"location": "link.bin"}, "a link to a file outside the model's folder"),
        ({"location": "linked/secret.bin"}, "a link to a file outside the model's folder"),
        ({"location": "missing.bin"}, "No such file"),
        ({"location": "data.bin/deeper"}, "Not a directory"),
        ({"location": "folder"}, "not a regular file"),
        ({"location": ""}, "external data without a valid file name"),
        ({"location": None}, "external data without a valid file name"),
        ({"location": "a\0b"}, "external data without a valid file name"),
        ({"location": "\0weight 0"}, "external data without a valid file name"),
        ({"location": "x" * 300}, "name too long"),
        ({"offset": "-4"}, "is not a byte count"),
        ({"offset": "１"}, "is not a byte count"),
        ({"length": "1e3"}, "is not a byte count"),
        ({"length": "9" * 30}, "is not a byte count"),
        ({"length": 8191}, "must have 8192 bytes (got 8191)"),
        ({"length": 0}, "must have 8192 bytes (got 0)"),
        ({"offset": 129}, "which has only 8320 bytes"),
        ({"offset": 2**62}, "which has only 8320 bytes"),
        ({"offset": 64}, "overlap"),
    ],
)
def test_invalid_external_data_is_refused(tmp_path: Path, entries: dict[str, object], message: str) -> None:
    folder = tmp_path / "model"
    path = onnx_samples.write_external(folder / "m.onnx", w=entries)
    (tmp_path / "secret.bin").write_bytes(bytes(9000))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    (folder / "linked").symlink_to(tmp_path)
    (folder / "folder").mkdir()
    error = _load_error(path)
    assert message in error.message
    assert "secret" in error.message or "`w`" in error.message


def test_truncated_external_data_is_refused(tmp_path: Path) -> None:
    path = onnx_samples.write_external(tmp_path / "m.onnx")
    os.truncate(tmp_path / "data.bin", 8319)
    assert "tensor `b` is at bytes 8192 to 8320" in _load_error(path).message


def test_raw_data_together_with_external_data_is_refused(tmp_path: Path) -> None:
    path = onnx_samples.write_external(tmp_path / "m.onnx")
    proto = onnx.load(path, load_external_data=False)
    proto.graph.initializer[0].raw_data = bytes(8192)
    assert "both raw data and external data" in _load_error(onnx_samples.write(proto, path)).message


def _float_tensor(**fields: object) -> onnx.TensorProto:
    return onnx.TensorProto(**{"name": "w", "data_type": 1, "dims": [2]} | fields)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (_float_tensor(raw_data=bytes(4)), "must have 8 bytes (got 4)"),
        (_float_tensor(dims=[1000], raw_data=bytes(3996)), "must have 4000 bytes (got 3996)"),
        (_float_tensor(float_data=[1.0]), "must have 2 values (got 1)"),
        (_float_tensor(int32_data=[1, 2]), "has values in the field of another type"),
        (_float_tensor(dims=[-2], raw_data=bytes(8)), "has the invalid shape"),
        (_float_tensor(dims=[-1000, -1], raw_data=bytes(4000)), "has the invalid shape"),
        (_float_tensor(dims=[2**62] * 100), "has the invalid shape"),
        (_float_tensor(dims=[2**62, 2**62], raw_data=bytes(2000)), "(got 2000)"),
        (_float_tensor(data_type=0, raw_data=bytes(8)), "has no element type"),
        (_float_tensor(data_type=99, raw_data=bytes(8)), "99"),
        (_float_tensor(data_type=8, string_data=[b"a"]), "must have 2 strings (got 1)"),
        (_float_tensor(data_type=8, dims=[2000], raw_data=bytes(2000)), "string"),
        (_float_tensor(data_location=1), "external data without a valid file name"),
    ],
)
def test_tensor_with_wrong_number_of_values_is_refused(tmp_path: Path, tensor: onnx.TensorProto, message: str) -> None:
    proto = onnx_samples.model('<ir_version: 10, opset_import: ["" : 21]> g (float[2] x) => (float[2] y) { y = Add (x, w) }')
    proto.graph.initializer.append(tensor)
    assert message in _load_error(onnx_samples.write(proto, tmp_path / "initializer.onnx")).message
    proto.graph.initializer.pop()
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=tensor))
    assert message in _load_error(onnx_samples.write(proto, tmp_path / "constant.onnx")).message


def _invalid_model(change: str) -> onnx.ModelProto:
    proto = onnx_samples.linear()
    graph = proto.graph
    if change == "missing producer":
        graph.node[0].input[1] = "nowhere"
    elif change == "cycle":
        graph.node[0].input[0] = "y"
    elif change == "no outputs":
        del graph.output[:]
    elif change == "output without producer":
        graph.output[0].name = "z"
    elif change == "duplicate output":
        graph.node[1].output[0] = "h"
    elif change == "duplicate initializer":
        graph.initializer.append(graph.initializer[1])
    elif change == "duplicate input":
        graph.input.append(graph.input[0])
    elif change == "sparse constant":
        graph.node[0].attribute.add(name="sparse_value", type=onnx.AttributeProto.SPARSE_TENSOR)
    elif change == "repeated output":
        graph.output.append(graph.output[0])
    elif change == "sparse":
        graph.sparse_initializer.add().values.name = "s"
    elif change == "map":
        graph.input[0].type.map_type.key_type = 7
    elif change == "untyped attribute":
        graph.node[0].attribute.add(name="axis")
    return proto


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing producer", "node `m` (MatMul) reads `nowhere`, which has no producer"),
        ("cycle", "the nodes of graph `linear` form a cycle"),
        ("no outputs", "has no outputs"),
        ("output without producer", "the graph output `z` has no producer"),
        ("duplicate output", "redeclared"),
        ("duplicate initializer", "2 initializers have the name `b`"),
        ("duplicate input", "2 inputs have the name `x`"),
        ("sparse constant", "Sparse tensors are not supported yet"),
        ("repeated output", "2 outputs have the name `y`"),
        ("sparse", "sparse initializers are not supported"),
        ("map", "input `x` is a map, which is valid ONNX but not supported"),
        ("untyped attribute", "attribute `axis` of node `m` has no type"),
    ],
)
def test_invalid_graph_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str, message: str) -> None:
    path = onnx_samples.write(_invalid_model(change), tmp_path / "broken.onnx")
    error = _load_error(path)
    assert message in error.message
    assert "broken.onnx" in error.message
    assert not caplog.records


def test_names_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    content = onnx_samples.linear().SerializeToString().replace(b"\x02\x01h", b"\x02\x01\xff").replace(b"\x01h", b"\x01\xff")
    (tmp_path / "m.onnx").write_bytes(content)
    assert "UTF-8" in _load_error(tmp_path / "m.onnx").message


@pytest.mark.parametrize("text", [b"linear", b"MatMul"])
def test_every_text_that_is_not_utf8_is_refused(tmp_path: Path, text: bytes) -> None:
    content = onnx_samples.linear().SerializeToString()
    (tmp_path / "m.onnx").write_bytes(content.replace(bytes([len(text)]) + text, bytes([len(text)]) + b"\xff" * len(text)))
    assert "UTF-8" in _load_error(tmp_path / "m.onnx").message


def test_file_change_after_loading_is_detected(tmp_path: Path) -> None:
    path = onnx_samples.write_external(tmp_path / "m.onnx")
    tensor = _weight(load(path), "w")
    os.utime(tmp_path / "data.bin", ns=(1, 1))
    with pytest.raises(ModelError, match="changed since the model was loaded"):
        tensor.tobytes()
    (tmp_path / "data.bin").unlink()
    with pytest.raises(ModelError, match="cannot read .*data.bin. after the model was loaded"):
        tensor.numpy()
