"""List the passes, or show one: its description, options and properties."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from typing import TYPE_CHECKING, Any

import click

from ryzen_compile.cli.console import ConsoleProgress, console_options, emit
from ryzen_compile.report.formatting import format_table

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ryzen_compile.spec.passes import Pass
    from ryzen_compile.spec.properties import Property

SECTION = "Inspect"


@click.command("passes")
@click.argument("name", required=False)
@console_options
def command(name: str | None, verbosity: int, as_json: bool) -> None:
    """List the passes, or show the pass NAME: its options, and the properties that it requires, ensures and invalidates."""
    from ryzen_compile import registry

    ConsoleProgress(verbosity).report_unavailable(registry.broken_members("passes").values() if name is None else ())
    passes = [_pass_data(cls) for cls in ([registry.find_pass(name)] if name else registry.passes().values())]
    if as_json:
        emit({"passes": passes} if name is None else passes[0])
    elif name is None:
        click.echo(format_table([(data["name"], data["description"]) for data in passes]))
        click.echo("\n`ryzen-compile passes NAME` shows the options of a pass; write a list as `-p fold,precision{to=fp16}`")
    else:
        click.echo(_format_pass(passes[0]))


def _pass_data(cls: type[Pass]) -> dict[str, Any]:
    doc = inspect.getdoc(cls) or ""
    field_docs, hints = _field_docs(cls), typing.get_type_hints(cls)
    return {
        "name": cls.name,
        "description": doc.partition("\n")[0],
        "doc": doc,
        "options": [
            {
                "name": field.name.replace("_", "-"),
                "type": _format_type(field, hints[field.name]),
                "default": None if field.default is dataclasses.MISSING else field.default,
                "required": field.default is dataclasses.MISSING,
                "description": field_docs.get(field.name, ""),
                "choices": _choices(field),
            }
            for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        ],
        "requires": _describe_properties(cls.requires),
        "ensures": _describe_properties(cls.ensures),
        "invalidates": _describe_properties(cls.invalidates),
    }


def _format_type(field: dataclasses.Field[Any], hint: Any) -> str:
    """Return the type of an option: its values if there is a fixed set of them, as in `bound | cosine`."""
    return " | ".join(map(str, typing.get_args(hint))) if typing.get_origin(hint) is typing.Literal else str(field.type)


def _choices(field: dataclasses.Field[Any]) -> dict[str, str] | None:
    """Return the registered names that an option takes, each with its summary; None for options of other types."""
    from ryzen_compile import registry
    from ryzen_compile.spec.options import member_group

    group = member_group(field)
    if group is None:
        return None
    return {name: registry.summary(group, name).removeprefix(f"{name}: ") for name in registry.names(group)}


def _describe_properties(properties: Iterable[Property]) -> dict[str, str]:
    return {str(property_): property_.description for property_ in sorted(properties, key=str)}


def _field_docs(cls: type[Pass]) -> dict[str, str]:
    """Return the docstring below each field of a pass, from its source code."""
    import ast
    import textwrap

    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    docs = {}
    for field, doc in zip(tree.body, tree.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(doc, ast.Expr)
            and isinstance(doc.value, ast.Constant)
        ):
            docs[field.target.id] = inspect.cleandoc(str(doc.value.value))
    return docs


def _format_pass(data: dict[str, Any]) -> str:
    lines = [data["name"], "", data["doc"]]
    for option in data["options"]:
        default = "required" if option["required"] else f"default {_format_value(option['default'])}"
        choices = option["choices"]
        lines += [
            "",
            f"{option['name']}: {option['type'] if choices is None else ' | '.join(choices)}, {default}",
            *(f"    {line}" for line in option["description"].splitlines()),
            *(f"        {choice}: {summary}" for choice, summary in (choices or {}).items()),
        ]
    for relation in ("requires", "ensures", "invalidates"):
        if data[relation]:
            lines += ["", relation, *(f"    {name}: {description}" for name, description in data[relation].items())]
    return "\n".join(lines)


def _format_value(value: object) -> str:
    return {True: "true", False: "false", (): "[]"}.get(value, str(value)) if isinstance(value, (bool, tuple)) else str(value)
