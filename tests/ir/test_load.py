"""Loading: every kind of ONNX file is read, its weights stay where they are, and what is damaged is refused by name."""

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


def _refusal(path: Path | str) -> ModelError:
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
    ids=["branches", "old", "words"],
)
def test_subgraphs_functions_strings_sequences_and_old_opsets_are_read(tmp_path: Path, text: str) -> None:
    proto = onnx_samples.model(text)
    model = load(onnx_samples.write(proto, tmp_path / "model.onnx"))
    assert [node.op_type for node in model.graph] == [node.op_type for node in proto.graph.node]
    assert len(model.functions) == len(proto.functions)
    assert model.opset_imports == {opset.domain: opset.version for opset in proto.opset_import}
    assert [value.name for value in model.graph.outputs] == [value.name for value in proto.graph.output]


@pytest.mark.parametrize("name", ["with space.onnx", "Mödell 模型.onnx", "two\nlines.onnx", "no suffix"])
def test_any_file_name_is_read(tmp_path: Path, name: str) -> None:
    inside = load(onnx_samples.write(onnx_samples.linear(), tmp_path / name))
    outside = load(onnx_samples.write_external(tmp_path / "sub dir\n2" / name, data=f"{name} dätä\n.bin"))
    for weight, value in onnx_samples.linear_weights().items():
        np.testing.assert_array_equal(_weight(inside, weight).numpy(), value)
        np.testing.assert_array_equal(_weight(outside, weight).numpy(), value)


def test_large_weights_stay_in_the_file_and_small_ones_are_read(tmp_path: Path) -> None:
    model = load(onnx_samples.write(onnx_samples.linear(), tmp_path / "model.onnx"))
    large = _weight(model, "w")
    assert isinstance(large, FileTensor)
    assert (tmp_path / "model.onnx").read_bytes()[large.offset : large.offset + large.nbytes] == large.tobytes()
    assert not isinstance(_weight(model, "b"), FileTensor)


