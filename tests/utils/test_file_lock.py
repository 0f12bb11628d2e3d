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
with file_lock.hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_who_waits_is_told_for_whom_and_gets_the_lock_of_a_killed_holder(tmp_path: Path) -> None:
    told: list[str] = []
    with child_processes.start(HOLD, tmp_path / "lock") as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert file_lock.try_acquire(tmp_path / "lock") is None

        def tell(who: str) -> None:
            told.append(who)
            child.send_signal(signal.SIGKILL)

        with file_lock.acquire(tmp_path / "lock", waiting=tell):
            assert told == [f"process {child.pid}"]


def test_many_share_and_one_excludes(tmp_path: Path) -> None:
    with file_lock.acquire(tmp_path / "lock", shared=True), file_lock.acquire(tmp_path / "lock", shared=True):
        assert file_lock.try_acquire(tmp_path / "lock") is None
    alone = file_lock.try_acquire(tmp_path / "lock")
    assert alone is not None
    assert file_lock.try_acquire(tmp_path / "lock", shared=True) is None
    os.close(alone)


def test_a_lock_file_that_was_removed_guards_nothing(tmp_path: Path) -> None:
    path, held = tmp_path / "lock", threading.Event()

    def wait_for_it() -> None:
        with file_lock.acquire(path):
            held.set()
            done.wait(10)

    done, waiting = threading.Event(), threading.Thread(target=wait_for_it)
    first = file_lock.try_acquire(path)
    assert first is not None
    waiting.start()
    try:
        assert not held.wait(0.2)
        path.unlink()
        os.close(first)
        assert held.wait(10)
        # The one who waited holds the file that has the name now, so that a newcomer sees it.
        assert file_lock.try_acquire(path, create=False) is None
    finally:
        done.set()
        waiting.join()


def test_a_lock_file_that_may_only_be_read_is_locked_all_the_same() -> None:
    with child_processes.unprivileged_folder() as folder:
        (folder / "lock").touch(0o444)
        folder.chmod(0o555)
        with file_lock.acquire(folder / "lock", shared=True):
            pass
        with pytest.raises(PermissionError):
            file_lock.try_acquire(folder / "other", shared=True)
