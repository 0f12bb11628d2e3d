"""Malicious packages: each function turns a valid package into one, as its docstring describes."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import sample_package

from ryzen_compile.artifacts.package import layout

Manifest = dict[str, Any]
Attack = Callable[[Path], None]

SECRET = "secret"
"""The name of a file next to the package that no attack may read or change."""


def _edit(package: Path, change: Callable[[Manifest], object]) -> None:
    path = package / layout.MANIFEST_NAME
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def _entry(manifest: Manifest, path: str) -> Manifest:
    return next(file for file in manifest["files"] if file["path"] == path)


def _rename_engine(package: Path, path: str) -> None:
    def change(manifest: Manifest) -> None:
        _entry(manifest, sample_package.ENGINE_PATH)["path"] = path
        manifest["engines"][0]["path"] = path

    _edit(package, change)


def modified_engine(package: Path) -> None:
    """An engine with modified bytes, but the same size and modification time."""
    path = package / sample_package.ENGINE_PATH
    status = path.stat()
    path.write_bytes(b"x" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def swapped_digest(package: Path) -> None:
    """The digest of another file."""
    _edit(
        package,
        lambda manifest: _entry(manifest, sample_package.ENGINE_PATH).update(
            sha256=_entry(manifest, sample_package.GRAPH_PATH)["sha256"]
        ),
    )


def truncated_engine(package: Path) -> None:
    """A truncated engine."""
    os.truncate(package / sample_package.ENGINE_PATH, 10)


def extended_engine(package: Path) -> None:
    """An engine with appended bytes."""
    with open(package / sample_package.ENGINE_PATH, "ab") as engine:
        engine.write(b"more")


def missing_engine(package: Path) -> None:
    """A listed file that does not exist."""
    os.unlink(package / sample_package.ENGINE_PATH)


def path_traversal(package: Path) -> None:
    """A path that leaves the package through `..`."""
    _rename_engine(package, f"engines/../../{SECRET}")


def absolute_path(package: Path) -> None:
    """An absolute path."""
    _rename_engine(package, str(package.parent / SECRET))


def windows_drive_path(package: Path) -> None:
    """A path that is absolute only on Windows."""
    _rename_engine(package, "C:/windows/win.ini")


def windows_path_traversal(package: Path) -> None:
    """A path that leaves the package only on Windows."""
    _rename_engine(package, f"engines\\..\\..\\{SECRET}")


def terminal_escape_in_path(package: Path) -> None:
    """A path with terminal control characters."""
    _rename_engine(package, "engines/\x1b[2J\x1b]0;owned\x07")


def manifest_lists_itself(package: Path) -> None:
    """A manifest that lists itself."""
    _rename_engine(package, "manifest.json")


def symlinked_file(package: Path) -> None:
    """A symbolic link to a file outside the package in place of an engine."""
    size = (package / sample_package.ENGINE_PATH).stat().st_size
    os.unlink(package / sample_package.ENGINE_PATH)
    (package.parent / SECRET).write_bytes(b"s" * size)
    os.symlink(package.parent / SECRET, package / sample_package.ENGINE_PATH)


def _replace(file: Path, make: Callable[[Path], None]) -> None:
    os.unlink(file)
    make(file)


def symlinked_folder(package: Path) -> None:
    """A symbolic link to a folder outside the package in place of the engines' folder."""
    shutil.move(package / "engines", package.parent / "elsewhere")
    os.symlink(package.parent / "elsewhere", package / "engines")


def pipe_as_file(package: Path) -> None:
    """A pipe in place of an engine, which blocks its reader."""
    _replace(package / sample_package.ENGINE_PATH, os.mkfifo)


def folder_as_file(package: Path) -> None:
    """A folder in place of an engine."""
    _replace(package / sample_package.ENGINE_PATH, os.mkdir)


def symlinked_manifest(package: Path) -> None:
    """A manifest that is a symbolic link."""
    shutil.move(package / layout.MANIFEST_NAME, package.parent / "elsewhere")
    os.symlink(package.parent / "elsewhere", package / layout.MANIFEST_NAME)


def pipe_as_manifest(package: Path) -> None:
    """A manifest that is a pipe."""
    _replace(package / layout.MANIFEST_NAME, os.mkfifo)


def folder_as_manifest(package: Path) -> None:
    """A manifest that is a folder."""
    _replace(package / layout.MANIFEST_NAME, os.mkdir)


def newer_schema_version(package: Path) -> None:
    """A manifest of a newer schema version with unknown fields."""
    _edit(package, lambda manifest: manifest.update(schema_version=3, novelty={}))


