"""The token-merging ops combined: a ToMe step, a PiToMe step, and properties of every merge step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from support.op_implementations import Arrays, OpImplementations

from ryzen_compile.backends.api import BuildRequest
from ryzen_compile.backends.onnxruntime.backend import OnnxRuntime
from ryzen_compile.backends.tensorrt_rtx.backend import BACKEND
from ryzen_compile.kernels import Specialization
from ryzen_compile.ops.equivalence import cast_inputs
from ryzen_compile.progress import SilentProgress
from ryzen_compile.registry import find_op
from ryzen_compile.spec.dtypes import numpy_dtype
from ryzen_compile.spec.profile import Profile
from ryzen_compile.spec.target import parse_targets

Array = np.ndarray[Any, Any]
Run = Callable[..., Arrays]
DTYPES = ("float32", "float16", "bfloat16")
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}


@pytest.fixture(params=["reference", "kernel"])
def run(request: pytest.FixtureRequest, implementations: OpImplementations) -> Run:
    """Return a function that runs one implementation of an op: run(name, dtype, attributes, inputs)."""

    def run_op(name: str, dtype: str, attributes: Mapping[str, float], inputs: Arrays) -> Arrays:
        op = find_op(name)
        type_bindings = dict.fromkeys(op.type_variables, dtype)
        arrays = cast_inputs(op, type_bindings, inputs)
        if request.param == "reference":
            return implementations.references.run(op, type_bindings, attributes, arrays)
        bound = op.bind_dims({name: array.shape for name, array in arrays.items()}, attributes)
        sizes = {name: size for name, size in bound.items() if name not in attributes}
        return implementations.interpreter.run(Specialization(op, type_bindings, attributes, sizes), arrays)

    return run_op


def cast_to(array: Array, dtype: str) -> Array:
    """Return `array` in the element type of the op's tensors."""
    return array.astype(numpy_dtype(dtype))


def merge_step(run: Run, dtype: str, x: Array, metric: Array, size: Array, a: Array, b: Array, merged: int) -> dict[str, Array]:
    """Return `y`, `size_out` and `target` of a merge step with the lists a and b."""
    matched = run("TokenMatch", dtype, {}, {"metric": metric, "size": size, "a": a, "b": b})
    slots = np.zeros(size.shape[1] - merged, np.int32)
    assigned = run("TokenAssign", dtype, {}, {"size": size, "a": a, **matched, "slots": slots})
    return {**run("TokenMerge", dtype, {}, {"x": x, "size": size, **assigned, "slots": slots}), **assigned}


def alternating_lists(sequences: int, tokens: int, first: int = 0) -> tuple[Array, Array]:
    """Return ToMe's lists: alternating tokens, starting with `first`."""
    both = np.tile(np.arange(first, tokens, dtype=np.int32), (sequences, 1))
    return both[:, 0::2], both[:, 1::2]


def tome_oracle(x: Array, metric: Array, size: Array, merged: int) -> tuple[list[Array], list[float]]:
    """Return the rows and sizes of the remaining tokens of one sequence, in sequence order, as in the ToMe paper.

    Tokens are assigned to A and B alternately. Each token of A has an edge to the most similar token of B. The `merged` most
    similar edges are kept, and the tokens that they connect are averaged, weighted by size.
    """
    unit = metric / np.linalg.norm(metric, axis=1, keepdims=True)
    side_a, side_b = [*range(0, len(x), 2)], [*range(1, len(x), 2)]
    edges = []
    for s in side_a:
        similarities = [float(unit[s] @ unit[t]) for t in side_b]
        edges.append((max(similarities), s, side_b[int(np.argmax(similarities))]))
    edges.sort(reverse=True)
    clusters = {t: [t] for t in range(len(x))}
    for _, s, t in edges[:merged]:
        clusters[t] += clusters.pop(s)
    means = [np.average(x[tokens], axis=0, weights=size[tokens]) for _, tokens in sorted(clusters.items())]
    return means, [float(size[tokens].sum()) for _, tokens in sorted(clusters.items())]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("merged", [0, 1, 6, 11])
