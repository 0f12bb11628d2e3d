"""Pipelines of variants: the default passes of each backend, adjusted to the user's request."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ryzen_compile import registry
from ryzen_compile.backends.traits import BackendTraits, find_traits, portable_backend
from ryzen_compile.diagnostic import Diagnostic
from ryzen_compile.errors import PipelineError
from ryzen_compile.pipeline import ordering, parser, rules
from ryzen_compile.pipeline.pipeline_id import pipeline_id
from ryzen_compile.spec.legalization_pass import GraphContents, LegalizationPass
from ryzen_compile.spec.precision_pass import PrecisionPass

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ryzen_compile.spec.dtypes import HalfPrecision, Precision
    from ryzen_compile.spec.passes import Pass
    from ryzen_compile.spec.properties import Property

_NO_CONTENTS = GraphContents()


@dataclass(frozen=True, kw_only=True)
class VariantPipeline:
    """The passes of one variant."""

    backend: str
    precision: Precision
    """The precision in which the variant computes."""
    portable: bool
    passes: tuple[Pass, ...]
    diagnostics: tuple[Diagnostic, ...] = ()
    """Passes that were left out or added, each with the reason."""

    @functools.cached_property
    def id(self) -> str:
        """The id of the pipeline, which is the name of the variant."""
        return pipeline_id(self.passes)

    @property
    def needs_calibration(self) -> bool:
        """Whether a pass measures the model on samples."""
        return any(pass_.needs_calibration for pass_ in self.passes)

    @property
    def depends_on_node_names(self) -> bool:
        """Whether a pass selects nodes by name."""
        return any(pass_.depends_on_node_names for pass_ in self.passes)


def pipeline_for(
    backend: str,
    *,
    passes: str | None,
    precision: Precision | None,
    source_half_precision: HalfPrecision | None,
    contents: GraphContents = _NO_CONTENTS,
) -> VariantPipeline:
    """Return the pipeline of the variant for `backend`.

    `passes` replaces the default list; `precision` adds the registered precision pass, unless the list contains one.
    Legalization passes that the backend needs for a graph of `contents` are added: the graph states what it computes. The
    variant of a backend that does not compute half precision, such as the portable one, is never converted to half precision,
    and a model in half precision (`source_half_precision`) is converted to fp32. Other variants keep the precision of the
    model unless a pass changes it.
    """
    traits, portable = find_traits(backend), backend == portable_backend()
    selected = parser.parse(traits.default_pipeline if passes is None else passes)
    if precision is not None and not _precision_passes(selected):
        selected = (*selected, registry.find_precision_pass().with_precision(precision))
    selected, diagnostics = _with_legalization(selected, traits, contents)
    if not traits.computes_half_precision:
        graph = "the portable variant" if portable else f"the graph for {backend}"
        dropped = [pass_ for pass_ in _precision_passes(selected) if pass_.output_precision != "fp32"]
        diagnostics += [
            Diagnostic(
                code="pass-left-out", severity="info", message=f"`{pass_}` is left out: {graph} never uses half precision"
            )
            for pass_ in dropped
        ]
        selected = tuple(pass_ for pass_ in selected if pass_ not in dropped)
        if source_half_precision and not _precision_passes(selected):
            to_fp32 = registry.find_precision_pass().with_precision("fp32")
            selected = (*selected, to_fp32)
            message = f"`{to_fp32}` is added: the model uses half precision, {graph} never does"
            diagnostics.append(Diagnostic(code="pass-added", severity="info", message=message))
    converted = _precision_passes(selected)
    return VariantPipeline(
        backend=backend,
        precision=converted[-1].output_precision if converted else source_half_precision or "fp32",
        portable=portable,
        passes=selected,
        diagnostics=tuple(diagnostics),
    )


def _with_legalization(
    selected: tuple[Pass, ...], traits: BackendTraits, contents: GraphContents
) -> tuple[tuple[Pass, ...], list[Diagnostic]]:
    """Add the legalization passes that the backend needs and `selected` does not contain, and return a diagnostic for each.

    They run after the leading passes that treat all element types and ops alike.
    """
    added: list[LegalizationPass] = []
    for cls in registry.legalization_passes():
        legalization = cls.for_backend(traits, contents)
        if legalization is not None and not any(isinstance(pass_, cls) for pass_ in selected):
            added.append(legalization)
    position = next((index for index, pass_ in enumerate(selected) if not pass_.runs_before_legalization), len(selected))
    diagnostics = [
        Diagnostic(code="pass-added", severity="info", message=f"`{pass_}` is added: {pass_.reason(traits.name)}")
        for pass_ in added
    ]
    return (*selected[:position], *added, *selected[position:]), diagnostics


def _precision_passes(passes: Iterable[Pass]) -> list[PrecisionPass]:
    return [pass_ for pass_ in passes if isinstance(pass_, PrecisionPass)]


def order_and_validate(
    passes: Sequence[Pass], properties: Iterable[Property]
) -> tuple[tuple[Pass, ...], tuple[ordering.Move, ...]]:
    """Order `passes` for a model that satisfies `properties`; return them with the moves that were made.

    Raises PipelineError that lists every problem if the pipeline cannot run.
    """
    satisfied = frozenset(properties)
    ordered, moves = ordering.order_passes(passes, satisfied)
    problems = rules.find_problems(ordered, satisfied, rules.load_rules())
    if problems:
        raise PipelineError.of(problems)
    return ordered, moves
