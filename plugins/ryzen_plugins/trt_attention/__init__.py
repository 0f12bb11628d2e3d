"""TRT_Attention: attention in the form that TensorRT's ONNX parser imports, with a reference for all other runtimes."""

from ryzen_plugins.trt_attention.op import TRT_ATTENTION

__all__ = ["TRT_ATTENTION"]
