"""Console output of the commands: data to stdout, diagnostics and progress to stderr."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import click

from ryzen_compile.cli.stage_text import RunningStage, StageList
from ryzen_compile.diagnostic import Diagnostic
from ryzen_compile.progress import StageItems
from ryzen_compile.report.diagnostics import format_diagnostics

_reported: ContextVar[list[Diagnostic]] = ContextVar("reported diagnostics")
"""What the running command has reported so far; `--json` prints it with the data."""


def start_report() -> None:
    """Forget what an earlier command in this process reported."""
    _reported.set([])


class ConsoleProgress:
    """Progress on stderr: in place on a terminal, otherwise a line at most every 10 s; nothing with -q."""

    def __init__(self, verbosity: int, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._verbosity = verbosity
        self._clock = clock
        self._reported = _reported.get([])
        self._display = _StageDisplay(is_terminal=sys.stderr.isatty(), clock=clock) if verbosity >= 0 else None

    @contextmanager
    def stage(self, title: str, items: StageItems | None = None) -> Iterator[RunningStage]:
        """Show the stage with its counts and times while the block runs and, with -v, print its duration."""
        stage = RunningStage(title, items, self._clock)
        with nullcontext() if self._display is None else self._display.show(stage):
            yield stage
        if self._verbosity > 0:
            click.echo(stage.summary(), err=True)

    def report(self, diagnostic: Diagnostic) -> None:
        """Print a diagnostic, with -q only if it is an error, and keep it for `emit`."""
        self._reported.append(diagnostic)
        if self._verbosity >= 0 or diagnostic.severity == "error":
            click.echo(format_diagnostics([diagnostic], colors=True), err=True)

    def report_unavailable(self, reasons: Iterable[str]) -> None:
        """Report the members of installed packages that cannot be used, each with the reason."""
        for reason in reasons:
            self.report(Diagnostic(code="member-unavailable", severity="warning", message=f"left out: {reason}"))


class _StageDisplay:
    """Shows the running stages from a thread that runs while there are any."""

    def __init__(self, *, is_terminal: bool, clock: Callable[[], float]) -> None:
        self._is_terminal = is_terminal
        self._lock = threading.Lock()
        self._stages = StageList(clock)
        self._ended = threading.Event()
        """Set when the last of the stages of `_thread` ends; each thread has its own."""
        self._thread: threading.Thread | None = None

    @contextmanager
    def show(self, stage: RunningStage) -> Iterator[None]:
        """Show a stage while the block runs."""
        with self._lock:
            self._stages.begin(stage)
            if self._thread is None:
                self._ended = threading.Event()
                self._thread = threading.Thread(target=self._run, args=(self._ended,), daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                thread = self._thread if self._stages.end(stage) else None
                if thread is not None:
                    self._ended.set()
                    self._thread = None
            if thread is not None:
                thread.join()

    def _run(self, ended: threading.Event) -> None:
        if not self._is_terminal:
            while not ended.wait(self._stages.seconds_to_line()):
                if line := self._stages.next_line():
                    click.echo(line, err=True)
            return
        from rich.console import Console
        from rich.text import Text

        with Console(stderr=True).status(Text(self._stages.text() or ""), refresh_per_second=4) as status:
            while not ended.wait(0.5):
                if text := self._stages.text():
                    status.update(Text(text))


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


def print_errors(diagnostics: Sequence[Diagnostic], *, as_json: bool, data: Any = None) -> None:
    """Print why a command failed: as text on stderr and, for `as_json`, as JSON on stdout.

    The JSON has what was reported before, and the fields of `data`, what the command made although it failed.
    """
    if as_json:
        emit(data or {}, diagnostics)
    click.echo(format_diagnostics(diagnostics, colors=True), err=True)
