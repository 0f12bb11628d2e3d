"""PageScoreBound and PageScoreCosine: what pages of a key cache could matter to a query."""

from ryzen_plugins.page_score.op import PAGE_SCORE_BOUND, PAGE_SCORE_COSINE

__all__ = ["PAGE_SCORE_BOUND", "PAGE_SCORE_COSINE"]
