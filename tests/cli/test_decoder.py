"""The workflow of a decoder: inspect its KV caches, make them static, build, load, generate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.decoders import export, torch_steps

import ryzen_compile as rc
from ryzen_compile.cli.main import run

PASSES = "kv-static{capacity=48,step=1},kv-evict{score=knorm,budget=50%,recent-window=4}"


def test_a_decoder_is_inspected_rewritten_built_and_generates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, decode, package = str(export("llama", "optimum-sdpa")), str(tmp_path / "decode.onnx"), str(tmp_path / "decode.ryzen")
    assert run(["inspect", "--kv", model]) == 0
    assert "grows" in capsys.readouterr().out
    assert run(["rewrite", model, decode, "--passes", PASSES]) == 0
    assert run(["inspect", "--kv", decode, "--json"]) == 0
    layer = json.loads(capsys.readouterr().out)["kv_caches"]["decode.onnx"]["layers"][1]
    assert (layer["policy"]["slots"], layer["policy"]["score"], layer["kv_heads"]) == (24, "knorm", 2)
    assert run(["build", decode, "-o", package, "--gpu", "cpu,sm86,sm89,sm120", "--cache", str(tmp_path / "cache"), "-q"]) == 0
    assert run(["inspect", package, "-v"]) == 0
    assert "2 of 2 attentions fused, for sm86, sm89, sm120" in capsys.readouterr().out
    assert run(["inspect", "--kv", package]) == 0
    assert "24 tokens, chosen by knorm" in capsys.readouterr().out
    states = {state["name"]: state for state in _manifest(package)["graphs"][0]["interface"]["states"]}
    assert {"length", "score", "position", "past_key_values.0.key"} < set(states)
    assert states["position"]["initial_value"] == -1
    with rc.load(package, backend="onnxruntime") as engine:
        short, long = engine.generate([[5, 6, 7], [8]], max_new_tokens=8)
        repeated = engine.generate([8], max_new_tokens=8)[0]
    assert np.array_equal(long.tokens, repeated.tokens)
    ids = np.array([[5, 6, 7]])
    for token in short.tokens:
        assert torch_steps("llama", ids, [ids.shape[1]])[0, -1].argmax() == token
        ids = np.append(ids, [[token]], axis=1)


def _manifest(package: str) -> dict[str, list[dict[str, dict[str, list[dict[str, float]]]]]]:
    manifest: dict[str, list[dict[str, dict[str, list[dict[str, float]]]]]]
    manifest = json.loads(Path(package, "manifest.json").read_text())
    return manifest


def test_a_build_refuses_a_pass_that_changes_the_interface(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(export("llama", "optimum-sdpa"))
    assert run(["build", model, "-o", str(tmp_path / "a.ryzen"), "--gpu", "cpu", "--passes", "kv-static{capacity=48}"]) == 1
    stderr = capsys.readouterr().err
    assert "ryzen-compile rewrite" in stderr
    assert not (tmp_path / "a.ryzen").exists()


def test_a_model_that_is_not_a_decoder_has_no_kv_caches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from support import tiny_models

    tiny_models.write(tmp_path / "small.onnx")
    assert run(["inspect", "--kv", str(tmp_path / "small.onnx")]) == 1
    assert "no attention" in capsys.readouterr().err
