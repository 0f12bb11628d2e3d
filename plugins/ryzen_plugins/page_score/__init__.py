"""PageScoreBound and PageScoreCosine: score the pages of a key cache by their relevance to a query."""

from ryzen_plugins.page_score.op import PAGE_SCORE_BOUND, PAGE_SCORE_COSINE

__all__ = ["PAGE_SCORE_BOUND", "PAGE_SCORE_COSINE"]
