from __future__ import annotations

import errno
import os
import random
import re
import signal
import threading
import time
from pathlib import Path

import msgspec
import pytest
from support import child_processes, sample_package

from ryzen_compile.artifacts.package import layout, write
from ryzen_compile.artifacts.package.manifest import AccuracyRecord, MetricRecord
from ryzen_compile.artifacts.package.read import read_package
from ryzen_compile.artifacts.package.write import Staging, replace_manifest
from ryzen_compile.errors import PackageError
from ryzen_compile.utils import atomic_file

MAKER = """
import sys, itertools
from support import sample_package
from pathlib import Path
for seed in itertools.cycle((b"a", b"b")):
    print("round", flush=True)
    sample_package.make(Path(sys.argv[1]), seed=seed, size=200_000)
"""


def bytes_read() -> int:
    """Bytes that this process has read from files so far."""
    found = re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1])


def test_a_package_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    made = sample_package.make_package(tmp_path / "m.ryzen")
    found = read_package(tmp_path / "m.ryzen")
    found.check()
    assert found == made
    assert [file.path for file in found.manifest.files] == sorted(file.path for file in found.manifest.files)
    assert os.listdir(tmp_path) == ["m.ryzen"]


@pytest.mark.parametrize("name", ["with space.ryzen", "ünïcode 模型", "new\nline", "x" * 255, "é" * 127, "-rf", ".hidden"])
def test_a_package_may_have_any_name(tmp_path: Path, name: str) -> None:
    for seed in (b"a", b"b"):
        sample_package.make_package(tmp_path / name, seed=seed)
    read_package(tmp_path / name).check()
    assert os.listdir(tmp_path) == [name]


def test_a_name_that_the_disk_does_not_take_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="File name too long"), Staging(tmp_path / ("x" * 256)):
        pass
    assert os.listdir(tmp_path) == []


def test_a_file_whose_digest_is_known_is_not_read(tmp_path: Path) -> None:
    size = 5_000_000
    with Staging(tmp_path / "m") as staging:
        staging.path("big").write_bytes(bytes(size))
        before = bytes_read()
        staging.add("big", sha256="0" * 64)
        staging.commit(msgspec.structs.replace(sample_package.manifest(), graphs=(), engines=()))
        assert bytes_read() - before < size / 10


def test_a_file_is_read_once(tmp_path: Path) -> None:
    size = 5_000_000
    with Staging(tmp_path / "m") as staging:
        staging.path("big").write_bytes(bytes(size))
        staging.path("bigger").write_bytes(bytes(2 * size))
        before = bytes_read()
        staging.add("big")
        staging.commit(msgspec.structs.replace(sample_package.manifest(), graphs=(), engines=()))
        assert 3 * size <= bytes_read() - before < 3.1 * size
    read_package(tmp_path / "m").check()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_leaving_without_commit_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with Staging(tmp_path / "new" / "parents" / "m") as staging:
            sample_package.write_files(staging)
            raise error

    with pytest.raises(error):
        fail()
    assert os.listdir(tmp_path) == []


def test_a_failed_build_leaves_the_old_package(tmp_path: Path) -> None:
    made = sample_package.make_package(tmp_path / "m", seed=b"a")
    with Staging(tmp_path / "m") as staging:
        sample_package.write_files(staging, seed=b"b")
    read_package(tmp_path / "m").check()
    assert read_package(tmp_path / "m") == made
    assert os.listdir(tmp_path) == ["m"]


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    sample_package.make_package(tmp_path / "real", seed=b"a")
    (tmp_path / "link").symlink_to("real")
    sample_package.make_package(tmp_path / "link", seed=b"b")
    assert (tmp_path / "link").is_symlink()
    assert read_package(tmp_path / "real").manifest.name == "b"


