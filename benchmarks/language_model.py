"""Tokens per second of a real language model at a context, against what a user would run instead.

    python benchmarks/language_model.py FOLDER [--genai FOLDER] [--context 2000] [--rounds 9] [--steps 8] [--share-weights]
        [--save FILE]

FOLDER is a Hugging Face folder, which is exported here: to one graph with growing caches, and to the step graphs of a package.
All systems run in one process on the CPU in fp32. Each continues the same `--context` tokens, and in each round every system
generates `--steps` tokens greedily, one after the other; a result is the median over the rounds of a ratio within a round.

* package: `export hf:FOLDER dec/`, `build dec/`, and a session.
* onnxruntime: the exported graph with growing caches, whose outputs are bound as the next inputs without a copy.
* transformers: the module with its default cache.
* genai: ONNX Runtime GenAI on the folder that its builder wrote, `python -m onnxruntime_genai.models.builder -m FOLDER -o GENAI
  -p fp32 -e cpu`, if `--genai` names it and the package onnxruntime-genai is installed.

The systems must generate the same tokens; a difference is printed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from process import argument_parser, median, save

import ryzen_compile as rc
from ryzen_compile.text.sample_texts import TEXTS

Array = np.ndarray[Any, Any]
NextToken = Callable[[int], int]
"""Feed one token and return the most likely next one."""

CHUNK = 128
"""The tokens of a prompt that are fed at once."""


def main() -> int:
    parser = argument_parser(__doc__, rounds=9)
    parser.add_argument("folder")
    parser.add_argument("--genai", help="the folder that the builder of ONNX Runtime GenAI wrote")
    parser.add_argument("--context", type=int, default=2000)
    parser.add_argument("--capacity", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--share-weights", action="store_true", help="let the step graphs of the package share their weights")
    parser.add_argument("--work", help="a folder to keep the exports in, which are used if they exist [a temporary one]")
    args = parser.parse_args()
    with ExitStack() as resources:
        work = Path(args.work or resources.enter_context(tempfile.TemporaryDirectory(prefix="language-model-")))
        model, package = export(args.folder, work, args.capacity)
        engine = resources.enter_context(rc.load(package, share_weights=args.share_weights))
        ids = np.resize(engine.tokenizer.encode(" ".join(TEXTS)), args.context)
        systems: dict[str, tuple[NextToken, int]] = {
            "package": open_package(engine, ids),
            "onnxruntime": open_onnxruntime(model, ids),
            "transformers": open_transformers(args.folder, ids),
        }
        if args.genai:
            systems["genai"] = open_genai(args.genai, ids, args.context + args.steps * (args.rounds + 2))
        seconds, tokens = run_rounds(systems, rounds=args.rounds, steps=args.steps)
    results: dict[str, Any] = {"context": args.context, "capacity": args.capacity, "steps": args.steps}
    results["share_weights"] = args.share_weights
    for name, times in seconds.items():
        rate = args.steps / median(times)
        ratios = [other / own for other, own in zip(times, seconds["package"], strict=True)]
        results[name] = {"tokens_per_second": rate, "package_is_faster_by": median(ratios), "worst": min(ratios)}
        print(f"{name:14}{rate:8.2f} tokens/s; the package is {median(ratios):.2f} times as fast ({min(ratios):.2f} at worst)")
        if tokens[name] != tokens["package"]:
            print(f"{name} generates other tokens than the package")
    save(args.save, results)
    return 0


def export(folder: str, work: Path, capacity: int) -> tuple[Path, Path]:
    """Return the paths of the exported graph and of the package, which are created unless they exist in `work`."""
    model, steps, package = work / "model.onnx", work / "dec", work / "dec.ryzen"
    if not model.exists():
        rc.export(f"hf:{folder}", model)
    if not package.exists():
        rc.rewrite_steps(model, steps, passes=f"kv-static{{capacity={capacity}}}", steps="1,any")
        rc.build(steps, package, gpu="cpu", compare=False)
    return model, package


def open_package(engine: rc.Engine, ids: Array) -> tuple[NextToken, int]:
    """Feed `ids` to a session; return its step function and the next token."""
    session = engine.session(1)
    for start in range(0, len(ids), CHUNK):
        logits = session.step(ids[None, start : start + CHUNK])
    return lambda token: int(session.step([[token]])[0, -1].argmax()), int(logits[0, -1].argmax())


def open_onnxruntime(model: Path, ids: Array) -> tuple[NextToken, int]:
    """Feed `ids` to a graph with growing caches; return its step function and the next token."""
    import onnxruntime as ort

    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    caches = {
        item.name: ort.OrtValue.ortvalue_from_numpy(np.zeros((1, item.shape[1], 0, item.shape[3]), np.float32))
        for item in session.get_inputs()
        if item.name.startswith("past")
    }
    names = [item.name for item in session.get_outputs()]

    def feed(tokens: Array) -> int:
        past = next(iter(caches.values())).shape()[2]
        binding = session.io_binding()
        binding.bind_cpu_input("input_ids", tokens[None])
        binding.bind_cpu_input("attention_mask", np.ones((1, past + len(tokens)), np.int64))
        binding.bind_cpu_input("position_ids", past + np.arange(len(tokens))[None])
        for name, value in caches.items():
            binding.bind_ortvalue_input(name, value)
        for name in names:
            binding.bind_output(name)
        session.run_with_iobinding(binding)
        logits, *updated = binding.get_outputs()
        caches.update(zip(caches, updated, strict=True))
        return int(logits.numpy()[0, -1].argmax())

    for start in range(0, len(ids), CHUNK):
        token = feed(ids[start : start + CHUNK])
    return lambda token: feed(np.array([token], np.int64)), token


def open_transformers(folder: str, ids: Array) -> tuple[NextToken, int]:
    """Feed `ids` to the module of Transformers with its default cache; return its step function and the next token."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    cache: Any = None

    def feed(tokens: Array) -> int:
        nonlocal cache
        with torch.inference_mode():
            output = model(input_ids=torch.from_numpy(tokens)[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        return int(output.logits[0, -1].argmax())

    for start in range(0, len(ids), CHUNK):
        token = feed(ids[start : start + CHUNK])
    return lambda token: feed(np.array([token], np.int64)), token


def open_genai(folder: str, ids: Array, max_length: int) -> tuple[NextToken, int]:
    """Feed `ids` to ONNX Runtime GenAI; its step function generates the next token itself and ignores its argument."""
    import onnxruntime_genai

    model = onnxruntime_genai.Model(folder)
    params = onnxruntime_genai.GeneratorParams(model)
    params.set_search_options(max_length=max_length, do_sample=False)
    generator = onnxruntime_genai.Generator(model, params)
    generator.append_tokens(ids.astype(np.int32))

    def generate(token: int) -> int:
        generator.generate_next_token()
        return int(generator.get_next_tokens()[0])

    return generate, generate(0)


def run_rounds(
    systems: Mapping[str, tuple[NextToken, int]], *, rounds: int, steps: int
) -> tuple[dict[str, list[float]], dict[str, list[int]]]:
    """Run `rounds` rounds after one of warm-up; return the seconds of each round and the tokens of each system."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    tokens = {name: [token] for name, (_, token) in systems.items()}
    for number in range(rounds + 1):
        for name, (step, _) in systems.items():
            started = time.perf_counter()
            for _ in range(steps):
                tokens[name].append(step(tokens[name][-1]))
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds, tokens


if __name__ == "__main__":
    raise SystemExit(main())
