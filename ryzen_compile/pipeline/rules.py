"""The rules of composition as data, and the one function that reads them."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING

import msgspec

from ryzen_compile import registry
from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    from ryzen_compile.spec.passes import Pass
    from ryzen_compile.spec.properties import Property


class Rule(Record, frozen=True):
    """Two passes that must not follow one another although their facts allow it."""

    code: str
    """`RC101` and up; what is below is derived from facts."""
    first: str
    then: str
    reason: str
    hint: str
    example: str
    """A plan that breaks the rule."""


class Problem(Record, frozen=True):
    """Why a plan is refused."""

    code: str
    message: str
    hint: str

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


@functools.cache
def load_rules() -> tuple[Rule, ...]:
    """Return the rules that the installed rooms of passes bring with them, in their `rules.toml`."""
    found: list[Rule] = []
    for room in registry.provider_packages("passes"):
        table = files(room).joinpath("rules.toml")
        if table.is_file():
            found += msgspec.convert(tomllib.loads(table.read_text(encoding="utf-8")).get("rule", []), list[Rule])
    return tuple(found)


def find_problems(passes: Sequence[Pass], properties: Iterable[Property], rules: Iterable[Rule]) -> list[Problem]:
    """Return every reason why `plan` cannot run on a model of which `facts` hold; empty where it can.

    RC001: an earlier pass breaks what a later one requires. RC002: what a pass requires does not hold and nothing before it
    ensures it. RC1xx: the table of rules.
    """
    found: list[Problem] = []
    holds = set(properties)
    broken_by: dict[Property, str] = {}
    for at, pass_ in enumerate(passes):
        for fact in sorted(pass_.requires - holds, key=str):
            culprit = broken_by.get(fact)
            says = f"`{pass_.name}` needs {fact} ({fact.description}), which"
            if culprit == pass_.name:
                found.append(
                    Problem(code="RC001", message=f"{says} an earlier `{culprit}` breaks", hint=f"list `{culprit}` once")
                )
            elif culprit:
                found.append(
                    Problem(code="RC001", message=f"{says} `{culprit}` breaks", hint=f"list `{pass_.name}` before `{culprit}`")
                )
            else:
                helps = sorted({other.name for other in passes[at + 1 :] if fact in other.ensures})
                hint = (
                    f"list `{helps[0]}` before `{pass_.name}`"
                    if helps
                    else f"add a pass that ensures {fact} before `{pass_.name}`"
                )
                found.append(Problem(code="RC002", message=f"{says} does not hold here", hint=hint))
        broken_by |= dict.fromkeys(pass_.invalidates, pass_.name)
        for fact in pass_.ensures:
            broken_by.pop(fact, None)
        holds = (holds - pass_.invalidates) | pass_.ensures
    order = [pass_.name for pass_ in passes]
    for rule in rules:
        if rule.first in order and rule.then in order[order.index(rule.first) + 1 :]:
            found.append(Problem(code=rule.code, message=f"`{rule.then}` after `{rule.first}`: {rule.reason}", hint=rule.hint))
    return found
