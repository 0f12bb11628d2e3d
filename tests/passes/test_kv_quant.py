"""kv-quant: slots hold the codes of the tokens that a slow reference holds there, and attention reads what they stand for."""

from __future__ import annotations

import functools
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
from support.kv_oracle import HeadOracle
from support.step_runner import StepRunner
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
from ryzen_compile.spec.interface import Interface
from ryzen_compile.spec.kv_cache import CacheTensorSpec, KVCacheSpec, read_kv_cache_spec
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
EVICT = {"sinks": 2, "recent": 3}
FORMS = {
    "static-any": (0, False, "onnxruntime"),
    "static-one": (1, False, "onnxruntime"),
    "evict-any": (0, True, "onnxruntime"),
    "evict-one": (1, True, "onnxruntime"),
    "evict-one-op": (1, True, "tensorrt"),
}
"""Tokens of a step (0: any), whether it evicts, and for which backend: all ways in which caches are written."""
PAIRS = [("8", "8"), ("fp8", "fp8"), ("4", "4"), ("8", "4")]


def rewritten(architecture: str, form: str, *passes: Pass, slots: int = 12) -> ir.Model:
    step, evicts, backend = FORMS[form]
    model, evict = load(export(architecture, STYLE)), KvEvict(budget=str(slots), **EVICT)
    for pass_ in (KvStatic(capacity=CAPACITY, step=step), *[evict] * evicts, *passes):
        outcome = pass_.rewrite(model, PassContext(backend=backend))
        assert isinstance(outcome, Change), outcome
    return model


def told_of(model: ir.Model) -> KVCacheSpec:
    told = read_kv_cache_spec(model)
    assert told is not None
    return told


@functools.cache
def watched(form: str, keys: str, values: str, slots: int) -> tuple[ir.Model, Interface, KVCacheSpec]:
    """Return a quantised llama with what each step adds among its outputs, its interface without those, and its map."""
    model = rewritten("llama", form, KvQuant(keys=keys, values=values), slots=slots)  # type: ignore[arg-type]
    interface, told = interface_of(model), told_of(model)
    made = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.extend(made[side.update] for layer in told.layers for side in (layer.key, layer.value))
    return model, interface, told


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_slot_holds_the_codes_of_its_token(data: st.DataObject) -> None:
    """After every step, padding and rows that wait included; what is in a slot was quantised once, when it came."""
    form = data.draw(st.sampled_from(sorted(FORMS)))
    keys, values = data.draw(st.sampled_from([*PAIRS, ("16", "4"), ("fp8", "16")] if form != "evict-any" else PAIRS))
    if form == "evict-one-op":
        keys, values = data.draw(st.sampled_from(PAIRS))
    slots, batch = data.draw(st.sampled_from([5, 9])), data.draw(st.integers(1, 3))
    model, interface, told = watched(form, keys, values, slots)
    stepper = StepRunner(model, batch, interface)
    step, evicts, _ = FORMS[form]
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    # Positions alone decide what a slow reference keeps where nothing is evicted: a head of as many slots as the capacity.
    heads: dict[tuple[int, int, int], HeadOracle] = {}
    for layer in range(len(told.layers)):
        for row, head in np.ndindex(batch, told.layers[layer].kv_heads):
            heads[layer, row, head] = HeadOracle(slots if evicts else CAPACITY, **EVICT)
    seen = np.zeros(batch, int)
    for _ in range(data.draw(st.integers(1, 10))):
        width = step or data.draw(st.integers(1, 6))
        counts = np.array([data.draw(st.integers(0, width)) for _ in range(batch)])
        before = {name: value.copy() for name, value in stepper.states.items()}
        outputs = stepper.step(
            random.integers(0, VOCABULARY, (batch, width)), (np.arange(width) < counts[:, None]).astype(np.int64)
        )
        states = {state.name: outputs[state.output] for state in stepper.interface.states}
        first = 0
        for at, layer in enumerate(told.layers):
            new = [outputs[side.update] for side in (layer.key, layer.value)]
            for row, head in np.ndindex(batch, layer.kv_heads):
                norms = -np.linalg.norm(new[0][row, head].astype(np.float64), axis=-1)
                scores = {int(seen[row]) + n: float(norms[n]) for n in range(counts[row])}
                if evicts:  # the graph's own score of a token that stayed decides ties as the graph saw them
                    place = (row, first + head)
                    stored = dict(zip(states["position"][place].tolist(), states["score"][place].tolist(), strict=True))
                    for position in scores.keys() & stored.keys():
                        assert stored[position] == pytest.approx(scores[position], rel=1e-5)
                        scores[position] = stored[position]
                fresh = [
                    (int(seen[row]) + n, scores[int(seen[row]) + n], new[0][row, head, n], new[1][row, head, n])
                    for n in range(counts[row])
                ]
                reference = heads[at, row, head]
                reference.append(fresh)
                if evicts:
                    assert states["position"][row, first + head].tolist() == reference.positions()
                for slot, token in enumerate(reference.entries):
                    if token is None:
                        continue
                    for side, vector in zip((layer.key, layer.value), token[2:], strict=True):
                        kept = states[side.state or ""][row, head, slot]
                        if side.storage_type is None:
                            assert np.array_equal(kept, vector)
                            continue
                        scale = states[side.scale_state or ""][row, head, slot]
                        assert (
                            quant_reference.quantization_error(side.storage_type, vector[None], kept[None], scale[None]) is None
                        )
            first += layer.kv_heads
        if evicts:
            for row in np.flatnonzero(counts == 0):
                for state in stepper.interface.states:
                    assert np.array_equal(stepper.states[state.input][row], before[state.input][row]), state.name
        seen += counts


