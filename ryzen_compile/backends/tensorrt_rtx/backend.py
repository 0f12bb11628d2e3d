"""The backend `tensorrt-rtx`: TensorRT-RTX builds one plan for several RTX GPUs, ahead of time without a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from ryzen_compile.backends.nvinfer.base_backend import NvinferBackend, nvinfer_traits
from ryzen_compile.backends.traits import BackendPackage
from ryzen_compile.utils.atomic_file import write_atomic

_MODULES = ("tensorrt_rtx_bindings", "tensorrt_rtx_libs")
_SMS = (75, 80, 86, 89, 120, 121)
"""The compute capabilities listed by the enum `ComputeCapability` of version 1.7."""
_DISTRIBUTIONS = ("tensorrt_rtx_cu13_bindings", "tensorrt_rtx_cu12_bindings")


class TensorRTRTX(NvinferBackend):
    """The backend `tensorrt-rtx`, on TensorRT-RTX."""

    name = "tensorrt-rtx"
    traits = nvinfer_traits(
        name="tensorrt-rtx",
        priority=10,
        ahead_of_time_sms=_SMS,
        packages=tuple(
            BackendPackage(distribution=distribution, module=module, purpose="--gpu sm75 to sm121 (RTX)")
            for distribution, module in (
                ("tensorrt_rtx_cu13_bindings", "tensorrt_rtx_bindings"),
                ("tensorrt_rtx_cu13_libs", "tensorrt_rtx_libs"),
            )
        ),
    )
    product = "TensorRT-RTX"
    modules = ("tensorrt_rtx_bindings",)
    builder_entry_point = "ryzen_compile.backends.tensorrt_rtx.builder:TensorRTRTXBuilder"
    install_hint = "pip install 'ryzen-compile[rtx]'"
    not_executed = (
        "loading and running an engine, which needs an NVIDIA driver",
        "the cache of kernels that are compiled on the user's GPU",
        "the engine inspector: the layer report comes from the builder log",
        "building for Windows, which the library for Linux rejects without a driver",
    )

    def installed_version(self) -> str:
        """Return the installed version without loading the library, which takes 100 MB of memory. Raises BackendError."""
        installed = [name for name in _MODULES if importlib.util.find_spec(name)]
        if installed != list(_MODULES):
            raise self.not_available("it is not installed" if not installed else f"only {installed[0]} is installed")
        versions = (str(distribution.version) for name in _DISTRIBUTIONS for distribution in distributions(name=name))
        return next(versions, "unknown")

    def sms(self) -> tuple[int, ...]:
        """Return the compute capabilities that the library builds for on every machine."""
        return _SMS

    def describe_support(self, sms: tuple[int, ...]) -> str:
        """Return one sentence on what the backend can do on this machine."""
        return "builds one plan for several RTX GPUs, without a GPU"

    def create_execution_context(self, engine: Any, cache_dir: Path | None) -> tuple[Any, Callable[[], None]]:
        """Return a context that caches the kernels it compiles in `cache_dir`, and a function that saves them.

        A cache that cannot be read or written is ignored: the kernels are compiled again.
        """
        runtime_config = engine.create_runtime_config()
        if cache_dir is None:
            return engine.create_execution_context(runtime_config), lambda: None
        runtime_cache = runtime_config.create_runtime_cache()
        file = cache_dir / "kernels.tensorrt-rtx"
        with suppress(OSError):  # deserialize returns False for a cache of another GPU or version; the cache is empty then
            runtime_cache.deserialize(file.read_bytes())
        runtime_config.set_runtime_cache(runtime_cache)

        def save_kernels() -> None:
            with suppress(OSError):
                cache_dir.mkdir(parents=True, exist_ok=True)
                write_atomic(file, bytes(memoryview(runtime_cache.serialize())))

        return engine.create_execution_context(runtime_config), save_kernels


BACKEND = TensorRTRTX()
