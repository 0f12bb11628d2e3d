"""The ops of token merging together: a step of ToMe, a step of PiToMe, and what holds of any step."""

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
ELEMENTS = ("float32", "float16", "bfloat16")
SLACK = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}


@pytest.fixture(params=["reference", "kernel"])
def run(request: pytest.FixtureRequest, lives: OpImplementations) -> Run:
    """Return a function that runs an op in one of its lives: run(name, element, attributes, inputs)."""

    def life(name: str, element: str, attributes: Mapping[str, float], inputs: Arrays) -> Arrays:
        op = find_op(name)
        elements = dict.fromkeys(op.type_variables, element)
        given = cast_inputs(op, elements, inputs)
        if request.param == "reference":
            return lives.references.run(op, elements, attributes, given)
        known = op.bind_dims({name: array.shape for name, array in given.items()}, attributes)
        sizes = {name: size for name, size in known.items() if name not in attributes}
        return lives.interpreter.run(Specialization(op, elements, attributes, sizes), given)

    return life


def held(array: Array, element: str) -> Array:
    """Return `array` as an op holds it."""
    return array.astype(numpy_dtype(element))


def step(run: Run, element: str, x: Array, metric: Array, size: Array, a: Array, b: Array, merged: int) -> dict[str, Array]:
    """Return y, size_out and target of a merge step with the lists a and b."""
    matched = run("TokenMatch", element, {}, {"metric": metric, "size": size, "a": a, "b": b})
    assigned = run("TokenAssign", element, {"merged": merged}, {"size": size, "a": a, **matched})
    inputs = {"x": x, "size": size, "target": assigned["target"]}
    return {**run("TokenMerge", element, {"merged": merged}, inputs), **assigned}


def alternating(sequences: int, tokens: int, first: int = 0) -> tuple[Array, Array]:
    """Return ToMe's lists: every other token from `first` on, and those between."""
    both = np.tile(np.arange(first, tokens, dtype=np.int32), (sequences, 1))
    return both[:, 0::2], both[:, 1::2]


def tome(x: Array, metric: Array, size: Array, merged: int) -> tuple[list[Array], list[float]]:
    """Return what is left of one sequence, as the paper has it: in the order of the tokens that are left, and their sizes.

    Tokens are parted into A and B by turns; each of A draws an edge to the most similar of B; the `merged` most similar edges
    stay; what they connect is averaged by size.
    """
    unit = metric / np.linalg.norm(metric, axis=1, keepdims=True)
    side_a, side_b = [*range(0, len(x), 2)], [*range(1, len(x), 2)]
    edges = []
    for s in side_a:
        likeness = [float(unit[s] @ unit[t]) for t in side_b]
        edges.append((max(likeness), s, side_b[int(np.argmax(likeness))]))
    edges.sort(reverse=True)
    crowd = {t: [t] for t in range(len(x))}
    for _, s, t in edges[:merged]:
        crowd[t] += crowd.pop(s)
    means = [np.average(x[tokens], axis=0, weights=size[tokens]) for _, tokens in sorted(crowd.items())]
    return means, [float(size[tokens].sum()) for _, tokens in sorted(crowd.items())]


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("merged", [0, 1, 6, 11])
def test_with_alternating_lists_it_is_tome(run: Run, element: str, merged: int) -> None:
    random = np.random.default_rng(merged)
    x, metric = random.normal(size=(2, 23, 12)), random.normal(size=(2, 23, 16))
    size = random.integers(1, 6, size=(2, 23)).astype(np.float64)
    x, metric = held(x, element), held(metric, element)
    found = step(run, element, x, metric, size, *alternating(2, 23), merged)
    for sequence in range(2):
        wide = x[sequence].astype(np.float64), metric[sequence].astype(np.float64)
        means, sizes = tome(*wide, size[sequence], merged)
        assert np.abs(found["y"][sequence].astype(np.float64) - np.stack(means)).max() < SLACK[element]
        assert found["size_out"][sequence].tolist() == sizes