@pytest.mark.parametrize(("keys", "values"), PAIRS)
@pytest.mark.parametrize("form", ["static-any", "evict-any", "evict-one-op"])
def test_tokens_lie_where_they_lie_without_codes(form: str, keys: str, values: str) -> None:
    """In the first layer, whose keys nothing that was quantised has touched, slot by slot."""
    exact = StepRunner(rewritten("llama", form), 2)
    quantised = StepRunner(rewritten("llama", form, KvQuant(keys=keys, values=values)), 2)  # type: ignore[arg-type]
    ids = np.random.default_rng(5).integers(0, VOCABULARY, (2, 60))
    chunk = FORMS[form][0] or 7
    for at in range(0, 60 - chunk, chunk):
        full, small = (side.step(ids[:, at : at + chunk]) for side in (exact, quantised))
    for state, bits in (("key", keys), ("value", values)):
        vectors = full[f"present.0.{state}"]
        filled = np.abs(vectors).max(axis=-1) > 0
        kept, scale = small[f"present.0.{state}"], small[f"present.0.{state}.scale"]
        assert filled.any()
        assert quant_reference.quantization_error(bits, vectors[filled], kept[filled], scale[filled]) is None


class Given(CacheLayerMixin):  # type: ignore[misc]
    """A layer of a cache of transformers that is told what a step sees."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: tuple[torch.Tensor, torch.Tensor]
        """The keys and the values, (batch, kv_heads, rows, size)."""
        self.behind = False
        """Whether the step's own stand behind them."""
        self.seen = self.past = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        pass

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.behind:
            return self.rows
        return tuple(torch.cat([old, new], dim=2) for old, new in zip(self.rows, (key_states, value_states), strict=True))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.rows[0].shape[2] + (query_length if self.behind else 0), self.past

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1


CASES = [
    *(("llama", form, *pair) for form in FORMS for pair in PAIRS),
    *(("llama", form, *pair) for form in ("static-any", "evict-one") for pair in (("16", "4"), ("4", "16"))),
    *(("mistral", form, "4", "4") for form in ("static-any", "static-one")),
    *((architecture, form, "8", "4") for architecture in ("gpt2", "falcon") for form in ("evict-any", "evict-one")),
]


