"""Code blocks of documentation pages: files, console sessions and Python scripts."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE_NAME = re.compile(r"^`([\w./-]+)`\n\n\Z", re.MULTILINE)
_COMMAND_IN_TEXT = re.compile(r"^ {4}(?:[#$] )?(ryzen-compile [^&]*?)(?: &&.*)?$|`(ryzen-compile [^`]+)`", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class ShownCommand:
    """A command of a console session, and the lines that the page shows of its output."""

    line: str
    expected: list[str] = field(default_factory=list)

    @property
    def arguments(self) -> list[str]:
        """The arguments of the program, as a shell splits them, without a comment and redirections."""
        program, *arguments = shlex.split(re.sub(r"\s(#\s|2?>).*", "", self.line))
        assert program == "ryzen-compile", self.line
        return arguments

    @property
    def fails(self) -> bool:
        """Whether the page shows that the command fails."""
        return any(line.startswith(("error: ", "NOT MET: ")) for line in self.expected)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    file: str | None
    """The name of the file whose content the block is: the line in backquotes before it; None if there is none."""

    @property
    def commands(self) -> list[ShownCommand]:
        """The commands of a console session: lines that begin with `$`, each with the lines after it."""
        commands: list[ShownCommand] = []
        for line in self.text.splitlines():
            if line.startswith("$ "):
                commands.append(ShownCommand(line=line.removeprefix("$ ")))
            else:
                commands[-1].expected.append(line)
        return commands


def blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    for match in _FENCE.finditer(text):
        name = _FILE_NAME.search(text[: match.start()])
        yield Block(language=match[1], text=match[2], file=name[1] if name else None)


def commands(page: Path) -> Iterator[ShownCommand]:
    """Yield every command of this program on a page: in console sessions, in indented lines and in backquotes."""
    for block in blocks(page):
        if block.language == "console":
            yield from block.commands
    for match in _COMMAND_IN_TEXT.finditer(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        yield ShownCommand(line=" ".join((match[1] or match[2]).split()))


def missing_line(expected: list[str], output: str) -> str | None:
    """Return the first line of `expected` that `output` does not contain after the previous one; None if it contains all.

    Spaces are not compared, and `...` in an expected line stands for any text.
    """
    lines = iter([line.split() for line in output.splitlines()])
    for line in expected:
        pattern = re.compile(" ?.*".join(re.escape(" ".join(part.split())) for part in line.split("...")))
        if not any(pattern.fullmatch(" ".join(words)) for words in lines):
            return line
    return None