def test_an_empty_folder_becomes_the_package(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    sample_package.make_package(tmp_path / "m")
    read_package(tmp_path / "m").check()


def _file(path: Path) -> None:
    path.write_text("precious")


def _folder(path: Path) -> None:
    path.mkdir()
    (path / "precious").write_text("precious")


def _web_extension(path: Path) -> None:
    path.mkdir()
    (path / "manifest.json").write_text('{"manifest_version": 3, "name": "precious"}')


def _package_with_notes(path: Path) -> None:
    sample_package.make_package(path)
    (path / "notes.txt").write_text("precious")


def _dangling_link(path: Path) -> None:
    path.mkdir()
    (path / "link").symlink_to("nowhere")


@pytest.mark.parametrize("precious", [_file, _folder, _web_extension, _package_with_notes, _dangling_link])
def test_what_is_not_wholly_a_package_is_never_replaced(tmp_path: Path, precious: object) -> None:
    assert callable(precious)
    precious(tmp_path / "m")
    before = sorted(map(str, tmp_path.rglob("*")))
    with pytest.raises(PackageError) as caught, Staging(tmp_path / "m"):
        pass
    assert caught.value.hint is not None
    assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_a_package_of_another_version_may_be_replaced(tmp_path: Path) -> None:
    sample_package.make_package(tmp_path / "m")
    place = tmp_path / "m" / "manifest.json"
    place.write_text(place.read_text().replace('"schema_version": 1', '"schema_version": 99, "new": []'))
    sample_package.make_package(tmp_path / "m", seed=b"b")
    assert read_package(tmp_path / "m").manifest.name == "b"


def test_a_file_that_appears_at_the_destination_during_the_build_is_kept(tmp_path: Path) -> None:
    def build() -> None:
        with Staging(tmp_path / "m") as staging:
            filled = sample_package.write_files(staging)
            (tmp_path / "m").write_text("precious")
            staging.commit(filled)

    with pytest.raises(PackageError, match="is not a package"):
        build()
    assert (tmp_path / "m").read_text() == "precious"
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../up",
        "graphs/../../up",
        "C:/x",
        "a//b",
        "./a",
        "a/",
        "",
        "a\\b",
        "a\nb",
        "nul\0",
        "x" * 241,
        "a ",
        "a/b.",
        "manifest.json",
        "Manifest.JSON",
        "a:b",
    ],
)
def test_a_path_that_is_not_below_the_package_on_every_system_is_refused(tmp_path: Path, path: str) -> None:
    with Staging(tmp_path / "m") as staging:
        with pytest.raises(PackageError):
            staging.path(path)
        with pytest.raises(PackageError):
            staging.add(path)


def test_a_manifest_that_names_what_is_not_there_is_not_written(tmp_path: Path) -> None:
    def build() -> None:
        with Staging(tmp_path / "m") as staging:
            filled = sample_package.write_files(staging)
            staging.path(sample_package.ENGINE_PATH).unlink()
            staging.commit(filled)

    with pytest.raises(PackageError, match="is not among the files"):
        build()
    assert os.listdir(tmp_path) == []


def test_a_manifest_that_would_not_read_back_is_not_written(tmp_path: Path) -> None:
    metric = MetricRecord(output="y", name="max_abs", worst=float("nan"), required="<= 1", met=False, case="opt")
    accuracy = AccuracyRecord(
        candidate="s", baseline="b", machine="w", cases=1, criteria="c", metrics=(metric,), met=False, timestamp="2026-01-01"
    )

    def build() -> None:
        with Staging(tmp_path / "m") as staging:
            filled = sample_package.write_files(staging)
            variant = msgspec.structs.replace(filled.graphs[0].variants[0], accuracy=(accuracy,))
            graph = msgspec.structs.replace(filled.graphs[0], variants=(variant,))
            staging.commit(msgspec.structs.replace(filled, graphs=(graph,)))

    with pytest.raises(PackageError, match=r"worst"):
        build()
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_one_clear_error_and_leaves_the_old_package(tmp_path: Path) -> None:
    sample_package.make_package(tmp_path / "m")
    code = """
import resource, sys
from pathlib import Path
from support import sample_package
from ryzen_compile.errors import PackageError
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
try:
    sample_package.make(Path(sys.argv[1]), size=1_000_000, seed=b"b")
except PackageError as error:
    print(error.says, "|", error.hint)
"""
    assert re.search(r"`.*/m` was not written: File too large \| make room in ", child_processes.run(code, tmp_path / "m"))
    read_package(tmp_path / "m").check()
    assert read_package(tmp_path / "m").manifest.name == "a"
    assert os.listdir(tmp_path) == ["m"]


