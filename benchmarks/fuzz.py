"""Fuzzing of the command line with hostile models, packages, data files and arguments.

    python benchmarks/fuzz.py FOLDER [--models N] [--packages N] [--samples N] [--commands N] [--seed S] [--save FILE]

Case I of a class depends on the seed and on I only. Each verdict is appended to FOLDER/verdicts.jsonl; cases with a verdict are
skipped, so the run can be interrupted and resumed. The first case of each cause of failure is kept in FOLDER/failures. At the
end it prints a table and exits with 1 if a command ended with a traceback, an internal error, a signal, another exit code than
0, 1 or 2, or no message; if it exceeded its limits; or if it left files or processes behind.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from fuzzing import models
from fuzzing.runner import FuzzCase, Verdict, become_subreaper, run_case, signature_digest
from process import save

_HEAVY_MODULES = re.compile("torch|tensorrt|nvinfer|kernel|exporter|evaluation|hugging|triton|__main__|worker|child|gguf")
"""Modules that import PyTorch or GPU libraries, or are programs of their own."""
CLASSES = ("models", "packages", "samples", "commands")


class FuzzResult(msgspec.Struct, kw_only=True):
    """The verdict on one case."""

    case_class: str
    seed: int
    index: int
    kind: str
    signature: str
    note: str
    seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name in CLASSES:
        parser.add_argument(f"--{name}", type=int, default=0, metavar="N", help=f"the number of cases of the class {name}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, metavar="I", help="the index of the first case of each class")
    parser.add_argument("--own-specimens", action="store_true", help="do not mutate the models of ONNX's node tests")
    parser.add_argument("--seconds", type=float, default=60, help="the time limit of a case [%(default)s]")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the table and the machine to FILE, as JSON")
    args = parser.parse_args(arguments)
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.own_specimens:
        models.OWN_SHARE = 1.0
    log = args.folder / "verdicts.jsonl"
    results = {(result.case_class, result.seed, result.index): result for result in _read_results(log)}
    wanted = [(name, args.seed, index) for name in CLASSES for index in range(args.start, args.start + getattr(args, name))]
    with open(log, "ab") as file:
        for result in _run([key for key in wanted if key not in results], args.folder, args.seconds):
            results[result.case_class, result.seed, result.index] = result
            file.write(msgspec.json.encode(result) + b"\n")
            file.flush()
    return _report([results[key] for key in wanted], args.save)


def _read_results(log: Path) -> list[FuzzResult]:
    """Return the results in the log, without a last line that was cut off."""
    if not log.exists():
        return []
    lines = log.read_bytes().splitlines(keepends=True)
    return [msgspec.json.decode(line, type=FuzzResult) for line in lines if line.endswith(b"\n")]


def _run(keys: Sequence[tuple[str, int, int]], folder: Path, seconds: float) -> Iterator[FuzzResult]:
    become_subreaper()
    makers: dict[str, Callable[[random.Random], FuzzCase]] = {}
    started = time.monotonic()
    for number, (name, seed, index) in enumerate(keys, start=1):
        if name not in makers:
            makers[name] = importlib.import_module(f"fuzzing.{name}").make_case
            _import_program()
        case = makers[name](random.Random(f"{seed} {name} {index}"))
        with tempfile.TemporaryDirectory(prefix="fuzz-") as case_folder:
            verdict = run_case(case, Path(case_folder), seconds=seconds)
        if verdict.is_failure:
            _keep_failure(folder / "failures", f"{name} {seed} {index}", case, verdict)
            print(f"{name} {index} {verdict.signature} ({verdict.seconds:.1f} s; {case.note})", flush=True)
        if number % 100 == 0:
            print(f"{number}/{len(keys)} after {time.monotonic() - started:.0f} s", flush=True)
        yield FuzzResult(
            case_class=name,
            seed=seed,
            index=index,
            kind=verdict.kind,
            signature=verdict.signature,
            note=case.note,
            seconds=round(verdict.seconds, 3),
        )


def _import_program() -> None:
    """Import the program without its optional heavy libraries, so that forked processes have it."""
    import onnx_ir
    import onnxruntime
    import polygraphy.backend.onnxrt

    assert onnx_ir, onnxruntime
    assert polygraphy.backend.onnxrt
    for package in ("ryzen_compile", "ryzen_passes", "ryzen_plugins"):
        for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            if not _HEAVY_MODULES.search(module.name):
                importlib.import_module(module.name)
    # ONNX Runtime starts one thread when it is imported, which forked processes do not need.
    if len(list(Path("/proc/self/task").iterdir())) > 2:
        raise RuntimeError("this process has threads, so it cannot be forked safely: set OMP_NUM_THREADS=1")


def _keep_failure(failures: Path, label: str, case: FuzzCase, verdict: Verdict) -> None:
    """Write the first case of a cause of failure: its files, its command and its output."""
    folder = failures / f"{verdict.kind}-{signature_digest(verdict.signature)}"
    if folder.exists():
        return
    folder.mkdir(parents=True)
    try:
        case.make_files(folder)
    except OSError:
        shutil.rmtree(folder)
        folder.mkdir()
    command = " ".join(map(repr, case.arguments))
    (folder / "CASE.txt").write_text(
        f"{label}\n{verdict.signature}\nmutations: {case.note}\nryzen-compile {command}\n\n{verdict.detail}", encoding="utf-8"
    )


def _report(results: Sequence[FuzzResult], file: Path | None) -> int:
    counts = {name: Counter(result.kind for result in results if result.case_class == name) for name in CLASSES}
    failures: Counter[str] = Counter()
    for result in results:
        if result.kind not in ("ok", "refused", "usage"):
            failures[f"{result.case_class}: {result.signature}"] += 1
    for name, kinds in counts.items():
        if kinds:
            slowest = max(result.seconds for result in results if result.case_class == name)
            print(f"{name}: {kinds.total()} cases, {dict(kinds.most_common())}, slowest {slowest:.1f} s")
    for cause, count in failures.most_common():
        print(f"{count:6} {cause}")
    document: dict[str, Any] = {
        "seeds": sorted({result.seed for result in results}),
        "cases": {name: dict(kinds) for name, kinds in counts.items() if kinds},
        "failures": dict(failures),
    }
    save(file, document)
    print(json.dumps(document["cases"]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
