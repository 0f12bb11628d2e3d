"""Build targets: `cpu`, a compute capability such as `sm89`, or a GPU product name such as `rtx4090`."""

from __future__ import annotations

import functools
import re
import sys
from importlib.resources import files
from typing import Literal

from ryzen_compile.errors import RyzenError, UsageError, did_you_mean
from ryzen_compile.utils.record import Record

OS = Literal["linux", "windows"]

ARCHITECTURES: dict[int, str] = {
    75: "Turing",
    80: "Ampere",
    86: "Ampere",
    87: "Ampere (Orin)",
    89: "Ada",
    90: "Hopper",
    100: "Blackwell",
    103: "Blackwell Ultra",
    110: "Blackwell (Thor)",
    120: "Blackwell (RTX)",
    121: "Blackwell (Spark)",
}
"""Compute capability (major * 10 + minor) -> NVIDIA architecture name (CUDA C++ programming guide)."""


class Target(Record, frozen=True):
    """A build target: the CPU or a GPU, on one operating system."""

    name: str
    """Name in command-line syntax: `cpu`, `sm89`, `rtx4090`, `sm89@windows`."""
    sm: int | None = None
    """Compute capability, major * 10 + minor; None for the CPU."""
    os: OS = "linux"
    memory_bytes: int | None = None
    """Memory of the GPU in bytes; None if neither the target nor the machine names a product."""
    bandwidth_bytes_per_s: float | None = None
    """Memory bandwidth of the GPU in bytes per second; None if neither the target nor the machine names a product."""

    @property
    def is_cpu(self) -> bool:
        """Whether the target is a CPU."""
        return self.sm is None

    def __str__(self) -> str:
        return self.name


class Product(Record, frozen=True):
    """A GPU product, with the figures of its data sheet."""

    description: str
    sm: int
    """Compute capability, major * 10 + minor."""
    memory_gb: float
    """Memory in 10^9 bytes."""
    bandwidth_gb_s: float
    """Memory bandwidth in 10^9 bytes per second."""
    source: str
    """The document that states the figures."""


@functools.cache
def products() -> dict[str, Product]:
    """Return the table of products, by the name that `--gpu` accepts."""
    import tomllib

    import msgspec

    text = files("ryzen_compile.spec").joinpath("products.toml").read_text(encoding="utf-8")
    return msgspec.convert(tomllib.loads(text), dict[str, Product])


class Gpu(Record, frozen=True):
    """A GPU of this machine, as reported by its driver."""

    name: str
    sm: int
    memory_bytes: int
    driver: str


def detect_gpus() -> tuple[Gpu, ...]:
    """Return the GPUs of this machine as reported by NVML; an empty tuple if there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        gpus = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            gpus.append(
                Gpu(
                    name=pynvml.nvmlDeviceGetName(handle),
                    sm=major * 10 + minor,
                    memory_bytes=pynvml.nvmlDeviceGetMemoryInfo(handle).total,
                    driver=driver,
                )
            )
        return tuple(gpus)
    finally:
        pynvml.nvmlShutdown()


def parse_targets(text: str) -> tuple[Target, ...]:
    """Parse targets separated by commas; duplicates are dropped.

    `auto` stands for one target per compute capability of the GPUs in this machine, or for the CPU if there is none. Raises
    UsageError for an invalid target, RyzenError for the CPU of another operating system.
    """
    targets: list[Target] = []
    for word in text.split(","):
        if not word.strip():
            raise UsageError(f"`{text}` contains an empty target", hint="use the form --gpu cpu,sm86,sm89")
        targets += _auto_targets() if word.strip().lower() == "auto" else [parse_target(word)]
    return tuple({target.name: target for target in targets}.values())


def _auto_targets() -> list[Target]:
    gpus = detect_gpus()
    if not gpus:
        return [parse_target("cpu")]
    return [_gpu_target(gpu) for gpu in {gpu.sm: gpu for gpu in gpus}.values()]


def _gpu_target(gpu: Gpu) -> Target:
    key = _product_key(gpu.name)
    name = key if key in products() else f"sm{gpu.sm}"
    target = parse_target(name)
    return Target(
        name=target.name,
        sm=gpu.sm,
        os=host_os(),
        memory_bytes=gpu.memory_bytes,
        bandwidth_bytes_per_s=target.bandwidth_bytes_per_s,
    )


def _product_key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", re.sub(r"^(nvidia|geforce|tesla|\s)+", "", name.lower()))


def host_os() -> OS:
    """Return the operating system of this machine."""
    return "windows" if sys.platform == "win32" else "linux"


def parse_target(text: str) -> Target:
    """Parse one target: `cpu`, `sm89` or a product name, each with an optional `@linux` or `@windows`.

    Raises UsageError for an invalid target, RyzenError for the CPU of another operating system.
    """
    base, separator, os = text.strip().lower().partition("@")
    if separator and os not in ("linux", "windows"):
        raise UsageError(f"`{text}`: operating system `{os}` is not supported", hint="use @linux or @windows")
    target_os: OS = os if os in ("linux", "windows") else host_os()  # type: ignore[assignment]
    name = base if target_os == host_os() else f"{base}@{target_os}"
    if base == "cpu":
        if target_os != host_os():
            raise RyzenError(
                f"`{text}`: this machine runs {host_os()}, and a CPU target can only be built and compared on its own system",
                hint="use --gpu cpu: the portable variant of the package runs on every system that ONNX Runtime supports",
            )
        return Target(name=name, os=target_os)
    if match := re.fullmatch(r"sm_?(\d+)", base):
        sm = int(match[1])
        if sm not in ARCHITECTURES:
            raise UsageError(
                f"`{text}`: unknown compute capability {sm}",
                hint=did_you_mean(base, [f"sm{supported}" for supported in ARCHITECTURES]),
            )
        return Target(name=name.replace("_", ""), sm=sm, os=target_os)
    key = _product_key(base)
    if key in products():
        product = products()[key]
        return Target(
            name=key if target_os == host_os() else f"{key}@{target_os}",
            sm=product.sm,
            os=target_os,
            memory_bytes=round(product.memory_gb * 1e9),
            bandwidth_bytes_per_s=product.bandwidth_gb_s * 1e9,
        )
    raise UsageError(
        f"`{text}` is not a target", hint=did_you_mean(base, ["cpu", "auto", *products(), *(f"sm{sm}" for sm in ARCHITECTURES)])
    )
