"""Benchmarks: timings of alternating runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import tiny_models

import ryzen_compile as rc
from ryzen_compile.errors import RyzenError
from ryzen_compile.runtime.bench import BenchConfig, open_runner, run_interleaved

CONFIG = BenchConfig(warm_up_seconds=0.0, seconds=0.0, min_iterations=5)


def test_a_package_is_timed_in_alternation_with_its_source(tmp_path: Path) -> None:
    source = tiny_models.write(tmp_path / "small.onnx")
    package = rc.build(source, gpu="cpu", compare=False, cache=False)
    with open_runner(str(package.path)) as package_runner, open_runner(str(source)) as model_runner:
        inputs = package_runner.make_inputs(data=None, shapes="x:3x16", seed=0)
        result = run_interleaved([package_runner, model_runner], inputs, CONFIG)
    assert result.shapes == {"x": (3, 16)}
    assert [timing.runs for timing in result.timings] == [5, 5]
    for timing in result.timings:
        assert 0 < timing.min_ms <= timing.median_ms <= timing.p99_ms
        assert timing.per_second > 0
    assert result.ratio is not None
    assert result.ratio > 0
    assert result.spread.startswith("interquartile range ")


def test_a_single_runner_has_no_ratio(tmp_path: Path) -> None:
    with open_runner(str(tiny_models.write(tmp_path / "small.onnx"))) as runner:
        result = run_interleaved([runner], runner.make_inputs(data=None, shapes=None, seed=0), CONFIG)
    assert result.ratio is None
    assert result.spread == ""


def test_a_missing_file_is_named() -> None:
    with pytest.raises(RyzenError, match=r"no package or model `nothing\.ryzen`"), open_runner("nothing.ryzen"):
        pass
