"""Recurrent PyTorch models with sequence lengths, exported to ONNX as users do: with the tracer, from packed sequences."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any


def export_with_lengths(kind: str, path: Path) -> Path:
    """Export a bidirectional `LSTM`, `GRU` or `RNN` over packed sequences, x: (batch, time, 8), lengths: (batch,)."""
    import torch
    from torch import nn
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    class RecurrentTagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent = getattr(nn, kind)(8, 16, batch_first=True, bidirectional=True)
            self.head = nn.Linear(32, 4)

        def forward(self, x: Any, lengths: Any) -> Any:
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            padded, _ = pad_packed_sequence(self.recurrent(packed)[0], batch_first=True, total_length=x.shape[1])
            return self.head(padded)

    torch.manual_seed(0)
    inputs = torch.randn(3, 7, 8), torch.tensor([7, 4, 2])
    axes = {"x": {0: "batch", 1: "time"}, "lengths": {0: "batch"}, "y": {0: "batch", 1: "time"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            RecurrentTagger().eval(),
            inputs,
            str(path),
            input_names=["x", "lengths"],
            output_names=["y"],
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,
        )
    return path
