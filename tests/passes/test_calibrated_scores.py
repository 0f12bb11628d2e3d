"""The calibrated scores of kv-evict: fit, statistics file, scores in the graph, and refusals."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from support.decoders import VOCABULARY, export, module
from support.stage_counts import StageCounts
from support.step_runner import StepRunner

from ryzen_compile.builder.calibrate import calibrate
from ryzen_compile.cli.main import run
from ryzen_compile.errors import ModelError, RyzenError
from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.ir.load import load
from ryzen_compile.spec.kv_cache import read_kv_cache_spec
from ryzen_compile.spec.passes import Change, PassContext, Refusal
from ryzen_passes.kv.evict import KvEvict
from ryzen_passes.kv.scoring import find_scorer, statistics
from ryzen_passes.kv.scoring.hidden_state import find_hidden_state
from ryzen_passes.kv.static import KvStatic
from ryzen_passes.kv.static.cache_view import read_static_cache_view

Array = np.ndarray[Any, Any]
STYLE = "optimum-sdpa"
KVZAP_PASS = "kv-evict{score=kvzap,recent-window=4}"
CALIBRATED_PASSES = {"kvzap": KVZAP_PASS, "triattention": "kv-evict{score=triattention,recent-window=4}"}


def write_documents(path: Path, *, count: int = 12, tokens: int = 60) -> str:
    np.savez(path, input_ids=np.random.default_rng(5).integers(0, VOCABULARY, (count, tokens)))
    return str(path)


def calibrated(tmp_path: Path, architecture: str = "llama", score: str = "kvzap") -> str:
    path = tmp_path / f"{architecture}.safetensors"
    calibrate(export(architecture, STYLE), path, pass_spec=CALIBRATED_PASSES[score], data=write_documents(tmp_path / "ids.npz"))
    return str(path)


def test_kvzap_is_fitted_to_the_attention_of_later_queries(tmp_path: Path) -> None:
    import torch

    fit = statistics.read_statistics(calibrated(tmp_path))
    model = module("llama")
    model.set_attn_implementation("eager")
    hidden_states: list[list[Array]] = [[], []]
    targets: list[list[Array]] = [[], []]
    with torch.no_grad():
        for ids in np.load(tmp_path / "ids.npz")["input_ids"]:
            outputs = model(torch.from_numpy(ids[None]), output_attentions=True, output_hidden_states=True, use_cache=True)
            for layer, attention in enumerate(outputs.attentions):
                block = model.model.layers[layer]
                hidden = block.input_layernorm(outputs.hidden_states[layer])[0].double().numpy()
                values = outputs.past_key_values.layers[layer].values[0].double().norm(dim=-1).numpy()
                seq = len(ids)
                max_attention = np.zeros(values.shape)
                for head in range(values.shape[0]):
                    for token in range(seq):
                        later = attention[0, 2 * head : 2 * head + 2, token + 4 :, token].numpy()
                        max_attention[head, token] = later.max() if later.size else 0.0
                token_count = seq - max(4, seq // 8)
                hidden_states[layer].append(hidden[:token_count])
                targets[layer].append(np.log(max_attention * values + 1e-2)[:, :token_count].T)
    model.set_attn_implementation("sdpa")
    for layer in range(2):
        hidden, target = np.concatenate(hidden_states[layer]), np.concatenate(targets[layer])
        features = np.concatenate([hidden, np.ones((len(hidden), 1))], axis=1)
        root = np.sqrt(1e-3 * (hidden**2).sum() / hidden.shape[1])
        penalty = np.concatenate([np.eye(hidden.shape[1]) * root, np.zeros((hidden.shape[1], 1))], axis=1)
        rows, right_side = np.concatenate([features, penalty]), np.concatenate([target, np.zeros((hidden.shape[1], 2))])
        solution = np.linalg.lstsq(rows, right_side, rcond=None)[0]
        np.testing.assert_allclose(fit.tensor(layer, "weight"), solution[:-1], rtol=0, atol=2e-3)
        np.testing.assert_allclose(fit.tensor(layer, "bias"), solution[-1], rtol=0, atol=2e-3)
    assert (fit.header.layers, fit.header.recent_window, fit.header.tokens) == (2, 4, 12 * 53)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("step", [0, 1])
def test_kvzap_scores_a_token_by_its_hidden_state(architecture: str, step: int, tmp_path: Path) -> None:
    path = calibrated(tmp_path, architecture)
    model = load(export(architecture, STYLE))
    evict = KvEvict(score="kvzap", budget="12", sinks=1, recent_window=2, statistics=path)
    for pass_ in (KvStatic(capacity=64, step=step), evict):
        outcome = pass_.rewrite(model, PassContext(backend="onnxruntime"))
        assert isinstance(outcome, Change), outcome
    spec, interface, fit = read_kv_cache_spec(model), interface_of(model), statistics.read_statistics(path)
    assert spec is not None
    values = {value.name: value for node in model.graph for value in node.outputs}
    hidden_states = [find_hidden_state(values[layer.value.update]) for layer in spec.layers]
    model.graph.outputs.extend(hidden_state for hidden_state in hidden_states if hidden_state is not None)
    stepper = StepRunner(model, 2, interface)
    random = np.random.default_rng(3)
    ids = np.stack([random.permutation(VOCABULARY)[:30] for _ in range(2)])  # equal tokens would be candidates the same
    expected: list[list[Array]] = [[], []]
    for start in range(0, 30, step or 5):
        outputs = stepper.step(ids[:, start : start + (step or 5)])
        for layer, hidden_state in enumerate(hidden_states):
            assert hidden_state is not None
            score = outputs[hidden_state.name or ""].astype(np.float64) @ fit.tensor(layer, "weight") + fit.tensor(
                layer, "bias"
            )
            expected[layer].append(score)
    kv_heads = spec.layers[0].kv_heads
    for layer in range(2):
        scores = np.concatenate(expected[layer], axis=1)
        for row in range(2):
            for head in range(kv_heads):
                index = row, layer * kv_heads + head
                positions = stepper.states["past_position"][index]
                kept = np.sort(positions)
                candidates = scores[row, 1:28, head]
                best = 1 + np.argsort(-candidates)[:9]
                assert kept.tolist() == sorted([0, *best.tolist(), 28, 29])
                np.testing.assert_allclose(
                    stepper.states["past_score"][index], scores[row, positions, head], rtol=1e-4, atol=1e-5
                )


def rotate_halves(vectors: Array, positions: Array) -> Array:
    """Return `vectors` (..., head_size) rotated by RoPE as in Llama: rotated halves, base 10,000."""
    half = vectors.shape[-1] // 2
    angle = np.asarray(positions, np.float64)[..., None] * 10000.0 ** (-np.arange(half) / half)
    first, second = vectors[..., :half], vectors[..., half:]
    return np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)], axis=-1
    )


def test_triattention_statistics_are_averaged_over_distances(tmp_path: Path) -> None:
    import torch

    fit = statistics.read_statistics(calibrated(tmp_path, score="triattention"))
    model = module("llama")
    queries: list[list[Array]] = [[], []]
    with torch.no_grad():
        for ids in np.load(tmp_path / "ids.npz")["input_ids"]:
            hidden = model(torch.from_numpy(ids[None]), output_hidden_states=True).hidden_states
            for layer in range(2):
                block = model.model.layers[layer]
                projected = block.self_attn.q_proj(block.input_layernorm(hidden[layer]))[0]
                queries[layer].append(projected.double().numpy().reshape(len(ids), 4, 16))
    for layer in range(2):
        layer_queries = np.concatenate(queries[layer])
        norms = np.hypot(layer_queries[..., :8], layer_queries[..., 8:])
        mean = layer_queries.mean(axis=0)
        averaged = np.mean([rotate_halves(mean, np.array(2**power)) for power in range(17)], axis=0)
        spread = norms.mean(axis=0) - np.hypot(mean[:, :8], mean[:, 8:])
        np.testing.assert_allclose(fit.tensor(layer, "query"), averaged.reshape(2, 2, 16).mean(axis=1), rtol=0, atol=1e-4)
        np.testing.assert_allclose(fit.tensor(layer, "spread"), spread.reshape(2, 2, 8).mean(axis=1), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("step", "interval"), [(1, 1), (1, 3), (0, 1), (1, 0)])
def test_triattention_scores_match_the_mean_query(step: int, interval: int, tmp_path: Path) -> None:
    path = calibrated(tmp_path, score="triattention")
    model = load(export("llama", STYLE))
    evict = KvEvict(score="triattention", budget="12", sinks=1, recent_window=2, rescore_interval=interval, statistics=path)
    for pass_ in (KvStatic(capacity=64, step=step), evict):
        outcome = pass_.rewrite(model, PassContext(backend="onnxruntime"))
        assert isinstance(outcome, Change), outcome
    spec, fit = read_kv_cache_spec(model), statistics.read_statistics(path)
    assert spec is not None
    stepper = StepRunner(model, 2)
    random = np.random.default_rng(3)
    ids = np.stack([random.permutation(VOCABULARY)[:30] for _ in range(2)])
    scored_at: dict[tuple[int, int, int], int] = {}
    for start in range(0, 30, step or 5):
        stepper.step(ids[:, start : start + (step or 5)])
        rows = -(-12 // interval) if interval else 0
        for layer in range(2):
            keys = stepper.states[f"past_key_values.{layer}.key"].astype(np.float64)
            for row in range(2):
                for head in range(2):
                    positions = stepper.states["past_position"][row, layer * 2 + head]
                    for slot in (start * rows + np.arange(rows)) % 12 if step else range(12 if interval else 0):
                        if 0 <= (token := int(positions[slot])) < start:
                            scored_at[layer, row * 2 + head, token] = start
                    query, spread = fit.tensor(layer, "query")[head], fit.tensor(layer, "spread")[head]
                    for slot, token in enumerate(positions):
                        if token >= 0:
                            key = keys[row, head, slot]
                            rotated_query = rotate_halves(
                                query.astype(np.float64), np.array(scored_at.get((layer, row * 2 + head, int(token)), token))
                            )
                            score = key @ rotated_query + np.hypot(key[:8], key[8:]) @ spread
                            np.testing.assert_allclose(
                                stepper.states["past_score"][row, layer * 2 + head, slot], score, rtol=0, atol=2e-4
                            )


def test_triattention_refuses_keys_without_a_rotation(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not rotate|no rotation|rotat"):
        calibrated(tmp_path, "gpt2", "triattention")


def test_statistics_replace_earlier_ones_and_no_other_file(tmp_path: Path) -> None:
    path = Path(calibrated(tmp_path))
    first = path.read_bytes()
    assert calibrated(tmp_path) == str(path)
    assert path.read_bytes() == first
    path.write_bytes(b"notes")
    with pytest.raises(RyzenError, match="llama.safetensors` exists and holds no statistics"):
        calibrated(tmp_path)
    assert path.read_bytes() == b"notes"


def test_statistics_of_another_model_are_refused(tmp_path: Path) -> None:
    path = calibrated(tmp_path)
    model = load(export("qwen2", STYLE))
    KvStatic(capacity=64).rewrite(model, PassContext(backend="onnxruntime"))
    for options, message in (
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
        assert message in outcome.reason
        assert "ryzen-compile calibrate" in (outcome.hint or "")
        assert ir.to_proto(model).SerializeToString() == before


def test_the_digest_of_a_model_depends_on_the_weights_only() -> None:
    def static_model(architecture: str, capacity: int) -> ir.Model:
        model = load(export(architecture, STYLE))
        assert isinstance(KvStatic(capacity=capacity).rewrite(model, PassContext(backend="onnxruntime")), Change)
        return model

    first, second = static_model("llama", 64), static_model("llama", 32)
    expected = statistics.weights_digest(first)
    assert expected == statistics.weights_digest(second)
    assert expected != statistics.weights_digest(static_model("qwen3", 64))
    tensors = [(value, value.const_value) for value in second.graph.initializers.values()]
    weight, tensor = next((value, tensor) for value, tensor in tensors if tensor is not None and tensor.size > 4000)
    changed = tensor.numpy().copy()
    changed.flat[0] += 1
    weight.const_value = ir.tensor(changed, name=weight.name)
    assert expected != statistics.weights_digest(second)


def test_the_digest_of_a_model_is_computed_without_its_weights_in_memory(tmp_path: Path) -> None:
    graph = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (int64[n] ids) => (float[n,4096] y) { y = Gather (w, ids) }'
    )
    weight = np.arange(1 << 23, dtype=np.float32).reshape(2048, 4096)  # 32 MB
    graph.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(graph, tmp_path / "g.onnx", save_as_external_data=True, location="w.data")
    del graph
    model = load(tmp_path / "g.onnx")
    tracemalloc.start()
    try:
        digest = statistics.weights_digest(model)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert digest == hashlib.sha256(hashlib.sha256(weight.tobytes()).digest()).hexdigest()[:32]


def test_the_calibrate_command_reports_the_fit_and_refuses_invalid_arguments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, output = str(export("llama", STYLE)), tmp_path / "zap.safetensors"
    ids = write_documents(tmp_path / "ids.npz")
    assert run(["calibrate", model, str(output), "--for", KVZAP_PASS, "--data", ids, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert "fitted to 636 tokens" in printed["message"]
    (started,) = printed["diagnostics"]
    assert (started["code"], started["message"]) == (
        "calibration-started",
        "fits statistics to 12 documents, 720 tokens in total",
    )
    output.unlink()
    progress = StageCounts()
    calibrate(model, output, pass_spec=KVZAP_PASS, data=ids, documents=8, progress=progress)
    assert progress.texts() == ["calibrate: 8 of 8 documents"]
    output.unlink()
    short = write_documents(tmp_path / "short.npz", count=2, tokens=20)
    for options, code, message in (
        (["--for", KVZAP_PASS, "--data", short], 1, "too few"),
        (["--for", "kv-evict{score=knorm}", "--data", ids], 2, "takes no statistics"),
        (["--for", "fold", "--data", ids], 2, "takes no statistics"),
        (["--for", f"fold,{KVZAP_PASS}", "--data", ids], 2, "must name exactly one pass (got 2 in"),
        (["--for", KVZAP_PASS, "--data", "recipe:llama"], 2, "nothing to calibrate on"),
    ):
        assert run(["calibrate", model, str(output), *options]) == code
        assert message in capsys.readouterr().err
        assert not output.exists()


def test_a_model_that_is_not_a_decoder_cannot_be_calibrated(tmp_path: Path) -> None:
    from support import tiny_models

    tiny_models.write(tmp_path / "small.onnx")
    with pytest.raises(ModelError):
        calibrate(tmp_path / "small.onnx", tmp_path / "a", pass_spec=KVZAP_PASS, data=write_documents(tmp_path / "ids.npz"))


def test_keydiff_refuses_keys_of_different_sizes() -> None:
    model = load(export("llama", STYLE))
    KvStatic(capacity=64).rewrite(model, PassContext(backend="onnxruntime"))
    view = read_static_cache_view(model)
    import msgspec

    assert find_scorer("keydiff").problem(view, None) is None
    view.layers[1].spec = msgspec.structs.replace(
        view.layers[1].spec, key=msgspec.structs.replace(view.layers[1].spec.key, head_size=8)
    )
    assert "sizes [8, 16]" in (find_scorer("keydiff").problem(view, None) or "")
