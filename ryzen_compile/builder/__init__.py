"""The build: from ONNX models to engine packages. Also `rewrite` and `calibrate`, which prepare a model for it."""
