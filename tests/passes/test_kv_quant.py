"""kv-quant: slots hold the codes of the reference's tokens, and attention reads the dequantized vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import quant_reference
from support.decoders import VOCABULARY, cached_steps, export, module
from support.examples import examples
from support.kv_oracle import HeadOracle
from support.rewritten_decoders import cache_spec, instrumented, rewritten
from support.step_runner import StepRunner, state_bytes
from transformers.cache_utils import Cache, CacheLayerMixin

from ryzen_compile.backends.api import BuildRequest
from ryzen_compile.backends.tensorrt_rtx.backend import BACKEND as RTX
from ryzen_compile.ir.fingerprint import fingerprint
from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.ir.load import load
from ryzen_compile.ir.save import save
from ryzen_compile.pipeline.ordering import order_passes
from ryzen_compile.pipeline.rules import find_problems
from ryzen_compile.progress import SilentProgress
from ryzen_compile.registry import find_backend
from ryzen_compile.spec.kv_cache import CacheTensorSpec, KVCacheSpec, Quantization
from ryzen_compile.spec.passes import Change, Pass, PassContext, Refusal
from ryzen_compile.spec.profile import Profile
from ryzen_compile.spec.target import parse_targets
from ryzen_passes.attention import Attention
from ryzen_passes.fold import Fold
from ryzen_passes.kv.evict import KvEvict
from ryzen_passes.kv.quant import KvQuant
from ryzen_passes.kv.quant.torch_reference import fake_quantize
from ryzen_passes.kv.select import KvSelect
from ryzen_passes.kv.static import KvStatic
from ryzen_passes.precision import ConvertPrecision
from ryzen_passes.properties import KV_DENSE, KV_STATIC, KV_UNQUANTIZED

Array = np.ndarray[Any, Any]
STYLE, CAPACITY = "optimum-sdpa", 96
EVICT = {"sinks": 2, "recent_window": 3}
FORMS = {
    "static-any": (0, False, "onnxruntime"),
    "static-one": (1, False, "onnxruntime"),
    "evict-any": (0, True, "onnxruntime"),
    "evict-one": (1, True, "onnxruntime"),
    "evict-one-op": (1, True, "tensorrt"),
}
"""Tokens per step (0: any number), eviction, and backend: every way in which caches are written."""
PAIRS = [("8", "8"), ("fp8", "fp8"), ("4", "4"), ("8", "4")]


def quantizing_passes(form: str, *passes: Pass, slots: int = 12) -> tuple[Pass, ...]:
    """Return the passes that write caches in `form`, and `passes`; `slots` is the budget of eviction."""
    step, evicts, _ = FORMS[form]
    return (
        KvStatic(ring_buffers=False, capacity=CAPACITY, step=step),
        *[KvEvict(score="knorm", budget=str(slots), **EVICT)] * evicts,
        *passes,
    )


def quantized_decoder(architecture: str, form: str, *passes: Pass, slots: int = 12) -> ir.Model:
    return rewritten(architecture, *quantizing_passes(form, *passes, slots=slots), backend=FORMS[form][2])


@settings(max_examples=examples(13), deadline=None)
@given(data=st.data())
def test_every_slot_holds_the_codes_of_its_token(data: st.DataObject) -> None:
    """After every step, with padding and rows without tokens; each token is quantized once, when it is appended."""
    form = data.draw(st.sampled_from(sorted(FORMS)))
    keys, values = data.draw(st.sampled_from([*PAIRS, ("16", "4"), ("fp8", "16")] if form != "evict-any" else PAIRS))
    if form == "evict-one-op":
        keys, values = data.draw(st.sampled_from(PAIRS))
    slots, batch = data.draw(st.sampled_from([5, 9])), data.draw(st.integers(1, 3))
    passes = quantizing_passes(form, KvQuant(keys=keys, values=values), slots=slots)
    model, interface, spec, _ = instrumented("llama", *passes, backend=FORMS[form][2])
    runner = StepRunner(model, batch, interface)
    step, evicts, _ = FORMS[form]
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    # Without eviction the reference is a head of as many slots as the capacity.
    heads: dict[tuple[int, int, int], HeadOracle] = {}
    for layer in range(len(spec.layers)):
        for row, head in np.ndindex(batch, spec.layers[layer].kv_heads):
            heads[layer, row, head] = HeadOracle(slots if evicts else CAPACITY, **EVICT)
    seen_tokens = np.zeros(batch, int)
    for _ in range(data.draw(st.integers(1, 10))):
        step_size = step or data.draw(st.integers(1, 6))
        counts = np.array([data.draw(st.integers(0, step_size)) for _ in range(batch)])
        before = {name: value.copy() for name, value in runner.states.items()}
        outputs = runner.step(
            random.integers(0, VOCABULARY, (batch, step_size)), (np.arange(step_size) < counts[:, None]).astype(np.int64)
        )
        states = {state.name: outputs[state.output] for state in runner.interface.states}
        first_row = 0
        for index, layer in enumerate(spec.layers):
            new = [outputs[tensor.update] for tensor in (layer.key, layer.value)]
            for row, head in np.ndindex(batch, layer.kv_heads):
                norms = -np.linalg.norm(new[0][row, head].astype(np.float64), axis=-1)
                scores = {int(seen_tokens[row]) + n: float(norms[n]) for n in range(counts[row])}
                if evicts:  # ties are decided by the scores as rounded in the graph
                    state_row = (row, first_row + head)
                    stored_scores = dict(
                        zip(states["position"][state_row].tolist(), states["score"][state_row].tolist(), strict=True)
                    )
                    for position in scores.keys() & stored_scores.keys():
                        assert stored_scores[position] == pytest.approx(scores[position], rel=1e-5)
                        scores[position] = stored_scores[position]
                new_tokens = [
                    (int(seen_tokens[row]) + n, scores[int(seen_tokens[row]) + n], new[0][row, head, n], new[1][row, head, n])
                    for n in range(counts[row])
                ]
                reference = heads[index, row, head]
                reference.append(new_tokens)
                if evicts:
                    assert states["position"][row, first_row + head].tolist() == reference.positions()
                for slot, token in enumerate(reference.entries):
                    if token is None:
                        continue
                    for tensor, vector in zip((layer.key, layer.value), token[2:], strict=True):
                        codes = states[tensor.state or ""][row, head, slot]
                        if (quantization := tensor.quantization) is None:
                            assert np.array_equal(codes, vector)
                            continue
                        scale = states[quantization.scale_state][row, head, slot]
                        assert (
                            quant_reference.quantization_error(
                                quantization.storage_type,
                                vector[None],
                                codes[None],
                                scale[None],
                                is_rotated=quantization.is_rotated,
                            )
                            is None
                        )
            first_row += layer.kv_heads
        if evicts:
            for row in np.flatnonzero(counts == 0):
                for state in runner.interface.states:
                    assert np.array_equal(runner.states[state.input][row], before[state.input][row]), state.name
        seen_tokens += counts


@pytest.mark.parametrize(("keys", "values"), PAIRS)
@pytest.mark.parametrize("form", ["static-any", "evict-any", "evict-one-op"])
def test_tokens_have_the_same_slots_as_without_quantization(form: str, keys: str, values: str) -> None:
    """Slot by slot in the first layer, whose keys do not depend on quantized values."""
    unquantized_runner = StepRunner(quantized_decoder("llama", form), 2)
    quantized_runner = StepRunner(quantized_decoder("llama", form, KvQuant(keys=keys, values=values)), 2)  # type: ignore[arg-type]
    ids = np.random.default_rng(5).integers(0, VOCABULARY, (2, 60))
    chunk = FORMS[form][0] or 7
    for at in range(0, 60 - chunk, chunk):
        unquantized, quantized = (runner.step(ids[:, at : at + chunk]) for runner in (unquantized_runner, quantized_runner))
    for state, storage_type in (("key", keys), ("value", values)):
        vectors = unquantized[f"present.0.{state}"]
        filled = np.abs(vectors).max(axis=-1) > 0
        codes, scale = quantized[f"present.0.{state}"], quantized[f"present.0.{state}.scale"]
        assert filled.any()
        assert (
            quant_reference.quantization_error(
                storage_type, vectors[filled], codes[filled], scale[filled], is_rotated=storage_type == "8"
            )
            is None
        )


class PresetCacheLayer(CacheLayerMixin):  # type: ignore[misc]
    """A Transformers cache layer whose keys and values are set by the test."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: tuple[torch.Tensor, torch.Tensor]
        """The keys and the values, (batch, kv_heads, rows, head_size)."""
        self.appends_update = False
        """Whether `update` appends the keys and values of the step."""
        self.seen_tokens = self.past = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        pass

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.appends_update:
            return self.rows
        return tuple(torch.cat([old, new], dim=2) for old, new in zip(self.rows, (key_states, value_states), strict=True))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.rows[0].shape[2] + (query_length if self.appends_update else 0), self.past

    def get_seq_length(self) -> int:
        return self.seen_tokens

    def get_max_length(self) -> int:
        return -1


