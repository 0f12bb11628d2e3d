"""Tests of the check with `onnx.checker`: of loaded models, and of graphs that are written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from support import onnx_samples

from ryzen_compile.errors import InvalidGraphError, ModelError
from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.ir.load import load
from ryzen_compile.ir.save import check_graph, save, save_to_store
from ryzen_compile.ir.validity import find_invalidity


def parse(body: str, *, opset: int = 21) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}, "local" : 1]> {body}')


def external(name: str, dims: list[int], data_type: int = TensorProto.FLOAT) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=name, data_type=data_type, dims=dims, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="no such file")
    return tensor


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("g (float[2] x) => (float[2] y) { y = Add (x, h)  h = Neg (x) }", "topologically sorted"),
        ("g (float[2] x) => (float[2] y) { y = Neg (x)  y = Abs (x) }", "single static assignment"),
        ("g (float[2] x) => (float[2] y) { h = Neg (x)  y = Softmax <axes = [1]> (h) }", "Unrecognized attribute: axes"),
        ("g (float[2] x, float[3] z) => (float[2] y) { y = Add (x, z) }", "Incompatible dimensions"),
        ("g (float[2] x, int64[2] z) => (float[2] y) { y = Add (x, z) }", "B has inconsistent type"),
        ("g (float[2] x) => (float[3] y) { y = Neg (x) }", "Inferred shape and existing shape differ"),
    ],
)
def test_invalid_graph_is_found(body: str, message: str) -> None:
    problem = find_invalidity(parse(body))
    assert problem is not None
    assert message in problem
    assert "\n" not in problem


def with_weights(*tensors: onnx.TensorProto) -> onnx.ModelProto:
    proto = parse("g (float[N, 8] x) => (float[N, 4] y) { y = MatMul (x, w) }")
    proto.graph.initializer.extend(tensors)
    return proto


def test_weights_need_no_files_and_have_their_types_and_shapes() -> None:
    assert find_invalidity(with_weights(external("w", [8, 4]))) is None
    assert "Incompatible dimensions" in (find_invalidity(with_weights(external("w", [7, 4]))) or "")
    assert "B has inconsistent type" in (find_invalidity(with_weights(external("w", [8, 4], TensorProto.INT64))) or "")


@pytest.mark.parametrize("place", ["Constant", "branch", "branch initializer", "function", "custom op"])
def test_weights_outside_of_the_main_graph_need_no_files(place: str) -> None:
    proto = onnx_samples.model(onnx_samples.BRANCHES)
    branch = next(node for node in proto.graph.node if node.op_type == "If").attribute[0].g
    constant = helper.make_node("Constant", [], ["one" if place == "Constant" else "own"])
    constant.attribute.append(helper.make_attribute("value", external("", [8])))
    if place == "Constant":
        proto.graph.node[0].CopyFrom(constant)
    elif place == "branch":
        branch.node.insert(0, constant)
        branch.node[1].input[1] = "own"
    elif place == "branch initializer":
        branch.initializer.append(external("own", [8]))
        branch.node[0].input[1] = "own"
    elif place == "function":
        proto.functions[0].node.insert(0, constant)
        proto.functions[0].node[1].input[1] = "own"
    else:
        proto.graph.node.append(helper.make_node("Custom", ["x"], [], domain="local", table=external("", [800])))
    assert find_invalidity(proto) is None


def test_ops_of_onnx_runtime_in_the_standard_domain_are_exempt() -> None:
    assert (
        find_invalidity(parse("g (float[N, 8] x, float[8] w) => (float[N, 8] y) { y = SimplifiedLayerNormalization (x, w) }"))
        is None
    )
    old = parse("g (float[N, 8] x, float[8] w) => (float[N, 8] y) { y = LayerNormalization (x, w) }", opset=13)
    assert find_invalidity(old) is None


@pytest.mark.parametrize(
    ("node", "opset", "first"),
    [
        ("BitCast <to = 10> (x)", 21, 26),
        ("BitCast (x)", 21, 26),
        ("Gelu (x)", 17, 20),
        ("Gelu (x)", 1, 20),
        ("GroupNormalization (x, x, x)", 11, 18),
    ],
)
def test_ops_of_a_later_opset_are_refused(node: str, opset: int, first: int) -> None:
    op_type = node.partition(" ")[0]
    problem = find_invalidity(parse(f"g (float16[2, 8] x) => (float16[2, 8] y) {{ y = {node} }}", opset=opset))
    assert problem == f"the op {op_type} exists from opset {first} on, and the model imports opset {opset}"


@pytest.mark.parametrize(
    ("node", "problem"),
    [
        ("y = Attention <qk_matmul_output_mode = 64> (x, x, x)", "qk_matmul_output_mode of Attention is 64"),
        ("y = Attention <softmax_precision = 7> (x, x, x)", "softmax_precision of Attention is 7"),
        ('y = Einsum <equation = "é"> (x)', "the equation of an Einsum"),  # shape inference would not end
    ],
)
def test_attributes_with_values_that_the_op_does_not_define_are_refused(node: str, problem: str) -> None:
    found = find_invalidity(parse(f"g (float[2, 3, 4, 8] x) => (float[2, 3, 4, 8] y) {{ {node} }}", opset=23))
    assert found is not None
    assert problem in found
    function = f'<domain: "local", opset_import: ["" : 23]> f (x) => (y) {{ {node} }}'
    proto = parse(f"g (float[2, 3, 4, 8] x) => (float[2, 3, 4, 8] y) {{ y = local.f (x) }} {function}", opset=23)
    assert find_invalidity(proto) == found
    attributes = "qk_matmul_output_mode = 3, softmax_precision = 1"
    einsum = 'z = Einsum <equation = "...ij, ...kj -> ...ik"> (x, x)'
    valid = f"g (float[2, 3, 4, 8] x) => (float[2, 3, 4, 8] y) {{ y = Attention <{attributes}> (x, x, x)  {einsum} }}"
    assert find_invalidity(parse(valid, opset=23)) is None


@pytest.mark.parametrize("output", ["int64[2] w", "int64[] w", "float[1, 2] w"])
@pytest.mark.parametrize("is_input", [True, False])
def test_an_output_that_is_an_input_or_a_weight_of_another_type_is_refused(output: str, is_input: bool, tmp_path: Path) -> None:
    inputs = "float[2] x, float[2] w" if is_input else "float[2] x"
    weights = "" if is_input else "<float[2] w = {1, 2}>"
    proto = parse(f"g ({inputs}) => (float[2] y, {output}) {weights} {{ y = Add (x, w) }}")
    with pytest.raises(ModelError, match="the output w is an input or a weight that is declared with another type"):
        load(onnx_samples.write(proto, tmp_path / "m.onnx"))
    valid = parse(f"g ({inputs}) => (float[2] y, float[2] w) {weights} {{ y = Add (x, w) }}")
    load(onnx_samples.write(valid, tmp_path / "v.onnx"))


@pytest.mark.parametrize(("node", "opset"), [("LayerNormalization (x, s)", 11), ("ThresholdedRelu (x)", 9)])
def test_ops_that_onnx_runtime_has_in_earlier_opsets_are_exempt(node: str, opset: int) -> None:
    assert find_invalidity(parse(f"g (float[2, 8] x, float[8] s) => (float[2, 8] y) {{ y = {node} }}", opset=opset)) is None


def test_the_default_axes_of_mean_variance_normalization_are_exempt() -> None:
    assert (
        find_invalidity(parse("g (float[2, 3, 4, 4] x) => (float[2, 3, 4, 4] y) { y = MeanVarianceNormalization (x) }")) is None
    )


def test_invalid_source_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    proto = parse("g (float[2] x, float[3] z) => (float[2] y) { y = Add (x, z) }")
    with pytest.raises(ModelError, match=r"m\.onnx`: it is not valid ONNX: .*Incompatible dimensions"):
        load(onnx_samples.write(proto, tmp_path / "m.onnx"))


@pytest.mark.parametrize("declared", ["float[N, 9] y", "float[N, 8, 1] y", "float y", "float[] y"])
def test_wrong_and_missing_shapes_of_outputs_are_inferred(tmp_path: Path, declared: str) -> None:
    proto = parse(f"g (float[N, 8] x) => ({declared}) {{ h = Neg (x)  y = Abs (h) }}")
    if declared == "float[] y":
        proto.graph.output[0].type.tensor_type.ClearField("shape")
    proto.graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, [3, 3, 3]))
    model = load(onnx_samples.write(proto, tmp_path / "m.onnx"))
    (output,) = interface_of(model).outputs
    assert output.dims == ("N", 8)
    save(model, tmp_path / "n.onnx")
    onnx.checker.check_model(onnx.load(tmp_path / "n.onnx"), full_check=True)


def test_wrong_shapes_of_outputs_of_branches_are_removed(tmp_path: Path) -> None:
    proto = onnx_samples.model(onnx_samples.BRANCHES)
    branch = next(node for node in proto.graph.node if node.op_type == "If").attribute[1].g
    branch.output[0].CopyFrom(helper.make_tensor_value_info(branch.output[0].name, TensorProto.FLOAT, [8]))
    assert "differ in rank" in (find_invalidity(proto) or "")
    check_graph(load(onnx_samples.write(proto, tmp_path / "m.onnx")))


def test_element_type_that_the_checker_does_not_know_is_refused(tmp_path: Path) -> None:
    proto = parse("g (float[N, 8] x) => (float[N, 8] y) { y = Neg (x) }")
    proto.graph.input[0].type.sequence_type.elem_type.tensor_type.elem_type = 0
    with pytest.raises(ModelError):
        load(onnx_samples.write(proto, tmp_path / "m.onnx"))


@pytest.mark.parametrize("declared", ["int32[N, 8] y", "int32[] y"])
def test_wrong_element_type_of_an_output_is_refused(tmp_path: Path, declared: str) -> None:
    proto = parse(f"g (float[N, 8] x) => ({declared}) {{ y = Neg (x) }}")
    if declared == "int32[] y":
        proto.graph.output[0].type.tensor_type.ClearField("shape")
    with pytest.raises(ModelError, match="not valid ONNX: .*Inferred elem type differs"):
        load(onnx_samples.write(proto, tmp_path / "m.onnx"))


def test_output_of_unknown_rank_stays_unknown(tmp_path: Path) -> None:
    proto = parse("g (float[N] x, int64[R] s) => (float[1] y) { y = Reshape (x, s) }")
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    model = load(onnx_samples.write(proto, tmp_path / "m.onnx"))
    assert interface_of(model).outputs[0].dims is None
    save(model, tmp_path / "n.onnx")
    assert interface_of(load(tmp_path / "n.onnx")).outputs[0].dims is None


def test_graph_without_a_name_has_one_when_it_is_written(tmp_path: Path) -> None:
    proto = onnx_samples.linear()
    proto.graph.name = ""
    save(load(onnx_samples.write(proto, tmp_path / "m.onnx")), tmp_path / "n.onnx")
    onnx.checker.check_model(onnx.load(tmp_path / "n.onnx"), full_check=True)


def invalid_model(folder: Path) -> ir.Model:
    model = load(onnx_samples.write(onnx_samples.linear(), folder / "m.onnx"))
    model.graph.node(0).outputs[0].name = "y"
    return model


def test_invalid_graph_is_not_written(tmp_path: Path) -> None:
    model = invalid_model(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InvalidGraphError, match="not valid ONNX: Graph must be in single static assignment"):
        save(model, tmp_path / "n.onnx")
    with pytest.raises(InvalidGraphError):
        save_to_store(model, tmp_path / "n.onnx", tmp_path / "weights", threshold_bytes=1)
    with pytest.raises(InvalidGraphError):
        check_graph(model)
    assert sorted(tmp_path.rglob("*")) == before
    save(model, tmp_path / "n.onnx", check=False)


def test_repeated_node_names_of_a_source_are_made_unique_and_those_of_a_pass_are_refused(tmp_path: Path) -> None:
    proto = parse("g (float[2] x) => (float[2] y) { [n] a = Neg (x)  [n_2] b = Abs (a)  [n] c = Neg (b)  y = Abs (c) }")
    model = load(onnx_samples.write(proto, tmp_path / "m.onnx"))
    assert [node.name for node in model.graph] == ["n", "n_2", "n_3", ""]
    check_graph(model)
    model.graph.node(1).name = "n"
    with pytest.raises(InvalidGraphError, match="two nodes of the graph that was to be written are named `n`"):
        check_graph(model)


def test_constants_that_are_read_as_shapes_are_checked_with_their_values(tmp_path: Path) -> None:
    proto = parse("g (float[6] x) => (float[2, 3] y) { y = Reshape (x, s) }")
    proto.graph.initializer.append(numpy_helper.from_array(np.array([2, 3]), "s"))
    assert find_invalidity(proto) is None
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.array([2, 4]), "s"))
    assert "Inferred shape and existing shape differ" in (find_invalidity(proto) or "")
