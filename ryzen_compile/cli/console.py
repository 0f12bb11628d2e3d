"""Console output of the commands: data to stdout, diagnostics and progress to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import click

from ryzen_compile.diagnostic import Diagnostic
from ryzen_compile.report.diagnostics import format_diagnostics

_reported: ContextVar[list[Diagnostic]] = ContextVar("reported diagnostics")
"""What the running command has reported so far; `--json` prints it with the data."""


def start_report() -> None:
    """Forget what an earlier command in this process reported."""
    _reported.set([])


class ConsoleProgress:
    """Progress on stderr: a spinner on a terminal, plain lines otherwise, nothing with -q."""

    def __init__(self, verbosity: int) -> None:
        self._verbosity = verbosity
        self._interactive = verbosity >= 0 and sys.stderr.isatty()
        self._reported = _reported.get([])

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """Show `title` while the block runs and, with -v, print its duration."""
        started = time.perf_counter()
        if self._interactive:
            from rich.console import Console

            with Console(stderr=True).status(title):
                yield
        else:
            yield
        if self._verbosity > 0:
            click.echo(f"{title}: {time.perf_counter() - started:.1f} s", err=True)

    def report(self, diagnostic: Diagnostic) -> None:
        """Print a diagnostic, with -q only if it is an error, and keep it for `emit`."""
        self._reported.append(diagnostic)
        if self._verbosity >= 0 or diagnostic.severity == "error":
            click.echo(format_diagnostics([diagnostic], colors=True), err=True)

    def report_unavailable(self, reasons: Iterable[str]) -> None:
        """Report the members of installed packages that cannot be used, each with the reason."""
        for reason in reasons:
            self.report(Diagnostic(code="member-unavailable", severity="warning", message=f"left out: {reason}"))


def console_options(command: Any) -> Any:
    """Add -v, -q and --json to a command, which receives them as `verbosity` and `as_json`."""
    command = click.option("-v", "--verbose", "verbosity", flag_value=1, type=int, default=0, help="Print more.")(command)
    command = click.option("-q", "--quiet", "verbosity", flag_value=-1, type=int, help="Print only errors.")(command)
    return click.option("--json", "as_json", is_flag=True, help="Print data and diagnostics as JSON on stdout.")(command)


def emit(data: Any, diagnostics: Sequence[Diagnostic] = ()) -> None:
    """Print one JSON object: the fields of `data`, and under `diagnostics` what was reported before and `diagnostics`.

    `data` is a mapping or a record.
    """
    import msgspec

    fields = msgspec.to_builtins(data, str_keys=True)
    print_json({**fields, "diagnostics": list(dict.fromkeys([*_reported.get([]), *diagnostics]))})


def print_json(document: Any) -> None:
    """Print one JSON document."""
    import msgspec

    click.echo(msgspec.json.format(msgspec.json.encode(document), indent=2).decode())


def print_errors(diagnostics: Sequence[Diagnostic], *, as_json: bool) -> None:
    """Print why a command failed: as text on stderr and, for `as_json`, with what was reported before as JSON on stdout."""
    if as_json:
        emit({}, diagnostics)
    click.echo(format_diagnostics(diagnostics, colors=True), err=True)
