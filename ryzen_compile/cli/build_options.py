"""Shared command-line options of a build: shapes, data, passes, and builder options by trtexec's names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ryzen_compile.api import MAX_SEED
from ryzen_compile.cli.completion import complete_passes, complete_targets
from ryzen_compile.diagnostic import Diagnostic
from ryzen_compile.errors import ShapeError, UsageError

if TYPE_CHECKING:
    from ryzen_compile.backends.builder_options import BuilderOption
    from ryzen_compile.cli.console import ConsoleProgress
    from ryzen_compile.spec.dtypes import Precision

_BUILDER_OPTION_PREFIX = "builder_"
_MAX_AXIS_SIZE = 2**63 - 1
"""The maximum size of an axis: sizes are stored as int64."""

SAMPLES_HELP = "FILE.npz, a folder of them, FILE.py[:FUNCTION], recipe:NAME or hf:FOLDER"
"""The forms of the value of --data."""

SEED = click.IntRange(0, MAX_SEED)
"""The range of seeds that every random number generator accepts."""


class FiniteFloat(click.FloatRange):
    """A finite number in a range; nan is in no range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse a number; raises a usage error if it is not a number, not finite or out of range."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


GIGABYTES = FiniteFloat(0, 1e9, min_open=True)
SECONDS = FiniteFloat(0, 1e9, min_open=True)


