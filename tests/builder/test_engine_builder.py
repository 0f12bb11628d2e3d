"""Tests of engine builds for several targets: which failures are retried per target, and within which time."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import tiny_models
from support.fake_worker import FakeWorker
from support.faulty_builder import FaultyBackend

import ryzen_compile as rc
from ryzen_compile.artifacts.package.manifest import Manifest
from ryzen_compile.backends.api import BuildRequest, BuiltEngine
from ryzen_compile.backends.process.worker import Worker
from ryzen_compile.builder import engine_builder
from ryzen_compile.errors import BackendError

TARGETS = "sm86,sm89,sm120"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_models.write(tmp_path / "small.onnx")


def build(source: Path, worker: object, monkeypatch: pytest.MonkeyPatch, *, seconds: float | None = None) -> Manifest:
    monkeypatch.setattr(engine_builder, "start_worker", lambda backend: worker)
    return rc.build(source, gpu=TARGETS, compare=False, cache=False, allow_partial=True, time_limit_seconds=seconds).manifest


def engines_of(manifest: Manifest) -> list[list[str]]:
    return [[target.name for target in engine.targets] for engine in manifest.engines]


def refused_by(manifest: Manifest) -> dict[str, str]:
    return {refused.target.name: refused.reason for refused in manifest.refused_targets}


def test_a_refusal_of_one_target_is_retried_without_it(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = FakeWorker(lambda names: BackendError("sm89 has no such kernel") if "sm89" in names else None)
    manifest = build(source, worker, monkeypatch)
    assert worker.groups == [["sm86", "sm89", "sm120"], ["sm86"], ["sm89", "sm120"], ["sm89"], ["sm120"]]
    assert engines_of(manifest) == [["sm86"], ["sm120"]]
    assert refused_by(manifest) == {"sm89": "sm89 has no such kernel"}


def test_a_refusal_that_concerns_every_target_is_not_retried(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = FakeWorker(lambda names: BackendError("the graph cannot be read", may_be_one_target=False))
    manifest = build(source, worker, monkeypatch)
    assert len(worker.requests) == 1
    assert refused_by(manifest) == dict.fromkeys(TARGETS.split(","), "the graph cannot be read")


def test_retries_share_the_time_limit(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = FakeWorker(lambda names: BackendError("no kernel"), seconds=0.4)
    started = time.monotonic()
    manifest = build(source, worker, monkeypatch, seconds=1.0)
    limits = [request.seconds or 0 for request in worker.requests]
    assert limits == sorted(limits, reverse=True)
    assert limits[0] > 0.9
    assert max(limits[1:]) < 0.61
    assert len(worker.requests) == 3, "the limit ends before the fourth build"
    assert set(refused_by(manifest)) == set(TARGETS.split(","))
    assert "the time limit of 1 s ended" in refused_by(manifest)["sm120"]
    assert time.monotonic() - started < 5


@pytest.fixture
def faulty_worker(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[BuildRequest]]:
    """Return a function that replaces the worker of a build by one with a faulty builder, and returns its requests."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))

    def use(builder: str) -> list[BuildRequest]:
        requests: list[BuildRequest] = []
        run = Worker.build

        def record(self: Worker, request: BuildRequest, *arguments: object) -> BuiltEngine:
            requests.append(request)
            return run(self, request, *arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(Worker, "build", record)
        monkeypatch.setattr(engine_builder, "start_worker", lambda backend: Worker(FaultyBackend(builder)))
        return requests

    return use


@pytest.mark.parametrize(
    ("builder", "limits", "reason"),
    [
        ("HangingBuilder", {"time_limit_seconds": 2.0}, "was stopped"),
        ("MemoryHogBuilder", {"memory_limit_bytes": 200_000_000}, "of memory"),
        ("MissingLibraryBuilder", {}, "the library is missing"),
    ],
)
def test_exceeded_limits_and_a_missing_library_are_not_retried(
    source: Path, faulty_worker: Callable[[str], list[BuildRequest]], builder: str, limits: dict[str, Any], reason: str
) -> None:
    requests = faulty_worker(builder)
    manifest = rc.build(source, gpu=TARGETS, compare=False, cache=False, allow_partial=True, **limits).manifest
    assert len(requests) == 1
    assert set(refused_by(manifest)) == set(TARGETS.split(","))
    assert all(reason in refused for refused in refused_by(manifest).values())


def test_a_crash_is_retried_per_target(source: Path, faulty_worker: Callable[[str], list[BuildRequest]]) -> None:
    requests = faulty_worker("AbortingBuilder")
    manifest = rc.build(source, gpu=TARGETS, compare=False, cache=False, allow_partial=True).manifest
    assert [len(request.targets) for request in requests] == [3, 1, 2, 1, 1]
    assert all("SIGABRT" in reason for reason in refused_by(manifest).values())