def test_alternating_lists_reproduce_tome(run: Run, dtype: str, merged: int) -> None:
    random = np.random.default_rng(merged)
    x, metric = random.normal(size=(2, 23, 12)), random.normal(size=(2, 23, 16))
    size = random.integers(1, 6, size=(2, 23)).astype(np.float64)
    x, metric = cast_to(x, dtype), cast_to(metric, dtype)
    outputs = merge_step(run, dtype, x, metric, size, *alternating_lists(2, 23), merged)
    for sequence in range(2):
        float64 = x[sequence].astype(np.float64), metric[sequence].astype(np.float64)
        means, sizes = tome_oracle(*float64, size[sequence], merged)
        assert np.abs(outputs["y"][sequence].astype(np.float64) - np.stack(means)).max() < TOLERANCE[dtype]
        assert outputs["size_out"][sequence].tolist() == sizes


@pytest.mark.parametrize("dtype", DTYPES)
def test_lists_by_energy_reproduce_pitome(run: Run, dtype: str) -> None:
    """With a cluster of similar tokens among dissimilar ones, only tokens of the cluster are merged."""
    random = np.random.default_rng(0)
    merged, cluster_size, tokens = 5, 12, 30
    cluster = np.sort(random.permutation(tokens)[:cluster_size])
    metric = random.normal(size=(1, tokens, 64))
    metric[0, cluster] = random.normal(size=64) + 0.2 * random.normal(size=(cluster_size, 64))
    x, size = random.normal(size=(1, tokens, 8)), np.ones((1, tokens))
    energy = run("TokenEnergy", dtype, {"margin": 0.45, "alpha": 1.0}, {"metric": metric, "size": size})["energy"]
    # The 2 * merged tokens of highest energy in descending order; a are the even ranks, b the odd ranks.
    top = np.argsort(-energy[0], kind="stable")[: 2 * merged].astype(np.int32)
    assert {*top.tolist()} <= {*cluster.tolist()}
    a, b = top[None, 0::2], top[None, 1::2]
    outputs = merge_step(run, dtype, x, metric, size, a, b, merged)

    unit = metric[0] / np.linalg.norm(metric[0], axis=1, keepdims=True)
    rows = cast_to(x[0], dtype)
    remaining = [t for t in range(tokens) if t not in a[0]]
    sources = {t: [t] for t in remaining}
    for s in a[0]:
        sources[int(b[0][int(np.argmax([unit[s] @ unit[t] for t in b[0]]))])].append(int(s))
    for slot, t in enumerate(remaining):
        if t not in b[0]:
            assert outputs["y"][0, slot].tobytes() == rows[t].tobytes()
        mean = rows[sources[t]].astype(np.float64).mean(axis=0)
        assert np.abs(outputs["y"][0, slot].astype(np.float64) - mean).max() < TOLERANCE[dtype]
        assert outputs["size_out"][0, slot] == len(sources[t])


def test_identical_tokens_are_merged_first(run: Run) -> None:
    """Their mean is the token itself."""
    for even, odd in ((4, 9), (18, 1)):
        random = np.random.default_rng(even)
        metric = random.normal(size=(1, 20, 32))
        metric[0, even] = 3 * metric[0, odd]
        x, size = random.normal(size=(1, 20, 8)), np.ones((1, 20))
        x[0, even] = x[0, odd]
        outputs = merge_step(run, "float16", x, metric, size, *alternating_lists(1, 20), 1)
        assert outputs["target"][0, even] == outputs["target"][0, odd]
        slot = outputs["target"][0, odd]
        assert outputs["size_out"][0].tolist() == [2.0 if m == slot else 1.0 for m in range(19)]
        assert outputs["y"][0, slot].tobytes() == x[0, odd].astype(np.float16).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_is_merged_first_and_changes_no_token(run: Run, dtype: str) -> None:
    """If `merged` is the number of padding tokens in `a`, real tokens are bitwise unchanged for any padding values."""
    random = np.random.default_rng(0)
    x, metric, size = random.normal(size=(2, 24, 5)), random.normal(size=(2, 24, 16)), np.full((2, 24), 3.0)
    size[0, 12:], size[1, 10:] = 0.0, 0.0
    x[size == 0], metric[size == 0] = np.nan, np.inf
    outputs = merge_step(run, dtype, x, metric, size, *alternating_lists(2, 24), 6)
    real = cast_to(x, dtype)
    for sequence, count in enumerate((12, 10)):
        assert outputs["target"][sequence, :count].tolist() == [*range(count)]
        assert outputs["y"][sequence, :count].tobytes() == real[sequence, :count].tobytes()
        assert not outputs["y"][sequence, count:].any()
        assert outputs["size_out"][sequence].tolist() == [3.0] * count + [0.0] * (18 - count)


