"""Decoding over a full context: caches that evict against caches that do not, in turns; and that nothing grows with the tokens.

    python benchmarks/decode.py [--rounds 15] [--cases narrow,wide,flat] [--quick] [--save FILE]

One process holds every contender; in each round every one takes a block of steps of one token, at a context of 4,096 tokens, on
ONNX Runtime's CPU provider in fp32. A figure is the median over the rounds of a ratio within a round. Weights are random, and
so are the caches, which are filled before the first step; every step has the shapes of the last token of the context.

* narrow: hidden 512, MLP 1,376, 4 layers, 8 heads, batch 1. `kv-evict` with a budget of 1,024 against the best of (a) the
  graph as it was exported, whose caches grow, by torch's tracer and by its dynamo exporter, its inputs and outputs bound to
  memory; (b) `kv-static` of 4,096 slots, bound in place, with ONNX's Attention and with grouped products (pass `attention`);
  (c) transformers in PyTorch with its DynamicCache. Bound: at least 1.6 times as fast.
* wide: the width of Llama 3.2 1B (hidden 2,048, MLP 8,192, 32 heads, 8 kv-heads), 4 layers, a vocabulary of 4,096, batch 1 and
  8. The weights dominate, and what eviction can gain is bounded by what a cache of 1,024 slots gains over one of 4,096
  without any eviction, both in the faster form. Bound: at least 90 % of that ratio.
* flat: narrow's decoder generates 50,000 tokens at a budget of 1,024. Bounds: the median step of the last tenth takes at most
  1.05 times that of the second; resident memory is at most 8 MB over that after the second tenth.

Attention's share of a step is what it takes longer than the same decoder with 64 slots. `--quick` takes tiny sizes, and judges
nothing.
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

from ryzen_compile import registry
from ryzen_compile.backends.onnxruntime.backend import OnnxRuntimeSession
from ryzen_compile.builder.rewrite import RewriteConfig, rewrite
from ryzen_compile.ir.interface_metadata import interface_of
from ryzen_compile.ir.load import load
from ryzen_compile.ir.save import save_to_store
from ryzen_compile.spec.interface import Interface
from ryzen_compile.torch_module import suppress_output

Array = np.ndarray[Any, Any]
StepFunction = Callable[[], object]


@dataclass(frozen=True)
class DecodeRunner:
    """What runs one step after another."""

    step: StepFunction
    rewind: Callable[[], None] = lambda: None
    """Goes back by as many tokens as a block has steps."""


ATTENTION_FORMS = {"Attention": "", "grouped": ",attention"}
"""How attention over a cache is written, and the passes that write it so."""
TRACER, DYNAMO = "tracer", "dynamo"
SMALL_CACHE_SLOTS = 64
"""Slots of a cache that costs next to nothing."""
BLOCK_SECONDS, MAX_BLOCK_STEPS = 0.25, 60
"""How long a block lasts, and how many steps it has at the most."""
MIN_SPEEDUP, MIN_CEILING_SHARE, MAX_SLOWDOWN, MAX_EXTRA_BYTES = 1.6, 0.9, 1.05, 8 << 20


@dataclass(frozen=True, kw_only=True)
class DecodeWorkload:
    """The sizes of a decoder, and of what is compared."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    context: int = 4096
    budget: int = 1024
    vocabulary: int = 4096

    @property
    def head_size(self) -> int:
        """Elements of a head."""
        return self.hidden // self.heads


NARROW = DecodeWorkload(hidden=512, intermediate=1376, layers=4, heads=8, kv_heads=8)
WIDE = DecodeWorkload(hidden=2048, intermediate=8192, layers=4, heads=32, kv_heads=8)
BATCH_SIZES = (1, 8)
GENERATED_TOKENS = 50_000


