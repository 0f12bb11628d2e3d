"""TensorRT: engines for the data-centre GPU that is present."""
