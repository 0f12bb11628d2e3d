"""Parts: the graphs of a package that one engine runs, each where it suits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ryzen_compile.errors import RyzenError
from ryzen_compile.runtime.generation.decoder_spec import Decoder, decoder_of

if TYPE_CHECKING:
    from ryzen_compile.artifacts.package.manifest import Graph
    from ryzen_compile.backends.api import Session
    from ryzen_compile.spec.interface import Interface
    from ryzen_compile.spec.profile import Profile


@dataclass(frozen=True, kw_only=True)
class Part:
    """One graph, ready to run."""

    session: Session
    interface: Interface
    profiles: tuple[Profile, ...]


def by_width(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Return steps of one decoder in order of how many tokens they take, the narrowest first."""

    def width(part: Part) -> int:
        ids = decoder_of(part.interface).ids.name
        return max(one.max[ids][1] for one in part.profiles)

    return tuple(sorted(parts, key=width))


def are_one(graphs: Sequence[Graph]) -> bool:
    """Whether `graphs` are steps of one decoder over the same states, so that one engine may run all of them.

    They are where `rewrite` made them of one model in one go, which their `Interface.family` tells, and their states agree.
    """
    families = {graph.interface.family for graph in graphs}
    if len(graphs) < 2 or len(families) != 1 or None in families:
        return False
    try:
        decoders = [decoder_of(graph.interface) for graph in graphs]
    except RyzenError:
        return False
    return all(_alike(decoders[0], other) for other in decoders[1:])


def _alike(one: Decoder, other: Decoder) -> bool:
    return (
        one.kept() == other.kept()
        and one.logits.name == other.logits.name
        and one.ids.name == other.ids.name
        and one.capacity == other.capacity
        and (one.mask and one.mask.name) == (other.mask and other.mask.name)
        and (one.ids.low, one.ids.high) == (other.ids.low, other.ids.high)
    )
