"""Targets: what to build for, from `cpu` over `sm89` to a product's name."""

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
"""Compute capability (major * 10 + minor) -> NVIDIA's name of the architecture (CUDA C++ programming guide)."""


class Target(Record, frozen=True):
    """One thing to build for."""

    name: str
    """How the user spells it: `cpu`, `sm89`, `rtx4090`, `sm89@windows`."""
    sm: int | None = None
    """Compute capability, major * 10 + minor; None for the CPU."""
    os: OS = "linux"
    memory_bytes: int | None = None
    bandwidth_bytes_per_s: float | None = None

    @property
    def is_cpu(self) -> bool:
        """Whether this is the CPU."""
        return self.sm is None

    def __str__(self) -> str:
        return self.name


class Product(Record, frozen=True):
    """A GPU that is sold."""

    description: str
    sm: int
    memory_gb: float
    """10^9 bytes."""
    bandwidth_gb_s: float
    """10^9 bytes a second."""
    source: str


@functools.cache
def products() -> dict[str, Product]:
    """Return the table of products, by the name that `--gpu` takes."""
    import tomllib

    import msgspec

    text = files("ryzen_compile.spec").joinpath("products.toml").read_text(encoding="utf-8")
    return msgspec.convert(tomllib.loads(text), dict[str, Product])


class Gpu(Record, frozen=True):
    """A GPU of this machine, as its driver tells."""

    name: str
    sm: int
    memory_bytes: int
    driver: str


def detect_gpus() -> tuple[Gpu, ...]:
    """Return the GPUs of this machine, through NVML; none where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            found.append(
                Gpu(
                    name=pynvml.nvmlDeviceGetName(handle),
                    sm=major * 10 + minor,
                    memory_bytes=pynvml.nvmlDeviceGetMemoryInfo(handle).total,
                    driver=driver,
                )
            )
        return tuple(found)
    finally:
        pynvml.nvmlShutdown()


def parse_targets(text: str) -> tuple[Target, ...]:
    """Read targets separated by commas; `auto` is every kind of GPU that is here, or the CPU. Raises UsageError."""
    found: list[Target] = []
    for word in text.split(","):
        if not word.strip():
            raise UsageError(f"`{text}` names no target between two commas", hint="write --gpu cpu,sm86,sm89")
        found += _auto_targets() if word.strip().lower() == "auto" else [parse_target(word)]
    return tuple({target.name: target for target in found}.values())


def _auto_targets() -> list[Target]:
    here_now = detect_gpus()
    if not here_now:
        return [parse_target("cpu")]
    return [_gpu_target(gpu) for gpu in {gpu.sm: gpu for gpu in here_now}.values()]


def _gpu_target(gpu: Gpu) -> Target:
    plain = _product_key(gpu.name)
    known = plain if plain in products() else f"sm{gpu.sm}"
    target = parse_target(known)
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
    """Return the operating system that this runs on."""
    return "windows" if sys.platform == "win32" else "linux"


def parse_target(text: str) -> Target:
    """Read one target: `cpu`, `sm89`, a product, each optionally with `@linux` or `@windows`.

    Raises UsageError for what is none, and RyzenError for the CPU of another operating system.
    """
    word, at, os = text.strip().lower().partition("@")
    if at and os not in ("linux", "windows"):
        raise UsageError(f"`{text}`: `{os}` is not an operating system to build for", hint="write @linux or @windows")
    on: OS = os if os in ("linux", "windows") else host_os()  # type: ignore[assignment]
    name = word if on == host_os() else f"{word}@{on}"
    if word == "cpu":
        if on != host_os():
            raise RyzenError(
                f"`{text}`: this is {host_os()}, and what a CPU gets can only be built and compared on a CPU of its own system",
                hint="write --gpu cpu: the portable graph of the package runs on every system that ONNX Runtime runs on",
            )
        return Target(name=name, os=on)
    if found := re.fullmatch(r"sm_?(\d+)", word):
        sm = int(found[1])
        if sm not in ARCHITECTURES:
            raise UsageError(
                f"`{text}`: there is no compute capability {sm}",
                hint=did_you_mean(word, [f"sm{known}" for known in ARCHITECTURES]),
            )
        return Target(name=name.replace("_", ""), sm=sm, os=on)
    plain = _product_key(word)
    if plain in products():
        product = products()[plain]
        return Target(
            name=plain if on == host_os() else f"{plain}@{on}",
            sm=product.sm,
            os=on,
            memory_bytes=round(product.memory_gb * 1e9),
            bandwidth_bytes_per_s=product.bandwidth_gb_s * 1e9,
        )
    raise UsageError(
        f"`{text}` is not a target", hint=did_you_mean(word, ["cpu", "auto", *products(), *(f"sm{sm}" for sm in ARCHITECTURES)])
    )
