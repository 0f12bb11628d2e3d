"""Ryzen Compile: a compiler from ONNX models to engine packages for CPUs and NVIDIA GPUs.

    import ryzen_compile as rc

    package = rc.build("model.onnx", gpu="cpu,sm89", precision="fp16")
    with rc.load(package.path) as engine:
        outputs = engine.run(input_ids=ids, attention_mask=mask)

Importing this package does not import torch, onnxruntime, tensorrt or onnx_ir; the first call that needs one imports it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ryzen_compile.builder.build import build
    from ryzen_compile.errors import RyzenError
    from ryzen_compile.evaluation.evaluate import evaluate
    from ryzen_compile.runtime.load import Engine, load

__all__ = ["Engine", "RyzenError", "build", "evaluate", "load"]

_LAZY_IMPORTS = {
    "build": "ryzen_compile.builder.build",
    "evaluate": "ryzen_compile.evaluation.evaluate",
    "load": "ryzen_compile.runtime.load",
    "Engine": "ryzen_compile.runtime.load",
    "RyzenError": "ryzen_compile.errors",
}


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]


def __getattr__(name: str) -> Any:
    if name not in _LAZY_IMPORTS:
        raise AttributeError(f"module `ryzen_compile` has no attribute `{name}`")
    return getattr(importlib.import_module(_LAZY_IMPORTS[name]), name)
