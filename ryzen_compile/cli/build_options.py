"""The options that say what to build: shapes, data, passes, and the builder's own by trtexec's names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ryzen_compile.errors import ShapeError, UsageError

if TYPE_CHECKING:
    from ryzen_compile.backends.builder_options import BuilderOption
    from ryzen_compile.cli.console import ConsoleProgress

_BUILDER_OPTION_PREFIX = "builder_"
_MAX_AXIS_SIZE = 2**63 - 1
"""Along one axis: sizes are int64 wherever they are kept."""

SEED = click.IntRange(0, 2**32 - 1)
"""What every generator of numbers takes."""


class FiniteFloat(click.FloatRange):
    """A finite number in a range; nan lies in none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read a number; a usage error for what is none, not finite or out of range."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


GIGABYTES = FiniteFloat(0, 1e9, min_open=True)
SECONDS = FiniteFloat(0, 1e9, min_open=True)


def validate_shapes(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """Return the shapes of an option as they are; raises ShapeError for an axis that nothing can hold."""
    from ryzen_compile.spec.profile import parse_shapes

    for text in (value,) if isinstance(value, str) else value or ():
        try:
            sizes = [size for shape in parse_shapes(text).values() for size in shape]
        except ValueError:
            sizes = [_MAX_AXIS_SIZE + 1]  # more digits than Python reads
        if max(sizes, default=0) > _MAX_AXIS_SIZE:
            raise ShapeError(
                f"{parameter.opts[0]} `{text[:200]}`: an axis has at most {_MAX_AXIS_SIZE} elements",
                hint="ask for smaller shapes",
            )
    return value


def check_data_excludes_shapes(data: str | None, shapes: str | None) -> None:
    """Raise UsageError where both samples and the shapes of seeded values are given."""
    if data is not None and shapes is not None:
        raise UsageError("--shapes is for seeded values, and --data brings its own", hint="leave one of the two out")


def shape_options(command: Any) -> Any:
    """Add --min-shapes, --opt-shapes and --max-shapes, as in trtexec; each may be repeated, once a profile."""
    for name, says in (
        ("max", "The largest shapes of a profile; alone or with --opt-shapes."),
        ("opt", "The shapes that a profile is tuned for; alone they are the only ones."),
        ("min", "The smallest shapes of a profile, as ids:1x8,mask:1x8; repeat for more profiles [derived]."),
    ):
        command = click.option(
            f"--{name}-shapes", f"--{name}Shapes", multiple=True, metavar="NAME:1x8,...", callback=validate_shapes, help=says
        )(command)
    return command


def data_options(command: Any) -> Any:
    """Add --data, --seed and --criteria."""
    command = click.option("--criteria", metavar="FILE", help="A success_criteria.toml [the project's].")(command)
    command = click.option("--seed", type=SEED, default=0, show_default=True, help="Of all that is random.")(command)
    return click.option(
        "--data", metavar="SAMPLES", help="FILE.npz, a folder of them, FILE.py[:FUNCTION] or recipe:NAME [seeded values]."
    )(command)


def builder_options(command: Any) -> Any:
    """Add the builder's options and the precision flags of earlier trtexecs, from their table."""
    from ryzen_compile.backends.builder_options import OPTIONS, PRECISION_FLAGS

    for option in reversed(OPTIONS):
        command = click.option(
            *_option_flags(option),
            _BUILDER_OPTION_PREFIX + option.name,
            **_option_settings(option),
            help=_sentence(option.description),
        )(command)
    for intent in reversed(PRECISION_FLAGS):
        says = f"Means -p ...,{intent.pass_spec}" if intent.pass_spec else _sentence(intent.description)
        command = click.option(f"--{intent.name}", _BUILDER_OPTION_PREFIX + intent.name, is_flag=True, help=says)(command)
    return command


def pop_builder_options(values: dict[str, Any], progress: ConsoleProgress) -> tuple[dict[str, str], str | None]:
    """Take the builder's options out of `given`; return them as the backends read them, and the precision asked for.

    Raises UsageError where two precisions are asked for or one that no pass gives.
    """
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
    asked = [intent for intent in PRECISION_FLAGS if raw[intent.name]]
    for intent in asked:
        if intent.pass_spec is None:
            raise UsageError(f"`--{intent.name}`: {intent.description}", hint="see `ryzen-compile passes`")
        progress.message(f"--{intent.name}: {f'adds the pass {intent.pass_spec}' if intent.pass_spec else intent.description}")
    precisions = {intent.pass_spec for intent in asked if intent.pass_spec}
    if len(precisions) > 1:
        raise UsageError(f"{' and '.join(f'--{intent.name}' for intent in asked)} ask for two precisions", hint="give one")
    precision = next(iter(precisions), None)
    return options, precision.removeprefix("precision{to=").removesuffix("}") if precision else None


def parse_model_arguments(arguments: Sequence[str]) -> str | dict[str, Path]:
    """Return one file, or files by the names of their graphs, from FILE or NAME=FILE NAME=FILE ...; raises UsageError."""
    if len(arguments) == 1 and ("=" not in arguments[0] or Path(arguments[0]).exists()):
        _check_file_name(arguments[0])
        return arguments[0]
    found: dict[str, Path] = {}
    for word in arguments:
        name, equals, file = word.partition("=")
        if not equals or not name or not file:
            raise UsageError(
                f"`{word}` names no graph", hint="several graphs are given as prefill=prefill.onnx decode=decode.onnx"
            )
        if name in found:
            raise UsageError(f"the graph `{name}` is given twice", hint="give each graph its own name")
        _check_file_name(file)
        found[name] = Path(file)
    return found


def _check_file_name(file: str) -> None:
    if not Path(file).name:
        raise UsageError(f"`{file}` names no file", hint="give the path of an ONNX file")


def _option_flags(option: BuilderOption) -> tuple[str, ...]:
    return tuple(f"--{name}" for name in (option.name, *option.aliases))


def _option_settings(option: BuilderOption) -> dict[str, Any]:
    return {"is_flag": True} if option.metavar is None else {"metavar": option.metavar}


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."
