"""The custom ops in plain torch: the baselines of the kernel benchmark.

Each function takes tensors by the names of the op's inputs, and its attributes, and returns the outputs by name. States are
updated in place if torch supports it. The results are those of the references for finite inputs without ties.
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
    """Return NumPy arrays as tensors on `device`; bfloat16 is transferred as int16."""
    tensors = {}
    for name, array in arrays.items():
        contiguous = np.ascontiguousarray(array)
        is_bfloat16 = contiguous.dtype.name == "bfloat16"
        tensor = torch.from_numpy((contiguous.view(np.int16) if is_bfloat16 else contiguous).copy())
        tensors[name] = (tensor.view(torch.bfloat16) if is_bfloat16 else tensor).to(device)
    return tensors


def execution_modes(reference: TorchReference) -> dict[str, TorchReference]:
    """Return the execution modes of a reference: eager and compiled."""
    return {"torch eager": reference, "torch.compile": torch.compile(reference, dynamic=False)}


def kv_append_evict(x: Tensors, attributes: Attributes) -> dict[str, Tensor]:
    """Append a step and evict the tokens with the lowest scores; see KVAppendEvict."""
    score, position, s = x["score"], x["position"], x["new_score"].shape[2]
    heads, slots = score.shape[1], score.shape[2]
    new_position = x["new_position"][:, None].expand(-1, heads, -1)
    positions = torch.cat([position, new_position], 2)
    if window := int(attributes["window"]):
        positions = torch.where(positions <= new_position.amax(2, keepdim=True) - window, -1, positions)
    priority = torch.cat([score, x["new_score"]], 2)
    is_old = positions <= new_position.amax(2, keepdim=True) - int(attributes["recent"])
    priority = torch.where((positions >= max(0, int(attributes["sinks"]))) & is_old, priority, torch.inf)
    surplus = (positions >= 0).sum(2, keepdim=True) - slots
    lowest, index = priority.topk(s, dim=2, largest=False)
    is_evicted = (torch.arange(s, device=score.device) < surplus) & (lowest < torch.inf)
    is_kept = (positions >= 0).scatter(2, index, (positions.gather(2, index) >= 0) & ~is_evicted)
    is_free, is_new = ~is_kept[..., :slots], is_kept[..., slots:]
    free_slots = torch.where(is_free, 0, 1).argsort(dim=2, stable=True)[..., :s]
    rank = is_new.cumsum(2) - 1
    is_placed = is_new & (rank < is_free.sum(2, keepdim=True))
    slot = torch.where(is_placed, free_slots.gather(2, rank.clamp(0, free_slots.shape[2] - 1)), -1)
    # A token that is not placed rewrites the current content of a slot that no other token uses.
    target = torch.where(is_placed, slot, free_slots[..., -1:])
    for name in ("k", "v"):
        index = target[..., None].expand(-1, -1, -1, x[name].shape[3])
        x[name].scatter_(2, index, torch.where(is_placed[..., None], x[f"new_{name}"], x[name].gather(2, index)))
    score.scatter_(2, target, torch.where(is_placed, x["new_score"], score.gather(2, target)))
    position.scatter_(2, target, torch.where(is_placed, new_position, position.gather(2, target)))
    length = (is_kept[..., :slots].sum(2) + is_placed.sum(2))[:, 0]
    return {
        "k_out": x["k"], "v_out": x["v"], "score_out": score, "position_out": position,
        "length": length, "slot": slot.to(torch.int32),
    }  # fmt: skip


def kv_select(x: Tensors, attributes: Attributes) -> dict[str, Tensor]:
    """Select the tokens with the highest scores, sinks and recent tokens first; see KVSelect."""
    position, keep = x["position"], int(attributes["keep"])
    newest = position.amax(2, keepdim=True)
    is_used = position >= 0
    is_protected = is_used & ((position < int(attributes["sinks"])) | (position > newest - int(attributes["recent"])))
    priority = torch.where(is_protected, torch.inf, torch.where(is_used, x["score"], -torch.inf))
    selected = priority.topk(keep, dim=2).indices
    unused = torch.iinfo(torch.int32).max
    positions, order = torch.where(is_used.gather(2, selected), position.gather(2, selected), unused).sort(2)
    index = torch.where(positions < unused, selected.gather(2, order), -1)
    return {"index": index.to(torch.int32), "length": is_used.sum(2)[:, 0].clamp(max=keep)}


def kv_compact(x: Tensors, attributes: Attributes) -> dict[str, Tensor]:
    """Gather the rows of `index`; see KVCompact."""
    index, slots = x["index"], x["position"].shape[2]
    slot = index.clamp(0, slots - 1).long()
    position = x["position"].gather(2, slot)
    is_used = (index >= 0) & (index < slots) & (position >= 0)
    rows = [x[name].gather(2, slot[..., None].expand(-1, -1, -1, x[name].shape[3])) for name in ("k", "v")]
    k, v = (torch.where(is_used[..., None], row, torch.zeros((), dtype=row.dtype, device=row.device)) for row in rows)
    score = torch.where(is_used, x["score"].gather(2, slot), 0.0)
    return {"k_out": k, "v_out": v, "score_out": score, "position_out": torch.where(is_used, position, -1)}


def kv_compact_rotary(x: Tensors, attributes: Attributes) -> dict[str, Tensor]:
    """Gather the rows of `index` and rotate the keys to their new positions; see KVCompactRotary."""
    index, count = x["index"], len(x["frequency"])
    outputs = kv_compact(x, attributes)
    is_used = outputs["position_out"] >= 0
    new_position = torch.arange(index.shape[2], device=index.device, dtype=torch.int32).expand_as(index)
    angle = (new_position - outputs["position_out"]).to(torch.float64)[..., None] * x["frequency"]
    cos, sin = angle.cos().float(), angle.sin().float()
    key = outputs["k_out"].float()
    first, second = (
        (key[..., 0 : 2 * count : 2], key[..., 1 : 2 * count : 2])
        if attributes["interleaved"]
        else (key[..., :count], key[..., count : 2 * count])
    )
    pairs = first * cos - second * sin, second * cos + first * sin
    rotated = torch.stack(pairs, -1).flatten(-2) if attributes["interleaved"] else torch.cat(pairs, -1)
    outputs["k_out"] = torch.cat([rotated, key[..., 2 * count :]], -1).to(x["k"].dtype)
    outputs["position_out"] = torch.where(is_used, new_position, -1)
    return outputs


def quantize_fp8(x: Tensors, attributes: Attributes) -> dict[str, Tensor]:
    """Compute VectorQuantizeFp8."""
    values = x["x"].float()
    scale = values.abs().amax(-1) / 448
    codes = (values / torch.where(scale > 0, scale, 1.0)[..., None]).to(torch.float8_e4m3fn).view(torch.int8)
    return {"codes": torch.where(codes == -128, 0, codes), "scale": scale}


def quantize_int8(x: Tensors, attributes: Attributes) -> dict[str, Tensor]:
    """Compute VectorQuantizeInt8."""
    values = x["x"].float()
    scale = values.abs().amax(-1) / 127
    return {"codes": (values / torch.where(scale > 0, scale, 1.0)[..., None]).round().to(torch.int8), "scale": scale}


def _rotation_matrix(width: int, device: torch.device) -> Tensor:
    """Return H diag(s) of VectorQuantizeInt4, (D, D), orthonormal."""
    i = torch.arange(width, device=device)

    def parity(bits: Tensor) -> Tensor:
        for shift in (8, 4, 2, 1):
            bits = bits ^ (bits >> shift)
        return bits & 1

    signs = 1 - 2 * parity(i & (i >> 1))
    return (1 - 2 * parity(i[:, None] & i)) * signs / width**0.5


_INT4_LEVELS = (0.12841796875, 0.387939453125, 0.65673828125, 0.9423828125, 1.255859375, 1.6181640625, 2.068359375, 2.732421875)


def quantize_int4(x: Tensors, attributes: Attributes) -> dict[str, Tensor]:
    """Compute VectorQuantizeInt4."""
    values = x["x"].float()
    width = values.shape[-1]
    norm = torch.linalg.vector_norm(values, dim=-1)
    rotated = values @ _rotation_matrix(width, values.device).T * (width**0.5 / torch.where(norm > 0, norm, 1.0))[..., None]
    levels = torch.tensor(_INT4_LEVELS, device=values.device)
    code = torch.bucketize(rotated.abs(), (levels[1:] + levels[:-1]) / 2) + 8 * (rotated < 0)
    packed = code[..., ::2] + 16 * code[..., 1::2]
    return {"codes": packed.to(torch.uint8).view(torch.int8), "scale": norm / width**0.5}


def dequantize_fp8(x: Tensors, attributes: Attributes) -> dict[str, Tensor]:
    """Compute VectorDequantizeFp8."""
    return {"x": (x["codes"].view(torch.float8_e4m3fn).float() * x["scale"][..., None]).to(x["like"].dtype)}


def dequantize_int8(x: Tensors, attributes: Attributes) -> dict[str, Tensor]:
    """Compute VectorDequantizeInt8."""
    return {"x": (x["codes"].float() * x["scale"][..., None]).to(x["like"].dtype)}


def dequantize_int4(x: Tensors, attributes: Attributes) -> dict[str, Tensor]:
    """Compute VectorDequantizeInt4."""
    value = _decode_int4(x["codes"])
    return {"x": (value @ _rotation_matrix(value.shape[-1], value.device) * x["scale"][..., None]).to(x["like"].dtype)}


def dequantize_rotated_int4(x: Tensors, attributes: Attributes) -> dict[str, Tensor]:
    """Compute VectorDequantizeRotatedInt4."""
    return {"x": (_decode_int4(x["codes"]) * x["scale"][..., None]).to(x["like"].dtype)}


def _decode_int4(codes: Tensor) -> Tensor:
    packed = codes.view(torch.uint8).int()
    code = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    return torch.tensor([*_INT4_LEVELS, *(-level for level in _INT4_LEVELS)], device=code.device)[code]


def _mask_unfilled(x: Tensors, score: Tensor) -> dict[str, Tensor]:
    is_filled = torch.arange(score.shape[2], device=score.device) < x["filled"][:, None, None]
    return {"score": torch.where(is_filled, score, -torch.inf)}


def page_score_bound(x: Tensors, attributes: Attributes) -> dict[str, Tensor]:
    """Compute PageScoreBound."""
    query, low, high = (x[name].float() for name in ("query", "low", "high"))
    bound = query.clamp(min=0) @ high.transpose(2, 3) + query.clamp(max=0) @ low.transpose(2, 3)
    return _mask_unfilled(x, bound.amax(2))


def page_score_cosine(x: Tensors, attributes: Attributes) -> dict[str, Tensor]:
    """Compute PageScoreCosine."""
    query, centroid = (torch.nn.functional.normalize(x[name].float(), dim=-1) for name in ("query", "centroid"))
    return _mask_unfilled(x, (query @ centroid.transpose(2, 3)).amax(2))


def token_match(x: Tensors, attributes: Attributes) -> dict[str, Tensor]:
    """Compute the full matrix of cosines of two lists of tokens; see TokenMatch."""
    unit = torch.nn.functional.normalize(x["metric"].float(), dim=-1)

    def rows(name: str) -> Tensor:
        return unit.gather(1, x[name].long()[..., None].expand(-1, -1, unit.shape[2]))

    def is_token(name: str) -> Tensor:
        return x["size"].gather(1, x[name].long()) > 0

    cosine = rows("a") @ rows("b").transpose(1, 2)
    a, b = is_token("a")[:, :, None], is_token("b")[:, None]
    cosine = torch.where(a & b, cosine, torch.where(a, -2.0, torch.where(b, 2.0, 3.0)))
    similarity, best = cosine.max(2)
    return {"partner": x["b"].gather(1, best), "similarity": similarity}


def token_energy(x: Tensors, attributes: Attributes) -> dict[str, Tensor]:
    """Compute the full matrix of cosines of all pairs of tokens; see TokenEnergy."""
    unit = torch.nn.functional.normalize(x["metric"].float(), dim=-1)
    is_token = x["size"] > 0
    margin, alpha = float(attributes["margin"]), float(attributes["alpha"])
    cosine = unit @ unit.transpose(1, 2)
    similarity = torch.where(cosine >= margin, cosine, alpha * ((cosine - margin).exp() - 1))
    others = is_token[:, None] & ~torch.eye(similarity.shape[1], dtype=torch.bool, device=similarity.device)
    mean = torch.where(others, similarity, 0.0).sum(2) / others.sum(2).clamp(min=1)
    return {"energy": torch.where(is_token, mean, 2.0)}


def token_assign(x: Tensors, attributes: Attributes) -> dict[str, Tensor]:
    """Compute TokenAssign."""
    merged = x["similarity"].topk(x["size"].shape[1] - len(x["slots"]), dim=1).indices
    source, partner = x["a"].gather(1, merged).long(), x["partner"].gather(1, merged).long()
    is_kept = torch.ones_like(x["size"], dtype=torch.int64).scatter_(1, source, 0)
    slot = is_kept.cumsum(1) - 1
    return {"target": slot.scatter(1, source, slot.gather(1, partner)).to(torch.int32)}


def token_merge(x: Tensors, attributes: Attributes) -> dict[str, Tensor]:
    """Compute TokenMerge."""
    slots = len(x["slots"])
    size = torch.where(x["size"] > 0, x["size"], 0.0)
    value = torch.where(size[..., None] > 0, x["x"].float(), 0.0) * size[..., None]
    target = x["target"].long()
    total = torch.zeros(size.shape[0], slots, device=size.device).scatter_add_(1, target, size)
    sums = torch.zeros(size.shape[0], slots, value.shape[2], device=size.device)
    sums.scatter_add_(1, target[..., None].expand_as(value), value)
    return {"y": (sums / total.clamp(min=1e-30)[..., None]).to(x["x"].dtype), "size_out": total}


def token_unmerge(x: Tensors, attributes: Attributes) -> dict[str, Tensor]:
    """Compute TokenUnmerge."""
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
