"""List the passes, or show one: its options, facts and spelling."""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Any

import click

from ryzen_compile.cli.console import emit, table, talk_options

if TYPE_CHECKING:
    from ryzen_compile.spec.passes import Pass


@click.command("passes")
@click.argument("name", required=False)
@talk_options
def command(name: str | None, verbosity: int, as_json: bool) -> None:
    """List the passes, or show the one called NAME: what it does, its options, the facts it needs, gives and takes."""
    from ryzen_compile import registry

    shown = [_describe(registry.find_pass(one)) for one in ([name] if name else registry.names("passes"))]
    if as_json:
        emit(shown if name is None else shown[0])
    elif name is None:
        click.echo(table([(one["name"], one["says"]) for one in shown]))
        click.echo("\n`ryzen-compile passes NAME` shows the options of one; `-p fold,precision{to=fp16}` spells a list")
    else:
        click.echo(_page(shown[0]))


def _describe(cls: type[Pass]) -> dict[str, Any]:
    doc = inspect.getdoc(cls) or ""
    docs = _field_docs(cls)
    return {
        "name": cls.name,
        "version": cls.version,
        "says": doc.partition("\n")[0],
        "doc": doc,
        "options": [
            {
                "name": field.name.replace("_", "-"),
                "type": str(field.type),
                "default": None if field.default is dataclasses.MISSING else field.default,
                "required": field.default is dataclasses.MISSING,
                "says": docs.get(field.name, ""),
            }
            for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        ],
        "requires": {str(fact): fact.says for fact in sorted(cls.requires, key=str)},
        "ensures": {str(fact): fact.says for fact in sorted(cls.ensures, key=str)},
        "breaks": {str(fact): fact.says for fact in sorted(cls.breaks, key=str)},
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


def _page(one: dict[str, Any]) -> str:
    lines = [f"{one['name']} (version {one['version']})", "", one["doc"]]
    for option in one["options"]:
        default = "required" if option["required"] else f"default {_plain(option['default'])}"
        lines += [
            "",
            f"{option['name']}: {option['type']}, {default}",
            *(f"    {line}" for line in option["says"].splitlines()),
        ]
    for verb in ("requires", "ensures", "breaks"):
        if one[verb]:
            lines += ["", verb, *(f"    {fact}: {says}" for fact, says in one[verb].items())]
    return "\n".join(lines)


def _plain(value: object) -> str:
    return {True: "true", False: "false", (): "[]"}.get(value, str(value)) if isinstance(value, (bool, tuple)) else str(value)
