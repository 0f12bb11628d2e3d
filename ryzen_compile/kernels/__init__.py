"""Triton kernels of custom ops: ahead-of-time compilation for GPUs, and execution on a CPU or a GPU.

A `Specialization` defines what a kernel is compiled for. `compile_all` compiles it to PTX and cubin without a GPU and caches
the result. `Interpreter` runs the kernel on the CPU and `driver.Launcher` on a GPU, with the argument list that TensorRT uses.
"""

from ryzen_compile.kernels.aot import CompiledKernel, compile_all, is_compiled
from ryzen_compile.kernels.interpreter import Interpreter
from ryzen_compile.kernels.specialization import SMS, Specialization

__all__ = ["SMS", "CompiledKernel", "Specialization", "Interpreter", "compile_all", "is_compiled"]
