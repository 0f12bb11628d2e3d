"""AcmeAxpy: factor * x + y."""

from acme_ops.axpy.op import AXPY

__all__ = ["AXPY"]
