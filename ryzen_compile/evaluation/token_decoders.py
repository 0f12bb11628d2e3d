"""Decoders that are evaluated: a module of transformers with some cache, and an engine's session; tokens in, logits out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ryzen_compile.errors import AccuracyError, RyzenError, UsageError
from ryzen_compile.runtime.generation.decoder_spec import nearest_size
from ryzen_compile.utils.user_script import describe_error

if TYPE_CHECKING:
    import torch

    from ryzen_compile.runtime.generation.session import DecodeSession

Array = np.ndarray[Any, Any]

MAX_BLOCK_TOKENS = 128
"""How many tokens of a row are looked at together, at most: logits of more are never held."""


class TokenDecoder(Protocol):
    """Rows of tokens under way, all of one length."""

    @property
    def name(self) -> str:
        """What it is called in messages."""

    @property
    def is_chunk_invariant(self) -> bool:
        """Whether the sizes of steps make no difference to it."""

    def reset(self) -> None:
        """Begin sequences anew."""

    def step(self, ids: Array) -> Array:
        """Feed `ids` (rows, tokens) int64 and return the logits, (rows, tokens, vocabulary) float32."""


class TorchDecoder:
    """A causal language model of transformers."""

    def __init__(self, model: torch.nn.Module, make_cache: Callable[[], Any], *, name: str, is_chunk_invariant: bool) -> None:
        """`make_cache` makes an empty cache, which says what is kept."""
        self.name, self.is_chunk_invariant = name, is_chunk_invariant
        self._model, self._make_cache = model, make_cache
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.reset()

    def reset(self) -> None:
        """Begin sequences anew."""
        self._cache, self._length = self._make_cache(), 0

    def step(self, ids: Array) -> Array:
        """Feed `ids` and return the logits; raises RyzenError where the module fails."""
        import torch

        given = {"input_ids": torch.from_numpy(np.ascontiguousarray(ids, np.int64))}
        if self._takes_positions:
            given["position_ids"] = torch.arange(self._length, self._length + ids.shape[1]).expand(ids.shape)
        device = next(self._model.parameters()).device
        try:
            with torch.inference_mode():
                moved = {name: tensor.to(device) for name, tensor in given.items()}
                logits = self._model(**moved, past_key_values=self._cache, use_cache=True).logits.float().cpu().numpy()
        except Exception as error:
            raise RyzenError(
                f"{self.name} fails: {describe_error(error, exclude_dir=str(Path(torch.__file__).parent))}"
            ) from error
        self._length += ids.shape[1]
        return check_logits(logits, self.name)


class SessionDecoder:
    """An engine's session, whose rows that are not needed repeat the last of those that are."""

    is_chunk_invariant = False

    def __init__(self, session: DecodeSession, *, name: str) -> None:
        self.name = name
        self._session = session

    def check_step_size(self, size: int) -> None:
        """Raise UsageError where a step of `size` tokens cannot be fed."""
        widths, masked = self._session.width_ranges, self._session.decoder.mask is not None
        fed = nearest_size(size, widths)
        if fed < size or (fed > size and not masked):
            takes = ", ".join(f"{low}..{high}" if low != high else str(low) for low, high in widths)
            raise UsageError(f"a step of {size} tokens does not fit: this decoder takes {takes}", hint="choose another --chunk")

    def reset(self) -> None:
        """Begin sequences anew."""
        self._session.reset()

    def step(self, ids: Array) -> Array:
        """Feed `ids` and return the logits."""
        rows, size = ids.shape
        self.check_step_size(size)
        fed = nearest_size(size, self._session.width_ranges)
        whole = np.full((self._session.batch, fed), int(self._session.decoder.ids.low or 0), np.int64)
        whole[:rows, :size], whole[rows:, :size] = ids, ids[-1]
        mask = None if fed == size else np.broadcast_to(np.arange(fed) < size, whole.shape)
        return check_logits(self._session.step(whole, mask)[:rows, :size], self.name)


def check_logits(logits: Array, name: str) -> Array:
    """Return `logits` as float32; raises AccuracyError where they tell no order of tokens."""
    if not np.isfinite(logits.max(axis=-1)).all():
        raise AccuracyError(
            f"{name}: logits are NaN or infinite",
            hint="see which node they come from: ryzen-compile compare PACKAGE --baseline recipe:NAME --bisect",
        )
    return np.asarray(logits, np.float32)


def find_causal_lm(module: torch.nn.Module, name: str) -> torch.nn.Module:
    """Return the causal language model of transformers that `module` is or holds; raises RyzenError where there is none."""
    from transformers import GenerationMixin

    for part in module.modules():
        if isinstance(part, GenerationMixin):
            return part
    raise RyzenError(
        f"the module of `{name}` neither is nor holds a causal language model of transformers",
        hint="let the recipe's module keep it as an attribute: it is run with a cache of its own",
    )


def chunk_sizes(count: int, chunk_size: int) -> list[int]:
    """Return the sizes of the steps that feed `count` tokens: first what is left over, then `chunk` at a time."""
    return [count % chunk_size] * (count % chunk_size > 0) + [chunk_size] * (count // chunk_size)


def stream_logits(decoders: Sequence[TokenDecoder], ids: Array, step_sizes: Sequence[int]) -> Iterator[tuple[int, list[Array]]]:
    """Feed `ids` (rows, tokens) to all in steps of `sizes`; yield where a block begins and the logits of each decoder over it.

    To a decoder for which it makes no difference a block is one step.
    """
    for decoder in decoders:
        decoder.reset()
    at, nth = 0, 0
    while nth < len(step_sizes):
        block = [step_sizes[nth]]
        while nth + len(block) < len(step_sizes) and sum(block) + step_sizes[nth + len(block)] <= MAX_BLOCK_TOKENS:
            block.append(step_sizes[nth + len(block)])
        yield at, [_run_block(decoder, ids, at, [sum(block)] if decoder.is_chunk_invariant else block) for decoder in decoders]
        at, nth = at + sum(block), nth + len(block)


def _run_block(decoder: TokenDecoder, ids: Array, start: int, step_sizes: Sequence[int]) -> Array:
    found = []
    for size in step_sizes:
        found.append(decoder.step(ids[:, start : start + size]))
        start += size
    return np.concatenate(found, axis=1)


def batches_by_length(lengths: Sequence[tuple[int, ...]], batch_size: int) -> Iterator[list[int]]:
    """Yield which items go together: those of equal `lengths`, at most `most`, in their order."""
    by_length: dict[tuple[int, ...], list[int]] = {}
    for item, length in enumerate(lengths):
        by_length.setdefault(length, []).append(item)
    for items in by_length.values():
        for start in range(0, len(items), batch_size):
            yield items[start : start + batch_size]


def log_softmax(logits: Array) -> Array:
    """Return the natural logarithms of the probabilities of `logits` (..., vocabulary), float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True)))
