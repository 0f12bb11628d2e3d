"""Tests of the cache store: lookup, restoring, damage, limits and unusable folders."""

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
    match = re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text(encoding="ascii"))
    assert match is not None
    return int(match[1])


def blobs(store: Store) -> list[Path]:
    return sorted(path for path in (store.root / "blobs").rglob("*") if path.is_file())


def flip_bit(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_stored_build_is_found_and_restored(store: Store, progress: RecordingProgress, tmp_path: Path) -> None:
    assert store.get(cache_key("a")) is None
    contents = put_build(store, tmp_path / "build", "a")
    hit = store.get(cache_key("a"))
    assert hit is not None
    assert msgspec.json.decode(hit.payload) == {"name": "toy"}
    assert {file.name: file.sha256 for file in hit.files} == {
        path: hash_file(tmp_path / "build" / path, "sha256") for path in contents
    }
    assert store.restore(hit, tmp_path / "again")
    assert read_files(tmp_path / "again") == contents
    assert store.get(cache_key("b")) is None
    assert progress.lines == []


def test_another_store_on_the_same_folder_finds_the_build(store: Store, tmp_path: Path) -> None:
    put_build(store, tmp_path / "build", "a")
    assert Store(store.folder).get(cache_key("a")) is not None


def test_restored_files_are_independent_copies(store: Store, tmp_path: Path) -> None:
    put_build(store, tmp_path / "build", "a")
    for folder in (tmp_path / "one", tmp_path / "two"):
        hit = store.get(cache_key("a"))
        assert hit is not None
        assert store.restore(hit, folder)
        assert (folder / "engines/m.plan").stat().st_nlink == 1
        assert (folder / "engines/m.plan").read_bytes() == b"a" * 3000
        (folder / "engines/m.plan").write_bytes(b"changed")


def test_write_to_a_file_of_a_package_does_not_damage_the_cache(store: Store, tmp_path: Path) -> None:
    contents = put_build(store, tmp_path / "build", "a")
    (tmp_path / "build" / "engines/m.plan").write_bytes(b"b" * 3000)
    hit = store.get(cache_key("a"))
    assert hit is not None
    assert store.restore(hit, tmp_path / "again")
    assert read_files(tmp_path / "again") == contents


def test_write_to_a_linked_file_is_detected_as_damage(
    store: Store, progress: RecordingProgress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RYZEN_COMPILE_CACHE_LINKS", "1")
    contents = put_build(store, tmp_path / "build", "a")
    (tmp_path / "build" / "engines/m.plan").write_bytes(b"b" * 3000)
    hit = store.get(cache_key("a"))
    assert hit is not None
    if store.restore(hit, tmp_path / "again"):  # the filesystem shares blocks by copy-on-write
        assert read_files(tmp_path / "again") == contents
    else:
        assert progress.lines == ["cache entry damaged (a file is damaged): building again"]
        assert read_files(tmp_path / "again") == {}


def test_cache_on_another_filesystem_holds_copies(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Path, destination: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source), None, str(destination))

    monkeypatch.setattr(os, "link", link)
    contents = put_build(store, tmp_path / "build", "a")
    (tmp_path / "build" / "engines/m.plan").write_bytes(b"changed")
    hit = store.get(cache_key("a"))
    assert hit is not None
    assert store.restore(hit, tmp_path / "again")
    assert read_files(tmp_path / "again") == contents


def test_equal_files_are_stored_once_and_not_read_again(store: Store, tmp_path: Path) -> None:
    size = 4_000_000
    contents = {"graphs/weights/w": bytes(size), "engines/m.plan": b"1"}
    digests = write_files(tmp_path / "build", contents)
    assert store.put(cache_key("a"), tmp_path / "build", digests, b"{}")
    before = bytes_read()
    assert store.put(cache_key("b"), tmp_path / "build", digests, b"{}")
    assert bytes_read() - before < size / 10
    assert len(blobs(store)) == 2


def test_second_build_of_a_key_replaces_the_first(store: Store, tmp_path: Path) -> None:
    for data in (b"one", b"two"):
        assert store.put(cache_key("a"), tmp_path, write_files(tmp_path, {"plan": data}), b"{}")
    hit = store.get(cache_key("a"))
    assert hit is not None
    assert store.restore(hit, tmp_path / "again")
    assert (tmp_path / "again" / "plan").read_bytes() == b"two"


def test_damaged_file_is_detected_and_removed(store: Store, progress: RecordingProgress, tmp_path: Path) -> None:
    put_build(store, tmp_path / "build", "a")
    blob = max(blobs(store), key=lambda path: path.stat().st_size)
    flip_bit(blob, 1500)
    hit = store.get(cache_key("a"))
    assert hit is not None
    assert not store.restore(hit, tmp_path / "again")
    assert read_files(tmp_path / "again") == {}
    assert progress.lines == ["cache entry damaged (a file is damaged): building again"]
    assert not blob.exists()
    assert store.get(cache_key("a")) is None
    contents = put_build(store, tmp_path / "build", "a")
    hit = store.get(cache_key("a"))
    assert hit is not None
    assert store.restore(hit, tmp_path / "again")
    assert read_files(tmp_path / "again") == contents


@pytest.mark.parametrize("damage", [lambda blob: os.truncate(blob, 10), os.unlink])
def test_truncated_or_missing_file_is_a_miss(store: Store, tmp_path: Path, damage: object) -> None:
    assert callable(damage)
    put_build(store, tmp_path / "build", "a")
    hit = store.get(cache_key("a"))
    assert hit is not None
    damage(blobs(store)[0])
    assert store.get(cache_key("a")) is None
    assert not store.restore(hit, tmp_path / "again")
    assert read_files(tmp_path / "again") == {}
    put_build(store, tmp_path / "build", "a")
    assert store.get(cache_key("a")) is not None


def test_damaged_entry_is_a_miss(store: Store, tmp_path: Path) -> None:
    put_build(store, tmp_path / "build", "a")
    path = store.entry_path(cache_key("a").digest)
    for offset in [*range(70), *range(70, path.stat().st_size, 13)]:
        flip_bit(path, offset)
        assert store.get(cache_key("a")) is None, offset
        flip_bit(path, offset)
    assert store.get(cache_key("a")) is not None
    for size in range(0, path.stat().st_size, 41):
        content = path.read_bytes()
        os.truncate(path, size)
        assert store.get(cache_key("a")) is None
        path.write_bytes(content)


def test_entry_under_another_key_is_a_miss(store: Store, tmp_path: Path) -> None:
    put_build(store, tmp_path / "build", "a")
    store.entry_path(cache_key("a").digest).rename(store.entry_path(cache_key("b").digest))
    assert store.get(cache_key("b")) is None


@pytest.mark.parametrize("path", ["/etc/x", "../x", "a/../../x"])
def test_entry_with_a_path_outside_the_folder_is_a_miss(store: Store, tmp_path: Path, path: str) -> None:
    put_build(store, tmp_path / "build", "a")
    entry = store.entry(cache_key("a").digest)
    assert entry is not None
    file = msgspec.structs.replace(entry.files[0], name=path)
    malicious = msgspec.structs.replace(entry, files=(file,))
    write_checksummed(store.entry_path(entry.key), msgspec.json.encode(malicious), tmp_dir=store.tmp_dir)
    assert store.get(cache_key("a")) is None


def test_entry_with_another_structure_is_a_miss(store: Store) -> None:
    for data in (b"", b"[]", b'{"key": 1}', b"\xff"):
        write_checksummed(store.entry_path(cache_key("a").digest), data, tmp_dir=store.tmp_dir)
        assert store.get(cache_key("a")) is None


def test_checksummed_file_is_written_atomically_and_read(tmp_path: Path) -> None:
    write_checksummed(tmp_path / "new" / "file", b"line\nline\n", tmp_dir=tmp_path)
    assert read_checksummed(tmp_path / "new" / "file") == b"line\nline\n"
    assert read_checksummed(tmp_path / "nothing") is None
    with pytest.raises(IsADirectoryError):
        write_checksummed(tmp_path / "new", b"", tmp_dir=tmp_path)
    assert os.listdir(tmp_path) == ["new"]


def test_results_are_stored_by_kind_and_digest(store: Store) -> None:
    assert store.cached_result("source", "abc") is None
    store.cache_result("source", "abc", "fingerprint é")
    assert store.cached_result("source", "abc") == "fingerprint é"
    assert store.cached_result("source", "abd") is None
    assert store.cached_result("other", "abc") is None
    result_path = next(path for path in (store.root / "results").rglob("*") if path.is_file())
    flip_bit(result_path, 70)
    assert store.cached_result("source", "abc") is None


LARGE_BUILD = """
import os, resource, sys
from pathlib import Path
from support.cache_entries import RecordingProgress, cache_key, read_files, write_files
from ryzen_compile.artifacts.cache.store import Store
folder = Path(sys.argv[1])
progress = RecordingProgress()
store = Store(folder / "cache", progress=progress)
digests = write_files(folder / "build", {"small": b"1", "large": bytes(500_000)})
"""
"""Code of a child process that has a build with a large file, and a store for it."""


def test_full_disk_while_storing_does_not_fail_the_build(tmp_path: Path) -> None:
    code = """
import errno

def link(*_):
    raise OSError(errno.EXDEV, "the cache is on another disk")

os.link = link
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
print(store.put(cache_key("a"), folder / "build", digests, b"{}"), store.get(cache_key("a")), *progress.lines)
"""
    output = child_processes.run(LARGE_BUILD + code, tmp_path)
    assert re.fullmatch(r"False None build not cached in `.*/cache`: File too large\n", output)
    store = Store(tmp_path / "cache")
    assert os.listdir(store.tmp_dir) == []
    assert os.listdir(store.root / "entries") == []
    assert store.size_bytes() == 0


def test_full_disk_while_restoring_raises_and_keeps_the_entry(tmp_path: Path) -> None:
    code = """
assert store.put(cache_key("a"), folder / "build", digests, b"{}")
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    store.restore(store.get(cache_key("a")), folder / "again")
except OSError as error:
    print(error.strerror, read_files(folder / "again"), store.get(cache_key("a")) is not None, progress.lines)
"""
    assert child_processes.run(LARGE_BUILD + code, tmp_path) == "File too large {} True []\n"


def test_unwritable_destination_raises_and_keeps_the_entry(store: Store, progress: RecordingProgress, tmp_path: Path) -> None:
    put_build(store, tmp_path / "build", "a")
    hit = store.get(cache_key("a"))
    assert hit is not None
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        store.restore(hit, tmp_path / "file" / "again")
    assert store.get(cache_key("a")) is not None
    assert progress.lines == []


def test_build_larger_than_the_limit_is_not_stored(tmp_path: Path, progress: RecordingProgress) -> None:
    store = Store(tmp_path / "cache", limit_bytes=1000, progress=progress)
    assert not store.put(cache_key("a"), tmp_path, write_files(tmp_path, {"x": bytes(1001)}), b"{}")
    assert progress.lines == ["build not cached: 1001 bytes exceed the cache limit of 1000 bytes"]
    assert blobs(store) == []


def test_read_only_cache_folder_still_has_hits(progress: RecordingProgress) -> None:
    with child_processes.unprivileged_folder() as folder:
        put_build(Store(folder / "cache"), folder / "build", "a")
        for path in sorted((folder / "cache").rglob("*")) + [folder / "cache"]:
            if path.is_dir():
                path.chmod(0o500)
        store = Store(folder / "cache", progress=progress)
        hit = store.get(cache_key("a"))
        assert hit is not None
        assert store.restore(hit, folder / "again")
        with store.lock(cache_key("b")):
            assert not store.put(cache_key("b"), folder / "build", {}, b"{}")
            store.cache_result("kind", "digest", "text")
        assert store.cached_result("kind", "digest") is None
        for path in [folder / "cache", *sorted((folder / "cache").rglob("*"))]:
            if path.is_dir():
                path.chmod(0o700)
    assert progress.lines == [f"new builds are not cached: `{folder}/cache` cannot be written"]


def test_folder_that_cannot_be_created_is_reported_and_all_lookups_miss(tmp_path: Path, progress: RecordingProgress) -> None:
    (tmp_path / "file").touch()
    store = Store(tmp_path / "file" / "cache", progress=progress)
    with store.lock(cache_key("a")):
        assert store.get(cache_key("a")) is None
        assert not store.put(cache_key("a"), tmp_path, {}, b"{}")
    assert progress.lines == [f"new builds are not cached: `{tmp_path}/file/cache`: Not a directory"]


def test_folders_are_accessible_only_by_the_user(store: Store, tmp_path: Path) -> None:
    put_build(store, tmp_path / "build", "a")
    for path in (store.folder, *store.folder.rglob("*")):
        if path.is_dir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o700, path


def test_world_writable_folder_is_not_used(store: Store, progress: RecordingProgress, tmp_path: Path) -> None:
    put_build(store, tmp_path / "build", "a")
    store.folder.chmod(0o777)
    assert Store(store.folder, progress=progress).get(cache_key("a")) is None
    assert progress.lines == [
        f"cache disabled: `{store.folder}` is writable by all users: run `chmod o-w` on it",
    ]


def test_folder_of_another_user_is_not_used(
    store: Store, progress: RecordingProgress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_build(store, tmp_path / "build", "a")
    if os.geteuid() == 0:
        os.chown(store.folder, 4242, -1)
    owner = store.folder.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert Store(store.folder, progress=progress).get(cache_key("a")) is None
    assert progress.lines == [f"cache disabled: `{store.folder}` is owned by user {owner}, not by the current user"]


def test_folder_and_limit_are_configured_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_invalid_limit_is_a_usage_error(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RYZEN_COMPILE_CACHE_GB", text)
    with pytest.raises(UsageError, match=f"RYZEN_COMPILE_CACHE_GB must be a number of gigabytes of at least 0 .got `{text}`."):
        default_limit_bytes()


def test_layout_version_is_part_of_the_path(store: Store, tmp_path: Path) -> None:
    put_build(store, tmp_path / "build", "a")
    assert os.listdir(store.folder) == ["v2"]
    fields = ("key", "kind", "parts", "files", "payload", "created_at")
    assert CacheEntry.__struct_fields__ == fields, "another structure needs another LAYOUT_VERSION"


def test_files_may_have_other_paths_than_names(store: Store, tmp_path: Path) -> None:
    sha256 = write_files(tmp_path / "build", {"engines/a.plan": b"engine"})["engines/a.plan"]
    assert store.put(cache_key("a"), tmp_path / "build", {"engine": sha256}, b"{}", path_of=lambda name: "engines/a.plan")
    hit = store.get(cache_key("a"))
    assert hit is not None
    assert store.restore(hit, tmp_path / "again", path_of=lambda name: f"other/{name}.plan")
    assert read_files(tmp_path / "again") == {"other/engine.plan": b"engine"}


def test_restore_does_not_overwrite_existing_files(store: Store, tmp_path: Path) -> None:
    put_build(store, tmp_path / "build", "a")
    write_files(tmp_path / "again", {"engines/m.plan": b"existing"})
    hit = store.get(cache_key("a"))
    assert hit is not None
    with pytest.raises(FileExistsError):
        store.restore(hit, tmp_path / "again")
    assert (tmp_path / "again/engines/m.plan").read_bytes() == b"existing"
