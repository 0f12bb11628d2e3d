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
from support.cache_entries import contents_of, key, write
from ryzen_compile.artifacts.cache.store import Store
from ryzen_compile.progress import Silent
cache, place, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
class Talk(Silent):
    def say(self, line):
        print(line, flush=True)
store = Store(cache, progress=Talk())
with store.lock(key("a")):
    hit = store.get(key("a"))
    if hit is None:
        print("builds", flush=True)
        time.sleep(seconds)
        assert store.put(key("a"), place, write(place, {"plan": os.urandom(100_000)}), b"{}")
    else:
        print("restores", flush=True)
        assert store.restore(hit, place)
"""


def test_of_eight_builders_at_once_one_builds_and_seven_restore(tmp_path: Path) -> None:
    with ExitStack() as running:
        started = [child_processes.start(BUILD, tmp_path / "cache", tmp_path / str(at), "0.5") for at in range(8)]
        builders = [running.enter_context(builder) for builder in started]
        printed = {builder.pid: builder.communicate(timeout=60)[0].splitlines() for builder in builders}
        assert [builder.returncode for builder in builders] == [0] * 8, printed
    assert sorted(lines[-1] for lines in printed.values()) == ["builds"] + ["restores"] * 7
    assert all(len(lines) <= 2 for lines in printed.values()), "who waits says so once"
    assert len({read_files(tmp_path / str(at))["plan"] for at in range(8)}) == 1


def test_who_waits_says_for_whom_and_waits_for_no_dead_one(tmp_path: Path) -> None:
    with child_processes.start(BUILD, tmp_path / "cache", tmp_path / "0", "60") as builder:
        child_processes.expect_lines(builder, "builds", 1)
        with child_processes.start(BUILD, tmp_path / "cache", tmp_path / "1", "0") as waiter:
            child_processes.expect_lines(waiter, f"waiting for process {builder.pid}, which builds the same", 1)
            builder.send_signal(signal.SIGKILL)
            assert waiter.communicate(timeout=60) == ("builds\n", None)
            assert waiter.returncode == 0


BUSY = """
import random, shutil, sys
from pathlib import Path
from support.cache_entries import key, write
from ryzen_compile.artifacts.cache import maintenance
from ryzen_compile.artifacts.cache.store import Store
folder, seed = Path(sys.argv[1]), sys.argv[2]
store, chance = Store(folder / "cache", limit_bytes=1_500_000), random.Random(seed)
while True:
    print("round", flush=True)
    name = chance.choice("abcdef")
    with store.lock(key(name)):
        hit = store.get(key(name))
        shutil.rmtree(folder / seed, ignore_errors=True)
        if hit is None or not store.restore(hit, folder / seed):
            contents = {"plan": name.encode() * 300_000, "weights": b"w" * 100_000}
            assert store.put(key(name), folder / seed, write(folder / seed, contents), b"{}")
        else:
            assert (folder / seed / "plan").read_bytes() == name.encode() * 300_000
    if chance.random() < 0.2:
        maintenance.collect(store, wait=chance.random() < 0.5)
"""


def test_builders_killed_at_any_instant_leave_a_cache_without_damage(tmp_path: Path) -> None:
    chance = random.Random(0)
    for round_ in range(8):
        with (
            child_processes.start(BUSY, tmp_path, f"{round_}.0") as one,
            child_processes.start(BUSY, tmp_path, f"{round_}.1") as other,
        ):
            child_processes.expect_lines(one, "round", chance.randrange(2, 6))
            child_processes.expect_lines(other, "round", 1)
            time.sleep(chance.uniform(0, 0.02))
            one.send_signal(signal.SIGKILL)
            other.send_signal(signal.SIGKILL)
            assert {*one.communicate()[0].splitlines(), *other.communicate()[0].splitlines()} <= {"round"}
        store = Store(tmp_path / "cache")
        for listed in maintenance.list_entries(store):
            name = listed.parts["graph model"]
            hit = store.get(cache_key(name))
            assert hit is not None
            place = tmp_path / f"{round_}.{name}"
            assert store.restore(hit, place)
            assert read_files(place) == {"plan": name.encode() * 300_000, "weights": b"w" * 100_000}
    maintenance.collect_garbage(store)
    assert os.listdir(store.tmp_dir) == []
    assert maintenance.stats(store).entries > 0


def test_builders_and_collectors_at_once_never_see_damage(tmp_path: Path) -> None:
    with ExitStack() as running:
        busy = [running.enter_context(child_processes.start(BUSY, tmp_path, str(at))) for at in range(4)]
        time.sleep(3)
        for builder in busy:
            assert builder.poll() is None, builder.communicate()[0]
            child_processes.expect_lines(builder, "round", 3)
