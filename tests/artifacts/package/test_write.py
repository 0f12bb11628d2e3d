"""Tests of writing packages: atomicity, interrupted and concurrent builders, and destinations that must not be replaced."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import msgspec
import pytest
from support import child_processes, sample_package

from ryzen_compile.artifacts.package import layout, write
from ryzen_compile.artifacts.package.manifest import AccuracyRecord, MetricRecord
from ryzen_compile.artifacts.package.read import held_inode, inode_id, read_package
from ryzen_compile.artifacts.package.write import Staging, replace_manifest
from ryzen_compile.errors import PackageError
from ryzen_compile.utils import atomic_file

BUILD_LOOP = """
import sys, itertools
from support import sample_package
from pathlib import Path
for seed in itertools.cycle((b"a", b"b")):
    print("round", flush=True)
    sample_package.make_package(Path(sys.argv[1]), seed=seed, size=200_000)
"""


def bytes_read() -> int:
    """Return the number of bytes that this process has read from files so far."""
    match = re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text(encoding="ascii"))
    assert match is not None
    return int(match[1])


def test_written_package_is_read_back(tmp_path: Path) -> None:
    written = sample_package.make_package(tmp_path / "m.ryzen")
    package = read_package(tmp_path / "m.ryzen")
    package.check()
    assert package == written
    assert [file.path for file in package.manifest.files] == sorted(file.path for file in package.manifest.files)
    assert os.listdir(tmp_path) == ["m.ryzen"]


@pytest.mark.parametrize("name", ["with space.ryzen", "ünïcode 模型", "new\nline", "x" * 255, "é" * 127, "-rf", ".hidden"])
def test_package_can_have_any_name(tmp_path: Path, name: str) -> None:
    for seed in (b"a", b"b"):
        sample_package.make_package(tmp_path / name, seed=seed)
    read_package(tmp_path / name).check()
    assert os.listdir(tmp_path) == [name]


def test_too_long_name_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="File name too long"), Staging(tmp_path / ("x" * 256)):
        pass
    assert os.listdir(tmp_path) == []


def test_file_with_given_digest_is_not_read(tmp_path: Path) -> None:
    size = 5_000_000
    with Staging(tmp_path / "m") as staging:
        staging.path("big").write_bytes(bytes(size))
        before = bytes_read()
        staging.add("big", sha256="0" * 64)
        staging.commit(msgspec.structs.replace(sample_package.manifest(), graphs=(), engines=()))
        assert bytes_read() - before < size / 10


def test_file_is_read_once(tmp_path: Path) -> None:
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
def test_exit_without_commit_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with Staging(tmp_path / "new" / "parents" / "m") as staging:
            sample_package.write_files(staging)
            raise error

    with pytest.raises(error):
        fail()
    assert os.listdir(tmp_path) == []


def test_build_without_commit_keeps_the_old_package(tmp_path: Path) -> None:
    package = sample_package.make_package(tmp_path / "m", seed=b"a")
    with Staging(tmp_path / "m") as staging:
        sample_package.write_files(staging, seed=b"b")
    read_package(tmp_path / "m").check()
    assert read_package(tmp_path / "m") == package
    assert os.listdir(tmp_path) == ["m"]


def test_target_of_a_link_is_replaced_and_the_link_kept(tmp_path: Path) -> None:
    sample_package.make_package(tmp_path / "real", seed=b"a")
    (tmp_path / "link").symlink_to("real")
    sample_package.make_package(tmp_path / "link", seed=b"b")
    assert (tmp_path / "link").is_symlink()
    assert read_package(tmp_path / "real").manifest.name == "b"


def test_empty_folder_is_replaced(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("create", [_file, _folder, _web_extension, _package_with_notes, _dangling_link])
def test_destination_that_is_not_only_a_package_is_not_replaced(tmp_path: Path, create: object) -> None:
    assert callable(create)
    create(tmp_path / "m")
    before = sorted(map(str, tmp_path.rglob("*")))
    with pytest.raises(PackageError) as caught, Staging(tmp_path / "m"):
        pass
    assert caught.value.hint is not None
    assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_package_of_another_schema_version_is_replaced(tmp_path: Path) -> None:
    sample_package.make_package(tmp_path / "m")
    path = tmp_path / "m" / "manifest.json"
    path.write_text(path.read_text().replace('"schema_version": 2', '"schema_version": 99, "new": []'))
    sample_package.make_package(tmp_path / "m", seed=b"b")
    assert read_package(tmp_path / "m").manifest.name == "b"


def test_file_created_at_the_destination_during_the_build_is_kept(tmp_path: Path) -> None:
    def build() -> None:
        with Staging(tmp_path / "m") as staging:
            manifest = sample_package.write_files(staging)
            (tmp_path / "m").write_text("precious")
            staging.commit(manifest)

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
def test_path_that_is_invalid_on_some_system_is_refused(tmp_path: Path, path: str) -> None:
    with Staging(tmp_path / "m") as staging:
        with pytest.raises(PackageError):
            staging.path(path)
        with pytest.raises(PackageError):
            staging.add(path)


def test_manifest_with_a_missing_file_is_not_written(tmp_path: Path) -> None:
    def build() -> None:
        with Staging(tmp_path / "m") as staging:
            manifest = sample_package.write_files(staging)
            staging.path(sample_package.ENGINE_PATH).unlink()
            staging.commit(manifest)

    with pytest.raises(PackageError, match=r"is not listed in \$\.files"):
        build()
    assert os.listdir(tmp_path) == []


def test_manifest_that_cannot_be_decoded_is_not_written(tmp_path: Path) -> None:
    metric = MetricRecord(output="y", name="max_abs", worst=float("nan"), required="<= 1", met=False, case="opt")
    accuracy = AccuracyRecord(
        candidate="s", baseline="b", machine="w", cases=1, criteria="c", metrics=(metric,), met=False, timestamp="2026-01-01"
    )

    def build() -> None:
        with Staging(tmp_path / "m") as staging:
            manifest = sample_package.write_files(staging)
            variant = msgspec.structs.replace(manifest.graphs[0].variants[0], accuracy=(accuracy,))
            graph = msgspec.structs.replace(manifest.graphs[0], variants=(variant,))
            staging.commit(msgspec.structs.replace(manifest, graphs=(graph,)))

    with pytest.raises(PackageError, match=r"\.metrics\[0\]\.worst"):
        build()
    assert os.listdir(tmp_path) == []


def test_full_disk_is_an_error_and_keeps_the_old_package(tmp_path: Path) -> None:
    sample_package.make_package(tmp_path / "m")
    code = """
