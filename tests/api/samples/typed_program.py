"""A program that uses every public function; a type checker must reject exactly the lines that end in `# error`.

A test copies it out of the tree and runs mypy on it. It is never executed.
"""

from pathlib import Path
from typing import Any

import ryzen_compile as rc

module: Any = None
inputs: Any = None


def show(*values: object) -> None:
    """Use values."""


class CodeCollector(rc.SilentProgress):
    def __init__(self) -> None:
        self.codes: list[str] = []

    def report(self, diagnostic: rc.Diagnostic) -> None:
        self.codes.append(diagnostic.code)


def build() -> rc.Package:
    package: rc.Package = rc.build("m.onnx", Path("m.ryzen"), gpu="cpu,sm89", precision="fp16", progress=CodeCollector())
    rc.build({"prefill": "p.onnx", "decode": Path("d.onnx")}, opt_shapes={"ids": (1, 8)})
    rc.build("m.onnx", max_shapes=["ids:1x8", {"ids": [2, 8]}])
    rc.build("m.onnx", options={"builderOptimizationLevel": 5, "sparsity": True}, time_limit_seconds=60, cache=False)
    rc.build("m.onnx", percision="fp16")  # error
    rc.build("m.onnx", precision="fp15")  # error
    rc.build("m.onnx", None, "cpu")  # error
    rc.build("m.onnx", opt_shapes={"ids": "1x8"}, min_shapes={"ids": 8})  # error
    rc.build("m.onnx", seed="0")  # error
    rc.build(3)  # error
    digest: str = package.manifest.files[0].sha256
    size: str = package.manifest.files[0].size_bytes  # error
    show(digest, size)
    return package


def load() -> None:
    with rc.load("m.ryzen", graph="decode", backend="onnxruntime") as engine:
        outputs: dict[str, Any] = engine.run(x=inputs)
        tokens: list[rc.GeneratedSequence] = engine.generate([1, 2], max_new_tokens=8)
        engine.generate([1, 2], max_tokens=8)  # error
        show(outputs, tokens, engine.choice.summary)
    rc.load("m.ryzen", device="cuda")  # error


def rewrite() -> None:
    result: rc.RewriteResult = rc.rewrite("m.onnx", "n.onnx", passes="fold", weights="external")
    steps: tuple[rc.RewriteResult, ...] = rc.rewrite_steps("m.onnx", "d", passes="fold", steps=[1, "any"])
    record: rc.PassRecord = result.passes[0]
    rc.rewrite("m.onnx", "n.onnx")  # error
    rc.rewrite("m.onnx", "n.onnx", passes="fold", weights="inside")  # error
    rc.rewrite_steps("m.onnx", "decode", passes="fold", steps=["all"])  # error
    show(record.outcome, steps)


def compare() -> rc.ComparisonReport:
    report = rc.compare("m.ryzen", (module, inputs), max_abs=1e-3, bisect=True)
    first: rc.Comparison = report.comparisons[0]
    worst: float = first.accuracy.metrics[0].worst
    problems: tuple[rc.Diagnostic, ...] = report.diagnostics
    rc.compare("m.ryzen")  # error
    rc.compare("m.ryzen", baseline="m.onnx", max_abs="1e-3")  # error
    show(worst, problems, report.accuracy)  # error
    return report


def evaluate() -> float:
    record: rc.EvaluationRecord = rc.evaluate("d.ryzen", baseline="recipe:tinylm", requirements=["kl<=0.02"], documents=2)
    rc.evaluate("d.ryzen", baseline="recipe:tinylm", rows=8)  # error
    rc.evaluate("d.ryzen")  # error
    return record.results[0].candidate.value


def export() -> int:
    report: rc.ExportReport = rc.export((module, inputs), "m.onnx", dynamic={"x": {0: "batch"}}, opset=23)
    rc.export("recipe:minilm", dynamic={"x": {"batch": 0}})  # error
    rc.export("recipe:minilm", opset=23.0)  # error
    graphs: tuple[rc.RewriteResult, ...] = rc.export_steps("hf:gemma", "decode", steps=[1, "any"])
    show(graphs[0].passes, rc.export_steps("hf:gemma"))  # error
    return report.opset


def measure() -> bool:
    timings: rc.Timings = rc.bench("m.ryzen", against="m.onnx", shapes={"x": (1, 8)}, seconds=1)
    ratio: float = timings.ratio  # error
    verification: rc.Verification = rc.verify("m.ryzen", baseline={"model": "m.onnx"})
    rc.bench("m.ryzen", "m.onnx")  # error
    rc.verify("m.ryzen", baseline=Path("m.onnx"))  # error
    show(rc.inspect("m.ryzen", check_digests=True).manifest.engines[0].targets, ratio)
    rc.inspect("m.ryzen", digests=True)  # error
    rc.biuld("m.onnx")  # error
    return verification.met


def errors() -> None:
    try:
        build()
    except rc.PipelineError as error:
        for diagnostic in error.diagnostics:
            hint: str | None = diagnostic.hint
            place: str = diagnostic.location  # error
            show(diagnostic.severity == "warning", diagnostic.severity == "fatal", hint, place)  # error
    except rc.RyzenError as error:
        show(error.message, error.hint)
