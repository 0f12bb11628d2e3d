"""LSTM, GRU and RNN with sequence lengths, exported from PyTorch, build for GPUs in half precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.recurrent_models import export_with_lengths

import ryzen_compile as rc
from ryzen_compile.spec.dtypes import HalfPrecision

SHAPES = {
    "min_shapes": ["x:1x4x8,lengths:1"],
    "opt_shapes": ["x:2x8x8,lengths:2"],
    "max_shapes": ["x:4x16x8,lengths:4"],
}


@pytest.mark.parametrize(("kind", "precision"), [("LSTM", "fp16"), ("GRU", "fp16"), ("RNN", "fp16"), ("LSTM", "bf16")])
def test_recurrent_nodes_with_lengths_stay_in_fp32(kind: str, precision: HalfPrecision, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    source = export_with_lengths(kind, tmp_path / "tagger.onnx")
    x = np.random.default_rng(0).standard_normal((4, 16, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, lengths=np.array([4, 3, 2, 4]))
    package = rc.build(source, gpu="sm89", precision=precision, data=str(tmp_path / "data.npz"), cache=False, **SHAPES)
    (engine,) = package.manifest.engines
    assert [target.name for target in engine.targets] == ["sm89"]
    variant = package.manifest.variant_of(engine)
    assert all(accuracy.met for accuracy in variant.accuracy)
    notes = [note for record in variant.passes for note in record.notes]
    assert any(f"/{kind}: lengths: " in note for note in notes)
    converted = [name for record in variant.passes for name in record.changed]
    assert any("MatMul" in name for name in converted), "the other nodes are converted"
