"""Benchmark of the pass `fold` against onnxsim, file to file: time, memory, node count, scaling, equality of outputs.

    python benchmarks/graph_passes.py [--rounds 5] [--cases 32,80,external] [--save FILE]

`ryzen-compile rewrite IN OUT -p fold` and onnxsim (its Python function, which is faster than its command) run interleaved, each
in a fresh process that starts, loads, simplifies and saves. Times are of the whole process; memory is its peak resident set.
Cases: a Llama-style decoder as the TorchScript exporter decomposes it (`llama_graph.py`) with 32 layers (7,888 nodes) and with
80 layers (19,552 nodes), with small embedded weights; and 16 layers of Llama 1B in fp16 with 3 GB of external weights. Outputs
are compared in ONNX Runtime at several sizes; for the 3 GB case on a reduced model of two layers with the same structure, and
every remaining weight is compared byte by byte.

Bounds: at most onnxsim's median time; at most 3,300 nodes for 32 layers; at most onnxsim's memory with embedded weights, and
300 MB with external weights; outputs equal within 1e-5; the time per node of 80 layers is at most 1.3 times that of 32.
"""

from __future__ import annotations

import hashlib
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import llama_graph
import numpy as np
import onnx
import onnxruntime
from process import argument_parser, environment, median, save

PROGRAM = str(Path(sys.executable).with_name("ryzen-compile"))
ONNXSIM = """
import sys, onnx, onnxsim
source, result, *external = sys.argv[1:]
model, _ = onnxsim.simplify(source)
onnx.save(model, result, save_as_external_data=bool(external), location=external[0] if external else None)
"""
CASES = {
    "32": llama_graph.SyntheticLlamaConfig(layers=32),
    "80": llama_graph.SyntheticLlamaConfig(layers=80),
    "external": llama_graph.LLAMA_1B,
}
SIZES = ((1, 1, 0), (1, 7, 0), (2, 3, 5), (3, 1, 16))
"""(batch, new tokens, past tokens)."""
MAX_NODES, MAX_EXTERNAL_BYTES, TOLERANCE, MAX_GROWTH = 3300, 300_000_000, 1e-5, 1.3


@dataclass(frozen=True)
class ResourceUsage:
    """The resource usage of one process from start to exit."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class FoldBenchmarkResult:
    """The result of one case: medians over its runs."""

    nodes: int
    ours_nodes: int
    theirs_nodes: int
    ours: ResourceUsage
    theirs: ResourceUsage
    time_ratio: float
    """Median over the pairs of runs of our time divided by onnxsim's."""
    max_difference: float


def main() -> int:
    parser = argument_parser(__doc__, rounds=5)
    parser.add_argument("--cases", default="32,80,external")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="graph-passes-") as folder:
        results = {name: measure_case(name, Path(folder) / name, args.rounds) for name in args.cases.split(",")}
    violations = [violation for name, result in results.items() for violation in missed_bounds(name, result)]
    growth = growth_per_node(results)
    if growth is not None and growth > MAX_GROWTH:
        violations.append(f"the time per node of 80 layers is {growth:.2f} times that of 32")
    report(results, growth, violations)
    records = {name: asdict(result) for name, result in results.items()}
    save(args.save, {"cases": records, "growth": growth, "misses": violations})
    return 1 if violations else 0


def measure_case(name: str, folder: Path, rounds: int) -> FoldBenchmarkResult:
    """Write the model, run both tools interleaved after one warm-up round, and compare their outputs."""
    folder.mkdir()
    source, ours, theirs = folder / "in.onnx", folder / "ours.onnx", folder / "theirs.onnx"
    external = name == "external"
    llama_graph.write(CASES[name], source, external=external)
    commands = {
        "ours": [PROGRAM, "rewrite", str(source), str(ours), "-p", "fold"],
        "theirs": [sys.executable, "-c", ONNXSIM, str(source), str(theirs), *(["out.data"] if external else [])],
    }
    runs: dict[str, list[ResourceUsage]] = {"ours": [], "theirs": []}
    for round_index in range(rounds + 1):
        for tool, command in commands.items():
            (folder / "out.data").unlink(missing_ok=True)
            usage = measure(command)
            if round_index:
                runs[tool].append(usage)
    return FoldBenchmarkResult(
        nodes=node_count(source),
        ours_nodes=node_count(ours),
        theirs_nodes=node_count(theirs),
        ours=median_usage(runs["ours"]),
        theirs=median_usage(runs["theirs"]),
        time_ratio=median([own.seconds / other.seconds for own, other in zip(runs["ours"], runs["theirs"], strict=True)]),
        max_difference=compare_reduced_model(folder, source, ours)
        if external
        else max_output_difference(CASES[name], source, ours),
    )


