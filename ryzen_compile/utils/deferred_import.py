"""Import of SymPy by onnx_ir at its first use, in the processes of the program.

onnx_ir needs SymPy, 0.2 s and 34 MB, for expressions of symbolic sizes, which few models have, and imports it at once.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def defer_sympy() -> None:
    """Let onnx_ir import SymPy at the first use, if onnx_ir is not imported yet; for all other modules nothing changes."""
    if "onnx_ir" not in sys.modules:
        sys.meta_path.insert(0, _OnnxIrFinder())


class _OnnxIrFinder(MetaPathFinder):
    """Finds onnx_ir as the other finders do, and replaces SymPy by a deferred module while onnx_ir is executed."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname != "onnx_ir":
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            execute = functools.partial(self._execute, spec.loader.exec_module)
            setattr(spec.loader, "exec_module", execute)  # noqa: B010 -- a replaced loader would not find resources
        return spec

    def _execute(self, execute: Callable[[ModuleType], None], module: ModuleType) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        names = [name for name in ("sympy", "onnx_ir._symbolic_shapes") if name not in sys.modules]
        deferred = [_DeferredModule(name) for name in names]
        sys.modules.update({stub.__name__: stub for stub in deferred})
        try:
            execute(module)
        finally:
            for stub in deferred:
                stub.remove()


class _DeferredModule(ModuleType):
    """A module that imports the one of its name when an attribute is first used."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)  # without one, `importlib.util.find_spec` raises an error

    def remove(self) -> None:
        """Let importers find the module itself."""
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]

    def __getattr__(self, name: str) -> Any:
        self.remove()
        return getattr(importlib.import_module(self.__name__), name)
