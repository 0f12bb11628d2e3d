"""The Python examples of the README and of docs/api.md run, on small models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

ROOT = Path(__file__).parents[2]


def first_example(page: str) -> str:
    """Return the first block of Python on a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)[0]


@pytest.mark.slow
def test_the_example_of_the_api_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    module = torch.nn.Sequential(torch.nn.Linear(128, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16)).eval()
    names: dict[str, Any] = {"module": module, "x": torch.randn(4, 128)}
    exec(first_example("docs/api.md"), names)
    (output,) = names["outputs"].values()
    assert output.shape == (4, 16)
    (profile,) = names["package"].manifest.graphs[0].profiles
    assert (profile.min["x"], profile.max["x"]) == ((1, 128), (8, 128)), "the largest shapes alone bound a range"


ENCODER = """<ir_version: 10, opset_import: ["" : 21]>
    g (int64[batch, seq] input_ids, int64[batch, seq] attention_mask) => (float[batch, 2] y)
    <float[3, 2] table = {1, 2, 3, 4, 5, 6}, int64[1] last = {2}, int64[1] tokens = {1}> {
        e = Gather (table, input_ids)  m = Cast <to = 1> (attention_mask)  mask = Unsqueeze (m, last)  masked = Mul (e, mask)
        y = ReduceSum <keepdims = 0> (masked, tokens) }"""


@pytest.mark.slow
def test_the_example_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(onnx.parser.parse_model(ENCODER), "minilm.onnx")
    ids = np.array([[0, 1, 2], [2, 2, 0]])
    names: dict[str, Any] = {"ids": ids, "mask": np.array([[1, 1, 1], [1, 1, 0]])}
    exec(first_example("README.md"), names)
    np.testing.assert_allclose(names["outputs"]["y"], [[9, 12], [10, 12]])
