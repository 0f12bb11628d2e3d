"""Benchmarks: timings of alternating runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import tiny_models
from support.stage_counts import StageCounts

import ryzen_compile as rc
from ryzen_compile.artifacts.cache.store import Store
from ryzen_compile.errors import RyzenError
from ryzen_compile.ir.fingerprint import file_digest_hex
from ryzen_compile.jobs.executor import LocalExecutor
from ryzen_compile.jobs.job import Job, JobOutput, decode_job, encode_job
from ryzen_compile.progress import SilentProgress
from ryzen_compile.runtime.bench import BenchConfig, bench, open_runner, run_interleaved

CONFIG = BenchConfig(warm_up_seconds=0.0, seconds=0.0, min_iterations=5)


def test_a_package_is_timed_in_alternation_with_its_source(tmp_path: Path) -> None:
    source = tiny_models.write(tmp_path / "small.onnx")
    package = rc.build(source, gpu="cpu", compare=False, cache=False)
    with open_runner(str(package.path)) as package_runner, open_runner(str(source)) as model_runner:
        inputs = package_runner.make_inputs(data=None, shapes="x:3x16", seed=0)
        result = run_interleaved([package_runner, model_runner], inputs, CONFIG, SilentProgress())
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
        result = run_interleaved([runner], runner.make_inputs(data=None, shapes=None, seed=0), CONFIG, SilentProgress())
    assert result.ratio is None
    assert result.spread == ""


def test_progress_counts_the_iterations_whose_number_is_known_if_they_are_slow(tmp_path: Path) -> None:
    progress = StageCounts()
    with open_runner(str(tiny_models.write(tmp_path / "small.onnx"))) as runner:
        inputs = runner.make_inputs(data=None, shapes=None, seed=0)
        run_interleaved([runner], inputs, CONFIG, progress)
        config = BenchConfig(warm_up_seconds=0.05, seconds=0.1, min_iterations=1)
        result = run_interleaved([runner, runner], inputs, config, progress)
    assert progress.texts() == [
        "time small.onnx: 5 of 5 iterations",
        f"time small.onnx and small.onnx for 0.2 s: {result.timings[0].runs} of None iterations",
    ]


def test_a_missing_file_is_named() -> None:
    with pytest.raises(RyzenError, match=r"no package or model `nothing\.ryzen`"), open_runner("nothing.ryzen"):
        pass


def test_a_measurement_is_an_exclusive_job_that_is_never_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Job[Any]] = []
    run = LocalExecutor.run

    def record(self: LocalExecutor, job: Job[Any], folder: Path) -> JobOutput[Any]:
        jobs.append(job)
        return run(self, job, folder)

    monkeypatch.setattr(LocalExecutor, "run", record)
    source = tiny_models.write(tmp_path / "small.onnx")
    result = bench([str(source)], shapes="x:3x16", config=CONFIG, progress=SilentProgress())
    (job,) = jobs
    assert not job.cacheable
    assert job.resources.exclusive
    assert job.inputs == {str(source): file_digest_hex(source)}
    again = LocalExecutor(Store(tmp_path / "cache"), SilentProgress())
    outputs = [run(again, decode_job(encode_job(job)), tmp_path) for _ in range(2)]
    assert [output.result.shapes for output in outputs] == [result.shapes] * 2
    assert outputs[0].result.timings != outputs[1].result.timings