def test_tokens_in_neither_list_are_unchanged(run: Run) -> None:
    """A class token at the start, and a token in the middle that is identical to another."""
    random = np.random.default_rng(0)
    x, metric, size = random.normal(size=(1, 21, 5)), random.normal(size=(1, 21, 16)), np.full((1, 21), 49.0)
    metric[0, 0] = metric[0, 1]
    metric[0, 10] = metric[0, 11]
    a, b = alternating_lists(1, 21, first=1)
    a, b = np.where(a == 10, a[:, :1], a)[:, 1:], np.where(b == 10, b[:, :1], b)[:, 1:]
    assert 0 not in a
    assert 10 not in (*a[0], *b[0])
    outputs = merge_step(run, "float32", x, metric, size, a, b, a.shape[1])
    for token in (0, 10):
        slot = outputs["target"][0, token]
        assert outputs["y"][0, slot].tobytes() == x[0, token].astype(np.float32).tobytes()
        assert outputs["size_out"][0, slot] == 49.0
        assert (outputs["target"][0] == slot).sum() == 1
    assert outputs["target"][0, 0] == 0


def test_sequences_are_independent(run: Run) -> None:
    random = np.random.default_rng(0)
    x, metric = random.normal(size=(4, 18, 5)), random.normal(size=(4, 18, 16))
    size = random.integers(0, 4, size=(4, 18)).astype(np.float64)
    order = [2, 0, 3, 1]
    lists = alternating_lists(4, 18)
    original = merge_step(run, "float16", x, metric, size, *lists, 5)
    permuted = merge_step(run, "float16", x[order], metric[order], size[order], *lists, 5)
    for name, array in original.items():
        assert array[order].tobytes() == permuted[name].tobytes()


def test_consecutive_steps_preserve_tokens_and_are_undone_in_reverse_order(run: Run) -> None:
    random = np.random.default_rng(0)
    x, size = random.normal(size=(2, 32, 16)), np.ones((2, 32))
    size[1, 20:] = 0.0
    targets = []
    y, sizes = x, size
    for merged in (8, 6, 4):
        outputs = merge_step(run, "float32", y, y.astype(np.float64), sizes, *alternating_lists(2, y.shape[1]), merged)
        y, sizes = outputs["y"], outputs["size_out"]
        targets.append(outputs["target"])
    assert y.shape == (2, 14, 16)
    assert sizes.sum(axis=1).tolist() == [32.0, 20.0]
    total = (y.astype(np.float64) * sizes[..., None]).sum(axis=1)
    assert np.abs(total - (x * size[..., None]).sum(axis=1)).max() < 1e-4
    slots = y
    for target in reversed(targets):
        slots = run("TokenUnmerge", "float32", {}, {"y": slots, "target": target})["x"]
    assert slots.shape == x.shape
    composed = targets[0]
    for target in targets[1:]:
        composed = np.take_along_axis(target, composed, axis=1)
    assert slots.tobytes() == np.take_along_axis(y, composed[..., None], axis=1).tobytes()


