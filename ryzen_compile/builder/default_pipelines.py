"""Plans: which passes a backend's graph gets, and what the user's wishes make of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ryzen_compile.errors import PipelineError
from ryzen_compile.pipeline import ordering, parser, rules

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ryzen_compile.spec.passes import Pass
    from ryzen_compile.spec.properties import Property

Precision = Literal["fp32", "fp16", "bf16"]

DEFAULT_PASSES = {"onnxruntime": "fold", "tensorrt-rtx": "fold,attention", "tensorrt": "fold,attention"}
"""What a graph gets when the user names no passes, by backend."""


@dataclass(frozen=True, kw_only=True)
class VariantPipeline:
    """The passes of one variant."""

    variant: str
    """Its name: `fp32` for the portable graph, `fp16-tensorrt-rtx` for a backend's."""
    backend: str
    precision: Precision
    portable: bool
    passes: tuple[Pass, ...]
    notes: tuple[str, ...] = ()
    """What was left out or added, and why."""

    def format_passes(self) -> str:
        """Return the passes as the command line takes them."""
        return ",".join(map(str, self.passes)) or "none"

    @property
    def needs_calibration(self) -> bool:
        """Whether a pass measures the model on samples."""
        return any(pass_.needs_calibration for pass_ in self.passes)

    @property
    def depends_on_node_names(self) -> bool:
        """Whether a pass goes by what nodes are called."""
        return any(pass_.depends_on_node_names for pass_ in self.passes)

    def fingerprint(self) -> str:
        """Return what of the plan decides the graph that it makes."""
        return ",".join(f"{pass_}@{pass_.version}" for pass_ in self.passes) or "none"


def pipeline_for(
    backend: str, *, passes: str | None, precision: Precision | None, source_half_precision: Precision | None
) -> VariantPipeline:
    """Make the plan of `backend`'s variant.

    `passes` replaces the default list; `precision` adds that pass. The graph for ONNX Runtime serves CPUs and is the
    portable one: it never goes to half precision, and a model that comes in half (`half_source`) is widened for it. Others
    keep the precision that the model comes in, where no pass changes it.
    """
    chosen = parser.parse(DEFAULT_PASSES.get(backend, "fold") if passes is None else "" if passes == "none" else passes)
    if precision and not any(pass_.name == "precision" for pass_ in chosen):
        chosen = (*chosen, *parser.parse(f"precision{{to={precision}}}"))
    notes = []
    portable = backend == "onnxruntime"
    if portable:
        dropped = [pass_ for pass_ in chosen if _precision_of(pass_) in ("fp16", "bf16")]
        notes = [f"`{pass_}` is left out: the portable graph never goes to half precision" for pass_ in dropped]
        chosen = tuple(pass_ for pass_ in chosen if pass_ not in dropped)
        if source_half_precision and not any(pass_.name == "precision" for pass_ in chosen):
            chosen = (*chosen, *parser.parse("precision{to=fp32}"))
            notes.append("`precision{to=fp32}` is added: the model holds half precision, the portable graph never does")
    asked: list[Precision] = [kind for pass_ in chosen if (kind := _precision_of(pass_))]
    got: Precision = asked[-1] if asked else source_half_precision or "fp32"
    name = got if portable else f"{got}-{backend}"
    return VariantPipeline(variant=name, backend=backend, precision=got, portable=portable, passes=chosen, notes=tuple(notes))


def _precision_of(pass_: Pass) -> Precision | None:
    to = getattr(pass_, "to", None) if pass_.name == "precision" else None
    return to if to in ("fp32", "fp16", "bf16") else None


def order_and_validate(
    pipeline: VariantPipeline, properties: Iterable[Property]
) -> tuple[VariantPipeline, tuple[ordering.Move, ...]]:
    """Order `plan` for a model of which `facts` hold; raises PlanError with every reason when it cannot be run."""
    given = frozenset(properties)
    ordered, moves = ordering.order_passes(pipeline.passes, given)
    found = rules.find_problems(ordered, given, rules.load_rules())
    if found:
        raise PipelineError(
            "; ".join(map(str, found)),
            hint="; ".join(dict.fromkeys(problem.hint for problem in found)),
        )
    return dataclasses.replace(pipeline, passes=ordered), moves
