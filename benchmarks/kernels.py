"""Kernel benchmark on this machine's GPU: time and bandwidth of every op, against a memory copy and against torch.

Each kernel is compiled ahead of time and launched through the driver with the argument list that TensorRT uses: inputs, 32-bit
integers, outputs. A CUDA graph contains one launch for each of several sets of tensors, like the layers of a model, so that the
tensors are not in the GPU's cache; its replays are timed with events. Bandwidth is the number of bytes that the op declares to
move, divided by the median time. The bound of an op is the time of a device-to-device copy of these bytes, measured with 1 GiB,
or of its operations at the throughput of a half-precision matrix product, whichever is longer.

The baselines are the op in plain torch, eager and compiled (`kernels_torch.py`: a CUDA graph over the same sets), and its
reference on ONNX Runtime's CUDA provider if that is installed (bound tensors, sequential runs over one set). Tests compare the
torch baselines with the references.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import kernels_torch
import numpy as np
import onnxruntime
import process

from ryzen_compile import registry
from ryzen_compile.artifacts.cache.store import Store
from ryzen_compile.kernels import Specialization, compile_all
from ryzen_compile.kernels.driver import Launcher
from ryzen_compile.ops import verification
from ryzen_compile.ops.equivalence import cast_inputs, single_op_model
from ryzen_compile.spec import dim_expr
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.spec.op import Op
from ryzen_compile.spec.target import detect_gpus

COPY_BYTES = 1 << 30
MIN_SETS_BYTES = 512 << 20
"""The smallest total size of the tensor sets of one graph: several times the size of a GPU cache."""
MAX_SETS = 32


@dataclass(frozen=True)
class KernelSize:
    """Dims and attributes at which an op is measured; `overrides` replace its typical ones."""

    op: str
    overrides: Mapping[str, float]
    goal: str


_CACHE_DIMS = {"B": 4, "H": 8, "C": 8192, "M": 4096}
_VECTOR_DIMS = {"ROWS": 1 << 18}
SIZES = (
    KernelSize("KVAppendEvict", {}, "under 5 us"),
    KernelSize("KVAppendEvict", {"B": 8}, ""),
    KernelSize("KVAppendEvict", {"S": 64}, ""),
    KernelSize("KVSelect", {}, ""),
    KernelSize("KVCompact", _CACHE_DIMS, "80 % of its bound"),
    KernelSize("KVCompactRotary", _CACHE_DIMS, "80 % of its bound"),
    KernelSize("VectorQuantizeFp8", _VECTOR_DIMS, "80 % of its bound"),
    KernelSize("VectorQuantizeInt8", _VECTOR_DIMS, "80 % of its bound"),
    KernelSize("VectorQuantizeInt4", _VECTOR_DIMS, "80 % of its bound"),
    KernelSize("VectorDequantizeFp8", _VECTOR_DIMS, "80 % of its bound"),
    KernelSize("VectorDequantizeInt8", _VECTOR_DIMS, "80 % of its bound"),
    KernelSize("VectorDequantizeInt4", _VECTOR_DIMS, "80 % of its bound"),
    KernelSize("VectorDequantizeRotatedInt4", _VECTOR_DIMS, "80 % of its bound"),
    KernelSize("TokenMatch", {"B": 64, "N": 4096, "A": 2048, "M": 2048}, "70 % of its bound"),
    KernelSize("TokenEnergy", {"B": 16, "N": 4096}, "70 % of its bound"),
    KernelSize("TokenMerge", {"B": 64}, ""),
    KernelSize("TokenUnmerge", {"B": 64}, ""),
)


class TorchStream:
    """A torch stream with the stream protocol of cuda-core."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._stream.cuda_stream


def _on_any_stream(run: Callable[..., Any], tensors: Any, attributes: Any) -> Callable[[Any], Any]:
    """Return a call for `time_graph_replay`: torch itself launches on the stream of the graph."""
    return lambda stream: run(tensors, attributes)


def time_graph_replay(calls: Sequence[Callable[[Any], Any]], *, rounds: int) -> float:
    """Return the median seconds per call over `rounds` replays of one CUDA graph with all `calls`."""
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call(stream)
    times: list[float] = []
    for round_index in range(rounds + 10):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if round_index >= 10:  # the first 10 are a warm-up
            times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)


