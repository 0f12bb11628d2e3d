"""How passes are read from the command line: `fold,precision{to=fp16,keep=[a,b]}`, the inverse of `str(pass)`."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import msgspec

from ryzen_compile import registry
from ryzen_compile.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from ryzen_compile.spec.passes import Pass

_CLOSING_BRACKETS = {"{": "}", "[": "]"}


def parse(text: str) -> tuple[Pass, ...]:
    """Read a list of passes; raises UsageError that names what cannot be read."""
    return tuple(_parse_pass(part) for part in _split(text, text))


def _parse_pass(text: str) -> Pass:
    name, brace, rest = text.partition("{")
    name = name.strip()
    if brace and not rest.rstrip().endswith("}"):
        raise UsageError(f"`{text}`: the `{{` is never closed", hint="write name{option=value,...}")
    cls = registry.find_pass(name)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    known = {field.name.replace("_", "-"): field.name for field in fields}
    lists = {field.name for field in fields if str(field.type).startswith("tuple")}
    options: dict[str, Any] = {}
    for part in _split(rest.rstrip()[:-1], text) if brace else []:
        key, equals, value = part.partition("=")
        key = key.strip().replace("_", "-")
        if key not in known:
            raise UsageError(f"`{name}` has no option `{key}`", hint=did_you_mean(key, list(known)))
        if not equals:
            raise UsageError(f"`{text}`: `{key}` has no value", hint=f"write {name}{{{key}=...}}")
        if known[key] in options:
            raise UsageError(f"`{text}`: `{key}` is given twice")
        found = _parse_value(value.strip(), text)
        options[known[key]] = [found] if known[key] in lists and found and isinstance(found, str) else found
    try:
        return msgspec.convert(options, type=cls, strict=False)
    except (msgspec.ValidationError, ValueError) as error:
        raise UsageError(f"`{text}`: {error}", hint=f"see `ryzen-compile passes {name}`") from error


def _parse_value(text: str, full_text: str) -> Any:
    if text.startswith("["):
        if not text.endswith("]"):
            raise UsageError(f"`{full_text}`: the `[` is never closed")
        return [_parse_value(item.strip(), full_text) for item in _split(text[1:-1], full_text)]
    if text.startswith('"'):
        try:
            return json.loads(text)
        except ValueError as error:
            raise UsageError(f"`{full_text}`: {text} is not a quoted word", hint='write "..." with \\" for a quote') from error
    return text


def _split(text: str, full_text: str) -> list[str]:
    """Cut at the commas that stand outside of every bracket and quote."""
    parts: list[str] = []
    open_: list[str] = []
    start, at = 0, 0
    while at < len(text):
        char = text[at]
        if char == '"':
            at += 1
            while at < len(text) and text[at] != '"':
                at += 2 if text[at] == "\\" else 1
            if at >= len(text):
                raise UsageError(f"`{full_text}`: a quote is never closed")
        elif char in _CLOSING_BRACKETS:
            open_.append(_CLOSING_BRACKETS[char])
        elif char in _CLOSING_BRACKETS.values():
            if not open_ or open_.pop() != char:
                raise UsageError(f"`{full_text}`: the `{char}` closes nothing")
        elif char == "," and not open_:
            parts.append(text[start:at])
            start = at + 1
        at += 1
    if open_:
        raise UsageError(f"`{full_text}`: a `{open_[-1]}` is missing")
    parts.append(text[start:])
    if len(parts) == 1 and not parts[0].strip():
        return []
    if any(not part.strip() for part in parts):
        raise UsageError(f"`{full_text}`: there is nothing between two commas")
    return [part.strip() for part in parts]
