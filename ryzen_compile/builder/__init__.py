"""The build: from ONNX models to engine packages."""
