"""Builders that misbehave as native libraries do, each in its own child process."""

from __future__ import annotations

import os
import time
from typing import ClassVar

from ryzen_compile.backends.api import Request
from ryzen_compile.backends.process.crash_breadcrumb import Chatter, Recorder
from ryzen_compile.backends.process.protocol import Done
from ryzen_compile.errors import BackendError


class Faulty:
    """The backend of one of the builders below."""

    def __init__(self, builder: str) -> None:
        self.name = "faulty"
        self.builder = f"support.faulty_builder:{builder}"

    def check(self, request: Request) -> None: ...


class Base:
    version: ClassVar[str] = "1"

    def build(self, request: Request, output: str, recorder: Recorder, chatter: Chatter) -> Done:
        with open(output, "wb") as file:
            file.write(b"half an engine")
        recorder.note("parsing node `culprit` [Op]")
        self.misbehave(request)
        return Done(sha256="0", size_bytes=0)

    def misbehave(self, request: Request) -> None: ...


class Well(Base): ...


class Hangs(Base):
    def misbehave(self, request: Request) -> None:
        while True:
            time.sleep(60)


class Hungry(Base):
    def misbehave(self, request: Request) -> None:
        kept = []
        while True:
            kept.append(b"x" * (16 << 20))
            time.sleep(0.01)


class Aborts(Base):
    def misbehave(self, request: Request) -> None:
        os.write(2, b"terminate called after throwing an instance of 'what'\n")
        os.abort()


class Chatters(Base):
    def misbehave(self, request: Request) -> None:
        for _ in range(64):
            os.write(1, b"noise\n" * 20_000)
            time.sleep(0.005)


class ForksAndHangs(Hangs):
    def misbehave(self, request: Request) -> None:
        os.fork()
        super().misbehave(request)


class IsNotThere(Base):
    def __init__(self) -> None:
        raise BackendError("its library is not there", hint="install it")
