"""TokenUnmerge: copies the row of its slot to every token."""

from ryzen_plugins.token_unmerge.op import TOKEN_UNMERGE

__all__ = ["TOKEN_UNMERGE"]
