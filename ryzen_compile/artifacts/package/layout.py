"""Where things lie in a package, and which manifests are sound: the rules that its writers and its readers share."""

from __future__ import annotations

import msgspec

from ryzen_compile.artifacts.package.manifest import SCHEMA_VERSION, Manifest
from ryzen_compile.errors import PackageError
from ryzen_compile.utils.files import escape_unprintable, quoted_path

MANIFEST_NAME = "manifest.json"
WEIGHTS_DIR = "graphs/weights"
"""The weight store: every file is named after its sha256. It lies inside of `graphs/`, because ONNX Runtime reads no external
data from outside of the folder that the graph is in."""

MAX_MANIFEST_BYTES = 64 << 20
"""The largest manifest that is read: a hostile one must not fill the memory."""

_MAX_NAME_BYTES = 240


def graph_path(graph: str, variant: str) -> str:
    """Return where the variant of a graph lies: `graphs/model.fp16.onnx`."""
    return f"graphs/{graph}.{variant}.onnx"


def weight_path(sha256: str) -> str:
    """Return where weights lie: `graphs/weights/<sha256>`."""
    return f"{WEIGHTS_DIR}/{sha256}"


def engine_path(graph: str, backend: str, targets: tuple[str, ...]) -> str:
    """Return where an engine lies: `engines/model.tensorrt-rtx-sm86-sm89.plan`."""
    return f"engines/{graph}.{backend}-{'-'.join(targets)}.plan"


def invalid_path_reason(path: str) -> str | None:
    """Return why `path` may not stand in a package, or None.

    What may is the same file on every operating system: relative, with `/`, below the package's folder.
    """
    if path.startswith("/") or path[1:2] == ":":
        return "is absolute"
    for part in path.split("/"):
        if part in ("", ".", ".."):
            return "climbs out of the package" if part == ".." else "is not in its shortest form"
        if any(char in '\\:*?"<>|' or not char.isprintable() for char in part):
            return "holds a character that not every filesystem takes"
        if part.endswith((" ", ".")) or len(part.encode()) > _MAX_NAME_BYTES:
            return "holds a name that not every filesystem takes"
    return "is the manifest's own place" if path.casefold() == MANIFEST_NAME else None


def inconsistency_reason(manifest: Manifest) -> str | None:
    """Return why the manifest contradicts itself, in one sentence, or None."""
    listed: dict[str, str] = {}
    for at, file in enumerate(manifest.files):
        if (why := invalid_path_reason(file.path)) is not None:
            return f"$.files[{at}].path: {quoted_path(file.path)} {why}"
        if listed.setdefault(file.path.casefold(), file.path) != file.path or len(listed) <= at:
            return f"$.files[{at}].path: {quoted_path(file.path)} is listed twice"
        if file.path.startswith(f"{WEIGHTS_DIR}/") and file.path != weight_path(file.sha256):
            return f"$.files[{at}].path: {quoted_path(file.path)} holds weights under another name than their sha256"
    for path in listed:
        for cut, char in enumerate(path):
            if char == "/" and path[:cut] in listed:
                return f"$.files: {quoted_path(listed[path[:cut]])} is both a file and a folder"
    return _dangling_reference(manifest, {file.path for file in manifest.files})


def _dangling_reference(manifest: Manifest, listed_paths: set[str]) -> str | None:
    variants = set()
    for at, graph in enumerate(manifest.graphs):
        for nth, variant in enumerate(graph.variants):
            if (graph.name, variant.name) in variants:
                return f"$.graphs[{at}].variants[{nth}]: `{graph.name}` has two variants `{variant.name}`"
            variants.add((graph.name, variant.name))
            for path in (variant.path, *variant.weights):
                if path not in listed_paths:
                    return f"$.graphs[{at}].variants[{nth}]: {quoted_path(path)} is not among the files"
    for at, engine in enumerate(manifest.engines):
        if engine.path not in listed_paths:
            return f"$.engines[{at}].path: {quoted_path(engine.path)} is not among the files"
        if (engine.graph, engine.variant) not in variants:
            return f"$.engines[{at}]: there is no graph `{engine.graph}` in a variant `{engine.variant}`"
    return None


class _ManifestHeader(msgspec.Struct):
    schema_version: int


def decode(data: bytes, name: str) -> Manifest:
    """Read a manifest; raises PackageError that names the place `name` and what is wrong with it."""
    try:
        version = msgspec.json.decode(data, type=_ManifestHeader).schema_version
        if version != SCHEMA_VERSION:
            raise PackageError(
                f"{name} is a manifest of version {version}, this is ryzen-compile for version {SCHEMA_VERSION}",
                hint="upgrade ryzen-compile" if version > SCHEMA_VERSION else "build the package again",
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PackageError(
            f"{name} is not a manifest: {escape_unprintable(str(error))}", hint="build the package again, or fetch it again"
        ) from error
    if (why := inconsistency_reason(manifest)) is not None:
        raise PackageError(
            f"{name} is not sound: {escape_unprintable(why)}", hint="do not use this package: it was not made by ryzen-compile"
        )
    return manifest


class _FilePath(msgspec.Struct):
    path: str


class _ManifestFileList(msgspec.Struct):
    schema_version: int
    files: list[_FilePath]


def listed_paths(data: bytes, name: str) -> set[str]:
    """Return the paths that a manifest of any version lists; raises PackageError where `data` is none."""
    try:
        return {file.path for file in msgspec.json.decode(data, type=_ManifestFileList).files}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PackageError(f"{name} is not a manifest: {escape_unprintable(str(error))}") from error


def encode(manifest: Manifest) -> bytes:
    """Return the manifest as JSON that `decode` reads back to the same; raises PackageError where it could not.

    Equal manifests give equal bytes.
    """
    read_back = decode(msgspec.json.encode(manifest), MANIFEST_NAME)
    if read_back != manifest:
        raise PackageError("the manifest does not read back as it was written", hint="report it: a record has lost something")
    # A number that was 0 where 0.0 may stand is 0.0 from here on.
    data = msgspec.json.format(msgspec.json.encode(read_back), indent=2) + b"\n"
    if len(data) > MAX_MANIFEST_BYTES:
        raise PackageError(f"the manifest would take {len(data)} bytes, at most {MAX_MANIFEST_BYTES} are read")
    return data
