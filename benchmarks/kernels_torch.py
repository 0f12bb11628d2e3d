"""What the custom ops compute, in plain torch: what a user would write instead, and what the kernels are timed against.

Each function takes tensors by the names of the op's inputs, and its attributes, and returns the outputs by name. States are
written in place where torch can. They follow the references for inputs that do not tie and are finite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
Attributes = Mapping[str, float]
TorchReference = Callable[[Tensors, Attributes], dict[str, Tensor]]


def to_device(arrays: Mapping[str, np.ndarray[Any, Any]], device: str = "cuda") -> dict[str, Tensor]:
    """Return numpy arrays as tensors on `device`; bfloat16 goes by way of its bits."""
    found = {}
    for name, array in arrays.items():
        whole = np.ascontiguousarray(array)
        half = whole.dtype.name == "bfloat16"
        tensor = torch.from_numpy((whole.view(np.int16) if half else whole).copy())
        found[name] = (tensor.view(torch.bfloat16) if half else tensor).to(device)
    return found


def execution_modes(reference: TorchReference) -> dict[str, TorchReference]:
    """Return the ways to run a meaning: as it is, and compiled."""
    return {"torch eager": reference, "torch.compile": torch.compile(reference, dynamic=False)}


def kv_append_evict(x: Tensors, attributes: Attributes) -> dict[str, Tensor]:
    """Evict the lowest scores of the cache and the step together; see KVAppendEvict."""
    score, position, s = x["score"], x["position"], x["new_score"].shape[2]
    heads, slots = score.shape[1], score.shape[2]
    new_at = x["new_position"][:, None].expand(-1, heads, -1)
    at = torch.cat([position, new_at], 2)
    worth = torch.cat([score, x["new_score"]], 2)
    old = at <= new_at.amax(2, keepdim=True) - int(attributes["recent"])
    worth = torch.where((at >= max(0, int(attributes["sinks"]))) & old, worth, torch.inf)
    surplus = (at >= 0).sum(2, keepdim=True) - slots
    lowest, where = worth.topk(s, dim=2, largest=False)
    goes = (torch.arange(s, device=score.device) < surplus) & (lowest < torch.inf)
    stays = (at >= 0).scatter(2, where, (at.gather(2, where) >= 0) & ~goes)
    free, arrives = ~stays[..., :slots], stays[..., slots:]
    order = torch.where(free, 0, 1).argsort(dim=2, stable=True)[..., :s]
    rank = arrives.cumsum(2) - 1
    placed = arrives & (rank < free.sum(2, keepdim=True))
    slot = torch.where(placed, order.gather(2, rank.clamp(0, order.shape[2] - 1)), -1)
    # A token that is not placed writes what is there already, to a slot that no other takes.
    spare = torch.where(placed, slot, order[..., -1:])
    for name in ("k", "v"):
        index = spare[..., None].expand(-1, -1, -1, x[name].shape[3])
        x[name].scatter_(2, index, torch.where(placed[..., None], x[f"new_{name}"], x[name].gather(2, index)))
    score.scatter_(2, spare, torch.where(placed, x["new_score"], score.gather(2, spare)))
    position.scatter_(2, spare, torch.where(placed, new_at, position.gather(2, spare)))
    length = (stays[..., :slots].sum(2) + placed.sum(2))[:, 0]
    return {
        "k_out": x["k"], "v_out": x["v"], "score_out": score, "position_out": position,
        "length": length, "slot": slot.to(torch.int32),
    }  # fmt: skip


def kv_select(x: Tensors, attributes: Attributes) -> dict[str, Tensor]:
    """Keep the highest scores, sinks and recent tokens before all others; see KVSelect."""
    position, keep = x["position"], int(attributes["keep"])
    newest = position.amax(2, keepdim=True)
    held = position >= 0
    protected = held & ((position < int(attributes["sinks"])) | (position > newest - int(attributes["recent"])))
    worth = torch.where(protected, torch.inf, torch.where(held, x["score"], -torch.inf))
    chosen = worth.topk(keep, dim=2).indices
    last = torch.iinfo(torch.int32).max
    when, order = torch.where(held.gather(2, chosen), position.gather(2, chosen), last).sort(2)
    index = torch.where(when < last, chosen.gather(2, order), -1)
    return {"index": index.to(torch.int32), "length": held.sum(2)[:, 0].clamp(max=keep)}


def kv_compact(x: Tensors, attributes: Attributes) -> dict[str, Tensor]:
    """Gather the rows of `index`; see KVCompact."""
    index, slots = x["index"], x["position"].shape[2]
    found = index.clamp(0, slots - 1).long()
    at = x["position"].gather(2, found)
    held = (index >= 0) & (index < slots) & (at >= 0)
    rows = [x[name].gather(2, found[..., None].expand(-1, -1, -1, x[name].shape[3])) for name in ("k", "v")]
    k, v = (torch.where(held[..., None], row, torch.zeros((), dtype=row.dtype, device=row.device)) for row in rows)
    score = torch.where(held, x["score"].gather(2, found), 0.0)
    return {"k_out": k, "v_out": v, "score_out": score, "position_out": torch.where(held, at, -1)}


def kv_compact_rotary(x: Tensors, attributes: Attributes) -> dict[str, Tensor]:
    """Gather the rows of `index` and rotate the keys to their new positions; see KVCompactRotary."""
    index, count = x["index"], len(x["frequency"])
    plain = kv_compact(x, attributes)
    held = plain["position_out"] >= 0
    to = torch.arange(index.shape[2], device=index.device, dtype=torch.int32).expand_as(index)
    angle = (to - plain["position_out"]).to(torch.float64)[..., None] * x["frequency"]
    cos, sin = angle.cos().float(), angle.sin().float()
    key = plain["k_out"].float()
    one, other = (
        (key[..., 0 : 2 * count : 2], key[..., 1 : 2 * count : 2])
        if attributes["interleaved"]
        else (key[..., :count], key[..., count : 2 * count])
    )
    pairs = one * cos - other * sin, other * cos + one * sin
    turned = torch.stack(pairs, -1).flatten(-2) if attributes["interleaved"] else torch.cat(pairs, -1)
    plain["k_out"] = torch.cat([turned, key[..., 2 * count :]], -1).to(x["k"].dtype)
    plain["position_out"] = torch.where(held, to, -1)
    return plain


def quantize_fp8(x: Tensors, attributes: Attributes) -> dict[str, Tensor]:
    """See VectorQuantizeFp8."""
    wide = x["x"].float()
    scale = wide.abs().amax(-1) / 448
    codes = (wide / torch.where(scale > 0, scale, 1.0)[..., None]).to(torch.float8_e4m3fn).view(torch.int8)
    return {"codes": torch.where(codes == -128, 0, codes), "scale": scale}


def quantize_int8(x: Tensors, attributes: Attributes) -> dict[str, Tensor]:
    """See VectorQuantizeInt8."""
    wide = x["x"].float()
    scale = wide.abs().amax(-1) / 127
    return {"codes": (wide / torch.where(scale > 0, scale, 1.0)[..., None]).round().to(torch.int8), "scale": scale}


def _rotation_matrix(width: int, device: torch.device) -> Tensor:
    """Return H diag(s) of VectorQuantizeInt4, (D, D), orthonormal."""
    i = torch.arange(width, device=device)

    def odd(bits: Tensor) -> Tensor:
        for shift in (8, 4, 2, 1):
            bits = bits ^ (bits >> shift)
        return bits & 1

    signs = 1 - 2 * odd(i & (i >> 1))
    return (1 - 2 * odd(i[:, None] & i)) * signs / width**0.5


_INT4_LEVELS = (0.12841796875, 0.387939453125, 0.65673828125, 0.9423828125, 1.255859375, 1.6181640625, 2.068359375, 2.732421875)


def quantize_int4(x: Tensors, attributes: Attributes) -> dict[str, Tensor]:
    """See VectorQuantizeInt4."""
    wide = x["x"].float()
    width = wide.shape[-1]
    norm = torch.linalg.vector_norm(wide, dim=-1)
    turned = wide @ _rotation_matrix(width, wide.device).T * (width**0.5 / torch.where(norm > 0, norm, 1.0))[..., None]
    levels = torch.tensor(_INT4_LEVELS, device=wide.device)
    code = torch.bucketize(turned.abs(), (levels[1:] + levels[:-1]) / 2) + 8 * (turned < 0)
    packed = code[..., ::2] + 16 * code[..., 1::2]
    return {"codes": packed.to(torch.uint8).view(torch.int8), "scale": norm / width**0.5}


def dequantize_fp8(x: Tensors, attributes: Attributes) -> dict[str, Tensor]:
    """See VectorDequantizeFp8."""
    return {"x": (x["codes"].view(torch.float8_e4m3fn).float() * x["scale"][..., None]).to(x["like"].dtype)}


def dequantize_int8(x: Tensors, attributes: Attributes) -> dict[str, Tensor]:
    """See VectorDequantizeInt8."""
    return {"x": (x["codes"].float() * x["scale"][..., None]).to(x["like"].dtype)}


def dequantize_int4(x: Tensors, attributes: Attributes) -> dict[str, Tensor]:
    """See VectorDequantizeInt4."""
    value = _decode_int4(x["codes"])
    return {"x": (value @ _rotation_matrix(value.shape[-1], value.device) * x["scale"][..., None]).to(x["like"].dtype)}


def dequantize_rotated_int4(x: Tensors, attributes: Attributes) -> dict[str, Tensor]:
    """See VectorDequantizeRotatedInt4."""
    return {"x": (_decode_int4(x["codes"]) * x["scale"][..., None]).to(x["like"].dtype)}


def _decode_int4(codes: Tensor) -> Tensor:
    both = codes.view(torch.uint8).int()
    code = torch.stack([both & 15, both >> 4], -1).flatten(-2)
    return torch.tensor([*_INT4_LEVELS, *(-level for level in _INT4_LEVELS)], device=code.device)[code]


def _mask_unfilled(x: Tensors, score: Tensor) -> dict[str, Tensor]:
    used = torch.arange(score.shape[2], device=score.device) < x["filled"][:, None, None]
    return {"score": torch.where(used, score, -torch.inf)}


def page_score_bound(x: Tensors, attributes: Attributes) -> dict[str, Tensor]:
    """See PageScoreBound."""
    query, low, high = (x[name].float() for name in ("query", "low", "high"))
    bound = query.clamp(min=0) @ high.transpose(2, 3) + query.clamp(max=0) @ low.transpose(2, 3)
    return _mask_unfilled(x, bound.amax(2))


def page_score_cosine(x: Tensors, attributes: Attributes) -> dict[str, Tensor]:
    """See PageScoreCosine."""
    query, centroid = (torch.nn.functional.normalize(x[name].float(), dim=-1) for name in ("query", "centroid"))
    return _mask_unfilled(x, (query @ centroid.transpose(2, 3)).amax(2))


def token_match(x: Tensors, attributes: Attributes) -> dict[str, Tensor]:
    """Cosines of two lists of tokens, all of them in memory; see TokenMatch."""
    unit = torch.nn.functional.normalize(x["metric"].float(), dim=-1)

    def rows(name: str) -> Tensor:
        return unit.gather(1, x[name].long()[..., None].expand(-1, -1, unit.shape[2]))

    def real(name: str) -> Tensor:
        return x["size"].gather(1, x[name].long()) > 0

    cosine = rows("a") @ rows("b").transpose(1, 2)
    a, b = real("a")[:, :, None], real("b")[:, None]
    cosine = torch.where(a & b, cosine, torch.where(a, -2.0, torch.where(b, 2.0, 3.0)))
    similarity, best = cosine.max(2)
    return {"partner": x["b"].gather(1, best), "similarity": similarity}


def token_energy(x: Tensors, attributes: Attributes) -> dict[str, Tensor]:
    """Cosines of all tokens with all, all of them in memory; see TokenEnergy."""
    unit = torch.nn.functional.normalize(x["metric"].float(), dim=-1)
    real = x["size"] > 0
    margin, alpha = float(attributes["margin"]), float(attributes["alpha"])
    cosine = unit @ unit.transpose(1, 2)
    like = torch.where(cosine >= margin, cosine, alpha * ((cosine - margin).exp() - 1))
    others = real[:, None] & ~torch.eye(like.shape[1], dtype=torch.bool, device=like.device)
    mean = torch.where(others, like, 0.0).sum(2) / others.sum(2).clamp(min=1)
    return {"energy": torch.where(real, mean, 2.0)}


def token_assign(x: Tensors, attributes: Attributes) -> dict[str, Tensor]:
    """See TokenAssign."""
    chosen = x["similarity"].topk(int(attributes["merged"]), dim=1).indices
    gone, partner = x["a"].gather(1, chosen).long(), x["partner"].gather(1, chosen).long()
    stays = torch.ones_like(x["size"], dtype=torch.int64).scatter_(1, gone, 0)
    slot = stays.cumsum(1) - 1
    return {"target": slot.scatter(1, gone, slot.gather(1, partner)).to(torch.int32)}


def token_merge(x: Tensors, attributes: Attributes) -> dict[str, Tensor]:
    """See TokenMerge."""
    slots = x["size"].shape[1] - int(attributes["merged"])
    size = torch.where(x["size"] > 0, x["size"], 0.0)
    value = torch.where(size[..., None] > 0, x["x"].float(), 0.0) * size[..., None]
    target = x["target"].long()
    total = torch.zeros(size.shape[0], slots, device=size.device).scatter_add_(1, target, size)
    sums = torch.zeros(size.shape[0], slots, value.shape[2], device=size.device)
    sums.scatter_add_(1, target[..., None].expand_as(value), value)
    return {"y": (sums / total.clamp(min=1e-30)[..., None]).to(x["x"].dtype), "size_out": total}


def token_unmerge(x: Tensors, attributes: Attributes) -> dict[str, Tensor]:
    """See TokenUnmerge."""
    return {"x": x["y"].gather(1, x["target"].long()[..., None].expand(-1, -1, x["y"].shape[2]))}


TORCH_REFERENCES: dict[str, TorchReference] = {
    "KVAppendEvict": kv_append_evict,
    "KVSelect": kv_select,
    "KVCompact": kv_compact,
    "KVCompactRotary": kv_compact_rotary,
    "VectorQuantizeFp8": quantize_fp8,
    "VectorQuantizeInt8": quantize_int8,
    "VectorQuantizeInt4": quantize_int4,
    "VectorDequantizeFp8": dequantize_fp8,
    "VectorDequantizeInt8": dequantize_int8,
    "VectorDequantizeInt4": dequantize_int4,
    "VectorDequantizeRotatedInt4": dequantize_rotated_int4,
    "PageScoreBound": page_score_bound,
    "PageScoreCosine": page_score_cosine,
    "TokenMatch": token_match,
    "TokenEnergy": token_energy,
    "TokenAssign": token_assign,
    "TokenMerge": token_merge,
    "TokenUnmerge": token_unmerge,
}
