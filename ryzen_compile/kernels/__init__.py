"""Kernels of custom ops: from a declaration to machine code, on a machine without a GPU.

`Instance` fixes what a kernel is compiled for, `compile_all` makes PTX and cubin of it and keeps them in the cache,
`Interpreter` runs it on the CPU, and `Launcher` on a GPU, each with the argument list that TensorRT uses.
"""

from ryzen_compile.kernels.aot import CompiledKernel, compile_all, is_compiled
from ryzen_compile.kernels.interpreter import Interpreter
from ryzen_compile.kernels.specialization import SMS, Specialization

__all__ = ["SMS", "CompiledKernel", "Specialization", "Interpreter", "compile_all", "is_compiled"]
