"""The group of all commands: those of the folder `commands`, and those of installed packages.

A module is imported when its command runs. `--help` reads the sources of the modules instead of importing them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ryzen_compile.errors import RyzenError, UsageError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping

_SECTIONS = ("Compile", "Run", "Measure accuracy", "Inspect", "Manage files")
"""The order of the sections of `--help`; further sections follow in alphabetical order, and `_NO_SECTION` is last."""
_NO_SECTION = "Other commands"
_SECTION_LINE = re.compile(r'^SECTION = "([^"]+)"$', re.MULTILINE)
_FOLDER = Path(__file__).with_name("commands")


class CommandGroup(click.Group):
    """The commands of this program and of the entry point group `ryzen_compile.commands`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands, sorted."""
        from ryzen_compile import registry

        if registry.has_external_members("commands"):
            return registry.names("commands")
        return sorted(file.stem.replace("_", "-") for file in _FOLDER.glob("[!_]*.py"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of a command and return the command; None if there is none of this name."""
        if _is_built_in(cmd_name):
            import importlib

            command: click.Command = importlib.import_module(f"ryzen_compile.cli.commands.{cmd_name.replace('-', '_')}").command
            return command
        from ryzen_compile import registry

        return registry.find_command(cmd_name) if cmd_name in registry.names("commands") else None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that `args` name, with its arguments. Raises UsageError if there is none."""
        name = args[0]
        if not name.startswith("-") and not _is_built_in(name) and name not in (names := self.list_commands(ctx)):
            raise UsageError(f"there is no command `{name}`", hint=did_you_mean(name, names))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands by section, each with the first line of its module."""
        for section, descriptions in _descriptions_by_section(self.list_commands(ctx)).items():
            with formatter.section(section):
                formatter.write_dl(list(descriptions.items()))


def _is_built_in(name: str) -> bool:
    """Return whether this program has the command; its modules are found without reading the entry points of all packages."""
    return name.replace("-", "_").isidentifier() and _built_in_path(name).is_file()


def _built_in_path(name: str) -> Path:
    return _FOLDER / f"{name.replace('-', '_')}.py"


def _descriptions_by_section(names: list[str]) -> Mapping[str, Mapping[str, str]]:
    """Return {section: {command: description}} in the order of the help."""
    sections: dict[str, dict[str, str]] = {}
    for name in names:
        section, description = _section_and_description(name)
        sections.setdefault(section, {})[name] = description
    order = [*_SECTIONS, *sorted(set(sections) - {*_SECTIONS, _NO_SECTION}), _NO_SECTION]
    return {section: sections[section] for section in order if section in sections}


def _section_and_description(name: str) -> tuple[str, str]:
    """Return the section of a command, and the first line of its module as its description."""
    from ryzen_compile import registry

    try:
        path = _built_in_path(name) if _is_built_in(name) else registry.source_path("commands", name)
        source = path.read_text(encoding="utf-8")
    except (RyzenError, OSError) as error:
        return _NO_SECTION, f"not available: {error}"
    section = _SECTION_LINE.search(source)
    return section.group(1) if section else _NO_SECTION, registry.summary_of(source)
