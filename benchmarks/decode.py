"""Decode speed over a full context: evicting caches against caches that keep all, and constant time and memory per token.

    python benchmarks/decode.py [--rounds 15] [--cases narrow,wide,flat] [--quick] [--save FILE]

All decoders run in one process; in each round every decoder runs a block of steps of one token, at a context of 4,096 tokens,
on ONNX Runtime's CPU provider in fp32. A result is the median over the rounds of a ratio within a round. Weights are random,
and so are the caches, which are filled before the first step; every step has the shapes of the last token of the context.

* narrow: hidden 512, MLP 1,376, 4 layers, 8 heads, batch 1. `kv-evict` with a budget of 1,024 against the fastest of (a) the
  exported graph, whose caches grow, from torch's tracer and from its dynamo exporter, with inputs and outputs bound to memory;
  (b) `kv-static` with 4,096 slots, bound in place, with ONNX Attention and with grouped matrix products (pass `attention`);
  (c) Transformers in PyTorch with its DynamicCache. Bound: at least 1.6 times as fast.
* wide: the width of Llama 3.2 1B (hidden 2,048, MLP 8,192, 32 heads, 8 kv-heads), 4 layers, a vocabulary of 4,096, batch 1 and
  8. The weights dominate the time. The upper bound for eviction is the speedup of a cache of 1,024 slots over one of 4,096
  without eviction, both in the faster form. Bound: at least 90 % of that speedup.
* flat: the decoder of narrow generates 50,000 tokens at a budget of 1,024. Bounds: the median step of the last tenth takes at
  most 1.05 times that of the second; resident memory grows by at most 8 MiB after the second tenth.

The share of attention in a step is the time over that of the same decoder with 64 slots. `--quick` uses tiny sizes and checks
no bound.
"""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from process import argument_parser, median, save
from torch_export import DYNAMO, TRACER, export_module

from ryzen_compile import registry
from ryzen_compile.backends.onnxruntime.backend import OnnxRuntimeSession
from ryzen_compile.builder.rewrite import RewriteConfig, rewrite
from ryzen_compile.huggingface.decoders import with_caches
from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.ir.load import load
from ryzen_compile.ir.save import save_to_store
from ryzen_compile.spec.interface import Interface
from ryzen_models._decoders import LlamaSizes

Array = np.ndarray[Any, Any]
StepFunction = Callable[[], object]


@dataclass(frozen=True)
class DecodeRunner:
    """Runs decode steps."""

    step: StepFunction
    rewind: Callable[[], None] = lambda: None
    """Resets the length to that before the block."""


ATTENTION_FORMS = {"Attention": "", "grouped": ",attention"}
"""The forms of attention over a cache, and the additional passes that produce them."""
SMALL_CACHE_SLOTS = 64
"""The size of a cache whose cost is negligible."""
BLOCK_SECONDS, MAX_BLOCK_STEPS = 0.25, 60
"""The duration of a block and its largest number of steps."""
MIN_SPEEDUP, MIN_CEILING_SHARE, MAX_SLOWDOWN, MAX_EXTRA_BYTES = 1.6, 0.9, 1.05, 8 << 20


@dataclass(frozen=True, kw_only=True)
class DecodeWorkload:
    """A decoder, its context and its cache budget."""

    sizes: LlamaSizes
    context: int = 4096
    budget: int = 1024


GENERATED_TOKENS = 50_000
NARROW = DecodeWorkload(
    sizes=LlamaSizes(
        vocab_size=4096,
        max_positions=2 * GENERATED_TOKENS,
        layers=4,
        heads=8,
        kv_heads=8,
        head_dim=64,
        hidden_size=512,
        intermediate_size=1376,
    )
)
WIDE = replace(NARROW, sizes=replace(NARROW.sizes, heads=32, hidden_size=2048, intermediate_size=8192))
BATCH_SIZES = (1, 8)


