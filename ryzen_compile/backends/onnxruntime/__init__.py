"""ONNX Runtime: runs the portable variant on the CPU, and on a GPU if its CUDA build is installed."""

import os

# Read when `onnxruntime` is imported: without it, its official builds send usage data and keep files for that purpose.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
