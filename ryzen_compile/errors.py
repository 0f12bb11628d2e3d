"""How the tool says no: one class, one sentence of what, one of what to do."""

from __future__ import annotations

from typing import ClassVar


class RyzenError(Exception):
    """A refusal: the request was understood and cannot be granted.

    `says` names the thing, what it is and what it should be, in the user's own names, on one line. `hint` is the command or
    the edit that mends it. `code` is a stable word for programs (`--json` prints it).
    """

    exit_code: ClassVar[int] = 1
    code: ClassVar[str] = "refused"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n\nhint: {self.hint}"


class UsageError(RyzenError):
    """The request itself is malformed: an unknown option, a word that cannot be read."""

    exit_code = 2
    code = "usage"


class ModelError(RyzenError):
    """The model file is not what it claims to be: unreadable, truncated, or reaching outside its folder."""

    code = "model"


class PipelineError(RyzenError):
    """The passes do not go together, or one of them did not keep its word."""

    code = "plan"


class BackendError(RyzenError):
    """A backend refused the graph, or its process died."""

    code = "backend"


class PackageError(RyzenError):
    """A package is damaged, unsafe or from another version."""

    code = "package"


class ShapeError(RyzenError):
    """A tensor does not fit the interface or the profiles of what it is given to."""

    code = "shape"


class AccuracyError(RyzenError):
    """A comparison did not meet its criteria, or compared nothing."""

    code = "accuracy"


def did_you_mean(word: str, choices: list[str]) -> str:
    """Return a hint that names the closest of `known`, and all of them when none is close."""
    import difflib

    close = difflib.get_close_matches(word, choices, n=1)
    return (
        f"did you mean `{close[0]}`?" if close else f"known are: {', '.join(f'`{name}`' for name in sorted(choices)) or 'none'}"
    )


def printable(value: object) -> str:
    """Return a name or a path on one line: what cannot be printed is escaped, and what is very long is cut."""
    text = str(value)
    text = text if len(text) <= 500 else f"{text[:500]}..."
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