def main() -> int:
    parser = argument_parser(__doc__, rounds=15)
    parser.add_argument("--cases", default="narrow,wide,flat")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, nothing is judged")
    args = parser.parse_args()
    narrow, wide, tokens = NARROW, WIDE, GENERATED_TOKENS
    if args.quick:
        narrow = replace(
            NARROW, hidden=64, intermediate=96, layers=2, heads=4, kv_heads=4, context=512, budget=128, vocabulary=97
        )
        wide, tokens = replace(narrow, kv_heads=2), 1000
    results: dict[str, Any] = {}
    missed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="decode-") as name:
        for case in args.cases.split(","):
            folder = Path(name, case)
            folder.mkdir()
            if case == "narrow":
                results[case] = measure_narrow(narrow, folder, args.rounds, missed)
            elif case == "wide":
                results[case] = measure_wide(wide, folder, args.rounds, missed)
            else:
                results[case] = measure_flat(narrow, folder, tokens, missed)
            gc.collect()
    save(args.save, results)
    for miss in missed if not args.quick else ():
        print(f"MISSED: {miss}")
    return int(bool(missed) and not args.quick)


# Models


def export_decoder(workload: DecodeWorkload, path: Path, exporter: str) -> Path:
    """Write a decoder with caches that grow, as transformers makes it and torch exports it; weights are seeded."""
    import torch

    batch, seq, past = 2, 3, 5
    samples: dict[str, torch.Tensor] = {
        "input_ids": torch.zeros(batch, seq, dtype=torch.int64),
        "attention_mask": torch.ones(batch, past + seq, dtype=torch.int64),
        "position_ids": torch.arange(past, past + seq)[None].repeat(batch, 1),
    }
    caches = [f"{layer}.{kind}" for layer in range(workload.layers) for kind in ("key", "value")]
    samples |= {f"past_key_values.{name}": torch.zeros(batch, workload.kv_heads, past, workload.head_size) for name in caches}
    axes = dict.fromkeys(samples, {0: "batch", 2: "past"})
    axes |= {"input_ids": {0: "batch", 1: "seq"}, "position_ids": {0: "batch", 1: "seq"}}
    axes |= {"attention_mask": {0: "batch", 1: "past+seq"}}
    outputs = ["logits", *(f"present.{name}" for name in caches)]
    decoder = _with_cache_inputs(make_model(workload), tuple(samples))
    with suppress_output(), torch.no_grad():
        if exporter == TRACER:
            grown = dict.fromkeys(outputs[1:], {0: "batch", 2: "past+seq"}) | {"logits": {0: "batch", 1: "seq"}}
            torch.onnx.export(
                decoder,
                tuple(samples.values()),
                path,
                dynamo=False,
                opset_version=18,
                dynamic_axes=axes | grown,
                input_names=list(samples),
                output_names=outputs,
            )
        else:
            program = torch.onnx.export(
                decoder,
                tuple(samples.values()),
                dynamo=True,
                opset_version=23,
                dynamic_shapes=(tuple(axes[name] for name in samples),),
                input_names=list(samples),
                output_names=outputs,
                verbose=False,
            )
            assert program is not None
            program.save(path)
    return path


