"""Exceptions that report a failed request to the user: a one-line message and an optional hint."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, Self

from ryzen_compile.diagnostic import Diagnostic


class RyzenError(Exception):
    """Base class of all errors that are reported to the user; raised itself for a valid request that cannot be fulfilled.

    `message` is one line that names the object, its actual value and the expected value, in the user's own names. `hint` is
    the command or the edit that resolves the problem. `diagnostics` holds the same as records, one for each problem.
    """

    exit_code: ClassVar[int] = 1
    code: ClassVar[str] = "refused"
    """The code of diagnostics for which no narrower one is given."""

    def __init__(self, message: str, *, hint: str | None = None, code: str | None = None, location: str | None = None) -> None:
        problem = Diagnostic(code=code or self.code, severity="error", message=message, location=location, hint=hint)
        super().__init__(str(problem))
        self.message = str(problem)
        self.hint = hint
        self.diagnostics: tuple[Diagnostic, ...] = (problem,)

    @classmethod
    def of(cls, diagnostics: Sequence[Diagnostic]) -> Self:
        """Return one exception for several problems: its message joins theirs, and its hint joins their distinct hints."""
        hints = dict.fromkeys(diagnostic.hint for diagnostic in diagnostics if diagnostic.hint)
        error = cls("; ".join(map(str, diagnostics)), hint="; ".join(hints) or None)
        error.diagnostics = tuple(diagnostics)
        return error

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n\nhint: {self.hint}"


class UsageError(RyzenError):
    """The request is malformed: an unknown option, or a value that cannot be parsed."""

    exit_code = 2
    code = "usage"


class ModelError(RyzenError):
    """The model file is invalid: unreadable, truncated, or referring to files outside its folder."""

    code = "model"


class InvalidGraphError(ModelError):
    """A graph that was to be written is not valid ONNX: a defect of the pass or exporter that made it.

    `is_contradiction` states that shapes or types contradict each other. A pass that evaluates constants may only reveal a
    contradiction in the model.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        code: str | None = None,
        location: str | None = None,
        is_contradiction: bool = False,
    ) -> None:
        super().__init__(message, hint=hint, code=code, location=location)
        self.is_contradiction = is_contradiction


class PipelineError(RyzenError):
    """The passes of a pipeline are incompatible, or a pass violated its declared properties."""

    code = "pipeline"


class BackendError(RyzenError):
    """A backend rejected the graph, or its process died.

    `may_be_one_target` states whether the cause may be one of several targets, so that an engine for the others may succeed.
    """

    code = "backend"

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        code: str | None = None,
        location: str | None = None,
        may_be_one_target: bool = True,
    ) -> None:
        super().__init__(message, hint=hint, code=code, location=location)
        self.may_be_one_target = may_be_one_target


class PackageError(RyzenError):
    """A package is damaged, unsafe or from another version."""

    code = "package"


class ShapeError(RyzenError):
    """A tensor does not match the interface or the profiles of the graph or engine that it is fed to."""

    code = "shape"


class AccuracyError(RyzenError):
    """A comparison did not meet its criteria, or compared no values."""

    code = "accuracy"


class InternalError(RyzenError):
    """A defect of this program: an exception that no command expects."""

    exit_code = 70
    code = "internal-error"


@contextmanager
def default_hint(hint: str) -> Iterator[None]:
    """Add a hint to BackendErrors within the block that have none."""
    try:
        yield
    except BackendError as error:
        if error.hint is None:
            error.hint = hint
            error.diagnostics = tuple(dataclasses.replace(diagnostic, hint=hint) for diagnostic in error.diagnostics)
        raise


def did_you_mean(word: str, choices: list[str]) -> str:
    """Return a hint that names the choice closest to `word`, or all choices if none is close."""
    import difflib

    matches = difflib.get_close_matches(word, choices, n=1)
    if matches:
        return f"did you mean `{matches[0]}`?"
    return f"available: {', '.join(f'`{name}`' for name in sorted(choices)) or 'none'}"


def printable(value: object) -> str:
    """Return a name or a path on one line, with unprintable characters escaped; texts over 500 characters are truncated."""
    text = str(value)
    text = text if len(text) <= 500 else f"{text[:500]}..."
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
