"""Kernels ahead of time: PTX and cubin for any GPU, on a machine that has none, kept in the cache."""

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
from ryzen_compile.errors import BackendError, UsageError
from ryzen_compile.kernels.specialization import PTX_VERSIONS, Specialization
from ryzen_compile.kernels.triton_process import INSTALL_HINT, TritonProcess
from ryzen_compile.progress import Progress, SilentProgress
from ryzen_compile.utils.record import Record

_CACHE_KIND = "kernel"
_FORMAT_VERSION = 2
"""Changes when what is done to a kernel after Triton changes."""


class CompiledKernel(Record, frozen=True):
    """A kernel that a GPU can run."""

    name: str
    """Of the entry."""
    sm: int
    ptx: str
    """Its parameters are the declared ones: inputs, 32-bit scalars, outputs."""
    cubin: bytes
    """What ptxas makes of `ptx`."""
    shared_bytes: int
    threads: int
    """In a block."""
    registers: int
    """Of a thread."""
    spilled_bytes: int
    """What a thread keeps in memory because its registers do not hold it."""
    hidden: int
    """How many parameters Triton had appended; the kernel reads none of them and they are gone."""
    triton: str
    """The version that compiled it."""


def compile_all(
    specializations: Sequence[Specialization], sms: Iterable[int], *, store: Store | None, progress: Progress | None = None
) -> dict[tuple[int, int], CompiledKernel]:
    """Compile every instance for every compute capability, as {(index of the instance, sm): the kernel}.

    What the cache has is taken from there. Raises BackendError that names the first instance that fails, and why.
    """
    targets = [*sms]
    for sm in targets:
        if sm not in PTX_VERSIONS:
            known = ", ".join(f"sm{one}" for one in PTX_VERSIONS)
            raise UsageError(f"kernels are not compiled for sm{sm}", hint=f"known are: {known}")
    wanted = [(index, sm) for index in range(len(specializations)) for sm in targets]
    found = {at: kept for at in wanted if (kept := _load_cached(specializations[at[0]], at[1], store)) is not None}
    missing = [at for at in wanted if at not in found]
    if not missing:
        return found
    told = progress or SilentProgress()
    with ExitStack() as stack:
        idle: SimpleQueue[TritonProcess] = SimpleQueue()
        count = min(len(missing), os.cpu_count() or 1)
        for _ in range(count):
            idle.put(stack.enter_context(TritonProcess(interpret=False)))

        def work(at: tuple[int, int]) -> CompiledKernel:
            child = idle.get()
            try:
                return _compile(child, specializations[at[0]], at[1])
            finally:
                idle.put(child)

        pool = stack.enter_context(ThreadPoolExecutor(count))
        try:
            for at, compiled in zip(missing, pool.map(work, missing), strict=True):
                told.message(f"{specializations[at[0]]} for sm{at[1]}")
                found[at] = compiled
                if store is not None:
                    store.cache_result(
                        _CACHE_KIND, kernel_digest(specializations[at[0]], at[1]), msgspec.json.encode(compiled).decode()
                    )
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {at: found[at] for at in wanted}


def is_compiled(specialization: Specialization, sm: int, store: Store) -> bool:
    """Tell whether the cache has the instance for `sm`, as the Triton that is installed would compile it."""
    return triton_version() is not None and _load_cached(specialization, sm, store) is not None


def triton_version() -> str | None:
    """Return the version of Triton that is installed, or None."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def _load_cached(specialization: Specialization, sm: int, store: Store | None) -> CompiledKernel | None:
    if store is None or (text := store.cached_result(_CACHE_KIND, kernel_digest(specialization, sm))) is None:
        return None
    try:
        return msgspec.json.decode(text, type=CompiledKernel)
    except msgspec.DecodeError:  # of another version
        return None


def _compile(process: TritonProcess, specialization: Specialization, sm: int) -> CompiledKernel:
    try:
        answer, _ = process.request(compile_request(specialization, sm))
    except BackendError as error:
        raise BackendError(f"{specialization} cannot be compiled for sm{sm}: {error.message}", hint=error.hint) from error
    return msgspec.convert({"sm": sm, **answer}, CompiledKernel, strict=False)


def compile_request(specialization: Specialization, sm: int) -> dict[str, Any]:
    """Return all that decides what is compiled, but for sources and versions."""
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
    """Return the digest of all that decides what is compiled."""
    if (version := triton_version()) is None:
        raise BackendError("kernels need `triton`, which is not installed", hint=INSTALL_HINT)
    sources = source_digest(specialization.kernel.source.partition(":")[0])
    return hashlib.sha256(
        msgspec.json.encode([_FORMAT_VERSION, version, sources, compile_request(specialization, sm)])
    ).hexdigest()


@functools.cache
def source_digest(*modules: str) -> str:
    """Return a digest of every source file of the packages that `modules` are of, and of the other packages of ops they name.

    Whatever a kernel imports of its own is in it. What it imports of a package that offers no ops is not.
    """
    texts: dict[str, str] = {}
    done: set[str] = set()
    waiting = [module.partition(".")[0] for module in modules]
    while waiting:
        package = waiting.pop()
        if package in done:
            continue
        done.add(package)
        found = _read_sources(package)
        texts |= {f"{package}: {name}": text for name, text in found.items()}
        waiting += [
            room
            for room in registry.provider_packages("ops")
            if any(_import_pattern(room).search(text) for text in found.values())
        ]
    return hashlib.sha256(msgspec.json.encode(sorted(texts.items()))).hexdigest()


def _read_sources(package: str) -> dict[str, str]:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise BackendError(f"`{package}` has no source file", hint="install the package of the op again")
    files = {Path(spec.origin)}
    for folder in spec.submodule_search_locations or ():
        files |= {*Path(folder).rglob("*.py")}
    return {str(file.relative_to(Path(spec.origin).parent)): file.read_text(encoding="utf-8") for file in files}


def _import_pattern(package: str) -> re.Pattern[str]:
    return re.compile(rf"^\s*(from|import)\s+{re.escape(package)}\b", re.MULTILINE)
