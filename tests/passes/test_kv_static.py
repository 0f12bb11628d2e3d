"""kv-static on every architecture and export style: exact, or refused with the node and the expected pattern."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from support.decoder_matrix import EXPORT_FAILURES, STATIC, STATIC_REFUSALS, cells
from support.decoders import (
    ARCHITECTURES,
    LAYERS,
    MAX_POSITIONS,
    VOCABULARY,
    WINDOW,
    cache_names,
    export,
    torch_steps,
)
from support.step_runner import StepRunner

from ryzen_compile.errors import ModelError
from ryzen_compile.ir.fingerprint import fingerprint
from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.ir.load import load
from ryzen_compile.spec.kv_cache import read_kv_cache_spec
from ryzen_compile.spec.passes import Change, Pass, PassContext, Refusal
from ryzen_passes.attention import Attention
from ryzen_passes.kv.compact import KvCompact
from ryzen_passes.kv.evict import KvEvict
from ryzen_passes.kv.select import KvSelect
from ryzen_passes.kv.static import KvStatic
from ryzen_passes.kv.window import KvWindow

CAPACITY = 64
CONTEXT = PassContext(backend="onnxruntime")


def static_model(architecture: str, style: str, *, step: int = 0, capacity: int = CAPACITY) -> ir.Model:
    model = load(export(architecture, style))
    outcome = KvStatic(capacity=capacity, step=step).rewrite(model, CONTEXT)
    assert isinstance(outcome, Change), outcome
    return model


def shares_keys(model: ir.Model, *, single_token: bool = False) -> bool:
    """Return whether the query heads of a layer share keys, whose number is constant.

    A step of several tokens over a ring buffer attends to its slots and then to its own tokens, whose number varies.
    """
    spec = read_kv_cache_spec(model)
    assert spec is not None
    return any(layer.heads != layer.kv_heads and (single_token or layer.policy.slots == CAPACITY) for layer in spec.layers)


def shape_of(value: ir.Value | None) -> tuple[int, ...]:
    return tuple(value.const_value.shape.numpy()) if value is not None and value.const_value is not None else ()


def random_ids(tokens: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, VOCABULARY, (2, tokens))


@pytest.mark.parametrize(("architecture", "style"), cells(STATIC, without={**EXPORT_FAILURES, **STATIC_REFUSALS}))
def test_static_caches_are_exact(architecture: str, style: str) -> None:
    ids, chunks = random_ids(40), [7, 2, *[1] * 20, 11]
    expected = torch_steps(architecture, ids, chunks)
    for grouped in (False, True):
        model = static_model(architecture, style)
        if grouped:
            assert bool(Attention().rewrite(model, CONTEXT)) == shares_keys(model)
        np.testing.assert_allclose(StepRunner(model, 2).logits(ids, chunks), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_single_token_steps_up_to_the_capacity_are_exact(architecture: str) -> None:
    ids = random_ids(CAPACITY)
    model = static_model(architecture, "optimum-sdpa", step=1)
    assert bool(Attention().rewrite(model, CONTEXT)) == shares_keys(model, single_token=True)
    runner = StepRunner(model, 2)
    logits = runner.logits(ids, [1] * CAPACITY)
    np.testing.assert_allclose(logits, torch_steps(architecture, ids, [1] * CAPACITY), rtol=0, atol=1e-4)
    assert runner.interface.input("input_ids").dims == (runner.interface.batch, 1)


def test_rows_of_different_lengths_are_independent() -> None:
    model, ids = static_model("llama", "optimum-sdpa"), random_ids(30)
    counts = [(5, 2), (0, 7), (9, 9), (1, 0), (3, 4)]
    for row, logits in enumerate(StepRunner(model, 2).ragged_logits(ids, counts)):
        assert len(logits) == sum(step[row] for step in counts)
        alone = torch_steps("llama", ids[row : row + 1, : len(logits)], [len(logits)])[0]
        np.testing.assert_allclose(logits, alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("style", ["optimum-sdpa", "optimum-scatter"])
def test_a_sliding_window_is_recognized(style: str) -> None:
    windows = {layer.window for layer in KvStatic.inspect(load(export("mistral", style))).layers}
    assert windows == {WINDOW}
    assert {layer.window for layer in KvStatic.inspect(load(export("llama", style))).layers} == {None}


def test_inspect_returns_the_specification_and_leaves_the_model_unchanged() -> None:
    model = load(export("gpt2", "optimum-sdpa"))
    before = fingerprint(model)
    spec = KvStatic.inspect(model)
    assert fingerprint(model) == before
    assert (len(spec.layers), spec.position_encoding, spec.max_positions, spec.is_static) == (
        LAYERS,
        "learned",
        MAX_POSITIONS,
        False,
    )
    layer = spec.layers[1]
    assert (layer.heads, layer.kv_heads, layer.key.head_size, layer.key.dtype) == (4, 4, 16, "float32")
    assert layer.key.state == "past_key_values.1.key"


def test_alibi_is_recognized_and_exact_with_padding() -> None:
    spec = KvStatic.inspect(load(export("bloom", "optimum-sdpa")))
    assert (spec.position_encoding, spec.max_positions, spec.padding) == ("alibi", None, True)
    model, ids = static_model("bloom", "optimum-sdpa"), random_ids(24)
    runner, reference = StepRunner(model, 2), torch_steps("bloom", ids, [24])
    first = runner.step(ids[:, :9], np.repeat([[1] * 9, [1] * 4 + [0] * 5], 1, axis=0))["logits"]
    np.testing.assert_allclose(first[0], reference[0, :9], rtol=0, atol=1e-4)
    np.testing.assert_allclose(first[1, :4], reference[1, :4], rtol=0, atol=1e-4)
    second = runner.step(np.stack([ids[0, 9:17], ids[1, 4:12]]))["logits"]
    np.testing.assert_allclose(second[0], reference[0, 9:17], rtol=0, atol=1e-4)
    np.testing.assert_allclose(second[1], reference[1, 4:12], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "pass_",
    [
        KvEvict(score="knorm", budget="32"),
        KvWindow(window=28),
        KvSelect(page_size=16, selected_pages=2),
        KvCompact(budget="32"),
    ],
)
def test_passes_that_drop_tokens_refuse_alibi(pass_: Pass) -> None:
    model = static_model("bloom", "optimum-sdpa")
    before = fingerprint(model)
    outcome = pass_.rewrite(model, CONTEXT)
    assert isinstance(outcome, Refusal)
    assert "ALiBi" in outcome.reason
    assert "kv-quant" in (outcome.hint or "")
    assert fingerprint(model) == before


@pytest.mark.parametrize("op_type", ["Sin", "Exp"])
def test_biases_that_are_not_linear_are_refused(op_type: str) -> None:
    model = load(export("bloom", "dynamo-23"))
    (slopes,) = (
        node
        for node in model.graph
        if node.op_type == "Mul" and {(1, 4, 1), (4, 1)} & {shape_of(value) for value in node.inputs}
    )
    replacement = ir.node(op_type, [slopes.outputs[0]])
    slopes.outputs[0].replace_all_uses_with(replacement.outputs[0])
    replacement.replace_input_with(0, slopes.outputs[0])
    model.graph.insert_after(slopes, replacement)
    outcome = KvStatic(capacity=CAPACITY).rewrite(model, CONTEXT)
    assert isinstance(outcome, Refusal)
    assert "no slope" in outcome.reason


def test_states_are_written_in_place() -> None:
    interface = interface_of(static_model("llama", "optimum-sdpa"))
    caches = [state for state in interface.states if state.name != "length"]
    assert len(caches) == 2 * LAYERS
    assert all(state.in_place and state.append_axis is None for state in caches)
    assert interface.capacity == CAPACITY
    assert interface.input("attention_mask").dims == interface.input("input_ids").dims


@pytest.mark.parametrize(
    ("architecture", "style", "location"),
    [("gptj", "dynamo-24-bare", "repeat_interleave")],
)
def test_unrecognized_models_are_refused_and_left_unchanged(architecture: str, style: str, location: str) -> None:
    model = load(export(architecture, style))
    before = fingerprint(model)
    outcome = KvStatic(capacity=CAPACITY).rewrite(model, CONTEXT)
    assert isinstance(outcome, Refusal)
    assert location in f"{outcome.location}: {outcome.reason}"
    assert fingerprint(model) == before
    with pytest.raises(ModelError):
        KvStatic.inspect(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"capacity": 0}, "`capacity` must be at least 1 (got 0)"), ({"capacity": 4, "step": 5}, "(got step=5, capacity=4)")],
)
def test_invalid_sizes_are_refused(options: dict[str, int], message: str) -> None:
    outcome = KvStatic(**options).rewrite(load(export("llama", "optimum-sdpa")), CONTEXT)
    assert isinstance(outcome, Refusal)
    assert message in outcome.reason


def test_capacity_beyond_the_position_table_is_refused() -> None:
    outcome = KvStatic(capacity=MAX_POSITIONS + 1).rewrite(load(export("gpt2", "optimum-sdpa")), CONTEXT)
    assert isinstance(outcome, Refusal)
    assert f"{MAX_POSITIONS} positions" in outcome.reason
    assert outcome.hint == f"kv-static{{capacity={MAX_POSITIONS}}}"


def test_capacity_beyond_the_rope_table_is_refused() -> None:
    model = load(export("gptj", "optimum-sdpa"))
    before = fingerprint(model)
    outcome = KvStatic(capacity=MAX_POSITIONS + 1).rewrite(model, CONTEXT)
    assert isinstance(outcome, Refusal)
    assert f"RoPE table of the keys, which has {MAX_POSITIONS} positions" in outcome.reason
    assert outcome.hint == f"kv-static{{capacity={MAX_POSITIONS}}}"
    assert fingerprint(model) == before
    assert isinstance(KvStatic(capacity=MAX_POSITIONS).rewrite(model, CONTEXT), Change)


def test_capacity_beyond_the_probed_length_is_refused_without_caches() -> None:
    outcome = KvStatic(capacity=5000).rewrite(load(export("llama", "prefill-23")), CONTEXT)
    assert isinstance(outcome, Refusal)
    assert "over 4096 tokens" in outcome.reason


def test_only_attention_over_caches_is_decomposed() -> None:
    model = static_model("llama", "optimum-sdpa")
    for key in [*model.metadata_props]:
        if key.endswith(".kv"):
            del model.metadata_props[key]
    before = sum(node.op_type == "Attention" for node in model.graph)
    Attention().rewrite(model, CONTEXT)
    assert sum(node.op_type == "Attention" for node in model.graph) == before == LAYERS


def test_a_group_query_attention_with_a_sink_is_refused() -> None:
    model = load(export("llama", "genai"))
    node = next(node for node in model.graph if node.op_type == "GroupQueryAttention")
    node.attributes["smooth_softmax"] = ir.AttrInt64("smooth_softmax", 1)
    outcome = KvStatic(capacity=CAPACITY).rewrite(model, CONTEXT)
    assert isinstance(outcome, Refusal)
    assert "GroupQueryAttention" in outcome.reason
    assert "attention sink" in outcome.reason


def test_a_window_of_a_group_query_attention_is_kept() -> None:
    model = load(export("llama", "genai"))
    for node in model.graph:
        if node.op_type == "GroupQueryAttention":
            node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", 9)
    ids, spec = random_ids(30), KvStatic.inspect(model)
    assert {layer.window for layer in spec.layers} == {9}
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    past = {name: np.zeros((2, 2, 0, 16), np.float32) for name in cache_names("past_key_values")}
    expected = session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids), **past})[0]
    assert isinstance(KvStatic(capacity=CAPACITY).rewrite(model, CONTEXT), Change)
    runner = StepRunner(model, 2)
    logits = runner.logits(ids, [5] * 6)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


def test_a_mask_that_is_not_causal_is_refused() -> None:
    model = load(export("llama", "optimum-sdpa"))
    for node in model.graph:
        if node.op_type == "LessOrEqual":
            node.op_type = "GreaterOrEqual"
    outcome = KvStatic(capacity=CAPACITY).rewrite(model, CONTEXT)
    assert isinstance(outcome, Refusal)
    assert "causal" in outcome.reason


def test_a_cache_that_no_attention_reads_is_refused() -> None:
    model = load(export("llama", "optimum-sdpa"))
    extra = ir.Value(
        name="past_other", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch_size", 2, "past_sequence_length", 16])
    )
    model.graph.inputs.append(extra)
    source = next(value for value in model.graph.inputs if value.name == "past_key_values.0.key")
    join = ir.node("Concat", [extra, source], {"axis": 2}, name="join")
    model.graph.append(join)
    join.outputs[0].name, join.outputs[0].type = "present_other", extra.type
    join.outputs[0].shape = ir.Shape(["batch_size", 2, "past_sequence_length + other", 16])
    model.graph.outputs.append(join.outputs[0])
    outcome = KvStatic(capacity=CAPACITY).rewrite(model, CONTEXT)
    assert isinstance(outcome, Refusal), outcome


def test_onnxruntime_writes_the_caches_in_place() -> None:
    model = static_model("llama", "optimum-sdpa", step=1)
    assert Attention().rewrite(model, CONTEXT)
    interface = interface_of(model)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    binding, bound = session.io_binding(), {}
    for state in interface.states:
        spec = interface.input(state.input)
        array = np.zeros([1 if isinstance(dim, str) else dim for dim in spec.dims or ()], spec.dtype)
        bound[state.name] = ort.OrtValue.ortvalue_from_numpy(array)
        other = bound[state.name] if state.in_place else ort.OrtValue.ortvalue_from_numpy(array.copy())
        binding.bind_ortvalue_input(state.input, bound[state.name])
        binding.bind_ortvalue_output(state.output, other)
    binding.bind_cpu_input("input_ids", np.array([[5]]))
    binding.bind_cpu_input("attention_mask", np.array([[1]]))
    binding.bind_output("logits")
    session.run_with_iobinding(binding)
    expected = StepRunner(model, 1).step(np.array([[5]]))
    for state in interface.states:
        if state.in_place:
            assert np.array_equal(bound[state.name].numpy(), expected[state.output])
            assert bound[state.name].numpy().any()
