"""Tests of the checks of a loaded model: types, op schemas, and the size of functions."""

from __future__ import annotations

import time
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from support import onnx_samples

from ryzen_compile.errors import ModelError
from ryzen_compile.ir.graph_checks import MAX_CALL_DEPTH, MAX_INLINED_NODES, make_node_names_unique
from ryzen_compile.ir.load import load


def load_error(proto: onnx.ModelProto, folder: Path) -> ModelError:
    with pytest.raises(ModelError) as caught:
        load(onnx_samples.write(proto, folder / "m.onnx"))
    assert "m.onnx`: " in caught.value.message
    assert caught.value.hint
    return caught.value


def one_node(node: onnx.NodeProto, *, opset: int = 21) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    inputs = [value(name, TensorProto.FLOAT, ["N", 4]) for name in dict.fromkeys(node.input) if name]
    outputs = [value(name, TensorProto.FLOAT, None) for name in node.output]
    graph = helper.make_graph([node], "one", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def with_wrong_type() -> onnx.NodeProto:
    node = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)
    node.attribute[0].CopyFrom(helper.make_attribute("to", helper.make_tensor_type_proto(TensorProto.FLOAT, [])))
    return node


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (with_wrong_type(), "the Cast of `y` has attribute `to` of type TYPE_PROTO (must be INT) in opset 21"),
        (helper.make_node("Cast", ["x"], ["y"], name="c"), "node `c` (Cast) lacks attribute `to`, which is required"),
        (helper.make_node("Add", ["x"], ["y"]), "the Add of `y` has 1 inputs (allowed: 2)"),
        (helper.make_node("Add", ["x", ""], ["y"]), "the Add of `y` lacks input 1, which is required"),
        (helper.make_node("Clip", ["x", "", "", "x"], ["y"]), "has 4 inputs (allowed: 1 to 3)"),
        (helper.make_node("Concat", [], ["y"], axis=0), "has 0 inputs (allowed: 1 or more)"),
        (helper.make_node("Relu", ["x"], ["y", "z"]), "has 2 outputs (allowed: 1)"),
        (helper.make_node("Softmax", ["x"], ["y"], axes=[1]), "has the unknown attribute `axes`"),
    ],
)
def test_node_that_does_not_match_its_schema_is_refused(tmp_path: Path, node: onnx.NodeProto, message: str) -> None:
    assert message in load_error(one_node(node), tmp_path).message


def test_attribute_that_an_older_opset_has_is_allowed_there(tmp_path: Path) -> None:
    mean = helper.make_node("ReduceMean", ["x"], ["y"], axes=[1])
    load(onnx_samples.write(one_node(mean, opset=17), tmp_path / "old.onnx"))
    assert "has the unknown attribute `axes`" in load_error(one_node(mean, opset=18), tmp_path).message


