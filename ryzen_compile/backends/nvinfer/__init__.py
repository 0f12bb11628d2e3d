"""What TensorRT and TensorRT for RTX share: both are the nvinfer API."""
