from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from support import child_processes, sample_package

from ryzen_compile.artifacts.package import layout
from ryzen_compile.artifacts.package.read import Package, read_package
from ryzen_compile.errors import PackageError


@pytest.fixture
def package(tmp_path: Path) -> Package:
    sample_package.make_package(tmp_path / "m.ryzen")
    return read_package(tmp_path / "m.ryzen")


def spoil(package: Package, path: str) -> None:
    """Change one byte in the middle, and neither size nor time."""
    place = package.path / path
    found = place.stat()
    data = bytearray(place.read_bytes())
    data[len(data) // 2] ^= 1
    place.write_bytes(data)
    os.utime(place, ns=(found.st_atime_ns, found.st_mtime_ns))


def test_verifying_one_engine_reads_no_other_file(package: Package) -> None:
    spoil(package, sample_package.GRAPH_PATH)
    package.verify_digests(sample_package.ENGINE_PATH)
    with pytest.raises(PackageError, match=re.escape(sample_package.GRAPH_PATH)):
        package.verify_digests(sample_package.ENGINE_PATH, sample_package.GRAPH_PATH)
    with pytest.raises(PackageError, match=re.escape(sample_package.GRAPH_PATH)):
        package.check()


def test_a_file_is_verified_once_and_again_after_it_was_written(package: Package) -> None:
    package.check()
    before = bytes_read()
    package.check()
    assert bytes_read() - before < 1000
    spoil(package, sample_package.ENGINE_PATH)
    with pytest.raises(PackageError, match="sha256"):
        package.verify_digests(sample_package.ENGINE_PATH)


def bytes_read() -> int:
    found = re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1])


def test_bytes_are_returned_only_when_their_digest_is_right(package: Package) -> None:
    assert package.read_bytes(sample_package.ENGINE_PATH).startswith(b"engine")
    spoil(package, sample_package.ENGINE_PATH)
    with pytest.raises(PackageError, match="sha256"):
        package.read_bytes(sample_package.ENGINE_PATH)


def test_a_file_that_is_not_listed_is_not_part_of_the_package(package: Package) -> None:
    (package.path / "engines" / "note").write_text("x")
    (package.path / "link").symlink_to("/etc/passwd")
    assert read_package(package.path).unlisted_files() == ("engines/note", "link")
    with pytest.raises(PackageError, match="lists no file `engines/note`"):
        package.verify_digests("engines/note")
    with pytest.raises(PackageError, match="lists no file"):
        package.read_bytes("engines/note")


def test_a_package_that_was_replaced_is_told_from_a_damaged_one(package: Package) -> None:
    sample_package.make_package(package.path, seed=b"b")
    with pytest.raises(PackageError, match="was built anew while it was read"):
        package.check()
    shutil.rmtree(package.path)
    with pytest.raises(PackageError, match="was built anew"):
        package.verify_digests(sample_package.ENGINE_PATH)


def test_what_is_no_package_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="there is no"):
        read_package(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(PackageError, match="not a folder"):
        read_package(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PackageError, match="has no manifest"):
        read_package(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(PackageError, match="not a folder"):
        read_package(tmp_path / "dangling")


def test_a_manifest_that_may_not_be_read_is_one_clear_error() -> None:
    with child_processes.unprivileged_folder() as folder:
        sample_package.make_package(folder / "m")
        (folder / "m" / "manifest.json").chmod(0)
        with pytest.raises(PackageError, match="Permission denied"):
            read_package(folder / "m")


def test_a_manifest_is_read_up_to_its_bound(package: Package) -> None:
    place = package.path / layout.MANIFEST_NAME
    whole = place.read_bytes()
    place.write_bytes(whole.ljust(layout.MAX_MANIFEST_BYTES))
    assert read_package(package.path) == package
    place.write_bytes(whole.ljust(layout.MAX_MANIFEST_BYTES + 1))
    with pytest.raises(PackageError, match="more than 67108864 bytes"):
        read_package(package.path)


def test_a_manifest_with_a_wrong_value_is_refused_with_the_place_of_it(package: Package) -> None:
    place = package.path / "manifest.json"
    place.write_text(place.read_text().replace('"portable": true', '"portable": "yes"'))
    with pytest.raises(PackageError, match=r"Expected `bool`, got `str` - at `\$\.graphs\[0\]\.variants\[0\]\.portable`"):
        read_package(package.path)


def test_reading_imports_nothing_heavy() -> None:
    code = (
        "import sys, ryzen_compile.artifacts.package.read\n"
        "print(sorted({'onnx', 'onnx_ir', 'numpy', 'blake3'} & set(sys.modules)))"
    )
    assert child_processes.run(code) == "[]\n"


def test_a_package_is_read_where_there_are_no_unix_locks(package: Package) -> None:
    code = """
import sys
sys.modules["fcntl"] = None
from ryzen_compile.artifacts.package.read import read
package = read(sys.argv[1])
package.check()
print(package.manifest.name)
"""
    assert child_processes.run(code, package.path) == "a\n"
