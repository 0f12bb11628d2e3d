"""Builds that are killed, raced and starved leave nothing half-written, and the next one is whole."""

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
from support import tiny_models

from ryzen_compile.artifacts.package.read import read_package

PROGRAM = str(Path(sys.executable).with_name("ryzen-compile"))


def command(folder: Path, output: str, *more: str) -> list[str]:
    words = [PROGRAM, "build", str(folder / "small.onnx"), "-o", str(folder / output), "--gpu", "cpu,sm89", "--no-compare"]
    return [*words, "--cache", str(folder / "cache"), *more]


@pytest.mark.slow
def test_thirty_builds_killed_at_random_points_leave_room_for_a_clean_one(tmp_path: Path) -> None:
    begun = time.time()
    chance = random.Random(20)
    for seed in (100, 101):  # the first warms the disk's cache
        tiny_models.write(tmp_path / "small.onnx", seed=seed)
        started = time.perf_counter()
        subprocess.run(command(tmp_path, "timed.ryzen", "-q"), check=True)
        typical = time.perf_counter() - started
    killed = 0
    for at in range(30):
        tiny_models.write(
            tmp_path / "small.onnx", seed=0 if at % 3 == 0 else at
        )  # some may find in the cache what was left there
        with subprocess.Popen(command(tmp_path, "killed.ryzen", "-q")) as build:
            time.sleep(chance.uniform(0.05, typical * 0.8))
            killed += build.poll() is None
            build.kill()
    assert killed >= 10, "too few of the builds were still at work when they were killed"
    _wait_until_alone(begun)
    tiny_models.write(tmp_path / "small.onnx", seed=7)
    subprocess.run(command(tmp_path, "killed.ryzen", "-q"), check=True)
    read_package(tmp_path / "killed.ryzen").check()
    for seed in (0, 1, 29):
        tiny_models.write(tmp_path / "small.onnx", seed=seed)
        subprocess.run(command(tmp_path, "again.ryzen", "-q"), check=True)
        read_package(tmp_path / "again.ryzen").check()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["again.ryzen", "cache", "killed.ryzen", "small.onnx", "timed.ryzen"]
    left = [path for path in tmp_path.rglob("*.part") if "cache" not in path.relative_to(tmp_path).parts]
    assert left == []


def _wait_until_alone(since: float) -> None:
    """Wait until the workers of builds killed after `since` have noticed that their parents are gone."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        orphans = [
            one
            for one in psutil.process_iter(["cmdline", "ppid", "create_time"])
            if "ryzen_compile.backends.process.child" in (one.info["cmdline"] or [])
            and one.info["ppid"] == 1
            and one.info["create_time"] > since
        ]
        if not orphans:
            return
        time.sleep(0.2)
    raise AssertionError(f"workers outlive their builds: {orphans}")


def test_eight_builders_of_one_model_build_once(tmp_path: Path) -> None:
    tiny_models.write(tmp_path / "small.onnx")
    builds = [
        subprocess.Popen(command(tmp_path, f"{at}.ryzen", "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for at in range(8)
    ]
    told = [build.communicate(timeout=300) for build in builds]
    assert [build.returncode for build in builds] == [0] * 8, told
    manifests = [json.loads(out)["manifest"] for out, _ in told]
    assert len({manifest["made_at"] + manifest["files"][0]["sha256"] for manifest in manifests}) == 1
    plans = {file["sha256"] for manifest in manifests for file in manifest["files"] if file["path"].endswith(".plan")}
    assert len(plans) == 1, "two builds never give the same plan: all eight hold the one that was built"
    assert sum("taken from the cache" in talk for _, talk in told) == 7
    for at in range(8):
        read_package(tmp_path / f"{at}.ryzen").check()


@pytest.mark.parametrize("limit", [500, 2_000, 6_000])
def test_a_full_disk_is_one_message_and_nothing_left(tmp_path: Path, limit: int) -> None:
    tiny_models.write(tmp_path / "small.onnx")

    def starve() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    # A tracer of the tests would write into the starved process's files, too.
    env = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    done = subprocess.run(
        command(tmp_path, "full.ryzen"), preexec_fn=starve, capture_output=True, text=True, check=False, env=env
    )
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    assert "large" in done.stderr or "room" in done.stderr or "space" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["small.onnx"]


def test_interrupting_a_build_stops_its_worker(tmp_path: Path) -> None:
    begun = time.time()
    tiny_models.write(tmp_path / "small.onnx")

    def hear() -> None:  # tests started in the background of a shell inherit a SIGINT that is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    words = command(tmp_path, "stopped.ryzen", "-q")
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, preexec_fn=hear) as build:
        while not psutil.Process(build.pid).children():
            assert build.poll() is None, "it ended before it had a worker"
            time.sleep(0.005)
        build.send_signal(signal.SIGINT)
        _, told = build.communicate(timeout=60)
    assert build.returncode == 130
    assert "Traceback" not in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "small.onnx"]
    _wait_until_alone(begun)
