"""Numerics: compare a candidate (engine, graph or module) with a baseline over a grid of shapes, and check the differences."""

COMPARISON_MODULES = (
    "ryzen_compile.backends.onnxruntime",
    "onnxruntime",
    "ryzen_compile.ir.load",
    "ryzen_compile.numerics.comparison",
    "ryzen_compile.numerics.half_emulation",
    "ryzen_compile.numerics.onnx_candidates",
    "ryzen_compile.numerics.polygraphy_runner",
)
"""The modules that a comparison of graphs needs, for the child processes that perform comparisons."""
