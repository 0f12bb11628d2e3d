"""Tests of reading packages and verifying their files."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import child_processes, sample_package

from ryzen_compile.artifacts.package import layout
from ryzen_compile.artifacts.package.read import Package, read_package
from ryzen_compile.errors import PackageError


@pytest.fixture
def package(tmp_path: Path) -> Package:
    sample_package.make_package(tmp_path / "m.ryzen")
    return read_package(tmp_path / "m.ryzen")


def damage(package: Package, path: str) -> None:
    """Change one byte in the middle of a file, but not its size and modification time."""
    file = package.path / path
    status = file.stat()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_verification_of_one_engine_reads_no_other_file(package: Package) -> None:
    damage(package, sample_package.GRAPH_PATH)
    package.verify_digests(sample_package.ENGINE_PATH)
    with pytest.raises(PackageError, match=re.escape(sample_package.GRAPH_PATH)):
        package.verify_digests(sample_package.ENGINE_PATH, sample_package.GRAPH_PATH)
    with pytest.raises(PackageError, match=re.escape(sample_package.GRAPH_PATH)):
        package.check()


def test_file_is_verified_once_and_again_after_a_write(package: Package) -> None:
    package.check()
    before = bytes_read()
    package.check()
    assert bytes_read() - before < 1000
    damage(package, sample_package.ENGINE_PATH)
    with pytest.raises(PackageError, match="sha256"):
        package.verify_digests(sample_package.ENGINE_PATH)


def bytes_read() -> int:
    match = re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text(encoding="ascii"))
    assert match is not None
    return int(match[1])


def test_bytes_with_a_wrong_digest_are_not_returned(package: Package) -> None:
    assert package.read_bytes(sample_package.ENGINE_PATH).startswith(b"engine")
    damage(package, sample_package.ENGINE_PATH)
    with pytest.raises(PackageError, match="sha256"):
        package.read_bytes(sample_package.ENGINE_PATH)


def test_unlisted_file_is_not_part_of_the_package(package: Package) -> None:
    (package.path / "engines" / "note").write_text("x")
    (package.path / "link").symlink_to("/etc/passwd")
    assert read_package(package.path).unlisted_files() == ("engines/note", "link")
    with pytest.raises(PackageError, match="does not list the file `engines/note`"):
        package.verify_digests("engines/note")
    with pytest.raises(PackageError, match="does not list the file"):
        package.read_bytes("engines/note")


def test_replaced_package_is_distinguished_from_a_damaged_one(package: Package) -> None:
    sample_package.make_package(package.path, seed=b"b")
    with pytest.raises(PackageError, match="was replaced by another build while it was read"):
        package.check()
    shutil.rmtree(package.path)
    with pytest.raises(PackageError, match="was replaced by another build while it was read"):
        package.verify_digests(sample_package.ENGINE_PATH)


def test_other_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="there is no package"):
        read_package(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(PackageError, match="is not a package: it is not a folder"):
        read_package(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PackageError, match="has no manifest"):
        read_package(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(PackageError, match="is not a package: it is not a folder"):
        read_package(tmp_path / "dangling")


def test_unreadable_manifest_is_an_error() -> None:
    with child_processes.unprivileged_folder() as folder:
        sample_package.make_package(folder / "m")
        (folder / "m" / "manifest.json").chmod(0)
        with pytest.raises(PackageError, match="Permission denied"):
            read_package(folder / "m")


def test_manifest_is_read_up_to_its_size_limit(package: Package) -> None:
    path = package.path / layout.MANIFEST_NAME
    content = path.read_bytes()
    path.write_bytes(content.ljust(layout.MAX_MANIFEST_BYTES))
    assert read_package(package.path) == package
    path.write_bytes(content.ljust(layout.MAX_MANIFEST_BYTES + 1))
    with pytest.raises(PackageError, match="more than 67108864 bytes"):
        read_package(package.path)


def test_manifest_with_a_wrong_value_is_refused_with_its_location(package: Package) -> None:
    path = package.path / "manifest.json"
    path.write_text(path.read_text().replace('"portable": true', '"portable": "yes"'))
    with pytest.raises(PackageError, match=r"Expected `bool`, got `str` - at `\$\.graphs\[0\]\.variants\[0\]\.portable`"):
        read_package(package.path)


@pytest.mark.parametrize("name", ["", "a@b", "Fold", "a/b", "fold\\u001b[2J"])
def test_a_variant_name_that_is_not_the_id_of_a_pipeline_is_refused(package: Package, name: str) -> None:
    path = package.path / "manifest.json"
    path.write_text(path.read_text().replace('"name": "fold"', f'"name": "{name}"'))
    with pytest.raises(PackageError, match=r"variants\[0\]\.name: .* is not the id of a pipeline") as caught:
        read_package(package.path)
    assert "\x1b" not in caught.value.message


def test_reading_imports_no_large_libraries() -> None:
    code = (
        "import sys, ryzen_compile.artifacts.package.read\n"
        "print(sorted({'onnx', 'onnx_ir', 'numpy', 'blake3'} & set(sys.modules)))"
    )
    assert child_processes.run(code) == "[]\n"


def test_package_is_read_without_unix_file_locks(package: Package) -> None:
    code = """
import sys
sys.modules["fcntl"] = None
from ryzen_compile.artifacts.package.read import read_package
package = read_package(sys.argv[1])
package.check()
print(package.manifest.name)
"""
    assert child_processes.run(code, package.path) == "a\n"


def _graph(manifest: dict[str, Any]) -> dict[str, Any]:
    graph: dict[str, Any] = manifest["graphs"][0]
    return graph


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: _graph(m).update(profiles=[]), "$.graphs[0]: there is no profile"),
        (lambda m: m["engines"][0].update(profiles=[]), "$.engines[0].profiles: there is no profile"),
        (lambda m: _graph(m)["profiles"][0]["opt"].update(z=[1]), "its opt shapes are of other inputs than those of the graph"),
        (lambda m: _graph(m)["profiles"][0]["opt"].update(x=[1]), "the shapes of `x: float32[1, 4]` have another rank"),
        (lambda m: _graph(m)["profiles"][0]["opt"].update(x=[1, 5]), "the shapes of `x` are not in ascending order"),
        (lambda m: _graph(m)["profiles"][0]["min"].update(x=[-1, 4]), "the shapes of `x` are not in ascending order"),
        (lambda m: _graph(m)["interface"]["inputs"].append(_graph(m)["interface"]["inputs"][0]), "two inputs have one name"),
        (
            lambda m: _graph(m)["interface"].update(states=[{"name": "s", "input": "x", "output": "z"}]),
            "state `s` has the input `x` and the output `z`, which do not both exist",
        ),
        (
            lambda m: _graph(m)["interface"].update(states=[{"name": "s", "input": "x", "output": "y", "append_axis": 2}]),
            "state `s` appends along axis 2 of `x: float32[1, 4]`",
        ),
        (lambda m: _graph(m)["interface"].update(max_sizes={"n": -1}), "dim `n` has the size -1"),
        (
            lambda m: _graph(m)["interface"]["inputs"][0].update(role="lengths", length_dim="n"),
            "input `x` has the role lengths and counts elements along `n`",
        ),
    ],
)
def test_inconsistent_interface_or_profile_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    path = sample_package.make_package(tmp_path / "m.ryzen").path / layout.MANIFEST_NAME
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(PackageError) as caught:
        read_package(tmp_path / "m.ryzen")
    assert message in caught.value.message
