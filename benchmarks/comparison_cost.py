"""Cost of comparing: memory of `build --gpu cpu`, and time of `compare`, against ONNX Runtime alone on the same cases.

    python benchmarks/comparison_cost.py [--rounds 3] [--models minilm,lstm-int8,detector] [--hf FOLDER] [--save FILE]

A round runs `raw_runs.py`, which opens the model and runs it once on each case of the build's grid, then `ryzen-compile build
--gpu cpu` with the same shapes, then `ryzen-compile compare` of the package's portable variant with the model. `--hf` adds the
decoder of a Hugging Face folder, as exported.

Bounds: the build takes at most 1.5 times the memory of the raw runs (peak of the summed PSS of the process tree), and the
comparison at most 3 times their time, plus what a comparison of an empty model takes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from process import argument_parser, measure, median, save

PROGRAM = str(Path(sys.executable).with_name("ryzen-compile"))
RAW_SCRIPT = str(Path(__file__).with_name("raw_runs.py"))
MAX_MEMORY_RATIO, MAX_TIME_RATIO = 1.5, 3.0


def main() -> int:
    parser = argument_parser(__doc__, rounds=3)
    parser.add_argument("--models", default="minilm,lstm-int8,detector")
    parser.add_argument("--hf", metavar="FOLDER", help="a Hugging Face folder of a causal language model")
    args = parser.parse_args()
    makers: dict[str, Callable[[Path], None]] = {**MAKERS, "hf": partial(_export_folder, args.hf)}
    names = [*args.models.split(","), *(["hf"] if args.hf else [])]
    met, results = True, {}
    with tempfile.TemporaryDirectory(prefix="comparison-cost-") as folder:
        empty = Path(folder, "empty.onnx")
        onnx.save(onnx.parser.parse_model(EMPTY), empty)
        empty_seconds = min(_compare_seconds(str(empty), empty) for _ in range(3))
        for name in names:
            model = Path(folder, f"{name}.onnx")
            makers[name](model)
            verdict = _measure_model(model, args.rounds, empty_seconds)
            met = met and bool(verdict["met"])
            results[name] = verdict
            print(
                f"{name}: memory {verdict['build_mb']:.0f} / {verdict['raw_mb']:.0f} MB = {verdict['memory_ratio']:.2f} "
                f"(at most {MAX_MEMORY_RATIO:g}); compare {verdict['compare_seconds']:.2f} s, raw runs "
                f"{verdict['raw_seconds']:.2f} s = {verdict['time_ratio']:.2f} (at most {MAX_TIME_RATIO:g})"
            )
    save(args.save, {"empty_seconds": empty_seconds, "models": results})
    return 0 if met else 1


EMPTY = '<ir_version: 10, opset_import: ["" : 21]> empty (float[2] x) => (float[2] y) { y = Neg (x) }'


def _measure_model(model: Path, rounds: int, empty_seconds: float) -> dict[str, Any]:
    package, cases = model.with_suffix(".ryzen"), model.with_suffix(".cases")
    build = [PROGRAM, "build", str(model), "-o", str(package), "--gpu", "cpu", "--no-cache", "-q"]
    measure(build)
    _write_cases(package, cases)
    raw_runs, builds, compares = [], [], []
    for _ in range(rounds):
        raw_runs.append(measure([sys.executable, RAW_SCRIPT, str(model), str(cases)], memory=True))
        builds.append(measure(build, memory=True))
        compares.append(_compare_seconds(str(package), model))
    memory = median([run.peak_bytes / raw.peak_bytes for run, raw in zip(builds, raw_runs, strict=True)])
    raw_seconds = [float(run.output) for run in raw_runs]
    ratio = median([max(0.0, ours - empty_seconds) / raw for ours, raw in zip(compares, raw_seconds, strict=True)])
    return {
        "cases": len(list(cases.iterdir())),
        "raw_mb": median([run.peak_bytes for run in raw_runs]) / 1e6,
        "build_mb": median([run.peak_bytes for run in builds]) / 1e6,
        "memory_ratio": memory,
        "raw_seconds": median(raw_seconds),
        "build_seconds": median([run.seconds for run in builds]),
        "compare_seconds": median(compares),
        "time_ratio": ratio,
        "met": memory <= MAX_MEMORY_RATIO and ratio <= MAX_TIME_RATIO,
    }


def _compare_seconds(candidate: str, baseline: Path) -> float:
    """Return the seconds that the comparison itself took, without starting the program and loading its libraries."""
    run = measure([PROGRAM, "compare", candidate, "--baseline", str(baseline), "--json"])
    return float(json.loads(run.output)["comparisons"][0]["seconds"])


def _write_cases(package: Path, folder: Path) -> None:
    """Write the inputs of the cases of the grid that a build compares on."""
    from ryzen_compile.artifacts.package.read import read_package
    from ryzen_compile.numerics.grid import grid_cases

    (graph,) = read_package(package).manifest.graphs
    folder.mkdir()
    for index, case in enumerate(grid_cases(graph.interface, graph.profiles, seed=0)):
        np.savez(folder / f"{index:03}.npz", allow_pickle=False, **case.inputs)


def _export_minilm(path: Path) -> None:
    measure([PROGRAM, "export", "minilm", str(path), "-q"])


def _export_folder(folder: str, path: Path) -> None:
    measure([PROGRAM, "export", f"hf:{folder}", str(path), "-q"])


def _make_lstm(path: Path) -> None:
    """Write a tagger with three LSTM layers of width 1024, with weights quantized to int8 by ONNX Runtime."""
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic

    class LstmTagger(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.lstm = torch.nn.LSTM(256, 1024, num_layers=3, batch_first=True, bidirectional=True)
            self.head = torch.nn.Linear(2048, 64)

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return self.head(self.lstm(features)[0])

    torch.manual_seed(0)
    source = path.with_name("lstm-fp32.onnx")
    torch.onnx.export(
        LstmTagger().eval(),
        (torch.randn(2, 8, 256),),
        str(source),
        input_names=["features"],
        output_names=["tags"],
        dynamic_axes={"features": {0: "batch", 1: "time"}, "tags": {0: "batch", 1: "time"}},
        opset_version=17,
        dynamo=False,
    )
    quantize_dynamic(source, path, weight_type=QuantType.QInt8)


def _make_detector(path: Path, heads: int = 1000) -> None:
    """Write a model with 1,000 outputs: heads on common features."""
    rng = np.random.default_rng(0)
    weights = [
        onnx.numpy_helper.from_array(rng.standard_normal((64, 8)).astype(np.float32), f"w{index}") for index in range(heads)
    ]
    nodes = [onnx.helper.make_node("Relu", ["x"], ["features"])]
    nodes += [onnx.helper.make_node("MatMul", ["features", f"w{index}"], [f"y{index}"]) for index in range(heads)]
    graph = onnx.helper.make_graph(
        nodes,
        "detector",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 64])],
        [onnx.helper.make_tensor_value_info(f"y{index}", onnx.TensorProto.FLOAT, ["batch", 8]) for index in range(heads)],
        weights,
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10), path)


MAKERS: Mapping[str, Callable[[Path], None]] = {"minilm": _export_minilm, "lstm-int8": _make_lstm, "detector": _make_detector}


if __name__ == "__main__":
    sys.exit(main())
