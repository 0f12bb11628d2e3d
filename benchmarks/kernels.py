"""Kernels on the GPU that is here: time and bandwidth of every op, against a measured copy and against what torch does.

Each kernel is compiled ahead of time and launched through the driver with the argument list that TensorRT uses: inputs,
32-bit integers, outputs. A CUDA graph holds one launch for each of several sets of tensors, as the layers of a model would
have, so that nothing is warm in a cache by chance; its replays are timed by events. Bandwidth is the bytes that the op
declares it must move over the median time; the share of its bound is against a device-to-device copy that moves 1 GiB, and
against a product of half-precision matrices where the op computes more than it moves.

The baselines are the op's meaning in plain torch, eager and compiled (`kernels_torch.py`: a CUDA graph over the same sets),
and its reference on ONNX Runtime's CUDA provider where that is installed (tensors bound, one run after the other, over one
set); tests hold the torch ones against the references.
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
"""How much memory the sets of tensors of one graph take together at least: several times what a GPU caches."""
MAX_SETS = 32


@dataclass(frozen=True)
class KernelSize:
    """Dims and attributes to measure an op at, over its typical ones."""

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
    """A torch stream, by the protocol that cuda-core knows streams by."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._stream.cuda_stream


def time_graph_replay(calls: Sequence[Callable[[Any], Any]], *, rounds: int) -> float:
    """Return the median seconds of one of `calls`, all of them replayed from one CUDA graph, `rounds` times."""
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
    times = []
    for turn in range(rounds + 10):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if turn >= 10:
            times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)


