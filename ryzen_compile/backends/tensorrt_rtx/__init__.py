"""TensorRT-RTX: engines for several RTX GPUs in one plan, built ahead of time without a GPU."""
