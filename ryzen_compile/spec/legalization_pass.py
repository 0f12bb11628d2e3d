"""The interface of passes that rewrite what a backend does not compute as the model states it."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Self

from ryzen_compile.spec.passes import Pass
from ryzen_compile.utils.record import Record

if TYPE_CHECKING:
    from ryzen_compile.backends.traits import BackendTraits


class GraphContents(Record, frozen=True):
    """What occurs in a graph, its subgraphs and its functions: enough to select passes without reading the graph again."""

    element_types: tuple[str, ...] = ()
    """The declared element types of tensors and those that attributes specify, by their numpy names, sorted."""
    ops: tuple[str, ...] = ()
    """The ops as `domain::name`, sorted; the default domain is empty: `::MatMul`."""


class LegalizationPass(Pass):
    """A pass that replaces what a backend does not compute as the model states it.

    A build adds the pass to the pipelines of the backends that need it, so that the graph that is compared computes what the
    engine computes. It runs after the passes with `runs_before_legalization` and before all others.
    """

    @classmethod
    @abc.abstractmethod
    def for_backend(cls, traits: BackendTraits, contents: GraphContents) -> Self | None:
        """Return the pass with its default options if a backend with `traits` needs it for a graph of `contents`, else None."""

    @abc.abstractmethod
    def reason(self, backend: str) -> str:
        """Return why the backend called `backend` needs the pass, as a clause: `tensorrt-rtx computes float64 in float32`."""
