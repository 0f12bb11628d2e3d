"""ONNX Runtime: runs the portable graph on the CPU, and on a GPU if its CUDA build is installed."""
