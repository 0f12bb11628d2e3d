"""TokenMerge: computes the weighted mean of the tokens of each slot."""

from ryzen_plugins.token_merge.op import TOKEN_MERGE

__all__ = ["TOKEN_MERGE"]
