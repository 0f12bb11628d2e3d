"""Hostile packages: each function makes one out of a sound package, and its first line is the idea."""

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
"""A file beside the package that no attack may read or change."""


def _edit(package: Path, change: Callable[[Manifest], object]) -> None:
    place = package / layout.MANIFEST_NAME
    manifest = json.loads(place.read_text())
    change(manifest)
    place.write_text(json.dumps(manifest))


def _entry(manifest: Manifest, path: str) -> Manifest:
    return next(file for file in manifest["files"] if file["path"] == path)


def _rename_engine(package: Path, path: str) -> None:
    def change(manifest: Manifest) -> None:
        _entry(manifest, sample_package.ENGINE_PATH)["path"] = path
        manifest["engines"][0]["path"] = path

    _edit(package, change)


def swapped_bytes(package: Path) -> None:
    """An engine of the same size and time with other bytes."""
    place = package / sample_package.ENGINE_PATH
    found = place.stat()
    place.write_bytes(b"x" * found.st_size)
    os.utime(place, ns=(found.st_atime_ns, found.st_mtime_ns))


def swapped_digest(package: Path) -> None:
    """The digest of one file on another."""
    _edit(
        package,
        lambda manifest: _entry(manifest, sample_package.ENGINE_PATH).update(
            sha256=_entry(manifest, sample_package.GRAPH_PATH)["sha256"]
        ),
    )


def truncated_engine(package: Path) -> None:
    """An engine that was cut off."""
    os.truncate(package / sample_package.ENGINE_PATH, 10)


def grown_engine(package: Path) -> None:
    """An engine with something behind it."""
    with open(package / sample_package.ENGINE_PATH, "ab") as engine:
        engine.write(b"more")


def missing_engine(package: Path) -> None:
    """A listed file that is not there."""
    os.unlink(package / sample_package.ENGINE_PATH)


def climbing_path(package: Path) -> None:
    """A path that climbs out of the package."""
    _rename_engine(package, f"engines/../../{SECRET}")


def absolute_path(package: Path) -> None:
    """An absolute path."""
    _rename_engine(package, str(package.parent / SECRET))


def drive_path(package: Path) -> None:
    """A path that is absolute on Windows only."""
    _rename_engine(package, "C:/windows/win.ini")


def backslash_path(package: Path) -> None:
    """A path that climbs on Windows only."""
    _rename_engine(package, f"engines\\..\\..\\{SECRET}")


def escaping_path(package: Path) -> None:
    """A path with terminal control characters."""
    _rename_engine(package, "engines/\x1b[2J\x1b]0;owned\x07")


def manifest_as_file(package: Path) -> None:
    """A manifest that lists itself."""
    _rename_engine(package, "manifest.json")


def linked_file(package: Path) -> None:
    """A link to a file outside, in place of an engine."""
    size = (package / sample_package.ENGINE_PATH).stat().st_size
    os.unlink(package / sample_package.ENGINE_PATH)
    (package.parent / SECRET).write_bytes(b"s" * size)
    os.symlink(package.parent / SECRET, package / sample_package.ENGINE_PATH)


def linked_folder(package: Path) -> None:
    """A link to a folder outside, in place of the engines."""
    shutil.move(package / "engines", package.parent / "elsewhere")
    os.symlink(package.parent / "elsewhere", package / "engines")


def pipe(package: Path) -> None:
    """A pipe in place of an engine, for the reader to wait at."""
    os.unlink(package / sample_package.ENGINE_PATH)
    os.mkfifo(package / sample_package.ENGINE_PATH)


def folder(package: Path) -> None:
    """A folder in place of an engine."""
    os.unlink(package / sample_package.ENGINE_PATH)
    os.mkdir(package / sample_package.ENGINE_PATH)


def linked_manifest(package: Path) -> None:
    """A manifest that is a link."""
    shutil.move(package / layout.MANIFEST_NAME, package.parent / "elsewhere")
    os.symlink(package.parent / "elsewhere", package / layout.MANIFEST_NAME)


def pipe_as_manifest(package: Path) -> None:
    """A manifest that is a pipe."""
    os.unlink(package / layout.MANIFEST_NAME)
    os.mkfifo(package / layout.MANIFEST_NAME)