def test_a_folder_that_cannot_be_written_is_one_clear_error() -> None:
    with child_processes.unprivileged_folder() as folder:
        folder.chmod(0o555)
        with pytest.raises(PackageError, match=r"cannot be written: .*Permission denied"), Staging(folder / "m"):
            pass
        with pytest.raises(PackageError, match=r"cannot be written: .*Permission denied"), Staging(folder / "new" / "m"):
            pass


def test_readers_see_one_package_or_the_other_and_never_a_mixture(tmp_path: Path) -> None:
    sample_package.make_package(tmp_path / "m", seed=b"a", size=200_000)
    seen: set[str] = set()
    with child_processes.start(MAKER, tmp_path / "m") as child:
        child_processes.expect_lines(child, "round", 1)
        until = time.monotonic() + 2
        while time.monotonic() < until:
            package = read_package(tmp_path / "m")
            try:
                package.check()
            except PackageError as error:
                assert "was built anew while it was read" in error.message  # noqa: PT017 -- an error is one of two good ends
            else:
                seen.add(package.manifest.name)
    assert seen == {"a", "b"}


def test_killed_builders_leave_a_whole_package_and_the_next_build_sweeps_up(tmp_path: Path) -> None:
    chance = random.Random(0)
    for _ in range(10):
        with child_processes.start(MAKER, tmp_path / "m") as child:
            child_processes.expect_lines(child, "round", chance.randrange(2, 5))
            time.sleep(chance.uniform(0, 0.01))
            child.send_signal(signal.SIGKILL)
        read_package(tmp_path / "m").check()
    sample_package.make_package(tmp_path / "m")
    assert os.listdir(tmp_path) == ["m"]


def test_a_living_builder_is_not_swept(tmp_path: Path) -> None:
    with Staging(tmp_path / "m") as slow:
        filled = sample_package.write_files(slow, seed=b"b")
        sample_package.make_package(tmp_path / "m", seed=b"a")
        slow.commit(filled)
    assert read_package(tmp_path / "m").manifest.name == "b"
    read_package(tmp_path / "m").check()
    assert os.listdir(tmp_path) == ["m"]


def test_many_builders_at_once_leave_the_package_of_one(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def build(seed: bytes) -> None:
        try:
            for _ in range(20):
                sample_package.make_package(tmp_path / "m", seed=seed)
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=build, args=(bytes([seed]),)) for seed in b"abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    read_package(tmp_path / "m").check()
    assert os.listdir(tmp_path) == ["m"]


WITHOUT_EXCHANGE = """
import os, signal, sys
from pathlib import Path
from support import sample_package
from ryzen_compile.artifacts.package import write
write._exchange_paths = lambda one, other: False
if sys.argv[2] == "die":
    rename = os.rename
    def rename_and_die(one, other):
        rename(one, other)
        if str(other).endswith("/old"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.rename = rename_and_die
sample_package.make(Path(sys.argv[1]), seed=b"b")
"""


def test_a_filesystem_that_cannot_exchange_names_is_served_too(tmp_path: Path) -> None:
    sample_package.make_package(tmp_path / "m", seed=b"a")
    child_processes.run(WITHOUT_EXCHANGE, tmp_path / "m", "live")
    assert read_package(tmp_path / "m").manifest.name == "b"
    assert os.listdir(tmp_path) == ["m"]


def test_a_builder_killed_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    sample_package.make_package(tmp_path / "m", seed=b"a")
    with child_processes.start(WITHOUT_EXCHANGE, tmp_path / "m", "die") as child:
        child.communicate()
        assert child.returncode == -signal.SIGKILL
    assert not (tmp_path / "m").exists()
    with Staging(tmp_path / "m"):
        assert read_package(tmp_path / "m").manifest.name == "a"
    assert os.listdir(tmp_path) == ["m"]