def measure(command: Sequence[str]) -> ResourceUsage:
    """Run `command` to completion and return the resource usage that the kernel reports."""
    started = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # The resident set of a forked child includes that of its parent; a small Python process in between keeps it small.
    script = (
        "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode; "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
    )
    completed = subprocess.run(
        [sys.executable, "-S", "-c", script, *command], capture_output=True, text=True, env=environment()
    )
    if completed.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{completed.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return ResourceUsage(time.perf_counter() - started, cpu, int(completed.stdout) * 1024)


def median_usage(runs: Sequence[ResourceUsage]) -> ResourceUsage:
    """Return the medians of the times and the largest memory peak."""
    return ResourceUsage(
        median([run.seconds for run in runs]), median([run.cpu_seconds for run in runs]), max(run.peak_bytes for run in runs)
    )


def node_count(path: Path) -> int:
    """Return the number of nodes of the main graph."""
    return len(onnx.load(path, load_external_data=False).graph.node)


def max_output_difference(config: llama_graph.SyntheticLlamaConfig, source: Path, result: Path) -> float:
    """Return the largest difference of any output at any of `SIZES`; infinity for different shapes or types."""
    sessions = [_session(path) for path in (source, result)]
    differences = []
    for batch, seq, past in SIZES:
        inputs = llama_graph.make_inputs(config, batch=batch, seq=seq, past=past)
        for output, reference in zip(*(session.run(None, inputs) for session in sessions), strict=True):
            if output.shape != reference.shape or output.dtype != reference.dtype:
                return float("inf")
            differences.append(np.abs(output.astype(np.float64) - reference.astype(np.float64)).max(initial=0.0))
    return float(max(differences))


def _session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def compare_reduced_model(folder: Path, source: Path, result: Path) -> float:
    """Return the output difference of a model with smaller dimensions; infinity if a remaining weight differs in any byte."""
    if not weight_digests(result).items() <= weight_digests(source).items():
        return float("inf")
    config = llama_graph.SyntheticLlamaConfig(layers=2, half=True)
    llama_graph.write(config, folder / "reduced.onnx", external=True)
    measure([PROGRAM, "rewrite", str(folder / "reduced.onnx"), str(folder / "reduced-folded.onnx"), "-p", "fold"])
    return max_output_difference(config, folder / "reduced.onnx", folder / "reduced-folded.onnx")


def weight_digests(path: Path) -> dict[str, str]:
    """Return the digest of each external weight, by name."""
    digests = {}
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entry = {item.key: item.value for item in tensor.external_data}
            with (path.parent / entry["location"]).open("rb") as file:
                file.seek(int(entry.get("offset", 0)))
                digests[tensor.name] = hashlib.blake2b(file.read(int(entry["length"]))).hexdigest()
    return digests


def missed_bounds(name: str, result: FoldBenchmarkResult) -> list[str]:
    """Return the bounds that the result of the case `name` does not meet."""
    violations = []
    if result.time_ratio > 1:
        violations.append(f"{name}: {result.time_ratio:.2f} times onnxsim's time")
    if name == "32" and result.ours_nodes > MAX_NODES:
        violations.append(f"{name}: {result.ours_nodes} nodes remain, at most {MAX_NODES} allowed")
    bound = MAX_EXTERNAL_BYTES if name == "external" else result.theirs.peak_bytes
    if result.ours.peak_bytes > bound:
        violations.append(f"{name}: {result.ours.peak_bytes / 1e6:.0f} MB of memory, at most {bound / 1e6:.0f} MB allowed")
    if not result.max_difference <= TOLERANCE:
        violations.append(f"{name}: outputs differ by {result.max_difference}")
    return violations


def growth_per_node(results: dict[str, FoldBenchmarkResult]) -> float | None:
    """Return the time per node of 80 layers divided by that of 32; None if one was not measured."""
    if not {"32", "80"} <= set(results):
        return None
    small, large = results["32"], results["80"]
    return (large.ours.seconds / small.ours.seconds) / (large.nodes / small.nodes)


def report(results: dict[str, FoldBenchmarkResult], growth: float | None, violations: Sequence[str]) -> None:
    """Print a table, the ratios and the violated bounds."""
    print(f"{'case':10}{'tool':10}{'nodes':>8}{'after':>8}{'seconds':>10}{'cpu s':>8}{'memory':>10}")
    for name, result in results.items():
        rows = (("fold", result.ours, result.ours_nodes), ("onnxsim", result.theirs, result.theirs_nodes))
        for tool, usage, nodes in rows:
            columns = f"{usage.seconds:10.2f}{usage.cpu_seconds:8.2f}{usage.peak_bytes / 1e6:7.0f} MB"
            print(f"{name:10}{tool:10}{result.nodes:8}{nodes:8}{columns}")
        print(f"{name:10}time ratio {result.time_ratio:.2f}, outputs differ by at most {result.max_difference:.1e}")
    if growth is not None:
        print(f"the time per node of 80 layers is {growth:.2f} times that of 32")
    print("\n".join(f"NOT MET: {violation}" for violation in violations) or "all bounds are met")


if __name__ == "__main__":
    sys.exit(main())
