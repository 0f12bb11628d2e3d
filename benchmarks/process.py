"""Commands measured as whole processes, in turns: wall time, peak memory of the process tree, and on which machine it was."""

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
    """One finished command."""

    seconds: float
    peak_bytes: int
    """The largest sum of the proportional set sizes (PSS) of the process and its descendants, sampled; 0 when not asked for."""
    output: str


def measure(command: Sequence[str], *, memory: bool = False) -> CommandRun:
    """Run `command` to its end; raises CalledProcessError, with what it said, when it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    peak = _PeakMemorySampler(process.pid) if memory else None
    output, errors = process.communicate()
    seconds = time.perf_counter() - started
    if peak:
        peak.stop()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, output, errors)
    return CommandRun(seconds=seconds, peak_bytes=peak.bytes if peak else 0, output=output)


def environment() -> dict[str, str]:
    """Return the environment of a measured command: Python keeps its compiled modules, as it does where nobody forbids it."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def run_interleaved(commands: Mapping[str, Sequence[str]], *, rounds: int, memory: bool = False) -> dict[str, list[CommandRun]]:
    """Run the commands in turns, `rounds` times after one turn that does not count: drift then falls on all alike."""
    runs: dict[str, list[CommandRun]] = {name: [] for name in commands}
    for turn in range(rounds + 1):
        for name, command in commands.items():
            run = measure(command, memory=memory)
            if turn:
                runs[name].append(run)
    return runs


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def argument_parser(description: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """Return a parser for what all benchmarks take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="how many turns count [%(default)s]")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the numbers and the machine to FILE, as JSON")
    return parser


def save(file: Path | None, results: Mapping[str, Any]) -> None:
    """Write `results` and where they were measured, where the user asked for a file."""
    if file is not None:
        file.write_text(json.dumps({"machine": machine(), **_round_floats(results)}, indent=2) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """Return the hardware, the versions of all packages that matter, and the date."""
    names = ("onnx", "onnx-ir", "onnxruntime", "onnxsim", "tensorrt-rtx-cu13-libs", "torch", "triton")
    held = {dist.metadata["Name"].lower().replace("_", "-"): dist.version for dist in distributions()}
    with open("/proc/cpuinfo", encoding="ascii") as file:
        cpu = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), platform.machine())
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "gpu": None,
        "python": platform.python_version(),
        "packages": {name: held[name] for name in names if name in held},
    }


def _round_floats(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _round_floats(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_round_floats(one) for one in value]
    return round(value, 4) if isinstance(value, float) and abs(value) > 1e-3 else value


class _PeakMemorySampler:
    """Samples the memory of a process tree from a thread, until it is stopped."""

    def __init__(self, pid: int) -> None:
        self.bytes = 0
        self._pid = pid
        self._stop_event = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop_event.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop_event.wait(0.02):
            self.bytes = max(self.bytes, _tree_pss(self._pid))


def _tree_pss(pid: int) -> int:
    total = 0
    try:
        tree = [psutil.Process(pid)]
        tree += tree[0].children(recursive=True)
    except psutil.NoSuchProcess:
        return 0
    for process in tree:
        try:
            with open(f"/proc/{process.pid}/smaps_rollup", encoding="ascii") as file:
                total += next((int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:")), 0)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return total
