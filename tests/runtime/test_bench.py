"""Timings come from real runs, in turns."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import tiny_models

import ryzen_compile as rc
from ryzen_compile.errors import RyzenError
from ryzen_compile.runtime.bench import BenchConfig, open_runner, run_interleaved

CLOCK = BenchConfig(warm_up_seconds=0.0, seconds=0.0, min_iterations=5)


def test_a_package_is_timed_in_turns_with_its_source(tmp_path: Path) -> None:
    source = tiny_models.write(tmp_path / "small.onnx")
    package = rc.build(source, gpu="cpu", compare=False, cache=False)
    with open_runner(str(package.path)) as one, open_runner(str(source)) as other:
        feed = one.make_inputs(data=None, shapes="x:3x16", seed=0)
        result = run_interleaved([one, other], feed, CLOCK)
    assert result.shapes == {"x": (3, 16)}
    assert [timing.runs for timing in result.timings] == [5, 5]
    for timing in result.timings:
        assert 0 < timing.min_ms <= timing.median_ms <= timing.p99_ms
        assert timing.per_second > 0
    assert result.ratio is not None
    assert result.ratio > 0


def test_one_alone_has_no_ratio(tmp_path: Path) -> None:
    with open_runner(str(tiny_models.write(tmp_path / "small.onnx"))) as one:
        result = run_interleaved([one], one.make_inputs(data=None, shapes=None, seed=0), CLOCK)
    assert result.ratio is None
    assert result.spread == ""


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(RyzenError, match=r"no package or model `nothing\.ryzen`"), open_runner("nothing.ryzen"):
        pass
