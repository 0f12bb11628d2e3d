"""Tests of interfaces: a recorded interface is used, and refused if it contradicts the graph; else it is inferred."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from ryzen_compile.data.validation import check_shapes
from ryzen_compile.errors import ModelError
from ryzen_compile.ir.interface_metadata import METADATA_KEY, interface_of, write_interface
from ryzen_compile.spec.interface import InputSpec, Interface, StateSpec


def _model(signature: str, body: str, domains: str = "") -> ir.Model:
    text = f'<ir_version: 10, opset_import: ["" : 21{domains}]> g {signature} {{ {body} }}'
    return ir.serde.deserialize_model(onnx.parser.parse_model(text))


def _input(signature: str, body: str, domains: str = "") -> InputSpec:
    return interface_of(_model(signature, body, domains)).inputs[0]


IDENTITY = "y = Identity (x)"


def test_types_and_shapes_are_read_from_the_graph() -> None:
    model = _model(
        "(float[N, 3] x, bfloat16 s, string[2] t, int4[K] q, seq(float[N]) l) => (float[N, 3] y, bool z)",
        "y = Identity (x)  c = Constant <value = bool {1}> ()  z = Identity (c)",
    )
    interface = interface_of(model)
    assert [str(spec) for spec in interface.inputs] == [
        "x: float32[N, 3]",
        "s: bfloat16[]",
        "t: string[2]",
        "q: int4[K]",
        "l: sequence(float32)[N]",
    ]
    assert [str(spec) for spec in interface.outputs] == ["y: float32[N, 3]", "z: bool[]"]
    assert all(spec.role == "values" and spec.low is spec.high is None for spec in interface.inputs)


def test_unnamed_dimensions_get_unique_names() -> None:
    interface = interface_of(
        _model(
            "(float[?, ?, x_dim1] x, float[?] z, float w) => (float[?, 2, ?] y, float o)", "y = Identity (x)  o = Identity (w)"
        )
    )
    assert [spec.dims for spec in interface.inputs] == [("x_dim0", "x_dim1_", "x_dim1"), ("z_dim0",), ()]
    assert [spec.dims for spec in interface.outputs] == [("y_dim0", 2, "y_dim2"), ()]


@pytest.mark.parametrize("placeholder", ["?", "-1", "None", "none", "unk__0", "unk__17", " ", ""])
def test_dimensions_with_a_placeholder_name_are_distinct(placeholder: str) -> None:
    model = _model("(float[A, 3, B, C] x, float[A, B] z) => (float[A, 3, B, C] y)", IDENTITY)
    for value in (*model.graph.inputs, *model.graph.outputs):
        assert value.shape is not None
        value.shape = ir.Shape([dim if isinstance(dim, int) else placeholder for dim in value.shape])
    interface = interface_of(model)
    assert [spec.dims for spec in interface.inputs] == [("x_dim0", 3, "x_dim2", "x_dim3"), ("z_dim0", "z_dim1")]
    assert interface.outputs[0].dims == ("y_dim0", 3, "y_dim2", "y_dim3")
    assert interface_of(model) == interface, "generated names are stable"
    sizes = check_shapes(interface, {"x": (2, 3, 224, 320), "z": (4, 8)})
    assert sizes == {"x_dim0": 2, "x_dim2": 224, "x_dim3": 320, "z_dim0": 4, "z_dim1": 8}


@pytest.mark.parametrize("name", ["N", "unk", "unk_0", "unk__", "unk__a", "none_", "--1", "batch?"])
def test_other_dimension_names_are_kept(name: str) -> None:
    model = _model("(float[A, A] x) => (float[A, A] y)", IDENTITY)
    model.graph.inputs[0].shape = ir.Shape([name, name])
    assert interface_of(model).inputs[0].dims == (name, name)


def test_generated_dimension_name_is_not_a_sum() -> None:
    model = _model("(float[?] x) => (float[N] y)", IDENTITY)
    model.graph.inputs[0].name = "a+b"
    assert interface_of(model).inputs[0].dims == ("a_b_dim0",)


def test_an_unknown_rank_stays_unknown() -> None:
    model = _model("(float[N] x) => (float[N] y)", IDENTITY)
    model.graph.inputs[0].shape = None
    assert interface_of(model).inputs[0].dims is None


def test_initializers_among_the_inputs_are_not_inputs() -> None:
    model = _model("(float[2] x, float[2] w) => (float[2] y) <float[2] w = {1, 2}>", "y = Add (x, w)")
    assert [spec.name for spec in interface_of(model).inputs] == ["x"]


@pytest.mark.parametrize(
    "type_", [None, ir.TensorType(ir.DataType.UNDEFINED), ir.SequenceType(ir.TensorType(ir.DataType.UNDEFINED))], ids=str
)
def test_input_without_element_type_is_refused(type_: ir.TypeProtocol | None) -> None:
    model = _model("(float[N] x) => (float[N] y)", IDENTITY)
    model.graph.inputs[0].type = type_
    with pytest.raises(ModelError, match="`x` has no element type"):
        interface_of(model)


@pytest.mark.parametrize(
    ("body", "high"),
    [
        ("y = Gather (w, x)", 49),
        ("c = Cast <to = 7> (x)  o = Constant <value = int64[1] {-1}> ()  r = Reshape (c, o)  y = Gather (w, r)", 49),
        ("o = Constant <value = int64 {2}> ()  p = Add (o, x)  y = Gather (w, p)", 47),
        ("y = Gather <axis = 1> (w, x)", 3),
        ("y = Gather <axis = -2> (w, x)", 49),
        ("h = Cast <to = 10> (w)  y = Gather (h, x)", 49),
        ("c = Constant <value = float[3, 1] {1, 2, 3}> ()  y = Gather (c, x)", 2),
        ("a = Gather (w, x)  b = Gather <axis = 1> (w, x)  y = Add (a, b)", 3),
        ("a = Gather (w, x)  o = Constant <value = int64 {1}> ()  e = Equal (x, o)  f = Cast <to = 1> (e)  y = Add (a, f)", 49),
    ],
)
def test_input_that_indexes_a_table_has_the_role_ids(body: str, high: int) -> None:
    spec = _input("(int64[B, S] x) => (float[B, S, 4] y) <float[50, 4] w = {" + "0," * 199 + "0}>", body)
    assert (spec.role, spec.low, spec.high) == ("ids", 0, high)


@pytest.mark.parametrize(
    ("inputs", "body", "high"),
    [
        ("w, x", "y = com.microsoft.GatherBlockQuantized <block_size = 16> ({})", 49),
        ("x, x, w, w, v, v, v", "y, n = com.microsoft.EmbedLayerNormalization ({})", 19),
    ],
)
def test_input_that_indexes_a_table_of_an_op_of_onnx_runtime_has_the_role_ids(inputs: str, body: str, high: int) -> None:
    """It is no mask, although the model derives a mask from its padding ids."""
    tables = "<float[50, 4] w = {" + "0," * 199 + "0}, float[20, 4] v = {" + "0," * 79 + "0}>"
    mask = "i = Constant <value = int64 {0}> ()  e = Equal (x, i)  f = Where (e, l, s)  p = Softmax (f)"
    signature = f"(int64[B, S] x, float[B, S] s, float l) => (float[B, S, 4] y, float[B, S] p) {tables}"
    spec = _input(signature, f"{body.format(inputs)}  {mask}", ', "com.microsoft" : 1')
    assert (spec.role, spec.low, spec.high) == ("ids", 0, high)


def test_infinite_offset_is_ignored() -> None:
    model = _model(
        "(int64[S] x) => (float[S, 1] y) <float[3, 1] w = {1, 2, 3}, float o = {0}>", "p = Add (x, o)  y = Gather (w, x)"
    )
    model.graph.initializers["o"].const_value = ir.Tensor(np.array(np.inf, np.float32))
    assert interface_of(model).inputs[0].high == 2


@pytest.mark.parametrize(
    "body",
    [
        "y = Cast <to = 1> (x)",
        "d = Constant <value = float[3, 2] {1, 2, 3, 4, 5, 6}> ()  e = Mul (d, d)  y = Gather (e, x)",
        "v = Constant <value = float[3] {1, 2, 3}> ()  y = Gather (v, x)",
        "o = Constant <value = int64 {7}> ()  e = Greater (x, o)  y = Cast <to = 1> (e)",
        "s = Shape (x)  y = Cast <to = 1> (s)",
    ],
)
def test_other_integer_inputs_have_the_role_values(body: str) -> None:
    spec = _input("(int64[S] x) => (float[S] y)", body)
    assert (spec.role, spec.low, spec.high) == ("values", None, None)


@pytest.mark.parametrize(
    ("element", "body"),
    [
        ("int64", "b = Cast <to = 9> (x)  y = Cast <to = 1> (b)"),
        ("int64", "o = Constant <value = int64 {0}> ()  e = Equal (x, o)  y = Cast <to = 1> (e)"),
        ("int64", "u = Unsqueeze (x, a)  f = Cast <to = 1> (u)  o = Constant <value = float {1.0}> ()  y = Sub (o, f)"),
        ("int32", "o = Constant <value = int32 {1}> ()  s = Sub (o, x)  y = Cast <to = 1> (s)"),
        ("bool", "n = Not (x)  y = Cast <to = 1> (n)"),
        ("bool", "y = Where (x, z, z)"),
    ],
)
def test_input_with_boolean_uses_has_the_role_mask(element: str, body: str) -> None:
    spec = _input(f"({element}[S] x, float[S] z, int64[1] a) => (float[S] y)", body)
    assert (spec.role, spec.low, spec.high) == ("mask", 0, 1)


@pytest.mark.parametrize(
    ("nodes", "is_mask"),
    [
        ("e = Greater (x, o)  y = Cast <to = 1> (e)", True),
        ("e = Less (o, x)  y = Cast <to = 1> (e)", True),
        ("e = Less (x, o)  y = Cast <to = 1> (e)", False),
        ("e = Greater (o, x)  y = Cast <to = 1> (e)", False),
        ("i = Constant <value = int64 {1}> ()  a = Add (x, i)  e = Greater (a, o)  y = Cast <to = 1> (e)", False),
    ],
)
def test_a_comparison_makes_a_mask_only_if_it_tells_0_from_1(nodes: str, is_mask: bool) -> None:
    """Division of integers with rounding compares its operands with 0."""
    spec = _input("(int64[S] x) => (float[S] y)", f"o = Constant <value = int64 {{0}}> ()  {nodes}")
    assert (spec.role == "mask") == is_mask


def test_masks_and_positions_are_recognized_by_name() -> None:
    model = _model(
        "(int64[B, S] attention_mask, int64[B, S] position_ids, float[B, S] float_mask, int64[B] position_table_ids)"
        " => (float[B, S] y)"
        " <float[9, 2] w = {" + "0," * 17 + "0}>",
        "a = Cast <to = 1> (attention_mask)  b = Cast <to = 1> (position_ids)  c = Add (a, b)  y = Add (c, float_mask)"
        "  g = Gather (w, position_table_ids)",
    )
    roles_and_ranges = [(spec.role, spec.low, spec.high) for spec in interface_of(model).inputs]
    assert roles_and_ranges == [("mask", 0, 1), ("positions", 0, None), ("values", None, None), ("positions", 0, 8)]


def test_positions_that_scale_activations_are_no_mask() -> None:
    """At position 0 the product is 0, as with a mask; a RoPE whose frequencies follow the length contains such a product."""
    signature = "(int64[B, S] position_ids, float[B, S] x) => (float[B, S] y)"
    spec = _input(signature, "p = Cast <to = 1> (position_ids)  y = Mul (p, x)")
    assert (spec.role, spec.low, spec.high) == ("positions", 0, None)


CACHE = "(float[B, 2, P, 4] {past}, float[B, 2, 1, 4] new) => (float[B, 2, T, 4] {present})"


@pytest.mark.parametrize(
    ("signature", "body", "append_axis"),
    [
        (CACHE.format(past="k", present="out"), "out = Concat <axis = 2> (k, new)", 2),
        (CACHE.format(past="k", present="out"), "c = Concat <axis = -2> (k, new)  out = Identity (c)", 2),
        (
            CACHE.format(past="past_key_values_0_key", present="present_0_key"),
            "a = Tanh (past_key_values_0_key)  present_0_key = Concat <axis = 2> (a, new)",
            2,
        ),
        (CACHE.format(past="past_k", present="present_k"), "a = Tanh (past_k)  present_k = Concat <axis = 2> (a, new)", 2),
        (CACHE.format(past="cache", present="cache_out"), "a = Tanh (cache)  cache_out = Concat <axis = 2> (a, new)", 2),
        (
            "(float[B, 8, 4] state, int64[B, 1, 4] at, float[B, 1, 4] new) => (float[B, 8, 4] out)",
            "out = ScatterElements <axis = 1> (state, at, new)",
            None,
        ),
        ("(float[B, 8] past_h, float[B, 8] x) => (float[B, 8] new_h)", "new_h = Add (past_h, x)", None),
    ],
)
def test_states_are_inferred_from_structure_and_names(signature: str, body: str, append_axis: int | None) -> None:
    interface = interface_of(_model(signature, body))
    past, present = interface.inputs[0], interface.outputs[0]
    assert interface.states == (StateSpec(name=past.name, input=past.name, output=present.name, append_axis=append_axis),)
    assert [spec.role for spec in interface.inputs[1:]] == ["values"] * len(interface.inputs[1:])
    assert past.role == "state"


def test_caches_of_an_attention_op_are_states() -> None:
    rows = {"q": "1", "k": "1", "v": "1", "pk": "P", "pv": "P"}
    signature = ", ".join(f"float[B, 2, {size}, 4] {name}" for name, size in rows.items())
    model = _model(
        f"({signature}) => (float[B, 2, 1, 4] y, float[B, 2, T, 4] nk, float[B, 2, T, 4] nv)",
        "y, nk, nv = Attention (q, k, v, , pk, pv)",
    )
    states = interface_of(model).states
    assert [(state.input, state.output, state.append_axis) for state in states] == [("pk", "nk", 2), ("pv", "nv", 2)]


@pytest.mark.parametrize(
    ("signature", "body"),
    [
        ("(float[B, 3, 8, 8] x, float[B, 3, 8, 8] z) => (float[B, 6, 8, 8] y)", "y = Concat <axis = 1> (x, z)"),
        ("(float[B, P, 4] x, float[B, 1, 4] z) => (float[B, T, 4] y)", "y = Concat <axis = 1> (x, z)"),
        ("(float[P, 2, 2, 4] x, float[1, 2, 2, 4] z) => (float[T, 2, 2, 4] y)", "y = Concat <axis = 0> (x, z)"),
        (
            "(float[B, 2, P, 4] past, float[B, 2, 1, 4] z) => (float[B, 2, T] present)",
            "c = Concat <axis = 2> (past, z)  present = ReduceSum (c)",
        ),
        ("(float[B, 8] past, float[B, 8] x) => (float16[B, 8] present)", "a = Add (past, x)  present = Cast <to = 10> (a)"),
    ],
)
def test_similar_inputs_and_outputs_are_not_states(signature: str, body: str) -> None:
    interface = interface_of(_model(signature, body))
    assert not interface.states
    assert {spec.role for spec in interface.inputs} == {"values"}


@pytest.mark.parametrize(
    ("inputs", "batch"),
    [
        ("float[N, 3] x, float[N] z", "N"),
        ("float[N, 3] x, float s", "N"),
        ("float[N, 3] x, float[M] z", None),
        ("float[N, 3] x, float[3] z", None),
        ("float[4, N] x", None),
        ("float[?, 3] x, float[?] z", None),
        ("float s", None),
    ],
)
def test_batch_is_the_common_first_dimension_of_all_inputs(inputs: str, batch: str | None) -> None:
    first = inputs.split(",")[0].split()[-1]
    first = first if first in ("x", "s") else "x"
    assert interface_of(_model(f"({inputs}) => (float[A, B] y)", f"y = Identity ({first})")).batch == batch


def _model_with_recorded_interface() -> tuple[ir.Model, Interface]:
    model = _model("(int64[?, S] x) => (float[?, 4] y)", "y = Cast <to = 1> (x)")
    recorded = msgspec.structs.replace(
        interface_of(model),
        inputs=(InputSpec(name="x", dtype="int64", dims=("batch", "seq"), role="ids", low=3, high=9),),
        batch="batch",
        task="classifier",
        typical_sizes={"seq": 128},
    )
    write_interface(model, recorded)
    return model, recorded


def test_recorded_interface_is_returned() -> None:
    model, recorded = _model_with_recorded_interface()
    assert interface_of(model) == recorded


CONTRADICTIONS = {
    "type": r"an input is `x: int64\[batch, seq\]` in the metadata and `x: int32\[x_dim0, S\]` in the graph",
    "rank": r"`x: int64\[x_dim0, S, 1\]` in the graph",
    "size": r"an output is `y: float32\[y_dim0, 4\]` in the metadata and `y: float32\[y_dim0, 5\]` in the graph",
    "name": r"`renamed: int64\[renamed_dim0, S\]` in the graph",
    "number": r"an input is absent in the metadata and `more: float32\[1\]` in the graph",
    "output": r"`y: float16\[y_dim0, 4\]` in the graph",
}


@pytest.mark.parametrize("change", CONTRADICTIONS)
def test_recorded_interface_that_contradicts_the_graph_is_refused(change: str) -> None:
    model, _ = _model_with_recorded_interface()
    graph = model.graph
    if change == "type":
        graph.inputs[0].type = ir.TensorType(ir.DataType.INT32)
    elif change == "rank":
        graph.inputs[0].shape = ir.Shape([None, "S", 1])
    elif change == "size":
        graph.outputs[0].shape = ir.Shape([None, 5])
    elif change == "name":
        graph.inputs[0].name = "renamed"
    elif change == "number":
        graph.inputs.append(ir.val("more", ir.DataType.FLOAT, [1]))
    else:
        graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
    with pytest.raises(ModelError, match=f"does not match the graph: .*{CONTRADICTIONS[change]}") as caught:
        interface_of(model)
    assert METADATA_KEY in (caught.value.hint or "")
    del model.metadata_props[METADATA_KEY]
    assert interface_of(model).task is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be decoded: Input data was truncated"),
        ("{", "cannot be decoded: Input data was truncated"),
        ("[]", "cannot be decoded: Expected `object`, got `array`"),
        ("\ud800", "cannot be decoded: "),
        ('{"x":' + "[" * 100_000, "cannot be decoded: "),
        ('{"inputs": [], "outputs": []}', "has no schema version, but this ryzen-compile supports only version 1"),
        ('{"schema_version": 2, "new": 1}', "has schema version 2, but this ryzen-compile supports only version 1"),
        ('{"schema_version": 0}', "has schema version 0, but this ryzen-compile supports only version 1"),
        ('{"schema_version": "1", "inputs": [], "outputs": []}', "cannot be decoded: Expected `int`, got `str`"),
        ('{"schema_version": 1, "inputs": []}', "cannot be decoded: Object missing required field `outputs`"),
        (
            '{"schema_version": 1, "inputs": [], "outputs": [], "extra": 1}',
            "cannot be decoded: Object contains unknown field `extra`",
        ),
        ('{"schema_version": 1, "inputs": [3], "outputs": []}', r"Expected `object`, got `int` - at `\$.inputs\[0\]`"),
    ],
    ids=range(12),
)
def test_recorded_interface_that_cannot_be_read_is_refused(text: str, message: str) -> None:
    model, _ = _model_with_recorded_interface()
    model.metadata_props[METADATA_KEY] = text
    with pytest.raises(ModelError, match=f"the model's metadata `ryzen_compile.interface` .*{message}") as caught:
        interface_of(model)
    assert "export or rewrite the model again with this version of ryzen-compile" in (caught.value.hint or "")
    assert ("upgrade ryzen-compile" in (caught.value.hint or "")) == ("version 2" in message)


def test_recorded_interface_has_a_schema_version() -> None:
    model, _ = _model_with_recorded_interface()
    assert json.loads(model.metadata_props[METADATA_KEY])["schema_version"] == 1


def test_recorded_interface_survives_serialization() -> None:
    model, recorded = _model_with_recorded_interface()
    proto = ir.serde.serialize_model(model)
    assert interface_of(ir.serde.deserialize_model(onnx.ModelProto.FromString(proto.SerializeToString()))) == recorded


@pytest.mark.parametrize(
    ("inputs", "total"),
    [
        ("int64[B, S] ids, int64[B, T] attention_mask", "P+S"),
        ("int64[B, S] ids, int64[B, T] attention_mask, int64[B, S] position_ids", "P+S"),
        ("int64[B, S] ids, int64[B, R] other, int64[B, T] attention_mask", "T"),
    ],
)
def test_length_of_a_cache_after_a_step_is_a_sum_if_the_appended_length_is_known(inputs: str, total: str) -> None:
    model = _model(
        f"({inputs}, float[B, 2, P, 4] past, float[B, 2, S, 4] new) => (float[B, 2, T, 4] present)",
        "present = Concat <axis = 2> (past, new)",
    )
    interface = interface_of(model)
    mask = next(spec for spec in interface.inputs if spec.name == "attention_mask")
    assert mask.dims == ("B", total)
    assert interface.outputs[0].dims == ("B", 2, total, 4)
