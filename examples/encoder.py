"""A text encoder with dynamic batch and length: exported, built for the CPU and for an RTX GPU, and run.

python examples/encoder.py    # writes encoder.onnx and encoder.ryzen to the current folder
"""

from __future__ import annotations

import torch

import ryzen_compile as rc


class TokenEncoder(torch.nn.Module):
    """Two transformer layers over 64 positions, and a classifier of the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = torch.nn.Embedding(100, 32)
        self.positions = torch.nn.Embedding(64, 32)
        layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
        self.layers = torch.nn.TransformerEncoder(layer, 2)
        self.head = torch.nn.Linear(32, 5)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return logits (batch, 5) for ids and a mask of ones and zeros, both (batch, seq)."""
        hidden = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        return {"logits": self.head(self.layers(hidden, src_key_padding_mask=mask == 0)[:, 0])}


torch.manual_seed(0)
inputs = {"ids": torch.randint(0, 100, (2, 16)), "mask": torch.ones(2, 16, dtype=torch.long)}
axes = {0: "batch", 1: "seq"}
report = rc.export((TokenEncoder().eval(), inputs), "encoder.onnx", dynamic={"ids": axes, "mask": axes})
print(report.sizes)  # the module accepts 1 to 64 tokens: found by running it

package = rc.build("encoder.onnx", gpu=["cpu", "sm89"])
with rc.load(package) as engine:  # an engine for this GPU, otherwise the portable variant
    print(engine.choice.summary)
    print(engine.run(**inputs)["logits"].shape)
