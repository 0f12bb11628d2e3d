from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

import msgspec
import pytest
from support import child_processes
from support.cache_entries import RecordingProgress, cache_key, put_build, read_files, write_files

from ryzen_compile.artifacts.cache.checksummed_file import read_checksummed, write_checksummed
from ryzen_compile.artifacts.cache.store import DEFAULT_LIMIT_BYTES, CacheEntry, Store, default_folder, default_limit_bytes
from ryzen_compile.errors import UsageError
from ryzen_compile.utils.files import hash_file


def bytes_read() -> int:
    found = re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1])


def blobs(store: Store) -> list[Path]:
    return sorted(path for path in (store.root / "blobs").rglob("*") if path.is_file())


def flip(place: Path, at: int) -> None:
    data = bytearray(place.read_bytes())
    data[at] ^= 1
    place.write_bytes(data)


def test_what_was_kept_is_found_and_restored(store: Store, told: RecordingProgress, tmp_path: Path) -> None:
    assert store.get(cache_key("a")) is None
    contents = put_build(store, tmp_path / "made", "a")
    hit = store.get(cache_key("a"))
    assert hit is not None
    assert msgspec.json.decode(hit.payload) == {"name": "toy"}
    assert {file.path: file.sha256 for file in hit.files} == {
        path: hash_file(tmp_path / "made" / path, "sha256") for path in contents
    }
    assert store.restore(hit, tmp_path / "again")
    assert read_files(tmp_path / "again") == contents
    assert store.get(cache_key("b")) is None
    assert told.lines == []


def test_another_store_on_the_same_folder_finds_it_too(store: Store, tmp_path: Path) -> None:
    put_build(store, tmp_path / "made", "a")
    assert Store(store.folder).get(cache_key("a")) is not None


def test_a_restored_file_is_nobody_elses(store: Store, tmp_path: Path) -> None:
    put_build(store, tmp_path / "made", "a")
    for place in (tmp_path / "one", tmp_path / "two"):
        hit = store.get(cache_key("a"))
        assert hit is not None
        assert store.restore(hit, place)
        assert (place / "engines/m.plan").stat().st_nlink == 1
        assert (place / "engines/m.plan").read_bytes() == b"a" * 3000
        (place / "engines/m.plan").write_bytes(b"changed by its owner")


def test_who_writes_into_what_was_kept_spoils_nothing_unseen(store: Store, told: RecordingProgress, tmp_path: Path) -> None:
    contents = put_build(store, tmp_path / "made", "a")
    (tmp_path / "made" / "engines/m.plan").write_bytes(b"b" * 3000)
    hit = store.get(cache_key("a"))
    assert hit is not None
    if store.restore(hit, tmp_path / "again"):  # where blocks are shared until they are written to
        assert read_files(tmp_path / "again") == contents
    else:
        assert told.lines == ["the cache is damaged (a file is damaged): the build is done again"]
        assert read_files(tmp_path / "again") == {}


def test_a_cache_on_another_filesystem_holds_copies(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Path, destination: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source), None, str(destination))

    monkeypatch.setattr(os, "link", link)
    contents = put_build(store, tmp_path / "made", "a")
    (tmp_path / "made" / "engines/m.plan").write_bytes(b"changed by its owner")
    hit = store.get(cache_key("a"))
    assert hit is not None
    assert store.restore(hit, tmp_path / "again")
    assert read_files(tmp_path / "again") == contents


def test_equal_files_are_kept_once_and_not_read_again(store: Store, tmp_path: Path) -> None:
    size = 4_000_000
    contents = {"graphs/weights/w": bytes(size), "engines/m.plan": b"1"}
    digests = write_files(tmp_path / "made", contents)
    assert store.put(cache_key("a"), tmp_path / "made", digests, b"{}")
    before = bytes_read()
    assert store.put(cache_key("b"), tmp_path / "made", digests, b"{}")
    assert bytes_read() - before < size / 10
    assert len(blobs(store)) == 2


