"""Ryzen Compile: a compiler from ONNX models to engine packages for CPUs and NVIDIA GPUs.

    import ryzen_compile as rc

    package = rc.build("model.onnx", gpu="cpu,sm89", precision="fp16")
    with rc.load(package.path) as engine:
        outputs = engine.run(input_ids=ids, attention_mask=mask)

`__all__` lists the stable names: functions, the records that they return, exceptions, and what a listener receives.
Importing this package does not import torch, onnxruntime, tensorrt or onnx_ir; the first call that needs one imports it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ryzen_compile import compression
    from ryzen_compile.api import (
        bench,
        build,
        compare,
        evaluate,
        export,
        export_steps,
        inspect,
        load,
        rewrite,
        rewrite_steps,
        verify,
    )
    from ryzen_compile.artifacts.package.manifest import (
        AccuracyRecord,
        EngineRecord,
        EvaluationRecord,
        GraphRecord,
        Manifest,
        MetricRecord,
        MetricResult,
        Provenance,
        RefusedTarget,
        VariantRecord,
    )
    from ryzen_compile.artifacts.package.read import Package
    from ryzen_compile.builder.rewrite import RewriteResult
    from ryzen_compile.diagnostic import Diagnostic
    from ryzen_compile.errors import (
        AccuracyError,
        BackendError,
        ModelError,
        PackageError,
        PipelineError,
        RyzenError,
        ShapeError,
        UsageError,
    )
    from ryzen_compile.exporter import Deviation, ExportReport
    from ryzen_compile.numerics.bisect import Divergence
    from ryzen_compile.numerics.compare_models import ComparisonReport
    from ryzen_compile.numerics.comparison import Comparison
    from ryzen_compile.numerics.verify import Verification
    from ryzen_compile.progress import Progress, SilentProgress, Stage, StageItems
    from ryzen_compile.runtime.bench import Timing, Timings
    from ryzen_compile.runtime.choose import EngineChoice
    from ryzen_compile.runtime.generation.generate import GeneratedSequence, GenerationOptions
    from ryzen_compile.runtime.generation.session import DecodeSession
    from ryzen_compile.runtime.generation.text_stream import TextStream
    from ryzen_compile.runtime.load import Engine
    from ryzen_compile.spec.interface import Interface
    from ryzen_compile.spec.pass_record import PassRecord
    from ryzen_compile.spec.profile import Profile
    from ryzen_compile.spec.recipe import Recipe
    from ryzen_compile.spec.target import Target

    __version__: str

_NAMES_BY_MODULE = {
    "api": "bench build compare evaluate export export_steps inspect load rewrite rewrite_steps verify",
    "artifacts.package.manifest": "AccuracyRecord EngineRecord EvaluationRecord GraphRecord Manifest MetricRecord MetricResult "
    "Provenance RefusedTarget VariantRecord",
    "artifacts.package.read": "Package",
    "builder.rewrite": "RewriteResult",
    "diagnostic": "Diagnostic",
    "errors": "AccuracyError BackendError ModelError PackageError PipelineError RyzenError ShapeError UsageError",
    "exporter": "Deviation ExportReport",
    "numerics.bisect": "Divergence",
    "numerics.compare_models": "ComparisonReport",
    "numerics.comparison": "Comparison",
    "numerics.verify": "Verification",
    "progress": "Progress SilentProgress Stage StageItems",
    "runtime.bench": "Timing Timings",
    "runtime.choose": "EngineChoice",
    "runtime.generation.generate": "GeneratedSequence GenerationOptions",
    "runtime.generation.session": "DecodeSession",
    "runtime.generation.text_stream": "TextStream",
    "runtime.load": "Engine",
    "spec.interface": "Interface",
    "spec.pass_record": "PassRecord",
    "spec.profile": "Profile",
    "spec.recipe": "Recipe",
    "spec.target": "Target",
}
"""The public names by the module that defines them, which is imported when a name is first used."""
_SUBMODULES = ("compression",)
"""The public modules."""
_MODULES = {name: f"ryzen_compile.{module}" for module, names in _NAMES_BY_MODULE.items() for name in names.split()}

__all__ = [
    "AccuracyError",
    "AccuracyRecord",
    "BackendError",
    "Comparison",
    "ComparisonReport",
    "DecodeSession",
    "Deviation",
    "Diagnostic",
    "Divergence",
    "Engine",
    "EngineChoice",
    "EngineRecord",
    "EvaluationRecord",
    "ExportReport",
    "GeneratedSequence",
    "GenerationOptions",
    "GraphRecord",
    "Interface",
    "Manifest",
    "MetricRecord",
    "MetricResult",
    "ModelError",
    "Package",
    "PackageError",
    "PassRecord",
    "PipelineError",
    "Profile",
    "Progress",
    "Provenance",
    "Recipe",
    "RefusedTarget",
    "RewriteResult",
    "RyzenError",
    "ShapeError",
    "SilentProgress",
    "Stage",
    "StageItems",
    "Target",
    "TextStream",
    "Timing",
    "Timings",
    "UsageError",
    "VariantRecord",
    "Verification",
    "bench",
    "build",
    "compare",
    "compression",
    "evaluate",
    "export",
    "export_steps",
    "inspect",
    "load",
    "rewrite",
    "rewrite_steps",
    "verify",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__", *(name for name in globals() if name.startswith("__"))]


if not TYPE_CHECKING:  # a type checker would take any name to exist

    def __getattr__(name: str) -> object:
        if name == "__version__":
            from importlib.metadata import version

            return version("ryzen-compile")
        import importlib

        if name in _SUBMODULES:
            return importlib.import_module(f"ryzen_compile.{name}")
        if name not in _MODULES:
            raise AttributeError(f"module `ryzen_compile` has no attribute `{name}`")
        return getattr(importlib.import_module(_MODULES[name]), name)
