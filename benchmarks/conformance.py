"""ONNX's own node tests through the whole tool: build for cpu and sm89, load, run, compare with the expected outputs.

    python benchmarks/conformance.py FOLDER [--only SUBSTRING] [--every N] [--report] [--save FILE]

Each of the tests of `onnx.backend.test` is built as `ryzen-compile build --gpu cpu,sm89 --allow-partial --no-compare` does it,
then run from the package; for the two columns that it is held against, plain ONNX Runtime and the raw TensorRT-RTX builder do
the same with the model as it came. One line of JSON a test goes to FOLDER/outcomes.jsonl; tests that have one are not done
again, so the run can be stopped at any time. The end prints a table, and exits with 1 where a bound is not met:

* no test ends in anything but an outcome: no crash, no hang, no traceback, nothing left behind;
* every test that plain ONNX Runtime passes passes through the package, within the test's own tolerance;
* at least as many engines as the raw builder makes; every refusal has a reason that names an op or a tensor.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from onnx.backend.test.loader import load_model_tests
from process import save

import ryzen_compile as rc
from ryzen_compile.backends.process.worker import Worker, start_worker

TIMEOUT_SECONDS = 120.0


class ConformanceResult(msgspec.Struct, kw_only=True):
    """What became of one test."""

    name: str
    plain: str
    """Plain ONNX Runtime: `pass`, or why not."""
    raw: str
    """The raw TensorRT-RTX builder: `built`, or why not."""
    cpu: str
    """The package on the CPU: `pass`, `refused: ...`, `differs: ...` or `broken: ...`."""
    sm89: str
    """The package's engine: `built`, `refused: ...` or `broken: ...`."""
    leftover_files: list[str]
    """Files left beside the package."""
    seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="only tests whose names hold this")
    parser.add_argument("--every", type=int, default=1, help="only every Nth test")
    parser.add_argument("--report", action="store_true", help="only print the table of what was done")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the table and the machine to FILE, as JSON")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    log = args.folder / "outcomes.jsonl"
    done = {one.name: one for one in _read_results(log)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tests compute infinities on purpose
        cases = load_model_tests(kind="node")
    tests = [case for case in cases if args.only in case.name][:: args.every]
    if not args.report:
        with open(log, "ab") as file, start_worker("tensorrt-rtx") as raw:
            for at, case in enumerate(tests):
                if case.name in done:
                    continue
                done[case.name] = outcome = run_case(case, raw)
                file.write(msgspec.json.encode(outcome) + b"\n")
                file.flush()
                print(f"{at + 1}/{len(tests)} {case.name}: cpu {outcome.cpu[:60]}, sm89 {outcome.sm89[:60]}", flush=True)
    return _report([done[case.name] for case in tests if case.name in done], args.save)


def run_case(case: Any, worker: Worker) -> ConformanceResult:
    """Put one test of `onnx.backend.test` through plain ONNX Runtime, the raw builder `raw` and the whole tool."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="conformance-") as text:
        folder = Path(text)
        model = folder / "model.onnx"
        model.write_bytes(case.model.SerializeToString())
        plain = _run_onnxruntime(model, case)
        raw_says = _build_raw(model, folder, worker)
        cpu, sm89 = _run_package(model, case, folder / "out")
        left = sorted(path.name for path in (folder / "out").glob("*") if path.name != "model.ryzen")
    seconds = round(time.perf_counter() - started, 3)
    return ConformanceResult(
        name=case.name, plain=plain, raw=raw_says, cpu=cpu, sm89=sm89, leftover_files=left, seconds=seconds
    )


def _run_onnxruntime(model: Path, case: Any) -> str:
    import onnxruntime

    try:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_outputs()]
        inputs = [value.name for value in session.get_inputs()]
        for given, wanted in _data_sets(case):
            got = session.run(names, dict(zip(inputs, given, strict=False)))
            if (why := _describe_difference(got, wanted, case)) is not None:
                return f"differs: {why}"
    except Exception as error:  # noqa: BLE001  whatever it says is the outcome
        return f"refused: {type(error).__name__}"
    return "pass"


def _build_raw(model: Path, folder: Path, worker: Worker) -> str:
    from ryzen_compile.backends.api import BuildRequest
    from ryzen_compile.ir.interface_metadata import interface_of
    from ryzen_compile.ir.load import load
    from ryzen_compile.spec.profile import derive_profile
    from ryzen_compile.spec.target import parse_target

    try:
        profiles = (derive_profile(interface_of(load(model))),)
    except rc.RyzenError:
        profiles = ()
    request = BuildRequest(
        onnx_path=str(model),
        output=str(folder / "raw.plan"),
        targets=(parse_target("sm89"),),
        profiles=profiles,
        seconds=TIMEOUT_SECONDS,
    )
    try:
        worker.build(request)
    except rc.RyzenError as error:
        return f"refused: {error.message}"
    return "built"


def _run_package(model: Path, case: Any, folder: Path) -> tuple[str, str]:
    from ryzen_compile.builder.config import ResourceLimits

    folder.mkdir()
    try:
        package = rc.build(
            model,
            folder / "model.ryzen",
            gpu="cpu,sm89",
            compare=False,
            allow_partial=True,
            cache=False,
            limits=ResourceLimits(seconds=TIMEOUT_SECONDS),
        )
    except rc.RyzenError as error:
        return f"refused: {error.message}", f"refused: {error.message}"
    except Exception:  # noqa: BLE001  a traceback is what this looks for
        return "broken: " + traceback.format_exc(limit=-3), "broken"
    refused = {str(one.target): one.reason for one in package.manifest.refused_targets}
    sm89 = f"refused: {refused['sm89']}" if "sm89" in refused else "built" if package.manifest.engines else "broken: no engine"
    if "cpu" in refused:
        return f"refused: {refused['cpu']}", sm89
    try:
        with rc.load(package.path) as engine:
            for given, wanted in _data_sets(case):
                feed = dict(zip((spec.name for spec in engine.interface.inputs), given, strict=False))
                got = engine.run(feed)
                if (
                    why := _describe_difference([got[spec.name] for spec in engine.interface.outputs], wanted, case)
                ) is not None:
                    return f"differs: {why}", sm89
    except rc.RyzenError as error:
        return f"refused: {error.message}", sm89
    except Exception:  # noqa: BLE001  a traceback is what this looks for
        return "broken: " + traceback.format_exc(limit=-3), sm89
    return "pass", sm89


def _data_sets(case: Any) -> Iterator[tuple[list[Any], list[Any]]]:
    """Yield the inputs and the expected outputs of each data set, in order."""
    for given, wanted in case.data_sets:
        yield [_to_numpy(one) for one in given], [_to_numpy(one) for one in wanted]


def _to_numpy(value: Any) -> Any:
    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value)
    if isinstance(value, list):
        return [_to_numpy(one) for one in value]
    return np.asarray(value) if isinstance(value, np.generic) else value


def _describe_difference(actual: Sequence[Any], expected: Sequence[Any], case: Any) -> str | None:
    """Return how the outputs differ beyond the test's own tolerance, or None."""
    if len(actual) != len(expected):
        return f"{len(actual)} outputs, expected {len(expected)}"
    for at, (one, other) in enumerate(zip(actual, expected, strict=True)):
        if isinstance(other, list):
            if (why := _describe_difference(one, other, case)) is not None:
                return f"output {at}: {why}"
            continue
        if other is None or one is None:
            if one is not other:
                return f"output {at} is {one}, expected {other}"
            continue
        if tuple(one.shape) != tuple(other.shape):
            return f"output {at} has shape {one.shape}, expected {other.shape}"
        if one.dtype != other.dtype and not (one.dtype.kind in "OUS" and other.dtype.kind in "OUS"):
            return f"output {at} is {one.dtype}, expected {other.dtype}"
        if other.dtype.kind in "OUSb":
            same = bool((one == other).all())
        else:
            wide = np.complex128 if other.dtype.kind == "c" else np.float64
            same = np.allclose(one.astype(wide), other.astype(wide), rtol=case.rtol, atol=case.atol, equal_nan=True)
        if not same:
            return f"output {at} differs"
    return None


def _read_results(log: Path) -> Iterator[ConformanceResult]:
    if log.exists():
        for line in log.read_bytes().splitlines():
            try:
                yield msgspec.json.decode(line, type=ConformanceResult)
            except msgspec.DecodeError:
                continue  # cut off when the run was stopped


def missed_bounds(results: Sequence[ConformanceResult]) -> dict[str, list[str]]:
    """Return what misses a bound: for each bound that is missed, the tests and what they say."""
    found = {
        "passed by plain ONNX Runtime, lost through the package": [
            f"{one.name}: {one.cpu}" for one in results if one.plain == "pass" and one.cpu != "pass"
        ],
        "broken": [f"{one.name}: {one.cpu} {one.sm89}" for one in results if "broken" in (one.cpu[:6], one.sm89[:6])],
        "left something behind": [f"{one.name}: {', '.join(one.leftover_files)}" for one in results if one.leftover_files],
        "refused without a reason": [one.name for one in results if {"refused", "refused: "} & {one.cpu, one.sm89}],
    }
    raw, ours = (sum(getattr(one, column) == "built" for one in results) for column in ("raw", "sm89"))
    if ours < raw:
        found["fewer engines than the raw builder makes"] = [
            f"{one.name}: {one.sm89}" for one in results if one.raw == "built" and one.sm89 != "built"
        ]
    return {bound: tests for bound, tests in found.items() if tests}


def _failures_by_reason(results: Sequence[ConformanceResult], column: str) -> dict[str, list[str]]:
    """Return the tests that did not end well in `column` by what it says, the names of nodes and files left out."""
    found: dict[str, list[str]] = {}
    for one in results:
        says = getattr(one, column)
        if says not in ("pass", "built"):
            short = re.sub(r"(node|file|model) `[^`]*`|`[^`]*\.onnx`", r"\1 ...", says).splitlines()[0][:140]
            found.setdefault(short, []).append(one.name.removeprefix("test_"))
    return dict(sorted(found.items(), key=lambda reason: -len(reason[1])))


def _report(results: Sequence[ConformanceResult], save_to: Path | None) -> int:
    """Print how many tests ended how, and what misses a bound; return the exit code."""
    print(f"\n{len(results)} tests, {sum(one.seconds for one in results):.0f} s")
    counts = {
        column: dict(Counter(getattr(one, column).partition(":")[0] for one in results).most_common())
        for column in ("plain", "raw", "cpu", "sm89")
    }
    for column, by_kind in counts.items():
        print(f"  {column:6} " + ", ".join(f"{kind} {count}" for kind, count in by_kind.items()))
    reasons = {column: _failures_by_reason(results, column) for column in ("sm89", "cpu")}
    for column, by_reason in reasons.items():
        print(f"\nwhat did not end well on {column}:")
        for says, names in list(by_reason.items())[:25]:
            print(f"  {len(names):4} {says}")
    missed = missed_bounds(results)
    for bound, tests in missed.items():
        print(f"\nMISSED, {len(tests)} {bound}:")
        print("\n".join(f"  {test[:300]}" for test in tests[:40]))
    print("" if missed else "\nall bounds kept")
    save(save_to, {"tests": len(results), "counts": counts, **reasons, "misses": missed})
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