def older_schema_version(package: Path) -> None:
    """A manifest of schema version 0."""
    _edit(package, lambda manifest: manifest.update(schema_version=0))


def text_schema_version(package: Path) -> None:
    """A schema version that is text."""
    _edit(package, lambda manifest: manifest.update(schema_version="2"))


def missing_schema_version(package: Path) -> None:
    """A manifest without a schema version."""
    _edit(package, lambda manifest: manifest.pop("schema_version"))


def unknown_field(package: Path) -> None:
    """An unknown field."""
    _edit(package, lambda manifest: manifest.update(execute="rm -rf /"))


def terminal_escape_in_field(package: Path) -> None:
    """An unknown field with terminal control characters in its name."""
    _edit(package, lambda manifest: manifest.update({"\x1b[2Jowned\n": 1}))


def terminal_escape_in_reference(package: Path) -> None:
    """A reference to a missing graph whose name has terminal control characters."""
    _edit(package, lambda manifest: manifest["engines"][0].update(graph="\x1b[2Jowned\n"))


def duplicate_path(package: Path) -> None:
    """One path with two digests."""
    _edit(
        package, lambda manifest: manifest["files"].append({**_entry(manifest, sample_package.ENGINE_PATH), "sha256": "0" * 64})
    )


def case_insensitive_duplicate_path(package: Path) -> None:
    """Two paths that are one file on Windows and macOS."""
    path = sample_package.ENGINE_PATH.upper()
    (package / path).parent.mkdir(exist_ok=True)
    shutil.copy(package / sample_package.ENGINE_PATH, package / path)
    _edit(package, lambda manifest: manifest["files"].append({**_entry(manifest, sample_package.ENGINE_PATH), "path": path}))


def path_is_file_and_folder(package: Path) -> None:
    """One path that is both a file and a folder."""
    _edit(
        package, lambda manifest: manifest["files"].append({**_entry(manifest, sample_package.ENGINE_PATH), "path": "engines"})
    )


def misnamed_weights(package: Path) -> None:
    """A weight file named by the digest of other weights."""

    def change(manifest: Manifest) -> None:
        entry = next(file for file in manifest["files"] if file["path"].startswith(layout.WEIGHTS_DIR))
        os.rename(package / entry["path"], package / layout.weight_path("f" * 64))
        entry["path"] = layout.weight_path("f" * 64)

    _edit(package, change)


def unlisted_engine(package: Path) -> None:
    """An engine without a listed digest."""
    _edit(package, lambda manifest: manifest["files"].remove(_entry(manifest, sample_package.ENGINE_PATH)))


def unlisted_weights(package: Path) -> None:
    """A variant with a weight file without a listed digest."""
    _edit(package, lambda manifest: manifest["graphs"][0]["variants"][0]["weights"].append("/etc/passwd"))


def undeclared_external_data(package: Path) -> None:
    """A graph that reads a file that its variant does not declare, so that the digest is not checked."""

    def change(manifest: Manifest) -> None:
        weights = set(manifest["graphs"][0]["variants"][0]["weights"])
        manifest["graphs"][0]["variants"][0]["weights"] = []
        manifest["files"] = [file for file in manifest["files"] if file["path"] not in weights]
        for path in weights:
            (package / path).write_bytes(b"7" * (package / path).stat().st_size)

    _edit(package, change)


def engine_of_missing_graph(package: Path) -> None:
    """An engine of a graph that does not exist."""
    _edit(package, lambda manifest: manifest["engines"][0].update(graph="other"))


def duplicate_variant(package: Path) -> None:
    """Two variants of the same name for the same backend."""
    _edit(package, lambda manifest: manifest["graphs"][0]["variants"].append(manifest["graphs"][0]["variants"][0]))


def huge_file_size(package: Path) -> None:
    """A file with a listed size of 8 PiB."""
    _edit(package, lambda manifest: _entry(manifest, sample_package.ENGINE_PATH).update(size_bytes=2**53))


def file_size_overflow(package: Path) -> None:
    """A listed size that exceeds every integer type."""
    _edit(package, lambda manifest: _entry(manifest, sample_package.ENGINE_PATH).update(size_bytes=10**40))


def negative_file_size(package: Path) -> None:
    """A negative listed size."""
    _edit(package, lambda manifest: _entry(manifest, sample_package.ENGINE_PATH).update(size_bytes=-1))


