"""ONNX node tests through the whole tool: build for cpu and sm89, load, run, compare with the expected outputs.

    python benchmarks/conformance.py FOLDER [--only SUBSTRING] [--every N] [--report] [--save FILE]

Each test of `onnx.backend.test` is built like `ryzen-compile build --gpu cpu,sm89 --allow-partial --no-compare` and run from
the package. For reference, plain ONNX Runtime and the raw TensorRT-RTX builder process the original model. Each result is
appended to FOLDER/outcomes.jsonl as one line of JSON; tests with a result are skipped, so the run can be interrupted and
resumed. At the end it prints a table and exits with 1 if a bound is not met:

* every test ends with a result: no crash, no hang, no traceback, no files left behind;
* every test that passes in plain ONNX Runtime passes through the package, within the test's own tolerance;
* there are at least as many engines as from the raw builder, and every refusal has a reason that names an op or a tensor.
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
from ryzen_compile.backends.process.in_process import InProcessWorker
from ryzen_compile.backends.process.worker import Worker, start_worker

TIMEOUT_SECONDS = 120.0


class ConformanceResult(msgspec.Struct, kw_only=True):
    """The result of one test."""

    name: str
    plain: str
    """Plain ONNX Runtime: `pass`, `refused: ...` or `differs: ...`."""
    raw: str
    """The raw TensorRT-RTX builder: `built` or `refused: ...`."""
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
    parser.add_argument("--only", default="", help="only tests whose names contain SUBSTRING", metavar="SUBSTRING")
    parser.add_argument("--every", type=int, default=1, help="only every Nth test")
    parser.add_argument("--report", action="store_true", help="only print the table of existing results")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the table and the machine to FILE, as JSON")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    log = args.folder / "outcomes.jsonl"
    results = {result.name: result for result in _read_results(log)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some tests compute infinities intentionally
        cases = load_model_tests(kind="node")
    tests = [case for case in cases if args.only in case.name][:: args.every]
    if not args.report:
        with open(log, "ab") as file, start_worker("tensorrt-rtx") as worker:
            for number, case in enumerate(tests, start=1):
                if case.name in results:
                    continue
                results[case.name] = result = run_case(case, worker)
                file.write(msgspec.json.encode(result) + b"\n")
                file.flush()
                print(f"{number}/{len(tests)} {case.name}: cpu {result.cpu[:60]}, sm89 {result.sm89[:60]}", flush=True)
    return _report([results[case.name] for case in tests if case.name in results], args.save)


def run_case(case: Any, worker: Worker | InProcessWorker) -> ConformanceResult:
    """Run one test of `onnx.backend.test` with plain ONNX Runtime, the raw builder in `worker` and the whole tool."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="conformance-") as name:
        folder = Path(name)
        model = folder / "model.onnx"
        model.write_bytes(case.model.SerializeToString())
        plain = _run_onnxruntime(model, case)
        raw = _build_raw(model, folder, worker)
        cpu, sm89 = _run_package(model, case, folder / "out")
        leftover_files = sorted(path.name for path in (folder / "out").glob("*") if path.name != "model.ryzen")
    seconds = round(time.perf_counter() - started, 3)
    return ConformanceResult(
        name=case.name, plain=plain, raw=raw, cpu=cpu, sm89=sm89, leftover_files=leftover_files, seconds=seconds
    )


def _run_onnxruntime(model: Path, case: Any) -> str:
    import onnxruntime

    try:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_outputs()]
        inputs = [value.name for value in session.get_inputs()]
        for arrays, expected in _data_sets(case):
            outputs = session.run(names, dict(zip(inputs, arrays, strict=False)))
            if (difference := _describe_difference(outputs, expected, case)) is not None:
                return f"differs: {difference}"
    except Exception as error:  # noqa: BLE001  every exception is a result
        return f"refused: {type(error).__name__}"
    return "pass"


def _build_raw(model: Path, folder: Path, worker: Worker | InProcessWorker) -> str:
    from ryzen_compile.backends.api import BuildRequest
    from ryzen_compile.ir.interface_metadata import interface_of
    from ryzen_compile.ir.load import load
    from ryzen_compile.spec.profile import Profile, derive_profile
    from ryzen_compile.spec.target import parse_target

    try:
        profiles: tuple[Profile, ...] = (derive_profile(interface_of(load(model))),)
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
    folder.mkdir()
    try:
        package = rc.build(
            model,
            folder / "model.ryzen",
            gpu="cpu,sm89",
            compare=False,
            allow_partial=True,
            cache=False,
            time_limit_seconds=TIMEOUT_SECONDS,
        )
    except rc.RyzenError as error:
        return f"refused: {error.message}", f"refused: {error.message}"
    except Exception:  # noqa: BLE001  unexpected exceptions are reported
        return "broken: " + traceback.format_exc(limit=-3), "broken"
    refused = {str(record.target): record.reason for record in package.manifest.refused_targets}
    sm89 = f"refused: {refused['sm89']}" if "sm89" in refused else "built" if package.manifest.engines else "broken: no engine"
    if "cpu" in refused:
        return f"refused: {refused['cpu']}", sm89
    try:
        with rc.load(package.path) as engine:
            for arrays, expected in _data_sets(case):
                by_name = engine.run(dict(zip((spec.name for spec in engine.interface.inputs), arrays, strict=False)))
                outputs = [by_name[spec.name] for spec in engine.interface.outputs]
                if (difference := _describe_difference(outputs, expected, case)) is not None:
                    return f"differs: {difference}", sm89
    except rc.RyzenError as error:
        return f"refused: {error.message}", sm89
    except Exception:  # noqa: BLE001  unexpected exceptions are reported
        return "broken: " + traceback.format_exc(limit=-3), sm89
    return "pass", sm89