def measure_copy_bandwidth() -> float:
    """Return the bandwidth of a device-to-device copy in bytes per second, read plus written."""
    import torch

    source = torch.empty(COPY_BYTES // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = time_graph_replay([lambda stream: target.copy_(source)], rounds=50)
    return COPY_BYTES / seconds


def measure_matmul_throughput() -> float:
    """Return the throughput of a half-precision 8192 x 8192 matrix product in operations per second."""
    import torch

    left, right = (torch.randn(8192, 8192, dtype=torch.float16, device="cuda") for _ in range(2))
    result = torch.empty_like(left)
    return 2 * 8192**3 / time_graph_replay([lambda stream: torch.mm(left, right, out=result)], rounds=20)


def measure(
    op: Op, size: KernelSize, launcher: Launcher, copy_bandwidth: float, matmul_throughput: float, *, rounds: int
) -> dict[str, Any]:
    """Return the timings of one op at one size in half precision: every tactic and the baselines."""
    dtypes = {name: "float16" if "float16" in allowed else allowed[0] for name, allowed in op.type_constraints.items()}
    attributes, sizes = verification.split_case(op, {**op.typical_dims, **size.overrides})
    assert op.kernel is not None
    assert op.make_inputs is not None
    assert op.bytes_moved is not None
    instances = [
        Specialization(op, dtypes, attributes, sizes, tactic).with_divisibility() for tactic in range(len(op.kernel.tactics))
    ]
    compiled = compile_all(instances, [launcher.sm], store=Store())
    item_sizes = {f"size_{name}": numpy_dtype(dtype).itemsize for name, dtype in dtypes.items()}
    bytes_moved = dim_expr.evaluate(op.bytes_moved, {**sizes, **attributes, **item_sizes})
    operations = dim_expr.evaluate(op.flops, {**sizes, **attributes, **item_sizes}) if op.flops else None
    samples = [
        cast_inputs(op, dtypes, fill_caches(op.make_inputs(np.random.default_rng(seed), sizes, attributes)))
        for seed in range(2)
    ]
    set_bytes = sum(array.nbytes for array in samples[0].values())
    sets = max(1, min(MAX_SETS, -(-MIN_SETS_BYTES // max(set_bytes, 1))))
    row: dict[str, Any] = {
        "op": op.name,
        "dims": {**sizes, **attributes},
        "bytes": bytes_moved,
        "operations": operations,
        "sets": sets,
        "tactics": {},
        "goal": size.goal,
    }
    for tactic, instance in enumerate(instances):
        prepared = [launcher.prepare(instance, compiled[tactic, launcher.sm], samples[i % 2]) for i in range(sets)]
        calls = [lambda stream, launch=launch: launch(TorchStream(stream)) for launch in prepared]
        row["tactics"][str(dict(op.kernel.tactics[tactic]))] = timing_summary(
            time_graph_replay(calls, rounds=rounds), bytes_moved, copy_bandwidth, operations, matmul_throughput
        )
        del prepared, calls
    row["baselines"] = {}
    reference = kernels_torch.TORCH_REFERENCES.get(op.name)
    if reference is not None:
        tensor_sets = [kernels_torch.to_device(samples[i % 2]) for i in range(sets)]
        for name, run in kernels_torch.execution_modes(reference).items():
            try:
                launches = [_on_any_stream(run, tensors, attributes) for tensors in tensor_sets]
                seconds = time_graph_replay(launches, rounds=rounds // 10)
                row["baselines"][name] = timing_summary(seconds, bytes_moved, copy_bandwidth, operations, matmul_throughput)
            except RuntimeError as error:
                row["baselines"][name] = {"failed": str(error).splitlines()[0]}
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        try:
            seconds = time_onnxruntime(op, dtypes, attributes, samples[0], device="cuda", rounds=rounds // 10)
            row["baselines"]["onnxruntime cuda"] = timing_summary(
                seconds, bytes_moved, copy_bandwidth, operations, matmul_throughput
            )
        except RuntimeError as error:
            row["baselines"]["onnxruntime cuda"] = {"failed": str(error).splitlines()[0]}
    return row


def fill_caches(inputs: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """Return the inputs with full caches and steps without padding, the slowest case."""
    full = dict(inputs)
    if "position" in full:
        slots = full["position"].shape[2]
        full["position"] = np.broadcast_to(np.arange(slots, dtype=np.int32), full["position"].shape).copy()
        if "new_position" in full:
            step = np.arange(full["new_position"].shape[1], dtype=np.int32)
            full["new_position"] = np.broadcast_to(slots + step, full["new_position"].shape).copy()
        if "index" in full:
            selected = np.sort(np.random.default_rng(0).permutation(slots)[: full["index"].shape[2]]).astype(np.int32)
            full["index"] = np.broadcast_to(selected, full["index"].shape).copy()
    return full


def time_onnxruntime(
    op: Op, dtypes: Mapping[str, str], attributes: Mapping[str, float], inputs: Any, *, device: str, rounds: int
) -> float:
    """Return the median seconds of the op's reference on ONNX Runtime with tensors bound to `device`, `cuda` or `cpu`."""
    provider = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}[device]
    rank = max(
        (np.ndim(inputs[param.name]) - len(param.dims.split()) + 1 for param in op.inputs if "..." in param.dims), default=1
    )
    model = single_op_model(op, dtypes, attributes, rank=rank)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=[provider])
    binding = session.io_binding()
    for name, array in inputs.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), device, 0))
    for param in op.outputs:
        binding.bind_output(param.name, device)
    times = []
    for round_index in range(rounds + 3):
        started = time.perf_counter()
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        if round_index >= 3:  # the first 3 are a warm-up
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def timing_summary(
    seconds: float, bytes_moved: float, copy_bandwidth: float, operations: float | None, matmul_throughput: float
) -> dict[str, float]:
    """Return the time in us, the bandwidth in GB/s, and the bound of the op divided by the time (`share_of_bound`)."""
    bound = max(bytes_moved / copy_bandwidth, (operations or 0) / matmul_throughput)
    return {"us": seconds * 1e6, "gb_s": bytes_moved / seconds / 1e9, "share_of_bound": bound / seconds}


def main() -> None:
    """Measure every selected op, print one line for each, and save the results on request."""
    parser = process.argument_parser(__doc__, rounds=1000)
    parser.add_argument("ops", nargs="*", help="ONNX names of ops [all]")
    args = parser.parse_args()
    if not detect_gpus():
        raise SystemExit("no NVIDIA GPU was found: there is nothing to measure")
    copy_bandwidth = measure_copy_bandwidth()
    matmul_throughput = measure_matmul_throughput()
    gpu = detect_gpus()[0]
    print(f"{gpu.name}: copy {copy_bandwidth / 1e9:.0f} GB/s, matrix product {matmul_throughput / 1e12:.0f} TFLOP/s")
    sized_ops = {size.op for size in SIZES}
    sizes = [*SIZES, *(KernelSize(name, {}, "") for name, op in registry.ops().items() if op.kernel and name not in sized_ops)]
    rows = []
    with Launcher() as launcher:
        for size in sizes:
            if args.ops and size.op not in args.ops:
                continue
            row = measure(registry.find_op(size.op), size, launcher, copy_bandwidth, matmul_throughput, rounds=args.rounds)
            rows.append(row)
            best = min(row["tactics"].values(), key=lambda timing: timing["us"])
            baselines = ", ".join(
                f"{name} {timing.get('us', float('nan')):.1f} us" for name, timing in row["baselines"].items()
            )
            goal = f" (goal: {size.goal})" if size.goal else ""
            share = f"{best['share_of_bound']:.0%} of its bound"
            print(
                f"{size.op} {row['dims']}: {best['us']:.2f} us, {best['gb_s']:.0f} GB/s, {share}{goal}; {baselines}", flush=True
            )
    rates = {"copy_gb_s": copy_bandwidth / 1e9, "product_tflop_s": matmul_throughput / 1e12}
    process.save(args.save, {"gpu": gpu.name, "driver": gpu.driver, **rates, "rows": rows})


if __name__ == "__main__":
    main()
