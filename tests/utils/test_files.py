"""Hashing, copying and linking of files."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import blake3
import pytest
from support import child_processes

from ryzen_compile.utils import files
from ryzen_compile.utils.files import (
    CHUNK_BYTES,
    Algorithm,
    copy_and_hash,
    copy_hashed,
    hash_file,
    is_disk_full,
    link_hashed,
    parallel_map,
    quoted_path,
)

SIZES = [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 7]


@pytest.mark.parametrize("size", SIZES)
def test_the_digest_of_a_file_is_that_of_its_bytes(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "a").write_bytes(data)
    assert hash_file(tmp_path / "a", "sha256") == hashlib.sha256(data).hexdigest()
    assert hash_file(tmp_path / "a", "blake3") == blake3.blake3(data).hexdigest()


@pytest.mark.parametrize("size", SIZES)
def test_a_copy_has_the_bytes_and_the_digest_of_its_source(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "a").write_bytes(data)
    assert copy_hashed(tmp_path / "a", tmp_path / "b", "blake3") == blake3.blake3(data).hexdigest()
    assert (tmp_path / "b").read_bytes() == data


@pytest.mark.parametrize("size", SIZES)
def test_a_copy_with_direct_io_has_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(files, "DIRECT_IO_MIN_BYTES", 0)
    data = os.urandom(size)
    (tmp_path / "a").write_bytes(data)
    assert copy_hashed(tmp_path / "a", tmp_path / "b", "sha256") == hashlib.sha256(data).hexdigest()
    assert (tmp_path / "b").read_bytes() == data


def test_a_copy_with_direct_io_reports_write_errors(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(files.DIRECT_IO_MIN_BYTES + 1))
    code = """
import resource, signal, sys
from pathlib import Path
from ryzen_compile.utils.files import copy_hashed
resource.setrlimit(resource.RLIMIT_FSIZE, (5 << 20, 5 << 20))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    copy_hashed(Path(sys.argv[1], "a"), Path(sys.argv[1], "b"), "sha256")
except OSError as error:
    print(error.strerror)
"""
    assert child_processes.run(code, tmp_path) == "File too large\n"


def test_a_copy_is_independent_of_its_source(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"before")
    copy_hashed(tmp_path / "a", tmp_path / "b", "blake3")
    (tmp_path / "b").write_bytes(b"after")
    assert (tmp_path / "a").read_bytes() == b"before"


@pytest.mark.parametrize("size", SIZES)
def test_a_linked_file_has_the_bytes_and_the_digest_of_its_source(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "a").write_bytes(data)
    assert link_hashed(tmp_path / "a", tmp_path / "b", "blake3") == blake3.blake3(data).hexdigest()
    os.unlink(tmp_path / "a")
    assert (tmp_path / "b").read_bytes() == data


@pytest.mark.parametrize("transfer", [copy_hashed, link_hashed])
def test_an_existing_file_is_never_overwritten(tmp_path: Path, transfer: Callable[[Path, Path, Algorithm], str]) -> None:
    (tmp_path / "a").write_bytes(b"new")
    (tmp_path / "b").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        transfer(tmp_path / "a", tmp_path / "b", "blake3")
    assert (tmp_path / "b").read_bytes() == b"old"


@pytest.mark.parametrize("limit", [0, 5, CHUNK_BYTES, CHUNK_BYTES + 3])
def test_a_copy_is_limited_to_max_bytes(tmp_path: Path, limit: int) -> None:
    data = os.urandom(2 * CHUNK_BYTES)
    (tmp_path / "a").write_bytes(data)
    with open(tmp_path / "a", "rb", buffering=0) as source, open(tmp_path / "b", "wb", buffering=0) as destination:
        assert copy_and_hash(source, destination, "sha256", max_bytes=limit) == (
            hashlib.sha256(data[:limit]).hexdigest(),
            limit,
        )
        assert source.tell() == limit
    assert (tmp_path / "b").read_bytes() == data[:limit]


def test_parallel_map_uses_two_threads_and_returns_results_in_order() -> None:
    both = threading.Barrier(2, timeout=10)

    def meet(item: int) -> int:
        both.wait()
        return -item

    assert parallel_map(meet, range(4)) == [0, -1, -2, -3]


def test_the_first_error_cancels_the_remaining_calls() -> None:
    started = []

    def fail(item: int) -> None:
        started.append(item)
        raise OSError(item, "no")

    with pytest.raises(OSError, match="no"):
        parallel_map(fail, range(1000))
    assert len(started) < 1000


def test_a_full_disk_is_distinguished_from_other_errors() -> None:
    with pytest.raises(OSError, match="No space left") as caught, open("/dev/full", "wb", buffering=0) as full:
        full.write(b"x")
    assert is_disk_full(caught.value)
    assert not is_disk_full(FileNotFoundError(2, "no such file"))


def test_a_path_is_displayed_on_one_line() -> None:
    assert quoted_path(Path("a b/é\nc\x1b[31m")) == r"`a b/é\nc\x1b[31m`"
    assert quoted_path(os.fsdecode(b"\xff")) == r"`\udcff`"
