"""Tests of model fingerprints and file digests."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper
from support import onnx_samples

from ryzen_compile.errors import ModelError
from ryzen_compile.ir.fingerprint import file_digest_hex, fingerprint
from ryzen_compile.ir.load import load
from ryzen_compile.ir.save import save, save_to_store

Edit = Callable[[onnx.ModelProto], object]

MANY_FEATURES = """
<ir_version: 10, opset_import: ["" : 21, "custom" : 1, "local" : 1]>
many (float[N, 8] x, bool c) => (float[N, 8] y, float[N, 4] z)
<float[8] w = {1, 2, 3, 4, 5, 6, 7, 8}, float[8] v = {8, 7, 6, 5, 4, 3, 2, 1}>
{
   a, b = Split <axis = 1, num_outputs = 2> (x)
   k = Constant <value = float[4] {1, 2, 3, 4}> ()
   s = Sub (a, b)
   e = Mul (s, k)
   z = Add (e, a)
   l = Clip (x, , w)
   f = local.Scaled <alpha = 2.0> (l)
   d = Mul (f, v)
   y = If (c) <
      then_branch = yes () => (float[N, 8] yes_out) { p = Add (d, w)  yes_out = Sub (p, x) },
      else_branch = no () => (float[N, 8] no_out) { no_out = custom.Op (d, x) }
   >
}
<domain: "local", opset_import: ["" : 21]>
Scaled <alpha> (t) => (u) { m = Constant <value_float: float = @alpha> ()  u = Mul (t, m) }
"""


def _fingerprint_of_proto(proto: onnx.ModelProto) -> str:
    return fingerprint(ir.serde.deserialize_model(proto))


def _fingerprint_after_edit(edit: Edit, text: str = MANY_FEATURES) -> str:
    proto = onnx.parser.parse_model(text)
    edit(proto)
    return _fingerprint_of_proto(proto)


def _rename_inner_names(proto: onnx.ModelProto) -> None:
    """Rename every inner value and every node."""
    fixed_names = {value.name for value in (*proto.graph.input, *proto.graph.output)} | {""}

    def new_name(name: str) -> str:
        return name if name in fixed_names else f"{name}.renamed"

    def rename_graph(graph_proto: onnx.GraphProto) -> None:
        for tensor in graph_proto.initializer:
            tensor.name = new_name(tensor.name)
        for value in graph_proto.output:
            value.name = new_name(value.name)
        for index, node in enumerate(graph_proto.node):
            node.name = f"node {index}"
            node.input[:] = map(new_name, node.input)
            node.output[:] = map(new_name, node.output)
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    rename_graph(attribute.g)

    rename_graph(proto.graph)
    fixed_names.clear()
    fixed_names.add("")
    for node in proto.functions[0].node:
        node.input[:] = map(new_name, node.input)
        node.output[:] = map(new_name, node.output)
    proto.functions[0].input[:] = map(new_name, proto.functions[0].input)
    proto.functions[0].output[:] = map(new_name, proto.functions[0].output)


def _change_documentation(proto: onnx.ModelProto) -> None:
    proto.doc_string, proto.producer_name, proto.model_version, proto.ir_version = "words", "somebody", 7, 11
    proto.graph.doc_string = proto.graph.node[0].doc_string = "words"
    proto.metadata_props.add(key="k", value="v")
    proto.graph.node[0].metadata_props.add(key="k", value="v")
    proto.graph.name = "other"


def _add_unused_values(proto: onnx.ModelProto) -> None:
    proto.graph.node.append(helper.make_node("Abs", ["x"], ["unneeded"]))
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(3), "unneeded too"))
    proto.graph.value_info.append(helper.make_tensor_value_info("l", 1, ["N", 8]))


def _reorder(proto: onnx.ModelProto) -> None:
    proto.graph.node.reverse()
    proto.graph.initializer.reverse()
    for node in proto.graph.node:
        node.attribute.reverse()


def _convert_to_raw_data(proto: onnx.ModelProto) -> None:
    for index, tensor in enumerate(proto.graph.initializer):
        proto.graph.initializer[index].CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))


def _convert_constant_to_initializer(proto: onnx.ModelProto) -> None:
    constant = proto.graph.node.pop(1)
    constant.attribute[0].t.name = "k"
    proto.graph.initializer.append(constant.attribute[0].t)


@pytest.mark.parametrize(
    "edit",
    [
        _rename_inner_names,
        _change_documentation,
        _add_unused_values,
        _reorder,
        _convert_to_raw_data,
        _convert_constant_to_initializer,
    ],
)
def test_semantically_neutral_edits_keep_the_fingerprint(edit: Edit) -> None:
    assert _fingerprint_after_edit(edit) == _fingerprint_after_edit(lambda _: None)


def _node(proto: onnx.ModelProto, op_type: str) -> onnx.NodeProto:
    return next(node for node in proto.graph.node if node.op_type == op_type)


def _branch(proto: onnx.ModelProto, index: int) -> onnx.GraphProto:
    return _node(proto, "If").attribute[index].g


CHANGES: dict[str, Edit] = {
    "op": lambda proto: setattr(_node(proto, "Sub"), "op_type", "Add"),
    "domain": lambda proto: setattr(_node(proto, "Sub"), "domain", "custom"),
    "opset": lambda proto: setattr(proto.opset_import[0], "version", 20),
    "custom opset": lambda proto: setattr(proto.opset_import[1], "version", 2),
    "attribute": lambda proto: setattr(_node(proto, "Split").attribute[0], "i", 0),
    "attribute's name": lambda proto: setattr(_node(proto, "Split").attribute[0], "name", "axes"),
    "swapped inputs": lambda proto: _node(proto, "Sub").input.reverse(),
    "swapped outputs": lambda proto: _node(proto, "Split").output.reverse(),
    "missing input": lambda proto: _node(proto, "Clip").input.__setitem__(slice(None), ["x", "w"]),
    "output left out": lambda proto: _node(proto, "Split").output.append("third"),
    "weight": lambda proto: proto.graph.initializer[0].float_data.__setitem__(7, 8.5),
    "weight's type": lambda proto: proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.arange(1, 9), "w")),
    "weight's shape": lambda proto: proto.graph.initializer[0].dims.insert(0, 1),
    "other weight": lambda proto: _node(proto, "Mul").input.__setitem__(1, "b"),
    "swapped weights": lambda proto: (
        setattr(proto.graph.initializer[0], "name", "v"),
        setattr(proto.graph.initializer[1], "name", "w"),
    ),
    "constant": lambda proto: _node(proto, "Constant").attribute[0].t.float_data.__setitem__(0, -1.0),
    "input's name": lambda proto: (setattr(proto.graph.input[1], "name", "d2"), _node(proto, "If").input.__setitem__(0, "d2")),
    "input's type": lambda proto: setattr(proto.graph.input[0].type.tensor_type, "elem_type", 10),
    "input's shape": lambda proto: setattr(proto.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", 3),
    "name of a dimension": lambda proto: setattr(proto.graph.input[0].type.tensor_type.shape.dim[0], "dim_param", "M"),
    "order of inputs": lambda proto: proto.graph.input.reverse(),
    "order of outputs": lambda proto: proto.graph.output.reverse(),
    "fewer outputs": lambda proto: proto.graph.output.pop(),
    "one more input": lambda proto: proto.graph.input.append(helper.make_tensor_value_info("more", 1, [1])),
    "swapped branches": lambda proto: [
        setattr(attribute, "name", name)
        for attribute, name in zip(_node(proto, "If").attribute, ("else_branch", "then_branch"), strict=True)
    ],
    "op in a branch": lambda proto: setattr(_branch(proto, 0).node[0], "op_type", "Div"),
    "outer value in a branch": lambda proto: _branch(proto, 0).node[0].input.__setitem__(0, "l"),
    "outer weight in a branch": lambda proto: _branch(proto, 0).node[0].input.__setitem__(1, "v"),
    "function's body": lambda proto: setattr(proto.functions[0].node[1], "op_type", "Div"),
    "function's opset": lambda proto: setattr(proto.functions[0].opset_import[0], "version", 20),
    "function's parameter": lambda proto: setattr(_node(proto, "Scaled").attribute[0], "f", 3.0),
    "function's reference": lambda proto: setattr(proto.functions[0].node[0].attribute[0], "ref_attr_name", "beta"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_semantic_edits_change_the_fingerprint(change: str) -> None:
    assert _fingerprint_after_edit(CHANGES[change]) != _fingerprint_after_edit(lambda _: None)


def test_all_semantic_edits_have_different_fingerprints() -> None:
    assert len({_fingerprint_after_edit(edit) for edit in CHANGES.values()}) == len(CHANGES)


def _fingerprint_of_body(body: str) -> str:
    return _fingerprint_of_proto(
        onnx.parser.parse_model(
            f'<ir_version: 10, opset_import: ["" : 21, "c" : 1]> g (float[2] x) => (float[2] y) {{ {body} }}'
        )
    )


def test_equal_nodes_are_merged_but_random_draws_are_not() -> None:
    assert _fingerprint_of_body("a = Exp (x)  b = Exp (x)  y = Mul (a, b)") == _fingerprint_of_body(
        "a = Exp (x)  y = Mul (a, a)"
    )
    two_draws = "a = RandomNormalLike (x)  b = RandomNormalLike (x)  y = Sub (a, b)"
    assert _fingerprint_of_body(two_draws) != _fingerprint_of_body("a = RandomNormalLike (x)  y = Sub (a, a)")
    assert _fingerprint_of_body(two_draws) == _fingerprint_of_body(
        "b = RandomNormalLike (x)  a = RandomNormalLike (x)  y = Sub (a, b)"
    )
    assert _fingerprint_of_body("a = c.Draw (x)  b = c.Draw (x)  y = Sub (a, b)") != _fingerprint_of_body(
        "a = c.Draw (x)  y = Sub (a, a)"
    )


def test_inputs_of_nested_loops_are_distinguished() -> None:
    def nested(read: str) -> str:
        return f"""
        n = Constant <value = int64 {{3}}> ()
        t = Constant <value = bool {{1}}> ()
        y = Loop (n, t, x) <body = outer (int64 i, bool c, float[2] s) => (bool oc, float[2] os) {{
            oc = Identity (c)
            os = Loop (n, t, s) <body = inner (int64 j, bool d, float[2] r) => (bool ic, float[2] is) {{
                ic = Identity (d)
                f = Cast <to = 1> ({read})
                is = Add (r, f)
            }}>
        }}>
        """

    assert _fingerprint_of_body(nested("i")) != _fingerprint_of_body(nested("j"))


def test_fingerprint_is_independent_of_weight_storage(tmp_path: Path) -> None:
    inline = load(onnx_samples.write(onnx_samples.linear(), tmp_path / "inline.onnx"))
    expected = fingerprint(inline)
    assert fingerprint(load(onnx_samples.write_external(tmp_path / "external.onnx"))) == expected
    save(inline, tmp_path / "saved.onnx", weights="external")
    assert fingerprint(load(tmp_path / "saved.onnx")) == expected
    save_to_store(inline, tmp_path / "stored.onnx", tmp_path / "weights", threshold_bytes=1)
    assert fingerprint(load(tmp_path / "stored.onnx")) == expected
    inline.graph.initializers["w"].const_value = ir.Tensor(onnx_samples.linear_weights()["w"])
    assert fingerprint(inline) == expected
    assert (
        fingerprint(
            load(
                onnx_samples.write(onnx_samples.model(onnx_samples.LINEAR, onnx_samples.linear_weights(1)), tmp_path / "o.onnx")
            )
        )
        != expected
    )


def test_attributes_that_are_equal_in_float32_are_equal(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 21]> g (float[2] x) => (float[2] y) { y = Elu (x) }')
    model = ir.serde.deserialize_model(proto)
    model.graph.node(0).attributes["alpha"] = ir.AttrFloat32("alpha", 1e-5)
    save(model, tmp_path / "m.onnx")
    assert fingerprint(load(tmp_path / "m.onnx")) == fingerprint(model)


def _subgraph(op_type: str, size: int) -> onnx.GraphProto:
    value = numpy_helper.from_array(np.zeros(size, np.float32), "big")
    constant = helper.make_node("Constant", [], ["c"], value=value)
    return helper.make_graph(
        [constant, helper.make_node(op_type, ["c"], ["o"])], "s", [], [helper.make_tensor_value_info("o", 1, [size])]
    )


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (1, 2),
        (1.0, 2.0),
        (1, 1.0),
        ("a", "b"),
        (b"\xff", b"\xfe"),
        ([1, 2], [2, 1]),
        ([1.0], [1.5]),
        (["a", "b"], ["ab"]),
        (numpy_helper.from_array(np.arange(3)), numpy_helper.from_array(np.arange(4))),
        ([numpy_helper.from_array(np.arange(999))] * 2, [numpy_helper.from_array(np.arange(999))]),
        (_subgraph("Abs", 9999), _subgraph("Neg", 9999)),
        ([_subgraph("Abs", 9), _subgraph("Neg", 9)], [_subgraph("Neg", 9), _subgraph("Abs", 9)]),
        (helper.make_tensor_type_proto(1, [2]), helper.make_tensor_type_proto(1, [3])),
        ([helper.make_tensor_type_proto(1, [2])], [helper.make_tensor_type_proto(2, [2])]),
    ],
    ids=str,
)
def test_every_attribute_type_affects_the_fingerprint_and_survives_saving(
    tmp_path: Path, first: object, second: object
) -> None:
    fingerprints = []
    for value in (first, second):
        proto = onnx.parser.parse_model(
            '<ir_version: 10, opset_import: ["c" : 1, "" : 21]> g (float[2] x) => (float[2] y) { y = c.Op (x) }'
        )
        proto.graph.node[0].attribute.append(helper.make_attribute("a", value))
        model = load(onnx_samples.write(proto, tmp_path / "m.onnx"))
        fingerprints.append(fingerprint(model))
        for weights in ("inline", "external"):
            save(model, tmp_path / "n.onnx", weights=weights)
            assert fingerprint(load(tmp_path / "n.onnx")) == fingerprints[-1]
    assert fingerprints[0] != fingerprints[1]


def test_string_tensors_are_distinguished() -> None:
    def fingerprint_of(*texts: str) -> str:
        proto = onnx_samples.model(onnx_samples.STRINGS_AND_SEQUENCES)
        proto.graph.initializer[0].CopyFrom(helper.make_tensor("tail", 8, [len(texts)], texts))
        return _fingerprint_of_proto(proto)

    assert fingerprint_of("ab", "c") != fingerprint_of("a", "bc")
    assert fingerprint_of("é") != fingerprint_of("e")


def test_shared_weight_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ryzen_compile.ir.weight_files import WeightFile

    proto = onnx_samples.model(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (float[N, 64] x) => (float[N, 32] y) { a = MatMul (x, w)  b = MatMul (x, t)  y = Sub (a, b) }"""
    )
    for name in "wt":
        tensor = onnx.TensorProto(name=name, data_type=1, dims=[64, 32], data_location=onnx.TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="data.bin")
        proto.graph.initializer.append(tensor)
    (tmp_path / "data.bin").write_bytes(onnx_samples.linear_weights()["w"].tobytes())
    model = load(onnx_samples.write(proto, tmp_path / "m.onnx"))
    reads = []
    chunks = WeightFile.chunks

    def recording_chunks(self: WeightFile, offset: int, length: int) -> object:
        reads.append((offset, length))
        return chunks(self, offset, length)

    monkeypatch.setattr(WeightFile, "chunks", recording_chunks)
    fingerprint(model)
    fingerprint(model)
    assert reads == [(0, 8192)]


