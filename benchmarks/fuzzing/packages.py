"""Mutated packages and packed packages, and the commands that read them.

A mutated file has the right digest and size in the manifest in half of the cases, so that the code behind the checks runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

from fuzzing.models import mutate_model
from fuzzing.runner import FuzzCase
from fuzzing.sources import NAMES, packages
from fuzzing.values import hostile_json, mutate_bytes, mutate_json

_MANIFEST = "manifest.json"
_COMMANDS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("run", "m.ryzen"), ()),
    (("run", "m.ryzen", "--save-outputs", "o.npz"), ("o.npz",)),
    (("inspect", "m.ryzen"), ()),
    (("inspect", "m.ryzen", "--json"), ()),
    (("inspect", "m.ryzen", "--kv"), ()),
    (("verify", "m.ryzen"), ()),
    (("verify", "m.ryzen", "--baseline", "source.onnx"), ()),
    (("compare", "m.ryzen", "--baseline", "source.onnx"), ()),
    (("bench", "m.ryzen", "--duration", "0.05"), ()),
    (("pack", "m.ryzen", "o.tar"), ("o.tar",)),
    (("build", "source.onnx", "-o", "m.ryzen", "--gpu", "cpu", "--no-cache", "-q"), ("m.rejected.ryzen",)),
)
_TAR_COMMANDS = (("unpack", "m.tar", "o.ryzen"), ("inspect", "m.tar"), ("run", "m.tar"))


def make_case(rng: random.Random) -> FuzzCase:
    """Return a command on a mutated package, or on a mutated tar in a third of the cases."""
    name = rng.choice(NAMES)
    return _tar_case(name, rng) if rng.random() < 0.33 else _folder_case(name, rng)


def _folder_case(name: str, rng: random.Random) -> FuzzCase:
    arguments, outputs = rng.choice(_COMMANDS)
    kinds = [
        rng.choice(("manifest", "manifest", "manifest", "graph", "graph", "bytes", "place"))
        for _ in range(rng.choice((1, 1, 2)))
    ]
    seed = rng.getrandbits(64)

    def make_files(folder: Path) -> None:
        package = folder / "m.ryzen"
        shutil.copytree(packages() / f"{name}.ryzen", package)
        shutil.copy(packages() / f"{name}.onnx", folder / "source.onnx")
        changes = random.Random(seed)
        for kind in kinds:
            _mutate_package(package, kind, changes)

    return FuzzCase(
        arguments=arguments, outputs=("m.ryzen", *outputs), note=f"{name}: {', '.join(kinds)}", make_files=make_files
    )


def _tar_case(name: str, rng: random.Random) -> FuzzCase:
    content = (packages() / f"{name}.tar").read_bytes()
    count = rng.choice((1, 1, 2, 4))
    for _ in range(count):
        if rng.random() < 0.5:
            content = mutate_bytes(content, rng)
        else:  # in the header of a member
            start = rng.randrange(max(1, len(content) // 512)) * 512
            content = (
                content[:start]
                + mutate_bytes(content[start : start + 512], rng)[:512].ljust(512, b"\0")
                + content[start + 512 :]
            )

    def make_files(folder: Path) -> None:
        (folder / "m.tar").write_bytes(content)

    return FuzzCase(
        arguments=rng.choice(_TAR_COMMANDS), outputs=("o.ryzen",), note=f"{name}.tar x{count}", make_files=make_files
    )


def _mutate_package(package: Path, kind: str, rng: random.Random) -> None:
    files = sorted(path for path in package.rglob("*") if path.is_file() and not path.is_symlink())
    manifest = package / _MANIFEST
    if not manifest.is_file():
        return
    if kind == "manifest":
        _mutate_manifest(manifest, rng)
    elif kind == "graph":
        graphs = [path for path in files if path.suffix == ".onnx"]
        if graphs:
            graph = rng.choice(graphs)
            graph.write_bytes(mutate_model(graph.read_bytes(), rng)[0])
            _update_digest(package, graph)
    elif kind == "bytes":
        path = rng.choice(files)
        path.write_bytes(mutate_bytes(path.read_bytes(), rng))
        if rng.random() < 0.5:
            _update_digest(package, path)
    else:
        _misplace(rng.choice(files), rng)


def _mutate_manifest(manifest: Path, rng: random.Random) -> None:
    try:
        document: Any = json.loads(manifest.read_bytes())
    except ValueError:
        return
    for _ in range(rng.choice((1, 1, 2, 5))):
        document = mutate_json(document, rng)
    if rng.random() < 0.03:
        document = hostile_json(rng)
    manifest.write_text(json.dumps(document), encoding="utf-8", errors="surrogatepass")


def _update_digest(package: Path, path: Path) -> None:
    """Write the digest and the size of a file to the manifest."""
    manifest = package / _MANIFEST
    try:
        document = json.loads(manifest.read_bytes())
        entries = [entry for entry in document["files"] if entry["path"] == path.relative_to(package).as_posix()]
    except (ValueError, KeyError, TypeError):
        return  # an earlier mutation damaged the manifest
    for entry in entries:
        entry["sha256"], entry["size_bytes"] = hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size
    manifest.write_text(json.dumps(document), encoding="utf-8", errors="surrogatepass")


def _misplace(path: Path, rng: random.Random) -> None:
    """Remove a file, or put something else in its place."""
    kind = rng.choice(("remove", "empty", "link", "dangling", "pipe", "folder", "hole", "rename", "unreadable"))
    content = path.read_bytes()
    if kind == "rename":
        path.rename(path.with_name("other"))
        return
    if kind == "unreadable":
        path.chmod(0)
        return
    path.unlink()
    if kind == "empty":
        path.touch()
    elif kind == "link":
        path.with_name("target").write_bytes(content)
        path.symlink_to("target")
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "hole":
        path.touch()
        os.truncate(path, rng.choice((1, 1 << 20, 1 << 40)))
