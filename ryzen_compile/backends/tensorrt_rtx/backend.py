"""TensorRT for RTX: engines for several RTX GPUs in one plan, built without any of them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from ryzen_compile.backends.api import BuildRequest
from ryzen_compile.backends.nvinfer.backend import NvinferBackend
from ryzen_compile.backends.nvinfer.builder import NvinferBuilder
from ryzen_compile.utils.atomic_file import write_atomic

_MODULES = ("tensorrt_rtx_bindings", "tensorrt_rtx_libs")
_DISTRIBUTIONS = ("tensorrt_rtx_cu13_bindings", "tensorrt_rtx_cu12_bindings")


class TensorRTRTX(NvinferBackend):
    """The backend `tensorrt-rtx`."""

    name = "tensorrt-rtx"
    product = "TensorRT-RTX"
    modules = ("tensorrt_rtx_bindings",)
    builder_entry_point = "ryzen_compile.backends.tensorrt_rtx.backend:TensorRTRTXBuilder"
    install_hint = "pip install 'ryzen-compile[rtx]'"
    not_executed = (
        "loading and running an engine: it needs an NVIDIA driver",
        "the cache of kernels that it compiles on the user's GPU",
        "the engine inspector: the report on layers comes from the builder's log",
        "building for Windows: the library for Linux refuses it where there is no driver",
    )

    def installed_version(self) -> str:
        """Return the version that is installed, without loading the library: that would cost the caller 100 MB."""
        here = [name for name in _MODULES if importlib.util.find_spec(name)]
        if here != list(_MODULES):
            raise self.not_available("it is not installed" if not here else f"only {here[0]} is installed")
        return next((str(found.version) for name in _DISTRIBUTIONS for found in distributions(name=name)), "unknown")

    def sms(self) -> tuple[int, ...]:
        """Return what its enum ComputeCapability lists, as of 1.7."""
        return (75, 80, 86, 89, 120, 121)

    def describe_support(self, sms: tuple[int, ...]) -> str:
        """Return what it can do here."""
        return "builds for RTX GPUs, several in one plan, without any of them"

    def create_execution_context(self, engine: Any, cache_dir: Path | None) -> tuple[Any, Callable[[], None]]:
        """Make a context that keeps the kernels it compiles for this GPU in `folder`, where that can be read and written."""
        runtime_config = engine.create_runtime_config()
        if cache_dir is None:
            return engine.create_execution_context(runtime_config), lambda: None
        runtime_cache = runtime_config.create_runtime_cache()
        file = cache_dir / "kernels.tensorrt-rtx"
        with suppress(OSError):  # deserialize: false where it comes from another GPU or version, and it starts empty then
            runtime_cache.deserialize(file.read_bytes())
        runtime_config.set_runtime_cache(runtime_cache)

        def keep() -> None:
            """Write the kernels; a folder that cannot be written is left as it is: they are compiled again next time."""
            with suppress(OSError):
                cache_dir.mkdir(parents=True, exist_ok=True)
                write_atomic(file, bytes(memoryview(runtime_cache.serialize())))

        return engine.create_execution_context(runtime_config), keep


BACKEND = TensorRTRTX()


class TensorRTRTXBuilder(NvinferBuilder):
    """Aims at compute capabilities, whether or not such a GPU is here."""

    backend = BACKEND

    def configure_targets(self, config: Any, request: BuildRequest) -> None:
        """List the compute capabilities, and the operating system."""
        sms = sorted({target.sm for target in request.targets if target.sm is not None})
        config.num_compute_capabilities = len(sms)
        for at, sm in enumerate(sms):
            config.set_compute_capability(getattr(self.trt.ComputeCapability, f"SM{sm}"), at)
        if request.targets[0].os == "windows":
            config.runtime_platform = self.trt.RuntimePlatform.WINDOWS_AMD64