@pytest.mark.parametrize("element", ELEMENTS)
def test_with_lists_by_energy_it_is_pitome(run: Run, element: str) -> None:
    """A crowd of near equals among loners: it is the crowd that is merged, all of one half of it, and no loner is touched."""
    random = np.random.default_rng(0)
    merged, crowd, tokens = 5, 12, 30
    where = np.sort(random.permutation(tokens)[:crowd])
    metric = random.normal(size=(1, tokens, 64))
    metric[0, where] = random.normal(size=64) + 0.2 * random.normal(size=(crowd, 64))
    x, size = random.normal(size=(1, tokens, 8)), np.ones((1, tokens))
    energy = run("TokenEnergy", element, {"margin": 0.45, "alpha": 1.0}, {"metric": metric, "size": size})["energy"]
    # TopK of twice what is merged, the highest first, and its even and odd places.
    top = np.argsort(-energy[0], kind="stable")[: 2 * merged].astype(np.int32)
    assert {*top.tolist()} <= {*where.tolist()}
    a, b = top[None, 0::2], top[None, 1::2]
    found = step(run, element, x, metric, size, a, b, merged)

    unit = metric[0] / np.linalg.norm(metric[0], axis=1, keepdims=True)
    row = held(x[0], element)
    kept = [t for t in range(tokens) if t not in a[0]]
    into = {t: [t] for t in kept}
    for s in a[0]:
        into[int(b[0][int(np.argmax([unit[s] @ unit[t] for t in b[0]]))])].append(int(s))
    for slot, t in enumerate(kept):
        if t not in b[0]:
            assert found["y"][0, slot].tobytes() == row[t].tobytes()
        mean = row[into[t]].astype(np.float64).mean(axis=0)
        assert np.abs(found["y"][0, slot].astype(np.float64) - mean).max() < SLACK[element]
        assert found["size_out"][0, slot] == len(into[t])


def test_what_is_planted_twice_is_merged_first(run: Run) -> None:
    """And its mean is itself."""
    for even, odd in ((4, 9), (18, 1)):
        random = np.random.default_rng(even)
        metric = random.normal(size=(1, 20, 32))
        metric[0, even] = 3 * metric[0, odd]
        x, size = random.normal(size=(1, 20, 8)), np.ones((1, 20))
        x[0, even] = x[0, odd]
        found = step(run, "float16", x, metric, size, *alternating(1, 20), 1)
        assert found["target"][0, even] == found["target"][0, odd]
        slot = found["target"][0, odd]
        assert found["size_out"][0].tolist() == [2.0 if m == slot else 1.0 for m in range(19)]
        assert found["y"][0, slot].tobytes() == x[0, odd].astype(np.float16).tobytes()


@pytest.mark.parametrize("element", ELEMENTS)
def test_padding_goes_first_and_changes_no_token(run: Run, element: str) -> None:
    """With as many merges as there is padding in `a`, the real tokens come out to the bit, whatever padding holds."""
    random = np.random.default_rng(0)
    x, metric, size = random.normal(size=(2, 24, 5)), random.normal(size=(2, 24, 16)), np.full((2, 24), 3.0)
    size[0, 12:], size[1, 10:] = 0.0, 0.0
    x[size == 0], metric[size == 0] = np.nan, np.inf
    found = step(run, element, x, metric, size, *alternating(2, 24), 6)
    real = held(x, element)
    for sequence, count in enumerate((12, 10)):
        assert found["target"][sequence, :count].tolist() == [*range(count)]
        assert found["y"][sequence, :count].tobytes() == real[sequence, :count].tobytes()
        assert not found["y"][sequence, count:].any()
        assert found["size_out"][sequence].tolist() == [3.0] * count + [0.0] * (18 - count)


def test_who_is_in_no_list_keeps_its_value(run: Run) -> None:
    """A class token in front, and one in the middle that resembles another one entirely."""
    random = np.random.default_rng(0)
    x, metric, size = random.normal(size=(1, 21, 5)), random.normal(size=(1, 21, 16)), np.full((1, 21), 49.0)
    metric[0, 0] = metric[0, 1]
    metric[0, 10] = metric[0, 11]
    a, b = alternating(1, 21, first=1)
    a, b = np.where(a == 10, a[:, :1], a)[:, 1:], np.where(b == 10, b[:, :1], b)[:, 1:]
    assert 0 not in a
    assert 10 not in (*a[0], *b[0])
    found = step(run, "float32", x, metric, size, a, b, a.shape[1])
    for token in (0, 10):
        slot = found["target"][0, token]
        assert found["y"][0, slot].tobytes() == x[0, token].astype(np.float32).tobytes()
        assert found["size_out"][0, slot] == 49.0
        assert (found["target"][0] == slot).sum() == 1
    assert found["target"][0, 0] == 0


def test_sequences_in_another_order_come_out_in_that_order(run: Run) -> None:
    random = np.random.default_rng(0)
    x, metric = random.normal(size=(4, 18, 5)), random.normal(size=(4, 18, 16))
    size = random.integers(0, 4, size=(4, 18)).astype(np.float64)
    order = [2, 0, 3, 1]
    lists = alternating(4, 18)
    straight = step(run, "float16", x, metric, size, *lists, 5)
    turned = step(run, "float16", x[order], metric[order], size[order], *lists, 5)
    for name, array in straight.items():
        assert array[order].tobytes() == turned[name].tobytes()


