"""The journal of a plan: for each pass what was decided, why, and what the model was before and after."""

from __future__ import annotations

from typing import Literal

from ryzen_compile.utils.record import Record


class PassRecord(Record, frozen=True):
    """One pass of a plan, run or not."""

    pass_spec: str
    """The pass with its options, as the command line takes it: `precision{to=fp16}`."""
    version: int
    outcome: Literal["changed", "nothing-to-do", "refused"]
    reason: str
    nodes_before: int
    nodes_after: int
    properties_before: tuple[str, ...] = ()
    properties_after: tuple[str, ...] = ()
    inserted: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
