"""Tests of cache maintenance: garbage collection, statistics, and explanation of hits and misses."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support import child_processes
from support.cache_entries import RecordingProgress, cache_key, put_build

from ryzen_compile.artifacts.cache import maintenance
from ryzen_compile.artifacts.cache.key import CacheKey, KeyDifference
from ryzen_compile.artifacts.cache.scratch import scratch_folder
from ryzen_compile.artifacts.cache.store import Store
from ryzen_compile.errors import RyzenError
from ryzen_compile.utils import file_lock


def set_last_use(store: Store, name: str, seconds: float) -> None:
    """Set when the entry of `name` was last used."""
    os.utime(store.entry_path(cache_key(name).digest), (seconds, seconds))


def names(store: Store) -> list[str]:
    return [entry.parts["graph model"] for entry in maintenance.list_entries(store)]


def test_least_recently_used_entries_are_removed_first(store: Store, tmp_path: Path) -> None:
    for index, name in enumerate("abcd"):
        put_build(store, tmp_path / "build", name)
        set_last_use(store, name, 1000 + index)
    assert store.get(cache_key("a")) is not None  # updates the time of the last use
    assert names(store) == ["a", "d", "c", "b"]
    collected = maintenance.collect_garbage(store, limit_bytes=2 * 3000 + 700)
    assert names(store) == ["a", "d"]
    assert (collected.entries, collected.files, collected.size_bytes) == (2, 2, 6000)
    hit = store.get(cache_key("a"))
    assert hit is not None
    assert store.restore(hit, tmp_path / "again")


def test_storing_beyond_the_limit_removes_the_oldest_entries(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache", limit_bytes=3 * 3000 + 700)
    for index, name in enumerate("abcdef"):
        put_build(store, tmp_path / "build", name)
        set_last_use(store, name, 1000 + index)
        assert store.size_bytes() <= store.limit_bytes
    assert names(store) == ["f", "e", "d"]


def test_file_of_two_entries_is_kept_for_the_remaining_entry(store: Store, tmp_path: Path) -> None:
    for name in "ab":
        put_build(store, tmp_path / "build", name)
    set_last_use(store, "a", 1000)
    maintenance.collect_garbage(store, limit_bytes=3700)
    assert names(store) == ["b"]
    hit = store.get(cache_key("b"))
    assert hit is not None
    assert store.restore(hit, tmp_path / "again")


def test_garbage_collection_waits_for_a_restore(store: Store, progress: RecordingProgress, tmp_path: Path) -> None:
    put_build(store, tmp_path / "build", "a")
    done = threading.Event()
    collector = threading.Thread(target=lambda: (maintenance.clear(store), done.set()))
    with store.shared_lock():
        assert maintenance.collect_garbage(store, limit_bytes=0, wait=False).busy
        collector.start()
        assert not done.wait(0.3)
        assert store.get(cache_key("a")) is not None
    collector.join(10)
    assert done.is_set()
    assert store.get(cache_key("a")) is None
    assert progress.lines == ["waiting for another process that uses the cache"]


def test_files_of_dead_builders_are_removed_and_those_of_live_ones_kept(store: Store, tmp_path: Path) -> None:
    put_build(store, tmp_path / "build", "a")
    (store.tmp_dir / "half").write_bytes(b"half")
    orphan = store.root / "blobs" / "00" / ("0" * 64)
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b"orphan")
    (store.root / "entries" / ("e" * 64)).write_bytes(b"garbage")
    (store.root / "locks" / ("d" * 64)).touch()
    with store.lock(cache_key("held")):
        collected = maintenance.collect_garbage(store)
        assert file_lock.try_acquire(store.root / "locks" / cache_key("held").digest, create=False) is None
    assert (collected.entries, collected.files, collected.size_bytes) == (1, 1, 6)
    assert os.listdir(store.tmp_dir) == []
    assert sorted(os.listdir(store.root / "locks")) == sorted([cache_key("held").digest, "gc"])
    assert names(store) == ["a"]


def test_unused_results_expire(store: Store) -> None:
    for name in ("old", "new", "used"):
        store.cache_result("kind", name, name)
    long_ago = time.time() - (maintenance.RESULT_MAX_AGE_DAYS + 1) * 86400
    for path in (store.root / "results").rglob("*"):
        if path.is_file() and path.read_bytes().endswith((b"old", b"used")):
            os.utime(path, (long_ago, long_ago))
    assert store.cached_result("kind", "used") == "used"
    maintenance.collect_garbage(store)
    assert [store.cached_result("kind", name) for name in ("old", "new", "used")] == [None, "new", "used"]


def test_cleared_cache_is_usable(store: Store, tmp_path: Path) -> None:
    put_build(store, tmp_path / "build", "a")
    store.cache_result("kind", "digest", "text")
    collected = maintenance.clear(store)
    assert (collected.entries, collected.files, collected.size_bytes) == (1, 2, 3700)
    assert maintenance.stats(store).size_bytes == maintenance.stats(store).entries == 0
    assert store.cached_result("kind", "digest") is None
    put_build(store, tmp_path / "build", "a")
    assert store.get(cache_key("a")) is not None


def test_stats_count_entries_files_and_bytes(store: Store, tmp_path: Path) -> None:
    for name in "ab":
        put_build(store, tmp_path / "build", name)
    stats = maintenance.stats(store)
    assert (stats.entries, stats.files, stats.size_bytes) == (2, 3, 6700)
    entry = maintenance.list_entries(store)[0]
    assert (entry.files, entry.size_bytes) == (2, 3700)
    assert abs(entry.last_used_at - time.time()) < 100


def test_maintenance_of_a_read_only_cache_is_refused(progress: RecordingProgress) -> None:
    with child_processes.unprivileged_folder() as folder:
        folder.chmod(0o500)
        store = Store(folder / "cache", progress=progress)
        for operation in (maintenance.collect_garbage, maintenance.clear):
            with pytest.raises(RyzenError, match="cannot be written"):
                operation(store)
        assert maintenance.list_entries(store) == ()


def test_hit_and_empty_cache_are_explained(store: Store, tmp_path: Path) -> None:
    assert maintenance.explain_lookup(store, cache_key("a")).message == "the cache has no package"
    put_build(store, tmp_path / "build", "a")
    set_last_use(store, "a", 1000)
    explanation = maintenance.explain_lookup(store, cache_key("a"))
    assert explanation.hit
    assert explanation.differences == ()
    assert store.entry_path(cache_key("a").digest).stat().st_mtime == 1000, "an explanation does not count as a use"
    next(path for path in (store.root / "blobs").rglob("*") if path.is_file()).unlink()
    assert not maintenance.explain_lookup(store, cache_key("a")).hit


def test_miss_is_explained_by_the_differences_from_the_nearest_entry(store: Store, tmp_path: Path) -> None:
    for name in "abc":
        put_build(store, tmp_path / "build", name)
    for index, name in enumerate("cab"):
        set_last_use(store, name, 1000 + index)
    key = CacheKey("package", {"graph model": "a", "targets": "sm89", "options": "x"})
    explanation = maintenance.explain_lookup(store, key)
    assert not explanation.hit
    assert explanation.nearest_key == cache_key("a").digest
    assert explanation.message == "the nearest cached build differs in `targets`, `options`"
    assert explanation.differences == (
        KeyDifference(part="targets", cached="sm86", current="sm89"),
        KeyDifference(part="options", cached=None, current="x"),
    )
    # Among equally near entries the most recently used one is reported.
    assert maintenance.explain_lookup(store, cache_key("z")).nearest_key == cache_key("b").digest


HOLD_SCRATCH = """
import pathlib, sys, time
from ryzen_compile.artifacts.cache.scratch import scratch_folder
with scratch_folder(pathlib.Path(sys.argv[1]), "weights.") as folder:
    (folder / "model.safetensors").write_bytes(b"weights")
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("operation", [maintenance.collect_garbage, maintenance.clear])
def test_scratch_folders_of_killed_processes_are_removed_and_held_ones_kept(
    store: Store, operation: Callable[[Store], object]
) -> None:
    parent = store.folder / "scratch"
    with child_processes.start(HOLD_SCRATCH, store.folder) as child:
        child_processes.expect_lines(child, "ready", 1)
        operation(store)
        assert [(folder / "model.safetensors").read_bytes() for folder in parent.iterdir()] == [b"weights"]
    operation(store)
    assert list(parent.iterdir()) == []


def test_scratch_folder_is_removed_at_the_end_of_its_block(tmp_path: Path) -> None:
    with scratch_folder(tmp_path / "cache", "weights.") as folder:
        (folder / "file").write_bytes(b"data")
        assert folder.is_relative_to(tmp_path / "cache")
    assert list(folder.parent.iterdir()) == []


def test_scratch_folder_in_a_read_only_cache_is_refused() -> None:
    with child_processes.unprivileged_folder() as folder:
        folder.chmod(0o500)
        for cache_folder in (folder, folder / "cache"):
            with (
                pytest.raises(RyzenError, match="cannot be written: Permission denied") as caught,
                scratch_folder(cache_folder, "x"),
            ):
                pass
            assert caught.value.hint == "set RYZEN_COMPILE_CACHE to another folder"
