"""Raw runs, the reference for `comparison_cost.py`: what a script with ONNX Runtime alone does with the same cases.

    python benchmarks/raw_runs.py MODEL.onnx CASES_FOLDER

Opens the model with the default options, runs it once on each case, keeps the outputs of the last one, and prints the seconds
of loading and running.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime


def main() -> None:
    model, folder = sys.argv[1:]
    cases = [dict(np.load(file)) for file in sorted(Path(folder).glob("*.npz"))]
    started = time.perf_counter()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    for case in cases:
        outputs = session.run(None, case)
    print(time.perf_counter() - started)
    del outputs


if __name__ == "__main__":
    main()