def empty_digest(package: Path) -> None:
    """An empty digest."""
    _edit(package, lambda manifest: _entry(manifest, sample_package.ENGINE_PATH).update(sha256=""))


def oversized_manifest(package: Path) -> None:
    """A manifest of 1 GB."""
    os.truncate(package / layout.MANIFEST_NAME, 10**9)


def deeply_nested_manifest(package: Path) -> None:
    """JSON with a nesting depth of ten million."""
    (package / layout.MANIFEST_NAME).write_bytes(b'{"schema_version":2,"x":' + b"[" * 10_000_000)


def number_with_ten_million_digits(package: Path) -> None:
    """A schema version with ten million digits."""
    (package / layout.MANIFEST_NAME).write_bytes(b'{"schema_version":' + b"9" * 10_000_000 + b"}")


def pickle_as_manifest(package: Path) -> None:
    """A manifest that is a pickle."""
    (package / layout.MANIFEST_NAME).write_bytes(b"\x80\x04\x95cposix\nsystem\n(S'true'\ntR.")


def invalid_utf8(package: Path) -> None:
    """Text that is not UTF-8."""
    path = package / layout.MANIFEST_NAME
    path.write_bytes(path.read_bytes().replace(b'"toy.onnx"', b'"\xff\xfe"'))


def trailing_second_manifest(package: Path) -> None:
    """A second manifest after the first."""
    path = package / layout.MANIFEST_NAME
    path.write_bytes(path.read_bytes() * 2)


ON_FOLDERS: tuple[Attack, ...] = (
    modified_engine,
    swapped_digest,
    truncated_engine,
    extended_engine,
    missing_engine,
    path_traversal,
    absolute_path,
    windows_drive_path,
    windows_path_traversal,
    terminal_escape_in_path,
    manifest_lists_itself,
    symlinked_file,
    symlinked_folder,
    pipe_as_file,
    folder_as_file,
    symlinked_manifest,
    pipe_as_manifest,
    folder_as_manifest,
    newer_schema_version,
    older_schema_version,
    text_schema_version,
    missing_schema_version,
    unknown_field,
    terminal_escape_in_field,
    terminal_escape_in_reference,
    duplicate_path,
    case_insensitive_duplicate_path,
    path_is_file_and_folder,
    misnamed_weights,
    unlisted_engine,
    unlisted_weights,
    undeclared_external_data,
    engine_of_missing_graph,
    duplicate_variant,
    huge_file_size,
    file_size_overflow,
    negative_file_size,
    empty_digest,
    oversized_manifest,
    deeply_nested_manifest,
    number_with_ten_million_digits,
    pickle_as_manifest,
    invalid_utf8,
    trailing_second_manifest,
)


