"""List the passes, or show one: its options, facts and spelling."""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Any

import click

from ryzen_compile.cli.console import console_options, emit, format_table

if TYPE_CHECKING:
    from ryzen_compile.spec.passes import Pass


@click.command("passes")
@click.argument("name", required=False)
@console_options
def command(name: str | None, verbosity: int, as_json: bool) -> None:
    """List the passes, or show the one called NAME: what it does, its options, the facts it needs, gives and takes."""
    from ryzen_compile import registry

    shown = [_pass_data(registry.find_pass(one)) for one in ([name] if name else registry.names("passes"))]
    if as_json:
        emit(shown if name is None else shown[0])
    elif name is None:
        click.echo(format_table([(one["name"], one["description"]) for one in shown]))
        click.echo("\n`ryzen-compile passes NAME` shows the options of one; `-p fold,precision{to=fp16}` spells a list")
    else:
        click.echo(_format_pass(shown[0]))


def _pass_data(cls: type[Pass]) -> dict[str, Any]:
    doc = inspect.getdoc(cls) or ""
    docs = _field_docs(cls)
    return {
        "name": cls.name,
        "version": cls.version,
        "description": doc.partition("\n")[0],
        "doc": doc,
        "options": [
            {
                "name": field.name.replace("_", "-"),
                "type": str(field.type),
                "default": None if field.default is dataclasses.MISSING else field.default,
                "required": field.default is dataclasses.MISSING,
                "description": docs.get(field.name, ""),
            }
            for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        ],
        "requires": {str(fact): fact.description for fact in sorted(cls.requires, key=str)},
        "ensures": {str(fact): fact.description for fact in sorted(cls.ensures, key=str)},
        "invalidates": {str(fact): fact.description for fact in sorted(cls.invalidates, key=str)},
    }


def _field_docs(cls: type[Pass]) -> dict[str, str]:
    """Return the string that stands under each field of a pass, from its source."""
    import ast
    import textwrap

    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            found[field.target.id] = inspect.cleandoc(str(text.value.value))
    return found


def _format_pass(data: dict[str, Any]) -> str:
    lines = [f"{data['name']} (version {data['version']})", "", data["doc"]]
    for option in data["options"]:
        default = "required" if option["required"] else f"default {_format_value(option['default'])}"
        lines += [
            "",
            f"{option['name']}: {option['type']}, {default}",
            *(f"    {line}" for line in option["description"].splitlines()),
        ]
    for verb in ("requires", "ensures", "invalidates"):
        if data[verb]:
            lines += ["", verb, *(f"    {fact}: {says}" for fact, says in data[verb].items())]
    return "\n".join(lines)


def _format_value(value: object) -> str:
    return {True: "true", False: "false", (): "[]"}.get(value, str(value)) if isinstance(value, (bool, tuple)) else str(value)
