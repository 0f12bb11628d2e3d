"""`NvinferBackend`: probe, build and open on the nvinfer API, common to TensorRT and TensorRT-RTX."""

from __future__ import annotations

import abc
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from ryzen_compile.backends.api import BuildRequest, BuiltEngine, Capabilities, Session
from ryzen_compile.backends.process.worker import Worker
from ryzen_compile.backends.traits import BackendPackage, BackendTraits
from ryzen_compile.errors import BackendError
from ryzen_compile.progress import Progress
from ryzen_compile.spec.target import detect_gpus

INPUT_DTYPES = frozenset({"float32", "float16", "bfloat16", "float8_e4m3fn", "int64", "int32", "int8", "uint8", "bool"})
"""The element types of network inputs. The parser also accepts float64 and int4."""
DEMOTED_DTYPES = {"float64": "float32"}
"""The parser replaces float64 with float32: inputs, outputs, constants (clamped to the range of float32) and casts.

It does not replace int64: inputs, outputs and constants of int64 are int64 in the network since TensorRT 10, and so are the
results of arithmetic on them."""
NATIVE_OPS = frozenset({"ryzen::TRT_Attention"})
"""The custom ops that the parser imports."""
MAX_TOPK = 3840
"""The maximum k of TopK; the builder rejects a larger one."""


def nvinfer_traits(
    *,
    name: str,
    priority: int,
    packages: tuple[BackendPackage, ...],
    ahead_of_time_sms: tuple[int, ...] = (),
    needs_gpu_to_build: bool = False,
    supports_plugins: bool = False,
) -> BackendTraits:
    """Return the traits of a backend on the nvinfer API; the parameters are the traits in which the backends differ."""
    return BackendTraits(
        name=name,
        priority=priority,
        default_pipeline="fold,attention",
        accepts_builder_options=True,
        ahead_of_time_sms=ahead_of_time_sms,
        needs_gpu_to_build=needs_gpu_to_build,
        supports_plugins=supports_plugins,
        native_ops=NATIVE_OPS,
        max_topk=MAX_TOPK,
        demoted_dtypes=DEMOTED_DTYPES,
        quantizes_asymmetrically=False,
        input_dtypes=INPUT_DTYPES,
        packages=packages,
    )


class NvinferBackend(abc.ABC):
    """Base class of the backends on the nvinfer API; a subclass names its library and overrides what differs."""

    name: ClassVar[str]
    traits: ClassVar[BackendTraits]
    product: ClassVar[str]
    """The name of the library in messages."""
    modules: ClassVar[tuple[str, ...]]
    """The modules that may contain the bindings, in order of preference."""
    builder_entry_point: ClassVar[str]
    """The builder class that the child process instantiates, as `module:class`."""
    install_hint: ClassVar[str]
    """The command that installs the library."""
    not_executed: ClassVar[tuple[str, ...]]
    """The features that were never executed during development, each in one sentence."""

    @abc.abstractmethod
    def sms(self) -> tuple[int, ...]:
        """Return the compute capabilities that the backend can build for on this machine."""

    def load_bindings(self) -> Any:
        """Import the bindings and return their module. Raises BackendError, with the reason, if they cannot be imported."""
        reasons = []
        for name in self.modules:
            try:
                return importlib.import_module(name)
            except ImportError as error:
                if find_spec(name):
                    reasons.append(str(error))
        raise self.not_available(f"its libraries cannot be loaded: {reasons[0]}" if reasons else "it is not installed")

    def not_available(self, reason: str) -> BackendError:
        """Return the error that reports the backend as unavailable for `reason`."""
        return BackendError(f"{self.product} is not available: {reason}", hint=self.install_hint)

    @abc.abstractmethod
    def describe_support(self, sms: tuple[int, ...]) -> str:
        """Return one sentence on what the backend can do on this machine, given the compute capabilities `sms`."""

    def installed_version(self) -> str:
        """Return the installed version. Raises BackendError if the library cannot be used."""
        return str(self.load_bindings().__version__)

    def probe(self) -> Capabilities:
        """Return what the backend can do on this machine."""
        try:
            version = self.installed_version()
        except BackendError as error:
            return Capabilities(
                available=False, version=None, message=error.message, install_hint=error.hint, not_executed=self.not_executed
            )
        sms = self.sms()
        return Capabilities(
            available=bool(sms),
            version=version,
            message=self.describe_support(sms),
            sms=sms,
            can_run=any(gpu.sm in sms for gpu in detect_gpus()),
            not_executed=self.not_executed,
        )

    def build(self, request: BuildRequest, progress: Progress, *, worker: Worker | None = None) -> BuiltEngine:
        """Build one engine in `worker`, or in a new child process. Raises BackendError if the build fails."""
        if worker is not None:
            return worker.build(request, progress)
        with Worker(self) as new_worker:
            return new_worker.build(request, progress)

    def check(self, request: BuildRequest) -> None:
        """Raise BackendError if the targets of `request` are not supported, before a child process receives it."""
        self.installed_version()
        sms = self.sms()
        for target in request.targets:
            if target.is_cpu:
                raise BackendError(f"`{self.name}` does not build for the CPU", hint="build `cpu` with `onnxruntime`")
            if target.sm not in sms:
                raise BackendError(
                    f"`{self.name}` does not build for `{target}` on this machine", hint=self.describe_support(sms)
                )
        if len({target.os for target in request.targets}) > 1:
            raise BackendError(
                f"`{self.name}`: one plan supports one operating system", hint="build for Linux and Windows separately"
            )

    def open(self, path: str, *, cache_dir: str | None = None, map_weights: bool = False) -> AbstractContextManager[Session]:
        """Load an engine on the current GPU. Raises BackendError if there is no GPU or the engine cannot be loaded."""
        from ryzen_compile.backends.nvinfer.session import open_session

        return open_session(self.load_bindings(), path, Path(cache_dir) if cache_dir else None, self.create_execution_context)

    def create_execution_context(self, engine: Any, cache_dir: Path | None) -> tuple[Any, Callable[[], None]]:
        """Return an execution context of `engine`, and a function to call when the context is closed."""
        return engine.create_execution_context(), lambda: None