@pytest.mark.parametrize("count", [300, 300_000], ids=["read", "mapped"])
def test_values_in_a_file_are_those_that_were_written(tmp_path: Path, count: int) -> None:
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
def test_every_element_type_is_read_from_the_file_as_from_memory(tmp_path: Path, element: str) -> None:
    raw = bytes(range(2)) * 2048 if element == "BOOL" else bytes(range(256)) * 16
    kind = ir.DataType[element]
    dims = [len(raw) * 8 // kind.bitwidth]
    proto = onnx_samples.model('<ir_version: 10, opset_import: ["" : 21]> g (int64 x) => (int64 y) { y = Identity (x) }')
    proto.graph.initializer.append(onnx.TensorProto(name="w", data_type=kind.value, dims=dims, raw_data=raw))
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
    found = [node for node in model.graph.all_nodes() if node.op_type == "Constant" and node.outputs[0].name != "one"]
    assert len(found) == 2
    for node in found:
        assert isinstance(node.attributes["value"].value, FileTensor)
        np.testing.assert_array_equal(node.attributes["value"].value.numpy(), value)


def test_nodes_out_of_order_are_put_in_order(tmp_path: Path) -> None:
    proto = onnx_samples.linear()
    proto.graph.node.reverse()
    assert [node.op_type for node in load(onnx_samples.write(proto, tmp_path / "m.onnx")).graph] == ["MatMul", "Add"]


def test_weights_that_share_all_their_bytes_are_read(tmp_path: Path) -> None:
    path = onnx_samples.write_external(tmp_path / "m.onnx")
    proto = onnx.load(path, load_external_data=False)
    tied = proto.graph.initializer.add()
    tied.CopyFrom(proto.graph.initializer[0])
    tied.name = "tied"
    assert _weight(load(onnx_samples.write(proto, path)), "tied").tobytes() == onnx_samples.linear_weights()["w"].tobytes()


def test_a_model_and_its_data_behind_links_of_a_download_cache_are_read(tmp_path: Path) -> None:
    onnx_samples.write_external(tmp_path / "blobs" / "model")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.onnx").symlink_to("../blobs/model")
    (tmp_path / "snapshot" / "data.bin").symlink_to("../blobs/data.bin")
    assert _weight(load(tmp_path / "snapshot" / "model.onnx"), "b").tobytes() == onnx_samples.linear_weights()["b"].tobytes()


def test_external_data_without_length_is_read_by_the_shape(tmp_path: Path) -> None:
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
def test_loading_takes_no_memory_for_weights(tmp_path: Path, external: bool) -> None:
    """A weight of 1.5 GB inside, or of 6 GB outside: both files have a hole where its bytes are."""
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
    done = subprocess.run([sys.executable, "-c", _MEASURE, path], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert after - before < 20


def _write_with_hole(path: Path, proto: onnx.ModelProto, weight: onnx.TensorProto, size: int) -> None:
    """Append to the graph a weight with `size` zeros as raw data, by hand."""

    def number(value: int) -> bytes:
        return number_head(value) if value > 127 else bytes([value])

    def number_head(value: int) -> bytes:
        return bytes([value & 127 | 128]) + number(value >> 7)

    head = weight.SerializeToString() + b"\x4a" + number(size)
    head = b"\x2a" + number(len(head) + size) + head
    head = b"\x3a" + number(len(head) + size) + head
    whole = proto.SerializeToString() + head
    path.write_bytes(whole)
    os.truncate(path, len(whole) + size)


def test_a_path_that_is_no_model_is_refused(tmp_path: Path) -> None:
    assert "No such file" in _refusal(tmp_path / "missing.onnx").message
    assert "is a folder" in _refusal(tmp_path).message
    assert "null" in _refusal("nul\0byte.onnx").message
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in _refusal(tmp_path / "pipe").message
    (tmp_path / "empty.onnx").touch()
    assert "is empty" in _refusal(tmp_path / "empty.onnx").message


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
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    assert "is not an ONNX file, or not all of it" in _refusal(tmp_path / "m.onnx").message


def test_a_git_lfs_pointer_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    assert _refusal(tmp_path / "m.onnx").hint == "run `git lfs pull`"


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = onnx_samples.linear().SerializeToString()
    for length in [*range(1, 40), *range(len(whole) - 40, len(whole)), *range(40, len(whole), 97)]:
        (tmp_path / "m.onnx").write_bytes(whole[:length])
        _refusal(tmp_path / "m.onnx")


def test_messages_nested_without_end_are_refused(tmp_path: Path) -> None:
    graph = helper.make_graph([], "g", [], [helper.make_tensor_value_info("y", 1, [1])], doc_string="long" * 9999)
    inner = graph.SerializeToString()

    def field(number: int, body: bytes) -> bytes:
        size, spelt = len(body), b""
        while size > 127:
            spelt, size = spelt + bytes([size & 127 | 128]), size >> 7
        return bytes([number << 3 | 2]) + spelt + bytes([size]) + body

    for _ in range(2000):
        inner = field(1, field(5, field(6, inner)))
    (tmp_path / "m.onnx").write_bytes(b"\x08\x0a" + field(7, inner) + b"\x42\x02\x10\x15")
    _refusal(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"location": "/etc/passwd"}, "outside of the model's folder"),
        ({"location": "../secret.bin"}, "outside of the model's folder"),
        ({"location": "sub/../../secret.bin"}, "outside of the model's folder"),
        ({"location": "..\\secret.bin"}, "outside of the model's folder"),
        ({"location": "link.bin"}, "a link that leaves the model's folder"),
        ({"location": "linked/secret.bin"}, "a link that leaves the model's folder"),
        ({"location": "missing.bin"}, "No such file"),
        ({"location": "data.bin/deeper"}, "Not a directory"),
        ({"location": "folder"}, "not a regular file"),
        ({"location": ""}, "does not say which file"),
        ({"location": None}, "does not say which file"),
        ({"location": "a\0b"}, "does not say which file"),
        ({"location": "\0weight 0"}, "does not say which file"),
        ({"location": "x" * 300}, "name too long"),
        ({"offset": "-4"}, "is no number of bytes"),
        ({"offset": "１"}, "is no number of bytes"),
        ({"length": "1e3"}, "is no number of bytes"),
        ({"length": "9" * 30}, "is no number of bytes"),
        ({"length": 8191}, "8192 bytes, it has 8191"),
        ({"length": 0}, "8192 bytes, it has 0"),
        ({"offset": 129}, "which has 8320"),
        ({"offset": 2**62}, "which has 8320"),
        ({"offset": 64}, "overlap"),
    ],
)
def test_external_data_that_lies_is_refused(tmp_path: Path, entries: dict[str, object], says: str) -> None:
    folder = tmp_path / "model"
    path = onnx_samples.write_external(folder / "m.onnx", w=entries)
    (tmp_path / "secret.bin").write_bytes(bytes(9000))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    (folder / "linked").symlink_to(tmp_path)
    (folder / "folder").mkdir()
    refusal = _refusal(path)
    assert says in refusal.message
    assert "secret" in refusal.message or "`w`" in refusal.message


def test_data_cut_short_is_refused(tmp_path: Path) -> None:
    path = onnx_samples.write_external(tmp_path / "m.onnx")
    os.truncate(tmp_path / "data.bin", 8319)
    assert "tensor `b` lies in bytes 8192 to 8320" in _refusal(path).message