def folder_as_manifest(package: Path) -> None:
    """A manifest that is a folder."""
    os.unlink(package / layout.MANIFEST_NAME)
    os.mkdir(package / layout.MANIFEST_NAME)


def future_manifest(package: Path) -> None:
    """A manifest of a later version, with fields that nobody knows yet."""
    _edit(package, lambda manifest: manifest.update(schema_version=2, novelty={}))


def ancient_manifest(package: Path) -> None:
    """A manifest of version 0."""
    _edit(package, lambda manifest: manifest.update(schema_version=0))


def spelt_version(package: Path) -> None:
    """A version that is text."""
    _edit(package, lambda manifest: manifest.update(schema_version="1"))


def no_version(package: Path) -> None:
    """A manifest without a version."""
    _edit(package, lambda manifest: manifest.pop("schema_version"))


def unknown_field(package: Path) -> None:
    """A field that this version does not know."""
    _edit(package, lambda manifest: manifest.update(execute="rm -rf /"))


def escaping_field(package: Path) -> None:
    """An unknown field with terminal control characters in its name, for the message that refuses it."""
    _edit(package, lambda manifest: manifest.update({"\x1b[2Jowned\n": 1}))


def escaping_name(package: Path) -> None:
    """A dangling name with terminal control characters."""
    _edit(package, lambda manifest: manifest["engines"][0].update(graph="\x1b[2Jowned\n"))


def duplicate_path(package: Path) -> None:
    """One path with two digests: which one is believed?"""
    _edit(
        package, lambda manifest: manifest["files"].append({**_entry(manifest, sample_package.ENGINE_PATH), "sha256": "0" * 64})
    )


def duplicate_by_case(package: Path) -> None:
    """Two paths that are one file on Windows and macOS."""
    path = sample_package.ENGINE_PATH.upper()
    (package / path).parent.mkdir(exist_ok=True)
    shutil.copy(package / sample_package.ENGINE_PATH, package / path)
    _edit(package, lambda manifest: manifest["files"].append({**_entry(manifest, sample_package.ENGINE_PATH), "path": path}))


def file_and_folder(package: Path) -> None:
    """One path as a file and as a folder."""
    _edit(
        package, lambda manifest: manifest["files"].append({**_entry(manifest, sample_package.ENGINE_PATH), "path": "engines"})
    )


def misnamed_weights(package: Path) -> None:
    """Weights in the store under the digest of other weights."""

    def change(manifest: Manifest) -> None:
        entry = next(file for file in manifest["files"] if file["path"].startswith(layout.WEIGHTS_DIR))
        os.rename(package / entry["path"], package / layout.weight_path("f" * 64))
        entry["path"] = layout.weight_path("f" * 64)

    _edit(package, change)


def unlisted_engine(package: Path) -> None:
    """An engine that no digest vouches for."""
    _edit(package, lambda manifest: manifest["files"].remove(_entry(manifest, sample_package.ENGINE_PATH)))


def unlisted_weights(package: Path) -> None:
    """A variant that reads weights that no digest vouches for."""
    _edit(package, lambda manifest: manifest["graphs"][0]["variants"][0]["weights"].append("/etc/passwd"))


def smuggled_weights(package: Path) -> None:
    """A graph that reads a file which its variant does not name, so that no digest is looked at."""

    def forget(manifest: Manifest) -> None:
        weights = set(manifest["graphs"][0]["variants"][0]["weights"])
        manifest["graphs"][0]["variants"][0]["weights"] = []
        manifest["files"] = [file for file in manifest["files"] if file["path"] not in weights]
        for path in weights:
            (package / path).write_bytes(b"7" * (package / path).stat().st_size)

    _edit(package, forget)


def dangling_engine(package: Path) -> None:
    """An engine of a graph that is not there."""
    _edit(package, lambda manifest: manifest["engines"][0].update(graph="other"))


def duplicate_variant(package: Path) -> None:
    """Two variants of one name."""
    _edit(package, lambda manifest: manifest["graphs"][0]["variants"].append(manifest["graphs"][0]["variants"][0]))


def huge_size(package: Path) -> None:
    """A file that claims to have 8 PiB."""
    _edit(package, lambda manifest: _entry(manifest, sample_package.ENGINE_PATH).update(size_bytes=2**53))


