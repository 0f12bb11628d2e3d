"""Ahead-of-time compilation of Triton kernels to PTX and cubin, without a GPU; compiled kernels are cached."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import msgspec

from ryzen_compile import registry
from ryzen_compile.artifacts.cache.store import Store
from ryzen_compile.diagnostic import Diagnostic
from ryzen_compile.errors import BackendError, UsageError
from ryzen_compile.kernels.specialization import PTX_VERSIONS, Specialization
from ryzen_compile.kernels.triton_process import INSTALL_HINT, TritonProcess
from ryzen_compile.progress import Progress, SilentProgress
from ryzen_compile.utils.record import Record

_CACHE_KIND = "kernel"
_FORMAT_VERSION = 2
"""Increment when the processing of Triton's output changes."""


class CompiledKernel(Record, frozen=True):
    """A kernel compiled for one compute capability."""

    name: str
    """Name of the entry point."""
    sm: int
    """Compute capability, major * 10 + minor."""
    ptx: str
    """PTX whose parameters are the declared ones: inputs, 32-bit scalars, outputs."""
    cubin: bytes
    """The machine code that ptxas assembles from `ptx`."""
    shared_bytes: int
    """Shared memory per block."""
    threads: int
    """Threads per block."""
    registers: int
    """Registers per thread."""
    spilled_bytes: int
    """Bytes of registers that a thread spills to local memory."""
    hidden: int
    """Number of parameters that Triton appended and that were removed; the kernel does not read them."""
    triton: str
    """The version of Triton that compiled the kernel."""


def compile_all(
    specializations: Sequence[Specialization], sms: Iterable[int], *, store: Store | None, progress: Progress | None = None
) -> dict[tuple[int, int], CompiledKernel]:
    """Compile every specialization for every compute capability; return {(index of the specialization, sm): kernel}.

    Kernels in the cache of `store` are not compiled again. Raises UsageError for an unsupported compute capability, and
    BackendError with the first specialization that fails and the reason.
    """
    targets = [*sms]
    for sm in targets:
        if sm not in PTX_VERSIONS:
            supported = ", ".join(f"sm{version}" for version in PTX_VERSIONS)
            raise UsageError(f"kernels are not compiled for sm{sm}", hint=f"supported: {supported}")
    keys = [(index, sm) for index in range(len(specializations)) for sm in targets]
    kernels = {key: cached for key in keys if (cached := _load_cached(specializations[key[0]], key[1], store)) is not None}
    missing = [key for key in keys if key not in kernels]
    if not missing:
        return kernels
    reporter = progress or SilentProgress()
    with ExitStack() as stack:
        idle: SimpleQueue[TritonProcess] = SimpleQueue()
        count = min(len(missing), os.cpu_count() or 1)
        for _ in range(count):
            idle.put(stack.enter_context(TritonProcess(interpret=False)))

        def compile_one(key: tuple[int, int]) -> CompiledKernel:
            process = idle.get()
            try:
                return _compile(process, specializations[key[0]], key[1])
            finally:
                idle.put(process)

        pool = stack.enter_context(ThreadPoolExecutor(count))
        try:
            for key, compiled in zip(missing, pool.map(compile_one, missing), strict=True):
                message = f"compiled for sm{key[1]}"
                reporter.report(
                    Diagnostic(code="kernel-compiled", severity="info", message=message, location=str(specializations[key[0]]))
                )
                kernels[key] = compiled
                if store is not None:
                    store.cache_result(
                        _CACHE_KIND, kernel_digest(specializations[key[0]], key[1]), msgspec.json.encode(compiled).decode()
                    )
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {key: kernels[key] for key in keys}


def is_compiled(specialization: Specialization, sm: int, store: Store) -> bool:
    """Return whether the cache contains the kernel for `sm`, compiled by the installed version of Triton."""
    return triton_version() is not None and _load_cached(specialization, sm, store) is not None


def triton_version() -> str | None:
    """Return the installed version of Triton, or None."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def _load_cached(specialization: Specialization, sm: int, store: Store | None) -> CompiledKernel | None:
    if store is None or (text := store.cached_result(_CACHE_KIND, kernel_digest(specialization, sm))) is None:
        return None
    try:
        return msgspec.json.decode(text, type=CompiledKernel)
    except msgspec.DecodeError:  # written by another version
        return None


def _compile(process: TritonProcess, specialization: Specialization, sm: int) -> CompiledKernel:
    try:
        answer, _ = process.request(compile_request(specialization, sm))
    except BackendError as error:
        raise BackendError(f"{specialization} cannot be compiled for sm{sm}: {error.message}", hint=error.hint) from error
    return msgspec.convert({"sm": sm, **answer}, CompiledKernel, strict=False)


def compile_request(specialization: Specialization, sm: int) -> dict[str, Any]:
    """Return all inputs of a compilation except for the sources and versions, as the request to `triton_child`."""
    return {
        "source": specialization.kernel.source,
        "parameters": specialization.parameters,
        "constants": specialization.constants,
        "options": specialization.options,
        "multiples": specialization.divisible_by_16,
        "sm": sm,
        "ptx_version": PTX_VERSIONS[sm],
    }


def kernel_digest(specialization: Specialization, sm: int) -> str:
    """Return the digest of all inputs of a compilation, including sources and the version of Triton."""
    if (version := triton_version()) is None:
        raise BackendError("kernels need `triton`, which is not installed", hint=INSTALL_HINT)
    sources = source_digest(specialization.kernel.source.partition(":")[0])
    return hashlib.sha256(
        msgspec.json.encode([_FORMAT_VERSION, version, sources, compile_request(specialization, sm)])
    ).hexdigest()


@functools.cache
def source_digest(*modules: str) -> str:
    """Return a digest of all source files of the packages of `modules`, and of the op packages that these import.

    Everything that a kernel imports from its own package is covered; imports from packages that provide no ops are not.
    """
    texts: dict[str, str] = {}
    visited: set[str] = set()
    pending = [module.partition(".")[0] for module in modules]
    while pending:
        package = pending.pop()
        if package in visited:
            continue
        visited.add(package)
        sources = _read_sources(package)
        texts |= {f"{package}: {name}": text for name, text in sources.items()}
        pending += [
            provider
            for provider in registry.provider_packages("ops")
            if any(_import_pattern(provider).search(text) for text in sources.values())
        ]
    return hashlib.sha256(msgspec.json.encode(sorted(texts.items()))).hexdigest()


def _read_sources(package: str) -> dict[str, str]:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise BackendError(f"`{package}` has no source file", hint="reinstall the package that provides the op")
    files = {Path(spec.origin)}
    for folder in spec.submodule_search_locations or ():
        files |= {*Path(folder).rglob("*.py")}
    return {str(file.relative_to(Path(spec.origin).parent)): file.read_text(encoding="utf-8") for file in files}


def _import_pattern(package: str) -> re.Pattern[str]:
    return re.compile(rf"^\s*(from|import)\s+{re.escape(package)}\b", re.MULTILINE)
