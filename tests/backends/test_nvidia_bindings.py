"""Every attribute of TensorRT that the backends use exists in NVIDIA's real bindings, checked without their libraries.

The bindings of TensorRT can be imported if three libraries exist. Stubs of their C entry points are sufficient to list the
classes and attributes.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ryzen_compile import backends
from ryzen_compile.backends.builder_options import OPTIONS

SUPPORT = Path(__file__).parents[1] / "support"
FILES = (
    "nvinfer/builder",
    "nvinfer/build_errors",
    "nvinfer/builder_log",
    "nvinfer/session",
    "tensorrt/builder",
    "tensorrt_rtx/backend",
    "tensorrt_rtx/builder",
)
CLASSES = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "error": "ParserError",
    "optimization_profile": "IOptimizationProfile",
    "layer": "ILayer",
    "tensor": "ITensor",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
    "timing_cache": "ITimingCache",
    "runtime_config": "IRuntimeConfig",
    "runtime_cache": "IRuntimeCache",
}
"""The variable names of TensorRT objects in the source files -> their classes."""
OTHER_ATTRIBUTES = {"error": {"filename", "strerror", "message", "hint"}, "tensor": {"array", "pointer"}, "layer": set()}
"""Attributes of other objects with these variable names."""


def inspect_bindings(module: str, libraries: Path | None = None) -> dict[str, Any]:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries or "")}
    command = [sys.executable, str(SUPPORT / "inspect_nvidia_bindings.py"), module]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    bindings: dict[str, Any] = json.loads(process.stdout)
    return bindings


@pytest.fixture(scope="module")
def tensorrt(nvidia_stubs: Path) -> dict[str, Any]:
    return inspect_bindings("tensorrt_bindings", nvidia_stubs)


@pytest.fixture(scope="module")
def rtx() -> dict[str, Any]:
    return inspect_bindings("tensorrt_rtx_bindings")


def used_attributes(files: tuple[str, ...]) -> set[tuple[str, str]]:
    """Return the attributes of TensorRT that the files use, as (class or `module`, attribute)."""
    attributes = set()
    for file in files:
        tree = ast.parse(Path(str(backends.__path__[0]), f"{file}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                owner = _name(node.value)
                if owner == "trt":
                    attributes.add(("module", node.attr))
                elif owner in CLASSES and node.attr not in OTHER_ATTRIBUTES.get(owner, set()):
                    attributes.add((CLASSES[owner], node.attr))
                elif isinstance(node.value, ast.Attribute) and _name(node.value.value) == "trt":
                    attributes.add((node.value.attr, node.attr))
    return attributes


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    return node.attr.lstrip("_") if isinstance(node, ast.Attribute) else ""


def missing_attributes(files: tuple[str, ...], bindings: dict[str, Any]) -> set[tuple[str, str]]:
    return {
        (owner, name)
        for owner, name in used_attributes(files)
        if name not in (bindings["module"] if owner == "module" else bindings["classes"].get(owner, ()))
    }


def test_every_used_attribute_of_rtx_exists(rtx: dict[str, Any]) -> None:
    files = tuple(file for file in FILES if not file.startswith("tensorrt/"))
    assert missing_attributes(files, rtx) == set()


def test_every_used_attribute_of_tensorrt_exists(tensorrt: dict[str, Any]) -> None:
    files = tuple(file for file in FILES if not file.startswith("tensorrt_rtx/"))
    assert missing_attributes(files, tensorrt) == set()


def test_attributes_that_only_rtx_has_are_reported_missing_in_tensorrt(tensorrt: dict[str, Any]) -> None:
    assert missing_attributes(("tensorrt_rtx/builder",), tensorrt) >= {
        ("IBuilderConfig", "num_compute_capabilities"),
        ("module", "ComputeCapability"),
    }


def test_used_attributes_are_detected() -> None:
    assert {
        ("Builder", "build_serialized_network"),
        ("module", "OnnxParser"),
        ("IExecutionContext", "execute_async_v3"),
    } <= used_attributes(FILES)
    assert {("IBuilderConfig", "set_timing_cache"), ("module", "init_libnvinfer_plugins")} <= used_attributes(
        ("tensorrt/builder",)
    )
    assert len(used_attributes(FILES)) > 50


def test_every_option_can_be_applied_to_tensorrt(tensorrt: dict[str, Any]) -> None:
    assert tensorrt["failed"] == {}


def test_every_option_that_rtx_supports_can_be_applied_to_it(rtx: dict[str, Any]) -> None:
    supported = {option.name for option in OPTIONS if "tensorrt-rtx" not in option.unsupported_backends}
    assert not supported & set(rtx["failed"])


def test_bindings_without_libraries_are_unavailable_with_the_reason_and_the_install_command() -> None:
    from ryzen_compile.backends.tensorrt.backend import BACKEND

    capabilities = BACKEND.probe()
    assert not capabilities.available
    assert capabilities.message.startswith("TensorRT is not available: its libraries cannot be loaded: libnv")
    assert capabilities.install_hint == "pip install 'ryzen-compile[tensorrt]'"
    assert len(capabilities.not_executed) >= 5