def main() -> int:
    parser = argument_parser(__doc__, rounds=15)
    parser.add_argument("--cases", default="narrow,wide,flat")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, no bound is checked")
    args = parser.parse_args()
    narrow, wide, tokens = NARROW, WIDE, GENERATED_TOKENS
    if args.quick:
        tiny = replace(NARROW.sizes, layers=2, heads=4, kv_heads=4, head_dim=16, hidden_size=64, intermediate_size=96)
        narrow = DecodeWorkload(sizes=tiny, context=512, budget=128)
        wide, tokens = replace(narrow, sizes=replace(tiny, kv_heads=2)), 1000
    results: dict[str, Any] = {}
    violations: list[str] = []
    with tempfile.TemporaryDirectory(prefix="decode-") as name:
        for case in args.cases.split(","):
            folder = Path(name, case)
            folder.mkdir()
            if case == "narrow":
                results[case] = measure_narrow(narrow, folder, args.rounds, violations)
            elif case == "wide":
                results[case] = measure_wide(wide, folder, args.rounds, violations)
            else:
                results[case] = measure_flat(narrow, folder, tokens, violations)
            gc.collect()
    save(args.save, results)
    for violation in violations if not args.quick else ():
        print(f"NOT MET: {violation}")
    return int(bool(violations) and not args.quick)


# Models


def export_decoder(workload: DecodeWorkload, path: Path, exporter: str) -> Path:
    """Export a Transformers decoder with growing caches and seeded weights by `exporter`, TRACER or DYNAMO, to `path`."""
    import torch

    batch, seq, past = 2, 3, 5
    samples: dict[str, torch.Tensor] = {
        "input_ids": torch.zeros(batch, seq, dtype=torch.int64),
        "attention_mask": torch.ones(batch, past + seq, dtype=torch.int64),
        "position_ids": torch.arange(past, past + seq)[None].repeat(batch, 1),
    }
    sizes = workload.sizes
    caches = [f"{layer}.{tensor}" for layer in range(sizes.layers) for tensor in ("key", "value")]
    samples |= {f"past_key_values.{name}": torch.zeros(batch, sizes.kv_heads, past, sizes.head_dim) for name in caches}
    axes = dict.fromkeys(samples, {0: "batch", 2: "past"})
    axes |= {"input_ids": {0: "batch", 1: "seq"}, "position_ids": {0: "batch", 1: "seq"}}
    axes |= {"attention_mask": {0: "batch", 1: "past+seq"}}
    output_axes = {"logits": {0: "batch", 1: "seq"}} | {f"present.{name}": {0: "batch", 2: "past+seq"} for name in caches}
    decoder, opset = with_caches(make_model(workload)), 18 if exporter == TRACER else 23
    with torch.no_grad():
        export_module(decoder, samples, path, exporter=exporter, opset=opset, axes=axes, outputs=output_axes)
    return path