import resource, sys
from pathlib import Path
from support import sample_package
from ryzen_compile.errors import PackageError
resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
try:
    sample_package.make_package(Path(sys.argv[1]), size=1_000_000, seed=b"b")
except PackageError as error:
    print(error.message, "|", error.hint)
"""
    assert re.search(
        r"`.*/m` was not written: File too large \| free disk space in ", child_processes.run(code, tmp_path / "m")
    )
    read_package(tmp_path / "m").check()
    assert read_package(tmp_path / "m").manifest.name == "a"
    assert os.listdir(tmp_path) == ["m"]


def test_folder_without_write_permission_is_an_error() -> None:
    with child_processes.unprivileged_folder() as folder:
        folder.chmod(0o555)
        with pytest.raises(PackageError, match=r"cannot be written: .*Permission denied"), Staging(folder / "m"):
            pass
        with pytest.raises(PackageError, match=r"cannot be written: .*Permission denied"), Staging(folder / "new" / "m"):
            pass


def test_readers_never_see_a_mixture_of_two_packages(tmp_path: Path) -> None:
    sample_package.make_package(tmp_path / "m", seed=b"a", size=200_000)
    names: set[str] = set()
    with child_processes.start(BUILD_LOOP, tmp_path / "m") as child:
        child_processes.expect_lines(child, "round", 1)
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            package = read_package(tmp_path / "m")
            try:
                package.check()
            except PackageError as error:
                assert "was replaced by another build while it was read" in error.message  # noqa: PT017 -- the error is optional
            else:
                names.add(package.manifest.name)
    assert names == {"a", "b"}


def test_a_package_of_another_build_with_the_same_inode_is_detected(tmp_path: Path) -> None:
    """A file system gives the inode of a removed folder to the next one."""
    first = sample_package.make_package(tmp_path / "m", seed=b"a")
    other = sample_package.make_package(tmp_path / "other", seed=b"b")
    shutil.copytree(other.path, first.path, dirs_exist_ok=True)
    with pytest.raises(PackageError, match="was replaced by another build while it was read"):
        first.check()
    read_package(first.path).check()


def test_the_inode_of_a_folder_is_not_reused_while_it_is_held(tmp_path: Path) -> None:
    """File systems that reuse inodes at once, such as ext4 and overlayfs, give it to the next folder otherwise."""
    (tmp_path / "m").mkdir()
    with held_inode(tmp_path / "m") as held:
        (tmp_path / "m").rmdir()
        for index in range(64):
            (tmp_path / str(index)).mkdir()
        assert held is not None
        assert held not in [inode_id(path) for path in tmp_path.iterdir()]
    with held_inode(tmp_path / "m") as missing:
        assert missing is None


def test_killed_builders_leave_a_complete_package_and_the_next_build_cleans_up(tmp_path: Path) -> None:
    rng = random.Random(0)
    for _ in range(10):
        with child_processes.start(BUILD_LOOP, tmp_path / "m") as child:
            child_processes.expect_lines(child, "round", rng.randrange(2, 5))
            time.sleep(rng.uniform(0, 0.01))
            child.send_signal(signal.SIGKILL)
        read_package(tmp_path / "m").check()
    sample_package.make_package(tmp_path / "m")
    assert os.listdir(tmp_path) == ["m"]


def test_folder_of_a_live_builder_is_not_removed(tmp_path: Path) -> None:
    with Staging(tmp_path / "m") as staging:
        manifest = sample_package.write_files(staging, seed=b"b")
        sample_package.make_package(tmp_path / "m", seed=b"a")
        staging.commit(manifest)
    assert read_package(tmp_path / "m").manifest.name == "b"
    read_package(tmp_path / "m").check()
    assert os.listdir(tmp_path) == ["m"]


def test_concurrent_builders_leave_one_complete_package(tmp_path: Path) -> None:
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


BUILD_WITHOUT_EXCHANGE = """
import os, signal, sys
from pathlib import Path
from support import sample_package
from ryzen_compile.artifacts.package import write
write._exchange_paths = lambda first, second: False
if sys.argv[2] == "die":
    rename = os.rename
    def rename_and_die(source, target):
        rename(source, target)
        if str(target).endswith("/old"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.rename = rename_and_die
sample_package.make_package(Path(sys.argv[1]), seed=b"b")
"""


def test_filesystem_without_atomic_exchange_is_supported(tmp_path: Path) -> None:
    sample_package.make_package(tmp_path / "m", seed=b"a")
    child_processes.run(BUILD_WITHOUT_EXCHANGE, tmp_path / "m", "live")
    assert read_package(tmp_path / "m").manifest.name == "b"
    assert os.listdir(tmp_path) == ["m"]


def test_builder_killed_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    sample_package.make_package(tmp_path / "m", seed=b"a")
    with child_processes.start(BUILD_WITHOUT_EXCHANGE, tmp_path / "m", "die") as child:
        child.communicate()
        assert child.returncode == -signal.SIGKILL
    assert not (tmp_path / "m").exists()
    with Staging(tmp_path / "m"):
        assert read_package(tmp_path / "m").manifest.name == "a"
    assert os.listdir(tmp_path) == ["m"]


def test_failed_second_rename_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample_package.make_package(tmp_path / "m", seed=b"a")
    monkeypatch.setattr(write, "_exchange_paths", lambda first, second: False)
    with pytest.raises(FileNotFoundError):
        write.swap(tmp_path / "nothing", tmp_path / "m", tmp_path / "old")
    assert read_package(tmp_path / "m").manifest.name == "a"


def test_manifest_can_be_replaced_for_the_same_files(tmp_path: Path) -> None:
    package = sample_package.make_package(tmp_path / "m")
    replaced = replace_manifest(package, msgspec.structs.replace(package.manifest, seconds=9.0))
    assert read_package(tmp_path / "m") == replaced
    assert replaced.manifest.seconds == 9.0
    with pytest.raises(PackageError, match="was changed since it was read"):
        replace_manifest(package, package.manifest)
    with pytest.raises(PackageError, match="the files of a package cannot be changed"):
        replace_manifest(replaced, msgspec.structs.replace(replaced.manifest, files=()))
    assert sorted(os.listdir(tmp_path / "m")) == ["engines", "graphs", "manifest.json", "reports"]


def test_temporary_manifest_of_a_killed_process_is_ignored(tmp_path: Path) -> None:
    sample_package.make_package(tmp_path / "m")
    (tmp_path / "m" / ".manifest.json.0123456789abcdef.part").touch()
    sample_package.make_package(tmp_path / "m", seed=b"b")
    assert read_package(tmp_path / "m").unlisted_files() == ()


def test_layout_paths() -> None:
    assert layout.graph_path("prefill", "fold+attention") == "graphs/prefill.fold+attention.onnx"
    assert layout.graph_path("model", "fold", "tensorrt-rtx") == "graphs/model.fold@tensorrt-rtx.onnx"
    targets = ("sm86", "sm89")
    assert layout.engine_path("model", "fold", "tensorrt-rtx", targets) == "engines/model.fold@tensorrt-rtx.sm86-sm89.plan"
    assert layout.invalid_path_reason(layout.weight_path("0" * 64)) is None


def test_folder_of_a_dead_builder_of_another_package_is_kept(tmp_path: Path) -> None:
    sample_package.make_package(tmp_path / "m.v1")
    staging_dir = tmp_path / ".m.v1.0123456789abcdef.part"
    staging_dir.mkdir()
    (staging_dir / "lock").touch()
    os.rename(tmp_path / "m.v1", staging_dir / "old")
    sample_package.make_package(tmp_path / "m")
    assert (staging_dir / "old").is_dir()
    sample_package.make_package(tmp_path / "m.v1")
    assert sorted(os.listdir(tmp_path)) == ["m", "m.v1"]


@pytest.mark.parametrize("extra", ["manifest.json.notes", "link"])
def test_package_with_additional_files_is_not_replaced(tmp_path: Path, extra: str) -> None:
    package = sample_package.make_package(tmp_path / "m.ryzen").path
    if extra == "link":
        (tmp_path / "folder").mkdir()
        (package / "link").symlink_to(tmp_path / "folder")
    else:
        (package / extra).write_text("precious")
    with pytest.raises(PackageError, match=extra):
        sample_package.make_package(package)
    assert os.path.lexists(package / extra)


def test_failed_background_fsync_fails_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []

    def failing_fsync(path: Path) -> None:
        synced.append(path)
        if synced.count(path) == 1 and path.name == "early":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(atomic_file, "fsync", failing_fsync)
    with Staging(tmp_path / "m.ryzen") as staging:
        manifest = sample_package.write_files(staging)
        early = staging.path("reports/early")
        early.write_bytes(b"1")
        staging.fsync_async(early)
        with pytest.raises(PackageError, match="Input/output error"):
            staging.commit(manifest)
    assert not (tmp_path / "m.ryzen").exists()


def test_finished_file_can_be_removed_before_it_is_added(tmp_path: Path) -> None:
    with Staging(tmp_path / "m.ryzen") as staging:
        manifest = sample_package.write_files(staging)
        staging.fsync_async(staging.path("reports/removed"))
        staging.commit(manifest)
    assert (tmp_path / "m.ryzen").is_dir()