CASES = [
    *(("llama", form, *pair) for form in FORMS for pair in PAIRS),
    *(("llama", form, *pair) for form in ("static-any", "evict-one") for pair in (("16", "4"), ("4", "16"))),
    *(("mistral", form, "4", "4") for form in ("static-any", "static-one")),
    *((architecture, form, "8", "4") for architecture in ("gpt2", "falcon") for form in ("evict-any", "evict-one")),
]


@pytest.mark.parametrize("style", ["dynamo-21", "dynamo-23-bare"])
def test_caches_that_define_the_batch_size_are_quantized(style: str) -> None:
    model = load(export("llama", style))
    for pass_ in (KvStatic(capacity=CAPACITY), KvQuant(keys="4", values="4")):
        assert isinstance(pass_.rewrite(model, PassContext(backend="onnxruntime")), Change)


@pytest.mark.parametrize(("architecture", "form", "keys", "values"), CASES)
def test_attention_reads_the_dequantized_vectors(architecture: str, form: str, keys: str, values: str) -> None:
    """The logits equal those of the Transformers module over the vectors that numpy dequantizes from the graph's states.

    For ONNX Runtime the graph is also rewritten by `attention`, as in a build.
    """
    step, evicts, backend = FORMS[form]
    quant = KvQuant(keys=keys, values=values)  # type: ignore[arg-type]
    model = quantized_decoder(architecture, form, quant, *([Attention()] if backend == "onnxruntime" else []))
    spec, runner = cache_spec(model), StepRunner(model, 2)
    ids = np.random.default_rng(6).integers(0, VOCABULARY, (2, 50))
    layers, seen_tokens = [PresetCacheLayer() for _ in spec.layers], 0
    for chunk in [1] * 40 if step else [7, 1, 9, *[1] * 8, 10, 8]:
        past = {state.name: runner.states[state.input] for state in runner.interface.states}
        outputs = runner.step(ids[:, seen_tokens : seen_tokens + chunk])
        now = {state.name: outputs[state.output] for state in runner.interface.states}
        appends_update = evicts and not step
        for cache_layer, layer in zip(layers, spec.layers, strict=True):
            filled = min(seen_tokens + (0 if appends_update else chunk), layer.policy.slots)
            cache_layer.rows = tuple(  # type: ignore[assignment]
                torch.from_numpy(vectors(past if appends_update else now, tensor)[:, :, :filled].astype(np.float32))
                for tensor in (layer.key, layer.value)
            )
            cache_layer.appends_update, cache_layer.seen_tokens, cache_layer.past = (
                appends_update,
                seen_tokens,
                seen_tokens - min(seen_tokens, layer.policy.slots),
            )
        places = torch.arange(seen_tokens, seen_tokens + chunk).expand(2, chunk)
        with torch.no_grad():
            tokens = torch.from_numpy(ids[:, seen_tokens : seen_tokens + chunk])
            expected = module(architecture)(tokens, past_key_values=Cache(layers=layers), use_cache=True, position_ids=places)
        np.testing.assert_allclose(outputs["logits"], expected.logits.numpy(), rtol=0, atol=1e-4)
        seen_tokens += chunk


