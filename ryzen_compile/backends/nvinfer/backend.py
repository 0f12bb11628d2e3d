"""The backend that TensorRT and TensorRT for RTX share: probe, build, open, over the API that both of them have."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from ryzen_compile.backends.api import BuildRequest, BuiltEngine, Capabilities, Session
from ryzen_compile.backends.process.worker import Worker
from ryzen_compile.errors import BackendError
from ryzen_compile.progress import Progress
from ryzen_compile.spec.target import detect_gpus


class NvinferBackend:
    """One of the two; a subclass names its parts and says how it differs."""

    name: ClassVar[str]
    product: ClassVar[str]
    """What people call the library."""
    modules: ClassVar[tuple[str, ...]]
    """The modules that may hold its bindings; the first that is there counts."""
    builder_entry_point: ClassVar[str]
    """Where the child's side is: `module:class`."""
    install_hint: ClassVar[str]
    """The command that installs it."""
    not_executed: ClassVar[tuple[str, ...]]

    def sms(self) -> tuple[int, ...]:
        """Return the compute capabilities that it can build for here."""
        raise NotImplementedError

    def load_bindings(self) -> Any:
        """Import the bindings; raises BackendError that says why they cannot be."""
        reasons = []
        for name in self.modules:
            try:
                return importlib.import_module(name)
            except ImportError as error:
                if find_spec(name):
                    reasons.append(str(error))
        raise self.not_available(f"its libraries cannot be loaded: {reasons[0]}" if reasons else "it is not installed")

    def not_available(self, reason: str) -> BackendError:
        """Return the refusal of one that is not here."""
        return BackendError(f"there is no {self.product} here: {reason}", hint=self.install_hint)

    def describe_support(self, sms: tuple[int, ...]) -> str:
        """Return one sentence on what it can do here."""
        raise NotImplementedError

    def installed_version(self) -> str:
        """Return the version that is installed; raises BackendError where it cannot be used."""
        return str(self.load_bindings().__version__)

    def probe(self) -> Capabilities:
        """Tell what it can do here."""
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
        """Build one engine in `worker`, or in one of its own; raises BackendError."""
        if worker is not None:
            return worker.build(request, progress)
        with Worker(self) as own:
            return own.build(request, progress)

    def check(self, request: BuildRequest) -> None:
        """Raise BackendError for what is refused before a child is asked."""
        self.installed_version()
        sms = self.sms()
        for target in request.targets:
            if target.is_cpu:
                raise BackendError(f"`{self.name}` does not build for the CPU", hint="build `cpu` with `onnxruntime`")
            if target.sm not in sms:
                raise BackendError(f"`{self.name}` does not build for `{target}` here", hint=self.describe_support(sms))
        if len({target.os for target in request.targets}) > 1:
            raise BackendError(
                f"`{self.name}`: one plan is for one operating system", hint="build for Linux and for Windows apart"
            )

    def open(self, path: str, *, cache_dir: str | None = None) -> AbstractContextManager[Session]:
        """Make an engine ready to run on the GPU of this machine; raises BackendError where there is none."""
        from ryzen_compile.backends.nvinfer.session import open_session

        return open_session(self.load_bindings(), path, Path(cache_dir) if cache_dir else None, self.create_execution_context)

    def create_execution_context(self, engine: Any, cache_dir: Path | None) -> tuple[Any, Callable[[], None]]:
        """Return an execution context of `engine`, and what to do when it is closed."""
        return engine.create_execution_context(), lambda: None