@pytest.mark.parametrize("style", ["dynamo-21", "dynamo-23-bare"])
def test_caches_that_tell_the_batch_are_kept_as_codes(style: str) -> None:
    model = load(export("llama", style))
    for pass_ in (KvStatic(capacity=CAPACITY), KvQuant()):
        assert isinstance(pass_.rewrite(model, PassContext(backend="onnxruntime")), Change)


@pytest.mark.parametrize(("architecture", "form", "keys", "values"), CASES)
def test_attention_reads_what_the_codes_stand_for(architecture: str, form: str, keys: str, values: str) -> None:
    """The module of transformers has the logits of the graph where it attends over the vectors of the graph's own codes.

    They are worked out in numpy. Rewritten behind by `attention` for ONNX Runtime, as a build does, or left as it is.
    """
    step, evicts, backend = FORMS[form]
    quant = KvQuant(keys=keys, values=values)  # type: ignore[arg-type]
    model = rewritten(architecture, form, quant, *([Attention()] if backend == "onnxruntime" else []))
    told, stepper = told_of(model), StepRunner(model, 2)
    ids = np.random.default_rng(6).integers(0, VOCABULARY, (2, 50))
    layers, seen = [Given() for _ in told.layers], 0
    for chunk in [1] * 40 if step else [7, 1, 9, *[1] * 8, 10, 8]:
        past = {state.name: stepper.states[state.input] for state in stepper.interface.states}
        outputs = stepper.step(ids[:, seen : seen + chunk])
        now = {state.name: outputs[state.output] for state in stepper.interface.states}
        behind = evicts and not step
        for given_, layer in zip(layers, told.layers, strict=True):
            filled = min(seen + (0 if behind else chunk), layer.slots or 0)
            given_.rows = tuple(  # type: ignore[assignment]
                torch.from_numpy(vectors(past if behind else now, side)[:, :, :filled].astype(np.float32))
                for side in (layer.key, layer.value)
            )
            given_.behind, given_.seen, given_.past = behind, seen, seen - min(seen, layer.slots or 0)
        places = torch.arange(seen, seen + chunk).expand(2, chunk)
        with torch.no_grad():
            tokens = torch.from_numpy(ids[:, seen : seen + chunk])
            expected = module(architecture)(tokens, past_key_values=Cache(layers=layers), use_cache=True, position_ids=places)
        np.testing.assert_allclose(outputs["logits"], expected.logits.numpy(), rtol=0, atol=1e-4)
        seen += chunk


def vectors(states: dict[str, Array], side: CacheTensorSpec) -> Array:
    """Return the vectors (batch, kv_heads, slots, size) that a state stands for."""
    kept = states[side.state or ""]
    return (
        kept
        if side.storage_type is None
        else quant_reference.dequantize(side.storage_type, kept, states[side.scale_state or ""])
    )


def torch_steps(told: KVCacheSpec, singles: bool, ids: Array, chunks: list[int], pass_: type[Pass] = KvQuant) -> Array:
    """Return the logits of the module of transformers over caches of `told`."""
    make = pass_.torch_reference(told, single_token=singles)
    assert make is not None
    return cached_steps(module("llama"), make(), ids, chunks)


@pytest.mark.parametrize(("keys", "values"), PAIRS)
@pytest.mark.parametrize("form", FORMS)
def test_the_method_in_torch_does_what_the_graph_does(form: str, keys: str, values: str) -> None:
    """But for a code here and there that a rounding of the last bit makes another: most logits agree to rounding."""
    step, evicts, _ = FORMS[form]
    model = rewritten("llama", form, KvQuant(keys=keys, values=values))  # type: ignore[arg-type]
    ids = np.stack([np.random.default_rng(row).permutation(VOCABULARY)[:60] for row in range(2)])
    chunks = [1] * 60 if step else [7, 1, 30, *[1] * 12, 10]
    told, exact = told_of(model), told_of(rewritten("llama", form))
    assert KvStatic.torch_reference(told, single_token=True) is None
    assert KvEvict.torch_reference(told, single_token=True) is None
    assert KvQuant.torch_reference(exact, single_token=True) is None
    found = torch_steps(told, step == 1, ids, chunks)
    stepper, logits, at = StepRunner(model, 2), [], 0
    for chunk in chunks:
        logits.append(stepper.step(ids[:, at : at + chunk])["logits"])
        at += chunk
    off = np.abs(np.concatenate(logits, axis=1) - found)
    lost = np.abs(found - torch_steps(exact, step == 1, ids, chunks, KvEvict if evicts else KvStatic))[:, 20:]
    assert np.median(off) < 1e-4
    assert off.mean() < lost.mean() / 20


