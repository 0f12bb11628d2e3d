"""The order of a plan: stable in the user's order, moved only where facts demand it, each move explained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    from ryzen_compile.spec.passes import Pass
    from ryzen_compile.spec.properties import Property


class Move(Record, frozen=True):
    """A pass that was put before another one, and why."""

    moved: str
    before: str
    reason: str

    def __str__(self) -> str:
        return f"`{self.moved}` goes before `{self.before}`: {self.reason}"


def order_passes(passes: Sequence[Pass], properties: Iterable[Property]) -> tuple[tuple[Pass, ...], tuple[Move, ...]]:
    """Return `plan` in an order that its facts allow, and the moves that led there.

    Q goes before P when Q ensures what P requires and nothing else gives it, or when P breaks what Q requires. Passes that
    nothing orders keep the user's order. Where the wishes run in a circle the user's order stands, for `problems` to refuse.
    """
    given = frozenset(properties)
    rest, done, moves = list(passes), [], []
    holds = set(given)
    while rest:
        at = next((at for at, pass_ in enumerate(rest) if _can_run_next(pass_, rest, holds)), 0)
        pass_ = rest.pop(at)
        moves += [Move(moved=pass_.name, before=other.name, reason=_reason(pass_, other)) for other in rest[:at]]
        done.append(pass_)
        holds = (holds - pass_.invalidates) | pass_.ensures
    return tuple(done), tuple(move for move in moves if move.reason)


def _can_run_next(pass_: Pass, remaining: Sequence[Pass], properties: set[Property]) -> bool:
    others = [other for other in remaining if other is not pass_]
    spoils = any(pass_.invalidates & other.requires & properties and not other.invalidates & pass_.requires for other in others)
    waits = any(fact in other.ensures for other in others for fact in pass_.requires - properties)
    return not spoils and not waits


def _reason(moved: Pass, other: Pass) -> str:
    gives = sorted(map(str, moved.ensures & other.requires))
    loses = sorted(map(str, other.invalidates & moved.requires))
    if gives:
        return f"it ensures {gives[0]}, which `{other.name}` needs"
    return f"`{other.name}` breaks {loses[0]}, which it needs" if loses else ""
