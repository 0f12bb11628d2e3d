"""Measurement of commands as whole processes: wall time, peak memory of the process tree, and the machine."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import psutil


@dataclass(frozen=True)
class CommandRun:
    """The measurements of one command."""

    seconds: float
    peak_bytes: int
    """The largest sampled sum of the proportional set sizes (PSS) of the process tree; 0 if not measured."""
    peak_anonymous_bytes: int
    """The largest sampled sum without the pages of mapped files, which the kernel can drop; 0 if not measured."""
    output: str


def measure(command: Sequence[str], *, memory: bool = False) -> CommandRun:
    """Run `command` to completion; raises CalledProcessError with its output if it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    sampler = _PeakMemorySampler(process.pid) if memory else None
    output, errors = process.communicate()
    seconds = time.perf_counter() - started
    if sampler:
        sampler.stop()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, output, errors)
    return CommandRun(
        seconds=seconds,
        peak_bytes=sampler.bytes if sampler else 0,
        peak_anonymous_bytes=sampler.anonymous_bytes if sampler else 0,
        output=output,
    )


def environment() -> dict[str, str]:
    """Return the environment of a measured command, with Python's default of writing compiled modules."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def run_interleaved(commands: Mapping[str, Sequence[str]], *, rounds: int, memory: bool = False) -> dict[str, list[CommandRun]]:
    """Run the commands interleaved, `rounds` times after one warm-up round, so that drift affects all of them equally."""
    runs: dict[str, list[CommandRun]] = {name: [] for name in commands}
    for round_index in range(rounds + 1):
        for name, command in commands.items():
            run = measure(command, memory=memory)
            if round_index:
                runs[name].append(run)
    return runs


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def argument_parser(description: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """Return a parser with the options of all benchmarks."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="the number of measured rounds [%(default)s]")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the results and the machine to FILE as JSON")
    return parser


def save(file: Path | None, results: Mapping[str, Any]) -> None:
    """Write `results` and the machine to `file` as JSON; without a file do nothing."""
    if file is not None:
        file.write_text(json.dumps({"machine": machine(), **_round_floats(results)}, indent=2) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """Return the date, the hardware, and the versions of Python and the relevant packages."""
    names = ("onnx", "onnx-ir", "onnxruntime", "onnxsim", "tensorrt-rtx-cu13-libs", "torch", "triton")
    versions = {dist.metadata["Name"].lower().replace("_", "-"): dist.version for dist in distributions()}
    with open("/proc/cpuinfo", encoding="ascii") as file:
        cpu = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), platform.machine())
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "gpu": None,
        "python": platform.python_version(),
        "packages": {name: versions[name] for name in names if name in versions},
    }


def _round_floats(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _round_floats(element) for key, element in value.items()}
    if isinstance(value, (list, tuple)):
        return [_round_floats(element) for element in value]
    return round(value, 4) if isinstance(value, float) and abs(value) > 1e-3 else value


class _PeakMemorySampler:
    """Samples the memory of a process tree every 20 ms in a thread until stopped; `bytes` is the peak.

    If a sample takes longer than that, as with gigabytes of mapped pages, the pauses are as long as a sample.

    `anonymous_bytes` is the peak of the same sum without the pages of mapped files.
    """

    def __init__(self, pid: int) -> None:
        self.bytes = 0
        self.anonymous_bytes = 0
        self._pid = pid
        self._stop_event = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop_event.set()
        self._thread.join()

    def _sample(self) -> None:
        pause = 0.02
        while not self._stop_event.wait(pause):
            started = time.perf_counter()
            total, from_files = _tree_pss(self._pid)
            pause = max(0.02, time.perf_counter() - started)
            self.bytes = max(self.bytes, total)
            self.anonymous_bytes = max(self.anonymous_bytes, total - from_files)


def _tree_pss(pid: int) -> tuple[int, int]:
    """Return the PSS in bytes of a process tree, and the part of it that is pages of mapped files."""
    total, from_files = 0, 0
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0, 0
    for process in processes:
        try:
            with open(f"/proc/{process.pid}/smaps_rollup", encoding="ascii") as file:
                fields = [line.split() for line in file if line.startswith("Pss")]
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        sizes = {name: int(kilobytes) * 1024 for name, kilobytes, _ in fields}
        total += sizes.get("Pss:", 0)
        from_files += sizes.get("Pss_File:", 0)
    return total, from_files
