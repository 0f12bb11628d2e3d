"""The same eviction in plain torch: a cache for transformers' decoders that keeps what a rewritten graph keeps.

A rewritten graph is held to it: where the two differ the rewrite is wrong, and where this differs from a cache that keeps all,
that is what the method itself costs. It shares no code with the rewrite but the reading of statistics.
"""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from ryzen_compile.errors import ModelError, did_you_mean
from ryzen_compile.spec.kv_cache import KVCacheSpec, LayerCacheSpec
from ryzen_compile.utils.files import hash_file
from ryzen_passes.kv.scorers.statistics import read_statistics

_FLOAT32_MAX = torch.finfo(torch.float32).max


class TorchScorer(abc.ABC):
    """What the tokens of one layer are worth keeping, told when they are appended; high is kept."""

    needs_hidden_state = False
    """Whether `hidden` has to be given."""
    hidden_state: torch.Tensor | None = None
    """(batch, seq, width): what goes into the layer's attention in the step under way, where the module is watched."""

    @abc.abstractmethod
    def score_new_tokens(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return (batch, kv_heads, seq) float32 for a step's `keys` and `values` (batch, kv_heads, seq, size).

        `positions` is (batch, seq) int64. Keys are as attention reads them: rotated, where the model rotates them.
        """

    def rescore(self, keys: torch.Tensor, seen_tokens: int) -> torch.Tensor:
        """Return (batch, kv_heads, rows) float32 for `keys` that are kept, before a step behind the `seen` first tokens."""
        raise NotImplementedError(f"{type(self).__name__} tells no score again")

    def reset(self) -> None:
        """Forget the sequences."""
        self.hidden_state = None


class _TorchKeyNorm(TorchScorer):
    """Keys of small norm are kept: -|k|."""

    def score_new_tokens(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return -keys.float().norm(dim=-1)


class _TorchValueNorm(TorchScorer):
    """Values of large norm are kept: |v|."""

    def score_new_tokens(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return values.float().norm(dim=-1)


class _TorchPosition(TorchScorer):
    """The latest are kept."""

    def score_new_tokens(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return positions.float()[:, None].expand(keys.shape[:3])


class _TorchKeyDiff(TorchScorer):
    """Keys that point elsewhere than the others are kept: -cos(k, a), for a the sum of k / |k| over the tokens seen so far."""

    _anchor: torch.Tensor | None = None
    """(batch, kv_heads, size)"""

    def score_new_tokens(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        added = torch.nn.functional.normalize(keys.float(), dim=-1).sum(dim=2)
        self._anchor = added if self._anchor is None else self._anchor + added
        return self.rescore(keys, 0)

    def rescore(self, keys: torch.Tensor, seen_tokens: int) -> torch.Tensor:
        assert self._anchor is not None
        return -torch.nn.functional.cosine_similarity(keys.float(), self._anchor[:, :, None], dim=-1, eps=1e-12)

    def reset(self) -> None:
        super().reset()
        self._anchor = None


class _TorchKvZap(TorchScorer):
    """w.h + b, of the hidden state h."""

    needs_hidden_state = True

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        """`weight` is (width, kv_heads), `bias` (kv_heads,)."""
        self._weight, self._bias = weight, bias

    def score_new_tokens(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden, self.hidden_state = self.hidden_state, None
        if hidden is None:
            raise ModelError("nothing told what goes into attention", hint="run the module that `in_torch` was given")
        weight, bias = (one.to(hidden.device) for one in (self._weight, self._bias))
        return (hidden.float() @ weight + bias).transpose(1, 2)


class _TorchTriAttention(TorchScorer):
    """q.k + sum over planes of r |k|, for the usual query q of the head as it would be at the position that looks."""

    def __init__(self, query: torch.Tensor, spread: torch.Tensor, pairs: torch.Tensor, frequency: torch.Tensor) -> None:
        """`query` is (kv_heads, size), `spread` r (kv_heads, planes), `pairs` (planes, 2), `frequency` (planes,) radians."""
        self._query, self._spread, self._pairs, self._frequency = query, spread, pairs.long(), frequency

    def score_new_tokens(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self._score_from_positions(keys, positions[0])

    def rescore(self, keys: torch.Tensor, seen_tokens: int) -> torch.Tensor:
        return self._score_from_positions(keys, torch.tensor([seen_tokens], device=keys.device))

    def _score_from_positions(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the scores as seen from `positions`, (rows,) or one for all."""
        query, spread = (given.to(keys.device)[:, None] for given in (self._query, self._spread))
        angle, (one, other) = positions.float()[:, None] * self._frequency.to(keys.device), self._pairs.to(keys.device).T
        turned = query.repeat(1, len(positions), 1)
        turned[..., one] = query[..., one] * angle.cos() - query[..., other] * angle.sin()
        turned[..., other] = query[..., other] * angle.cos() + query[..., one] * angle.sin()
        wide = keys.float()
        lengths = torch.hypot(wide[..., one], wide[..., other])
        return (wide * turned).sum(dim=-1) + (lengths * spread).sum(dim=-1)


def _calibrated_scorer(layer_index: int, spec: LayerCacheSpec, factory: Callable[..., TorchScorer], *names: str) -> TorchScorer:
    """Return what `make` makes of the statistics called `words` of layer `at`: those that the graph was given."""
    fitted = spec.statistics
    if fitted is None:
        raise ModelError(f"the graph does not tell which statistics layer {layer_index} evicts by", hint="rewrite it anew")
    statistics = read_statistics(fitted.path)
    if hash_file(Path(fitted.path), "sha256") != fitted.sha256:
        raise ModelError(f"`{fitted.path}` holds other statistics than the graph was given", hint="rewrite it anew")
    return factory(*(torch.from_numpy(statistics.tensor(layer_index, word)).float() for word in names))


TORCH_SCORERS: dict[str, Callable[[int, LayerCacheSpec], TorchScorer]] = {
    "knorm": lambda at, layer: _TorchKeyNorm(),
    "value-norm": lambda at, layer: _TorchValueNorm(),
    "position": lambda at, layer: _TorchPosition(),
    "keydiff": lambda at, layer: _TorchKeyDiff(),
    "kvzap": lambda at, layer: _calibrated_scorer(at, layer, _TorchKvZap, "weight", "bias"),
    "triattention": lambda at, layer: _calibrated_scorer(
        at, layer, _TorchTriAttention, "query", "spread", "pairs", "frequency"
    ),
}
"""What makes the score of a layer, given its place and itself, by the names of `scores.SCORES`."""


@runtime_checkable
class HiddenStateListener(Protocol):
    """A layer of a cache that sees what goes into attention."""

    def on_hidden_state(self, hidden_state: torch.Tensor) -> torch.Tensor | None:
        """Take in `hidden` (batch, seq, width) of a step; return a mask in place of the module's, or None to leave that.

        The mask is (batch, heads, seq, rows), what is added to the logits of attention, and has its values after `update`.
        """


class EvictingLayer(CacheLayerMixin):  # type: ignore[misc]
    """The slots of one layer. Rows of a batch have equal lengths and no padding.

    The slots that are filled are the first ones, as a slot is only given up to a token that takes it. They are in the order
    of the graph's, so that equal scores are settled as there.
    """

    def __init__(self, scorer: TorchScorer, spec: LayerCacheSpec, *, single_token: bool, builds_mask: bool = False) -> None:
        """Make the empty slots of `layer`.

        With `in_one` a step of one token evicts before it attends, as a graph of such steps does. With `masks` the layer makes
        its own mask, by what each head keeps.
        """
        super().__init__()
        self.scorer = scorer
        self._spec, self._slots, self._single_token, self._builds_mask = spec, spec.slots or 0, single_token, builds_mask
        self._mask: torch.Tensor | None = None
        self._seen_tokens = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make slots of the shapes of the first step, of which none is filled."""
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.scores = torch.empty(self.keys.shape[:3], device=key_states.device)
        """(batch, kv_heads, filled) float32"""
        self.positions = torch.empty(self.keys.shape[:3], dtype=torch.int64, device=key_states.device)
        """(batch, kv_heads, filled)"""
        self.is_initialized = True

    def on_hidden_state(self, hidden_state: torch.Tensor) -> torch.Tensor | None:
        """As Watching says."""
        batch, seq, _ = hidden_state.shape
        self.scorer.hidden_state = hidden_state
        self._mask = (
            hidden_state.new_zeros(batch, self._spec.heads, seq, self.get_mask_sizes(seq)[0]) if self._builds_mask else None
        )
        return self._mask

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append a step (batch, kv_heads, seq, size) and return the keys and values that its queries see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, heads, seq, _ = key_states.shape
        alone = self._single_token and seq == 1
        positions = torch.arange(self._seen_tokens, self._seen_tokens + seq, device=key_states.device).expand(batch, seq)
        old = self._rescored(alone)
        new = _sanitize(self.scorer.score_new_tokens(key_states, value_states, positions))
        keys, values = torch.cat([self.keys, key_states], dim=2), torch.cat([self.values, value_states], dim=2)
        scores = torch.cat([old, new], dim=2)
        places = torch.cat([self.positions, positions[:, None].expand(batch, heads, seq)], dim=2)
        self._seen_tokens += seq
        kept = self._kept_indices(scores, places, seq)
        self.keys, self.values = (_gather_rows(whole, kept) for whole in (keys, values))
        self.scores, self.positions = scores.gather(2, kept), places.gather(2, kept)
        self._fill_mask(self.positions if alone else places, positions)
        return (self.keys, self.values) if alone else (keys, values)

    def _rescored(self, single_token: bool) -> torch.Tensor:
        """Return the scores (batch, kv_heads, filled) before a step; where they age, some or all told again.

        `every` steps of one token go once round the slots; any other step tells all.
        """
        every, held = self._spec.rescore_interval, self._filled_slots()
        if not every or not held:
            return self.scores
        rows = -(-self._slots // every) if single_token else self._slots
        around = torch.arange(self._seen_tokens * rows, (self._seen_tokens + 1) * rows, device=self.keys.device) % self._slots
        at = around[around < held]
        return self.scores.index_copy(2, at, _sanitize(self.scorer.rescore(self.keys[:, :, at], self._seen_tokens)))

    def _fill_mask(self, keys: torch.Tensor, queries: torch.Tensor) -> None:
        """Fill the mask that `watch` gave, for keys at positions (batch, kv_heads, rows), queries at (batch, seq)."""
        if self._mask is None:
            return
        behind = queries[:, None, :, None] - keys[:, :, None]
        hidden = behind < 0
        if self._spec.window is not None:
            hidden |= behind >= self._spec.window
        groups = self._spec.heads // self._spec.kv_heads
        self._mask.masked_fill_(hidden.repeat_interleave(groups, dim=1), torch.finfo(self._mask.dtype).min)
        self._mask = None

    def _kept_indices(self, scores: torch.Tensor, positions: torch.Tensor, seq: int) -> torch.Tensor:
        """Return (batch, kv_heads, kept): which of the slots, and of the step's tokens behind them, each slot holds next."""
        batch, heads, count = scores.shape
        here = torch.arange(count, device=scores.device).expand(batch, heads, count)
        surplus, held = count - self._slots, count - seq
        if surplus <= 0:
            return here
        may_go = (positions >= self._spec.sinks) & (positions < self._seen_tokens - self._spec.recent_window)
        worth = scores.masked_fill(~may_go, torch.inf)
        goes = torch.zeros_like(may_go).scatter(2, worth.argsort(dim=2, stable=True)[:, :, :surplus], value=True)
        staying = held + goes[:, :, held:].int().argsort(dim=2, stable=True)
        slots = torch.arange(self._slots, device=scores.device).expand(batch, heads, self._slots)
        is_free = torch.ones_like(slots, dtype=torch.bool)
        is_free[:, :, :held] = goes[:, :, :held]
        nth = (is_free.cumsum(dim=2) - 1).clamp(min=0, max=seq - 1)
        return torch.where(is_free, staying.gather(2, nth), slots)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys a step of `query_length` sees, and the position that a causal mask takes the first to have."""
        held = self._filled_slots()
        seen = held + query_length
        return (min(seen, self._slots) if self._single_token and query_length == 1 else seen), self._seen_tokens - held

    def get_seq_length(self) -> int:
        """Return how many tokens it has seen."""
        return self._seen_tokens

    def get_max_length(self) -> int:
        """Return -1: sequences may be of any length."""
        return -1

    def reset(self) -> None:
        """Begin anew."""
        self.is_initialized, self._seen_tokens, self._mask = False, 0, None
        self.scorer.reset()

    def _filled_slots(self) -> int:
        return self.keys.shape[2] if self.is_initialized else 0


def evicting_cache_factory(
    spec: KVCacheSpec,
    *,
    single_token: bool,
    module: torch.nn.Module | None = None,
    wrap_scorer: Callable[[TorchScorer], TorchScorer] = lambda score: score,
) -> Callable[[], Cache]:
    """Return what makes empty caches that keep what `told` says of a rewritten graph.

    `singles` and `module` are as in `Pass.in_torch`. `wrap` makes of each layer's score the one that it evicts by. Raises
    ModelError for what has no form in torch, or none without the module.
    """
    scores = [_make_scorer(at, layer) for at, layer in enumerate(spec.layers)]
    masks = len({layer.slots for layer in spec.layers}) > 1 or any(layer.window is not None for layer in spec.layers)
    if masks or any(score.needs_hidden_state for score in scores):
        if module is None:
            why = "layers differ in what their queries see" if masks else "scores are told of hidden states"
            raise ModelError(f"{why}, of which a cache alone is not told", hint="give the module that runs with it")
        _register_hidden_state_hooks(module, len(spec.layers))

    def make() -> Cache:
        return Cache(
            layers=[
                EvictingLayer(wrap_scorer(copy.copy(score)), layer, single_token=single_token, builds_mask=masks)
                for score, layer in zip(scores, spec.layers, strict=True)
            ]
        )

    return make


def _make_scorer(layer_index: int, spec: LayerCacheSpec) -> TorchScorer:
    if spec.method not in TORCH_SCORERS:
        raise ModelError(
            f"layer {layer_index} evicts by `{spec.method}`, which has no form in torch",
            hint=did_you_mean(spec.method, [*TORCH_SCORERS]),
        )
    return TORCH_SCORERS[spec.method](layer_index, spec)


def attention_modules(module: torch.nn.Module, layer_count: int) -> list[torch.nn.Module]:
    """Return the attentions of `module`, one for each layer of the graph; raises ModelError where these are not `layers`."""
    found = [one for one in module.modules() if "Attention" in type(one).__name__ and isinstance(_layer_index(one), int)]
    if sorted(map(_layer_index, found)) != [*range(layer_count)]:
        raise ModelError(
            f"of {layer_count} layers of the graph {len(found)} attentions were found in the module",
            hint="hold it to the PyTorch module without eviction",
        )
    return found


def cache_layer_for(attention: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CacheLayerMixin | None:
    """Return the layer of the cache that `attention` is given among its arguments, if any."""
    cache = next((one for one in (*args, *kwargs.values()) if isinstance(one, Cache)), None)
    at = _layer_index(attention)
    return cache.layers[at] if cache is not None and at < len(cache.layers) else None


def _register_hidden_state_hooks(module: torch.nn.Module, layer_count: int) -> None:
    """Let the layers of caches that are Watching see what goes into the attentions of `module`; others are left alone."""
    for one in attention_modules(module, layer_count):
        if _hidden_state_hook not in one._forward_pre_hooks.values():
            one.register_forward_pre_hook(_hidden_state_hook, with_kwargs=True)


def _layer_index(attention: torch.nn.Module) -> Any:
    return getattr(attention, "layer_idx", None)


def _hidden_state_hook(attention: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Show what `attention` is given to the layer of the cache; a hook before its forward."""
    layer = cache_layer_for(attention, args, kwargs)
    if not isinstance(layer, HiddenStateListener):
        return None
    mask = layer.on_hidden_state(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
    return None if mask is None else (args, {**kwargs, "attention_mask": mask})


def _sanitize(scores: torch.Tensor) -> torch.Tensor:
    """Return `scores` with the lowest number for what is none, and nothing infinite."""
    return scores.nan_to_num(-_FLOAT32_MAX).clamp(-_FLOAT32_MAX, _FLOAT32_MAX)


def _gather_rows(tensor: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return the rows `kept` (batch, kv_heads, kept) of `whole` (batch, kv_heads, rows, size)."""
    batch, heads, rows, size = tensor.shape
    first = torch.arange(batch * heads, device=indices.device).view(batch, heads, 1) * rows
    return tensor.reshape(-1, size).index_select(0, (first + indices).flatten()).view(*indices.shape, size)
