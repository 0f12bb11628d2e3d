"""The public API as text, as docs/api.md lists it.

cd tests && ../.venv/bin/python -m support.public_api    # print the list, to change docs/api.md on purpose
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import msgspec

import ryzen_compile as rc

_MAX_LINE = 110
_BY_NAME_ONLY = ("ryzen_compile.artifacts.package.manifest", "ryzen_compile.spec.")
"""Modules of records whose fields the JSON Schema of packages lists."""


def render() -> str:
    """Return every public name: functions and methods with their signatures, result records with their fields."""
    names = sorted(rc.__all__, key=lambda name: (inspect.isclass(getattr(rc, name)), name))
    return "\n".join(line for name in names for line in _describe(name, getattr(rc, name)))


def _describe(name: str, value: Any) -> Iterator[str]:
    if inspect.isfunction(value):
        yield from _signature(name, value, indent="")
        return
    if inspect.ismodule(value):
        for member in value.__all__:
            yield from _describe(f"{name}.{member}", getattr(value, member))
        return
    bases = ", ".join(base.__name__ for base in value.__bases__ if base.__name__ in {*rc.__all__, "Exception"})
    yield f"class {name}({bases})" if bases else f"class {name}"
    if value.__module__.startswith(_BY_NAME_ONLY):
        return
    for field, type_ in _fields(value):
        yield f"    {field}: {type_}"
    for member, attribute in vars(value).items():
        if isinstance(attribute, property):
            yield f"    {member}: {attribute.fget.__annotations__['return']}"
        elif callable(getattr(value, member)) and (not member.startswith("_") or member == "__call__"):
            yield from _signature(member, getattr(value, member), indent="    ")


def _fields(cls: type) -> list[tuple[str, str]]:
    if dataclasses.is_dataclass(cls):
        return [(field.name, str(field.type)) for field in dataclasses.fields(cls) if not field.name.startswith("_")]
    if issubclass(cls, msgspec.Struct):
        return [(field, str(cls.__annotations__[field])) for field in cls.__struct_fields__]
    return []


def _signature(name: str, function: Any, *, indent: str) -> Iterator[str]:
    """Yield a signature on one line, or with one parameter on each line if it is long."""
    signature = inspect.signature(function)
    parameters: list[str] = []
    previous: inspect.Parameter | None = None
    for parameter in signature.parameters.values():
        if parameter.name == "self":
            continue
        if previous is not None and previous.kind is parameter.POSITIONAL_ONLY is not parameter.kind:
            parameters.append("/")
        if parameter.kind is parameter.KEYWORD_ONLY and (previous is None or previous.kind is not parameter.KEYWORD_ONLY):
            parameters.append("*")
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        parameters.append(f"{stars}{parameter.name}: {parameter.annotation}{default}")
        previous = parameter
    line = f"{indent}{name}({', '.join(parameters)}) -> {signature.return_annotation}"
    if len(line) <= _MAX_LINE:
        yield line
        return
    yield f"{indent}{name}("
    yield from (f"{indent}    {parameter}," for parameter in parameters)
    yield f"{indent}) -> {signature.return_annotation}"


if __name__ == "__main__":
    sys.stdout.write(render() + "\n")
