"""ONNX Runtime: runs the portable variant on the CPU, and on a GPU if its CUDA build is installed."""
