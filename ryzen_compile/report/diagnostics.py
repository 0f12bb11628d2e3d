"""The text of diagnostics: the only place that formats them for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ryzen_compile.diagnostic import Diagnostic

_COLORS = {"error": "\033[31;1m", "warning": "\033[33;1m", "hint": "\033[36m"}
_RESET = "\033[0m"


def format_diagnostics(diagnostics: Iterable[Diagnostic], *, indent: str = "", colors: bool = False) -> str:
    """Return diagnostics as text, one per line: `error: file: message [code]`, then `hint: ...` where there is one.

    Information is printed without its severity and code. A hint that several in a row share is printed once, after the last of
    them. `indent` precedes every line; `colors` adds the colors of a terminal.
    """

    def label(name: str) -> str:
        return f"{_COLORS[name]}{name}: {_RESET}" if colors else f"{name}: "

    lines: list[str] = []
    pending_hint: str | None = None
    for diagnostic in diagnostics:
        if pending_hint is not None and diagnostic.hint != pending_hint:
            lines.append(f"{label('hint')}{pending_hint}")
        pending_hint = diagnostic.hint
        if diagnostic.severity == "info":
            lines.append(str(diagnostic))
        else:
            lines.append(f"{label(diagnostic.severity)}{diagnostic} [{diagnostic.code}]")
    if pending_hint is not None:
        lines.append(f"{label('hint')}{pending_hint}")
    return "\n".join(indent + line for line in lines)
