"""Time and memory of `rewrite` with `quantize-weights` over the size of the model.

    python benchmarks/quantize_speed.py [--sizes 0.25 0.5 1] [--passes PASSES] [--save FILE]

The models are stacks of fp16 matrices of 4,096 x 4,096 with random values, whose bytes are external data. The process that
starts the tool, reads the graph and writes the result is measured as a whole.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from process import argument_parser, measure, save

WIDTH = 4096


def main() -> int:
    parser = argument_parser(__doc__, rounds=1)
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.25, 0.5, 1.0], metavar="GB")
    parser.add_argument("--passes", default="quantize-weights{format=int4}")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for size in args.sizes:
            model = write_model(Path(name, "model.onnx"), round(size * 1e9 / (2 * WIDTH**2)))
            output = Path(name, "output.onnx")
            command = [
                str(Path(sys.executable).with_name("ryzen-compile")),
                "rewrite",
                str(model),
                str(output),
                "--passes",
                args.passes,
            ]
            run = measure(command, memory=True)
            written = sum(file.stat().st_size for file in Path(name).glob("output.onnx*"))
            results[f"{size:g} GB"] = {
                "seconds": run.seconds,
                "peak_anonymous_bytes": run.peak_anonymous_bytes,
                "smaller": size_of(model) / written,
            }
            print(f"{size:g} GB: {run.seconds:.1f} s, {run.peak_anonymous_bytes / 1e6:.0f} MB", flush=True)
    save(args.save, {"passes": args.passes, "sizes": results})
    return 0


def write_model(path: Path, layers: int) -> Path:
    """Write a stack of `layers` matrices, whose values repeat after a few layers so that writing them is fast."""
    rng = np.random.default_rng(0)
    values = [(rng.standard_normal((WIDTH, WIDTH), np.float32) / 64).astype(np.float16).tobytes() for _ in range(2)]
    weights, nodes = [], []
    with open(path.with_name("weights.bin"), "wb") as file:
        for layer in range(layers):
            tensor = TensorProto(name=f"w{layer}", data_type=TensorProto.FLOAT16, dims=[WIDTH, WIDTH])
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in {"location": "weights.bin", "offset": file.tell(), "length": len(values[0])}.items():
                tensor.external_data.add(key=key, value=str(value))
            file.write(values[layer % 2])
            weights.append(tensor)
            nodes.append(helper.make_node("MatMul", [f"x{layer}", f"w{layer}"], [f"x{layer + 1}"], name=f"product{layer}"))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["batch", WIDTH]) for name in ("x0", f"x{layers}"))
    graph = helper.make_graph(nodes, "stack", [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def size_of(model: Path) -> int:
    """Return the bytes of the model and its weights."""
    return model.stat().st_size + model.with_name("weights.bin").stat().st_size


if __name__ == "__main__":
    raise SystemExit(main())
