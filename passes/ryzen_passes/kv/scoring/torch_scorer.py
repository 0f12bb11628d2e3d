"""Scorer interface in PyTorch: scores the tokens of one layer of a Transformers cache; importable without PyTorch."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from ryzen_compile.errors import ModelError

if TYPE_CHECKING:
    import torch


class TorchScorer(abc.ABC):
    """Base class of scores of one layer in PyTorch, written independently of the ONNX form that they are compared with."""

    needs_hidden_state: ClassVar[bool] = False
    """Whether `score_new_tokens` reads the hidden state of the step."""
    hidden_state: torch.Tensor | None = None
    """(batch, seq, width): input of the layer's attention in the current step, if the cache receives it."""

    def __init__(self, statistics: Mapping[str, torch.Tensor] = MappingProxyType({})) -> None:
        """`statistics` are the arrays of the layer, by the names in `Scorer.statistics_names`, as float32."""
        self.statistics = statistics

    @abc.abstractmethod
    def score_new_tokens(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the scores (batch, kv_heads, seq) float32 of the tokens of a step.

        `keys` and `values` are (batch, kv_heads, seq, head_size), `positions` is (batch, seq) int64. Keys are those that
        attention reads, so they are rotated if the model uses RoPE.
        """

    def rescore(self, keys: torch.Tensor, seen_tokens: int) -> torch.Tensor:
        """Return the new scores (batch, kv_heads, rows) float32 of kept `keys` after `seen_tokens` tokens.

        Raises NotImplementedError if the score is not time-dependent.
        """
        raise NotImplementedError(f"{type(self).__name__} does not rescore tokens")

    def take_hidden_state(self) -> torch.Tensor:
        """Return the hidden state (batch, seq, width) of the step, once. Raises ModelError if the cache did not receive it."""
        hidden_state, self.hidden_state = self.hidden_state, None
        if hidden_state is None:
            raise ModelError(
                "the input of attention is unknown to the cache layer", hint="run the module for which the cache was created"
            )
        return hidden_state

    def reset(self) -> None:
        """Reset the state to that of empty sequences."""
        self.hidden_state = None
