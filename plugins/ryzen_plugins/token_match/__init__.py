"""TokenMatch: which token each token is most like."""

from ryzen_plugins.token_match.op import TOKEN_MATCH

__all__ = ["TOKEN_MATCH"]