def vectors(states: dict[str, Array], tensor: CacheTensorSpec) -> Array:
    """Return the dequantized vectors (batch, kv_heads, slots, head_size) of a state."""
    codes, quantization = states[tensor.state or ""], tensor.quantization
    if quantization is None:
        return codes
    return quant_reference.dequantize(
        quantization.storage_type, codes, states[quantization.scale_state], is_rotated=quantization.is_rotated
    )


def reference_steps(spec: KVCacheSpec, single_token: bool, ids: Array, chunks: list[int], pass_: type[Pass] = KvQuant) -> Array:
    """Return the logits of the Transformers module over caches of `spec`."""
    make = pass_.torch_cache_factory(spec, single_token=single_token)
    assert make is not None
    return cached_steps(module("llama"), make(), ids, chunks)


@pytest.mark.parametrize(("keys", "values"), PAIRS)
@pytest.mark.parametrize("form", FORMS)
def test_the_torch_reference_agrees_with_the_graph(form: str, keys: str, values: str) -> None:
    """Most logits agree to rounding; single codes may differ by one level because of float32 rounding."""
    step, evicts, _ = FORMS[form]
    model = quantized_decoder("llama", form, KvQuant(keys=keys, values=values))  # type: ignore[arg-type]
    ids = np.stack([np.random.default_rng(row).permutation(VOCABULARY)[:60] for row in range(2)])
    chunks = [1] * 60 if step else [7, 1, 30, *[1] * 12, 10]
    spec, exact_spec = cache_spec(model), cache_spec(quantized_decoder("llama", form))
    assert KvStatic.torch_cache_factory(spec, single_token=True) is None
    assert KvEvict.torch_cache_factory(spec, single_token=True) is None
    assert KvQuant.torch_cache_factory(exact_spec, single_token=True) is None
    reference_logits = reference_steps(spec, step == 1, ids, chunks)
    runner, logits, at = StepRunner(model, 2), [], 0
    for chunk in chunks:
        logits.append(runner.step(ids[:, at : at + chunk])["logits"])
        at += chunk
    error = np.abs(np.concatenate(logits, axis=1) - reference_logits)
    quantization_loss = np.abs(
        reference_logits - reference_steps(exact_spec, step == 1, ids, chunks, KvEvict if evicts else KvStatic)
    )[:, 20:]
    assert np.median(error) < 1e-4
    assert error.mean() < quantization_loss.mean() / 20


