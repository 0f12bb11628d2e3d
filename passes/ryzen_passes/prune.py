"""The pass `prune`: set the least important weights of matrix products to zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ryzen_compile.spec.fidelity import Fidelity, Lossy
from ryzen_compile.spec.passes import Change, Pass, PassContext, PassEstimate, Refusal

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from ryzen_passes.weight_sites import WeightSite

    Array = np.ndarray[Any, np.dtype[Any]]

_GROUP, _KEPT = 4, 2
"""The pattern 2:4: of 4 consecutive weights that a product sums over, 2 are kept."""


@dataclass(frozen=True, kw_only=True)
class Prune(Pass):
    """Set weights of matrix products to zero, those with the smallest |w| ||x|| of each output.

    ||x|| is the norm over the calibration samples of the feature that the weight is multiplied with (Wanda, Sun et al. 2023,
    arXiv:2306.11695); with `score=magnitude` it is 1. The pattern `2:4` is what sparse tensor cores compute: build with the
    builder option `--sparsity=enable`. The file does not become smaller, and no runtime here uses other patterns.

    A model usually needs training after half of its weights are removed, which this tool does not do: the pass is refused
    unless `without-recovery` confirms that the result is used as it is.
    """

    name: ClassVar[str] = "prune"

    pattern: Literal["2:4", "unstructured"] = "2:4"
    """Two of four consecutive weights, or any weights of an output."""
    share: float = 0.5
    """The share of the weights of an output that become zero, in (0, 1), for `unstructured`."""
    score: Literal["wanda", "magnitude"] = "wanda"
    """Whether activations on the calibration samples count."""
    without_recovery: bool = False
    """Whether to prune although no training follows."""
    skip: tuple[str, ...] = ()
    """Nodes whose weights are left: patterns of node names or op types; `*` matches any characters, `?` matches one."""
    floor: float = 0.9
    """The smallest accepted cosine similarity of an output vector with that of the source."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"`share` must be between 0 and 1 (got {self.share:g})")
        if self.pattern == "2:4" and self.share != 0.5:
            raise ValueError(f"the pattern 2:4 removes half of the weights: leave out `share` (got {self.share:g})")
        Lossy("cosine", self.floor)  # raises ValueError for a floor out of range

    @property
    def needs_calibration(self) -> bool:
        """Whether activations are measured."""
        return self.score == "wanda"

    @property
    def depends_on_node_names(self) -> bool:
        """Whether `skip` selects nodes, possibly by name."""
        return bool(self.skip)

    @property
    def fidelity(self) -> Fidelity:
        """Lossy: the cosine similarity of the outputs."""
        return Lossy("cosine", self.floor)

    def estimate(self, model: ir.Model, context: PassContext) -> PassEstimate | Refusal:
        """Return that no bytes change: zeros are stored as other weights."""
        return self._refusal(model) or PassEstimate(reason="zeros take as many bytes as other weights")

    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        """Prune the weights of `model` in place."""
        from ryzen_passes.product_inputs import measure_product_inputs

        if (refusal := self._refusal(model)) is not None:
            return refusal
        sites, notes = self._sites(model)
        moments: dict[str, Array] = {}
        if sites and self.score == "wanda":
            measured = measure_product_inputs(model, sites, context, alternative="score=magnitude")
            if isinstance(measured, Refusal):
                return measured
            moments = measured
        if not sites:
            reason = "it has no weight that can be pruned" + (f": {notes[0]}" if notes else "")
            return Refusal(reason=reason, location=model.graph.name or "the graph")
        changed: list[str] = []
        for site in sites:
            site.weight.const_value = self._pruned(site, moments.get(str(site.weight.name)))
            changed += [read.node.name or read.node.op_type for read in site.reads]
        share = 0.5 if self.pattern == "2:4" else self.share
        return Change(
            changed=tuple(dict.fromkeys(changed)),
            summary=f"{len(sites)} matrices with {share:.0%} zeros, in the pattern {self.pattern}",
            notes=tuple(notes),
            warnings=("the model was pruned without training after it: measure it on the task that it is for",),
        )

    def _refusal(self, model: ir.Model) -> Refusal | None:
        if self.without_recovery:
            return None
        return Refusal(
            reason="a pruned model needs training, which this tool does not do",
            location=model.graph.name or "the graph",
            hint="write without-recovery=true to use it as it is, or prune and train the model before its export",
        )

    def _sites(self, model: ir.Model) -> tuple[list[WeightSite], list[str]]:
        """Return the matrices to prune, and the weights that are left, with reasons."""
        from ryzen_passes.weight_sites import SkippedWeight, find_weights

        sites, notes = [], []
        for site in find_weights(model, self.skip):
            if isinstance(site, SkippedWeight):
                notes.append(f"{site.weight.name}: {site.reason}")
            elif not site.is_product_matrix:
                notes.append(f"{site.weight.name}: it is not a matrix of products only")
            elif self.pattern == "2:4" and site.length % _GROUP:
                notes.append(f"{site.weight.name}: {site.length} weights of an output are not a multiple of {_GROUP}")
            else:
                sites.append(site)
        return sites, notes

    def _pruned(self, site: WeightSite, second_moments: Array | None) -> ir.TensorProtocol:
        """Return the pruned weight, which is computed when it is read."""
        import numpy as np
        import onnx_ir as ir

        source = site.tensor
        norms = None if second_moments is None else np.sqrt(np.diag(second_moments)).astype(np.float32)

        def read() -> ir.TensorProtocol:
            weight = np.asarray(source.numpy())
            rows = weight if site.axis == 1 else weight.T  # (outputs, length)
            scores = np.abs(rows.astype(np.float32))
            if norms is not None:
                scores *= norms
            kept = _kept_in_groups(scores) if self.pattern == "2:4" else _kept_of_outputs(scores, self.share)
            pruned = np.where(kept, rows, np.zeros((), weight.dtype))
            in_order = np.ascontiguousarray(pruned if site.axis == 1 else pruned.T)
            return ir.Tensor(in_order, dtype=source.dtype, name=source.name)

        return ir.LazyTensor(read, source.dtype, ir.Shape(source.shape.numpy()), name=source.name)


def _kept_in_groups(scores: Array) -> Array:
    """Return which of each 4 consecutive elements of a row, (outputs, length), have the 2 largest scores."""
    import numpy as np

    groups = scores.reshape(len(scores), -1, _GROUP)
    order = np.argsort(-groups, axis=-1, kind="stable")
    kept = np.zeros(groups.shape, bool)
    np.put_along_axis(kept, order[..., :_KEPT], values=True, axis=-1)
    return kept.reshape(scores.shape)


def _kept_of_outputs(scores: Array, share: float) -> Array:
    """Return which elements of each row, (outputs, length), are not among the `share` with the smallest scores."""
    import numpy as np

    removed = int(share * scores.shape[1])
    order = np.argsort(scores, axis=1, kind="stable")
    kept = np.ones(scores.shape, bool)
    np.put_along_axis(kept, order[:, :removed], values=False, axis=1)
    return kept
