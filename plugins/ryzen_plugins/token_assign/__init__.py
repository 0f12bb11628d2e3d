"""TokenAssign: selects the tokens to merge and computes the slot of every token."""

from ryzen_plugins.token_assign.op import TOKEN_ASSIGN

__all__ = ["TOKEN_ASSIGN"]