def make_model(workload: DecodeWorkload) -> Any:
    """Return the Transformers causal language model with seeded weights."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(workload.sizes.config()).eval()


class DecodeBenchmark:
    """The variants of one decoder, each opened once; their graphs share a store of weights."""

    def __init__(self, workload: DecodeWorkload, folder: Path, resources: ExitStack) -> None:
        self.workload, self.folder, self.resources = workload, folder, resources
        self.source = export_decoder(workload, folder / "tracer.onnx", TRACER)
        self.sessions: dict[str, OnnxRuntimeSession] = {}
        self.interfaces: dict[str, Interface] = {}

    def open_static(self, slots: int, form: str, *, budget: int | None = None) -> str:
        """Rewrite and open a decoder with static caches of `slots` slots, or evicting ones of `budget`; return its name."""
        evict = "" if budget is None else f",kv-evict{{score=knorm,budget={budget}}}"
        name = f"{'static' if budget is None else 'evict'} {budget or slots}, {form}"
        passes = f"kv-static{{capacity={slots},step=1}}{evict},fold{ATTENTION_FORMS[form]}"
        rewritten, path = self.folder / "rewritten.onnx", self.folder / f"{name.replace(' ', '-').replace(',', '')}.onnx"
        rewrite(self.source, rewritten, RewriteConfig(passes=passes), weights="external")
        model = load(rewritten)
        self.interfaces[name] = interface_of(model)
        save_to_store(model, path, self.folder / "weights", threshold_bytes=4096)
        del model
        for file in (rewritten, rewritten.with_name(rewritten.name + ".data")):
            file.unlink()
        backend = registry.find_backend("onnxruntime")
        session = self.resources.enter_context(backend.open(str(path)))
        assert isinstance(session, OnnxRuntimeSession)
        self.sessions[name] = session
        return name

    @contextlib.contextmanager
    def open_runner(self, name: str, batch: int) -> Iterator[DecodeRunner]:
        """Yield a runner of the decoder `name` over caches that are full except for the tokens of a block."""
        interface = self.interfaces[name]
        shapes = state_shapes(interface, batch)
        steps = self.sessions[name].bind_states(interface.states, shapes)
        random, length = np.random.default_rng(0), (interface.capacity or self.workload.context) - MAX_BLOCK_STEPS
        arrays = {state: buffers.read_buffer._array for state, buffers in steps._state_buffers.buffers.items()}  # type: ignore[union-attr]
        for state, array in arrays.items():
            if state == "position":
                slots = np.arange(array.shape[-1])
                positions = np.where(slots < 4, slots, slots + length - array.shape[-1])
                array[...] = random.permuted(np.broadcast_to(positions, array.shape), axis=-1)
            elif array.dtype == np.float32:
                array[...] = random.standard_normal(array.shape, np.float32)

        def rewind() -> None:
            steps._state_buffers.buffers["length"].read_buffer._array[...] = length  # type: ignore[union-attr]

        inputs = {"input_ids": np.full((batch, 1), 5), "attention_mask": np.ones((batch, 1), np.int64)}
        try:
            yield DecodeRunner(lambda: steps.run(inputs), rewind)
        finally:
            steps.close()


def state_shapes(interface: Interface, batch: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the states for a batch, by input name."""
    dims = {state.input: interface.input(state.input).dims or () for state in interface.states}
    return {name: (batch, *(size for size in sizes if isinstance(size, int))) for name, sizes in dims.items()}


def growing_cache_runner(path: Path, workload: DecodeWorkload, batch: int) -> DecodeRunner:
    """Return a runner of the exported graph with static shapes; inputs and outputs are bound to memory."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    random, binding = np.random.default_rng(0), session.io_binding()
    cache_shape = (batch, workload.sizes.kv_heads, workload.context, workload.sizes.head_dim)
    inputs = {
        "input_ids": np.full((batch, 1), 5),
        "attention_mask": np.ones((batch, workload.context), np.int64),
        "position_ids": np.full((batch, 1), workload.context - 1),
    }
    for entry in session.get_inputs():
        size = (batch, workload.sizes.kv_heads, workload.context - 1, workload.sizes.head_dim)
        array = inputs[entry.name] if entry.name in inputs else random.standard_normal(size, np.float32)
        binding.bind_ortvalue_input(entry.name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
    for entry in session.get_outputs():
        array = np.empty((batch, 1, workload.sizes.vocab_size) if entry.name == "logits" else cache_shape, np.float32)
        binding.bind_ortvalue_output(entry.name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
    return DecodeRunner(lambda: session.run_with_iobinding(binding))


def torch_runner(workload: DecodeWorkload, batch: int) -> DecodeRunner:
    """Return a runner of Transformers with its DynamicCache; the new token is removed from the cache after each step."""
    import torch
    from transformers import DynamicCache

    model = make_model(workload)
    cache = DynamicCache(config=model.config)
    size = (batch, workload.sizes.kv_heads, workload.context - 1, workload.sizes.head_dim)
    for layer in range(workload.sizes.layers):
        cache.update(torch.randn(size), torch.randn(size), layer)
    ids = torch.full((batch, 1), 5)

    def step() -> object:
        with torch.inference_mode():
            logits = model(ids, past_key_values=cache, use_cache=True).logits
            cache.crop(-1)
            return logits

    return DecodeRunner(step)


# Time


def run_interleaved(runners: Mapping[str, DecodeRunner], rounds: int) -> dict[str, list[float]]:
    """Run blocks of all runners interleaved; return the median seconds per step of each measured block, by runner."""
    step_times: dict[str, list[float]] = {name: [] for name in runners}
    order = list(runners)
    counts = {name: math.ceil(BLOCK_SECONDS / min(_time_block(runners[name], 4))) for name in order}
    for round_index in range(rounds + 1):
        for name in order:
            times = _time_block(runners[name], max(4, min(counts[name], MAX_BLOCK_STEPS)))
            if round_index:  # round 0 is a warm-up
                step_times[name].append(statistics.median(times[1:]))
        order = order[1:] + order[:1]
    return step_times


def _time_block(runner: DecodeRunner, count: int) -> list[float]:
    runner.rewind()
    times = []
    for _ in range(count):
        started = time.perf_counter()
        runner.step()
        times.append(time.perf_counter() - started)
    return times


def speedup(step_times: Mapping[str, Sequence[float]], slow: str, fast: str) -> float:
    """Return the median over the rounds of the time of `slow` divided by that of `fast`."""
    return median([slow_time / fast_time for slow_time, fast_time in zip(step_times[slow], step_times[fast], strict=True)])


def fastest(step_times: Mapping[str, Sequence[float]], names: Sequence[str]) -> str:
    """Return the name in `names` with the smallest median time."""
    return min(names, key=lambda name: median(step_times[name]))


def print_table(step_times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Print the median milliseconds per step by runner, fastest first, and return them."""
    milliseconds = {name: 1000 * median(times) for name, times in step_times.items()}
    for name, value in sorted(milliseconds.items(), key=lambda item: item[1]):
        quartiles = np.percentile(np.array(step_times[name]) * 1000, [25, 75])
        print(f"  {name:<28} {value:9.3f} ms  ({quartiles[0]:.3f} .. {quartiles[1]:.3f})")
    return milliseconds


