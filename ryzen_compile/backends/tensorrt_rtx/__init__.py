"""TensorRT for RTX: engines for several RTX GPUs in one plan, built without a GPU."""
