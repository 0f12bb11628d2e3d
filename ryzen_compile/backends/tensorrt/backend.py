"""The backend `tensorrt`: TensorRT builds for the data-center GPU of this machine, whose kernels it times during the build."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from ryzen_compile import registry
from ryzen_compile.artifacts.cache.store import Store
from ryzen_compile.backends.api import BuildRequest
from ryzen_compile.backends.cuda_device import current_device_sm
from ryzen_compile.backends.nvinfer.base_backend import NvinferBackend, nvinfer_traits
from ryzen_compile.backends.nvinfer.builder import NvinferBuilder
from ryzen_compile.backends.nvinfer.plugins import register_plugin
from ryzen_compile.backends.traits import BackendPackage
from ryzen_compile.errors import BackendError
from ryzen_compile.kernels.specialization import PTX_VERSIONS
from ryzen_compile.spec.target import detect_gpus
from ryzen_compile.utils.atomic_file import write_atomic


class TensorRT(NvinferBackend):
    """The backend `tensorrt`, on TensorRT."""

    name = "tensorrt"
    traits = nvinfer_traits(
        name="tensorrt",
        priority=20,
        needs_gpu_to_build=True,
        supports_plugins=True,
        packages=(BackendPackage(distribution="tensorrt", module="tensorrt", purpose="--gpu h100, h200, b200 (data center)"),),
    )
    product = "TensorRT"
    modules = ("tensorrt", "tensorrt_bindings")
    builder_entry_point = "ryzen_compile.backends.tensorrt.backend:TensorRTBuilder"
    install_hint = "pip install 'ryzen-compile[tensorrt]'"
    not_executed = (
        "building: the libraries come from NVIDIA's package index, and they build only for a GPU of this machine",
        "the timing cache, and timing with several profiles",
        "plugins: only their creation through the bindings was exercised",
        "the engine inspector",
        "loading and running an engine",
    )

    def sms(self) -> tuple[int, ...]:
        """Return the compute capabilities of the GPUs of this machine."""
        return tuple(sorted({gpu.sm for gpu in detect_gpus()}))

    def describe_support(self, sms: tuple[int, ...]) -> str:
        """Return one sentence on what the backend can do on this machine."""
        if not sms:
            return "it builds only for a GPU of this machine, and no GPU was found"
        return f"builds for the GPUs of this machine: {', '.join(f'sm{sm}' for sm in sms)}"


BACKEND = TensorRT()


class TensorRTBuilder(NvinferBuilder):
    """The builder of the backend `tensorrt`, for the GPU of this machine, with plugins and a timing cache."""

    backend = BACKEND

    def __init__(self) -> None:
        """Load the library, and register its own plugins and those of the custom ops."""
        super().__init__()
        self.trt.init_libnvinfer_plugins(None, "")
        self.register_op_plugins()

    def register_op_plugins(self) -> None:
        """Register the custom ops that have a kernel as plugins, compiled for the GPU that TensorRT uses.

        No op is registered without Triton, without NVIDIA's package `tensorrt` (whose plugin module imports it by that name),
        or on a GPU that kernels are not compiled for; TensorRT then builds the reference implementation of the op.
        """
        sm = current_device_sm()
        if sm not in PTX_VERSIONS or any(importlib.util.find_spec(module) is None for module in ("triton", "tensorrt")):
            return
        trtp = importlib.import_module(f"{self.trt.__name__}.plugin")
        for op in registry.ops().values():
            if op.kernel is not None:
                register_plugin(op, self.trt, trtp, sm=sm, store=Store())

    def configure_targets(self, config: Any, request: BuildRequest) -> None:
        """Allow plugins to alias their inputs, and attach the timing cache; the target is always the GPU of this machine."""
        config.set_preview_feature(self.trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
        file = request.options.get("timingCacheFile")
        if file is None:
            return
        path = Path(str(file))
        timing_cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
        if not config.set_timing_cache(timing_cache, False):
            raise BackendError(
                f"`{path}` is the timing cache of another GPU or TensorRT version",
                hint="give another --timingCacheFile; it is created if it does not exist",
            )

    def after_build(self, config: Any, request: BuildRequest) -> None:
        """Write the timing cache to its file."""
        file = request.options.get("timingCacheFile")
        if file is not None:
            timing_cache = config.get_timing_cache()
            write_atomic(Path(str(file)), bytes(memoryview(timing_cache.serialize())))