# Cases


def measure_narrow(workload: DecodeWorkload, folder: Path, rounds: int, violations: list[str]) -> dict[str, Any]:
    """Measure eviction against the alternatives without it."""
    with ExitStack() as resources:
        bench = DecodeBenchmark(workload, folder, resources)
        names = _open_all(bench)
        steps = {name: resources.enter_context(bench.open_runner(name, 1)) for name in names}
        steps["grows, tracer"] = growing_cache_runner(bench.source, workload, 1)
        steps["grows, dynamo"] = growing_cache_runner(export_decoder(workload, folder / "dynamo.onnx", DYNAMO), workload, 1)
        steps["torch, DynamicCache"] = torch_runner(workload, 1)
        step_times = run_interleaved(steps, rounds)
    print(f"narrow: {workload}, batch 1")
    milliseconds = print_table(step_times)
    candidate = fastest(step_times, [name for name in step_times if name.startswith("evict")])
    full = fastest(step_times, [name for name in step_times if name.startswith(f"static {workload.context}")])
    baseline = fastest(step_times, [full, *(name for name in step_times if name.startswith(("grows", "torch")))])
    ratio = speedup(step_times, baseline, candidate)
    print(f"  {candidate} is {ratio:.2f} times as fast as {baseline}, the fastest baseline (at least {MIN_SPEEDUP})")
    if ratio < MIN_SPEEDUP:
        violations.append(f"narrow: {ratio:.2f} times as fast as {baseline}, at least {MIN_SPEEDUP} required")
    ceiling = _measure_ceiling(workload, step_times, candidate)
    return {"milliseconds": milliseconds, "against": baseline, "times_as_fast": ratio, **ceiling}


def measure_wide(workload: DecodeWorkload, folder: Path, rounds: int, violations: list[str]) -> dict[str, Any]:
    """Measure eviction against the speedup of a smaller cache without eviction."""
    results = {}
    with ExitStack() as benchmark_resources:
        bench = DecodeBenchmark(workload, folder, benchmark_resources)
        names = _open_all(bench)
        for batch in BATCH_SIZES:
            with ExitStack() as resources:
                steps = {name: resources.enter_context(bench.open_runner(name, batch)) for name in names}
                step_times = run_interleaved(steps, rounds)
            print(f"wide: {workload}, batch {batch}")
            milliseconds = print_table(step_times)
            candidate = fastest(step_times, [name for name in step_times if name.startswith("evict")])
            ceiling = _measure_ceiling(workload, step_times, candidate)
            share = ceiling["share_of_ceiling"]
            print(f"  {candidate} reaches {share:.1%} of that upper bound (at least {MIN_CEILING_SHARE:.0%})")
            if share < MIN_CEILING_SHARE:
                violations.append(
                    f"wide, batch {batch}: {share:.1%} of the upper bound, at least {MIN_CEILING_SHARE:.0%} required"
                )
            results[f"batch {batch}"] = {"milliseconds": milliseconds, **ceiling}
    return results


