"""Options of passes that name something outside the pass: registered members, such as the scores of kv-evict, and files."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ryzen_compile.spec.passes import Pass

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


def files_by_option(pass_: Pass) -> dict[str, Path]:
    """Return the files that the options of `pass_` name, by field name.

    A text names a file if the file exists; an option with a fixed set of values names none, whatever files there are.
    """
    fields = dataclasses.fields(pass_)  # type: ignore[arg-type]
    values = {field.name: getattr(pass_, field.name) for field in fields if not str(field.type).startswith("Literal[")}
    return {name: Path(value) for name, value in values.items() if isinstance(value, str) and os.path.isfile(value)}
