"""Memory and time of every step from a Hugging Face folder of 1B parameters to generated text.

    python benchmarks/large_decoder.py [--dtype float16] [--layers 16] [--vocabulary 128256] [--work FOLDER] [--save FILE]

Makes a folder with the shape of Llama 3.2 1B, random weights of each type in `--dtype` and a tokenizer of bytes, and runs each
step as a process of its own: `export`, `rewrite --steps 1,any`, `build --gpu cpu,sm89 --fp16`, loading with a session that runs
one step on each graph, and `generate`. The exported graph is float32 for every type, so that only the first type goes beyond
the export. It takes about five times the size of the float32 weights on the disk of `--work`, and removes what it wrote.

The memory of a step is the peak of the summed PSS of its process tree. It includes the pages of mapped files, so that mapped
weights count as soon as they are read; the peak without them, which the system cannot take back, is reported too, as
`anonymous`. The weights' bytes are those of the exported graph.

Bounds: export, rewrite, loading and generating take at most 1.3 times the weights' bytes, the build 2.5 times.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from process import CommandRun, argument_parser, measure, save

PROGRAM = str(Path(sys.executable).with_name("ryzen-compile"))
MAX_RATIOS = {"export": 1.3, "rewrite": 1.3, "build": 2.5, "load": 1.3, "generate": 1.3}
PROMPT = "The capital of France is"

LOAD_SCRIPT = """
import sys
import time
import numpy as np
import ryzen_compile as rc

with rc.load(sys.argv[1], share_weights=True) as engine:
    session = engine.session(1)
    session.step(np.arange(8)[None])
    session.step([[1]])
    time.sleep(1)  # so that a sample of the memory is taken
    print(engine.load_seconds)
"""


def main() -> int:
    parser = argument_parser(__doc__, rounds=1)
    parser.add_argument("--dtype", default="float16,float32", help="the types of the weights in the folder [%(default)s]")
    parser.add_argument("--layers", type=int, default=16, help="[%(default)s]")
    parser.add_argument("--vocabulary", type=int, default=128256, help="[%(default)s]")
    parser.add_argument("--capacity", type=int, default=4096, help="the tokens of a cache [%(default)s]")
    parser.add_argument("--work", type=Path, help="the folder for the temporary files [the system's]")
    args = parser.parse_args()
    met = True
    results: dict[str, Any] = {}
    for dtype in args.dtype.split(","):
        with tempfile.TemporaryDirectory(prefix="large-decoder-", dir=args.work) as folder:
            steps: dict[str, Any] = {}
            model = Path(folder, "hf")
            make_folder(model, dtype, args.layers, args.vocabulary)
            for name, run, weights in run_steps(model, args.capacity, only_export=bool(results)):
                ratio = run.peak_bytes / weights
                steps[name] = {
                    "seconds": run.seconds,
                    "peak_mb": run.peak_bytes / 1e6,
                    "anonymous_mb": run.peak_anonymous_bytes / 1e6,
                    "weights_mb": weights / 1e6,
                    "ratio": ratio,
                    "anonymous_ratio": run.peak_anonymous_bytes / weights,
                    "met": ratio <= MAX_RATIOS[name],
                }
                if name == "load":
                    steps[name]["load_seconds"] = float(run.output)
                met = met and ratio <= MAX_RATIOS[name]
                print(
                    f"{dtype} {name}: {run.seconds:.1f} s, {run.peak_bytes / 1e6:,.0f} MB = {ratio:.2f} of the weights' "
                    f"{weights / 1e6:,.0f} MB (at most {MAX_RATIOS[name]:g}); "
                    f"{run.peak_anonymous_bytes / 1e6:,.0f} MB anonymous",
                    flush=True,
                )
            results[dtype] = steps
    save(args.save, {"layers": args.layers, "vocabulary": args.vocabulary, "capacity": args.capacity, "folders": results})
    return 0 if met else 1


def run_steps(folder: Path, capacity: int, *, only_export: bool) -> Iterator[tuple[str, CommandRun, int]]:
    """Yield the name of each step, its measurements, and the weights' bytes; files that no later step needs are removed."""
    work = folder.parent
    model, decoder, package = work / "model.onnx", work / "decoder", work / "decoder.ryzen"
    data = model.with_name("model.onnx.data")

    def run(*arguments: str | Path) -> CommandRun:
        return measure([PROGRAM, *map(str, arguments), "-q"], memory=True)

    measured = run("export", f"hf:{folder}", model)
    weights = (data if data.exists() else model).stat().st_size
    yield "export", measured, weights
    if only_export:
        return
    shutil.rmtree(folder)
    passes = f"kv-static{{capacity={capacity}}}"
    yield "rewrite", run("rewrite", model, decoder, "--passes", passes, "--steps", "1,any"), weights
    for file in work.glob("model.onnx*"):
        file.unlink()
    yield "build", run("build", decoder, "-o", package, "--gpu", "cpu,sm89", "--fp16", "--no-cache"), weights
    shutil.rmtree(decoder)
    yield "load", measure([sys.executable, "-c", LOAD_SCRIPT, str(package)], memory=True), weights
    yield "generate", run("generate", package, PROMPT, "-n", "8"), weights


def make_folder(folder: Path, dtype: str, layers: int, vocabulary: int) -> None:
    """Write a Hugging Face folder with the shape of Llama 3.2 1B and random weights, in a process of its own."""
    folder.mkdir()
    measure([sys.executable, __file__, "--make", str(folder), dtype, str(layers), str(vocabulary)])


def write_folder(folder: Path, dtype: str, layers: int, vocabulary: int) -> None:
    import torch
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(["<bos>", "<eos>", *alphabet])}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<bos>", "eos_token": "<eos>"}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:
        write_folder(Path(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:]))
    else:
        sys.exit(main())