def _open_all(benchmark: DecodeBenchmark) -> list[str]:
    workload = benchmark.workload
    names = [benchmark.open_static(SMALL_CACHE_SLOTS, "grouped")]
    for form in ATTENTION_FORMS:
        names += [benchmark.open_static(workload.context, form), benchmark.open_static(workload.budget, form)]
        names.append(benchmark.open_static(workload.context, form, budget=workload.budget))
    return names


def _measure_ceiling(workload: DecodeWorkload, step_times: Mapping[str, Sequence[float]], candidate: str) -> dict[str, float]:
    """Print and return the share of attention in a step, and the speedup of a smaller cache without eviction."""
    full, reduced = (
        fastest(step_times, [name for name in step_times if name.startswith(f"static {slots},")])
        for slots in (workload.context, workload.budget)
    )
    small = f"static {SMALL_CACHE_SLOTS}, grouped"
    ceiling, gained = speedup(step_times, full, reduced), speedup(step_times, full, candidate)
    share, reduced_share = 1 - 1 / speedup(step_times, full, small), 1 - 1 / speedup(step_times, reduced, small)
    print(f"  attention is {share:.1%} of a step over {workload.context} tokens, {reduced_share:.1%} over {workload.budget}")
    print(f"  {reduced} is {ceiling:.3f} times as fast as {full}, the upper bound; {candidate} is {gained:.3f} times as fast")
    reached = median(
        [
            (full_time / candidate_time) / (full_time / reduced_time)
            for full_time, candidate_time, reduced_time in zip(
                step_times[full], step_times[candidate], step_times[reduced], strict=True
            )
        ]
    )
    return {"attention_share": share, "ceiling": ceiling, "gained": gained, "share_of_ceiling": reached}


def measure_flat(workload: DecodeWorkload, folder: Path, tokens: int, violations: list[str]) -> dict[str, Any]:
    """Generate `tokens` tokens; check that time per step and memory do not grow after the second tenth."""
    process = psutil.Process()
    with ExitStack() as resources:
        bench = DecodeBenchmark(workload, folder, resources)
        name = bench.open_static(workload.context, "grouped", budget=workload.budget)
        interface = bench.interfaces[name]
        steps = bench.sessions[name].bind_states(interface.states, state_shapes(interface, 1))
        inputs = {"input_ids": np.full((1, 1), 5), "attention_mask": np.ones((1, 1), np.int64)}
        times, resident, tenth = np.zeros(tokens), np.zeros(10, np.int64), tokens // 10
        for index in range(tokens):
            started = time.perf_counter()
            logits = steps.run(inputs)["logits"]
            times[index] = time.perf_counter() - started
            inputs["input_ids"][0, 0] = int(logits[0, 0].argmax())
            if index % tenth == tenth - 1:
                resident[index // tenth] = process.memory_info().rss
        length = int(steps.read("length")[0])
        steps.close()
    medians = np.median(times[: 10 * tenth].reshape(10, tenth), axis=1) * 1000
    slowdown, extra_bytes = float(medians[-1] / medians[1]), int(resident[-1] - resident[1])
    print(f"flat: {length} tokens at a budget of {workload.budget}")
    print("  ms per step, by tenths: " + " ".join(f"{value:.3f}" for value in medians))
    print("  resident MiB, by tenths: " + " ".join(f"{value / 2**20:.1f}" for value in resident))
    print(f"  the last tenth takes {slowdown:.3f} times the second (at most {MAX_SLOWDOWN}), {extra_bytes / 2**20:+.1f} MiB")
    if slowdown > MAX_SLOWDOWN:
        violations.append(f"flat: the last tenth takes {slowdown:.3f} times the second")
    if extra_bytes > MAX_EXTRA_BYTES:
        violations.append(f"flat: {extra_bytes / 2**20:.1f} MiB more than after the second tenth")
    return {
        "milliseconds": medians.tolist(),
        "resident_bytes": resident.tolist(),
        "slower": slowdown,
        "more_bytes": extra_bytes,
    }


if __name__ == "__main__":
    sys.exit(main())
