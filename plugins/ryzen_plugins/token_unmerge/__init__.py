"""TokenUnmerge: every token's row, from its slot."""

from ryzen_plugins.token_unmerge.op import TOKEN_UNMERGE

__all__ = ["TOKEN_UNMERGE"]
