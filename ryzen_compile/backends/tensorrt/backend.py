"""The backend `tensorrt`: TensorRT builds for the data-center GPU of this machine, whose kernels it times during the build."""

from __future__ import annotations

from ryzen_compile.backends.nvinfer.base_backend import NvinferBackend, nvinfer_traits
from ryzen_compile.backends.traits import BackendPackage
from ryzen_compile.spec.target import detect_gpus


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
    builder_entry_point = "ryzen_compile.backends.tensorrt.builder:TensorRTBuilder"
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
