"""Order of a pipeline: the user's order, changed only where properties require it, with a reason for each move."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ryzen_compile.diagnostic import Diagnostic
from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    from ryzen_compile.spec.passes import Pass
    from ryzen_compile.spec.properties import Property


class Move(Record, frozen=True):
    """A pass that was moved before another one, and the reason."""

    moved: str
    before: str
    reason: str

    def __str__(self) -> str:
        return f"`{self.moved}` runs before `{self.before}`: {self.reason}"

    def diagnostic(self) -> Diagnostic:
        """Return the move as information for the user."""
        return Diagnostic(code="pass-moved", severity="info", message=str(self))


def order_passes(passes: Sequence[Pass], properties: Iterable[Property]) -> tuple[tuple[Pass, ...], tuple[Move, ...]]:
    """Return `passes` in an order that their properties allow, and the moves that produced it.

    Q runs before P if Q ensures a property that P requires and that does not hold otherwise, or if P invalidates a property
    that Q requires. Passes without such a constraint keep the user's order. If the constraints form a cycle, the user's order
    is kept, and `find_problems` reports it.
    """
    remaining, ordered, moves = list(passes), [], []
    satisfied = set(properties)
    while remaining:
        index = next((index for index, pass_ in enumerate(remaining) if _can_run_next(pass_, remaining, satisfied)), 0)
        pass_ = remaining.pop(index)
        moves += [Move(moved=pass_.name, before=other.name, reason=_reason(pass_, other)) for other in remaining[:index]]
        ordered.append(pass_)
        satisfied = (satisfied - pass_.invalidates) | pass_.ensures
    return tuple(ordered), tuple(move for move in moves if move.reason)


def _can_run_next(pass_: Pass, remaining: Sequence[Pass], properties: set[Property]) -> bool:
    others = [other for other in remaining if other is not pass_]
    invalidates_needed = any(
        pass_.invalidates & other.requires & properties and not other.invalidates & pass_.requires for other in others
    )
    must_wait = any(property_ in other.ensures for other in others for property_ in pass_.requires - properties)
    return not invalidates_needed and not must_wait


def _reason(moved: Pass, other: Pass) -> str:
    ensured = sorted(map(str, moved.ensures & other.requires))
    invalidated = sorted(map(str, other.invalidates & moved.requires))
    if ensured:
        return f"it ensures {ensured[0]}, which `{other.name}` requires"
    return f"`{other.name}` invalidates {invalidated[0]}, which it requires" if invalidated else ""
