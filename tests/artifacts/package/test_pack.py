"""Tests of packing a package into one file, and of unpacking."""

from __future__ import annotations

import os
import re
import shutil
import tarfile
from pathlib import Path

import pytest
from support import child_processes, sample_package

from ryzen_compile.artifacts.package.pack import pack, unpack
from ryzen_compile.artifacts.package.read import read_package
from ryzen_compile.artifacts.package.write import Staging
from ryzen_compile.errors import PackageError


def test_unpacked_package_has_the_same_bytes(tmp_path: Path) -> None:
    package = sample_package.make_package(tmp_path / "m.ryzen")
    pack(package, tmp_path / "m.tar")
    unpacked = unpack(tmp_path / "m.tar", tmp_path / "elsewhere" / "n.ryzen")
    unpacked.check()
    assert unpacked.manifest == package.manifest
    for file in ("manifest.json", *(file.path for file in package.manifest.files)):
        assert (unpacked.path / file).read_bytes() == (package.path / file).read_bytes()


def test_equal_packages_are_packed_to_equal_bytes_with_the_manifest_first(tmp_path: Path) -> None:
    for name in ("one", "two"):
        pack(sample_package.make_package(tmp_path / name), tmp_path / f"{name}.tar")
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()
    with tarfile.open(tmp_path / "one.tar") as tar:
        members = tar.getmembers()
    assert members[0].name == "manifest.json"
    assert [member.name for member in members[1:]] == sorted(member.name for member in members[1:])
    assert {(member.mtime, member.uid, member.gid, member.uname) for member in members} == {(0, 0, 0, "")}


def test_path_longer_than_a_tar_header_is_supported(tmp_path: Path) -> None:
    path = f"reports/{'long ' * 40}é.json"
    with Staging(tmp_path / "m") as staging:
        manifest = sample_package.write_files(staging)
        staging.path(path).write_text("{}")
        package = staging.commit(manifest)
    pack(package, tmp_path / "m.tar")
    assert unpack(tmp_path / "m.tar", tmp_path / "n").read_bytes(path) == b"{}"


def test_damaged_package_is_not_packed(tmp_path: Path) -> None:
    package = sample_package.make_package(tmp_path / "m")
    path = package.path / sample_package.ENGINE_PATH
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(PackageError, match="sha256"):
        pack(package, tmp_path / "m.tar")
    assert os.listdir(tmp_path) == ["m"]


def test_pack_replaces_only_a_packed_package(tmp_path: Path) -> None:
    package = sample_package.make_package(tmp_path / "m")
    pack(package, tmp_path / "m.tar")
    pack(package, tmp_path / "m.tar")
    (tmp_path / "thesis.tar").write_text("precious")
    with pytest.raises(PackageError, match="is not a packed package"):
        pack(package, tmp_path / "thesis.tar")
    with pytest.raises(PackageError, match="is not a packed package"):
        pack(package, tmp_path / "m")
    assert (tmp_path / "thesis.tar").read_text() == "precious"


def test_truncated_tar_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    pack(sample_package.make_package(tmp_path / "m", size=300), tmp_path / "m.tar")
    data = (tmp_path / "m.tar").read_bytes()
    shutil.rmtree(tmp_path / "m")
    for size in range(0, len(data) - 512, 100):
        (tmp_path / "m.tar").write_bytes(data[:size])
        with pytest.raises(PackageError, match="is not a complete packed package"):
            unpack(tmp_path / "m.tar", tmp_path / "n")
        assert os.listdir(tmp_path) == ["m.tar"]


def test_damaged_tar_is_refused_or_gives_the_same_package(tmp_path: Path) -> None:
    package = sample_package.make_package(tmp_path / "m", size=50)
    pack(package, tmp_path / "m.tar")
    data = (tmp_path / "m.tar").read_bytes()
    refused = 0
    for offset in range(0, len(data), 97):
        (tmp_path / "m.tar").write_bytes(data[:offset] + bytes([data[offset] ^ 0x10]) + data[offset + 1 :])
        try:
            unpacked = unpack(tmp_path / "m.tar", tmp_path / "n")
        except PackageError:
            refused += 1
            assert sorted(os.listdir(tmp_path)) == ["m", "m.tar"]
        else:
            unpacked.check()
            assert {file.sha256 for file in unpacked.manifest.files} == {file.sha256 for file in package.manifest.files}
            shutil.rmtree(tmp_path / "n")
    assert refused > 20


@pytest.mark.parametrize("member_type", [b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"S", b"K", b"x", b"g", b"V"])
def test_listed_file_that_is_not_a_regular_member_is_refused(tmp_path: Path, member_type: bytes) -> None:
    pack(sample_package.make_package(tmp_path / "m"), tmp_path / "m.tar")
    with tarfile.open(tmp_path / "m.tar") as tar:
        member = tar.getmember(sample_package.ENGINE_PATH)
    data = bytearray((tmp_path / "m.tar").read_bytes())
    member.type = member_type
    data[member.offset : member.offset + 512] = member.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "m.tar").write_bytes(data)
    with pytest.raises(PackageError, match="is not a regular file"):
        unpack(tmp_path / "m.tar", tmp_path / "n")


def test_member_of_another_size_is_refused(tmp_path: Path) -> None:
    pack(sample_package.make_package(tmp_path / "m"), tmp_path / "m.tar")
    with tarfile.open(tmp_path / "m.tar") as tar:
        member = tar.getmember(sample_package.ENGINE_PATH)
    data = bytearray((tmp_path / "m.tar").read_bytes())
    member.size += 1
    data[member.offset : member.offset + 512] = member.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "m.tar").write_bytes(data)
    with pytest.raises(PackageError, match="has 3007 bytes, the manifest lists 3006 bytes"):
        unpack(tmp_path / "m.tar", tmp_path / "n")


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="there is no file"):
        unpack(tmp_path / "nothing", tmp_path / "n")
    with pytest.raises(PackageError, match="there is no file"):
        unpack(tmp_path, tmp_path / "n")
    for data in (b"", b"PK\3\4" * 1000, bytes(4096), os.urandom(4096)):
        (tmp_path / "x").write_bytes(data)
        with pytest.raises(PackageError, match="is not a complete packed package"):
            unpack(tmp_path / "x", tmp_path / "n")


def test_unpack_replaces_only_a_package(tmp_path: Path) -> None:
    pack(sample_package.make_package(tmp_path / "m"), tmp_path / "m.tar")
    sample_package.make_package(tmp_path / "m", seed=b"b")
    unpack(tmp_path / "m.tar", tmp_path / "m")
    assert read_package(tmp_path / "m").manifest.name == "a"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "precious").touch()
    with pytest.raises(PackageError, match="is not a package"):
        unpack(tmp_path / "m.tar", tmp_path / "folder")


def test_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    package = sample_package.make_package(tmp_path / "m", size=400_000)
    pack(package, tmp_path / "m.tar")
    code = """
import resource, sys
from pathlib import Path
from ryzen_compile.errors import PackageError
from ryzen_compile.artifacts.package.pack import pack, unpack
from ryzen_compile.artifacts.package.read import read_package
folder = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
for operation in (lambda: pack(read_package(folder / "m"), folder / "n.tar"), lambda: unpack(folder / "m.tar", folder / "n")):
    try:
        operation()
    except PackageError as error:
        print(error.message, "|", error.hint)
"""
    lines = child_processes.run(code, tmp_path).splitlines()
    assert len(lines) == 2
    assert all(re.search(r"was not written: File too large \| free disk space in", line) for line in lines)
    assert sorted(os.listdir(tmp_path)) == ["m", "m.tar"]
