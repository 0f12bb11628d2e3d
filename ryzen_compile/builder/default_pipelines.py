"""Pipelines of variants: the default passes of each backend, adjusted to the user's request."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ryzen_compile.backends.traits import find_traits, portable_backend
from ryzen_compile.errors import PipelineError
from ryzen_compile.pipeline import ordering, parser, rules

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ryzen_compile.spec.passes import Pass
    from ryzen_compile.spec.properties import Property

Precision = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True, kw_only=True)
class VariantPipeline:
    """The passes of one variant."""

    variant: str
    """Its name: `fp32` for the portable graph, `fp16-tensorrt-rtx` for that of a backend."""
    backend: str
    precision: Precision
    portable: bool
    passes: tuple[Pass, ...]
    notes: tuple[str, ...] = ()
    """Passes that were left out or added, each with the reason."""

    @property
    def needs_calibration(self) -> bool:
        """Whether a pass measures the model on samples."""
        return any(pass_.needs_calibration for pass_ in self.passes)

    @property
    def depends_on_node_names(self) -> bool:
        """Whether a pass selects nodes by name."""
        return any(pass_.depends_on_node_names for pass_ in self.passes)


def pipeline_for(
    backend: str, *, passes: str | None, precision: Precision | None, source_half_precision: Precision | None
) -> VariantPipeline:
    """Return the pipeline of the variant for `backend`.

    `passes` replaces the default list; `precision` adds the precision pass. The variant of a backend that does not compute half
    precision, such as the portable one, is never converted to half precision, and a model in half precision
    (`source_half_precision`) is converted to fp32. Other variants keep the precision of the model unless a pass changes it.
    """
    traits, portable = find_traits(backend), backend == portable_backend()
    pass_specs = traits.default_pipeline if passes is None else "" if passes == "none" else passes
    selected = parser.parse(pass_specs)
    if precision and not any(pass_.name == "precision" for pass_ in selected):
        selected = (*selected, *parser.parse(f"precision{{to={precision}}}"))
    notes = []
    if not traits.computes_half_precision:
        graph = "the portable graph" if portable else f"the graph for {backend}"
        dropped = [pass_ for pass_ in selected if _precision_of(pass_) in ("fp16", "bf16")]
        notes = [f"`{pass_}` is left out: {graph} never uses half precision" for pass_ in dropped]
        selected = tuple(pass_ for pass_ in selected if pass_ not in dropped)
        if source_half_precision and not any(pass_.name == "precision" for pass_ in selected):
            selected = (*selected, *parser.parse("precision{to=fp32}"))
            notes.append(f"`precision{{to=fp32}}` is added: the model uses half precision, {graph} never does")
    requested: list[Precision] = [pass_precision for pass_ in selected if (pass_precision := _precision_of(pass_))]
    result: Precision = requested[-1] if requested else source_half_precision or "fp32"
    variant = result if portable else f"{result}-{backend}"
    return VariantPipeline(
        variant=variant, backend=backend, precision=result, portable=portable, passes=selected, notes=tuple(notes)
    )


def _precision_of(pass_: Pass) -> Precision | None:
    to = getattr(pass_, "to", None) if pass_.name == "precision" else None
    return to if to in ("fp32", "fp16", "bf16") else None


def order_and_validate(
    pipeline: VariantPipeline, properties: Iterable[Property]
) -> tuple[VariantPipeline, tuple[ordering.Move, ...]]:
    """Order the passes of `pipeline` for a model that satisfies `properties`; return it with the moves that were made.

    Raises PipelineError that lists every problem if the pipeline cannot run.
    """
    satisfied = frozenset(properties)
    ordered, moves = ordering.order_passes(pipeline.passes, satisfied)
    problems = rules.find_problems(ordered, satisfied, rules.load_rules())
    if problems:
        raise PipelineError(
            "; ".join(map(str, problems)),
            hint="; ".join(dict.fromkeys(problem.hint for problem in problems)),
        )
    return dataclasses.replace(pipeline, passes=ordered), moves
