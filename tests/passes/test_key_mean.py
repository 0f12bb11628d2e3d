"""The mean keys of kv-quant: fit, invariance of attention, the error of the codes, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support.decoders import VOCABULARY, cached_steps, export, module
from support.rewritten_decoders import cache_spec
from support.step_runner import StepRunner

from ryzen_compile.builder.calibrate import calibrate
from ryzen_compile.cli.main import run
from ryzen_compile.errors import ModelError
from ryzen_compile.ir.load import load
from ryzen_compile.spec.kv_cache import Quantization
from ryzen_compile.spec.passes import Change, PassContext, Refusal
from ryzen_passes.kv.evict import KvEvict
from ryzen_passes.kv.quant import KvQuant
from ryzen_passes.kv.quant.torch_reference import fake_quantize
from ryzen_passes.kv.scoring.statistics import Statistics, read_statistics
from ryzen_passes.kv.static import KvStatic

Array = np.ndarray[Any, Any]
STYLE, LAYERS, KV_HEADS, HEAD_SIZE = "optimum-sdpa", 2, 2, 16
FORMS = {"static-any": (0, False), "static-one": (1, False), "evict-any": (0, True), "evict-one": (1, True)}
"""Tokens per step (0: any number), and eviction."""


def write_documents(path: Path) -> str:
    np.savez(path, input_ids=np.random.default_rng(5).integers(0, VOCABULARY, (12, 60)))
    return str(path)


def calibrated(tmp_path: Path, architecture: str = "llama") -> str:
    path = tmp_path / f"{architecture}.safetensors"
    calibrate(export(architecture, STYLE), path, pass_spec="kv-quant", data=write_documents(tmp_path / "ids.npz"))
    return str(path)


def quantized(form: str, statistics: str, storage_type: Any, *, architecture: str = "llama") -> ir.Model:
    step, evicts = FORMS[form]
    model = load(export(architecture, STYLE))
    evict = [KvEvict(score="knorm", budget="12", sinks=2, recent_window=3)] * evicts
    quant = KvQuant(keys=storage_type, values=storage_type, statistics=statistics)
    for pass_ in (KvStatic(capacity=96, step=step), *evict, quant):
        outcome = pass_.rewrite(model, PassContext(backend="onnxruntime"))
        assert isinstance(outcome, Change), outcome
    return model


def test_the_mean_is_that_of_the_keys_of_all_tokens(tmp_path: Path) -> None:
    fit = read_statistics(calibrated(tmp_path))
    keys: list[list[Array]] = [[] for _ in range(LAYERS)]
    with torch.no_grad():
        for ids in np.load(tmp_path / "ids.npz")["input_ids"]:
            caches = module("llama")(torch.from_numpy(ids[None]), use_cache=True).past_key_values
            for layer in range(LAYERS):
                keys[layer].append(caches.layers[layer].keys[0].double().numpy())
    for layer in range(LAYERS):
        mean = np.concatenate(keys[layer], axis=1).mean(axis=1)
        np.testing.assert_allclose(fit.tensor(layer, "key-mean"), mean, rtol=0, atol=1e-5)
        share = ((mean**2).sum(axis=1) / (np.concatenate(keys[layer], axis=1) ** 2).sum(axis=2).mean(axis=1)).mean()
        assert fit.tensor(layer, "share").item() == pytest.approx(share, rel=1e-4)
    assert (fit.header.kind, fit.header.layers, fit.header.tokens) == ("key-mean", LAYERS, 12 * 60)


@pytest.mark.parametrize("storage_type", ["4", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("8", "fp8"))])
@pytest.mark.parametrize("form", FORMS)
def test_attention_does_not_depend_on_the_mean_that_is_subtracted(form: str, storage_type: Any, tmp_path: Path) -> None:
    """The reference in PyTorch adds the mean to the dequantized keys again; the graph does not."""
    path = calibrated(tmp_path)
    fit = read_statistics(path)
    random = np.random.default_rng(7)
    means = {f"{layer}.key-mean": random.normal(size=(KV_HEADS, HEAD_SIZE)).astype(np.float32) for layer in range(LAYERS)}
    Statistics(fit.header, {**fit.tensors, **means}).write(path)
    model = quantized(form, path, storage_type)
    spec, (step, _) = cache_spec(model), FORMS[form]
    assert all(layer.key.quantization.statistics for layer in spec.layers if layer.key.quantization is not None)
    assert all(layer.value.quantization.statistics is None for layer in spec.layers if layer.value.quantization is not None)
    ids = np.stack([np.random.default_rng(row).permutation(VOCABULARY)[:60] for row in range(2)])
    chunks = [1] * 60 if step else [7, 1, 30, *[1] * 12, 10]
    make = KvQuant.torch_cache_factory(spec, single_token=step == 1, statistics=[Path(path)])
    assert make is not None
    expected = cached_steps(module("llama"), make(), ids, chunks)
    runner, logits, at = StepRunner(model, 2), [], 0
    for chunk in chunks:
        logits.append(runner.step(ids[:, at : at + chunk])["logits"])
        at += chunk
    error = np.abs(np.concatenate(logits, axis=1) - expected)
    assert np.median(error) < 1e-4, "single codes may differ by one level, because of rounding in float32"
    assert error.max() < 0.05


@pytest.mark.parametrize(("storage_type", "gain"), [("4", 2.5), ("8", 2.0), ("fp8", 1.5)])
def test_keys_with_a_large_mean_lose_less(storage_type: Any, gain: float) -> None:
    random = np.random.default_rng(1)
    mean = torch.from_numpy(3 * random.normal(size=(2, 1, 64)).astype(np.float32))
    keys = torch.from_numpy(random.normal(size=(1, 2, 50, 64)).astype(np.float32)) + mean
    quantization = Quantization(storage_type=storage_type, scale_state="", is_rotated=storage_type == "8")
    errors = [float((fake_quantize(keys, quantization, offset) - keys).norm()) for offset in (None, mean)]
    assert errors[1] * gain < errors[0]


def test_statistics_that_do_not_apply_are_refused(tmp_path: Path) -> None:
    path, zap = calibrated(tmp_path), tmp_path / "zap.safetensors"
    documents = write_documents(tmp_path / "ids.npz")
    calibrate(export("llama", STYLE), zap, pass_spec="kv-evict{score=kvzap,recent-window=4}", data=documents)
    for architecture, options, message in (
        ("qwen2", {"statistics": path}, "another model"),
        ("llama", {"statistics": str(zap)}, "of the kind `kvzap`, not `key-mean`"),
        ("llama", {"statistics": str(tmp_path / "absent")}, "holds no statistics"),
        ("llama", {"statistics": path, "keys": "16"}, "keys=16 quantizes no keys"),
        ("gemma2", {"statistics": path}, "soft-capped"),
    ):
        model = load(export(architecture, STYLE))
        assert isinstance(KvStatic(capacity=64).rewrite(model, PassContext(backend="onnxruntime")), Change)
        before = ir.to_proto(model).SerializeToString()
        outcome = KvQuant(**options).rewrite(model, PassContext(backend="onnxruntime"))  # type: ignore[arg-type]
        assert isinstance(outcome, Refusal)
        assert message in outcome.reason
        assert outcome.hint
        assert ir.to_proto(model).SerializeToString() == before


def test_keys_of_4_bits_without_their_mean_are_reported_with_what_was_measured(tmp_path: Path) -> None:
    path, warnings = calibrated(tmp_path), {}
    for keys, statistics in (("4", ""), ("4", path), ("8", "")):
        model = load(export("llama", STYLE))
        for pass_ in (KvStatic(capacity=64), KvQuant(keys=keys, values="4", statistics=statistics)):  # type: ignore[arg-type]
            outcome = pass_.rewrite(model, PassContext(backend="onnxruntime"))
            assert isinstance(outcome, Change)
        warnings[keys, statistics] = outcome.warnings
    (warning,) = warnings.pop(("4", ""))
    assert not any(warnings.values())
    cases = json.loads((Path(__file__).parents[2] / "benchmarks/results/kv_methods.json").read_text(encoding="utf-8"))["cases"]
    plain, centered, mixed = (
        100 * (cases[name]["perplexity_ratio"][0] - 1) for name in ("full.4", "full.4.mean", "full.keys8.values4")
    )
    assert f"{plain:.0f} % of perplexity, and {centered:.0f} % with `statistics`" in warning
    assert warning.endswith(f"keys=8,values=4 cost {mixed:.1f} %")


def test_soft_capped_scores_are_refused_before_a_calibration_and_not_advised_to_have_one(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="soft-capped"):
        calibrated(tmp_path, "gemma2")
    model = load(export("gemma2", STYLE))
    for pass_ in (KvStatic(capacity=64), KvQuant(keys="4", values="4")):
        outcome = pass_.rewrite(model, PassContext(backend="onnxruntime"))
        assert isinstance(outcome, Change)
    (warning,) = outcome.warnings
    assert "calibrate" not in warning


def test_the_command_fits_the_mean_and_refuses_a_pass_without_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, output, ids = str(export("llama", STYLE)), tmp_path / "mean.safetensors", write_documents(tmp_path / "ids.npz")
    assert run(["calibrate", model, str(output), "--for", "kv-quant{keys=4}", "--data", ids]) == 0
    assert "fitted to 720 tokens; share of the mean in the squared norms per layer: 0." in capsys.readouterr().out
    passes = f"kv-static{{capacity=64}},kv-quant{{keys=4,statistics={output}}}"
    assert run(["rewrite", model, str(tmp_path / "o.onnx"), "--passes", passes]) == 0
    assert "keys without their mean" in capsys.readouterr().err
    output.unlink()
    assert run(["calibrate", model, str(output), "--for", "kv-quant{keys=16}", "--data", ids]) == 2
    assert "quantizes no keys" in capsys.readouterr().err
    assert not output.exists()
