"""The program: find the command, run it, and report errors as one message and an exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from ryzen_compile.cli.command_group import CommandGroup
from ryzen_compile.cli.console import print_errors, start_report
from ryzen_compile.errors import InternalError, RyzenError, UsageError, printable
from ryzen_compile.utils.deferred_import import defer_sympy

_ENVIRONMENT_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN}
)
"""Errors of an operating system that runs out of something, which need no file name to be understood."""
_PASS_FAILED = "pass-failed"
"""The code of an error whose cause is an unexpected exception in a pass."""


@click.command(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="ryzen-compile", prog_name="ryzen-compile")
def program() -> None:
    """Compile models to engine packages with recorded accuracy and provenance.

    \b
    ryzen-compile export minilm minilm.onnx
    ryzen-compile build minilm.onnx --gpu cpu,sm86,sm89 --fp16
    ryzen-compile compare minilm.ryzen --baseline recipe:minilm
    """


class _Terminated(KeyboardInterrupt):
    """Raised on SIGTERM; it is handled like Ctrl-C, so that the same cleanup runs."""


def main(args: list[str] | None = None) -> None:
    """Run the program and exit.

    The exit code is 0 for success, 1 for a refusal, 2 for a usage error, 70 for an internal error, 130 for SIGINT and 143 for
    SIGTERM.
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    signal.signal(signal.SIGTERM, _terminate)
    defer_sympy()
    sys.exit(run(sys.argv[1:] if args is None else args))


def run(args: list[str]) -> int:
    """Run the program on `args` and return its exit code."""
    if sys.stdout is None:
        return _report_error(RyzenError("standard output is closed", hint="redirect it to a file: >/dev/null"), as_json=False)
    start_report()
    as_json = "--json" in args
    try:
        return _run_command(args, as_json=as_json)
    except BrokenPipeError:
        _redirect_stdout_to_devnull()
        return 1
    except Exception as error:  # noqa: BLE001 - the last handler
        if isinstance(error, OSError) and error.filename is None and _is_stdout_error(error):
            _redirect_stdout_to_devnull()
            return _report_error(RyzenError(f"standard output cannot be written: {error.strerror}"), as_json=False)
        reported = _convert_unexpected(error, args)
        if isinstance(reported, InternalError) or not isinstance(error, OSError):
            _print_trace(error, args)
        return _report_error(reported, as_json=as_json)


def _print_trace(error: BaseException, args: list[str]) -> None:
    """Print the trace of an unexpected exception if `args` ask for more output."""
    if "-v" in args or "--verbose" in args:
        import traceback

        click.echo("".join(traceback.format_exception(error)), err=True)


def _convert_unexpected(error: Exception, args: list[str]) -> RyzenError:
    """Return the error to report for an exception that no command expects."""
    if isinstance(error, OSError) and (error.filename is not None or error.errno in _ENVIRONMENT_ERRORS):
        name = "" if error.filename is None else f"`{printable(error.filename)}`: "
        return RyzenError(f"{name}{error.strerror}")
    if isinstance(error, MemoryError):
        return RyzenError(
            "the memory does not suffice", hint="use smaller shapes and fewer samples, or a machine with more memory"
        )
    if isinstance(error, RecursionError):
        return RyzenError(
            "the input is nested too deeply to be processed", hint="flatten it: inline its functions and subgraphs"
        )
    from ryzen_compile.utils.user_script import error_text

    command = next((argument for argument in args if not argument.startswith("-")), "ryzen-compile")
    return InternalError(
        f"internal error in {printable(command)}: {error_text(error)}",
        hint="please report it, with the output of the same command with -v",
    )


def _run_command(args: list[str], *, as_json: bool) -> int:
    try:
        result: Any = program.main(args=args, prog_name="ryzen-compile", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except RyzenError as error:
        if error.__cause__ is not None and error.diagnostics[0].code == _PASS_FAILED:
            _print_trace(error.__cause__, args)
        return _report_error(error, as_json=as_json)
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except (click.Abort, KeyboardInterrupt) as interrupt:
        click.echo("stopped", err=True)
        return 143 if isinstance(interrupt, _Terminated) or isinstance(interrupt.__cause__, _Terminated) else 130
    except click.NoSuchOption as error:
        return _report_error(UsageError(f"there is no option `{error.option_name}`", hint=_suggestion(error)), as_json=as_json)
    except click.ClickException as error:
        return _report_error(UsageError(error.format_message().rstrip("."), hint=_usage_hint(error)), as_json=as_json)


def _usage_hint(error: click.ClickException) -> str | None:
    """Return what to write: for a missing option its values, for a missing argument the usage of the command."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    if context is None:
        return None
    parameter = error.param if isinstance(error, click.MissingParameter) else None
    if isinstance(parameter, click.Option) and parameter.help:
        return f"{parameter.opts[-1]}: {parameter.help}"
    if isinstance(parameter, click.Argument):
        return f"{' '.join(context.get_usage().split()).removeprefix('Usage: ')}; see `{context.command_path} --help`"
    return f"see `{context.command_path} --help`"


def _terminate(number: int, frame: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second signal would interrupt the cleanup
    raise _Terminated


def _redirect_stdout_to_devnull() -> None:
    """Send remaining buffered output to /dev/null, so that the interpreter does not fail to flush it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_stdout_error(error: OSError) -> bool:
    """Return whether the error was raised while writing stdout: by click, or by a flush in this module."""
    import traceback

    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return raised_in in (Path(__file__), Path(click.utils.__file__))


def _suggestion(error: click.NoSuchOption) -> str | None:
    """Return a hint for an unknown option: the replacement of a trtexec or Polygraphy option, or the closest option."""
    from ryzen_compile.backends.builder_options import OPTION_ALTERNATIVES

    alternative = OPTION_ALTERNATIVES.get(error.option_name.lstrip("-"))
    if alternative or not error.possibilities:
        return alternative or (f"see `{error.ctx.command_path} --help`" if error.ctx else None)
    return f"did you mean `{sorted(error.possibilities)[0]}`?"


def _report_error(error: RyzenError, *, as_json: bool) -> int:
    print_errors(error.diagnostics, as_json=as_json)
    return error.exit_code
