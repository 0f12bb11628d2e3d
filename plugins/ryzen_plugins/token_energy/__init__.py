"""TokenEnergy: measures how redundant each token is."""

from ryzen_plugins.token_energy.op import TOKEN_ENERGY

__all__ = ["TOKEN_ENERGY"]
