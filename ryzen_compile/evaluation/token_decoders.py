"""Token decoders, tokens in and logits out: a Transformers model with a cache, and an engine's decode session."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ryzen_compile.errors import AccuracyError, RyzenError, UsageError
from ryzen_compile.progress import SilentStage, Stage
from ryzen_compile.runtime.generation.decoder_spec import nearest_size
from ryzen_compile.utils.user_script import describe_error

if TYPE_CHECKING:
    import torch

    from ryzen_compile.runtime.generation.session import DecodeSession

Array = np.ndarray[Any, Any]

MAX_BLOCK_TOKENS = 128
"""The largest number of tokens per row whose logits are in memory at a time."""


class TokenDecoder(Protocol):
    """A decoder of a batch of sequences of equal length."""

    @property
    def name(self) -> str:
        """Its name in messages."""

    @property
    def is_chunk_invariant(self) -> bool:
        """Whether its logits are independent of the step sizes."""

    def reset(self) -> None:
        """Discard all sequences and start with empty caches."""

    def step(self, ids: Array) -> Array:
        """Feed `ids` (rows, tokens) int64 and return the logits, (rows, tokens, vocabulary) float32."""


class TorchDecoder:
    """A Transformers causal language model."""

    def __init__(self, model: torch.nn.Module, make_cache: Callable[[], Any], *, name: str, is_chunk_invariant: bool) -> None:
        """Create a decoder for `model`; `make_cache` returns an empty cache, which defines what is kept."""
        self.name, self.is_chunk_invariant = name, is_chunk_invariant
        self._model, self._make_cache = model, make_cache
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.reset()

    def reset(self) -> None:
        """Discard all sequences and start with an empty cache."""
        self._cache, self._length = self._make_cache(), 0

    def step(self, ids: Array) -> Array:
        """Feed `ids` and return the logits; raises RyzenError if the module fails."""
        import torch

        inputs = {"input_ids": torch.from_numpy(np.ascontiguousarray(ids, np.int64))}
        if self._takes_positions:
            inputs["position_ids"] = torch.arange(self._length, self._length + ids.shape[1]).expand(ids.shape)
        device = next(self._model.parameters()).device
        try:
            with torch.inference_mode():
                inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
                logits = self._model(**inputs, past_key_values=self._cache, use_cache=True).logits.float().cpu().numpy()
        except Exception as error:
            raise RyzenError(
                f"{self.name} fails: {describe_error(error, exclude_dir=str(Path(torch.__file__).parent))}"
            ) from error
        self._length += ids.shape[1]
        return check_logits(logits, self.name)


class SessionDecoder:
    """An engine's decode session; surplus rows of its batch repeat the last row."""

    is_chunk_invariant = False

    def __init__(self, session: DecodeSession, *, name: str) -> None:
        self.name = name
        self._session = session

    def check_step_size(self, size: int) -> None:
        """Raise UsageError if a step of `size` tokens is not supported."""
        width_ranges, has_mask = self._session.width_ranges, self._session.decoder.mask is not None
        width = nearest_size(size, width_ranges)
        if width < size or (width > size and not has_mask):
            supported = ", ".join(f"{low}..{high}" if low != high else str(low) for low, high in width_ranges)
            raise UsageError(
                f"a step of {size} tokens does not fit: this decoder takes {supported}", hint="choose another --chunk"
            )

    def reset(self) -> None:
        """Discard all sequences and start with empty caches."""
        self._session.reset()

    def step(self, ids: Array) -> Array:
        """Feed `ids` and return the logits; raises UsageError if the step size is not supported."""
        rows, size = ids.shape
        self.check_step_size(size)
        width = nearest_size(size, self._session.width_ranges)
        padded = np.full((self._session.batch, width), int(self._session.decoder.ids.low or 0), np.int64)
        padded[:rows, :size], padded[rows:, :size] = ids, ids[-1]
        mask = None if width == size else np.broadcast_to(np.arange(width) < size, padded.shape)
        return check_logits(self._session.step(padded, mask)[:rows, :size], self.name)


def check_logits(logits: Array, name: str) -> Array:
    """Return `logits` as float32; raises AccuracyError if the maximum over the vocabulary is not finite for some token."""
    if not np.isfinite(logits.max(axis=-1)).all():
        raise AccuracyError(
            f"{name}: logits are NaN or infinite",
            hint="find the node that computes them: ryzen-compile compare CANDIDATE --baseline MODEL.onnx --bisect",
        )
    return np.asarray(logits, np.float32)


def find_causal_lm(module: torch.nn.Module, name: str) -> torch.nn.Module:
    """Return the Transformers causal language model that `module` is or contains; raises RyzenError if there is none."""
    from transformers import GenerationMixin

    for submodule in module.modules():
        if isinstance(submodule, GenerationMixin):
            return submodule
    raise RyzenError(
        f"the module of `{name}` neither is nor contains a Transformers causal language model",
        hint="keep the model as an attribute of the recipe's module: it runs with its own cache",
    )


def chunk_sizes(count: int, chunk_size: int) -> list[int]:
    """Return the step sizes that feed `count` tokens: the remainder first, then `chunk_size` at a time."""
    return [count % chunk_size] * (count % chunk_size > 0) + [chunk_size] * (count // chunk_size)


def stream_logits(
    decoders: Sequence[TokenDecoder], ids: Array, step_sizes: Sequence[int], stage: Stage | None = None
) -> Iterator[tuple[int, list[Array]]]:
    """Feed `ids` (rows, tokens) to all decoders in steps of `step_sizes`, a block of steps at a time.

    Yields the index of the first token of each block and the logits of each decoder over the block, (rows, tokens,
    vocabulary). A chunk-invariant decoder takes a block in one step. The items of `stage` are the steps of each decoder.
    """
    stage = stage or SilentStage()
    for decoder in decoders:
        decoder.reset()
    start, remaining = 0, list(step_sizes)
    while remaining:
        block = [remaining.pop(0)]
        while remaining and sum(block) + remaining[0] <= MAX_BLOCK_TOKENS:
            block.append(remaining.pop(0))
        logits = []
        for decoder in decoders:
            logits.append(_run_block(decoder, ids, start, [sum(block)] if decoder.is_chunk_invariant else block))
            stage.advance(len(block))
        yield start, logits
        start += sum(block)


def _run_block(decoder: TokenDecoder, ids: Array, start: int, step_sizes: Sequence[int]) -> Array:
    logits = []
    for size in step_sizes:
        logits.append(decoder.step(ids[:, start : start + size]))
        start += size
    return np.concatenate(logits, axis=1)


def batches_by_length(lengths: Sequence[tuple[int, ...]], batch_size: int) -> Iterator[list[int]]:
    """Yield batches of item indices: items with equal `lengths`, in order, at most `batch_size` each."""
    by_length: dict[tuple[int, ...], list[int]] = {}
    for item, length in enumerate(lengths):
        by_length.setdefault(length, []).append(item)
    for items in by_length.values():
        for start in range(0, len(items), batch_size):
            yield items[start : start + batch_size]


def log_softmax(logits: Array) -> Array:
    """Return the natural logarithms of the softmax of `logits` (..., vocabulary), in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
