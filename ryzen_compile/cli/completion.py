"""Shell completion of values: targets, passes and recipes. Nothing is imported before a shell asks for them."""

from __future__ import annotations

import click


def complete_targets(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return the values of `--gpu` that begin with `incomplete`, whose last target is completed."""
    from ryzen_compile.spec.target import ARCHITECTURES, products

    return _complete_last(incomplete, ["cpu", "auto", *(f"sm{sm}" for sm in sorted(ARCHITECTURES)), *sorted(products())])


def complete_passes(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return the values of `--passes` that begin with `incomplete`, whose last pass is completed."""
    from ryzen_compile import registry

    return _complete_last(incomplete, registry.names("passes"))


def complete_recipes(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return the recipes that begin with `incomplete`."""
    from ryzen_compile import registry

    return [name for name in registry.names("recipes") if name.startswith(incomplete)]


def _complete_last(incomplete: str, names: list[str]) -> list[str]:
    given, comma, last = incomplete.rpartition(",")
    return [f"{given}{comma}{name}" for name in names if name.startswith(last)]
