"""TokenEnergy: how many tokens each token is like."""

from ryzen_plugins.token_energy.op import TOKEN_ENERGY

__all__ = ["TOKEN_ENERGY"]
