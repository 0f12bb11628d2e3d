"""What the verbs say and to whom: data to stdout, talk and progress to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
import msgspec


class ConsoleProgress:
    """Progress on stderr: a spinner on a terminal, plain lines elsewhere, nothing when quiet."""

    def __init__(self, verbosity: int) -> None:
        self._verbosity = verbosity
        self._interactive = verbosity >= 0 and sys.stderr.isatty()

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """Show that `what` is being done, and with -v how long it took."""
        started = time.perf_counter()
        if self._interactive:
            from rich.console import Console

            with Console(stderr=True).status(title):
                yield
        else:
            yield
        if self._verbosity > 0:
            click.echo(f"{title}: {time.perf_counter() - started:.1f} s", err=True)

    def message(self, text: str) -> None:
        """Print `line` unless quiet."""
        if self._verbosity >= 0:
            click.echo(text, err=True)


def console_options(command: Any) -> Any:
    """Add -v/-q and --json to a command; it gets `verbosity` and `as_json`."""
    command = click.option("-v", "--verbose", "verbosity", flag_value=1, type=int, default=0, help="Say more.")(command)
    command = click.option("-q", "--quiet", "verbosity", flag_value=-1, type=int, help="Say nothing but errors.")(command)
    return click.option("--json", "as_json", is_flag=True, help="Print data as JSON on stdout.")(command)


def emit(data: Any) -> None:
    """Print one JSON document."""
    click.echo(msgspec.json.format(msgspec.json.encode(data), indent=2).decode())


def format_table(rows: Sequence[Sequence[str]], *, header: Sequence[str] | None = None, indent: str = "") -> str:
    """Return `rows` as columns, padded."""
    lines = [list(header), *map(list, rows)] if header else [list(row) for row in rows]
    widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))] if lines else []
    return "\n".join(
        (indent + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))).rstrip() for line in lines
    )


def format_size(size_bytes: int) -> str:
    """Return a number of bytes as people read it: `96.2 MB`."""
    value = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