def test_a_build_that_differs_is_kept_in_place_of_the_earlier(store: Store, tmp_path: Path) -> None:
    for data in (b"one", b"two"):
        assert store.put(cache_key("a"), tmp_path, write_files(tmp_path, {"plan": data}), b"{}")
    hit = store.get(cache_key("a"))
    assert hit is not None
    assert store.restore(hit, tmp_path / "again")
    assert (tmp_path / "again" / "plan").read_bytes() == b"two"


def test_a_damaged_file_is_noticed_dropped_and_built_again(store: Store, told: RecordingProgress, tmp_path: Path) -> None:
    put_build(store, tmp_path / "made", "a")
    blob = max(blobs(store), key=lambda path: path.stat().st_size)
    flip(blob, 1500)
    hit = store.get(cache_key("a"))
    assert hit is not None
    assert not store.restore(hit, tmp_path / "again")
    assert read_files(tmp_path / "again") == {}
    assert told.lines == ["the cache is damaged (a file is damaged): the build is done again"]
    assert not blob.exists()
    assert store.get(cache_key("a")) is None
    contents = put_build(store, tmp_path / "made", "a")
    hit = store.get(cache_key("a"))
    assert hit is not None
    assert store.restore(hit, tmp_path / "again")
    assert read_files(tmp_path / "again") == contents


@pytest.mark.parametrize("spoil", [lambda blob: os.truncate(blob, 10), os.unlink])
def test_a_truncated_or_missing_file_is_a_miss(store: Store, tmp_path: Path, spoil: object) -> None:
    assert callable(spoil)
    put_build(store, tmp_path / "made", "a")
    hit = store.get(cache_key("a"))
    assert hit is not None
    spoil(blobs(store)[0])
    assert store.get(cache_key("a")) is None
    assert not store.restore(hit, tmp_path / "again")
    assert read_files(tmp_path / "again") == {}
    put_build(store, tmp_path / "made", "a")
    assert store.get(cache_key("a")) is not None


def test_an_entry_with_any_bit_changed_is_a_miss(store: Store, tmp_path: Path) -> None:
    put_build(store, tmp_path / "made", "a")
    place = store.entry_path(cache_key("a").digest)
    for at in [*range(70), *range(70, place.stat().st_size, 13)]:
        flip(place, at)
        assert store.get(cache_key("a")) is None, at
        flip(place, at)
    assert store.get(cache_key("a")) is not None
    for size in range(0, place.stat().st_size, 41):
        whole = place.read_bytes()
        os.truncate(place, size)
        assert store.get(cache_key("a")) is None
        place.write_bytes(whole)


def test_an_entry_under_another_key_is_a_miss(store: Store, tmp_path: Path) -> None:
    put_build(store, tmp_path / "made", "a")
    store.entry_path(cache_key("a").digest).rename(store.entry_path(cache_key("b").digest))
    assert store.get(cache_key("b")) is None


@pytest.mark.parametrize("path", ["/etc/x", "../x", "a/../../x"])
def test_an_entry_that_would_write_elsewhere_is_a_miss(store: Store, tmp_path: Path, path: str) -> None:
    put_build(store, tmp_path / "made", "a")
    entry = store.entry(cache_key("a").digest)
    assert entry is not None
    file = msgspec.structs.replace(entry.files[0], path=path)
    hostile = msgspec.structs.replace(entry, files=(file,))
    write_checksummed(store.entry_path(entry.key), msgspec.json.encode(hostile), tmp_dir=store.tmp_dir)
    assert store.get(cache_key("a")) is None


def test_an_entry_of_another_shape_is_a_miss(store: Store) -> None:
    for data in (b"", b"[]", b'{"key": 1}', b"\xff"):
        write_checksummed(store.entry_path(cache_key("a").digest), data, tmp_dir=store.tmp_dir)
        assert store.get(cache_key("a")) is None


def test_a_sealed_file_tells_when_it_is_damaged(tmp_path: Path) -> None:
    write_checksummed(tmp_path / "new" / "file", b"line\nline\n", tmp_dir=tmp_path)
    assert read_checksummed(tmp_path / "new" / "file") == b"line\nline\n"
    assert read_checksummed(tmp_path / "nothing") is None
    with pytest.raises(IsADirectoryError):
        write_checksummed(tmp_path / "new", b"", tmp_dir=tmp_path)
    assert os.listdir(tmp_path) == ["new"]


