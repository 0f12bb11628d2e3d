"""Builds that are killed, run concurrently or short of disk space leave no partial files, and the next build succeeds."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support import child_processes, tiny_models

from ryzen_compile.artifacts.package.read import read_package

PROGRAM = str(Path(sys.executable).with_name("ryzen-compile"))


def command(folder: Path, output: str, *options: str) -> list[str]:
    arguments = [PROGRAM, "build", str(folder / "small.onnx"), "-o", str(folder / output), "--gpu", "cpu,sm89", "--no-compare"]
    return [*arguments, "--cache", str(folder / "cache"), *options]


@pytest.mark.slow
@pytest.mark.parametrize("kills", [12, pytest.param(30, marks=pytest.mark.exhaustive)])
def test_a_build_succeeds_after_builds_killed_at_random_times(kills: int, tmp_path: Path) -> None:
    test_started = time.time()
    rng = random.Random(20)
    for seed in (100, 101):  # the first build warms the page cache
        tiny_models.write(tmp_path / "small.onnx", seed=seed)
        started = time.perf_counter()
        subprocess.run(command(tmp_path, "timed.ryzen", "-q"), check=True)
        typical_seconds = time.perf_counter() - started
    killed = 0
    for index in range(kills):
        # Every third build uses the same seed, so that it can find entries of killed builds in the cache.
        tiny_models.write(tmp_path / "small.onnx", seed=0 if index % 3 == 0 else index)
        with subprocess.Popen(command(tmp_path, "killed.ryzen", "-q")) as build:
            time.sleep(rng.uniform(0.05, typical_seconds * 0.8))
            killed += build.poll() is None
            build.kill()
    assert killed >= kills // 3, "too few of the builds were still running when they were killed"
    _wait_for_workers(test_started)
    tiny_models.write(tmp_path / "small.onnx", seed=7)
    subprocess.run(command(tmp_path, "killed.ryzen", "-q"), check=True)
    read_package(tmp_path / "killed.ryzen").check()
    for seed in (0, 1, kills - 1):
        tiny_models.write(tmp_path / "small.onnx", seed=seed)
        subprocess.run(command(tmp_path, "again.ryzen", "-q"), check=True)
        read_package(tmp_path / "again.ryzen").check()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["again.ryzen", "cache", "killed.ryzen", "small.onnx", "timed.ryzen"]
    partial_files = [path for path in tmp_path.rglob("*.part") if "cache" not in path.relative_to(tmp_path).parts]
    assert partial_files == []


def _wait_for_workers(since: float) -> None:
    """Wait until the workers of builds killed after `since` have exited."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        orphans = [
            process
            for process in psutil.process_iter(["cmdline", "ppid", "create_time"])
            if "ryzen_compile.backends.process.child" in (process.info["cmdline"] or [])
            and process.info["ppid"] == 1
            and process.info["create_time"] > since
        ]
        if not orphans:
            return
        time.sleep(0.2)
    raise AssertionError(f"workers still run after their builds: {orphans}")


def test_eight_concurrent_builds_of_one_model_build_once(tmp_path: Path) -> None:
    tiny_models.write(tmp_path / "small.onnx")
    builds = [
        subprocess.Popen(
            command(tmp_path, f"{index}.ryzen", "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for index in range(8)
    ]
    outputs = [build.communicate(timeout=300) for build in builds]
    assert [build.returncode for build in builds] == [0] * 8, outputs
    manifests = [json.loads(stdout)["manifest"] for stdout, _ in outputs]
    assert len({manifest["created_at"] + manifest["files"][0]["sha256"] for manifest in manifests}) == 1
    engines = {file["sha256"] for manifest in manifests for file in manifest["files"] if file["path"].endswith(".plan")}
    assert len(engines) == 1, "engines are not reproducible, so equal bytes mean that one build was shared"
    assert sum("taken from the cache" in stderr for _, stderr in outputs) == 7
    for index in range(8):
        read_package(tmp_path / f"{index}.ryzen").check()


@pytest.mark.parametrize("limit", [500, 2_000, 6_000])
def test_a_full_disk_is_one_message_and_leaves_no_file(tmp_path: Path, limit: int) -> None:
    tiny_models.write(tmp_path / "small.onnx")

    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    # A coverage tracer would also write files in the limited process.
    env = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    result = subprocess.run(
        command(tmp_path, "full.ryzen"), preexec_fn=limit_file_size, capture_output=True, text=True, check=False, env=env
    )
    assert result.returncode == 1
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr
    assert "large" in result.stderr or "room" in result.stderr or "space" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["small.onnx"]


def test_interrupting_a_build_stops_its_worker(tmp_path: Path) -> None:
    test_started = time.time()
    tiny_models.write(tmp_path / "small.onnx")

    arguments = command(tmp_path, "stopped.ryzen", "-q")
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as build:
        stderr, _ = child_processes.interrupt_build(build, signal.SIGINT)
    assert build.returncode == 130
    assert "Traceback" not in stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "small.onnx"]
    _wait_for_workers(test_started)
