"""The builder of the backend `tensorrt-rtx`, which runs in a child process: targets that are not on this machine."""

from __future__ import annotations

from typing import Any

from ryzen_compile.backends.api import BuildRequest
from ryzen_compile.backends.nvinfer.builder import NvinferBuilder
from ryzen_compile.backends.tensorrt_rtx.backend import BACKEND


class TensorRTRTXBuilder(NvinferBuilder):
    """The builder of the backend `tensorrt-rtx`, for compute capabilities that need not be present on this machine."""

    backend = BACKEND

    def configure_targets(self, config: Any, request: BuildRequest) -> None:
        """Set the compute capabilities and the operating system."""
        sms = sorted({target.sm for target in request.targets if target.sm is not None})
        config.num_compute_capabilities = len(sms)
        for index, sm in enumerate(sms):
            config.set_compute_capability(getattr(self.trt.ComputeCapability, f"SM{sm}"), index)
        if request.targets[0].os == "windows":
            config.runtime_platform = self.trt.RuntimePlatform.WINDOWS_AMD64