def test_memos_are_remembered_by_kind_and_digest(store: Store) -> None:
    assert store.cached_result("source", "abc") is None
    store.cache_result("source", "abc", "fingerprint é")
    assert store.cached_result("source", "abc") == "fingerprint é"
    assert store.cached_result("source", "abd") is None
    assert store.cached_result("other", "abc") is None
    memo = next(path for path in (store.root / "memos").rglob("*") if path.is_file())
    flip(memo, 70)
    assert store.cached_result("source", "abc") is None


def test_a_full_disk_does_not_fail_the_build(tmp_path: Path) -> None:
    code = """
import errno, os, resource, sys
from pathlib import Path
from support.cache_entries import Told, key, write
from ryzen_compile.artifacts.cache.store import Store
folder = Path(sys.argv[1])
told = Told()
store = Store(folder / "cache", progress=told)
digests = write(folder / "made", {"small": b"1", "large": bytes(500_000)})

def link(*_):
    raise OSError(errno.EXDEV, "the cache is on another disk")

os.link = link
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
print(store.put(key("a"), folder / "made", digests, b"{}"), store.get(key("a")), *told.lines)
"""
    printed = child_processes.run(code, tmp_path)
    assert re.fullmatch(r"False None not kept in the cache: `.*/cache`: File too large\n", printed)
    store = Store(tmp_path / "cache")
    assert os.listdir(store.tmp_dir) == []
    assert os.listdir(store.root / "entries") == []
    assert store.size_bytes() == 0


