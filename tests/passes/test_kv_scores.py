"""Budgets in every spelling, and the calibrated score: what it is fitted to, what its file says, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.decoders import VOCABULARY, export, module
from support.step_runner import StepRunner

from ryzen_compile.cli.main import run
from ryzen_compile.errors import ModelError
from ryzen_compile.evaluation.calibrate import calibrate
from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.ir.load import load
from ryzen_compile.spec.kv_cache import read_kv_cache_spec
from ryzen_compile.spec.passes import Change, PassContext, Refusal
from ryzen_passes.kv.evict import KvEvict
from ryzen_passes.kv.evict.budgets import parse_budget, pyramid_budgets
from ryzen_passes.kv.scorers import statistics
from ryzen_passes.kv.scorers.hidden_state import find_hidden_state
from ryzen_passes.kv.static import KvStatic
from ryzen_passes.kv.static.cache_view import StaticCacheView, read_static_cache_view

Array = np.ndarray[Any, Any]
STYLE = "optimum-sdpa"
ZAP = "kv-evict{score=kvzap,recent-window=4}"


@pytest.mark.parametrize(
    ("budget", "slots"),
    [
        ("100", 100),
        ("25%", 1024),
        ("12.5%", 512),
        ("1MB", 976),
        ("1MiB", 1024),
        ("8MiB/8", 1024),
        ("0.5KB", 0),
        ("80GB", 4096),
        ("half", None),
        ("1mb", None),
        ("25", 25),
    ],
)
def test_budgets(budget: str, slots: int | None) -> None:
    assert parse_budget(budget, 4096, 1024) == slots


@given(
    slots=st.integers(8, 4096),
    layers=st.integers(1, 80),
    steepness=st.floats(1, 20),
    room=st.integers(0, 4096),
    spare=st.integers(0, 4),
)
def test_a_pyramid_is_on_average_what_was_asked_for(slots: int, layers: int, steepness: float, room: int, spare: int) -> None:
    least, most = min(8, slots), slots + room
    sizes = pyramid_budgets(slots, layers * 4, steepness, least, most)
    assert len(sizes) == layers * 4
    assert all(least <= size <= most for size in sizes)
    assert list(sizes) == sorted(sizes, reverse=True)
    assert abs(np.mean(sizes) - slots) <= 0.5
    assert len(set(sizes)) <= 4


def test_a_pyramid_is_steep_or_flat() -> None:
    assert pyramid_budgets(100, 8, 1.0, 10, 1000) == (100,) * 8
    assert pyramid_budgets(100, 8, 4.0, 10, 1000) == (175, 175, 125, 125, 75, 75, 25, 25)
    assert pyramid_budgets(100, 8, 4.0, 10, 150) == (150, 150, 117, 117, 83, 83, 50, 50)


SCORED = {"kvzap": ZAP, "triattention": "kv-evict{score=triattention,recent-window=4}"}


def documents(path: Path, *, count: int = 12, tokens: int = 60) -> str:
    np.savez(path, input_ids=np.random.default_rng(5).integers(0, VOCABULARY, (count, tokens)))
    return str(path)


def fitted(tmp_path: Path, architecture: str = "llama", score: str = "kvzap") -> str:
    path = tmp_path / f"{architecture}.safetensors"
    calibrate(export(architecture, STYLE), path, pass_spec=SCORED[score], data=documents(tmp_path / "ids.npz"))
    return str(path)


def test_it_is_fitted_to_what_later_queries_make_of_a_token(tmp_path: Path) -> None:
    import torch

    found = statistics.read_statistics(fitted(tmp_path))
    model = module("llama")
    model.set_attn_implementation("eager")
    known: list[list[Array]] = [[], []]
    wanted: list[list[Array]] = [[], []]
    with torch.no_grad():
        for ids in np.load(tmp_path / "ids.npz")["input_ids"]:
            out = model(torch.from_numpy(ids[None]), output_attentions=True, output_hidden_states=True, use_cache=True)
            for layer, shares in enumerate(out.attentions):
                block = model.model.layers[layer]
                hidden = block.input_layernorm(out.hidden_states[layer])[0].double().numpy()
                values = out.past_key_values.layers[layer].values[0].double().norm(dim=-1).numpy()
                seq = len(ids)
                most = np.zeros(values.shape)
                for head in range(values.shape[0]):
                    for token in range(seq):
                        later = shares[0, 2 * head : 2 * head + 2, token + 4 :, token].numpy()
                        most[head, token] = later.max() if later.size else 0.0
                counted = seq - max(4, seq // 8)
                known[layer].append(hidden[:counted])
                wanted[layer].append(np.log(most * values + 1e-2)[:, :counted].T)
    model.set_attn_implementation("sdpa")
    for layer in range(2):
        hidden, target = np.concatenate(known[layer]), np.concatenate(wanted[layer])
        ones = np.concatenate([hidden, np.ones((len(hidden), 1))], axis=1)
        root = np.sqrt(1e-3 * (hidden**2).sum() / hidden.shape[1])
        penalty = np.concatenate([np.eye(hidden.shape[1]) * root, np.zeros((hidden.shape[1], 1))], axis=1)
        rows, targets = np.concatenate([ones, penalty]), np.concatenate([target, np.zeros((hidden.shape[1], 2))])
        solution = np.linalg.lstsq(rows, targets, rcond=None)[0]
        np.testing.assert_allclose(found.tensor(layer, "weight"), solution[:-1], rtol=0, atol=2e-3)
        np.testing.assert_allclose(found.tensor(layer, "bias"), solution[-1], rtol=0, atol=2e-3)
    assert (found.header.layers, found.header.recent_window, found.header.tokens) == (2, 4, 12 * 53)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("step", [0, 1])
def test_a_token_is_scored_by_its_hidden_state(architecture: str, step: int, tmp_path: Path) -> None:
    path = fitted(tmp_path, architecture)
    model = load(export(architecture, STYLE))
    evict = KvEvict(score="kvzap", budget="12", sinks=1, recent_window=2, statistics=path)
    for pass_ in (KvStatic(capacity=64, step=step), evict):
        outcome = pass_.rewrite(model, PassContext(backend="onnxruntime"))
        assert isinstance(outcome, Change), outcome
    told, interface, weights = read_kv_cache_spec(model), interface_of(model), statistics.read_statistics(path)
    assert told is not None
    values = {value.name: value for node in model.graph for value in node.outputs}
    states = [find_hidden_state(values[layer.value.update]) for layer in told.layers]
    model.graph.outputs.extend(state for state in states if state is not None)
    stepper = StepRunner(model, 2, interface)
    random = np.random.default_rng(3)
    ids = np.stack([random.permutation(VOCABULARY)[:30] for _ in range(2)])  # equal tokens would be worth the same
    expected: list[list[Array]] = [[], []]
    for at in range(0, 30, step or 5):
        outputs = stepper.step(ids[:, at : at + (step or 5)])
        for layer, state in enumerate(states):
            assert state is not None
            score = outputs[state.name or ""].astype(np.float64) @ weights.tensor(layer, "weight") + weights.tensor(
                layer, "bias"
            )
            expected[layer].append(score)
    heads = told.layers[0].kv_heads
    for layer in range(2):
        scores = np.concatenate(expected[layer], axis=1)
        for row in range(2):
            for head in range(heads):
                place = row, layer * heads + head
                positions = stepper.states["past_position"][place]
                kept = np.sort(positions)
                worth = scores[row, 1:28, head]
                best = 1 + np.argsort(-worth)[:9]
                assert kept.tolist() == sorted([0, *best.tolist(), 28, 29])
                np.testing.assert_allclose(
                    stepper.states["past_score"][place], scores[row, positions, head], rtol=1e-4, atol=1e-5
                )


def rotated(vectors: Array, positions: Array) -> Array:
    """Return `vectors` (..., size) turned as Llama turns halves, by the default angles."""
    half = vectors.shape[-1] // 2
    angle = np.asarray(positions, np.float64)[..., None] * 10000.0 ** (-np.arange(half) / half)
    one, other = vectors[..., :half], vectors[..., half:]
    return np.concatenate([one * np.cos(angle) - other * np.sin(angle), other * np.cos(angle) + one * np.sin(angle)], axis=-1)


def test_the_usual_query_is_told_by_distances(tmp_path: Path) -> None:
    import torch

    found = statistics.read_statistics(fitted(tmp_path, score="triattention"))
    model = module("llama")
    queries: list[list[Array]] = [[], []]
    with torch.no_grad():
        for ids in np.load(tmp_path / "ids.npz")["input_ids"]:
            hidden = model(torch.from_numpy(ids[None]), output_hidden_states=True).hidden_states
            for layer in range(2):
                block = model.model.layers[layer]
                made = block.self_attn.q_proj(block.input_layernorm(hidden[layer]))[0]
                queries[layer].append(made.double().numpy().reshape(len(ids), 4, 16))
    for layer in range(2):
        whole = np.concatenate(queries[layer])
        lengths = np.hypot(whole[..., :8], whole[..., 8:])
        mean = whole.mean(axis=0)
        ahead = np.mean([rotated(mean, np.array(2**power)) for power in range(17)], axis=0)
        spread = lengths.mean(axis=0) - np.hypot(mean[:, :8], mean[:, 8:])
        np.testing.assert_allclose(found.tensor(layer, "query"), ahead.reshape(2, 2, 16).mean(axis=1), rtol=0, atol=1e-4)
        np.testing.assert_allclose(found.tensor(layer, "spread"), spread.reshape(2, 2, 8).mean(axis=1), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("step", "every"), [(1, 1), (1, 3), (0, 1), (1, 0)])
def test_keys_are_held_against_the_usual_query(step: int, every: int, tmp_path: Path) -> None:
    path = fitted(tmp_path, score="triattention")
    model = load(export("llama", STYLE))
    evict = KvEvict(score="triattention", budget="12", sinks=1, recent_window=2, rescore_interval=every, statistics=path)
    for pass_ in (KvStatic(capacity=64, step=step), evict):
        outcome = pass_.rewrite(model, PassContext(backend="onnxruntime"))
        assert isinstance(outcome, Change), outcome
    told, told_by = read_kv_cache_spec(model), statistics.read_statistics(path)
    assert told is not None
    stepper = StepRunner(model, 2)
    random = np.random.default_rng(3)
    ids = np.stack([random.permutation(VOCABULARY)[:30] for _ in range(2)])
    born: dict[tuple[int, int, int], int] = {}
    for at in range(0, 30, step or 5):
        stepper.step(ids[:, at : at + (step or 5)])
        rows = -(-12 // every) if every else 0
        for layer in range(2):
            keys = stepper.states[f"past_key_values.{layer}.key"].astype(np.float64)
            for row in range(2):
                for head in range(2):
                    positions = stepper.states["past_position"][row, layer * 2 + head]
                    for slot in (at * rows + np.arange(rows)) % 12 if step else range(12 if every else 0):
                        if 0 <= (token := int(positions[slot])) < at:
                            born[layer, row * 2 + head, token] = at
                    query, spread = told_by.tensor(layer, "query")[head], told_by.tensor(layer, "spread")[head]
                    for slot, token in enumerate(positions):
                        if token >= 0:
                            key = keys[row, head, slot]
                            seen = rotated(
                                query.astype(np.float64), np.array(born.get((layer, row * 2 + head, int(token)), token))
                            )
                            score = key @ seen + np.hypot(key[:8], key[8:]) @ spread
                            np.testing.assert_allclose(
                                stepper.states["past_score"][row, layer * 2 + head, slot], score, rtol=0, atol=2e-4
                            )


def test_keys_without_a_rotation_have_no_usual_query(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="kvzap, keydiff, knorm"):
        fitted(tmp_path, "gpt2", "triattention")


def test_statistics_of_another_model_are_refused(tmp_path: Path) -> None:
    path = fitted(tmp_path)
    model = load(export("qwen2", STYLE))
    KvStatic(capacity=64).rewrite(model, PassContext(backend="onnxruntime"))
    for options, says in (
        ({"statistics": path}, "another model"),
        ({}, "takes statistics"),
        ({"statistics": str(tmp_path / "ids.npz")}, "holds no statistics"),
        ({"statistics": str(tmp_path / "absent")}, "holds no statistics"),
    ):
        before = ir.to_proto(model).SerializeToString()
        outcome = KvEvict(score="kvzap", budget="32", recent_window=4, **options).rewrite(
            model, PassContext(backend="onnxruntime")
        )  # type: ignore[arg-type]
        assert isinstance(outcome, Refusal)
        assert says in outcome.reason
        assert "ryzen-compile calibrate" in (outcome.hint or "")
        assert ir.to_proto(model).SerializeToString() == before


def test_the_fingerprint_is_of_the_weights() -> None:
    def fixed(architecture: str, capacity: int) -> ir.Model:
        model = load(export(architecture, STYLE))
        assert isinstance(KvStatic(capacity=capacity).rewrite(model, PassContext(backend="onnxruntime")), Change)
        return model

    one, other = fixed("llama", 64), fixed("llama", 32)
    told = statistics.fingerprint(one)
    assert told == statistics.fingerprint(other)
    assert told != statistics.fingerprint(fixed("qwen3", 64))
    tensors = [(value, value.const_value) for value in other.graph.initializers.values()]
    weight, held = next((value, held) for value, held in tensors if held is not None and held.size > 4000)
    changed = held.numpy().copy()
    changed.flat[0] += 1
    weight.const_value = ir.tensor(changed, name=weight.name)
    assert told != statistics.fingerprint(other)


def test_the_verb_says_how_well_it_fits_and_refuses_what_it_cannot_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, output = str(export("llama", STYLE)), tmp_path / "zap.safetensors"
    ids = documents(tmp_path / "ids.npz")
    assert run(["calibrate", model, str(output), "--for", ZAP, "--data", ids, "--json"]) == 0
    assert "fitted to 636 tokens" in json.loads(capsys.readouterr().out)["says"]
    output.unlink()
    short = documents(tmp_path / "short.npz", count=2, tokens=20)
    for options, code, says in (
        (["--for", ZAP, "--data", short], 1, "too few"),
        (["--for", "kv-evict{score=knorm}", "--data", ids], 2, "takes no statistics"),
        (["--for", "fold", "--data", ids], 2, "takes no statistics"),
        (["--for", f"fold,{ZAP}", "--data", ids], 2, "is 2 passes"),
        (["--for", ZAP, "--data", "recipe:llama"], 2, "nothing to calibrate on"),
    ):
        assert run(["calibrate", model, str(output), *options]) == code
        assert says in capsys.readouterr().err
        assert not output.exists()


def test_what_is_no_decoder_cannot_be_calibrated(tmp_path: Path) -> None:
    from support import tiny_models

    tiny_models.write(tmp_path / "small.onnx")
    with pytest.raises(ModelError):
        calibrate(tmp_path / "small.onnx", tmp_path / "a", pass_spec=ZAP, data=documents(tmp_path / "ids.npz"))


def test_keys_of_several_sizes_have_no_one_anchor() -> None:
    model = load(export("llama", STYLE))
    KvStatic(capacity=64).rewrite(model, PassContext(backend="onnxruntime"))
    form = read_static_cache_view(model)
    assert isinstance(form, StaticCacheView)
    import msgspec

    from ryzen_passes.kv.scorers import SCORERS

    assert SCORERS["keydiff"].problem(form, None) is None
    form.layers[1].spec = msgspec.structs.replace(
        form.layers[1].spec, key=msgspec.structs.replace(form.layers[1].spec.key, head_size=8)
    )
    assert "sizes [8, 16]" in (SCORERS["keydiff"].problem(form, None) or "")