def test_value_without_producer_or_with_cyclic_dependency_is_refused() -> None:
    proto = onnx_samples.linear()
    proto.graph.node[0].input[0] = "y"
    with pytest.raises(ModelError, match="depends on its own output"):
        _fingerprint_of_proto(proto)
    del proto.graph.node[1:]
    with pytest.raises(ModelError, match="value `y` has no producer"):
        _fingerprint_of_proto(proto)


def test_functions_that_call_each_other_in_a_cycle_are_refused() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 21, "f" : 1]> g (float[2] x) => (float[2] y) { y = f.A (x) }
    <domain: "f", opset_import: ["" : 21, "f" : 1]> A (x) => (y) { y = f.B (x) }
    <domain: "f", opset_import: ["" : 21, "f" : 1]> B (x) => (y) { y = f.A (x) }
    """
    with pytest.raises(ModelError, match="in a cycle"):
        _fingerprint_of_proto(onnx.parser.parse_model(text))


def test_long_chains_take_linear_time_without_recursion() -> None:
    def chain(length: int) -> ir.Model:
        values = [ir.val("x", ir.DataType.FLOAT, [1])]
        nodes = []
        for _ in range(length):
            nodes.append(ir.node("Add", [values[-1], values[-1]]))
            values.append(nodes[-1].outputs[0])
        values[-1].type, values[-1].shape = values[0].type, values[0].shape
        return ir.Model(ir.Graph(values[:1], values[-1:], nodes=nodes, opset_imports={"": 21}), ir_version=10)

    def seconds(model: ir.Model) -> float:
        durations = []
        for _ in range(3):
            started = time.process_time()
            fingerprint(model)
            durations.append(time.process_time() - started)
        return min(durations)

    assert seconds(chain(20_000)) < 20 * seconds(chain(2_000))


def test_file_digest_distinguishes_files_and_covers_external_data(tmp_path: Path) -> None:
    inline = onnx_samples.write(onnx_samples.linear(), tmp_path / "inline.onnx")
    assert file_digest_hex(inline) == file_digest_hex(onnx_samples.write(onnx_samples.linear(), tmp_path / "copy.onnx"))
    path = onnx_samples.write_external(tmp_path / "m.onnx", b={"length": None})
    expected = file_digest_hex(path)
    assert expected != file_digest_hex(inline)
    content = (tmp_path / "data.bin").read_bytes()
    for offset in (0, 8191, 8192, 8319):
        (tmp_path / "data.bin").write_bytes(content[:offset] + bytes([content[offset] ^ 1]) + content[offset + 1 :])
        assert file_digest_hex(path) != expected
    (tmp_path / "data.bin").write_bytes(content)
    assert file_digest_hex(path) == expected


def test_file_digest_covers_external_data_of_subgraphs_and_constants(tmp_path: Path) -> None:
    external_tensor = onnx.TensorProto(name="one", data_type=1, data_location=onnx.TensorProto.EXTERNAL)
    external_tensor.external_data.add(key="location", value="one.bin")
    in_constant, in_branch = onnx_samples.model(onnx_samples.BRANCHES), onnx_samples.model(onnx_samples.BRANCHES)
    in_constant.graph.node[0].attribute[0].t.CopyFrom(external_tensor)
    branch = next(node for node in in_branch.graph.node if node.op_type == "If").attribute[0].g
    external_tensor.name = branch.node[0].input[1] = "own"
    branch.initializer.append(external_tensor)
    for name, proto in (("constant.onnx", in_constant), ("branch.onnx", in_branch)):
        path = onnx_samples.write(proto, tmp_path / name)
        (tmp_path / "one.bin").write_bytes(np.float32(1).tobytes())
        first_digest, first_fingerprint = file_digest_hex(path), fingerprint(load(path))
        (tmp_path / "one.bin").write_bytes(np.float32(2).tobytes())
        assert file_digest_hex(path) != first_digest
        assert fingerprint(load(path)) != first_fingerprint


def test_file_digest_refuses_invalid_external_data_and_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="outside the model's folder"):
        file_digest_hex(onnx_samples.write_external(tmp_path / "m.onnx", w={"location": "../x"}))
    with pytest.raises(ModelError, match="beyond the end"):
        file_digest_hex(onnx_samples.write_external(tmp_path / "m.onnx", w={"offset": 200}))
    with pytest.raises(ModelError, match="beyond the end"):
        file_digest_hex(onnx_samples.write_external(tmp_path / "m.onnx", w={"offset": 9000, "length": None}))
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(ModelError, match="not an ONNX file"):
        file_digest_hex(tmp_path / "m.onnx")


def test_file_digest_imports_no_onnx_library(tmp_path: Path) -> None:
    path = onnx_samples.write_external(tmp_path / "m.onnx")
    code = (
        "import sys; from ryzen_compile.ir.fingerprint import file_digest_hex; file_digest_hex(sys.argv[1]);"
        "print(sorted({'onnx', 'onnx_ir', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True).stdout.strip() == "[]"
