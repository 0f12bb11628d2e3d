"""The layout of a package and the consistency rules of a manifest, shared by the writer and the reader."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import msgspec

from ryzen_compile.artifacts.package.manifest import SCHEMA_VERSION, GraphRecord, Manifest
from ryzen_compile.errors import PackageError
from ryzen_compile.spec.interface import Interface, find_interface_problem
from ryzen_compile.spec.profile import Profile, find_profile_problem
from ryzen_compile.utils.files import escape_unprintable, quoted_path

MANIFEST_NAME = "manifest.json"
WEIGHTS_DIR = "graphs/weights"
"""The weight store, in which every file is named by its sha256. It is inside `graphs/` because ONNX Runtime does not read
external data from outside the graph's folder."""

TEXT_DIR = "text"
"""The folder of the tokenizer's files."""

MIN_WEIGHT_FILE_BYTES = 4096
"""Weights of at least this size are files of the weight store; smaller ones are stored in the graph's file."""

MAX_MANIFEST_BYTES = 64 << 20
"""The maximum size of a manifest, which bounds the memory that a malicious one can use."""

_MAX_NAME_BYTES = 240
_MAX_TARGETS_LENGTH = 52
_VARIANT_NAME = re.compile(r"[a-z0-9][a-z0-9+._~-]*")


def graph_path(graph: str, variant: str, backend: str | None = None) -> str:
    """Return the path of a variant of a graph: `graphs/model.fold+attention.onnx`.

    With `backend`: `graphs/model.fold+attention@tensorrt-rtx.onnx`, for a variant of the same name as one of another backend
    with another result. Different arguments have different paths, as graph names have no period and variant names no `@`.
    """
    return f"graphs/{graph}.{variant}{f'@{backend}' if backend else ''}.onnx"


def weight_path(sha256: str) -> str:
    """Return the path of a weight file: `graphs/weights/<sha256>`."""
    return f"{WEIGHTS_DIR}/{sha256}"


def text_path(name: str) -> str:
    """Return the path of a file of the tokenizer: `text/tokenizer.json`."""
    return f"{TEXT_DIR}/{name}"


def engine_path(graph: str, variant: str, backend: str, targets: tuple[str, ...]) -> str:
    """Return the path of an engine: `engines/model.fold+attention@tensorrt-rtx.sm86-sm89.plan`.

    A long list of targets is abbreviated, with a digest of the whole list.
    """
    target_names = "-".join(targets)
    if len(target_names) > _MAX_TARGETS_LENGTH:
        digest = hashlib.sha256(target_names.encode()).hexdigest()[:12]
        target_names = f"{target_names[: _MAX_TARGETS_LENGTH - 13].rstrip('-')}~{digest}"
    return f"engines/{graph}.{variant}@{backend}.{target_names}.plan"


def invalid_path_reason(path: str) -> str | None:
    """Return why `path` is not allowed in a package, or None if it is.

    An allowed path denotes the same file on every operating system: relative, with `/` as separator, inside the package.
    """
    if path.startswith("/") or path[1:2] == ":":
        return "is absolute"  # C: is a drive of Windows
    for part in path.split("/"):
        if part in ("", ".", ".."):
            return "contains `..`" if part == ".." else "is not normalized"
        if any(char in '\\:*?"<>|' or not char.isprintable() for char in part):
            return "contains a character that some filesystems do not support"
        if part.endswith((" ", ".")) or len(part.encode()) > _MAX_NAME_BYTES:
            return "contains a name that some filesystems do not support"
    return "is the path of the manifest" if path.casefold() == MANIFEST_NAME else None


def inconsistency_reason(manifest: Manifest) -> str | None:
    """Return the first inconsistency of the manifest as one sentence, or None."""
    paths_by_casefold: dict[str, str] = {}
    for index, file in enumerate(manifest.files):
        if (reason := invalid_path_reason(file.path)) is not None:
            return f"$.files[{index}].path: {quoted_path(file.path)} {reason}"
        if paths_by_casefold.setdefault(file.path.casefold(), file.path) != file.path or len(paths_by_casefold) <= index:
            return f"$.files[{index}].path: {quoted_path(file.path)} is listed twice"
        if file.path.startswith(f"{WEIGHTS_DIR}/") and file.path != weight_path(file.sha256):
            return f"$.files[{index}].path: {quoted_path(file.path)} is a weight file that is not named by its sha256"
    for path in paths_by_casefold:
        for position, char in enumerate(path):
            if char == "/" and path[:position] in paths_by_casefold:
                return f"$.files: {quoted_path(paths_by_casefold[path[:position]])} is both a file and a folder"
    return _dangling_reference(manifest, {file.path for file in manifest.files})


