"""Step graphs: the graphs of a package that one engine runs alternately, selected by the width of a step."""

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
    """A loaded graph with its interface and its profiles."""

    session: Session
    interface: Interface
    profiles: tuple[Profile, ...]
    bounded: bool = True
    """Whether it runs only shapes within its profiles, as an engine does; a portable variant takes what its graph takes."""


def graphs_by_width(step_graphs: Iterable[StepGraph]) -> tuple[StepGraph, ...]:
    """Return the step graphs of one decoder sorted by their maximum number of tokens per step, ascending."""

    def max_width(step_graph: StepGraph) -> int:
        ids = make_decoder_spec(step_graph.interface).ids.name
        return max(profile.max[ids][1] for profile in step_graph.profiles)

    return tuple(sorted(step_graphs, key=max_width))


def share_states(graphs: Sequence[GraphRecord]) -> bool:
    """Return whether `graphs` are the step graphs of one decoder over the same states, which one engine may run alternately.

    Step graphs have the same `Interface.decoder_group`, which one call of `rewrite` writes to all of them, and equal states.
    """
    decoder_groups = {graph.interface.decoder_group for graph in graphs}
    if len(graphs) < 2 or len(decoder_groups) != 1 or None in decoder_groups:
        return False
    if not all(map(is_decoder, graphs)):
        return False
    first, *others = [make_decoder_spec(graph.interface) for graph in graphs]
    return all(_are_compatible(first, other) for other in others)


def is_decoder(graph: GraphRecord) -> bool:
    """Return whether `graph` is a decoder with fixed-size states, which generates text."""
    try:
        make_decoder_spec(graph.interface)
    except RyzenError:
        return False
    return True


def _are_compatible(first: DecoderSpec, second: DecoderSpec) -> bool:
    return (
        first.state_layouts() == second.state_layouts()
        and first.logits.name == second.logits.name
        and first.ids.name == second.ids.name
        and first.capacity == second.capacity
        and (first.mask and first.mask.name) == (second.mask and second.mask.name)
        and (first.ids.low, first.ids.high) == (second.ids.low, second.ids.high)
    )
