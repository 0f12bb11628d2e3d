"""The current CUDA device: the GPU on which this process executes engines."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from ryzen_compile.spec.target import Gpu, detect_gpus


class CudaDevice(NamedTuple):
    """A GPU as CUDA identifies it."""

    name: str
    sm: int
    """Compute capability, major * 10 + minor."""


def current_device(gpus: Sequence[Gpu]) -> CudaDevice | None:
    """Return the GPU that executes engines in this process.

    It is CUDA's current device, which depends on the device order of the driver and on CUDA_VISIBLE_DEVICES; NVML, which lists
    `gpus`, reports neither. If CUDA cannot be queried, the result is the GPU with the lowest compute capability. It is None if
    `gpus` is empty, or if CUDA_VISIBLE_DEVICES hides all of them.
    """
    return (_query_cuda() or _oldest(gpus)) if gpus and not all_devices_hidden() else None


def all_devices_hidden() -> bool:
    """Return whether CUDA_VISIBLE_DEVICES hides every GPU from this process: it is empty or starts with -1.

    CUDA hides the first invalid device and all devices behind it (CUDA C++ Programming Guide, CUDA_VISIBLE_DEVICES).
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible is not None and visible.split(",")[0].strip() in ("", "-1")


def current_device_sm() -> int | None:
    """Return the compute capability of the GPU that executes engines in this process; None if there is no visible GPU.

    If CUDA cannot be queried, it is the lowest compute capability of all GPUs, whose kernels newer GPUs also run.
    """
    device = None if all_devices_hidden() else _query_cuda() or _oldest(detect_gpus())
    return device.sm if device is not None else None


def _query_cuda() -> CudaDevice | None:
    try:
        from cuda.core import Device

        device = Device()
        return CudaDevice(name=str(device.name), sm=int(device.arch))
    except Exception:  # noqa: BLE001 - a missing package, driver or GPU raises different errors
        return None


def _oldest(gpus: Sequence[Gpu]) -> CudaDevice | None:
    oldest = min(gpus, key=lambda gpu: gpu.sm, default=None)
    return None if oldest is None else CudaDevice(name=oldest.name, sm=oldest.sm)
