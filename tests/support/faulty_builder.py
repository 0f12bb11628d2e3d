"""Builders that misbehave as native libraries do, each in its own child process."""

from __future__ import annotations

import os
import time
from typing import ClassVar

from ryzen_compile.backends.api import BuildRequest
from ryzen_compile.backends.process.crash_breadcrumb import ChildOutput, CrashBreadcrumb
from ryzen_compile.backends.process.protocol import BuildDone
from ryzen_compile.errors import BackendError


class FaultyBackend:
    """The backend of one of the builders below."""

    def __init__(self, builder: str) -> None:
        self.name = "faulty"
        self.builder_entry_point = f"support.faulty_builder:{builder}"

    def check(self, request: BuildRequest) -> None: ...


class FaultyBuilder:
    version: ClassVar[str] = "1"

    def build(self, request: BuildRequest, output: str, breadcrumb: CrashBreadcrumb, child_output: ChildOutput) -> BuildDone:
        with open(output, "wb") as file:
            file.write(b"half an engine")
        breadcrumb.write("parsing node `culprit` [Op]")
        self.misbehave(request)
        return BuildDone(sha256="0", size_bytes=0)

    def misbehave(self, request: BuildRequest) -> None: ...


class WorkingBuilder(FaultyBuilder): ...


class HangingBuilder(FaultyBuilder):
    def misbehave(self, request: BuildRequest) -> None:
        while True:
            time.sleep(60)


class MemoryHogBuilder(FaultyBuilder):
    def misbehave(self, request: BuildRequest) -> None:
        kept = []
        while True:
            kept.append(b"x" * (16 << 20))
            time.sleep(0.01)


class AbortingBuilder(FaultyBuilder):
    def misbehave(self, request: BuildRequest) -> None:
        os.write(2, b"terminate called after throwing an instance of 'what'\n")
        os.abort()


class VerboseBuilder(FaultyBuilder):
    def misbehave(self, request: BuildRequest) -> None:
        for _ in range(64):
            os.write(1, b"noise\n" * 20_000)
            time.sleep(0.005)


class ForkingBuilder(HangingBuilder):
    def misbehave(self, request: BuildRequest) -> None:
        os.fork()
        super().misbehave(request)


class MissingLibraryBuilder(FaultyBuilder):
    def __init__(self) -> None:
        raise BackendError("its library is not there", hint="install it")
