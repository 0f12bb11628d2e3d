"""Interfaces: what was recorded is believed while it is true; else roles, ranges and states are told from the graph."""

from __future__ import annotations

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from ryzen_compile.errors import ModelError
from ryzen_compile.ir.interface_metadata import METADATA_KEY, interface_of, write_interface
from ryzen_compile.spec.interface import InputSpec, Interface, StateSpec


def _model(signature: str, body: str, domains: str = "") -> ir.Model:
    text = f'<ir_version: 10, opset_import: ["" : 21{domains}]> g {signature} {{ {body} }}'
    return ir.serde.deserialize_model(onnx.parser.parse_model(text))


def _input(signature: str, body: str, domains: str = "") -> InputSpec:
    return interface_of(_model(signature, body, domains)).inputs[0]


IDENTITY = "y = Identity (x)"


def test_types_and_shapes_are_those_of_the_graph() -> None:
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


def test_unnamed_dimensions_get_names_of_their_own() -> None:
    interface = interface_of(
        _model("(float[?, ?, x_1] x, float[?] z, float w) => (float[?, 2, ?] y, float o)", "y = Identity (x)  o = Identity (w)")
    )
    assert [spec.dims for spec in interface.inputs] == [("x_0", "x_1_", "x_1"), ("z_0",), ()]
    assert [spec.dims for spec in interface.outputs] == [("y_0", 2, "y_2"), ()]


def test_an_unknown_rank_stays_unknown() -> None:
    model = _model("(float[N] x) => (float[N] y)", IDENTITY)
    model.graph.inputs[0].shape = None
    assert interface_of(model).inputs[0].dims is None


def test_initialisers_that_are_inputs_too_are_none() -> None:
    model = _model("(float[2] x, float[2] w) => (float[2] y) <float[2] w = {1, 2}>", "y = Add (x, w)")
    assert [spec.name for spec in interface_of(model).inputs] == ["x"]


@pytest.mark.parametrize(
    "kind", [None, ir.TensorType(ir.DataType.UNDEFINED), ir.SequenceType(ir.TensorType(ir.DataType.UNDEFINED))], ids=str
)
def test_an_input_without_a_type_is_refused(kind: ir.TypeProtocol | None) -> None:
    model = _model("(float[N] x) => (float[N] y)", IDENTITY)
    model.graph.inputs[0].type = kind
    with pytest.raises(ModelError, match="`x` has no type"):
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
def test_what_indexes_a_table_is_an_id(body: str, high: int) -> None:
    spec = _input("(int64[B, S] x) => (float[B, S, 4] y) <float[50, 4] w = {" + "0," * 199 + "0}>", body)
    assert (spec.role, spec.low, spec.high) == ("ids", 0, high)


def test_an_infinite_offset_is_none() -> None:
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
def test_other_integers_are_values(body: str) -> None:
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
def test_what_is_asked_whether_it_is_true_is_a_mask(element: str, body: str) -> None:
    spec = _input(f"({element}[S] x, float[S] z, int64[1] a) => (float[S] y)", body)
    assert (spec.role, spec.low, spec.high) == ("mask", 0, 1)


def test_masks_and_positions_are_told_by_their_names_too() -> None:
    model = _model(
        "(int64[B, S] attention_mask, int64[B, S] position_ids, float[B, S] float_mask, int64[B] position_table_ids)"
        " => (float[B, S] y)"
        " <float[9, 2] w = {" + "0," * 17 + "0}>",
        "a = Cast <to = 1> (attention_mask)  b = Cast <to = 1> (position_ids)  c = Add (a, b)  y = Add (c, float_mask)"
        "  g = Gather (w, position_table_ids)",
    )
    found = [(spec.role, spec.low, spec.high) for spec in interface_of(model).inputs]
    assert found == [("mask", 0, 1), ("positions", 0, None), ("values", None, None), ("positions", 0, 8)]


CACHE = "(float[B, 2, P, 4] {past}, float[B, 2, 1, 4] new) => (float[B, 2, T, 4] {present})"


@pytest.mark.parametrize(
    ("signature", "body", "grows"),
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
def test_what_one_step_leaves_to_the_next_is_a_state(signature: str, body: str, grows: int | None) -> None:
    interface = interface_of(_model(signature, body))
    past, present = interface.inputs[0], interface.outputs[0]
    assert interface.states == (StateSpec(name=past.name, input=past.name, output=present.name, append_axis=grows),)
    assert [spec.role for spec in interface.inputs[1:]] == ["values"] * len(interface.inputs[1:])
    assert past.role == "state"


def test_the_caches_of_an_attention_are_states() -> None:
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
def test_what_only_looks_like_a_state_is_none(signature: str, body: str) -> None:
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
def test_the_batch_is_what_all_inputs_begin_with(inputs: str, batch: str | None) -> None:
    first = inputs.split(",")[0].split()[-1]
    first = first if first in ("x", "s") else "x"
    assert interface_of(_model(f"({inputs}) => (float[A, B] y)", f"y = Identity ({first})")).batch == batch


def _recorded() -> tuple[ir.Model, Interface]:
    model = _model("(int64[?, S] x) => (float[?, 4] y)", "y = Cast <to = 1> (x)")
    told = msgspec.structs.replace(
        interface_of(model),
        inputs=(InputSpec(name="x", dtype="int64", dims=("batch", "seq"), role="ids", low=3, high=9),),
        batch="batch",
        task="classifier",
        typical_sizes={"seq": 128},
    )
    write_interface(model, told)
    return model, told


def test_what_was_recorded_is_believed() -> None:
    model, told = _recorded()
    assert interface_of(model) == told


@pytest.mark.parametrize("change", ["type", "rank", "size", "name", "number", "output", "garbage", "other keys"])
def test_what_was_recorded_and_is_no_longer_true_is_ignored(change: str) -> None:
    model, told = _recorded()
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
    elif change == "output":
        graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
    elif change == "garbage":
        model.metadata_props[METADATA_KEY] = "{"
    else:
        model.metadata_props[METADATA_KEY] = '{"inputs": [], "outputs": [], "surprise": 1}'
    found = interface_of(model)
    assert found != told
    assert found.inputs[0].role == "values"
    assert found.task is None


def test_a_recorded_interface_survives_the_file() -> None:
    model, told = _recorded()
    proto = ir.serde.serialize_model(model)
    assert interface_of(ir.serde.deserialize_model(onnx.ModelProto.FromString(proto.SerializeToString()))) == told


@pytest.mark.parametrize(
    ("inputs", "total"),
    [
        ("int64[B, S] ids, int64[B, T] attention_mask", "P+S"),
        ("int64[B, S] ids, int64[B, T] attention_mask, int64[B, S] position_ids", "P+S"),
        ("int64[B, S] ids, int64[B, R] other, int64[B, T] attention_mask", "T"),
    ],
)
def test_what_a_cache_is_as_long_as_afterwards_is_a_sum_where_it_is_known_what_is_new(inputs: str, total: str) -> None:
    model = _model(
        f"({inputs}, float[B, 2, P, 4] past, float[B, 2, S, 4] new) => (float[B, 2, T, 4] present)",
        "present = Concat <axis = 2> (past, new)",
    )
    interface = interface_of(model)
    mask = next(spec for spec in interface.inputs if spec.name == "attention_mask")
    assert mask.dims == ("B", total)
    assert interface.outputs[0].dims == ("B", 2, total, 4)
