"""Console output of the commands: data to stdout, messages and progress to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
import msgspec


class ConsoleProgress:
    """Progress on stderr: a spinner on a terminal, plain lines otherwise, nothing with -q."""

    def __init__(self, verbosity: int) -> None:
        self._verbosity = verbosity
        self._interactive = verbosity >= 0 and sys.stderr.isatty()

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

    def message(self, text: str) -> None:
        """Print `text` unless -q is given."""
        if self._verbosity >= 0:
            click.echo(text, err=True)


def console_options(command: Any) -> Any:
    """Add -v, -q and --json to a command, which receives them as `verbosity` and `as_json`."""
    command = click.option("-v", "--verbose", "verbosity", flag_value=1, type=int, default=0, help="Print more.")(command)
    command = click.option("-q", "--quiet", "verbosity", flag_value=-1, type=int, help="Print only errors.")(command)
    return click.option("--json", "as_json", is_flag=True, help="Print data as JSON on stdout.")(command)


def emit(data: Any) -> None:
    """Print one JSON document."""
    click.echo(msgspec.json.format(msgspec.json.encode(data), indent=2).decode())
