from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from support import child_processes
from support.cache_entries import Told, keep, key

from ryzen_compile.artifacts.cache import maintenance
from ryzen_compile.artifacts.cache.key import Difference, Key
from ryzen_compile.artifacts.cache.store import Store
from ryzen_compile.errors import RyzenError
from ryzen_compile.utils import file_lock


def use(store: Store, name: str, seconds: float) -> None:
    """Set when the entry of `name` was last used."""
    os.utime(store.entry_path(key(name).digest), (seconds, seconds))


def names(store: Store) -> list[str]:
    return [one.parts["graph model"] for one in maintenance.listing(store)]


def test_what_was_not_used_for_longest_goes_first(store: Store, tmp_path: Path) -> None:
    for at, name in enumerate("abcd"):
        keep(store, tmp_path / "made", name)
        use(store, name, 1000 + at)
    assert store.get(key("a")) is not None  # is a use, and makes it the latest
    assert names(store) == ["a", "d", "c", "b"]
    collected = maintenance.collect(store, limit_bytes=2 * 3000 + 700)
    assert names(store) == ["a", "d"]
    assert (collected.entries, collected.files, collected.size_bytes) == (2, 2, 6000)
    hit = store.get(key("a"))
    assert hit is not None
    assert store.restore(hit, tmp_path / "again")


def test_keeping_more_than_the_bound_lets_go_of_the_oldest(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache", limit_bytes=3 * 3000 + 700)
    for at, name in enumerate("abcdef"):
        keep(store, tmp_path / "made", name)
        use(store, name, 1000 + at)
        assert store.size_bytes() <= store.limit_bytes
    assert names(store) == ["f", "e", "d"]


def test_a_file_that_two_entries_name_stays_with_the_second(store: Store, tmp_path: Path) -> None:
    for name in "ab":
        keep(store, tmp_path / "made", name)
    use(store, "a", 1000)
    maintenance.collect(store, limit_bytes=3700)
    assert names(store) == ["b"]
    hit = store.get(key("b"))
    assert hit is not None
    assert store.restore(hit, tmp_path / "again")


def test_nothing_is_collected_under_the_hands_of_who_restores(store: Store, told: Told, tmp_path: Path) -> None:
    keep(store, tmp_path / "made", "a")
    done = threading.Event()
    collector = threading.Thread(target=lambda: (maintenance.clear(store), done.set()))
    with store.sharing():
        assert maintenance.collect(store, limit_bytes=0, wait=False).busy
        collector.start()
        assert not done.wait(0.3)
        assert store.get(key("a")) is not None
    collector.join(10)
    assert done.is_set()
    assert store.get(key("a")) is None
    assert told.lines == ["waiting for who uses the cache"]


def test_what_dead_builders_left_goes_and_what_living_ones_use_stays(store: Store, tmp_path: Path) -> None:
    keep(store, tmp_path / "made", "a")
    (store.parts / "half").write_bytes(b"half")
    orphan = store.root / "blobs" / "00" / ("0" * 64)
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b"orphan")
    (store.root / "entries" / ("e" * 64)).write_bytes(b"garbage")
    (store.root / "locks" / ("d" * 64)).touch()
    with store.lock(key("held")):
        collected = maintenance.collect(store)
        assert file_lock.attempt(store.root / "locks" / key("held").digest, create=False) is None
    assert (collected.entries, collected.files, collected.size_bytes) == (1, 1, 6)
    assert os.listdir(store.parts) == []
    assert sorted(os.listdir(store.root / "locks")) == sorted([key("held").digest, "gc"])
    assert names(store) == ["a"]


def test_memos_that_nobody_asks_for_are_forgotten(store: Store) -> None:
    for name in ("old", "new", "asked"):
        store.memoize("kind", name, name)
    long_ago = time.time() - (maintenance.MEMO_DAYS + 1) * 86400
    for path in (store.root / "memos").rglob("*"):
        if path.is_file() and path.read_bytes().endswith((b"old", b"asked")):
            os.utime(path, (long_ago, long_ago))
    assert store.memo("kind", "asked") == "asked"
    maintenance.collect(store)
    assert [store.memo("kind", name) for name in ("old", "new", "asked")] == [None, "new", "asked"]


def test_clearing_leaves_a_cache_that_works(store: Store, tmp_path: Path) -> None:
    keep(store, tmp_path / "made", "a")
    store.memoize("kind", "digest", "text")
    collected = maintenance.clear(store)
    assert (collected.entries, collected.files, collected.size_bytes) == (1, 2, 3700)
    assert maintenance.stats(store).size_bytes == maintenance.stats(store).entries == 0
    assert store.memo("kind", "digest") is None
    keep(store, tmp_path / "made", "a")
    assert store.get(key("a")) is not None


def test_the_cache_is_told_in_numbers(store: Store, tmp_path: Path) -> None:
    for name in "ab":
        keep(store, tmp_path / "made", name)
    found = maintenance.stats(store)
    assert (found.entries, found.files, found.size_bytes) == (2, 3, 6700)
    listed = maintenance.listing(store)[0]
    assert (listed.files, listed.size_bytes) == (2, 3700)
    assert abs(listed.used_at - time.time()) < 100


def test_a_cache_that_cannot_be_written_is_not_looked_after(told: Told) -> None:
    with child_processes.without_privileges() as folder:
        folder.chmod(0o500)
        store = Store(folder / "cache", progress=told)
        for verb in (maintenance.collect, maintenance.clear):
            with pytest.raises(RyzenError, match="cannot be written"):
                verb(store)
        assert maintenance.listing(store) == ()


def test_a_hit_and_an_empty_cache_are_explained(store: Store, tmp_path: Path) -> None:
    assert maintenance.explain(store, key("a")).says == "the cache is empty"
    keep(store, tmp_path / "made", "a")
    use(store, "a", 1000)
    found = maintenance.explain(store, key("a"))
    assert found.hit
    assert found.differences == ()
    assert store.entry_path(key("a").digest).stat().st_mtime == 1000, "explaining is no use"
    next(path for path in (store.root / "blobs").rglob("*") if path.is_file()).unlink()
    assert not maintenance.explain(store, key("a")).hit


def test_a_miss_is_explained_by_the_parts_that_differ_from_the_nearest_build(store: Store, tmp_path: Path) -> None:
    for name in "abc":
        keep(store, tmp_path / "made", name)
    for at, name in enumerate("cab"):
        use(store, name, 1000 + at)
    asked = Key({"graph model": "a", "targets": "sm89", "options": "x"})
    found = maintenance.explain(store, asked)
    assert not found.hit
    assert found.nearest == key("a").digest
    assert found.says == "the nearest earlier build differs in `targets`, `options`"
    assert found.differences == (
        Difference(part="targets", was="sm86", now="sm89"),
        Difference(part="options", was=None, now="x"),
    )
    # Of equally near ones the latest used.
    assert maintenance.explain(store, key("z")).nearest == key("b").digest