def test_a_second_rename_that_fails_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample_package.make_package(tmp_path / "m", seed=b"a")
    monkeypatch.setattr(write, "_exchange_paths", lambda one, other: False)
    with pytest.raises(FileNotFoundError):
        write.swap(tmp_path / "nothing", tmp_path / "m", tmp_path / "old")
    assert read_package(tmp_path / "m").manifest.name == "a"


def test_a_manifest_can_say_more_about_the_same_files(tmp_path: Path) -> None:
    package = sample_package.make_package(tmp_path / "m")
    more = replace_manifest(package, msgspec.structs.replace(package.manifest, seconds=9.0))
    assert read_package(tmp_path / "m") == more
    assert more.manifest.seconds == 9.0
    with pytest.raises(PackageError, match="was changed meanwhile"):
        replace_manifest(package, package.manifest)
    with pytest.raises(PackageError, match="never change"):
        replace_manifest(more, msgspec.structs.replace(more.manifest, files=()))
    assert sorted(os.listdir(tmp_path / "m")) == ["engines", "graphs", "manifest.json", "reports"]


def test_what_a_killed_verify_left_does_not_stand_in_the_way(tmp_path: Path) -> None:
    sample_package.make_package(tmp_path / "m")
    (tmp_path / "m" / ".manifest.json.0123456789abcdef.part").touch()
    sample_package.make_package(tmp_path / "m", seed=b"b")
    assert read_package(tmp_path / "m").unlisted_files() == ()


def test_paths_of_one_package_have_one_place() -> None:
    assert layout.graph_path("prefill", "fp16") == "graphs/prefill.fp16.onnx"
    assert layout.engine_path("model", "tensorrt-rtx", ("sm86", "sm89")) == "engines/model.tensorrt-rtx-sm86-sm89.plan"
    assert layout.invalid_path_reason(layout.weight_path("0" * 64)) is None


def test_a_dead_builder_of_a_longer_name_is_left_to_its_own_next_one(tmp_path: Path) -> None:
    sample_package.make_package(tmp_path / "m.v1")
    part = tmp_path / ".m.v1.0123456789abcdef.part"
    part.mkdir()
    (part / "lock").touch()
    os.rename(tmp_path / "m.v1", part / "old")
    sample_package.make_package(tmp_path / "m")
    assert (part / "old").is_dir()
    sample_package.make_package(tmp_path / "m.v1")
    assert sorted(os.listdir(tmp_path)) == ["m", "m.v1"]


@pytest.mark.parametrize("strange", ["manifest.json.notes", "link"])
def test_what_somebody_put_into_a_package_is_not_lost_with_it(tmp_path: Path, strange: str) -> None:
    package = sample_package.make_package(tmp_path / "m.ryzen").path
    if strange == "link":
        (tmp_path / "folder").mkdir()
        (package / "link").symlink_to(tmp_path / "folder")
    else:
        (package / strange).write_text("mine")
    with pytest.raises(PackageError, match=strange):
        sample_package.make_package(package)
    assert os.path.lexists(package / strange)


def test_a_disk_that_fails_behind_a_finished_file_fails_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Path] = []

    def sync(path: Path) -> None:
        told.append(path)
        if told.count(path) == 1 and path.name == "early":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(atomic_file, "fsync", sync)
    with Staging(tmp_path / "m.ryzen") as staging:
        manifest = sample_package.write_files(staging)
        early = staging.path("reports/early")
        early.write_bytes(b"1")
        staging.fsync_async(early)
        with pytest.raises(PackageError, match="Input/output error"):
            staging.commit(manifest)
    assert not (tmp_path / "m.ryzen").exists()


def test_a_finished_file_may_be_removed_again(tmp_path: Path) -> None:
    with Staging(tmp_path / "m.ryzen") as staging:
        manifest = sample_package.write_files(staging)
        staging.fsync_async(staging.path("reports/gone"))
        staging.commit(manifest)
    assert (tmp_path / "m.ryzen").is_dir()
