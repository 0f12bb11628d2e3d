"""`BackendTraits`: the static facts about a backend, which code outside the backends uses instead of backend names.

Traits do not depend on the machine; `Backend.probe` reports what a backend can do on this machine.
"""

from __future__ import annotations

from ryzen_compile import registry
from ryzen_compile.errors import RyzenError
from ryzen_compile.utils.record import Record


class BackendPackage(Record, frozen=True):
    """An installable distribution that a backend uses."""

    distribution: str
    """The name on the package index."""
    module: str
    """The module that it installs. Distributions of one backend with the same module conflict with each other."""
    purpose: str
    """What it enables, in the terms of the command line: `--gpu cpu, compare, run`."""


class BackendTraits(Record, frozen=True):
    """The static facts about a backend. The defaults suit a compiler for GPUs without further properties."""

    name: str
    """The name under which the registry lists the backend."""
    portable: bool = False
    """Whether the backend can run the portable variant of a package, on the CPU of every machine.

    Of several, the one with the smallest `priority` is the portable backend. A package always contains its variants,
    which are the fallback if no engine fits. For GPU targets the backend is tried last. It also runs ONNX graphs outside
    packages: for comparison, export validation and calibration."""
    priority: int = 100
    """The order in which backends are tried for a target, ascending; equal priorities are ordered by name."""
    default_pipeline: str = "fold"
    """The passes of a variant if the user names none, in the syntax of `--passes`."""
    compiles: bool = True
    """Whether a build writes an engine. False: it verifies the graph, which itself runs, as only a portable backend may."""
    accepts_builder_options: bool = False
    """Whether a build accepts the builder options by their trtexec names, except those that `builder_options` excludes."""
    needs_gpu_to_build: bool = False
    """Whether a build requires a GPU of its target on this machine and times kernels on it.

    The engine then depends on the name and the driver of the GPU, which are part of its cache key. False: engines are built
    ahead of time."""
    ahead_of_time_sms: tuple[int, ...] = ()
    """The compute capabilities for which the backend, once installed, builds without a GPU."""
    supports_plugins: bool = False
    """Whether an engine can contain custom ops with kernels as plugins; their kernels are part of its cache key.

    False: the backend runs the references of custom ops, except of those in `native_ops`."""
    native_ops: frozenset[str] = frozenset()
    """The custom ops, as `domain::name`, that the backend implements itself; their references are ignored."""
    max_topk: int | None = None
    """The maximum k of TopK; None: unlimited. It also limits the references of custom ops that contain TopK."""
    computes_half_precision: bool = True
    """Whether the backend computes nodes of element type float16 or bfloat16 in that type on all of its targets.

    False: on the CPU it computes them in float32, which hides overflow. Its variants are therefore never converted to half
    precision, and graphs in half precision are compared with rounding after every op."""
    demoted_dtypes: dict[str, str] = {}
    """{element type that the backend accepts: narrower type in which it computes it}, by their numpy names.

    A build rewrites the graph accordingly, so that it is compared as the engine computes it. Interfaces keep their types; a
    loaded engine casts at its inputs and outputs."""
    quantizes_asymmetrically: bool = True
    """Whether the backend computes integers of 8 bits with zero points, and uint8: QuantizeLinear and DequantizeLinear of
    these, DynamicQuantizeLinear, MatMulInteger, ConvInteger, QLinearMatMul and QLinearConv.

    False: it computes int8 without zero points only. A build rewrites the others to float32."""
    keeps_weights_quantized: bool = True
    """Whether a product reads weights behind DequantizeLinear in their own type.

    False: the backend would compute them in each run, or quantize the activations too. Weights are then computed by Cast and
    Mul, which it evaluates when it loads the graph."""
    input_dtypes: frozenset[str] = frozenset()
    """The element types of graph inputs that the backend supports unchanged, by their numpy names, on some of its targets."""
    packages: tuple[BackendPackage, ...] = ()
    """The distributions that the backend uses, in the order to list them; any one of those with the same module suffices."""

    @property
    def distributions(self) -> tuple[str, ...]:
        """The names of the distributions in `packages`."""
        return tuple(package.distribution for package in self.packages)


def find_traits(name: str) -> BackendTraits:
    """Return the traits of the backend called `name`. Raises UsageError if there is none."""
    return registry.find_backend(name).traits


def traits_by_priority() -> list[BackendTraits]:
    """Return the traits of all usable backends in the order in which they are tried for a target."""
    return sorted(
        (backend.traits for backend in registry.backends().values()), key=lambda traits: (traits.priority, traits.name)
    )


def portable_backend() -> str:
    """Return the name of the backend that runs portable variants: the one with the smallest priority, then the first by name.

    Raises RyzenError if none is registered.
    """
    for traits in traits_by_priority():
        if traits.portable:
            return traits.name
    raise RyzenError("no registered backend runs portable variants", hint="reinstall ryzen-compile")
