"""TensorRT: engines for the data-centre GPU that is present, whose kernels it measures while it builds."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from ryzen_compile import registry
from ryzen_compile.artifacts.cache.store import Store
from ryzen_compile.backends.api import BuildRequest
from ryzen_compile.backends.nvinfer.backend import NvinferBackend
from ryzen_compile.backends.nvinfer.builder import NvinferBuilder
from ryzen_compile.backends.nvinfer.plugins import register_plugin
from ryzen_compile.errors import BackendError
from ryzen_compile.kernels.specialization import PTX_VERSIONS
from ryzen_compile.spec.target import detect_gpus
from ryzen_compile.utils.atomic_file import write_atomic


class TensorRT(NvinferBackend):
    """The backend `tensorrt`."""

    name = "tensorrt"
    product = "TensorRT"
    modules = ("tensorrt", "tensorrt_bindings")
    builder_entry_point = "ryzen_compile.backends.tensorrt.backend:TensorRTBuilder"
    install_hint = "pip install 'ryzen-compile[tensorrt]'"
    not_executed = (
        "building: its libraries come from NVIDIA's own index, and it builds only for the GPU that is present",
        "the timing cache, and timing under several profiles",
        "plugins, whose making was exercised through its bindings",
        "the engine inspector",
        "loading and running an engine",
    )

    def sms(self) -> tuple[int, ...]:
        """Return those of the GPUs that are here."""
        return tuple(sorted({gpu.sm for gpu in detect_gpus()}))

    def describe_support(self, sms: tuple[int, ...]) -> str:
        """Return what it can do here."""
        if not sms:
            return "it builds for the GPU that is present, and there is none here"
        return f"builds for the GPU that is present: {', '.join(f'sm{sm}' for sm in sms)}"


BACKEND = TensorRT()


def current_device_sm() -> int | None:
    """Return the compute capability of the GPU that TensorRT uses in this process; None where there is no GPU.

    That is CUDA's current device, which the driver's order and CUDA_VISIBLE_DEVICES decide; NVML knows neither. Where CUDA
    cannot be asked it is the lowest of all GPUs here: newer ones run its kernels too.
    """
    try:
        from cuda.core import Device

        return int(Device().arch)
    except Exception:  # noqa: BLE001 - no package, no driver, no GPU: each says so in its own way
        return min((gpu.sm for gpu in detect_gpus()), default=None)


class TensorRTBuilder(NvinferBuilder):
    """Builds for the GPU that is here; keeps what it measured in a timing cache, and knows plugins."""

    backend = BACKEND

    def __init__(self) -> None:
        """Load the library and register the plugins that come with it."""
        super().__init__()
        self.trt.init_libnvinfer_plugins(None, "")
        self.register_op_plugins()

    def register_op_plugins(self) -> None:
        """Offer the custom ops that have a kernel as plugins, compiled for the GPU that TensorRT uses.

        Without Triton, without NVIDIA's package `tensorrt` (its module of plugins imports it by that name), and for a GPU that
        kernels are not compiled for, there are none, and TensorRT builds what the reference of an op says.
        """
        sm = current_device_sm()
        if sm not in PTX_VERSIONS or any(importlib.util.find_spec(needed) is None for needed in ("triton", "tensorrt")):
            return
        trtp = importlib.import_module(f"{self.trt.__name__}.plugin")
        for op in registry.ops().values():
            if op.kernel is not None:
                register_plugin(op, self.trt, trtp, sm=sm, store=Store())

    def configure_targets(self, config: Any, request: BuildRequest) -> None:
        """Let plugins write over their inputs, and attach the timing cache: the GPU that is here is the target."""
        config.set_preview_feature(self.trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
        file = request.options.get("timingCacheFile")
        if file is None:
            return
        path = Path(str(file))
        timing_cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
        if not config.set_timing_cache(timing_cache, False):
            raise BackendError(
                f"`{path}` is the timing cache of another GPU or version",
                hint="give another --timingCacheFile; one that does not exist is made",
            )

    def after_build(self, config: Any, request: BuildRequest) -> None:
        """Write the timing cache back."""
        file = request.options.get("timingCacheFile")
        if file is not None:
            timing_cache = config.get_timing_cache()
            write_atomic(Path(str(file)), bytes(memoryview(timing_cache.serialize())))