@pytest.mark.parametrize("bits", ["fp8", "8", "4"])
def test_torch_holds_what_the_codes_of_numpy_stand_for(bits: str) -> None:
    vectors = np.random.default_rng(1).normal(size=(50, 32)).astype(np.float32)
    vectors[:, 3] *= 20
    vectors[7] = 0
    kept = fake_quantize(torch.from_numpy(vectors), bits).numpy().astype(np.float64)
    if bits == "4":
        scale = np.sqrt((vectors.astype(np.float64) ** 2).mean(axis=-1))
        turned = vectors @ quant_reference.rotation_matrix(32).T / np.where(scale > 0, scale, 1)[:, None]
        nearest = quant_reference.LEVELS[np.abs(turned[..., None] - quant_reference.LEVELS).argmin(axis=-1)]
        expected = nearest @ quant_reference.rotation_matrix(32) * scale[:, None]
    else:
        limit = np.float32(448 if bits == "fp8" else 127)
        scale = np.abs(vectors).max(axis=-1) / limit
        ratio = vectors / np.where(scale > 0, scale, np.float32(1))[:, None]
        whole = np.rint(ratio).astype(np.int8)
        as_codes = ratio.astype(quant_reference.ml_dtypes.float8_e4m3fn).view(np.int8) if bits == "fp8" else whole
        expected = quant_reference.dequantize(bits, as_codes, scale)
    np.testing.assert_allclose(kept, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_states_bound_to_memory_give_what_states_handed_on_give(form: str, tmp_path: Path) -> None:
    step, _, _ = FORMS[form]
    model = rewritten("llama", form, KvQuant(keys="8", values="4"), Attention(), slots=12)
    save(model, tmp_path / "decoder.onnx")
    handed, ids = StepRunner(model, 2), np.random.default_rng(4).integers(0, VOCABULARY, (2, 40))
    states = handed.interface.states
    caches = [state.in_place for state in states if state.name != "length"]
    assert caches == [form != "evict-any"] * len(
        caches
    )  # there attention reads the slots as they were, in no order with writes
    shapes = {name: array.shape for name, array in handed.states.items()}
    with find_backend("onnxruntime").open(str(tmp_path / "decoder.onnx")) as session:
        steps = session.bind_states(states, shapes)
        for at in range(0, 40, step or 5):
            tokens = ids[:, at : at + (step or 5)]
            bound = steps.run({"input_ids": tokens, "attention_mask": np.ones_like(tokens)})
            expected = handed.step(tokens)
            np.testing.assert_allclose(bound["logits"], expected["logits"], rtol=0, atol=1e-5)
            for state in states:
                np.testing.assert_array_equal(steps.read(state.name), expected[state.output])
        steps.close()


@pytest.mark.parametrize(
    ("form", "options"),
    [("static-one", {}), ("evict-one", {"keys": "8", "values": "16"}), ("evict-any", {"keys": "fp8", "protect": ("last",)})],
)
def test_the_estimate_is_what_the_states_come_to(form: str, options: dict[str, Any]) -> None:
    model, pass_ = rewritten("llama", form), KvQuant(**options)
    before, estimate = state_bytes(model), pass_.estimate(model, PassContext(backend="onnxruntime"))
    assert isinstance(pass_.rewrite(model, PassContext(backend="onnxruntime")), Change)
    assert estimate.state_bytes == state_bytes(model) - before < 0


def state_bytes(model: ir.Model) -> int:
    """Return the bytes of the states of one sequence."""
    return sum(array.nbytes for array in StepRunner(model, 1).states.values())


def test_four_bits_of_sixteen_elements_are_twelve_bytes() -> None:
    """8 of codes and 4 of the scale, in place of 64, for the keys and the values of every slot."""
    exact, small = (state_bytes(rewritten("llama", "static-one", *passes)) for passes in ((), (KvQuant(),)))
    assert exact - small == 2 * 2 * 2 * CAPACITY * (64 - 12)


def test_protected_layers_stay_as_they_are() -> None:
    told = told_of(rewritten("llama", "static-one", KvQuant(protect=("first",))))
    assert [(layer.key.storage_type, layer.value.storage_type) for layer in told.layers] == [(None, None), ("4", "4")]
    interface = interface_of(rewritten("llama", "static-one", KvQuant(protect=("first",))))
    kinds = {state.name: interface.input(state.input).dtype for state in interface.states}
    assert kinds["past_key_values.0.key"] == "float32"
    assert kinds["past_key_values.1.key"] == "int8"
    assert kinds["past_key_values.1.key.scale"] == "float32"
    model = rewritten("llama", "static-one")
    assert not KvQuant(protect=("first", "1")).rewrite(model, PassContext(backend="onnxruntime"))
    assert not KvQuant(keys="16", values="16").rewrite(model, PassContext(backend="onnxruntime"))


def test_facts_follow_the_rewrite_and_order_it() -> None:
    model = rewritten("llama", "static-one")
    assert KV_UNQUANTIZED.check(model) is None
    model = rewritten("llama", "evict-one", KvQuant(values="16"))
    assert KV_STATIC.check(model) is None
    assert "keys as codes of 4" in (KV_UNQUANTIZED.check(model) or "")
    given = frozenset({KV_UNQUANTIZED, KV_DENSE})
    wished = (KvStatic(capacity=64), KvQuant(), KvEvict(budget="16", recent_window=4))
    plan, _ = order_passes(wished, given)
    assert [one.name for one in plan] == ["kv-static", "kv-evict", "kv-quant"]
    assert find_problems(plan, given, ()) == []
    (twice,) = find_problems((KvStatic(capacity=64), KvQuant(), KvQuant()), given, ())
    assert (twice.code, twice.hint) == ("RC001", "list `kv-quant` once")


@pytest.mark.parametrize(
    ("form", "options", "says", "hint"),
    [
        ("static-one", {"protect": ("2",)}, "`2` is no layer of a model that has 2", "protect=[first,last]"),
        ("static-one", {"protect": ("middle",)}, "`middle` is no layer", "protect=[first,last]"),
        ("evict-any", {"keys": "16"}, "of one type", "8 in place of 16"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_changed(form: str, options: dict[str, Any], says: str, hint: str) -> None:
    refused(rewritten("llama", form), KvQuant(**options), says, hint)


def refused(model: ir.Model, pass_: KvQuant, says: str, hint: str) -> None:
    before = fingerprint(model)
    outcome = pass_.rewrite(model, PassContext(backend="onnxruntime"))
    assert isinstance(outcome, Refusal)
    assert says in outcome.reason
    assert hint in (outcome.hint or "")
    assert fingerprint(model) == before


def test_four_bits_of_an_odd_head_size_are_refused() -> None:
    model = rewritten("llama", "static-one")
    told = told_of(model)
    narrow = told.layers[1].key
    text = model.metadata_props["ryzen_compile.kv"].replace(
        f'"new":"{narrow.update}","whole":"{narrow.cache}","size":16',
        f'"new":"{narrow.update}","whole":"{narrow.cache}","size":24',
    )
    assert text != model.metadata_props["ryzen_compile.kv"]
    model.metadata_props["ryzen_compile.kv"] = text
    refused(model, KvQuant(), "its keys are of 24 elements, codes of 4 take a power of two from 16 to 512", "keys=8")
    estimate = KvQuant().estimate(model, PassContext(backend="onnxruntime"))
    assert "would be refused" in estimate.reason


def test_quantising_twice_growing_caches_and_other_forms_are_refused() -> None:
    refused(rewritten("llama", "static-one", KvQuant()), KvQuant(), "as codes of 4", "once")
    model = rewritten("llama", "static-one")
    for layer in told_of(model).layers:
        whole = (layer.key.cache, layer.value.cache)
        for writer in {node for node in model.graph for value in node.outputs if value.name in whole}:
            writer.op_type = "Other"
    refused(model, KvQuant(), "not written as kv-static or kv-evict leave them", "right behind")
    refused(load(export("llama", STYLE)), KvQuant(), "grow", "kv-static")


@pytest.mark.parametrize("form", FORMS)
def test_attention_stays_fused_on_tensorrt(form: str, tmp_path: Path) -> None:
    """Built for three architectures: one fused kernel for each attention, whatever the states hold."""
    model = rewritten("llama", form, KvQuant(keys="8", values="4"), slots=16)
    # Steps of several tokens have no kernel in fp32.
    for pass_ in (Fold(), *([] if FORMS[form][0] else [ConvertPrecision(to="fp16")]), Attention()):
        assert isinstance(pass_.rewrite(model, PassContext(backend="tensorrt-rtx")), Change)
    save(model, tmp_path / "decoder.onnx")
    interface, seq = interface_of(model), FORMS[form][0]
    sizes: list[dict[str, tuple[int, ...]]] = [{}, {}, {}]
    for spec in interface.inputs:
        for at, (batch, tokens) in enumerate(((1, seq or 2), (2, seq or 8), (4, seq or 16))):
            named = {interface.batch: batch}
            sizes[at][spec.name] = tuple(one if isinstance(one, int) else named.get(one, tokens) for one in spec.dims or ())
    request = BuildRequest(
        onnx_path=str(tmp_path / "decoder.onnx"),
        output=str(tmp_path / "decoder.plan"),
        targets=parse_targets("sm86,sm89,sm120"),
        profiles=(Profile(min=sizes[0], opt=sizes[1], max=sizes[2]),),
    )
    layers = RTX.build(request, SilentProgress()).layers
    assert layers is not None
    assert [fusion.fused for fusion in layers.attentions] == [True] * len(told_of(model).layers)


@pytest.mark.parametrize("step", [0, 1])
def test_codes_are_no_keys_to_tell_scores_again_from(step: int) -> None:
    for every, is_refused in ((2, True), (0, False)):
        evict = KvEvict(score="keydiff", budget="12", sinks=1, recent_window=2, rescore_interval=every)
        model = load(export("llama", STYLE))
        for pass_ in (KvStatic(capacity=64, step=step), evict):
            assert isinstance(pass_.rewrite(model, PassContext(backend="onnxruntime")), Change)
        outcome = KvQuant(keys="8", values="8").rewrite(model, PassContext(backend="onnxruntime"))
        assert isinstance(outcome, Refusal) == is_refused
        if isinstance(outcome, Refusal):
            assert "scores again" in outcome.reason
            assert "kvzap" in (outcome.hint or "")


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("bits", ["8", "4"])
def test_codes_are_no_keys_to_tell_pages_by(step: int, bits: Any) -> None:
    model = load(export("llama", STYLE))
    for pass_ in (KvStatic(capacity=CAPACITY, step=step), KvSelect(page_size=16, selected_pages=6)):
        assert isinstance(pass_.rewrite(model, PassContext(backend="onnxruntime")), Change)
    outcome = KvQuant(keys=bits, values=bits).rewrite(model, PassContext(backend="onnxruntime"))
    assert isinstance(outcome, Refusal)
    assert "would read codes" in outcome.reason
    assert "behind kv-static or kv-evict" in (outcome.hint or "")
