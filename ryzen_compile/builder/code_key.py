"""The part of a job's key that is the code which makes its result: this tool, the passes, the backends and libraries."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from ryzen_compile import registry
from ryzen_compile.artifacts.package.manifest import SCHEMA_VERSION
from ryzen_compile.backends.traits import find_traits, portable_backend
from ryzen_compile.ops.digest import all_ops_digest
from ryzen_compile.utils.record import Record
from ryzen_compile.utils.source_digest import package_digest, package_of

if TYPE_CHECKING:
    from ryzen_compile.spec.passes import Pass

NOT_USED_BY_BUILDS = frozenset({"api.py", "cli", "report", "evaluation", "exporter", "runtime"})
"""Parts of `ryzen_compile` that do not influence a package."""
NOT_USED_BY_ENGINES = NOT_USED_BY_BUILDS | {"numerics", "torch_module.py"}
_GRAPH_LIBRARIES = ("numpy", "onnx", "onnx-ir", "onnxscript")
"""Distributions that read, evaluate and write graphs, in addition to those of the portable backend."""


class CodeKey(Record, frozen=True):
    """The code that makes a result."""

    tool: str
    ops: str
    """A digest of all registered custom ops."""
    packages: dict[str, str]
    """{package: digest of its files}: this tool, and the packages that define the passes and the backends."""
    libraries: dict[str, str]
    """{distribution: version} of the libraries that read, evaluate and write graphs."""


def code_key(
    passes: Iterable[Pass] = (), backends: Iterable[str] = (), *, exclude: frozenset[str] = NOT_USED_BY_ENGINES
) -> CodeKey:
    """Return the key of the code that rewrites and builds graphs.

    It covers this tool, the packages of `passes` and of the backends called `backends`, and libraries. `exclude` holds the
    files and folders of this tool that do not influence the result.
    """
    values = [*passes, *map(registry.find_backend, backends)]
    classes = {cls for value in values for cls in type(value).__mro__}
    packages = {_package_of(cls.__module__) for cls in classes} - {"ryzen_compile"}
    external = sorted(package for package in packages if package not in sys.stdlib_module_names)
    return CodeKey(
        tool=tool_version(),
        ops=all_ops_digest(),
        packages={
            "ryzen_compile": package_digest("ryzen_compile", exclude=exclude),
            **{package: package_digest(package) for package in external},
        },
        libraries=_library_versions(),
    )


_package_of = functools.cache(package_of)


@functools.cache
def _library_versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in (*_GRAPH_LIBRARIES, *find_traits(portable_backend()).distributions):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def tool_version() -> str:
    """Return the version of this tool and of the manifest format that it writes."""
    from importlib.metadata import version

    return f"ryzen-compile {version('ryzen-compile')}, manifest {SCHEMA_VERSION}"
