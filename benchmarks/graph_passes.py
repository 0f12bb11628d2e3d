"""Fold against onnxsim, file to file: time, memory, nodes left, growth, and that the outputs are the same.

    python benchmarks/graph_passes.py [--rounds 5] [--cases 32,80,external] [--save FILE]

`ryzen-compile rewrite IN OUT -p fold` and onnxsim (through its Python function, which is faster than its command) run in turns,
each in a fresh process that starts, loads, simplifies and saves; seconds are of the whole process, memory is its largest
resident set. Cases: a Llama-style decoder in TorchScript's decomposed style (`llama_graph.py`) of 32 layers (7,888 nodes) and of 80
(19,552) with small weights inside, and 16 layers of Llama 1B in fp16 with 3 GB of weights beside it. Outputs are compared in
ONNX Runtime at several sizes; for the 3 GB case on a twin of two layers with the same structure, and every weight that is left
is compared byte by byte.

Bounds: at most onnxsim's median time; at most 3,300 nodes of 32 layers; at most onnxsim's memory with weights inside, 300 MB
with 3 GB outside; outputs equal to 1e-5; 80 layers take at most 1.3 times as long for each node as 32.
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
    """One process, from its start to its end."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class FoldBenchmarkResult:
    """What one case gave; the medians of its runs."""

    nodes: int
    ours_nodes: int
    theirs_nodes: int
    ours: ResourceUsage
    theirs: ResourceUsage
    time_ratio: float
    """Ours to theirs, the median over the pairs."""
    max_difference: float


def main() -> int:
    parser = argument_parser(__doc__, rounds=5)
    parser.add_argument("--cases", default="32,80,external")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="graph-passes-") as folder:
        cases = {name: measure_case(name, Path(folder) / name, args.rounds) for name in args.cases.split(",")}
    misses = [miss for name, case in cases.items() for miss in missed_bounds(name, case)]
    growth = growth_per_node(cases)
    if growth is not None and growth > MAX_GROWTH:
        misses.append(f"80 layers take {growth:.2f} times as long for each node as 32")
    report(cases, growth, misses)
    save(args.save, {"cases": {name: asdict(case) for name, case in cases.items()}, "growth": growth, "misses": misses})
    return 1 if misses else 0


def measure_case(name: str, folder: Path, rounds: int) -> FoldBenchmarkResult:
    """Write the model, run both in turns after one turn that does not count, and compare what they wrote."""
    folder.mkdir()
    source, ours, theirs = folder / "in.onnx", folder / "ours.onnx", folder / "theirs.onnx"
    external = name == "external"
    llama_graph.write(CASES[name], source, external=external)
    commands = {
        "ours": [PROGRAM, "rewrite", str(source), str(ours), "-p", "fold"],
        "theirs": [sys.executable, "-c", ONNXSIM, str(source), str(theirs), *(["out.data"] if external else [])],
    }
    runs: dict[str, list[ResourceUsage]] = {"ours": [], "theirs": []}
    for turn in range(rounds + 1):
        for who, command in commands.items():
            (folder / "out.data").unlink(missing_ok=True)
            run = measure(command)
            if turn:
                runs[who].append(run)
    return FoldBenchmarkResult(
        nodes=node_count(source),
        ours_nodes=node_count(ours),
        theirs_nodes=node_count(theirs),
        ours=median_usage(runs["ours"]),
        theirs=median_usage(runs["theirs"]),
        time_ratio=median([one.seconds / other.seconds for one, other in zip(runs["ours"], runs["theirs"], strict=True)]),
        max_difference=compare_reduced_model(folder, source, ours)
        if external
        else max_output_difference(CASES[name], source, ours),
    )


