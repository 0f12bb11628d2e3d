# mypy: ignore-errors
"""Reference of KVAppendEvict in standard ONNX ops."""

from onnxscript import INT64, script
from onnxscript import opset21 as op
from onnxscript.values import Opset

LARGEST = 3.4028234663852886e38
INF = float("inf")


@script(Opset("ryzen", 1), default_opset=op)
def KVAppendEvict(k, v, score, position, new_k, new_v, new_score, new_position, sinks: int, recent: int, window: int):
    """Append a step by moving rows, for every element type; `op.py` defines the semantics."""
    last = op.Constant(value_ints=[-1])
    step = op.Shape(new_score)  # B H S
    chunk = op.Shape(new_score, start=2, end=3)
    capacity = op.Shape(score, start=2, end=3)

    # Tokens behind the window count as absent: position -1.
    windowed = op.Greater(op.Constant(value_int=window), op.Constant(value_int=0))
    held_at = op.Cast(position, to=INT64.dtype)
    new_at = op.Expand(op.Unsqueeze(op.Cast(new_position, to=INT64.dtype), op.Constant(value_ints=[1])), step)
    now = op.ReduceMax(new_at, last, keepdims=1)
    unseen_until = op.Where(windowed, op.Sub(now, op.Constant(value_int=window)), op.Constant(value_int=-1))
    at = op.Concat(held_at, new_at, axis=2)
    at = op.Where(op.LessOrEqual(at, unseen_until), op.Constant(value_int=-1), at)

    # Eviction candidates carry their score, all other tokens +inf.
    worth = op.Concat(score, new_score, axis=2)
    worth = op.Where(op.IsNaN(worth), op.Constant(value_float=-INF), worth)
    worth = op.Min(worth, op.Constant(value_float=LARGEST))
    old = op.LessOrEqual(at, op.Sub(now, op.Constant(value_int=recent)))
    candidate = op.And(op.GreaterOrEqual(at, op.Constant(value_int=sinks)), old)
    worth = op.Where(candidate, worth, op.Constant(value_float=INF))

    # The `surplus` lowest candidates are evicted; ties in slot order.
    occupied = op.Cast(op.GreaterOrEqual(at, op.Constant(value_int=0)), to=INT64.dtype)
    tokens = op.ReduceSum(occupied, last, keepdims=1)
    surplus = op.Sub(tokens, capacity)
    lowest, place = op.TopK(worth, chunk, axis=2, largest=0, sorted=1)
    rank = op.Range(op.Constant(value_int=0), op.Squeeze(chunk), op.Constant(value_int=1))
    goes = op.And(op.Less(rank, surplus), op.Less(lowest, op.Constant(value_float=INF)))
    evicted = op.ScatterElements(op.Mul(occupied, op.Constant(value_int=0)), place, op.Cast(goes, to=INT64.dtype), axis=2)
    stays = op.Mul(occupied, op.Sub(op.Constant(value_int=1), evicted))

    # The j-th new token that is not evicted takes the j-th free slot; free slots sort first, by index.
    total = op.Add(capacity, chunk)
    number = op.Range(op.Constant(value_int=0), op.Squeeze(total), op.Constant(value_int=1))
    free, found_at = op.TopK(op.Add(op.Mul(stays, total), number), chunk, axis=2, largest=0, sorted=1)
    arrives = op.Slice(stays, capacity, [9223372036854775807], [2])
    arrival_rank = op.Sub(op.CumSum(arrives, op.Constant(value_int=2)), arrives)
    target = op.GatherElements(free, arrival_rank, axis=2)
    placed = op.And(op.Greater(arrives, op.Constant(value_int=0)), op.Less(target, capacity))
    target = op.Where(placed, target, op.Constant(value_int=-1))

    # A token without a slot repeats the write of the first token with one; if there is none, slot 0 is rewritten unchanged.
    turn = op.Where(placed, rank, chunk)
    first = op.ReduceMin(turn, last, keepdims=1)
    some = op.Less(first, chunk)
    source = op.Where(some, op.Add(op.Where(placed, rank, first), op.Constant(value_int=1)), op.Constant(value_int=0))
    written = op.GatherElements(op.Concat(op.Mul(now, op.Constant(value_int=0)), target, axis=2), source, axis=2)

    start = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    axis = op.Constant(value_ints=[2])
    scores = op.GatherElements(op.Concat(op.Slice(score, start, one, axis), new_score, axis=2), source, axis=2)
    score_out = op.ScatterElements(score, written, scores, axis=2)
    positions = op.GatherElements(op.Concat(op.Slice(held_at, start, one, axis), new_at, axis=2), source, axis=2)
    position_out = op.ScatterElements(position, written, op.Cast(positions, to=6), axis=2)
    k_from = op.Expand(op.Unsqueeze(source, [3]), op.Shape(new_k))
    k_rows = op.GatherElements(op.Concat(op.Slice(k, start, one, axis), new_k, axis=2), k_from, axis=2)
    k_out = op.ScatterElements(k, op.Expand(op.Unsqueeze(written, [3]), op.Shape(new_k)), k_rows, axis=2)
    v_from = op.Expand(op.Unsqueeze(source, [3]), op.Shape(new_v))
    v_rows = op.GatherElements(op.Concat(op.Slice(v, start, one, axis), new_v, axis=2), v_from, axis=2)
    v_out = op.ScatterElements(v, op.Expand(op.Unsqueeze(written, [3]), op.Shape(new_v)), v_rows, axis=2)

    # The number of cached tokens.
    length = op.Squeeze(op.Slice(op.Min(tokens, capacity), start, one, one), op.Constant(value_ints=[1, 2]))
    slot = op.Cast(target, to=6)
    return k_out, v_out, score_out, position_out, length, slot
