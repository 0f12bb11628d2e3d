"""A small handwritten decoder with two layers and fixed-size caches, and its reference without a cache in NumPy in float64.

A token attends to the slots of its own and of earlier positions. Padding is written to the slots after the tokens of a step,
and the next step overwrites it. The caches have `slack` extra slots for it: by default as many as a step has tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from ryzen_compile.ir.interface_metadata import write_interface
from ryzen_compile.spec.interface import InputSpec, Interface, StateSpec, TensorSpec

VOCABULARY, HIDDEN_SIZE, HEADS, HEAD_SIZE, LAYERS = 61, 32, 2, 16, 2
CAPACITY, MAX_STEP_TOKENS, MAX_BATCH = 40, 12, 4
"""The maximum numbers of tokens per sequence, tokens per step and sequences per session."""

Array = np.ndarray[Any, Any]


def weights() -> dict[str, Array]:
    """Return seeded random weights by name."""
    rng = np.random.default_rng(7)
    shapes = {
        "table": (VOCABULARY, HIDDEN_SIZE),
        "positions": (CAPACITY + MAX_STEP_TOKENS, HIDDEN_SIZE),
        "head": (HIDDEN_SIZE, VOCABULARY),
    }
    for layer in range(LAYERS):
        shapes |= {f"{projection}{layer}": (HIDDEN_SIZE, HIDDEN_SIZE) for projection in ("query", "key", "value", "out")}
        shapes |= {f"up{layer}": (HIDDEN_SIZE, 2 * HIDDEN_SIZE), f"down{layer}": (2 * HIDDEN_SIZE, HIDDEN_SIZE)}
    scales = {"table": 1.0, "positions": 0.5, "head": 0.25}
    return {
        name: (rng.standard_normal(shape) * scales.get(name, shape[0] ** -0.5)).astype(np.float32)
        for name, shape in shapes.items()
    }


def reference_logits(ids: list[int]) -> Array:
    """Return the logits of every token of a sequence, (tokens, VOCABULARY), computed in one pass without a cache."""
    w = {name: array.astype(np.float64) for name, array in weights().items()}
    count = len(ids)
    x = w["table"][ids] + w["positions"][:count]
    future = np.triu(np.ones((count, count), bool), 1)
    for layer in range(LAYERS):
        query, key, value = (
            (x @ w[f"{projection}{layer}"]).reshape(count, HEADS, HEAD_SIZE).transpose(1, 0, 2)
            for projection in ("query", "key", "value")
        )
        scores = np.where(future, -np.inf, query @ key.transpose(0, 2, 1) * HEAD_SIZE**-0.5)
        exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
        attended = (exponentials / exponentials.sum(axis=-1, keepdims=True)) @ value
        x = x + attended.transpose(1, 0, 2).reshape(count, HIDDEN_SIZE) @ w[f"out{layer}"]
        x = x + np.maximum(x @ w[f"up{layer}"], 0) @ w[f"down{layer}"]
    return np.asarray(x @ w["head"])


class _GraphBuilder:
    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights = [numpy_helper.from_array(array, name) for name, array in weights().items()]

    def op(self, op_type: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        name = output or f"{op_type.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], name=f"n{len(self.nodes)}", **attributes))
        return name

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        name = f"constant_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def heads(self, x: str) -> str:
        return self.op("Transpose", self.op("Reshape", x, self.constant([0, 0, HEADS, HEAD_SIZE])), perm=[0, 2, 1, 3])


def interface(
    *,
    in_place: bool = True,
    mask: bool = True,
    cache: str = "float32",
    slack: int = MAX_STEP_TOKENS,
    capacity: int | None = CAPACITY,
) -> Interface:
    """Return the interface of a decoder whose caches have `CAPACITY + slack` slots of element type `cache`."""
    token_dims = ("batch", "seq")
    cache_dims = ("batch", HEADS, CAPACITY + slack, HEAD_SIZE)
    names = [f"{kind}.{layer}" for layer in range(LAYERS) for kind in ("key", "value")]
    masks = (InputSpec(name="mask", dtype="int64", dims=token_dims, role="mask", padding_value=0),)
    return Interface(
        inputs=(
            InputSpec(name="ids", dtype="int64", dims=token_dims, role="ids", high=VOCABULARY - 1),
            *(masks if mask else ()),
            InputSpec(name="seen", dtype="int64", dims=("batch",), role="state"),
            *(InputSpec(name=f"past.{name}", dtype=cache, dims=cache_dims, role="state") for name in names),
        ),
        outputs=(
            TensorSpec(name="logits", dtype="float32", dims=(*token_dims, VOCABULARY)),
            TensorSpec(name="seen_next", dtype="int64", dims=("batch",)),
            *(TensorSpec(name=f"present.{name}", dtype=cache, dims=cache_dims) for name in names),
        ),
        states=(
            StateSpec(name="seen", input="seen", output="seen_next"),
            *(StateSpec(name=name, input=f"past.{name}", output=f"present.{name}", in_place=in_place) for name in names),
        ),
        batch="batch",
        task="language-model",
        typical_sizes={"batch": 1, "seq": 1},
        max_sizes={"batch": MAX_BATCH, "seq": MAX_STEP_TOKENS},
        capacity=capacity,
    )


def write(path: Path, **options: Any) -> Path:
    """Write the decoder with the interface of `options` to `path` and return the path."""
    spec = interface(**options)
    slots, cache = spec.inputs[-1].dims[2], spec.inputs[-1].dtype  # type: ignore[index]
    graph = _GraphBuilder()
    size = graph.op("Shape", "ids", start=1, end=2)
    masked = any(item.name == "mask" for item in spec.inputs)
    count = graph.op("ReduceSum", "mask", graph.constant([1]), keepdims=0) if masked else size
    graph.op("Add", "seen", count, output="seen_next")
    offsets = graph.op("Range", graph.constant(0), graph.op("Squeeze", size, graph.constant([0])), graph.constant(1))
    positions = graph.op("Add", graph.op("Unsqueeze", "seen", graph.constant([1])), offsets)
    x = graph.op("Add", graph.op("Gather", "table", "ids"), graph.op("Gather", "positions", positions))
    visible = graph.op("LessOrEqual", graph.constant(range(slots)), graph.op("Unsqueeze", positions, graph.constant([1, 3])))
    bias = graph.op("Where", visible, graph.constant(0, np.float32), graph.constant(-1e30, np.float32))
    element = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}[cache]
    for layer in range(LAYERS):
        query = graph.heads(graph.op("MatMul", x, f"query{layer}"))
        caches = {}
        for kind in ("key", "value"):
            new = graph.op("Cast", graph.heads(graph.op("MatMul", x, f"{kind}{layer}")), to=element)
            past, present = f"past.{kind}.{layer}", f"present.{kind}.{layer}"
            graph.op("TensorScatter", past, new, "seen", output=present, axis=2, mode="linear")
            caches[kind] = graph.op("Cast", present, to=TensorProto.FLOAT)
        scores = graph.op("MatMul", query, graph.op("Transpose", caches["key"], perm=[0, 1, 3, 2]))
        scaled = graph.op("Mul", scores, graph.constant(HEAD_SIZE**-0.5, np.float32))
        attended = graph.op("MatMul", graph.op("Softmax", graph.op("Add", scaled, bias), axis=-1), caches["value"])
        joined = graph.op("Reshape", graph.op("Transpose", attended, perm=[0, 2, 1, 3]), graph.constant([0, 0, HIDDEN_SIZE]))
        x = graph.op("Add", x, graph.op("MatMul", joined, f"out{layer}"))
        hidden = graph.op("Relu", graph.op("MatMul", x, f"up{layer}"))
        x = graph.op("Add", x, graph.op("MatMul", hidden, f"down{layer}"))
    graph.op("MatMul", x, "head", output="logits")
    elements = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, cache: element}
    inputs, outputs = (
        [helper.make_tensor_value_info(tensor.name, elements[tensor.dtype], tensor.dims) for tensor in tensors]
        for tensors in (spec.inputs, spec.outputs)
    )
    proto = helper.make_model(
        helper.make_graph(graph.nodes, "tiny", inputs, outputs, graph.weights),
        opset_imports=[helper.make_opsetid("", 24)],
        ir_version=11,
    )
    model = ir.from_proto(proto)
    write_interface(model, spec)
    ir.save(model, path)
    return path
