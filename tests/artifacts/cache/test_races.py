"""Tests of concurrent use of the cache by several processes, including killed ones."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import ExitStack
from pathlib import Path

from support import child_processes
from support.cache_entries import cache_key, read_files

from ryzen_compile.artifacts.cache import maintenance
from ryzen_compile.artifacts.cache.store import Store

BUILD = """
import os, sys, time
from pathlib import Path
from support.cache_entries import cache_key, write_files
from ryzen_compile.artifacts.cache.store import Store
from ryzen_compile.progress import SilentProgress
cache, folder, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
class PrintingProgress(SilentProgress):
    def report(self, diagnostic):
        print(diagnostic, flush=True)
store = Store(cache, progress=PrintingProgress())
with store.lock(cache_key("a")):
    hit = store.get(cache_key("a"))
    if hit is None:
        print("builds", flush=True)
        time.sleep(seconds)
        assert store.put(cache_key("a"), folder, write_files(folder, {"plan": os.urandom(100_000)}), b"{}")
    else:
        print("restores", flush=True)
        assert store.restore(hit, folder)
"""


def test_one_of_eight_concurrent_builders_builds_and_seven_restore(tmp_path: Path) -> None:
    with ExitStack() as stack:
        started = [child_processes.start(BUILD, tmp_path / "cache", tmp_path / str(index), "0.5") for index in range(8)]
        builders = [stack.enter_context(builder) for builder in started]
        printed = {builder.pid: builder.communicate(timeout=60)[0].splitlines() for builder in builders}
        assert [builder.returncode for builder in builders] == [0] * 8, printed
    assert sorted(lines[-1] for lines in printed.values()) == ["builds"] + ["restores"] * 7
    assert all(len(lines) <= 2 for lines in printed.values()), "waiting is reported once"
    assert len({read_files(tmp_path / str(index))["plan"] for index in range(8)}) == 1


def test_waiting_builder_reports_the_lock_holder_and_continues_after_its_death(tmp_path: Path) -> None:
    with child_processes.start(BUILD, tmp_path / "cache", tmp_path / "0", "60") as builder:
        child_processes.expect_lines(builder, "builds", 1)
        with child_processes.start(BUILD, tmp_path / "cache", tmp_path / "1", "0") as waiter:
            child_processes.expect_lines(waiter, f"waiting for process {builder.pid}, which runs the same build", 1)
            builder.send_signal(signal.SIGKILL)
            assert waiter.communicate(timeout=60) == ("builds\n", None)
            assert waiter.returncode == 0


BUILD_LOOP = """
import random, shutil, sys
from pathlib import Path
from support.cache_entries import cache_key, write_files
from ryzen_compile.artifacts.cache import maintenance
from ryzen_compile.artifacts.cache.store import Store
folder, seed = Path(sys.argv[1]), sys.argv[2]
store, rng = Store(folder / "cache", limit_bytes=1_500_000), random.Random(seed)
while True:
    print("round", flush=True)
    name = rng.choice("abcdef")
    with store.lock(cache_key(name)):
        hit = store.get(cache_key(name))
        shutil.rmtree(folder / seed, ignore_errors=True)
        if hit is None or not store.restore(hit, folder / seed):
            contents = {"plan": name.encode() * 300_000, "weights": b"w" * 100_000}
            assert store.put(cache_key(name), folder / seed, write_files(folder / seed, contents), b"{}")
        else:
            assert (folder / seed / "plan").read_bytes() == name.encode() * 300_000
    if rng.random() < 0.2:
        maintenance.collect_garbage(store, wait=rng.random() < 0.5)
"""


def test_killed_builders_leave_an_undamaged_cache(tmp_path: Path) -> None:
    rng = random.Random(0)
    for round_ in range(8):
        with (
            child_processes.start(BUILD_LOOP, tmp_path, f"{round_}.0") as first,
            child_processes.start(BUILD_LOOP, tmp_path, f"{round_}.1") as second,
        ):
            child_processes.expect_lines(first, "round", rng.randrange(2, 6))
            child_processes.expect_lines(second, "round", 1)
            time.sleep(rng.uniform(0, 0.02))
            first.send_signal(signal.SIGKILL)
            second.send_signal(signal.SIGKILL)
            assert {*first.communicate()[0].splitlines(), *second.communicate()[0].splitlines()} <= {"round"}
        store = Store(tmp_path / "cache")
        for entry in maintenance.list_entries(store):
            name = entry.parts["graph model"]
            hit = store.get(cache_key(name))
            assert hit is not None
            folder = tmp_path / f"{round_}.{name}"
            assert store.restore(hit, folder)
            assert read_files(folder) == {"plan": name.encode() * 300_000, "weights": b"w" * 100_000}
    maintenance.collect_garbage(store)
    assert os.listdir(store.tmp_dir) == []
    assert maintenance.stats(store).entries > 0


def test_concurrent_builds_and_garbage_collections_cause_no_damage(tmp_path: Path) -> None:
    with ExitStack() as stack:
        builders = [stack.enter_context(child_processes.start(BUILD_LOOP, tmp_path, str(index))) for index in range(4)]
        time.sleep(3)
        for builder in builders:
            assert builder.poll() is None, builder.communicate()[0]
            child_processes.expect_lines(builder, "round", 3)