def _members(file: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(file) as tar:
        return [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def _write(file: Path, members: list[tuple[tarfile.TarInfo, bytes]], tar_format: int = tarfile.GNU_FORMAT) -> None:
    with tarfile.open(file, "w", format=tar_format) as tar:
        for member, data in members:
            tar.addfile(member, io.BytesIO(data))


def _member(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    return member, data


def _replace_engine(file: Path, *replacements: tuple[tarfile.TarInfo, bytes], tar_format: int = tarfile.GNU_FORMAT) -> None:
    members = _members(file)
    index = [member.name for member, _ in members].index(sample_package.ENGINE_PATH)
    _write(file, [*members[:index], *replacements, *members[index + 1 :]], tar_format)


def member_path_traversal(file: Path) -> None:
    """A member that leaves the package through `..`."""
    _write(file, [*_members(file), _member(f"../{SECRET}", b"owned")])


def absolute_member(file: Path) -> None:
    """A member with an absolute path."""
    _write(file, [*_members(file), _member(str(file.parent / SECRET), b"owned")])


def unlisted_member(file: Path) -> None:
    """A member that the manifest does not list."""
    _write(file, [*_members(file), _member("engines/extra.plan", b"owned")])


def symlink_member(file: Path) -> None:
    """A listed file as a symbolic link to a file outside the package."""
    _replace_engine(file, _member(sample_package.ENGINE_PATH, type=tarfile.SYMTYPE, linkname=f"../../{SECRET}"))


def hard_link_member(file: Path) -> None:
    """A listed file as a hard link to a file outside the package."""
    _replace_engine(file, _member(sample_package.ENGINE_PATH, type=tarfile.LNKTYPE, linkname=f"../{SECRET}"))


def symlink_then_file(file: Path) -> None:
    """A symbolic link in place of the folder of the next member."""
    link = _member("engines", type=tarfile.SYMTYPE, linkname="..")
    members = _members(file)
    _write(file, [members[0], link, *members[1:]])


def device_member(file: Path) -> None:
    """A listed file as a device."""
    _replace_engine(file, _member(sample_package.ENGINE_PATH, type=tarfile.CHRTYPE, devmajor=1, devminor=3))


def folder_member(file: Path) -> None:
    """A folder."""
    _write(file, [*_members(file), _member("engines", type=tarfile.DIRTYPE)])


def duplicate_member(file: Path) -> None:
    """A listed file that occurs twice, the second time with other bytes."""
    members = _members(file)
    member, data = next(item for item in members if item[0].name == sample_package.ENGINE_PATH)
    _write(file, [*members, (member, b"x" * len(data))])


def modified_member(file: Path) -> None:
    """A listed file with modified bytes of the same size."""
    size = next(len(data) for member, data in _members(file) if member.name == sample_package.ENGINE_PATH)
    _replace_engine(file, _member(sample_package.ENGINE_PATH, b"x" * size))


def long_member(file: Path) -> None:
    """A member that is longer than its listed size."""
    _replace_engine(file, _member(sample_package.ENGINE_PATH, b"x" * 100_000))


def missing_member(file: Path) -> None:
    """A listed file that is missing."""
    _write(file, [item for item in _members(file) if item[0].name != "reports/accuracy.json"])


def pax_header_path(file: Path) -> None:
    """A pax header that gives a member another path."""
    data = next(data for member, data in _members(file) if member.name == sample_package.ENGINE_PATH)
    _replace_engine(
        file, _member("harmless", data, pax_headers={"path": sample_package.ENGINE_PATH}), tar_format=tarfile.PAX_FORMAT
    )


def sparse_member(file: Path) -> None:
    """A sparse member, of which 512 bytes expand to 8 GiB."""
    _replace_engine(file, _member(sample_package.ENGINE_PATH, b"x" * 512, type=tarfile.GNUTYPE_SPARSE))


def huge_member_name(file: Path) -> None:
    """A name of 64 GiB."""
    members = _members(file)
    _write(file, members[:1])
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 1 << 36
    data = file.read_bytes()
    end = 512 + -(-members[0][0].size // 512) * 512
    file.write_bytes(data[:end] + header.tobuf(tarfile.GNU_FORMAT))
    os.truncate(file, end + 512 + (1 << 36))


def late_manifest(file: Path) -> None:
    """A manifest after the files that it lists."""
    members = _members(file)
    _write(file, [*members[1:], members[0]])


def huge_manifest_member(file: Path) -> None:
    """A manifest of 64 GiB, of which all but the first bytes are a hole."""
    header = tarfile.TarInfo(layout.MANIFEST_NAME)
    header.size = 1 << 36
    file.write_bytes(header.tobuf(tarfile.GNU_FORMAT) + b'{"schema_version": 2, ')
    os.truncate(file, 1 << 36)


def disk_filling_member(file: Path) -> None:
    """A hole of 4 TiB that is listed as an engine with its true size."""
    size = 1 << 42
    members = _members(file)
    manifest = json.loads(members[0][1])
    _entry(manifest, sample_package.ENGINE_PATH)["size_bytes"] = size
    data = json.dumps(manifest).encode()
    index = [member.name for member, _ in members].index(sample_package.ENGINE_PATH)
    _write(file, [_member(layout.MANIFEST_NAME, data), *members[1:index]])
    end = sum(512 + -(-len(content) // 512) * 512 for content in (data, *(content for _, content in members[1:index])))
    header = tarfile.TarInfo(sample_package.ENGINE_PATH)
    header.size = size
    file.write_bytes(file.read_bytes()[:end] + header.tobuf(tarfile.GNU_FORMAT))
    os.truncate(file, end + 512 + size + (1 << 20))


def compressed_tar(file: Path) -> None:
    """A compressed tar, which can expand to any size."""
    members = _members(file)
    with tarfile.open(file, "w:gz") as tar:
        for member, data in members:
            tar.addfile(member, io.BytesIO(data))


ON_TARS: tuple[Attack, ...] = (
    member_path_traversal,
    absolute_member,
    unlisted_member,
    symlink_member,
    hard_link_member,
    symlink_then_file,
    device_member,
    folder_member,
    duplicate_member,
    modified_member,
    long_member,
    missing_member,
    pax_header_path,
    sparse_member,
    huge_member_name,
    late_manifest,
    huge_manifest_member,
    disk_filling_member,
    compressed_tar,
)