def validate_shapes(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """Return the shapes of an option unchanged; raises ShapeError for an axis size beyond int64."""
    from ryzen_compile.spec.profile import parse_shapes

    for text in (value,) if isinstance(value, str) else value or ():
        try:
            sizes = [size for shape in parse_shapes(text).values() for size in shape]
        except ValueError:
            sizes = [_MAX_AXIS_SIZE + 1]  # more digits than Python converts to an int
        if max(sizes, default=0) > _MAX_AXIS_SIZE:
            raise ShapeError(
                f"{parameter.opts[0]} `{text[:200]}`: an axis has at most {_MAX_AXIS_SIZE} elements",
                hint="use smaller shapes",
            )
    return value


def check_data_excludes_shapes(data: str | None, shapes: str | None) -> None:
    """Raise UsageError if both samples and the shapes of random values are given."""
    if data is not None and shapes is not None:
        raise UsageError(
            "--shapes is for random values, and the samples of --data have their own shapes", hint="leave one of the two out"
        )


def shape_options(command: Any) -> Any:
    """Add --min-shapes, --opt-shapes and --max-shapes as in trtexec; each may be repeated, once per profile."""
    for name, description in (
        ("max", "The largest shapes of a profile [derived]."),
        ("opt", "The shapes that a profile is optimized for; alone, the only shapes of the profile [derived, or the largest]."),
        ("min", "The smallest shapes of a profile, as in ids:1x8,mask:1x8; repeat for more profiles [derived]."),
    ):
        command = click.option(
            f"--{name}-shapes",
            f"--{name}Shapes",
            multiple=True,
            metavar="NAME:1x8,...",
            callback=validate_shapes,
            help=description,
        )(command)
    return command


def pipeline_option(command: Any) -> Any:
    """Add --passes, which may be repeated, once per variant."""
    return click.option(
        "-p",
        "--passes",
        multiple=True,
        shell_complete=complete_passes,
        metavar="PASSES",
        help="A pipeline: `fold,precision{to=fp16}`, or `none`. Repeat it for several variants; the first is the default "
        "[the backend's].",
    )(command)


def target_options(command: Any) -> Any:
    """Add --gpu, --backend and --passes."""
    command = click.option("--backend", help="Use only this backend.")(pipeline_option(command))
    return click.option(
        "--gpu",
        default="auto",
        show_default=True,
        shell_complete=complete_targets,
        help="Comma-separated targets: cpu, sm89, rtx4090, sm89@windows, auto.",
    )(command)


def data_options(command: Any) -> Any:
    """Add --data and --seed."""
    command = click.option("--seed", type=SEED, default=0, show_default=True, help="The seed of all random values.")(command)
    return click.option("--data", metavar="SAMPLES", help=f"{SAMPLES_HELP} [random values].")(command)


def limit_options(command: Any) -> Any:
    """Add --memory-limit and --time-limit to a command that runs or compiles models in child processes."""

    def to_bytes(context: click.Context, parameter: click.Parameter, value: float | None) -> int | None:
        return None if value is None else round(value * 1e9)

    command = click.option(
        "--time-limit",
        "time_limit_seconds",
        metavar="SECONDS",
        type=SECONDS,
        help="The maximum duration of every process that runs or compiles the model.",
    )(command)
    return click.option(
        "--memory-limit",
        "memory_limit_bytes",
        metavar="GB",
        type=GIGABYTES,
        callback=to_bytes,
        help="The maximum memory of every process that runs or compiles the model [what is available].",
    )(command)


def criteria_option(command: Any) -> Any:
    """Add --criteria to a command that compares finished variants."""
    text = "A success_criteria.toml file [the project's; for a lossy variant, its accuracy floor]."
    return click.option("--criteria", metavar="FILE", help=text)(command)


def builder_options(command: Any) -> Any:
    """Add the builder options, and the precision flags of trtexec versions before 11, from their tables."""
    from ryzen_compile.backends.builder_options import OPTIONS, PRECISION_FLAGS

    for option in reversed(OPTIONS):
        command = click.option(
            *_option_flags(option),
            _BUILDER_OPTION_PREFIX + option.name,
            **_option_settings(option),
            help=_sentence(option.description),
        )(command)
    for flag in reversed(PRECISION_FLAGS):
        description = f"Convert every pipeline to {flag.precision}." if flag.precision else _sentence(flag.description)
        command = click.option(f"--{flag.name}", _BUILDER_OPTION_PREFIX + flag.name, is_flag=True, help=description)(command)
    return command


def config_options(command: Any) -> Any:
    """Add an option for every field of a build configuration but its limits and its builder options."""
    command = click.option("--compare/--no-compare", default=True, help="Compare every variant with its source.")(command)
    command = click.option(
        "--baseline", metavar="MODULE", help="Compare with a PyTorch module too: FILE.py:FUNCTION, recipe:NAME, hf:FOLDER."
    )(command)
    command = click.option(
        "--accuracy-floor",
        metavar="METRIC=FLOOR",
        help="What all lossy passes may cost together, as in cosine=0.99 [no limit].",
    )(command)
    command = click.option("--criteria", metavar="FILE", help="A success_criteria.toml file [the project's].")(command)
    return target_options(shape_options(data_options(command)))


def pop_builder_options(values: dict[str, Any], progress: ConsoleProgress) -> tuple[dict[str, str], Precision | None]:
    """Remove the builder options from `values`; return them as the backends parse them, and the requested precision.

    Raises UsageError if two precisions are requested, or one that no pass provides.
    """
    from ryzen_compile import registry
    from ryzen_compile.backends.builder_options import OPTIONS, PRECISION_FLAGS

    raw = {
        name.removeprefix(_BUILDER_OPTION_PREFIX): values.pop(name)
        for name in list(values)
        if name.startswith(_BUILDER_OPTION_PREFIX)
    }
    options = {}
    for option in OPTIONS:
        value = raw[option.name]
        if value is not None and value is not False:
            options[option.name] = "" if value is True else str(value)
    flags = [flag for flag in PRECISION_FLAGS if raw[flag.name]]
    for flag in flags:
        if flag.refused:
            raise UsageError(f"`--{flag.name}`: {flag.description}", hint="see `ryzen-compile passes`")
        effect = flag.description
        if flag.precision:
            effect = f"adds the pass {registry.find_precision_pass().with_precision(flag.precision)}"
        progress.report(Diagnostic(code="option-translated", severity="info", message=effect, location=f"--{flag.name}"))
    precisions = {flag.precision for flag in flags if flag.precision}
    if len(precisions) > 1:
        raise UsageError(f"{' and '.join(f'--{flag.name}' for flag in flags)} request two precisions", hint="give one of them")
    return options, next(iter(precisions), None)


def parse_model_arguments(arguments: Sequence[str]) -> str | dict[str, Path]:
    """Parse FILE, or NAME=FILE NAME=FILE ...; return the file, or the files by graph name. Raises UsageError."""
    if len(arguments) == 1 and ("=" not in arguments[0] or Path(arguments[0]).exists()):
        _check_file_name(arguments[0])
        return arguments[0]
    files: dict[str, Path] = {}
    for argument in arguments:
        name, equals, file = argument.partition("=")
        if not equals or not name or not file:
            raise UsageError(
                f"`{argument}` names no graph", hint="write several graphs as prefill=prefill.onnx decode=decode.onnx"
            )
        if name in files:
            raise UsageError(f"the graph `{name}` is given twice", hint="give each graph its own name")
        _check_file_name(file)
        files[name] = Path(file)
    return files


def _check_file_name(file: str) -> None:
    if not Path(file).name:
        raise UsageError(f"`{file}` names no file", hint="give the path of an ONNX file")


def _option_flags(option: BuilderOption) -> tuple[str, ...]:
    return tuple(f"--{name}" for name in (option.name, *option.aliases))


def _option_settings(option: BuilderOption) -> dict[str, Any]:
    return {"is_flag": True} if option.metavar is None else {"metavar": option.metavar}


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."
