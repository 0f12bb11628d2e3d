"""The pass `low-rank`: replace a matrix product by two with fewer weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ryzen_compile.spec.fidelity import Fidelity, Lossy
from ryzen_compile.spec.passes import Change, Pass, PassContext, PassEstimate, Refusal

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True, kw_only=True)
class LowRank(Pass):
    """Replace x W by (x A) B, where A B is the best approximation of W of a rank for which A and B are smaller than W.

    With `whiten` the error of x W on the calibration samples is the smallest possible (SVD-LLM, Wang et al. 2024,
    arXiv:2403.07378): A = S^-1 U_k, B = diag(s_k) V_k, where U diag(s) V is the singular value decomposition of S W, and S^T S
    the second moments of x. Without it S is the identity. A matrix whose `rank` or `energy` leaves A and B no smaller than W is
    left, as are embeddings and weights that several nodes read in different ways.
    """

    name: ClassVar[str] = "low-rank"

    rank: int = 0
    """The largest rank; 0: `energy` decides."""
    energy: float = 0.0
    """The least share of the sum of the squared singular values to keep, in (0, 1); 0: `rank` decides."""
    whiten: bool = True
    """Whether the error of products on the calibration samples is minimized, instead of that of the weights."""
    skip: tuple[str, ...] = ()
    """Nodes whose weights are left: patterns of node names or op types; `*` matches any characters, `?` matches one."""
    floor: float = 0.9
    """The smallest accepted cosine similarity of an output vector with that of the source."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"`rank` must be at least 1 (got {self.rank})")
        if not (self.energy == 0 or 0 < self.energy < 1):
            raise ValueError(f"`energy` must be between 0 and 1 (got {self.energy:g})")
        Lossy("cosine", self.floor)  # raises ValueError for a floor out of range

    @property
    def needs_calibration(self) -> bool:
        """Whether activations are measured."""
        return self.whiten

    @property
    def depends_on_node_names(self) -> bool:
        """Whether `skip` selects nodes, possibly by name."""
        return bool(self.skip)

    @property
    def fidelity(self) -> Fidelity:
        """Lossy: the cosine similarity of the outputs."""
        return Lossy("cosine", self.floor)

    def estimate(self, model: ir.Model, context: PassContext) -> PassEstimate | Refusal:
        """Return the exact change of the weight bytes for `rank`; that of `energy` depends on the values of the weights."""
        from ryzen_passes.low_rank.rewrite import matrices, saved_bytes

        if not self.rank:
            return PassEstimate(reason="the ranks depend on the singular values")
        saved = [saved_bytes(site, self.rank) for site in matrices(model, self.skip)]
        return PassEstimate(weight_bytes=-sum(saved), reason=f"{sum(map(bool, saved))} matrices")

    def rewrite(self, model: ir.Model, context: PassContext) -> Change | Refusal:
        """Factorize the matrices of `model` in place."""
        from ryzen_passes.low_rank.rewrite import factorize

        if not self.rank and not self.energy:
            return Refusal(
                reason="neither `rank` nor `energy` is given",
                location=model.graph.name or "the graph",
                hint="write low-rank{energy=0.95} or low-rank{rank=64}",
            )
        return factorize(model, context, rank=self.rank, energy=self.energy, whiten=self.whiten, skip=self.skip)
