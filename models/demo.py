"""The main job on a real model: export MiniLM, build it for CPU and GPUs, compare, load, embed two sentences.

    python models/demo.py [FOLDER]

Everything is written to FOLDER (default: out). Without a GPU the engines are built and the portable graph runs.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ryzen_compile as rc
from ryzen_models.minilm import embed, tokenize

EXECUTABLE = str(Path(sys.executable).with_name("ryzen-compile"))
SHAPES = [
    word
    for option, shape in (("--min-shapes", "1x1"), ("--opt-shapes", "4x32"), ("--max-shapes", "8x128"))
    for word in (option, f"input_ids:{shape},attention_mask:{shape}")
]
PAIRS = (
    ("A man is playing a guitar on the stage.", "Someone performs music in front of people."),
    ("A man is playing a guitar on the stage.", "The central bank raised interest rates again."),
)


def main() -> None:
    """Run the demonstration; a step that fails ends it with its exit code."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "out")
    folder.mkdir(parents=True, exist_ok=True)
    model, package = folder / "minilm.onnx", folder / "minilm.ryzen"
    run_command("export", "minilm", str(model))
    run_command(
        "build", str(model), "-o", str(package), "--gpu", "cpu,sm86,sm89,sm120", "--fp16", "--data", "recipe:minilm", *SHAPES
    )
    run_command("compare", str(package), "--baseline", "recipe:minilm")
    with rc.load(package) as engine:
        print(f"\n$ python: rc.load({str(package)!r})\n{engine.choice.summary}; loaded in {engine.load_seconds:.2f} s")
        for pair in PAIRS:
            feed = tokenize(pair)
            first, second = embed(engine(feed), feed["attention_mask"])
            print(f"  cosine {first @ second:.3f}: {' | '.join(pair)}")


def run_command(*arguments: str) -> None:
    """Run one command of the program, showing it as one would type it."""
    print(f"\n$ ryzen-compile {' '.join(arguments)}", flush=True)
    code = subprocess.run([EXECUTABLE, *arguments], check=False).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
