"""Build overhead over the raw TensorRT-RTX builder: time and memory of a build, and time of a rebuild from the cache.

    python benchmarks/build_overhead.py [--rounds 5] [--models minilm,vit-b] [--save FILE]

A round runs the raw TensorRT-RTX builder (`raw_build.py`) and `ryzen-compile build --no-compare` with an empty cache, on the
same ONNX file and shapes, for sm86, sm89 and sm120; then it rebuilds from the cache. The models are exported at opset 21,
because the raw builder does not build fp32 Attention nodes.

Bounds: a build takes at most 1.2 s longer than the raw builder plus one hash of the weights and the plan, and at most 1.3 times
its memory (peak of the summed PSS of the process tree). A rebuild takes at most 1 s plus that hash.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from process import CommandRun, argument_parser, measure, median, save

PROGRAM = str(Path(sys.executable).with_name("ryzen-compile"))
RAW_BUILD_SCRIPT = str(Path(__file__).with_name("raw_build.py"))
SHAPES = {
    "minilm": tuple(f"input_ids:{shape},attention_mask:{shape}" for shape in ("1x1", "8x64", "32x256")),
    "vit-b": tuple(f"pixel_values:{batch}x3x224x224" for batch in (1, 8, 32)),
}
MAX_EXTRA_SECONDS, MAX_MEMORY_RATIO, MAX_REBUILD_SECONDS = 1.2, 1.3, 1.0


@dataclass(frozen=True)
class BuildRound:
    """The measurements of one round."""

    raw: CommandRun
    ours: CommandRun
    rebuild_seconds: float
    hash_seconds: float
    """The time of one SHA-256 of the weights and the plan, in memory, on one thread."""


def main() -> int:
    parser = argument_parser(__doc__, rounds=5)
    parser.add_argument("--models", default="minilm,vit-b")
    args = parser.parse_args()
    met, results = True, {}
    for name in args.models.split(","):
        with tempfile.TemporaryDirectory(prefix="build-overhead-") as folder:
            rounds = list(_run_rounds(name, Path(folder), args.rounds))
        verdict = _verdict(rounds)
        met = met and bool(verdict["met"])
        results[name] = {"rounds": [_record(measured) for measured in rounds], **verdict}
        _print(name, verdict)
    save(args.save, results)
    return 0 if met else 1


def _run_rounds(name: str, folder: Path, count: int) -> Iterator[BuildRound]:
    model, plan, package, cache = (folder / file for file in ("model.onnx", "raw.plan", "model.ryzen", "cache"))
    measure([PROGRAM, "export", name, str(model), "--opset", "21", "-q"])
    low, opt, high = SHAPES[name]
    raw = [sys.executable, RAW_BUILD_SCRIPT, str(model), str(plan), "SM86,SM89,SM120", low, opt, high]
    ours = [PROGRAM, "build", str(model), "-o", str(package), "--gpu", "sm86,sm89,sm120", "--no-compare", "-q"]
    ours += ["--min-shapes", low, "--opt-shapes", opt, "--max-shapes", high, "--cache", str(cache)]
    for round_index in range(count + 1):
        shutil.rmtree(cache, ignore_errors=True)
        raw_run = measure(raw, memory=True)
        build_run = measure(ours, memory=True)
        shutil.rmtree(package)
        rebuild_run = measure(ours)
        weights, plans = model.parent.glob("model.onnx*"), (package / "engines").iterdir()
        if round_index:  # round 0 warms the disk cache
            hash_seconds = sum(_hash_seconds(file) for file in (*weights, *plans))
            yield BuildRound(
                raw=raw_run,
                ours=build_run,
                rebuild_seconds=rebuild_run.seconds,
                hash_seconds=hash_seconds,
            )
        shutil.rmtree(package)


def _record(measured: BuildRound) -> dict[str, float]:
    return {
        "hash_seconds": measured.hash_seconds,
        "rebuild_seconds": measured.rebuild_seconds,
        **{f"raw_{name}": value for name, value in _usage(measured.raw).items()},
        **{f"ours_{name}": value for name, value in _usage(measured.ours).items()},
    }


def _usage(run: CommandRun) -> dict[str, float]:
    return {"seconds": run.seconds, "bytes": run.peak_bytes}


def _hash_seconds(path: Path) -> float:
    """Return the time of the second of two SHA-256 runs over a file; the first may read it from disk."""
    for _ in range(2):
        started = time.perf_counter()
        with open(path, "rb") as file:
            hashlib.file_digest(file, "sha256")
        seconds = time.perf_counter() - started
    return seconds


def _verdict(rounds: list[BuildRound]) -> dict[str, float | bool]:
    extra = median([run.ours.seconds - run.raw.seconds - run.hash_seconds for run in rounds])
    memory = median([run.ours.peak_bytes / run.raw.peak_bytes for run in rounds])
    rebuild = median([run.rebuild_seconds - run.hash_seconds for run in rounds])
    return {
        "raw_seconds": median([run.raw.seconds for run in rounds]),
        "ours_seconds": median([run.ours.seconds for run in rounds]),
        "hash_seconds": median([run.hash_seconds for run in rounds]),
        "extra_seconds": extra,
        "raw_mb": median([run.raw.peak_bytes for run in rounds]) / 1e6,
        "ours_mb": median([run.ours.peak_bytes for run in rounds]) / 1e6,
        "memory_ratio": memory,
        "rebuild_seconds": rebuild,
        "met": extra <= MAX_EXTRA_SECONDS and memory <= MAX_MEMORY_RATIO and rebuild <= MAX_REBUILD_SECONDS,
    }


def _print(name: str, verdict: dict[str, float | bool]) -> None:
    print(
        f"{name}: raw {verdict['raw_seconds']:.2f} s, ours {verdict['ours_seconds']:.2f} s, "
        f"hash {verdict['hash_seconds']:.2f} s"
    )
    print(f"    extra time over raw plus hash: {verdict['extra_seconds']:.2f} s (at most {MAX_EXTRA_SECONDS:g})")
    print(
        f"    memory {verdict['ours_mb']:.0f} / {verdict['raw_mb']:.0f} MB = {verdict['memory_ratio']:.2f} "
        f"(at most {MAX_MEMORY_RATIO:g})"
    )
    print(f"    rebuild from the cache, minus the hash: {verdict['rebuild_seconds']:.2f} s (at most {MAX_REBUILD_SECONDS:g})")


if __name__ == "__main__":
    sys.exit(main())