@pytest.mark.parametrize("storage_type", ["8", "4"])
def test_keys_values_queries_and_outputs_are_rotated_once(storage_type: Any) -> None:
    plain = quantized_decoder("llama", "evict-any")
    quantized = quantized_decoder("llama", "evict-any", KvQuant(keys=storage_type, values=storage_type))
    products = [sum(node.op_type == "MatMul" for node in model.graph) for model in (plain, quantized)]
    assert products[1] - products[0] == 4 * len(cache_spec(plain).layers)


def test_rotation_spreads_outliers_over_the_elements() -> None:
    """The keys of real models have elements several times larger than the others, which alone determine the scale."""
    vectors = np.random.default_rng(1).normal(size=(50, 256)).astype(np.float32)
    vectors[:, 3] *= 30
    errors = []
    for is_rotated in (False, True):
        quantization = Quantization(storage_type="8", scale_state="", is_rotated=is_rotated)
        dequantized = fake_quantize(torch.from_numpy(vectors), quantization).numpy()
        errors.append(np.linalg.norm(dequantized - vectors) / np.linalg.norm(vectors))
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize(("storage_type", "is_rotated"), [("fp8", False), ("8", False), ("8", True), ("4", True)])
def test_fake_quantize_equals_numpy(storage_type: Any, is_rotated: bool) -> None:
    vectors = np.random.default_rng(1).normal(size=(50, 32)).astype(np.float32)
    vectors[:, 3] *= 20
    vectors[7] = 0
    quantization = Quantization(storage_type=storage_type, scale_state="", is_rotated=is_rotated)
    dequantized = fake_quantize(torch.from_numpy(vectors), quantization).numpy().astype(np.float64)
    if storage_type == "4":
        scale = np.sqrt((vectors.astype(np.float64) ** 2).mean(axis=-1))
        rotated = vectors @ quant_reference.rotation_matrix(32).T / np.where(scale > 0, scale, 1)[:, None]
        nearest = quant_reference.LEVELS[np.abs(rotated[..., None] - quant_reference.LEVELS).argmin(axis=-1)]
        expected = nearest @ quant_reference.rotation_matrix(32) * scale[:, None]
    else:
        limit = np.float32(448 if storage_type == "fp8" else 127)
        vectors = (vectors @ quant_reference.rotation_matrix(32).T).astype(np.float32) if is_rotated else vectors
        scale = np.abs(vectors).max(axis=-1) / limit
        ratio = vectors / np.where(scale > 0, scale, np.float32(1))[:, None]
        integers = np.rint(ratio).astype(np.int8)
        as_codes = ratio.astype(quant_reference.ml_dtypes.float8_e4m3fn).view(np.int8) if storage_type == "fp8" else integers
        expected = quant_reference.dequantize(storage_type, as_codes, scale, is_rotated=is_rotated)
    np.testing.assert_allclose(dequantized, expected, rtol=1e-6 if storage_type == "8" and is_rotated else 0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_bound_states_equal_states_passed_by_value(form: str, tmp_path: Path) -> None:
    step, _, _ = FORMS[form]
    model = quantized_decoder("llama", form, KvQuant(keys="8", values="4"), Attention(), slots=12)
    save(model, tmp_path / "decoder.onnx")
    reference, ids = StepRunner(model, 2), np.random.default_rng(4).integers(0, VOCABULARY, (2, 40))
    states = reference.interface.states
    caches = [state.in_place for state in states if state.name != "length"]
    # In the form evict-any attention reads the slots from before the step, so that they cannot be written in place.
    assert caches == [form != "evict-any"] * len(caches)
    shapes = {name: array.shape for name, array in reference.states.items()}
    with find_backend("onnxruntime").open(str(tmp_path / "decoder.onnx")) as session:
        steps = session.bind_states(states, shapes)
        for at in range(0, 40, step or 5):
            tokens = ids[:, at : at + (step or 5)]
            bound = steps.run({"input_ids": tokens, "attention_mask": np.ones_like(tokens)})
            expected = reference.step(tokens)
            np.testing.assert_allclose(bound["logits"], expected["logits"], rtol=0, atol=1e-5)
            for state in states:
                np.testing.assert_array_equal(steps.read(state.name), expected[state.output])
        steps.close()


@pytest.mark.parametrize(
    ("form", "options"),
    [("static-one", {}), ("evict-one", {"keys": "8", "values": "16"}), ("evict-any", {"keys": "fp8", "protect": ("last",)})],
)
def test_estimate_equals_the_change_in_state_bytes(form: str, options: dict[str, Any]) -> None:
    model, pass_ = quantized_decoder("llama", form), KvQuant(**options)
    before, estimate = state_bytes(model), pass_.estimate(model, PassContext(backend="onnxruntime"))
    assert isinstance(pass_.rewrite(model, PassContext(backend="onnxruntime")), Change)
    assert estimate.state_bytes == state_bytes(model) - before < 0


def test_a_4_bit_vector_of_16_elements_takes_12_bytes() -> None:
    """8 bytes of codes and 4 of the scale instead of 64, for the keys and the values of every slot."""
    full_bytes, quantized_bytes = (
        state_bytes(quantized_decoder("llama", "static-one", *passes)) for passes in ((), (KvQuant(keys="4", values="4"),))
    )
    assert full_bytes - quantized_bytes == 2 * 2 * 2 * CAPACITY * (64 - 12)


def test_protected_layers_are_not_quantized() -> None:
    spec = cache_spec(quantized_decoder("llama", "static-one", KvQuant(keys="4", values="4", protect=("first",))))
    assert [(layer.key.storage_name, layer.value.storage_name) for layer in spec.layers] == [("float32", "float32"), ("4", "4")]
    interface = interface_of(quantized_decoder("llama", "static-one", KvQuant(keys="4", values="4", protect=("first",))))
    dtypes = {state.name: interface.input(state.input).dtype for state in interface.states}
    assert dtypes["past_key_values.0.key"] == "float32"
    assert dtypes["past_key_values.1.key"] == "int8"
    assert dtypes["past_key_values.1.key.scale"] == "float32"
    model = quantized_decoder("llama", "static-one")
    assert not KvQuant(keys="4", values="4", protect=("first", "1")).rewrite(model, PassContext(backend="onnxruntime"))
    assert not KvQuant(keys="16", values="16").rewrite(model, PassContext(backend="onnxruntime"))


def test_properties_follow_the_rewrite_and_order_the_passes() -> None:
    model = quantized_decoder("llama", "static-one")
    assert KV_UNQUANTIZED.check(model) is None
    model = quantized_decoder("llama", "evict-one", KvQuant(keys="4", values="16"))
    assert KV_STATIC.check(model) is None
    assert "its keys quantized as 4" in (KV_UNQUANTIZED.check(model) or "")
    properties = frozenset({KV_UNQUANTIZED, KV_DENSE})
    requested = (KvStatic(capacity=64), KvQuant(keys="4", values="4"), KvEvict(score="knorm", budget="16", recent_window=4))
    ordered, _ = order_passes(requested, properties)
    assert [pass_.name for pass_ in ordered] == ["kv-static", "kv-evict", "kv-quant"]
    assert find_problems(ordered, properties, ()) == []
    (duplicate,) = find_problems(
        (KvStatic(capacity=64), KvQuant(keys="4", values="4"), KvQuant(keys="4", values="4")), properties, ()
    )
    assert (duplicate.code, duplicate.hint) == ("property-invalidated", "list `kv-quant` once")


@pytest.mark.parametrize(
    ("form", "options", "message", "hint"),
    [
        ("static-one", {"protect": ("2",)}, "`2` is not a layer of the model, which has 2 layers", "protect=[first,last]"),
        ("static-one", {"protect": ("middle",)}, "`middle` is not a layer", "protect=[first,last]"),
        ("evict-any", {"keys": "16"}, "keys and values of one element type", "8 instead of 16"),
    ],
)
def test_invalid_options_are_refused_and_leave_the_model_unchanged(
    form: str, options: dict[str, Any], message: str, hint: str
) -> None:
    check_refused(quantized_decoder("llama", form), KvQuant(**options), message, hint)


def check_refused(model: ir.Model, pass_: KvQuant, message: str, hint: str) -> None:
    before = fingerprint(model)
    outcome = pass_.rewrite(model, PassContext(backend="onnxruntime"))
    assert isinstance(outcome, Refusal)
    assert message in outcome.reason
    assert hint in (outcome.hint or "")
    assert fingerprint(model) == before


def test_four_bits_of_an_odd_head_size_are_refused() -> None:
    model = quantized_decoder("llama", "static-one")
    spec = cache_spec(model)
    key = spec.layers[1].key
    text = model.metadata_props["ryzen_compile.kv"].replace(
        f'"update":"{key.update}","cache":"{key.cache}","head_size":16',
        f'"update":"{key.update}","cache":"{key.cache}","head_size":24',
    )
    assert text != model.metadata_props["ryzen_compile.kv"]
    model.metadata_props["ryzen_compile.kv"] = text
    check_refused(
        model,
        KvQuant(keys="4", values="4"),
        "head size 24 of the keys: storage type 4 requires a power of two from 16 to 512",
        "keys=8",
    )
    estimate = KvQuant(keys="4", values="4").estimate(model, PassContext(backend="onnxruntime"))
    assert isinstance(estimate, Refusal)
    assert "head size 24 of the keys" in estimate.reason


def test_quantized_caches_growing_caches_and_other_writes_are_refused() -> None:
    check_refused(
        quantized_decoder("llama", "static-one", KvQuant(keys="4", values="4")),
        KvQuant(keys="4", values="4"),
        "its keys quantized as 4",
        "once",
    )
    model = quantized_decoder("llama", "static-one")
    for layer in cache_spec(model).layers:
        cache_names = (layer.key.cache, layer.value.cache)
        for writer in {node for node in model.graph for value in node.outputs if value.name in cache_names}:
            writer.op_type = "Other"
    check_refused(model, KvQuant(keys="4", values="4"), "not written by kv-static or kv-evict", "after the pass that decides")
    check_refused(load(export("llama", STYLE)), KvQuant(keys="4", values="4"), "grow", "kv-static")


@pytest.mark.parametrize("form", FORMS)
def test_attention_is_fused_on_tensorrt(form: str, tmp_path: Path) -> None:
    """Built for three GPU architectures: one fused kernel per attention, for every storage type."""
    model = quantized_decoder("llama", form, KvQuant(keys="8", values="4"), slots=16)
    # TensorRT has no fused fp32 kernel for steps of several tokens.
    for pass_ in (Fold(), *([] if FORMS[form][0] else [ConvertPrecision(to="fp16")]), Attention()):
        assert isinstance(pass_.rewrite(model, PassContext(backend="tensorrt-rtx")), Change)
    save(model, tmp_path / "decoder.onnx")
    interface, seq = interface_of(model), FORMS[form][0]
    sizes: list[dict[str, tuple[int, ...]]] = [{}, {}, {}]
    for spec in interface.inputs:
        for at, (batch, tokens) in enumerate(((1, seq or 2), (2, seq or 8), (4, seq or 16))):
            named = {interface.batch: batch}
            sizes[at][spec.name] = tuple(dim if isinstance(dim, int) else named.get(dim, tokens) for dim in spec.dims or ())
    request = BuildRequest(
        onnx_path=str(tmp_path / "decoder.onnx"),
        output=str(tmp_path / "decoder.plan"),
        targets=parse_targets("sm86,sm89,sm120"),
        profiles=(Profile(min=sizes[0], opt=sizes[1], max=sizes[2]),),
    )
    layers = RTX.build(request, SilentProgress()).layers
    assert layers is not None
    assert [fusion.fused for fusion in layers.attentions] == [True] * len(cache_spec(model).layers)


@pytest.mark.parametrize("step", [0, 1])
def test_quantization_refuses_rescored_caches(step: int) -> None:
    for rescore_interval, is_refused in ((2, True), (0, False)):
        evict = KvEvict(score="keydiff", budget="12", sinks=1, recent_window=2, rescore_interval=rescore_interval)
        model = load(export("llama", STYLE))
        for pass_ in (KvStatic(capacity=64, step=step), evict):
            assert isinstance(pass_.rewrite(model, PassContext(backend="onnxruntime")), Change)
        outcome = KvQuant(keys="8", values="8").rewrite(model, PassContext(backend="onnxruntime"))
        assert isinstance(outcome, Refusal) == is_refused
        if isinstance(outcome, Refusal):
            assert "to rescore tokens" in outcome.reason
            assert "kvzap" in (outcome.hint or "")


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("storage_type", ["8", "4"])
def test_quantization_refuses_page_summaries(step: int, storage_type: Any) -> None:
    model = load(export("llama", STYLE))
    for pass_ in (KvStatic(capacity=CAPACITY, step=step), KvSelect(page_size=16, selected_pages=6)):
        assert isinstance(pass_.rewrite(model, PassContext(backend="onnxruntime")), Change)
    outcome = KvQuant(keys=storage_type, values=storage_type).rewrite(model, PassContext(backend="onnxruntime"))
    assert isinstance(outcome, Refusal)
    assert "would read codes instead of keys or values" in outcome.reason
    assert "after the pass that decides which tokens are kept" in (outcome.hint or "")