def endless_size(package: Path) -> None:
    """A size that no integer type holds."""
    _edit(package, lambda manifest: _entry(manifest, sample_package.ENGINE_PATH).update(size_bytes=10**40))


def negative_size(package: Path) -> None:
    """A negative size."""
    _edit(package, lambda manifest: _entry(manifest, sample_package.ENGINE_PATH).update(size_bytes=-1))


def weak_digest(package: Path) -> None:
    """A digest of another kind, or none."""
    _edit(package, lambda manifest: _entry(manifest, sample_package.ENGINE_PATH).update(sha256=""))


def gigabyte_of_garbage(package: Path) -> None:
    """A manifest of 1 GB."""
    os.truncate(package / layout.MANIFEST_NAME, 10**9)


def nested_manifest(package: Path) -> None:
    """JSON nested ten million deep."""
    (package / layout.MANIFEST_NAME).write_bytes(b'{"schema_version":1,"x":' + b"[" * 10_000_000)


def long_number(package: Path) -> None:
    """A version with ten million digits."""
    (package / layout.MANIFEST_NAME).write_bytes(b'{"schema_version":' + b"9" * 10_000_000 + b"}")


def no_json(package: Path) -> None:
    """A manifest that is no JSON."""
    (package / layout.MANIFEST_NAME).write_bytes(b"\x80\x04\x95cposix\nsystem\n(S'true'\ntR.")


def no_unicode(package: Path) -> None:
    """Text that is no UTF-8."""
    place = package / layout.MANIFEST_NAME
    place.write_bytes(place.read_bytes().replace(b'"toy.onnx"', b'"\xff\xfe"'))


def two_manifests(package: Path) -> None:
    """A second manifest behind the first."""
    place = package / layout.MANIFEST_NAME
    place.write_bytes(place.read_bytes() * 2)


ON_FOLDERS: tuple[Attack, ...] = (
    swapped_bytes,
    swapped_digest,
    truncated_engine,
    grown_engine,
    missing_engine,
    climbing_path,
    absolute_path,
    drive_path,
    backslash_path,
    escaping_path,
    manifest_as_file,
    linked_file,
    linked_folder,
    pipe,
    folder,
    linked_manifest,
    pipe_as_manifest,
    folder_as_manifest,
    future_manifest,
    ancient_manifest,
    spelt_version,
    no_version,
    unknown_field,
    escaping_field,
    escaping_name,
    duplicate_path,
    duplicate_by_case,
    file_and_folder,
    misnamed_weights,
    unlisted_engine,
    unlisted_weights,
    smuggled_weights,
    dangling_engine,
    duplicate_variant,
    huge_size,
    endless_size,
    negative_size,
    weak_digest,
    gigabyte_of_garbage,
    nested_manifest,
    long_number,
    no_json,
    no_unicode,
    two_manifests,
)