def make_model(workload: DecodeWorkload) -> Any:
    """Return the causal language model of transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=workload.vocabulary,
        hidden_size=workload.hidden,
        intermediate_size=workload.intermediate,
        num_hidden_layers=workload.layers,
        num_attention_heads=workload.heads,
        num_key_value_heads=workload.kv_heads,
        head_dim=workload.head_size,
        max_position_embeddings=2 * GENERATED_TOKENS,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


def _with_cache_inputs(model: Any, input_names: Sequence[str]) -> Any:
    """Return a module of the tensors named `inputs` to (logits, key 0, value 0, ...)."""
    import torch
    from transformers import DynamicCache

    class Decoder(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            given = dict(zip(input_names, tensors, strict=True))
            pasts = [given.pop(name) for name in input_names if name.startswith("past_key_values")]
            cache = DynamicCache(zip(pasts[::2], pasts[1::2], strict=True))
            out = self.model(**given, past_key_values=cache, use_cache=True)
            return (out.logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))

    return Decoder().eval()


class DecodeBenchmark:
    """The contenders of one decoder, opened once; its graphs share a store of weights."""

    def __init__(self, workload: DecodeWorkload, folder: Path, resources: ExitStack) -> None:
        self.workload, self.folder, self.resources = workload, folder, resources
        self.source = export_decoder(workload, folder / "tracer.onnx", TRACER)
        self.sessions: dict[str, OnnxRuntimeSession] = {}
        self.interfaces: dict[str, Interface] = {}

    def open_static(self, slots: int, form: str, *, budget: int | None = None) -> str:
        """Rewrite and open a decoder with fixed caches, of `budget` slots where they evict; return its name."""
        evict = "" if budget is None else f",kv-evict{{budget={budget}}}"
        name = f"{'static' if budget is None else 'evict'} {budget or slots}, {form}"
        passes = f"kv-static{{capacity={slots},step=1}}{evict},fold{ATTENTION_FORMS[form]}"
        raw, path = self.folder / "rewritten.onnx", self.folder / f"{name.replace(' ', '-').replace(',', '')}.onnx"
        rewrite(self.source, raw, RewriteConfig(passes=passes), weights="external")
        model = load(raw)
        self.interfaces[name] = interface_of(model)
        save_to_store(model, path, self.folder / "weights", threshold_bytes=4096)
        del model
        for file in (raw, raw.with_name(raw.name + ".data")):
            file.unlink()
        backend = registry.find_backend("onnxruntime")
        session = self.resources.enter_context(backend.open(str(path)))
        assert isinstance(session, OnnxRuntimeSession)
        self.sessions[name] = session
        return name

    @contextlib.contextmanager
    def open_runner(self, name: str, batch: int) -> Iterator[DecodeRunner]:
        """Give steps of the decoder `name` over full caches, in which there is room for the tokens of a block."""
        told, shape = self.interfaces[name], self.workload
        dims = {state.input: told.input(state.input).dims or () for state in told.states}
        shapes = {one: (batch, *(size for size in sizes if isinstance(size, int))) for one, sizes in dims.items()}
        steps = self.sessions[name].bind_states(told.states, shapes)
        random, length = np.random.default_rng(0), (told.capacity or shape.context) - MAX_BLOCK_STEPS
        arrays = {state: held.read_buffer._array for state, held in steps._state_buffers.buffers.items()}  # type: ignore[union-attr]
        for state, array in arrays.items():
            if state == "position":
                places = np.arange(array.shape[-1])
                held = np.where(places < 4, places, places + length - array.shape[-1])
                array[...] = random.permuted(np.broadcast_to(held, array.shape), axis=-1)
            elif array.dtype == np.float32:
                array[...] = random.standard_normal(array.shape, np.float32)

        def rewind() -> None:
            steps._state_buffers.buffers["length"].read_buffer._array[...] = length  # type: ignore[union-attr]

        feed = {"input_ids": np.full((batch, 1), 5), "attention_mask": np.ones((batch, 1), np.int64)}
        try:
            yield DecodeRunner(lambda: steps.run(feed), rewind)
        finally:
            steps.close()


def growing_cache_runner(path: Path, workload: DecodeWorkload, batch: int) -> DecodeRunner:
    """Give steps of the graph as it was exported: what it reads and writes is bound to memory, and of one shape."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    random, binding = np.random.default_rng(0), session.io_binding()
    whole = (batch, workload.kv_heads, workload.context, workload.head_size)
    fixed = {
        "input_ids": np.full((batch, 1), 5),
        "attention_mask": np.ones((batch, workload.context), np.int64),
        "position_ids": np.full((batch, 1), workload.context - 1),
    }
    for entry in session.get_inputs():
        size = (batch, workload.kv_heads, workload.context - 1, workload.head_size)
        array = fixed[entry.name] if entry.name in fixed else random.standard_normal(size, np.float32)
        binding.bind_ortvalue_input(entry.name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
    for entry in session.get_outputs():
        array = np.empty((batch, 1, workload.vocabulary) if entry.name == "logits" else whole, np.float32)
        binding.bind_ortvalue_output(entry.name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
    return DecodeRunner(lambda: session.run_with_iobinding(binding))


def torch_runner(workload: DecodeWorkload, batch: int) -> DecodeRunner:
    """Give steps of transformers with its DynamicCache, from which the new token is cut again after each."""
    import torch
    from transformers import DynamicCache

    model = make_model(workload)
    cache = DynamicCache(config=model.config)
    size = (batch, workload.kv_heads, workload.context - 1, workload.head_size)
    for layer in range(workload.layers):
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
    """Run a block of each in turns, and return the median seconds of a step in every block that counts, by name."""
    found: dict[str, list[float]] = {name: [] for name in runners}
    order = list(runners)
    counts = {name: math.ceil(BLOCK_SECONDS / min(_time_block(runners[name], 4))) for name in order}
    for turn in range(rounds + 1):
        for name in order:
            times = _time_block(runners[name], max(4, min(counts[name], MAX_BLOCK_STEPS)))
            if turn:
                found[name].append(statistics.median(times[1:]))
        order = order[1:] + order[:1]
    return found


def _time_block(runner: DecodeRunner, count: int) -> list[float]:
    runner.rewind()
    times = []
    for _ in range(count):
        started = time.perf_counter()
        runner.step()
        times.append(time.perf_counter() - started)
    return times


def speedup(step_times: Mapping[str, Sequence[float]], slow: str, fast: str) -> float:
    """Return how many times as fast `fast` is: the median over the rounds."""
    return median([one / other for one, other in zip(step_times[slow], step_times[fast], strict=True)])


def fastest(step_times: Mapping[str, Sequence[float]], names: Sequence[str]) -> str:
    """Return the fastest of `names`."""
    return min(names, key=lambda name: median(step_times[name]))


def print_table(step_times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Print the milliseconds of a step by contender, fastest first, and return them."""
    told = {name: 1000 * median(times) for name, times in step_times.items()}
    for name, milliseconds in sorted(told.items(), key=lambda pair: pair[1]):
        spread = np.percentile(np.array(step_times[name]) * 1000, [25, 75])
        print(f"  {name:<28} {milliseconds:9.3f} ms  ({spread[0]:.3f} .. {spread[1]:.3f})")
    return told


# Cases


def measure_narrow(workload: DecodeWorkload, folder: Path, rounds: int, missed: list[str]) -> dict[str, Any]:
    """Measure eviction against what a user would use instead."""
    with ExitStack() as resources:
        bench = DecodeBenchmark(workload, folder, resources)
        names = _open_all(bench)
        steps = {name: resources.enter_context(bench.open_runner(name, 1)) for name in names}
        steps["grows, tracer"] = growing_cache_runner(bench.source, workload, 1)
        steps["grows, dynamo"] = growing_cache_runner(export_decoder(workload, folder / "dynamo.onnx", DYNAMO), workload, 1)
        steps["torch, DynamicCache"] = torch_runner(workload, 1)
        found = run_interleaved(steps, rounds)
    print(f"narrow: {workload}, batch 1")
    told = print_table(found)
    mine = fastest(found, [name for name in found if name.startswith("evict")])
    full = fastest(found, [name for name in found if name.startswith(f"static {workload.context}")])
    against = fastest(found, [full, *(name for name in found if name.startswith(("grows", "torch")))])
    speed = speedup(found, against, mine)
    print(f"  {mine} is {speed:.2f} times as fast as {against}, the best of the others (at least {MIN_SPEEDUP})")
    if speed < MIN_SPEEDUP:
        missed.append(f"narrow: {speed:.2f} times as fast as {against}, not {MIN_SPEEDUP}")
    return {"milliseconds": told, "against": against, "times_as_fast": speed, **_measure_ceiling(workload, found, mine)}


def measure_wide(workload: DecodeWorkload, folder: Path, rounds: int, missed: list[str]) -> dict[str, Any]:
    """Measure eviction against what a smaller cache gains without any."""
    results = {}
    with ExitStack() as opened:
        bench = DecodeBenchmark(workload, folder, opened)
        names = _open_all(bench)
        for batch in BATCH_SIZES:
            with ExitStack() as resources:
                steps = {name: resources.enter_context(bench.open_runner(name, batch)) for name in names}
                found = run_interleaved(steps, rounds)
            print(f"wide: {workload}, batch {batch}")
            told = print_table(found)
            mine = fastest(found, [name for name in found if name.startswith("evict")])
            ceiling = _measure_ceiling(workload, found, mine)
            share = ceiling["share_of_ceiling"]
            print(f"  of that ceiling {mine} reaches {share:.1%} (at least {MIN_CEILING_SHARE:.0%})")
            if share < MIN_CEILING_SHARE:
                missed.append(f"wide, batch {batch}: {share:.1%} of the ceiling, not {MIN_CEILING_SHARE:.0%}")
            results[f"batch {batch}"] = {"milliseconds": told, **ceiling}
    return results


def _open_all(benchmark: DecodeBenchmark) -> list[str]:
    shape = benchmark.workload
    names = [benchmark.open_static(SMALL_CACHE_SLOTS, "grouped")]
    for form in ATTENTION_FORMS:
        names += [benchmark.open_static(shape.context, form), benchmark.open_static(shape.budget, form)]
        names.append(benchmark.open_static(shape.context, form, budget=shape.budget))
    return names


def _measure_ceiling(workload: DecodeWorkload, step_times: Mapping[str, Sequence[float]], candidate: str) -> dict[str, float]:
    """Print and return attention's share of a step, and what a smaller cache alone would gain."""
    full, less = (
        fastest(step_times, [name for name in step_times if name.startswith(f"static {slots},")])
        for slots in (workload.context, workload.budget)
    )
    small = f"static {SMALL_CACHE_SLOTS}, grouped"
    ceiling, gained = speedup(step_times, full, less), speedup(step_times, full, candidate)
    share, left = 1 - 1 / speedup(step_times, full, small), 1 - 1 / speedup(step_times, less, small)
    print(f"  attention is {share:.1%} of a step over {workload.context} tokens, {left:.1%} over {workload.budget}")
    print(f"  {less} is {ceiling:.3f} times as fast as {full}: the ceiling; {candidate} is {gained:.3f} times as fast")
    reached = median(
        [
            (one / two) / (one / three)
            for one, two, three in zip(step_times[full], step_times[candidate], step_times[less], strict=True)
        ]
    )
    return {"attention_share": share, "ceiling": ceiling, "gained": gained, "share_of_ceiling": reached}


def measure_flat(workload: DecodeWorkload, folder: Path, tokens: int, missed: list[str]) -> dict[str, Any]:
    """Generate, and hold the time of a step and the memory at the end to those of the beginning."""
    process = psutil.Process()
    with ExitStack() as resources:
        bench = DecodeBenchmark(workload, folder, resources)
        name = bench.open_static(workload.context, "grouped", budget=workload.budget)
        told = bench.interfaces[name]
        dims = {state.input: told.input(state.input).dims or () for state in told.states}
        steps = bench.sessions[name].bind_states(
            told.states, {one: (1, *(size for size in sizes if isinstance(size, int))) for one, sizes in dims.items()}
        )
        feed = {"input_ids": np.full((1, 1), 5), "attention_mask": np.ones((1, 1), np.int64)}
        times, resident, tenth = np.zeros(tokens), np.zeros(10, np.int64), tokens // 10
        for at in range(tokens):
            started = time.perf_counter()
            logits = steps.run(feed)["logits"]
            times[at] = time.perf_counter() - started
            feed["input_ids"][0, 0] = int(logits[0, 0].argmax())
            if at % tenth == tenth - 1:
                resident[at // tenth] = process.memory_info().rss
        seen = int(steps.read("length")[0])
        steps.close()
    medians = np.median(times[: 10 * tenth].reshape(10, tenth), axis=1) * 1000
    slower, more = float(medians[-1] / medians[1]), int(resident[-1] - resident[1])
    print(f"flat: {seen} tokens at a budget of {workload.budget}")
    print("  ms a step, by tenths: " + " ".join(f"{one:.3f}" for one in medians))
    print("  resident MB, likewise: " + " ".join(f"{one / 2**20:.1f}" for one in resident))
    print(f"  the last tenth takes {slower:.3f} times the second's (at most {MAX_SLOWDOWN}), and {more / 2**20:+.1f} MB")
    if slower > MAX_SLOWDOWN:
        missed.append(f"flat: the last tenth takes {slower:.3f} times the second's")
    if more > MAX_EXTRA_BYTES:
        missed.append(f"flat: {more / 2**20:.1f} MB more than after the second tenth")
    return {"milliseconds": medians.tolist(), "resident_bytes": resident.tolist(), "slower": slower, "more_bytes": more}


if __name__ == "__main__":
    sys.exit(main())
