"""TokenMatch: finds the most similar token for each token of a list."""

from ryzen_plugins.token_match.op import TOKEN_MATCH

__all__ = ["TOKEN_MATCH"]
