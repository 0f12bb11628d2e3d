"""Digests of source files: cache keys contain them, so that a change of code is a change of the key."""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from ryzen_compile.errors import RyzenError


@functools.cache
def package_digest(package: str, *, exclude: frozenset[str] = frozenset()) -> str:
    """Return a digest of all files of a package or a single module, in 16 hex digits, without importing it.

    `package` may be below a namespace package: `company.passes`. `exclude` holds files and folders relative to the package's
    folder: `cli`, `report/text.py`. The digest covers data files, but not compiled Python files and hidden files. It is
    computed once per process. Raises RyzenError if the package has no files.
    """
    files: dict[str, Path] = {}
    for location in _locations(package):
        for path in _files_below(location):
            name = path.relative_to(location).as_posix()
            if not any(name == excluded or name.startswith(f"{excluded}/") for excluded in exclude):
                files[name] = path
    return _digest(files)


@functools.cache
def module_digest(module: str) -> str:
    """Return a digest of `module` and of all modules that it imports from its own top-level package, in 16 hex digits.

    A module is covered with the data files in its folder, a package with all files below its folder. Imports are read from the
    `import` statements of the sources and followed at any depth; no module is imported. The digest is computed once per
    process. Raises RyzenError if the top-level package has no files.
    """
    top_level = module.partition(".")[0]
    files: dict[str, Path] = {}
    for location in _locations(top_level):
        pending, visited = [module], set()
        while pending:
            name = pending.pop()
            if name in visited or name.partition(".")[0] != top_level:
                continue
            visited.add(name)
            for path in _module_files(location, name):
                relative_path = path.relative_to(location)
                files[relative_path.as_posix()] = path
                if path.suffix == ".py":
                    pending += _imported_names(path, ".".join((top_level, *relative_path.parent.parts)))
    return _digest(files)


def package_of(module: str) -> str:
    """Return the outermost package that contains `module` and is not a namespace package.

    It is `company.passes` for `company.passes.prune` if `company` is a namespace package.
    """
    parts = module.split(".")
    packages = [".".join(parts[: count + 1]) for count in range(len(parts))]
    for package in packages[:-1]:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            return package
    return module


def _locations(package: str) -> list[Path]:
    """Return the folders of a package, or the file of a single module."""
    spec = importlib.util.find_spec(package)
    if spec is not None and spec.submodule_search_locations:
        return [Path(folder) for folder in spec.submodule_search_locations]
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise RyzenError(f"the source files of `{package}` cannot be found", hint="reinstall the package that contains them")
    return [Path(spec.origin)]


def _files_below(location: Path) -> Iterator[Path]:
    if location.is_file():
        yield location
        return
    for folder, subfolders, names in os.walk(location):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name != "__pycache__"]
        yield from (Path(folder, name) for name in names if _is_source_or_data(name))


def _is_source_or_data(name: str) -> bool:
    return not name.startswith(".") and not name.endswith(".pyc")


def _module_files(location: Path, module: str) -> Iterator[Path]:
    """Yield the files of `module`, which may also be the name of a module's attribute, and of the packages that contain it."""
    parts = module.split(".")[1:]
    if location.is_file():
        yield location
        return
    for count in range(len(parts)):
        init_file = location.joinpath(*parts[:count], "__init__.py")
        if init_file.is_file():
            yield init_file
    path = location.joinpath(*parts)
    if parts and path.is_dir():
        yield from _files_below(path)
        return
    for count in (len(parts), len(parts) - 1):
        source = location.joinpath(*parts[:count]).with_suffix(".py")
        if count > 0 and source.is_file():
            yield source
            yield from (
                file
                for file in source.parent.iterdir()
                if file.is_file() and file.suffix != ".py" and _is_source_or_data(file.name)
            )
            return


def _imported_names(path: Path, package: str) -> Iterator[str]:
    """Yield the names of the modules, and of the attributes of modules, that a source file of `package` imports."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            source = ".".join([*base, node.module] if node.module else base)
            yield from (f"{source}.{alias.name}" for alias in node.names)


def _digest(files: dict[str, Path]) -> str:
    import blake3

    digest = blake3.blake3()
    for name, path in sorted(files.items()):
        content = path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:16]
