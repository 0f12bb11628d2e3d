"""One continuation of a text, or one reply, by a package in a child process, which streams it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from ryzen_compile.processes.child_call import ChildProgress, call_in_child
from ryzen_compile.processes.operation import performing
from ryzen_compile.progress import Progress
from ryzen_compile.runtime.generation.generate import GenerationOptions
from ryzen_compile.runtime.requested_engine import requested_engine
from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    from ryzen_compile.processes.limits import ResourceLimits


class GenerationRequest(Record, frozen=True):
    """What continues which text."""

    package: str
    """A package, with #GRAPH and @VARIANT."""
    prompt: str
    chat: bool
    """Whether the prompt is a message to the model."""
    system: str | None
    """The instructions of the conversation."""
    options: GenerationOptions
    variant: str | None = None
    backend: str | None = None


class GenerationResult(Record, frozen=True):
    """The end of a text that was streamed."""

    tokens: tuple[int, ...]
    finish_reason: str
    seconds: float
    """The time without that of loading the package."""


def generate_once(
    request: GenerationRequest,
    *,
    on_text: Callable[[str], None],
    limits: ResourceLimits | None = None,
    progress: Progress | None = None,
) -> GenerationResult:
    """Generate a text in a child process and call `on_text` with each part of it.

    What runs, and whether it misses its criteria, is reported to `progress`. Raises the errors of loading and generating, and
    BackendError if the child process crashed or exceeded a limit.
    """
    encoded = call_in_child(
        f"{__name__}:{_generate_encoded.__name__}",
        msgspec.json.encode(request),
        label=f"generation with {request.package}",
        preload=(__name__,),
        limits=limits,
        progress=progress,
        on_text=on_text,
    )
    return msgspec.json.decode(encoded, type=GenerationResult)


def _generate_encoded(argument: bytes, progress: ChildProgress) -> bytes:
    """Perform an encoded `GenerationRequest`, return an encoded `GenerationResult`; the function that the child calls."""
    request = msgspec.json.decode(argument, type=GenerationRequest)
    messages = [{"role": "system", "content": request.system}] if request.system is not None else []
    messages.append({"role": "user", "content": request.prompt})
    with requested_engine(request.package, variant=request.variant, backend=request.backend, progress=progress) as (
        engine,
        name,
    ):
        started = time.perf_counter()
        with (
            performing(f"generating with {name}"),
            engine.stream_text(messages if request.chat else request.prompt, **request.options) as stream,
        ):
            for piece in stream:
                progress.write(piece)
        seconds = time.perf_counter() - started
    result = GenerationResult(tokens=tuple(stream.tokens), finish_reason=stream.finish_reason or "", seconds=seconds)
    return msgspec.json.encode(result)
