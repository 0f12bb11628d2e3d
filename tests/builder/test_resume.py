"""Builds as jobs: an interrupted build resumes, results are reused by their inputs, and a job runs from its JSON form."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from support import tiny_models
from support.cache_entries import RecordingProgress
from support.fake_worker import FakeWorker

import ryzen_compile as rc
from ryzen_compile.artifacts.cache.maintenance import list_entries
from ryzen_compile.artifacts.cache.store import Store
from ryzen_compile.builder import engine_builder, variants
from ryzen_compile.errors import BackendError, ModelError
from ryzen_compile.jobs.executor import LocalExecutor
from ryzen_compile.jobs.job import Job, JobOutput, decode_job, encode_job
from ryzen_compile.progress import SilentProgress, Stage, StageItems

HANGING_BUILD = """
import sys, time
import ryzen_compile as rc
from ryzen_compile.builder import engine_builder
from support.fake_worker import FakeWorker

worker = FakeWorker(lambda names: time.sleep(600) if len(worker.requests) > 1 else None)
engine_builder.start_worker = lambda backend: worker
first, second, cache = sys.argv[1:]
rc.build({"a": first, "b": second}, "never.ryzen", gpu="sm89", compare=False, cache=cache)
"""


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return {"a": tiny_models.write(tmp_path / "a.onnx", seed=1), "b": tiny_models.write(tmp_path / "b.onnx", seed=2)}


def kinds(cache: Path) -> list[str]:
    return sorted(entry.kind for entry in list_entries(Store(cache)))


def test_a_killed_build_resumes_with_the_results_of_its_finished_jobs(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    finished = ["engine", "summary", "summary", "trial", "trial", "variant", "variant", "variant", "variant"]
    command = [sys.executable, "-c", HANGING_BUILD, str(files["a"]), str(files["b"]), str(cache)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(command, cwd=tmp_path, env=environment) as build:
        deadline = time.monotonic() + 120
        while kinds(cache) != finished:
            assert build.poll() is None, "the build ended before it was killed"
            assert time.monotonic() < deadline, kinds(cache)
            time.sleep(0.05)
        build.kill()
    assert not (tmp_path / "never.ryzen").exists()

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a finished job runs again")

    monkeypatch.setattr(variants, "run_passes", fail)
    worker, progress = FakeWorker(lambda names: None), RecordingProgress()
    monkeypatch.setattr(engine_builder, "start_worker", lambda backend: worker)
    package = rc.build(files, tmp_path / "m.ryzen", gpu="sm89", compare=False, cache=cache, progress=progress)
    package.check()
    assert [Path(request.output).name for request in worker.requests] == ["b.fold+attention@tensorrt-rtx.sm89.plan"]
    assert sorted(line for line in progress.lines if line.endswith("taken from the cache")) == [
        "engines/a.fold+attention@tensorrt-rtx.sm89.plan: taken from the cache",
        "graphs/a.fold+attention.onnx for tensorrt-rtx: taken from the cache",
        "graphs/a.fold.onnx for onnxruntime: taken from the cache",
        "graphs/b.fold+attention.onnx for tensorrt-rtx: taken from the cache",
        "graphs/b.fold.onnx for onnxruntime: taken from the cache",
    ]
    assert kinds(cache) == sorted([*finished, "engine", "package"])


def test_comparisons_of_an_interrupted_build_are_reused(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"

    def interrupt(names: list[str]) -> BackendError | None:
        time.sleep(0.5)
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(engine_builder, "start_worker", lambda backend: FakeWorker(interrupt))
        with pytest.raises(ZeroDivisionError):
            rc.build(files, tmp_path / "m.ryzen", gpu="sm89", cache=cache)
    assert kinds(cache).count("comparison") == 4

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a finished comparison runs again")

    monkeypatch.setattr("ryzen_compile.builder.build.run_isolated", fail)
    monkeypatch.setattr(engine_builder, "start_worker", lambda backend: FakeWorker(lambda names: None))
    package = rc.build(files, tmp_path / "m.ryzen", gpu="sm89", cache=cache)
    records = [variant.accuracy for graph in package.manifest.graphs for variant in graph.variants]
    assert all(len(accuracy) == 1 and accuracy[0].met for accuracy in records)


def test_a_source_that_changes_before_its_comparison_is_refused_and_not_cached(files: dict[str, Path], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    rc.build(files["a"], tmp_path / "m.ryzen", gpu="cpu", compare=False, cache=cache)

    class ModelChangingStage(SilentProgress):
        def stage(self, title: str, items: StageItems | None = None) -> AbstractContextManager[Stage]:
            if title.startswith("compare"):
                tiny_models.write(files["a"], seed=5)
            return super().stage(title)

    with pytest.raises(ModelError, match="changed since the model was loaded"):
        rc.build(files["a"], tmp_path / "m.ryzen", gpu="cpu", cache=cache, progress=ModelChangingStage())
    assert "comparison" not in kinds(cache)


def test_other_criteria_repeat_only_the_comparison(files: dict[str, Path], tmp_path: Path) -> None:
    cache, criteria, progress = tmp_path / "cache", tmp_path / "criteria.toml", RecordingProgress()
    rc.build(files["a"], tmp_path / "m.ryzen", gpu="cpu", cache=cache)
    criteria.write_text("[fp32]\nmax_abs = 0.5\n")
    rc.build(files["a"], tmp_path / "m.ryzen", gpu="cpu", cache=cache, criteria=criteria, progress=progress)
    assert [line for line in progress.lines if "cache" in line] == [
        "graphs/model.fold.onnx for onnxruntime: taken from the cache"
    ]
    assert kinds(cache) == ["comparison", "comparison", "package", "package", "summary", "trial", "variant"]


def test_equal_graphs_of_different_pipelines_share_an_engine(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = FakeWorker(lambda names: None)
    monkeypatch.setattr(engine_builder, "start_worker", lambda backend: worker)
    for passes in ("fold", "fold,attention"):  # the model has no attention
        rc.build(files["a"], tmp_path / "m.ryzen", gpu="sm89", passes=passes, compare=False, cache=tmp_path / "cache")
    assert len(worker.requests) == 1


def test_the_jobs_of_a_build_run_from_their_json_form(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[tuple[bytes, JobOutput[Any]]] = []
    inputs: dict[str, bytes] = {}
    run = LocalExecutor.run

    def record(self: LocalExecutor, job: Job[Any], folder: Path) -> JobOutput[Any]:
        inputs.update({path: (folder / path).read_bytes() for path in job.inputs if not os.path.isabs(path)})
        output = run(self, job, folder)
        if job.key.kind in ("variant", "engine", "comparison"):
            jobs.append((encode_job(job), output))
        return output

    monkeypatch.setattr(LocalExecutor, "run", record)
    rc.build(files["a"], tmp_path / "m.ryzen", gpu="cpu", cache=False, passes="fold,precision{to=fp32}")
    monkeypatch.undo()
    assert sorted(decode_job(data).key.kind for data, _ in jobs) == ["comparison", "engine", "variant"]
    for index, (data, expected) in enumerate(jobs):
        job, folder = decode_job(data), tmp_path / f"machine-{index}"
        for path in job.inputs:
            if not os.path.isabs(path):
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(inputs[path])
        output = LocalExecutor(None, SilentProgress()).run(job, folder)
        assert output.files == expected.files
        if job.key.kind == "comparison":
            assert output.result.metrics == expected.result.metrics
        shutil.rmtree(folder)


def test_a_build_from_the_cache_does_not_import_the_graph_library(files: dict[str, Path], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    rc.build(files["a"], tmp_path / "m.ryzen", gpu="cpu", compare=False, cache=cache)
    code = f"""
import sys
import ryzen_compile as rc
rc.build({str(files["a"])!r}, {str(tmp_path / "m.ryzen")!r}, gpu="cpu", compare=False, cache={str(cache)!r})
sys.exit("onnx_ir" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