def _members(file: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(file) as tar:
        return [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def _write(file: Path, members: list[tuple[tarfile.TarInfo, bytes]], form: int = tarfile.GNU_FORMAT) -> None:
    with tarfile.open(file, "w", format=form) as tar:
        for member, data in members:
            tar.addfile(member, io.BytesIO(data))


def _member(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    return member, data


def _replace_engine(file: Path, *instead: tuple[tarfile.TarInfo, bytes], form: int = tarfile.GNU_FORMAT) -> None:
    members = _members(file)
    at = [member.name for member, _ in members].index(sample_package.ENGINE_PATH)
    _write(file, [*members[:at], *instead, *members[at + 1 :]], form)


def climbing_member(file: Path) -> None:
    """A member that climbs out."""
    _write(file, [*_members(file), _member(f"../{SECRET}", b"owned")])


def absolute_member(file: Path) -> None:
    """A member with an absolute path."""
    _write(file, [*_members(file), _member(str(file.parent / SECRET), b"owned")])


def unlisted_member(file: Path) -> None:
    """A member that the manifest does not list."""
    _write(file, [*_members(file), _member("engines/extra.plan", b"owned")])


def link_member(file: Path) -> None:
    """A listed file that comes as a link to the outside."""
    _replace_engine(file, _member(sample_package.ENGINE_PATH, type=tarfile.SYMTYPE, linkname=f"../../{SECRET}"))


def hard_link_member(file: Path) -> None:
    """A listed file that comes as a hard link to the outside."""
    _replace_engine(file, _member(sample_package.ENGINE_PATH, type=tarfile.LNKTYPE, linkname=f"../{SECRET}"))


def link_then_file(file: Path) -> None:
    """A link in place of the folder that the next member is written to."""
    link = _member("engines", type=tarfile.SYMTYPE, linkname="..")
    members = _members(file)
    _write(file, [members[0], link, *members[1:]])


def device_member(file: Path) -> None:
    """A listed file that comes as a device."""
    _replace_engine(file, _member(sample_package.ENGINE_PATH, type=tarfile.CHRTYPE, devmajor=1, devminor=3))


def folder_member(file: Path) -> None:
    """A folder."""
    _write(file, [*_members(file), _member("engines", type=tarfile.DIRTYPE)])


def duplicate_member(file: Path) -> None:
    """A listed file that comes twice, the second time with other bytes."""
    members = _members(file)
    member, data = next(item for item in members if item[0].name == sample_package.ENGINE_PATH)
    _write(file, [*members, (member, b"x" * len(data))])


def swapped_member(file: Path) -> None:
    """A listed file with other bytes of the same size."""
    size = next(len(data) for member, data in _members(file) if member.name == sample_package.ENGINE_PATH)
    _replace_engine(file, _member(sample_package.ENGINE_PATH, b"x" * size))


def long_member(file: Path) -> None:
    """A listed file that is longer than listed."""
    _replace_engine(file, _member(sample_package.ENGINE_PATH, b"x" * 100_000))


def missing_member(file: Path) -> None:
    """A listed file that does not come."""
    _write(file, [item for item in _members(file) if item[0].name != "reports/accuracy.json"])


def renamed_by_header(file: Path) -> None:
    """An extended header that gives a member another path than its plain one."""
    data = next(data for member, data in _members(file) if member.name == sample_package.ENGINE_PATH)
    _replace_engine(file, _member("harmless", data, pax_headers={"path": sample_package.ENGINE_PATH}), form=tarfile.PAX_FORMAT)


def sparse_member(file: Path) -> None:
    """A sparse member, of which 512 bytes become 8 GiB."""
    _replace_engine(file, _member(sample_package.ENGINE_PATH, b"x" * 512, type=tarfile.GNUTYPE_SPARSE))


def endless_name(file: Path) -> None:
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
    """A manifest that comes after what it lists."""
    members = _members(file)
    _write(file, [*members[1:], members[0]])


def huge_manifest(file: Path) -> None:
    """A manifest of 64 GiB, of which all but the first bytes are a hole."""
    header = tarfile.TarInfo(layout.MANIFEST_NAME)
    header.size = 1 << 36
    file.write_bytes(header.tobuf(tarfile.GNU_FORMAT) + b'{"schema_version": 1, ')
    os.truncate(file, 1 << 36)


def bomb(file: Path) -> None:
    """A hole of 4 TiB that is listed as an engine, with its true size."""
    size = 1 << 42
    members = _members(file)
    manifest = json.loads(members[0][1])
    _entry(manifest, sample_package.ENGINE_PATH)["size_bytes"] = size
    data = json.dumps(manifest).encode()
    at = [member.name for member, _ in members].index(sample_package.ENGINE_PATH)
    _write(file, [_member(layout.MANIFEST_NAME, data), *members[1:at]])
    end = sum(512 + -(-len(content) // 512) * 512 for content in (data, *(content for _, content in members[1:at])))
    header = tarfile.TarInfo(sample_package.ENGINE_PATH)
    header.size = size
    file.write_bytes(file.read_bytes()[:end] + header.tobuf(tarfile.GNU_FORMAT))
    os.truncate(file, end + 512 + size + (1 << 20))


def compressed(file: Path) -> None:
    """A compressed tar, which may hold any number of bytes."""
    members = _members(file)
    with tarfile.open(file, "w:gz") as tar:
        for member, data in members:
            tar.addfile(member, io.BytesIO(data))


ON_TARS: tuple[Attack, ...] = (
    climbing_member,
    absolute_member,
    unlisted_member,
    link_member,
    hard_link_member,
    link_then_file,
    device_member,
    folder_member,
    duplicate_member,
    swapped_member,
    long_member,
    missing_member,
    renamed_by_header,
    sparse_member,
    endless_name,
    late_manifest,
    huge_manifest,
    bomb,
    compressed,
)
