"""TensorRT: engines for the data-center GPU of this machine."""
