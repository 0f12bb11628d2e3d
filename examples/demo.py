"""End-to-end demo: export MiniLM, build it for CPU and GPUs, compare accuracy, load the package and embed sentences.

    python examples/demo.py [FOLDER]

All files are written to FOLDER (default: out). Without a GPU, the GPU engines are built and the portable variant is run.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ryzen_compile as rc
from ryzen_models.minilm import embed, tokenize

EXECUTABLE = str(Path(sys.executable).with_name("ryzen-compile"))
SHAPES = [
    argument
    for option, shape in (("--min-shapes", "1x1"), ("--opt-shapes", "4x32"), ("--max-shapes", "8x128"))
    for argument in (option, f"input_ids:{shape},attention_mask:{shape}")
]
PAIRS = (
    ("A man is playing a guitar on the stage.", "Someone performs music in front of people."),
    ("A man is playing a guitar on the stage.", "The central bank raised interest rates again."),
)


def main() -> None:
    """Run the demo; if a step fails, exit with its exit code."""
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
            inputs = tokenize(pair)
            first, second = embed(engine(inputs), inputs["attention_mask"])
            print(f"  cosine {first @ second:.3f}: {' | '.join(pair)}")


def run_command(*arguments: str) -> None:
    """Print a `ryzen-compile` command line and run it; exit with its exit code if it fails."""
    print(f"\n$ ryzen-compile {' '.join(arguments)}", flush=True)
    exit_code = subprocess.run([EXECUTABLE, *arguments], check=False).returncode
    if exit_code:
        sys.exit(exit_code)


if __name__ == "__main__":
    main()