def measure_copy_bandwidth() -> float:
    """Return the bytes a second, read and written, of a copy on the device."""
    import torch

    source = torch.empty(COPY_BYTES // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = time_graph_replay([lambda stream: target.copy_(source)], rounds=50)
    return COPY_BYTES / seconds


def measure_matmul_throughput() -> float:
    """Return the operations a second of a product of two half-precision matrices of 8192 x 8192."""
    import torch

    one, other = (torch.randn(8192, 8192, dtype=torch.float16, device="cuda") for _ in range(2))
    result = torch.empty_like(one)
    return 2 * 8192**3 / time_graph_replay([lambda stream: torch.mm(one, other, out=result)], rounds=20)


def measure(
    op: Op, size: KernelSize, launcher: Launcher, copy_bandwidth: float, matmul_throughput: float, *, rounds: int
) -> dict[str, Any]:
    """Return what one op takes at one size in half precision: each tactic, and the baselines."""
    elements = {name: "float16" if "float16" in kinds else kinds[0] for name, kinds in op.type_constraints.items()}
    attributes, sizes = verification.split_case(op, {**op.typical_dims, **size.overrides})
    assert op.kernel is not None
    assert op.make_inputs is not None
    assert op.bytes_moved is not None
    instances = [
        Specialization(op, elements, attributes, sizes, tactic).with_divisibility() for tactic in range(len(op.kernel.tactics))
    ]
    compiled = compile_all(instances, [launcher.sm], store=Store())
    widths = {f"size_{name}": numpy_dtype(element).itemsize for name, element in elements.items()}
    moved = dim_expr.evaluate(op.bytes_moved, {**sizes, **attributes, **widths})
    work = dim_expr.evaluate(op.flops, {**sizes, **attributes, **widths}) if op.flops else None
    drawn = [
        cast_inputs(op, elements, fill_caches(op.make_inputs(np.random.default_rng(seed), sizes, attributes)))
        for seed in range(2)
    ]
    held = sum(array.nbytes for array in drawn[0].values())
    sets = max(1, min(MAX_SETS, -(-MIN_SETS_BYTES // max(held, 1))))
    row: dict[str, Any] = {
        "op": op.name, "dims": {**sizes, **attributes}, "bytes": moved, "operations": work, "sets": sets, "tactics": {},
        "goal": size.goal,
    }  # fmt: skip
    for tactic, instance in enumerate(instances):
        prepared = [launcher.prepare(instance, compiled[tactic, launcher.sm], drawn[i % 2]) for i in range(sets)]
        calls = [lambda stream, one=one: one(TorchStream(stream)) for one in prepared]
        row["tactics"][str(dict(op.kernel.tactics[tactic]))] = timing_summary(
            time_graph_replay(calls, rounds=rounds), moved, copy_bandwidth, work, matmul_throughput
        )
        del prepared, calls
    row["baselines"] = {}
    meaning = kernels_torch.TORCH_REFERENCES.get(op.name)
    if meaning is not None:
        given = [kernels_torch.to_device(drawn[i % 2]) for i in range(sets)]
        for name, run in kernels_torch.execution_modes(meaning).items():
            try:
                seconds = time_graph_replay(
                    [lambda stream, one=one, run=run: run(one, attributes) for one in given], rounds=rounds // 10
                )
                row["baselines"][name] = timing_summary(seconds, moved, copy_bandwidth, work, matmul_throughput)
            except RuntimeError as error:
                row["baselines"][name] = {"failed": str(error).splitlines()[0]}
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        try:
            seconds = time_onnxruntime(op, elements, attributes, drawn[0], device="cuda", rounds=rounds // 10)
            row["baselines"]["onnxruntime cuda"] = timing_summary(seconds, moved, copy_bandwidth, work, matmul_throughput)
        except RuntimeError as error:
            row["baselines"]["onnxruntime cuda"] = {"failed": str(error).splitlines()[0]}
    return row


def fill_caches(inputs: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """Return inputs whose caches are full and whose steps have no padding: what takes longest."""
    full = dict(inputs)
    if "position" in full:
        slots = full["position"].shape[2]
        full["position"] = np.broadcast_to(np.arange(slots, dtype=np.int32), full["position"].shape).copy()
        if "new_position" in full:
            step = np.arange(full["new_position"].shape[1], dtype=np.int32)
            full["new_position"] = np.broadcast_to(slots + step, full["new_position"].shape).copy()
        if "index" in full:
            kept = np.sort(np.random.default_rng(0).permutation(slots)[: full["index"].shape[2]]).astype(np.int32)
            full["index"] = np.broadcast_to(kept, full["index"].shape).copy()
    return full


def time_onnxruntime(
    op: Op, dtypes: Mapping[str, str], attributes: Mapping[str, float], inputs: Any, *, device: str, rounds: int
) -> float:
    """Return the median seconds of a run of the op's reference on ONNX Runtime, its tensors bound to `device`: cuda or cpu."""
    provider = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}[device]
    rank = max((np.ndim(inputs[port.name]) - len(port.dims.split()) + 1 for port in op.inputs if "..." in port.dims), default=1)
    model = single_op_model(op, dtypes, attributes, rank=rank)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=[provider])
    binding = session.io_binding()
    for name, array in inputs.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), device, 0))
    for port in op.outputs:
        binding.bind_output(port.name, device)
    times = []
    for turn in range(rounds + 3):
        started = time.perf_counter()
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        if turn >= 3:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def timing_summary(
    seconds: float, bytes_moved: float, copy_bandwidth: float, operations: float | None, matmul_throughput: float
) -> dict[str, float]:
    """Return a time as people compare it: `share_of_bound` is of what a copy and a product of matrices would take."""
    bound = max(bytes_moved / copy_bandwidth, (operations or 0) / matmul_throughput)
    return {"us": seconds * 1e6, "gb_s": bytes_moved / seconds / 1e9, "share_of_bound": bound / seconds}


def main() -> None:
    """Measure every op, print a line each, and save what was asked to be saved."""
    parser = process.argument_parser(__doc__, rounds=1000)
    parser.add_argument("ops", nargs="*", help="ONNX names [all]")
    asked = parser.parse_args()
    if not detect_gpus():
        raise SystemExit("there is no NVIDIA GPU here, and nothing to measure")
    copy = measure_copy_bandwidth()
    product = measure_matmul_throughput()
    print(f"{detect_gpus()[0].name}: a copy moves {copy / 1e9:.0f} GB/s, a product does {product / 1e12:.0f} TFLOP/s")
    named = {size.op for size in SIZES}
    sizes = [*SIZES, *(KernelSize(name, {}, "") for name, op in registry.ops().items() if op.kernel and name not in named)]
    rows = []
    with Launcher() as launcher:
        for size in sizes:
            if asked.ops and size.op not in asked.ops:
                continue
            row = measure(registry.find_op(size.op), size, launcher, copy, product, rounds=asked.rounds)
            rows.append(row)
            best = min(row["tactics"].values(), key=lambda one: one["us"])
            others = ", ".join(f"{name} {one.get('us', float('nan')):.1f} us" for name, one in row["baselines"].items())
            goal = f" (goal: {size.goal})" if size.goal else ""
            share = f"{best['share_of_bound']:.0%} of its bound"
            print(f"{size.op} {row['dims']}: {best['us']:.2f} us, {best['gb_s']:.0f} GB/s, {share}{goal}; {others}", flush=True)
    gpu = {"gpu": detect_gpus()[0].name, "driver": detect_gpus()[0].driver}
    rates = {"copy_gb_s": copy / 1e9, "product_tflop_s": product / 1e12}
    process.save(asked.save, {**gpu, **rates, "rows": rows})


if __name__ == "__main__":
    main()
