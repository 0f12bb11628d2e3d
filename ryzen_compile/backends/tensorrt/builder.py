"""The builder of the backend `tensorrt`, which runs in a child process: plugins and the timing cache."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from ryzen_compile import registry
from ryzen_compile.artifacts.cache.store import Store
from ryzen_compile.backends.api import BuildRequest
from ryzen_compile.backends.cuda_device import current_device_sm
from ryzen_compile.backends.nvinfer.builder import NvinferBuilder
from ryzen_compile.backends.nvinfer.plugins import register_plugin
from ryzen_compile.backends.tensorrt.backend import BACKEND
from ryzen_compile.errors import BackendError
from ryzen_compile.kernels.specialization import PTX_VERSIONS
from ryzen_compile.utils.atomic_file import write_atomic


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
