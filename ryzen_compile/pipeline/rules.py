"""Composition rules for pipelines: the table of rules, and the function that finds every problem of a pipeline."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING

import msgspec

from ryzen_compile import registry
from ryzen_compile.diagnostic import Diagnostic
from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    from ryzen_compile.spec.passes import Pass
    from ryzen_compile.spec.properties import Property


class Rule(Record, frozen=True):
    """Two passes that must not run in this order although their properties allow it."""

    code: str
    """The code of the diagnostic: a stable identifier in kebab case, not one of `diagnostic.CODES`."""
    first: str
    then: str
    reason: str
    hint: str
    example: str
    """A pipeline that violates the rule."""


@functools.cache
def load_rules() -> tuple[Rule, ...]:
    """Return the rules in the `rules.toml` of every installed package that provides passes."""
    rules: list[Rule] = []
    for package in registry.provider_packages("passes"):
        table = files(package).joinpath("rules.toml")
        if table.is_file():
            rules += msgspec.convert(tomllib.loads(table.read_text(encoding="utf-8")).get("rule", []), list[Rule])
    return tuple(rules)


def find_problems(passes: Sequence[Pass], properties: Iterable[Property], rules: Iterable[Rule]) -> list[Diagnostic]:
    """Return every reason why `passes` cannot run on a model that satisfies `properties`; empty if they can.

    `property-invalidated`: an earlier pass invalidates a property that a later one requires. `property-missing`: a required
    property does not hold and no earlier pass ensures it. Other codes are those of `rules`. The location is the pass.
    """
    problems: list[Diagnostic] = []
    satisfied = set(properties)
    invalidated_by: dict[Property, str] = {}
    for index, pass_ in enumerate(passes):
        for property_ in sorted(pass_.requires - satisfied, key=str):
            culprit = invalidated_by.get(property_)
            requirement = f"`{pass_.name}` requires {property_} ({property_.description}), which"
            if culprit == pass_.name:
                code, message, hint = "property-invalidated", f"an earlier `{culprit}` invalidates", f"list `{culprit}` once"
            elif culprit:
                code, message = "property-invalidated", f"`{culprit}` invalidates"
                hint = f"list `{pass_.name}` before `{culprit}`"
            else:
                code, message = "property-missing", "does not hold here"
                providers = sorted({other.name for other in passes[index + 1 :] if property_ in other.ensures} - {pass_.name})
                hint = (
                    f"list `{providers[0]}` before `{pass_.name}`"
                    if providers
                    else f"add a pass that ensures {property_} before `{pass_.name}`"
                )
            problems.append(_problem(code, pass_.name, f"{requirement} {message}", hint))
        invalidated_by |= dict.fromkeys(pass_.invalidates, pass_.name)
        for property_ in pass_.ensures:
            invalidated_by.pop(property_, None)
        satisfied = (satisfied - pass_.invalidates) | pass_.ensures
    names = [pass_.name for pass_ in passes]
    for rule in rules:
        if rule.first in names and rule.then in names[names.index(rule.first) + 1 :]:
            problems.append(_problem(rule.code, rule.then, f"`{rule.then}` after `{rule.first}`: {rule.reason}", rule.hint))
    return problems


def _problem(code: str, pass_name: str, message: str, hint: str) -> Diagnostic:
    return Diagnostic(code=code, severity="error", message=message, location=pass_name, hint=hint)
