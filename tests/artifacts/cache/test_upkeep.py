from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from support import child_processes
from support.cache_entries import RecordingProgress, cache_key, put_build

from ryzen_compile.artifacts.cache import maintenance
from ryzen_compile.artifacts.cache.key import CacheKey, KeyDifference
from ryzen_compile.artifacts.cache.store import Store
from ryzen_compile.errors import RyzenError
from ryzen_compile.utils import file_lock


def use(store: Store, name: str, seconds: float) -> None:
    """Set when the entry of `name` was last used."""
    os.utime(store.entry_path(cache_key(name).digest), (seconds, seconds))


def names(store: Store) -> list[str]:
    return [one.parts["graph model"] for one in maintenance.list_entries(store)]


def test_what_was_not_used_for_longest_goes_first(store: Store, tmp_path: Path) -> None:
    for at, name in enumerate("abcd"):
        put_build(store, tmp_path / "made", name)
        use(store, name, 1000 + at)
    assert store.get(cache_key("a")) is not None  # is a use, and makes it the latest
    assert names(store) == ["a", "d", "c", "b"]
    collected = maintenance.collect_garbage(store, limit_bytes=2 * 3000 + 700)
    assert names(store) == ["a", "d"]
    assert (collected.entries, collected.files, collected.size_bytes) == (2, 2, 6000)
    hit = store.get(cache_key("a"))
    assert hit is not None
    assert store.restore(hit, tmp_path / "again")


def test_keeping_more_than_the_bound_lets_go_of_the_oldest(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache", limit_bytes=3 * 3000 + 700)
    for at, name in enumerate("abcdef"):
        put_build(store, tmp_path / "made", name)
        use(store, name, 1000 + at)
        assert store.size_bytes() <= store.limit_bytes
    assert names(store) == ["f", "e", "d"]


def test_a_file_that_two_entries_name_stays_with_the_second(store: Store, tmp_path: Path) -> None:
    for name in "ab":
        put_build(store, tmp_path / "made", name)
    use(store, "a", 1000)
    maintenance.collect_garbage(store, limit_bytes=3700)
    assert names(store) == ["b"]
    hit = store.get(cache_key("b"))
    assert hit is not None
    assert store.restore(hit, tmp_path / "again")


def test_nothing_is_collected_under_the_hands_of_who_restores(store: Store, told: RecordingProgress, tmp_path: Path) -> None:
    put_build(store, tmp_path / "made", "a")
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
    assert told.lines == ["waiting for who uses the cache"]


def test_what_dead_builders_left_goes_and_what_living_ones_use_stays(store: Store, tmp_path: Path) -> None:
    put_build(store, tmp_path / "made", "a")
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


def test_memos_that_nobody_asks_for_are_forgotten(store: Store) -> None:
    for name in ("old", "new", "asked"):
        store.cache_result("kind", name, name)
    long_ago = time.time() - (maintenance.RESULT_MAX_AGE_DAYS + 1) * 86400
    for path in (store.root / "memos").rglob("*"):
        if path.is_file() and path.read_bytes().endswith((b"old", b"asked")):
            os.utime(path, (long_ago, long_ago))
    assert store.cached_result("kind", "asked") == "asked"
    maintenance.collect_garbage(store)
    assert [store.cached_result("kind", name) for name in ("old", "new", "asked")] == [None, "new", "asked"]


def test_clearing_leaves_a_cache_that_works(store: Store, tmp_path: Path) -> None:
    put_build(store, tmp_path / "made", "a")
    store.cache_result("kind", "digest", "text")
    collected = maintenance.clear(store)
    assert (collected.entries, collected.files, collected.size_bytes) == (1, 2, 3700)
    assert maintenance.stats(store).size_bytes == maintenance.stats(store).entries == 0
    assert store.cached_result("kind", "digest") is None
    put_build(store, tmp_path / "made", "a")
    assert store.get(cache_key("a")) is not None


def test_the_cache_is_told_in_numbers(store: Store, tmp_path: Path) -> None:
    for name in "ab":
        put_build(store, tmp_path / "made", name)
    found = maintenance.stats(store)
    assert (found.entries, found.files, found.size_bytes) == (2, 3, 6700)
    listed = maintenance.list_entries(store)[0]
    assert (listed.files, listed.size_bytes) == (2, 3700)
    assert abs(listed.last_used_at - time.time()) < 100


def test_a_cache_that_cannot_be_written_is_not_looked_after(told: RecordingProgress) -> None:
    with child_processes.unprivileged_folder() as folder:
        folder.chmod(0o500)
        store = Store(folder / "cache", progress=told)
        for verb in (maintenance.collect_garbage, maintenance.clear):
            with pytest.raises(RyzenError, match="cannot be written"):
                verb(store)
        assert maintenance.list_entries(store) == ()


def test_a_hit_and_an_empty_cache_are_explained(store: Store, tmp_path: Path) -> None:
    assert maintenance.explain_lookup(store, cache_key("a")).message == "the cache is empty"
    put_build(store, tmp_path / "made", "a")
    use(store, "a", 1000)
    found = maintenance.explain_lookup(store, cache_key("a"))
    assert found.hit
    assert found.differences == ()
    assert store.entry_path(cache_key("a").digest).stat().st_mtime == 1000, "explaining is no use"
    next(path for path in (store.root / "blobs").rglob("*") if path.is_file()).unlink()
    assert not maintenance.explain_lookup(store, cache_key("a")).hit


def test_a_miss_is_explained_by_the_parts_that_differ_from_the_nearest_build(store: Store, tmp_path: Path) -> None:
    for name in "abc":
        put_build(store, tmp_path / "made", name)
    for at, name in enumerate("cab"):
        use(store, name, 1000 + at)
    asked = CacheKey({"graph model": "a", "targets": "sm89", "options": "x"})
    found = maintenance.explain_lookup(store, asked)
    assert not found.hit
    assert found.nearest_key == cache_key("a").digest
    assert found.message == "the nearest earlier build differs in `targets`, `options`"
    assert found.differences == (
        KeyDifference(part="targets", cached="sm86", current="sm89"),
        KeyDifference(part="options", cached=None, current="x"),
    )
    # Of equally near ones the latest used.
    assert maintenance.explain_lookup(store, cache_key("z")).nearest_key == cache_key("b").digest
