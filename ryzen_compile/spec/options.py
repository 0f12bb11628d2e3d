"""Options of passes whose values are names of registered members, such as the scores of kv-evict."""

from __future__ import annotations

import dataclasses
from typing import Any

_GROUP = "ryzen_compile.registry_group"


def member_option(group: str, *, default: str) -> Any:
    """Return a dataclass field for an option whose value is the name of a member of the registry group `group`.

    The pipeline parser refuses other values, and `ryzen-compile passes NAME` lists the members; neither imports them.
    """
    return dataclasses.field(default=default, metadata={_GROUP: group})


def member_group(field: dataclasses.Field[Any]) -> str | None:
    """Return the registry group whose member names are the values of the option `field`; None for other options."""
    group: str | None = field.metadata.get(_GROUP)
    return group
