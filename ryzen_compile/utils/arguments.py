"""Checks of arguments of public functions: a wrong name or type is a UsageError that names the right spelling."""

from __future__ import annotations

import functools
import inspect
import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from ryzen_compile.errors import UsageError, did_you_mean

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")
_Check = Callable[[Any], bool]


def _is_path(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike))


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def _is_texts(value: Any) -> bool:
    return _is_list(value) and all(isinstance(item, str) for item in value)


def _is_text_by_name(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(text, str) for item in value.items() for text in item)


def _is_shapes(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(sizes, Sequence) and all(map(_is_integer, sizes)) for sizes in value.values())
    return isinstance(value, str)


def _is_profile_shapes(value: Any) -> bool:
    return _is_shapes(value) or (isinstance(value, Sequence) and all(map(_is_shapes, value)))


def _is_dynamic(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(axes, Mapping) and all(_is_integer(axis) and isinstance(dim, str) for axis, dim in axes.items())
        for axes in value.values()
    )


def _is_progress(value: Any) -> bool:
    return callable(getattr(value, "stage", None)) and callable(getattr(value, "report", None))


_PATH = (_is_path, "a path")
_TEXT = (lambda value: isinstance(value, str), "text")
_CHECKS: dict[str, tuple[_Check, str]] = {
    "StrPath": _PATH,
    "StrPath | Literal[False]": (lambda value: _is_path(value) or value is False, "a path or False"),
    "str": _TEXT,
    "int": (_is_integer, "an integer"),
    "float": (_is_number, "a number"),
    "bool": (lambda value: isinstance(value, bool), "True or False"),
    "str | Sequence[str]": (lambda value: isinstance(value, str) or _is_texts(value), "text or a list of texts"),
    "Sequence[str]": (_is_texts, "a list of texts"),
    "str | Mapping[str, str]": (
        lambda value: isinstance(value, str) or _is_text_by_name(value),
        'text, or texts by graph name: {"decode": "decode.onnx"}',
    ),
    "str | Sequence[int | Literal['any']]": (
        lambda value: isinstance(value, str) or _is_list(value),
        'step widths: [1, "any"] or "1,any"',
    ),
    "Shapes": (_is_shapes, 'shapes by input name: {"x": (8, 128)} or "x:8x128"'),
    "Shapes | Sequence[Shapes]": (_is_profile_shapes, 'shapes by input name: {"x": (8, 128)} or "x:8x128"'),
    "Mapping[str, Mapping[int, str]]": (_is_dynamic, 'names of axes by input: {"x": {0: "batch", 1: "seq"}}'),
    "Mapping[str, str | int | float | bool]": (
        lambda value: isinstance(value, Mapping) and all(isinstance(name, str) for name in value),
        'values by option name: {"builderOptimizationLevel": 5}',
    ),
    "Progress": (_is_progress, "an object with the methods `stage` and `report`"),
}
"""What an argument must be, by its annotation in the source, without `| None`. Other annotations are not checked here."""


def checked(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Return `function` with a check of its arguments, which raises UsageError in place of TypeError and AttributeError."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise _binding_error(function.__name__, signature, kwargs, error) from None
        for name, value in bound.arguments.items():
            annotation = str(signature.parameters[name].annotation)
            is_optional = annotation.endswith(" | None")
            check = _CHECKS.get(annotation.removesuffix(" | None"))
            if check is not None and not (value is None and is_optional) and not check[0](value):
                raise UsageError(f"`{name}` must be {check[1]} (got {_describe(value)})", hint=_usage(function.__name__, name))
            if annotation.startswith("int") and value is not None:
                bound.arguments[name] = int(value)
            if annotation.startswith("StrPath") and hasattr(value, "__fspath__"):
                bound.arguments[name] = os.fspath(value)
        return function(*bound.args, **bound.kwargs)

    return call


def _binding_error(function: str, signature: inspect.Signature, kwargs: Mapping[str, Any], error: TypeError) -> UsageError:
    names = list(signature.parameters)
    for name in kwargs:
        if name not in names:
            return UsageError(f"`{function}` has no argument `{name}`", hint=did_you_mean(name, names))
    return UsageError(f"`{function}`: {error}", hint=f"write {function}{signature}")


def _describe(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__}: {text}" if len(text) <= 80 and "\n" not in text else type(value).__name__


def _usage(function: str, name: str) -> str:
    return f"`help(ryzen_compile.{function})` describes `{name}`"
