"""Fixtures for tests on the real TensorRT bindings without the TensorRT libraries."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ENTRY_POINTS = {
    "libnvinfer.so.11": ["createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
                         "getPluginRegistry", "getBuilderPluginRegistry"],
    "libnvinfer_plugin.so.11": ["initLibNvInferPlugins"],
    "libnvonnxparser.so.11": ["createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getNvOnnxParserVersion"],
}  # fmt: skip


@pytest.fixture(scope="session")
def nvidia_stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of stub libraries that define the entry points of TensorRT."""
    folder = tmp_path_factory.mktemp("stubs")
    for library, names in ENTRY_POINTS.items():
        source = folder / f"{library}.c"
        source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in names))
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", folder / library, source]
        subprocess.run(command, check=True)
    return folder
