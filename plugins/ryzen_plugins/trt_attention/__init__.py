"""TRT_Attention: attention as TensorRT's parser knows it, runnable anywhere."""

from ryzen_plugins.trt_attention.op import TRT_ATTENTION

__all__ = ["TRT_ATTENTION"]
