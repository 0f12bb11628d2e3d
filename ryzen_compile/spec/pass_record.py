"""Pass log entries: the outcome of each pass of a pipeline, its reason, and the model before and after."""

from __future__ import annotations

from typing import Literal

from ryzen_compile.utils.record import Record


class PassRecord(Record, frozen=True):
    """The log entry of one pass of a pipeline, whether or not it changed the model."""

    pass_spec: str
    """The pass with its options in command-line syntax: `precision{to=fp16}`."""
    outcome: Literal["changed", "nothing-to-do"]
    reason: str
    """One sentence: what the pass did, or why it had nothing to do."""
    fidelity: str
    """What the pass declares about accuracy: `exact`, `lossy: cosine >= 0.99`, ..."""
    nodes_before: int
    nodes_after: int
    properties_before: tuple[str, ...] = ()
    properties_after: tuple[str, ...] = ()
    inserted: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    """What a user must know before relying on the result."""
    unmet_hint: str | None = None
    """What to do if the model after the pass does not meet the criteria of a comparison."""
    seconds: float = 0.0
