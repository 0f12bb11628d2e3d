"""A convolutional network: exported with a dynamic batch, built, compared with the module, and measured.

python examples/vision.py    # writes vision.onnx and vision.ryzen to the current folder
"""

from __future__ import annotations

import torch

import ryzen_compile as rc

torch.manual_seed(0)
module = torch.nn.Sequential(
    torch.nn.Conv2d(3, 16, 3, stride=2, padding=1),
    torch.nn.BatchNorm2d(16),
    torch.nn.ReLU(),
    torch.nn.AdaptiveAvgPool2d(4),
    torch.nn.Flatten(),
    torch.nn.Linear(256, 10),
).eval()
image = torch.randn(2, 3, 32, 32)

rc.export((module, {"input": image}), "vision.onnx", dynamic={"input": {0: "batch"}})
package = rc.build("vision.onnx", gpu="cpu", max_shapes={"input": (16, 3, 32, 32)})
report = rc.compare(package, (module, {"input": image}))
print(report.summary)
assert report.met, report.diagnostics
print(rc.bench(package, against="vision.onnx", seconds=0.5).summary)
