"""Inter-process file locks: waiting, sharing, removed lock files and read-only lock files."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
from support import child_processes

from ryzen_compile.utils import file_lock

HOLD = """
import sys, time
from pathlib import Path
from ryzen_compile.utils import file_lock
with file_lock.acquire(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_waiting_process_learns_the_holder_and_gets_the_lock_when_it_is_killed(tmp_path: Path) -> None:
    holders: list[str] = []
    with child_processes.start(HOLD, tmp_path / "lock") as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert file_lock.try_acquire(tmp_path / "lock") is None

        def on_wait(holder: str) -> None:
            holders.append(holder)
            child.send_signal(signal.SIGKILL)

        with file_lock.acquire(tmp_path / "lock", on_wait=on_wait):
            assert holders == [f"process {child.pid}"]


def test_shared_locks_have_many_holders_and_exclusive_locks_one(tmp_path: Path) -> None:
    with file_lock.acquire(tmp_path / "lock", shared=True), file_lock.acquire(tmp_path / "lock", shared=True):
        assert file_lock.try_acquire(tmp_path / "lock") is None
    exclusive = file_lock.try_acquire(tmp_path / "lock")
    assert exclusive is not None
    assert file_lock.try_acquire(tmp_path / "lock", shared=True) is None
    os.close(exclusive)


def test_a_removed_lock_file_does_not_lock_the_path(tmp_path: Path) -> None:
    path, acquired = tmp_path / "lock", threading.Event()

    def hold_lock() -> None:
        with file_lock.acquire(path):
            acquired.set()
            release.wait(10)

    release, waiter = threading.Event(), threading.Thread(target=hold_lock)
    first = file_lock.try_acquire(path)
    assert first is not None
    waiter.start()
    try:
        assert not acquired.wait(0.2)
        path.unlink()
        os.close(first)
        assert acquired.wait(10)
        # The waiter holds the file that is at the path, so that other processes find it locked.
        assert file_lock.try_acquire(path, create=False) is None
    finally:
        release.set()
        waiter.join()


def test_a_read_only_lock_file_can_be_locked() -> None:
    with child_processes.unprivileged_folder() as folder:
        (folder / "lock").touch(0o444)
        folder.chmod(0o555)
        with file_lock.acquire(folder / "lock", shared=True):
            pass
        with pytest.raises(PermissionError):
            file_lock.try_acquire(folder / "other", shared=True)