def measure(command: Sequence[str]) -> ResourceUsage:
    """Run `command` to its end and return what the kernel says of it."""
    started = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # The resident set of a forked child begins as ours: a small Python process in between keeps ours out of it.
    script = (
        "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode; "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-S", "-c", script, *command], capture_output=True, text=True, env=environment())
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return ResourceUsage(time.perf_counter() - started, cpu, int(done.stdout) * 1024)


def median_usage(runs: Sequence[ResourceUsage]) -> ResourceUsage:
    """Return the medians of the times and the largest peak."""
    return ResourceUsage(
        median([run.seconds for run in runs]), median([run.cpu_seconds for run in runs]), max(run.peak_bytes for run in runs)
    )


def node_count(path: Path) -> int:
    """Return the number of nodes of the main graph."""
    return len(onnx.load(path, load_external_data=False).graph.node)


def max_output_difference(config: llama_graph.SyntheticLlamaConfig, source: Path, result: Path) -> float:
    """Return the largest difference of any output at any of `SIZES`."""
    sessions = [_session(path) for path in (source, result)]
    differences = []
    for batch, seq, past in SIZES:
        feed = llama_graph.make_inputs(config, batch=batch, seq=seq, past=past)
        for one, other in zip(*(session.run(None, feed) for session in sessions), strict=True):
            if one.shape != other.shape or one.dtype != other.dtype:
                return float("inf")
            differences.append(np.abs(one.astype(np.float64) - other.astype(np.float64)).max(initial=0.0))
    return float(max(differences))


def _session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def compare_reduced_model(folder: Path, source: Path, result: Path) -> float:
    """Compare the weights that are left byte by byte, and the outputs of a model that differs in its dimensions only."""
    if not weight_digests(result).items() <= weight_digests(source).items():
        return float("inf")
    dims = llama_graph.SyntheticLlamaConfig(layers=2, half=True)
    llama_graph.write(dims, folder / "twin.onnx", external=True)
    measure([PROGRAM, "rewrite", str(folder / "twin.onnx"), str(folder / "twin-folded.onnx"), "-p", "fold"])
    return max_output_difference(dims, folder / "twin.onnx", folder / "twin-folded.onnx")


def weight_digests(path: Path) -> dict[str, str]:
    """Return the digest of each weight that lies outside of the graph's file."""
    digests = {}
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entry = {item.key: item.value for item in tensor.external_data}
            with (path.parent / entry["location"]).open("rb") as file:
                file.seek(int(entry.get("offset", 0)))
                digests[tensor.name] = hashlib.blake2b(file.read(int(entry["length"]))).hexdigest()
    return digests


def missed_bounds(name: str, result: FoldBenchmarkResult) -> list[str]:
    """Return the bounds that `case` does not keep."""
    found = []
    if result.time_ratio > 1:
        found.append(f"{name}: {result.time_ratio:.2f} times onnxsim's time")
    if name == "32" and result.ours_nodes > MAX_NODES:
        found.append(f"{name}: {result.ours_nodes} nodes left, {MAX_NODES} allowed")
    bound = MAX_EXTERNAL_BYTES if name == "external" else result.theirs.peak_bytes
    if result.ours.peak_bytes > bound:
        found.append(f"{name}: {result.ours.peak_bytes / 1e6:.0f} MB of memory, {bound / 1e6:.0f} MB allowed")
    if not result.max_difference <= TOLERANCE:
        found.append(f"{name}: outputs differ by {result.max_difference}")
    return found


def growth_per_node(results: dict[str, FoldBenchmarkResult]) -> float | None:
    """Return how much longer 80 layers take than 32, for each node."""
    if not {"32", "80"} <= set(results):
        return None
    small, large = results["32"], results["80"]
    return (large.ours.seconds / small.ours.seconds) / (large.nodes / small.nodes)


def report(results: dict[str, FoldBenchmarkResult], growth: float | None, misses: Sequence[str]) -> None:
    """Print a table, the ratios and the verdict."""
    print(f"{'case':10}{'tool':10}{'nodes':>8}{'left':>8}{'seconds':>10}{'cpu s':>8}{'memory':>10}")
    for name, case in results.items():
        for who, run, left in (("fold", case.ours, case.ours_nodes), ("onnxsim", case.theirs, case.theirs_nodes)):
            figures = f"{run.seconds:10.2f}{run.cpu_seconds:8.2f}{run.peak_bytes / 1e6:7.0f} MB"
            print(f"{name:10}{who:10}{case.nodes:8}{left:8}{figures}")
        print(f"{name:10}time ratio {case.time_ratio:.2f}, outputs differ by at most {case.max_difference:.1e}")
    if growth is not None:
        print(f"80 layers take {growth:.2f} times as long for each node as 32")
    print("\n".join(f"MISSED {miss}" for miss in misses) or "all bounds kept")


if __name__ == "__main__":
    sys.exit(main())
