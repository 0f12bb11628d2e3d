"""Parser of pass lists on the command line, `fold,precision{to=fp16,keep=[a,b]}`: the inverse of `str(pass)`."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from ryzen_compile import registry
from ryzen_compile.errors import UsageError, did_you_mean
from ryzen_compile.spec.options import member_group

if TYPE_CHECKING:
    from ryzen_compile.spec.passes import Pass

EMPTY_PIPELINE = "none"
"""The spelling of a pipeline without passes."""
_CLOSING_BRACKETS = {"{": "}", "[": "]"}


def parse(text: str) -> tuple[Pass, ...]:
    """Parse a list of passes; `none` is the empty list. Raises UsageError that names the part that cannot be parsed."""
    if text.strip() == EMPTY_PIPELINE:
        return ()
    return tuple(_parse_pass(part) for part in _split(text, text))


def _parse_pass(text: str) -> Pass:
    name, brace, rest = text.partition("{")
    name = name.strip()
    if brace and not rest.rstrip().endswith("}"):
        raise UsageError(f"`{text}`: the `{{` is not closed", hint="write name{option=value,...}")
    cls = registry.find_pass(name)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    field_names = {field.name.replace("_", "-"): field.name for field in fields}
    list_fields = {field.name for field in fields if str(field.type).startswith("tuple")}
    options: dict[str, Any] = {}
    for part in _split(rest.rstrip()[:-1], text) if brace else []:
        option, equals, value_text = part.partition("=")
        option = option.strip().replace("_", "-")
        if option not in field_names:
            raise UsageError(f"`{name}` has no option `{option}`", hint=did_you_mean(option, list(field_names)))
        if not equals:
            raise UsageError(f"`{text}`: option `{option}` has no value", hint=f"write {name}{{{option}=...}}")
        field_name = field_names[option]
        if field_name in options:
            raise UsageError(f"`{text}`: option `{option}` is given twice", hint=f"give `{option}` once")
        value = _parse_value(value_text.strip(), text)
        is_single_item = field_name in list_fields and value and isinstance(value, str)
        options[field_name] = [value] if is_single_item else value
    for field in fields:
        if (group := member_group(field)) is not None and isinstance(member := options.get(field.name), str):
            registry.module_name(group, member)  # raises UsageError if there is no such member
    missing = [
        field.name.replace("_", "-")
        for field in fields
        if field.default is field.default_factory is dataclasses.MISSING and field.name not in options
    ]
    if missing:
        raise UsageError(
            f"`{text}`: the option `{missing[0]}` of `{name}` is required",
            hint=f"write {name}{{{','.join(f'{option}=...' for option in missing)}}}; see `ryzen-compile passes {name}`",
        )
    _check_choices(cls, options, text)
    try:
        pass_ = msgspec.convert(options, type=cls, strict=False)
        _ = pass_.fidelity  # a floor outside the range of its metric is an invalid option
        return pass_
    except (msgspec.ValidationError, ValueError) as error:
        raise UsageError(f"`{text}`: {error}", hint=f"see `ryzen-compile passes {name}`") from error


def _check_choices(cls: type[Pass], options: Mapping[str, Any], text: str) -> None:
    """Raise UsageError, with the choices, for an option that has other values."""
    for name, hint in typing.get_type_hints(cls).items():
        choices = [str(choice) for choice in typing.get_args(hint)] if typing.get_origin(hint) is typing.Literal else []
        value = options.get(name)
        if choices and isinstance(value, str) and value not in choices:
            option = name.replace("_", "-")
            raise UsageError(
                f"`{text}`: `{option}` is one of {', '.join(choices)} (got {value})", hint=did_you_mean(value, choices)
            )


def _parse_value(text: str, full_text: str) -> Any:
    if text.startswith("["):
        if not text.endswith("]"):
            raise UsageError(f"`{full_text}`: the `[` is not closed")
        return [_parse_value(item.strip(), full_text) for item in _split(text[1:-1], full_text)]
    if text.startswith('"'):
        try:
            return json.loads(text)
        except ValueError as error:
            raise UsageError(
                f"`{full_text}`: {text} is not a quoted string", hint='write "..." and escape a quote as \\"'
            ) from error
    return text


def _split(text: str, full_text: str) -> list[str]:
    """Split at the commas that are outside of brackets and quotes."""
    parts: list[str] = []
    open_brackets: list[str] = []
    start, index = 0, 0
    while index < len(text):
        char = text[index]
        if char == '"':
            index += 1
            while index < len(text) and text[index] != '"':
                index += 2 if text[index] == "\\" else 1
            if index >= len(text):
                raise UsageError(f"`{full_text}`: a quote is not closed")
        elif char in _CLOSING_BRACKETS:
            open_brackets.append(_CLOSING_BRACKETS[char])
        elif char in _CLOSING_BRACKETS.values():
            if not open_brackets or open_brackets.pop() != char:
                raise UsageError(f"`{full_text}`: the `{char}` closes no bracket")
        elif char == "," and not open_brackets:
            parts.append(text[start:index])
            start = index + 1
        index += 1
    if open_brackets:
        raise UsageError(f"`{full_text}`: a `{open_brackets[-1]}` is missing")
    parts.append(text[start:])
    if len(parts) == 1 and not parts[0].strip():
        return []
    if any(not part.strip() for part in parts):
        raise UsageError(f"`{full_text}`: there is nothing between two commas")
    return [part.strip() for part in parts]
