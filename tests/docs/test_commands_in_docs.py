"""The commands in README and docs: every one has a valid syntax, and those that need no model are executed."""

from __future__ import annotations

import re
from collections.abc import Sequence

import click
import pytest
from support.doc_pages import DOCS, ROOT, ShownCommand, commands

from ryzen_compile import registry
from ryzen_compile.cli.main import program, run
from ryzen_compile.errors import RyzenError
from ryzen_compile.pipeline.parser import parse

PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
COMMANDS = sorted({(page.relative_to(ROOT).as_posix(), command.line) for page in PAGES for command in commands(page)})
IN_THIS_TREE = [(page, line) for page, line in COMMANDS if "acme" not in line.lower()]
"""The commands of docs/extending need the package tests/acme: `test_extending` executes them."""
CHEAP = {"ops", "ops show KVAppendEvict", "passes", "targets", "doctor", "--help"}
"""Commands without a model that print what is available."""


def check_syntax(arguments: Sequence[str]) -> dict[str, object]:
    """Return the parameters of a command line, without running the command. Raises an error if it is invalid."""
    context = click.Context(program, info_name="ryzen-compile")
    command: click.Command = program
    rest = list(arguments)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        name, found, rest = command.resolve_command(context, rest)
        assert found is not None, f"there is no command `{name}`"
        command = found
    return command.make_context(command.name, rest, parent=context).params if command is not program else {}


def test_every_page_with_commands_is_read() -> None:
    assert {page for page, _ in COMMANDS} >= {"README.md", "docs/compare.md", "docs/kv.md", "docs/extending/pass.md"}


@pytest.mark.parametrize(("page", "line"), IN_THIS_TREE)
def test_the_command_is_valid(page: str, line: str) -> None:
    params = check_syntax(ShownCommand(line=line).arguments)
    passes = params.get("passes") or ()
    for specs in [passes] if isinstance(passes, str) else passes:
        assert parse(specs)
    for reference in (params.get("baseline"), params.get("what"), params.get("data")):
        recipe = reference.removeprefix("recipe:") if isinstance(reference, str) else "NAME"
        if isinstance(reference, str) and reference != recipe and recipe != "NAME":
            assert recipe in registry.names("recipes")


def test_every_command_is_shown_in_the_docs() -> None:
    shown = {line.split()[1] for _, line in COMMANDS if len(line.split()) > 1}
    assert shown >= {"export", "build", "compare", "evaluate", "run", "bench", "inspect", "rewrite", "ops", "passes", "targets"}


@pytest.mark.parametrize("arguments", ["nothing", "build m.onnx --no-such-option", "verify", "run m --seed -1", "ops shw X"])
def test_an_invalid_command_is_detected(arguments: str) -> None:
    with pytest.raises((RyzenError, click.UsageError)):
        check_syntax(arguments.split())


def test_messages_name_existing_commands() -> None:
    """Hints and help texts in the source code, such as "see `ryzen-compile doctor`"."""
    sources = [path for package in ("ryzen_compile", "passes", "plugins", "models") for path in (ROOT / package).rglob("*.py")]
    named = {name for path in sources for name in re.findall(r"`ryzen-compile (\w[\w-]*)", path.read_text(encoding="utf-8"))}
    assert len(named) > 8
    assert named <= set(registry.names("commands"))


@pytest.mark.parametrize("arguments", sorted(CHEAP))
def test_a_cheap_command_runs(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert any(line.partition("#")[0].split()[1:] == arguments.split() for _, line in COMMANDS)
    assert run(arguments.split()) == 0
    assert capsys.readouterr().out
