"""Parts: the graphs of a package that one engine runs, each where it suits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ryzen_compile.errors import RyzenError
from ryzen_compile.runtime.generation.decoder_spec import DecoderSpec, make_decoder_spec

if TYPE_CHECKING:
    from ryzen_compile.artifacts.package.manifest import GraphRecord
    from ryzen_compile.backends.api import Session
    from ryzen_compile.spec.interface import Interface
    from ryzen_compile.spec.profile import Profile


@dataclass(frozen=True, kw_only=True)
class StepGraph:
    """One graph, ready to run."""

    session: Session
    interface: Interface
    profiles: tuple[Profile, ...]


def graphs_by_width(step_graphs: Iterable[StepGraph]) -> tuple[StepGraph, ...]:
    """Return steps of one decoder in order of how many tokens they take, the narrowest first."""

    def width(part: StepGraph) -> int:
        ids = make_decoder_spec(part.interface).ids.name
        return max(one.max[ids][1] for one in part.profiles)

    return tuple(sorted(step_graphs, key=width))


def share_states(graphs: Sequence[GraphRecord]) -> bool:
    """Whether `graphs` are steps of one decoder over the same states, so that one engine may run all of them.

    They are where `rewrite` made them of one model in one go, which their `Interface.family` tells, and their states agree.
    """
    families = {graph.interface.decoder_group for graph in graphs}
    if len(graphs) < 2 or len(families) != 1 or None in families:
        return False
    try:
        decoders = [make_decoder_spec(graph.interface) for graph in graphs]
    except RyzenError:
        return False
    return all(_are_compatible(decoders[0], other) for other in decoders[1:])


def _are_compatible(first: DecoderSpec, second: DecoderSpec) -> bool:
    return (
        first.state_layouts() == second.state_layouts()
        and first.logits.name == second.logits.name
        and first.ids.name == second.ids.name
        and first.capacity == second.capacity
        and (first.mask and first.mask.name) == (second.mask and second.mask.name)
        and (first.ids.low, first.ids.high) == (second.ids.low, second.ids.high)
    )
