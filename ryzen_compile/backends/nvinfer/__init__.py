"""Common base of the backends `tensorrt` and `tensorrt-rtx`, which both implement the nvinfer API."""
