"""An audio model with a time axis: the range of its length is given, and the portable variant takes other lengths too.

python examples/audio.py    # writes audio.onnx and audio.ryzen to the current folder
"""

from __future__ import annotations

import torch

import ryzen_compile as rc


class Recognizer(torch.nn.Module):
    """Two strided convolutions and a classifier of each frame."""

    def __init__(self) -> None:
        super().__init__()
        self.frontend = torch.nn.Sequential(
            torch.nn.Conv1d(1, 16, 10, 5), torch.nn.ReLU(), torch.nn.Conv1d(16, 32, 8, 4), torch.nn.ReLU()
        )
        self.head = torch.nn.Linear(32, 11)

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        """Return log probabilities (batch, frames, 11) for samples (batch, time)."""
        return self.head(self.frontend(wave[:, None]).transpose(1, 2)).log_softmax(-1)


torch.manual_seed(0)
wave = torch.randn(2, 1600)
report = rc.export((Recognizer().eval(), {"wave": wave}), "audio.onnx", dynamic={"wave": {0: "batch", 1: "time:400..16000"}})
print(report.sizes)
with rc.load(rc.build("audio.onnx", gpu="cpu")) as engine:
    for seconds in (0.05, 1, 2):
        print(seconds, engine(torch.randn(1, int(16000 * seconds))).shape)