def test_optional_input_before_required_ones_may_be_omitted(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model("""
        <ir_version: 3, opset_import: ["" : 8]>
        g (float[B, 2] start, float[B, N, 2] x) => (float[B, 2] last) {
           last = Scan <num_scan_inputs = 1, body = b (float[2] s, float[2] e) => (float[2] t) { t = Add (s, e) }> (, start, x)
        }""")
    assert list(proto.graph.node[0].input) == ["", "start", "x"]
    load(onnx_samples.write(proto, tmp_path / "m.onnx"))


@pytest.mark.parametrize("version", [0, -1, 2**31, 2**62])
def test_invalid_opset_version_is_refused(tmp_path: Path, version: int) -> None:
    error = load_error(one_node(helper.make_node("Relu", ["x"], ["y"]), opset=version), tmp_path)
    assert f"the opset version {version} of domain `` is invalid" in error.message


def test_standard_ops_without_their_opset_are_refused(tmp_path: Path) -> None:
    proto = one_node(helper.make_node("Elu", ["x"], ["y"]))
    proto.opset_import[0].domain = "other"
    assert "the model imports no opset of the standard ops" in load_error(proto, tmp_path).message


@pytest.mark.parametrize("field", ["opset_import.domain", "graph.name", "node.name", "node.op_type"])
def test_names_that_are_not_utf8_are_refused(tmp_path: Path, field: str) -> None:
    proto = one_node(helper.make_node("Elu", ["x"], ["y"], alpha=0.5, name="marked name"))
    proto.opset_import.append(helper.make_opsetid("marked domain", 1))
    proto.graph.name = "marked graph"
    proto.graph.node[0].op_type = "marked op" if field == "node.op_type" else "Elu"
    mark = {
        "opset_import.domain": b"marked domain",
        "graph.name": b"marked graph",
        "node.name": b"marked name",
        "node.op_type": b"marked op",
    }[field]
    content = proto.SerializeToString()
    assert content.count(mark) == 1
    path = tmp_path / "m.onnx"
    path.write_bytes(content.replace(mark, b"\xff" + mark[1:]))
    with pytest.raises(ModelError, match="UTF-8"):
        load(path)


def test_ops_without_a_schema_are_not_checked(tmp_path: Path) -> None:
    proto = one_node(helper.make_node("Twice", ["x"], ["y"], domain="custom", anything=[1]))
    proto.opset_import.append(helper.make_opsetid("custom", 1))
    load(onnx_samples.write(proto, tmp_path / "m.onnx"))


def test_node_in_a_function_that_does_not_match_its_schema_is_refused(tmp_path: Path) -> None:
    proto = chain_of_functions(2, calls=1)
    proto.functions[1].node[0].attribute.append(helper.make_attribute("axis", 1))
    assert "has the unknown attribute `axis`" in load_error(proto, tmp_path).message


def test_reference_to_an_attribute_outside_of_a_function_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("Softmax", ["x"], ["y"], axis=1)
    node.attribute[0].ref_attr_name = "along"
    assert (
        "attribute `axis` of the Softmax of `y` refers to a function's attribute, but the node is in no function"
        in load_error(one_node(node), tmp_path).message
    )


@pytest.mark.parametrize("where", ["input", "inner value"])
def test_more_dimensions_than_numpy_has_are_refused(tmp_path: Path, where: str) -> None:
    proto = onnx_samples.linear()
    info = helper.make_tensor_value_info("x" if where == "input" else "h", TensorProto.FLOAT, [None] * 302)
    if where == "input":
        proto.graph.input[0].CopyFrom(info)
    else:
        proto.graph.value_info.append(info)
    name = "x" if where == "input" else "h"
    assert f"value `{name}` has 302 dimensions: at most 64 are supported" in load_error(proto, tmp_path).message


def with_map(kind: str) -> onnx.ModelProto:
    proto = onnx_samples.linear()
    maps = helper.make_map_type_proto(TensorProto.STRING, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    type_ = helper.make_sequence_type_proto(maps) if kind == "sequence of maps" else maps
    proto.graph.output[0].type.CopyFrom(type_)
    return proto


@pytest.mark.parametrize(("kind", "label"), [("map", "a map"), ("sequence of maps", "a sequence of maps")])
def test_maps_are_not_supported_and_not_called_invalid(tmp_path: Path, kind: str, label: str) -> None:
    error = load_error(with_map(kind), tmp_path)
    assert f"output `y` is {label}, which is valid ONNX but not supported" in error.message
    assert "zipmap=False" in str(error.hint)


def chain_of_functions(length: int, *, calls: int) -> onnx.ModelProto:
    """Return a model that calls function 0, which calls function 1 `calls` times, and so on; the last one has a Relu."""
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("local", 1)]
    functions = []
    for index in range(length):
        last = index == length - 1
        nodes = [
            helper.make_node(
                "Relu" if last else f"F{index + 1}", [f"v{call}"], [f"v{call + 1}"], domain="" if last else "local"
            )
            for call in range(1 if last else calls)
        ]
        functions.append(helper.make_function("local", f"F{index}", ["v0"], [f"v{len(nodes)}"], nodes, opsets))
    proto = one_node(helper.make_node("F0", ["x"], ["y"], domain="local"))
    proto.opset_import.append(opsets[1])
    proto.functions.extend(functions)
    return proto


def test_functions_that_would_grow_without_bound_are_refused_before_they_are_inlined(tmp_path: Path) -> None:
    message = load_error(chain_of_functions(60, calls=2), tmp_path).message
    assert f"add {2**59} nodes when they are inlined: at most {MAX_INLINED_NODES} are supported" in message


def test_functions_within_the_bounds_are_loaded(tmp_path: Path) -> None:
    load(onnx_samples.write(chain_of_functions(14, calls=2), tmp_path / "wide.onnx"))
    load(onnx_samples.write(chain_of_functions(MAX_CALL_DEPTH, calls=1), tmp_path / "deep.onnx"))


def test_too_deep_calls_are_refused(tmp_path: Path) -> None:
    assert "101 levels deep: at most 100" in load_error(chain_of_functions(101, calls=1), tmp_path).message


def test_recursive_functions_are_refused(tmp_path: Path) -> None:
    proto = chain_of_functions(3, calls=1)
    proto.functions[2].node[0].op_type, proto.functions[2].node[0].domain = "F0", "local"
    assert "call each other in a cycle" in load_error(proto, tmp_path).message


def test_repeated_node_names_are_made_unique_in_linear_time() -> None:
    count = 10_000
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N"]) for name in ("x", f"v{count}"))
    nodes = [helper.make_node("Abs", ["x"], ["v0"], name="a_2")]
    nodes += [helper.make_node("Abs", [f"v{index}"], [f"v{index + 1}"], name="a") for index in range(count)]
    model = ir.serde.deserialize_model(helper.make_model(helper.make_graph(nodes, "g", [x], [y])))
    started = time.thread_time()
    make_node_names_unique(model)
    assert time.thread_time() - started < 2, "seconds"
    names = [node.name for node in model.graph]
    assert names[:4] == ["a_2", "a", "a_3", "a_4"]
    assert len(set(names)) == count + 1
