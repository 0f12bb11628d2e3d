"""Atomic file writes: readers, failures and killed writers."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from support import child_processes

from ryzen_compile.utils.atomic_file import atomic_path, temporary_name, write_atomic

NAMES = ["plain", "with space", "ünïcode", "new\nline", ".hidden", "x" * 255, "é" * 127]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_any_name_is_replaced_without_leftovers(tmp_path: Path, name: str) -> None:
    write_atomic(tmp_path / name, b"one")
    write_atomic(tmp_path / name, b"two")
    assert (tmp_path / name).read_bytes() == b"two"
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    write_atomic(tmp_path / "a", b"old")

    def fail() -> None:
        with atomic_path(tmp_path / "a") as temporary:
            temporary.write_bytes(b"new")
            raise error

    with pytest.raises(error):
        fail()
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_new_file_has_default_permissions(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", b"")
    (tmp_path / "b").write_bytes(b"")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_temporary_file_in_use_is_not_removed(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a") as slow:
        slow.write_bytes(b"slow")
        write_atomic(tmp_path / "a", b"fast")
        assert slow.read_bytes() == b"slow"
    assert (tmp_path / "a").read_bytes() == b"slow"


def test_temporary_files_of_other_paths_and_folders_are_not_removed(tmp_path: Path) -> None:
    (tmp_path / temporary_name(tmp_path / "b")).write_bytes(b"stale, but of another path")
    (tmp_path / temporary_name(tmp_path / "a")).mkdir()
    before = set(os.listdir(tmp_path))
    write_atomic(tmp_path / "a", b"")
    assert set(os.listdir(tmp_path)) == before | {"a"}


WRITER = """
import sys
from pathlib import Path
from ryzen_compile.utils.atomic_file import write_atomic
while True:
    for byte in b"ab":
        print("round", flush=True)
        write_atomic(Path(sys.argv[1]), bytes([byte]) * 300_000)
"""


def test_readers_see_either_the_old_or_the_new_file(tmp_path: Path) -> None:
    with child_processes.start(WRITER, tmp_path / "a") as child:
        child_processes.expect_lines(child, "round", 2)
        deadline, seen = time.monotonic() + 1, set()
        while time.monotonic() < deadline:
            data = (tmp_path / "a").read_bytes()
            assert data in (b"a" * 300_000, b"b" * 300_000)
            seen.add(data[0])
    assert seen == set(b"ab")


def test_killed_writers_leave_either_the_old_or_the_new_file(tmp_path: Path) -> None:
    path, rng = tmp_path / "a", random.Random(0)
    for _ in range(8):
        with child_processes.start(WRITER, path) as child:
            child_processes.expect_lines(child, "round", rng.randrange(2, 20))
            time.sleep(rng.uniform(0, 0.003))
            child.send_signal(signal.SIGKILL)
        data = path.read_bytes()
        assert len(data) == 300_000
        assert len(set(data)) == 1
    write_atomic(path, b"")
    assert os.listdir(tmp_path) == ["a"]