def test_data_inside_and_outside_at_once_is_refused(tmp_path: Path) -> None:
    path = onnx_samples.write_external(tmp_path / "m.onnx")
    proto = onnx.load(path, load_external_data=False)
    proto.graph.initializer[0].raw_data = bytes(8192)
    assert "refers to another file too" in _refusal(onnx_samples.write(proto, path)).message


def _float_tensor(**fields: object) -> onnx.TensorProto:
    return onnx.TensorProto(**{"name": "w", "data_type": 1, "dims": [2]} | fields)


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (_float_tensor(raw_data=bytes(4)), "that is 8 bytes, it has 4"),
        (_float_tensor(dims=[1000], raw_data=bytes(3996)), "that is 4000 bytes, it has 3996"),
        (_float_tensor(float_data=[1.0]), "that is 2 values, it has 1"),
        (_float_tensor(int32_data=[1, 2]), "its values are not of its type"),
        (_float_tensor(dims=[-2], raw_data=bytes(8)), "cannot have the shape"),
        (_float_tensor(dims=[-1000, -1], raw_data=bytes(4000)), "cannot have the shape"),
        (_float_tensor(dims=[2**62] * 100), "cannot have the shape"),
        (_float_tensor(dims=[2**62, 2**62], raw_data=bytes(2000)), "it has 2000"),
        (_float_tensor(data_type=0, raw_data=bytes(8)), "has no type"),
        (_float_tensor(data_type=99, raw_data=bytes(8)), "99"),
        (_float_tensor(data_type=8, string_data=[b"a"]), "that is 2 strings, it has 1"),
        (_float_tensor(data_type=8, dims=[2000], raw_data=bytes(2000)), "string"),
        (_float_tensor(data_location=1), "does not say which file"),
    ],
)
def test_a_tensor_whose_values_do_not_fit_its_shape_is_refused(tmp_path: Path, tensor: onnx.TensorProto, says: str) -> None:
    proto = onnx_samples.model('<ir_version: 10, opset_import: ["" : 21]> g (float[2] x) => (float[2] y) { y = Add (x, w) }')
    proto.graph.initializer.append(tensor)
    assert says in _refusal(onnx_samples.write(proto, tmp_path / "initialiser.onnx")).message
    proto.graph.initializer.pop()
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=tensor))
    assert says in _refusal(onnx_samples.write(proto, tmp_path / "constant.onnx")).message


def _break(change: str) -> onnx.ModelProto:
    proto = onnx_samples.linear()
    graph = proto.graph
    if change == "dangling":
        graph.node[0].input[1] = "nowhere"
    elif change == "circle":
        graph.node[0].input[0] = "y"
    elif change == "no outputs":
        del graph.output[:]
    elif change == "unmade output":
        graph.output[0].name = "z"
    elif change == "twice":
        graph.node[1].output[0] = "h"
    elif change == "two weights":
        graph.initializer.append(graph.initializer[1])
    elif change == "two inputs":
        graph.input.append(graph.input[0])
    elif change == "sparse":
        graph.sparse_initializer.add().values.name = "s"
    elif change == "map":
        graph.input[0].type.map_type.key_type = 7
    elif change == "untyped attribute":
        graph.node[0].attribute.add(name="axis")
    return proto


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("dangling", "node `m` (MatMul) reads `nowhere`, which nothing produces"),
        ("circle", "wait for each other in a circle"),
        ("no outputs", "has no outputs"),
        ("unmade output", "nothing produces the output `z`"),
        ("twice", "redeclared"),
        ("two weights", "2 initialisers called `b`"),
        ("two inputs", "2 inputs called `x`"),
        ("sparse", "sparse"),
        ("map", "Map types are not supported"),
        ("untyped attribute", "attribute `axis` of node `m` has no type"),
    ],
)
def test_a_graph_that_cannot_run_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str, says: str) -> None:
    path = onnx_samples.write(_break(change), tmp_path / "broken.onnx")
    refusal = _refusal(path)
    assert says in refusal.message
    assert "broken.onnx" in refusal.message
    assert not caplog.records


def test_names_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    content = onnx_samples.linear().SerializeToString().replace(b"\x02\x01h", b"\x02\x01\xff").replace(b"\x01h", b"\x01\xff")
    (tmp_path / "m.onnx").write_bytes(content)
    assert "UTF-8" in _refusal(tmp_path / "m.onnx").message


def test_a_file_that_changes_after_loading_is_noticed(tmp_path: Path) -> None:
    path = onnx_samples.write_external(tmp_path / "m.onnx")
    tensor = _weight(load(path), "w")
    os.utime(tmp_path / "data.bin", ns=(1, 1))
    with pytest.raises(ModelError, match="changed since the model was loaded"):
        tensor.tobytes()
    (tmp_path / "data.bin").unlink()
    with pytest.raises(ModelError, match="cannot be read any more"):
        tensor.numpy()
