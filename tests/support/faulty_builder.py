"""Builders that fail in the ways of native libraries: they hang, abort, leak memory, print or fork."""

from __future__ import annotations

import os
import time
from typing import ClassVar

from ryzen_compile.backends.api import BuildRequest
from ryzen_compile.backends.process.protocol import BuildDone
from ryzen_compile.errors import BackendError
from ryzen_compile.processes.crash_breadcrumb import ChildOutput, CrashBreadcrumb


class FaultyBackend:
    """The backend of the builder class called `builder` in this module."""

    def __init__(self, builder: str) -> None:
        self.name = "faulty"
        self.builder_entry_point = f"support.faulty_builder:{builder}"

    def check(self, request: BuildRequest) -> None: ...


class FaultyBuilder:
    version: ClassVar[str] = "1"

    def build(self, request: BuildRequest, output: str, breadcrumb: CrashBreadcrumb, child_output: ChildOutput) -> BuildDone:
        with open(output, "wb") as file:
            file.write(b"incomplete engine")
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
        blocks = []
        while True:
            blocks.append(b"x" * (16 << 20))
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
        raise BackendError("the library is missing", hint="install it")