def _data_sets(case: Any) -> Iterator[tuple[list[Any], list[Any]]]:
    """Yield the inputs and the expected outputs of each data set, in order."""
    for inputs, outputs in case.data_sets:
        yield [_to_numpy(value) for value in inputs], [_to_numpy(value) for value in outputs]


def _to_numpy(value: Any) -> Any:
    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value)
    if isinstance(value, list):
        return [_to_numpy(element) for element in value]
    return np.asarray(value) if isinstance(value, np.generic) else value


def _describe_difference(actual: Sequence[Any], expected: Sequence[Any], case: Any) -> str | None:
    """Return how the outputs differ beyond the test's own tolerance, or None if they do not."""
    if len(actual) != len(expected):
        return f"{len(actual)} outputs, expected {len(expected)}"
    for index, (value, reference) in enumerate(zip(actual, expected, strict=True)):
        if isinstance(reference, list):
            if (difference := _describe_difference(value, reference, case)) is not None:
                return f"output {index}: {difference}"
            continue
        if reference is None or value is None:
            if value is not reference:
                return f"output {index} is {value}, expected {reference}"
            continue
        if tuple(value.shape) != tuple(reference.shape):
            return f"output {index} has shape {value.shape}, expected {reference.shape}"
        if value.dtype != reference.dtype and not (value.dtype.kind in "OUS" and reference.dtype.kind in "OUS"):
            return f"output {index} is {value.dtype}, expected {reference.dtype}"
        if reference.dtype.kind in "OUSb":
            same = bool((value == reference).all())
        else:
            widest = np.complex128 if reference.dtype.kind == "c" else np.float64
            same = np.allclose(value.astype(widest), reference.astype(widest), rtol=case.rtol, atol=case.atol, equal_nan=True)
        if not same:
            return f"output {index} differs"
    return None


def _read_results(log: Path) -> Iterator[ConformanceResult]:
    if log.exists():
        for line in log.read_bytes().splitlines():
            try:
                yield msgspec.json.decode(line, type=ConformanceResult)
            except msgspec.DecodeError:
                continue  # truncated by an interruption


def missed_bounds(results: Sequence[ConformanceResult]) -> dict[str, list[str]]:
    """Return the tests that violate a bound, with their results, by bound; bounds that are met are omitted."""
    violations = {
        "passed by plain ONNX Runtime, lost through the package": [
            f"{result.name}: {result.cpu}" for result in results if result.plain == "pass" and result.cpu != "pass"
        ],
        "broken": [
            f"{result.name}: {result.cpu} {result.sm89}" for result in results if "broken" in (result.cpu[:6], result.sm89[:6])
        ],
        "left something behind": [
            f"{result.name}: {', '.join(result.leftover_files)}" for result in results if result.leftover_files
        ],
        "refused without a reason": [result.name for result in results if {"refused", "refused: "} & {result.cpu, result.sm89}],
    }
    raw, built = (sum(getattr(result, column) == "built" for result in results) for column in ("raw", "sm89"))
    if built < raw:
        violations["fewer engines than the raw builder makes"] = [
            f"{result.name}: {result.sm89}" for result in results if result.raw == "built" and result.sm89 != "built"
        ]
    return {bound: tests for bound, tests in violations.items() if tests}


def _failures_by_reason(results: Sequence[ConformanceResult], column: str) -> dict[str, list[str]]:
    """Return the failed tests of `column` by reason, most frequent first; names of nodes and files are removed."""
    failures: dict[str, list[str]] = {}
    for result in results:
        status = getattr(result, column)
        if status not in ("pass", "built"):
            reason = re.sub(r"(node|file|model) `[^`]*`|`[^`]*\.onnx`", r"\1 ...", status).splitlines()[0][:140]
            failures.setdefault(reason, []).append(result.name.removeprefix("test_"))
    return dict(sorted(failures.items(), key=lambda item: -len(item[1])))


def _report(results: Sequence[ConformanceResult], save_to: Path | None) -> int:
    """Print the results by column and reason, and the violated bounds; return the exit code."""
    print(f"\n{len(results)} tests, {sum(result.seconds for result in results):.0f} s")
    counts = {
        column: dict(Counter(getattr(result, column).partition(":")[0] for result in results).most_common())
        for column in ("plain", "raw", "cpu", "sm89")
    }
    for column, by_status in counts.items():
        print(f"  {column:6} " + ", ".join(f"{status} {count}" for status, count in by_status.items()))
    reasons = {column: _failures_by_reason(results, column) for column in ("sm89", "cpu")}
    for column, by_reason in reasons.items():
        print(f"\nfailures on {column}:")
        for reason, names in list(by_reason.items())[:25]:
            print(f"  {len(names):4} {reason}")
    violations = missed_bounds(results)
    for bound, tests in violations.items():
        print(f"\nNOT MET, {len(tests)} {bound}:")
        print("\n".join(f"  {test[:300]}" for test in tests[:40]))
    print("" if violations else "\nall bounds are met")
    save(save_to, {"tests": len(results), "counts": counts, **reasons, "misses": violations})
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
