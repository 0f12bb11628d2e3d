"""Codecs for tensors: `rc.compression.encode` and `decode`."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from support.quant_reference import dequantize

import ryzen_compile as rc

RNG = np.random.default_rng(0)
VECTORS = RNG.standard_normal((6, 5, 64)).astype(np.float32)
STORAGE = {"fp8": "fp8", "int8": "8", "int4": "4"}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("codec", "error", "ratio"), [("fp8", 0.03, 3.76), ("int8", 0.01, 3.76), ("int4", 0.12, 7.11)])
def test_vectors_decode_to_what_their_codes_stand_for(codec: str, error: float, ratio: float, dtype: Any) -> None:
    x = VECTORS.astype(dtype)
    encoded = rc.compression.encode(x, codec=codec, max_relative_error=0.2)
    decoded = rc.compression.decode(encoded)
    assert (decoded.dtype, decoded.shape) == (x.dtype, x.shape)
    expected = dequantize(STORAGE[codec], encoded.tensors["codes"], encoded.tensors["scale"])
    np.testing.assert_allclose(
        decoded.astype(np.float64), expected, rtol=1e-2 if dtype is ml_dtypes.bfloat16 else 1e-3, atol=1e-3
    )
    difference = decoded.astype(np.float64) - x.astype(np.float64)
    assert encoded.relative_error == pytest.approx(np.linalg.norm(difference) / np.linalg.norm(x.astype(np.float64)))
    assert error / 3 < encoded.relative_error < error
    assert encoded.ratio == pytest.approx(ratio * np.dtype(dtype).itemsize / 4, rel=0.01)
    assert encoded.nbytes == sum(array.nbytes for array in encoded.tensors.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_torch_tensor_decodes_to_a_torch_tensor(dtype: torch.dtype) -> None:
    x = torch.from_numpy(VECTORS).to(dtype)
    decoded = rc.compression.decode(rc.compression.encode(x, codec="int8"))
    assert isinstance(decoded, torch.Tensor)
    assert decoded.dtype == dtype
    torch.testing.assert_close(decoded, x, rtol=0.05, atol=0.05)


def test_merged_tokens_decode_to_the_mean_of_similar_tokens_in_their_places() -> None:
    distinct = RNG.standard_normal((2, 6, 16)).astype(np.float32)
    tokens = np.repeat(distinct, 2, axis=1)  # each token twice: one at an even, one at an odd position
    encoded = rc.compression.encode(tokens, codec="token-merge", merged=6)
    assert encoded.tensors["y"].shape == (2, 6, 16)
    assert encoded.relative_error == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(rc.compression.decode(encoded), tokens, rtol=1e-5, atol=1e-6)
    assert encoded.ratio > 1.7


def test_the_relative_error_of_a_tensor_of_zeros_is_0() -> None:
    encoded = rc.compression.encode(np.zeros((2, 32), np.float32), codec="int8", max_relative_error=0)
    assert encoded.relative_error == 0
    assert not rc.compression.decode(encoded).any()


def test_a_relative_error_above_the_bound_is_refused() -> None:
    with pytest.raises(rc.AccuracyError, match=r"int4.* relative error of .*% .*bound is 5.00%") as caught:
        rc.compression.encode(VECTORS, codec="int4")
    assert caught.value.hint is not None
    with pytest.raises(rc.AccuracyError):
        rc.compression.encode(np.full((1, 32), np.nan, np.float32), codec="int8")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"codec": "zip"}, rc.UsageError, "no codec `zip`"),
        ({"codec": "int8", "max_relative_error": -1.0}, rc.UsageError, "at least 0"),
        ({"codec": "int8", "merged": 2}, rc.UsageError, "does not take `merged`"),
        ({"codec": "token-merge"}, rc.UsageError, "needs `merged`"),
        ({"codec": "token-merge", "merged": 4, "x": VECTORS}, rc.UsageError, r"in \[0, 2\] for 5 tokens"),
        ({"codec": "token-merge", "merged": 1, "x": VECTORS[0]}, rc.ShapeError, r"\(batch, tokens, features\)"),
        ({"codec": "int4", "x": VECTORS[..., :60]}, rc.ShapeError, "power_of_two"),
        ({"codec": "int8", "x": VECTORS.astype(np.float64)}, rc.ShapeError, "float64"),
        ({"codec": "int8", "x": VECTORS[:0]}, rc.ShapeError, "without elements"),
        ({"codec": "int8", "x": "text"}, rc.ShapeError, "type str"),
    ],
)
def test_what_cannot_be_encoded_is_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rc.compression.encode(**{"x": VECTORS, **arguments})