def pitome_graph(merged: int, depth: int) -> onnx.ModelProto:
    """Return a PiToMe step as one float16 graph, with dynamic numbers of sequences and tokens."""
    from onnx import TensorProto, helper

    def node(name: str, inputs: list[str], outputs: list[str], **attributes: float) -> onnx.NodeProto:
        if name.startswith("Token"):
            return helper.make_node(name, inputs, outputs, domain="ryzen", **find_op(name).node_attributes(attributes))
        return helper.make_node(name, inputs, outputs, **attributes)

    nodes = [
        node("TokenEnergy", ["metric", "size"], ["energy"], margin=0.45, alpha=1.0),
        node("TopK", ["energy", "twice"], ["highest", "top"], axis=1, largest=1, sorted=1),
        node("Cast", ["top"], ["order"], to=TensorProto.INT32),
        node("Slice", ["order", "zero", "twice", "one", "two"], ["a"]),
        node("Slice", ["order", "one", "twice", "one", "two"], ["b"]),
        node("TokenMatch", ["metric", "size", "a", "b"], ["partner", "similarity"]),
        node("Shape", ["size"], ["tokens"], start=1, end=2),
        node("Sub", ["tokens", "removed"], ["count"]),
        node("Expand", ["any", "count"], ["slots"]),
        node("TokenAssign", ["size", "a", "partner", "similarity", "slots"], ["target"]),
        node("TokenMerge", ["x", "size", "target", "slots"], ["y", "size_out"]),
        node("TokenUnmerge", ["y", "target"], ["again"]),
    ]
    numbers = {"zero": 0, "one": 1, "two": 2, "twice": 2 * merged, "removed": merged}
    float16, float32, int32 = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.INT32
    graph = helper.make_graph(
        nodes,
        "step",
        [
            helper.make_tensor_value_info("x", float16, ["B", "N", depth]),
            helper.make_tensor_value_info("metric", float16, ["B", "N", depth]),
            helper.make_tensor_value_info("size", float32, ["B", "N"]),
        ],
        [
            helper.make_tensor_value_info("y", float16, ["B", "M", depth]),
            helper.make_tensor_value_info("size_out", float32, ["B", "M"]),
            helper.make_tensor_value_info("target", int32, ["B", "N"]),
            helper.make_tensor_value_info("again", float16, ["B", "N", depth]),
        ],
        [
            *(helper.make_tensor(name, TensorProto.INT64, [1], [value]) for name, value in numbers.items()),
            helper.make_tensor("any", int32, [], [0]),
        ],
    )
    names = ("TokenEnergy", "TokenMatch", "TokenAssign", "TokenMerge", "TokenUnmerge")
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ryzen", 1)]
    functions = [find_op(name).function_proto() for name in names]
    return helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10)


def test_a_graph_of_a_merge_step_runs_and_builds_for_rtx(implementations: OpImplementations, run: Run, tmp_path: Path) -> None:
    """The graph matches the separate ops in both implementations, and builds with dynamic dims for sm86, sm89 and sm120."""
    random = np.random.default_rng(0)
    merged, depth = 4, 16
    model = pitome_graph(merged, depth)
    onnx.checker.check_model(model, full_check=True)
    path = tmp_path / "step.onnx"
    path.write_bytes(model.SerializeToString())
    metric = random.normal(size=(2, 24, depth)) + 2 * random.normal(size=(2, 1, depth))
    inputs = {"x": random.normal(size=(2, 24, depth)), "metric": metric, "size": np.ones((2, 24))}
    inputs["size"][1, 21:] = 0.0
    arrays = {name: cast_to(array, "float32" if name == "size" else "float16") for name, array in inputs.items()}
    with OnnxRuntime(device="cpu").open(str(path)) as session:
        outputs = session.run(arrays)

    energy = run("TokenEnergy", "float16", {"margin": 0.45, "alpha": 1.0}, {"metric": metric, "size": inputs["size"]})["energy"]
    top = np.argsort(-energy, axis=1, kind="stable")[:, : 2 * merged].astype(np.int32)
    assert {*top[1, :3].tolist()} == {21, 22, 23}
    expected = merge_step(run, "float16", **inputs, a=top[:, 0::2], b=top[:, 1::2], merged=merged)
    assert (outputs["target"] == expected["target"]).all()
    assert (outputs["size_out"] == expected["size_out"]).all()
    assert np.abs(outputs["y"].astype(np.float64) - expected["y"].astype(np.float64)).max() < 2e-3
    unmerged = np.take_along_axis(outputs["y"], outputs["target"][..., None].astype(np.int64), axis=1)
    assert outputs["again"].tobytes() == unmerged.tobytes()

    def shapes(sequences: int, tokens: int) -> dict[str, tuple[int, ...]]:
        row = (sequences, tokens, depth)
        return {"x": row, "metric": row, "size": row[:2]}

    profile = Profile(min=shapes(1, 16), opt=shapes(4, 256), max=shapes(8, 1024))
    request = BuildRequest(
        onnx_path=str(path), output=str(tmp_path / "step.plan"), targets=parse_targets("sm86,sm89,sm120"), profiles=(profile,)
    )
    assert BACKEND.build(request, SilentProgress()).size_bytes > 0
