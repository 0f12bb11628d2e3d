"""ONNX Runtime: runs the portable graph on a CPU, and on a GPU with its CUDA build."""