def test_a_full_disk_while_restoring_is_the_builds_trouble_and_not_the_caches(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
from support.cache_entries import Told, contents_of, key, write
from ryzen_compile.artifacts.cache.store import Store
folder = Path(sys.argv[1])
told = Told()
store = Store(folder / "cache", progress=told)
assert store.put(key("a"), folder / "made", write(folder / "made", {"small": b"1", "large": bytes(500_000)}), b"{}")
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    store.restore(store.get(key("a")), folder / "again")
except OSError as error:
    print(error.strerror, contents_of(folder / "again"), store.get(key("a")) is not None, told.lines)
"""
    assert child_processes.run(code, tmp_path) == "File too large {} True []\n"


def test_a_folder_that_cannot_be_restored_to_is_the_builds_trouble_too(
    store: Store, told: RecordingProgress, tmp_path: Path
) -> None:
    put_build(store, tmp_path / "made", "a")
    hit = store.get(cache_key("a"))
    assert hit is not None
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        store.restore(hit, tmp_path / "file" / "again")
    assert store.get(cache_key("a")) is not None
    assert told.lines == []


def test_a_build_larger_than_the_bound_is_not_kept(tmp_path: Path, told: RecordingProgress) -> None:
    store = Store(tmp_path / "cache", limit_bytes=1000, progress=told)
    assert not store.put(cache_key("a"), tmp_path, write_files(tmp_path, {"x": bytes(1001)}), b"{}")
    assert told.lines == ["not kept in the cache: 1001 bytes are more than its bound of 1000"]
    assert blobs(store) == []


def test_a_folder_that_can_only_be_read_still_gives_what_it_has(told: RecordingProgress) -> None:
    with child_processes.unprivileged_folder() as folder:
        put_build(Store(folder / "cache"), folder / "made", "a")
        for place in sorted((folder / "cache").rglob("*")) + [folder / "cache"]:
            if place.is_dir():
                place.chmod(0o500)
        store = Store(folder / "cache", progress=told)
        hit = store.get(cache_key("a"))
        assert hit is not None
        assert store.restore(hit, folder / "again")
        with store.lock(cache_key("b")):
            assert not store.put(cache_key("b"), folder / "made", {}, b"{}")
            store.cache_result("kind", "digest", "text")
        assert store.cached_result("kind", "digest") is None
        for place in [folder / "cache", *sorted((folder / "cache").rglob("*"))]:
            if place.is_dir():
                place.chmod(0o700)
    assert told.lines == [f"nothing new is kept in the cache: `{folder}/cache` cannot be written"]


def test_a_folder_that_cannot_be_made_is_told_and_does_without(tmp_path: Path, told: RecordingProgress) -> None:
    (tmp_path / "file").touch()
    store = Store(tmp_path / "file" / "cache", progress=told)
    with store.lock(cache_key("a")):
        assert store.get(cache_key("a")) is None
        assert not store.put(cache_key("a"), tmp_path, {}, b"{}")
    assert told.lines == [f"nothing new is kept in the cache: `{tmp_path}/file/cache`: Not a directory"]


def test_the_folder_is_the_users_own(store: Store, tmp_path: Path) -> None:
    put_build(store, tmp_path / "made", "a")
    for place in (store.folder, *store.folder.rglob("*")):
        if place.is_dir():
            assert stat.S_IMODE(place.stat().st_mode) == 0o700, place


def test_a_folder_that_everybody_can_write_is_not_used(store: Store, told: RecordingProgress, tmp_path: Path) -> None:
    put_build(store, tmp_path / "made", "a")
    store.folder.chmod(0o777)
    assert Store(store.folder, progress=told).get(cache_key("a")) is None
    assert told.lines == [
        f"the cache is not used: `{store.folder}` can be written by everybody; `chmod o-w` it",
    ]


def test_the_folder_of_another_user_is_not_used(
    store: Store, told: RecordingProgress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_build(store, tmp_path / "made", "a")
    if os.geteuid() == 0:
        os.chown(store.folder, 4242, -1)
    owner = store.folder.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert Store(store.folder, progress=told).get(cache_key("a")) is None
    assert told.lines == [f"the cache is not used: `{store.folder}` belongs to user {owner}, not to you"]


def test_the_folder_and_the_bound_can_be_set_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RYZEN_COMPILE_CACHE", str(tmp_path / "here"))
    monkeypatch.setenv("RYZEN_COMPILE_CACHE_GB", "0.5")
    store = Store()
    assert (store.folder, store.limit_bytes) == (tmp_path / "here", 500_000_000)
    assert Store(tmp_path / "there", limit_bytes=7).limit_bytes == 7
    monkeypatch.delenv("RYZEN_COMPILE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg" / "ryzen-compile"
    monkeypatch.delenv("RYZEN_COMPILE_CACHE_GB")
    assert default_limit_bytes() == DEFAULT_LIMIT_BYTES


@pytest.mark.parametrize("text", ["much", "-1", "nan", "inf", "1e400", "20GB"])
def test_a_bound_that_is_no_size_is_a_usage_error(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RYZEN_COMPILE_CACHE_GB", text)
    with pytest.raises(UsageError, match="RYZEN_COMPILE_CACHE_GB"):
        default_limit_bytes()


def test_the_layout_has_a_version_in_its_path(store: Store, tmp_path: Path) -> None:
    put_build(store, tmp_path / "made", "a")
    assert os.listdir(store.folder) == ["v1"]
    assert CacheEntry.__struct_fields__ == ("key", "parts", "files", "payload", "made_at"), "another shape needs another LAYOUT"


def test_what_is_kept_for_later_stays_within_the_bound(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache", limit_bytes=10_000)
    for at in range(6):
        digests = write_files(tmp_path / "made", {"w": bytes([at]) * 4_000})
        store.add_blobs(tmp_path / "made", digests)
        assert store.size_bytes() <= store.limit_bytes
    store.add_blobs(tmp_path / "made", write_files(tmp_path / "made", {"w": bytes(11_000)}))
    assert store.size_bytes() <= store.limit_bytes
    assert not store.put(cache_key("a"), tmp_path / "made", write_files(tmp_path / "made", {"w": bytes(11_000)}), b"{}")
    assert blobs(store) == []


def test_nothing_that_lies_where_files_are_restored_is_touched(store: Store, tmp_path: Path) -> None:
    put_build(store, tmp_path / "made", "a")
    write_files(tmp_path / "again", {"engines/m.plan": b"somebody else's"})
    hit = store.get(cache_key("a"))
    assert hit is not None
    with pytest.raises(FileExistsError):
        store.restore(hit, tmp_path / "again")
    assert (tmp_path / "again/engines/m.plan").read_bytes() == b"somebody else's"