def _dangling_reference(manifest: Manifest, listed_paths: set[str]) -> str | None:
    variants = set()
    for index, graph in enumerate(manifest.graphs):
        for variant_index, variant in enumerate(graph.variants):
            if not _VARIANT_NAME.fullmatch(variant.name):
                return f"$.graphs[{index}].variants[{variant_index}].name: `{variant.name}` is not the id of a pipeline"
            if (graph.name, variant.name, variant.backend) in variants:
                return (
                    f"$.graphs[{index}].variants[{variant_index}]: "
                    f"`{graph.name}` has two variants `{variant.name}` for {variant.backend}"
                )
            variants.add((graph.name, variant.name, variant.backend))
            for path in (variant.path, *variant.weights):
                if path not in listed_paths:
                    return f"$.graphs[{index}].variants[{variant_index}]: {quoted_path(path)} is not listed in $.files"
        if (problem := _graph_problem(graph)) is not None:
            return f"$.graphs[{index}]: {problem}"
    for index, path in enumerate(manifest.text_files):
        if path not in listed_paths or not path.startswith(f"{TEXT_DIR}/"):
            return f"$.text_files[{index}]: {quoted_path(path)} is not listed in $.files below {TEXT_DIR}/"
    for index, engine in enumerate(manifest.engines):
        if engine.path not in listed_paths:
            return f"$.engines[{index}].path: {quoted_path(engine.path)} is not listed in $.files"
        if (engine.graph, engine.variant, engine.backend) not in variants:
            return f"$.engines[{index}]: `{engine.graph}` has no variant `{engine.variant}` for {engine.backend}"
        if (problem := _profiles_problem(engine.profiles, manifest.graph(engine.graph).interface)) is not None:
            return f"$.engines[{index}].profiles: {problem}"
    return None


def _graph_problem(graph: GraphRecord) -> str | None:
    return find_interface_problem(graph.interface) or _profiles_problem(graph.profiles, graph.interface)


def _profiles_problem(profiles: Sequence[Profile], interface: Interface) -> str | None:
    if not profiles:
        return "there is no profile"
    return next((problem for profile in profiles if (problem := find_profile_problem(profile, interface)) is not None), None)


class _ManifestHeader(msgspec.Struct):
    schema_version: int


def decode(data: bytes, name: str) -> Manifest:
    """Decode and validate a manifest.

    Raises:
        PackageError: The manifest has another schema version, is invalid or is inconsistent; the message begins with `name`.
    """
    try:
        version = msgspec.json.decode(data, type=_ManifestHeader).schema_version
        if version != SCHEMA_VERSION:
            raise PackageError(
                f"{name} has manifest schema version {version}, but this ryzen-compile supports version {SCHEMA_VERSION}",
                hint="upgrade ryzen-compile" if version > SCHEMA_VERSION else "build the package again",
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PackageError(
            f"{name} is not a valid manifest: {escape_unprintable(str(error))}",
            hint="build the package again, or download it again",
        ) from error
    if (reason := inconsistency_reason(manifest)) is not None:
        raise PackageError(
            f"{name} is inconsistent: {escape_unprintable(reason)}",
            hint="do not use this package: ryzen-compile does not write such manifests",
        )
    return manifest


class _FilePath(msgspec.Struct):
    path: str


class _ManifestFileList(msgspec.Struct):
    schema_version: int
    files: list[_FilePath]


def listed_paths(data: bytes, name: str) -> set[str]:
    """Return the paths that a manifest of any schema version lists; raises PackageError if `data` is not a manifest."""
    try:
        return {file.path for file in msgspec.json.decode(data, type=_ManifestFileList).files}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PackageError(f"{name} is not a valid manifest: {escape_unprintable(str(error))}") from error


def encode(manifest: Manifest) -> bytes:
    """Return the manifest as JSON from which `decode` restores it; equal manifests give equal bytes.

    Raises:
        PackageError: The manifest is inconsistent, too large, or cannot be restored from its JSON.
    """
    read_back = decode(msgspec.json.encode(manifest), MANIFEST_NAME)
    if read_back != manifest:
        raise PackageError(
            "the manifest differs after encoding and decoding", hint="report a bug: a record of the manifest lost data"
        )
    # Encoding the decoded manifest makes an integer in a float field a float, so that equal manifests give equal bytes.
    data = msgspec.json.format(msgspec.json.encode(read_back), indent=2) + b"\n"
    if len(data) > MAX_MANIFEST_BYTES:
        raise PackageError(f"the manifest has {len(data)} bytes, more than the limit of {MAX_MANIFEST_BYTES} bytes")
    return data
