"""Digests of ops, for cache keys and for the records of their verification."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from ryzen_compile import registry
from ryzen_compile.backends.traits import find_traits, portable_backend
from ryzen_compile.kernels.aot import source_digest

if TYPE_CHECKING:
    from ryzen_compile.spec.op import Op

_FORMAT_VERSION = 2
"""Increment when the checks change."""


@functools.cache
def all_ops_digest() -> str:
    """Return a digest of all registered ops, for cache keys of graphs that may contain custom ops.

    It is computed once per process.
    """
    return hashlib.sha256(repr([op_digest(op) for op in registry.ops().values()]).encode()).hexdigest()[:16]


def op_digest(op: Op) -> str:
    """Return a digest of the op's package, its declaration, and the versions of the packages that run its implementations."""
    sources = [op.reference.partition(":")[0], *([op.kernel.source.partition(":")[0]] if op.kernel else [])]
    return hashlib.sha256(
        repr((_FORMAT_VERSION, str(op), op.version, library_versions(), source_digest(*sources))).encode()
    ).hexdigest()


@functools.cache
def library_versions() -> Mapping[str, str]:
    """Return the versions of the installed packages that run the implementations of ops."""
    versions = {}
    for name in ("triton", "torch", *find_traits(portable_backend()).distributions):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