def test_steps_one_after_the_other_lose_no_token_and_are_undone_from_the_last_to_the_first(run: Run) -> None:
    random = np.random.default_rng(0)
    x, size = random.normal(size=(2, 32, 16)), np.ones((2, 32))
    size[1, 20:] = 0.0
    targets = []
    y, sizes = x, size
    for merged in (8, 6, 4):
        found = step(run, "float32", y, y.astype(np.float64), sizes, *alternating(2, y.shape[1]), merged)
        y, sizes = found["y"], found["size_out"]
        targets.append(found["target"])
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
    """Return a step of PiToMe as one graph in half precision, with symbols for how many sequences and tokens there are."""
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
        node("TokenAssign", ["size", "a", "partner", "similarity"], ["target"], merged=merged),
        node("TokenMerge", ["x", "size", "target"], ["y", "size_out"], merged=merged),
        node("TokenUnmerge", ["y", "target"], ["again"]),
    ]
    numbers = {"zero": 0, "one": 1, "two": 2, "twice": 2 * merged}
    half, full, whole = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.INT32
    graph = helper.make_graph(
        nodes,
        "step",
        [
            helper.make_tensor_value_info("x", half, ["B", "N", depth]),
            helper.make_tensor_value_info("metric", half, ["B", "N", depth]),
            helper.make_tensor_value_info("size", full, ["B", "N"]),
        ],
        [
            helper.make_tensor_value_info("y", half, ["B", "M", depth]),
            helper.make_tensor_value_info("size_out", full, ["B", "M"]),
            helper.make_tensor_value_info("target", whole, ["B", "N"]),
            helper.make_tensor_value_info("again", half, ["B", "N", depth]),
        ],
        [helper.make_tensor(name, TensorProto.INT64, [1], [value]) for name, value in numbers.items()],
    )
    names = ("TokenEnergy", "TokenMatch", "TokenAssign", "TokenMerge", "TokenUnmerge")
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ryzen", 1)]
    functions = [find_op(name).function_proto() for name in names]
    return helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10)


def test_a_graph_of_a_whole_step_runs_and_builds_for_rtx(lives: OpImplementations, run: Run, tmp_path: Path) -> None:
    """The same as the ops one by one, in both of their lives, and an engine of symbolic dims for sm86, sm89 and sm120."""
    random = np.random.default_rng(0)
    merged, depth = 4, 16
    model = pitome_graph(merged, depth)
    onnx.checker.check_model(model, full_check=True)
    path = tmp_path / "step.onnx"
    path.write_bytes(model.SerializeToString())
    metric = random.normal(size=(2, 24, depth)) + 2 * random.normal(size=(2, 1, depth))
    inputs = {"x": random.normal(size=(2, 24, depth)), "metric": metric, "size": np.ones((2, 24))}
    inputs["size"][1, 21:] = 0.0
    feed = {name: held(array, "float32" if name == "size" else "float16") for name, array in inputs.items()}
    with OnnxRuntime(device="cpu").open(str(path)) as session:
        found = session.run(feed)

    energy = run("TokenEnergy", "float16", {"margin": 0.45, "alpha": 1.0}, {"metric": metric, "size": inputs["size"]})["energy"]
    top = np.argsort(-energy, axis=1, kind="stable")[:, : 2 * merged].astype(np.int32)
    assert {*top[1, :3].tolist()} == {21, 22, 23}
    alone = step(run, "float16", **inputs, a=top[:, 0::2], b=top[:, 1::2], merged=merged)
    assert (found["target"] == alone["target"]).all()
    assert (found["size_out"] == alone["size_out"]).all()
    assert np.abs(found["y"].astype(np.float64) - alone["y"].astype(np.float64)).max() < 2e-3
    again = np.take_along_axis(found["y"], found["target"][..., None].astype(np.int64), axis=1)
    assert found["again"].tobytes() == again.tobytes()

    def shapes(sequences: int, tokens: int) -> dict[str, tuple[int, ...]]:
        row = (sequences, tokens, depth)
        return {"x": row, "metric": row, "size": row[:2]}

    profile = Profile(min=shapes(1, 16), opt=shapes(4, 256), max=shapes(8, 1024))
    request = BuildRequest(
        onnx_path=str(path), output=str(tmp_path / "step.plan"), targets=parse_targets("sm86,sm89,sm120"), profiles=(profile,)
    )
    assert BACKEND.build(request, SilentProgress()).size_bytes > 0
