"""Synthetic Llama-style decoder graph as the TorchScript exporter writes it: decomposed, with explicit shape arithmetic.

The node sequences are those that `torch.onnx.export(dynamo=False)` writes for `LlamaForCausalLM` of Transformers with the cache
as inputs and outputs, in the versions in which each layer slices its own cosine and sine tables: every `tensor.size(i)` becomes
Shape, Constant, Gather; every `view` becomes Unsqueeze, Constant, Concat, Reshape; every `expand` resolves its -1s at run time;
every constant is a separate node. Weights are random with a fixed seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

INT64_MAX = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class SyntheticLlamaConfig:
    """The dimensions of a decoder; with the defaults a layer has 2.2 MB of weights."""

    layers: int
    hidden: int = 192
    heads: int = 6
    kv_heads: int = 2
    intermediate: int = 768
    vocabulary: int = 1000
    positions: int = 2048
    half: bool = False
    """Whether weights and activations are float16; norms and softmax remain float32."""

    @property
    def head_size(self) -> int:
        """The size of one head."""
        return self.hidden // self.heads

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of weights and activations."""
        return np.dtype(np.float16 if self.half else np.float32)


LLAMA_1B = SyntheticLlamaConfig(
    layers=16, hidden=2048, heads=32, kv_heads=8, intermediate=8192, vocabulary=128256, positions=8192, half=True
)
"""Llama 3.2 1B in half precision with separate embedding and LM head: 3.0 GB of weights."""


@dataclass
class _GraphTrace:
    """The graph under construction; each method adds the nodes that the exporter emits for one PyTorch call."""

    config: SyntheticLlamaConfig
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, tuple[int, ...]] = field(default_factory=dict)
    scope: str = "/model"

    def op(self, op_type: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        name = f"{self.scope}/{op_type}_{len(self.nodes)}"
        output = output or f"{name}_output_0"
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=name, **attributes))
        return output

    def constant(self, value: object, dtype: Any = np.int64) -> str:
        return self.op("Constant", value=numpy_helper.from_array(np.asarray(value, dtype)))

    def scalar(self, value: float) -> str:
        return self.constant(value, self.config.dtype)

    def weight(self, name: str, *shape: int) -> str:
        self.weights[name] = shape
        return name

    def size(self, tensor: str, axis: int) -> str:
        return self.op("Gather", self.op("Shape", tensor), self.constant(axis), axis=0)

    def unsqueeze(self, tensor: str, axis: int) -> str:
        return self.op("Unsqueeze", tensor, self.constant([axis]))

    def shape(self, dims: Sequence[int | str]) -> str:
        parts = [self.constant([dim]) if isinstance(dim, int) else self.unsqueeze(dim, 0) for dim in dims]
        return self.op("Concat", *parts, axis=0)

    def view(self, tensor: str, *dims: int | str) -> str:
        return self.op("Reshape", tensor, self.shape(dims), allowzero=0)

    def expand(self, tensor: str, *dims: int | str) -> str:
        shape = self.op("Reshape", self.shape(dims), self.constant([-1]), allowzero=0)
        ones = self.op("ConstantOfShape", self.op("Shape", shape), value=numpy_helper.from_array(np.array([1], np.int64)))
        minus_ones = self.op("Mul", ones, self.constant(-1))
        return self.op("Expand", tensor, self.op("Where", self.op("Equal", shape, minus_ones), ones, shape))

    def slice(self, tensor: str, start: int | str, end: int | str, axis: int) -> str:
        axes = self.constant([axis])
        bounds = [self.constant([bound]) if isinstance(bound, int) else self.unsqueeze(bound, 0) for bound in (start, end)]
        return self.op("Slice", tensor, *bounds, axes, self.constant([1]))

    def cast(self, tensor: str, dtype: int) -> str:
        """Add a Cast in half precision; in single precision the type is already the same."""
        return self.op("Cast", tensor, to=dtype) if self.config.half else tensor

    def linear(self, tensor: str, name: str, *shape: int) -> str:
        return self.op("MatMul", tensor, self.weight(f"{self.scope}/{name}", *shape))


def _norm(trace: _GraphTrace, tensor: str, name: str) -> str:
    wide = trace.cast(tensor, TensorProto.FLOAT)
    mean = trace.op("ReduceMean", trace.op("Pow", wide, trace.constant(2.0, np.float32)), trace.constant([-1]), keepdims=1)
    root = trace.op("Sqrt", trace.op("Add", mean, trace.constant(1e-5, np.float32)))
    scaled = trace.op("Mul", wide, trace.op("Div", trace.constant(1.0, np.float32), root))
    back = trace.cast(scaled, TensorProto.FLOAT16)
    return trace.op("Mul", trace.weight(f"{trace.scope}/{name}.weight", trace.config.hidden), back)


def _rotate_half(trace: _GraphTrace, tensor: str) -> str:
    half = trace.op("Div", trace.size(tensor, 3), trace.constant(2))
    first = trace.slice(tensor, 0, half, 3)
    second = trace.slice(tensor, half, INT64_MAX, 3)
    return trace.op("Concat", trace.op("Neg", second), first, axis=-1)


def _apply_rotary(trace: _GraphTrace, tensor: str, cos: str, sin: str) -> str:
    scaled = trace.op("Mul", tensor, cos)
    return trace.op("Add", scaled, trace.op("Mul", _rotate_half(trace, tensor), sin))


def _repeat_kv(trace: _GraphTrace, tensor: str) -> str:
    repeats = trace.config.heads // trace.config.kv_heads
    batch, heads, rows, width = (trace.size(tensor, axis) for axis in range(4))
    wide = trace.expand(trace.unsqueeze(tensor, 2), batch, heads, repeats, rows, width)
    return trace.view(wide, batch, trace.op("Mul", heads, trace.constant(repeats)), rows, width)


def _attention(trace: _GraphTrace, tensor: str, mask: str, layer: int) -> str:
    config = trace.config
    batch, rows = trace.size(tensor, 0), trace.size(tensor, 1)

    def heads(name: str, count: int) -> str:
        states = trace.view(
            trace.linear(tensor, name, config.hidden, count * config.head_size), batch, rows, count, config.head_size
        )
        return trace.op("Transpose", states, perm=[0, 2, 1, 3])

    query, key, value = heads("q_proj", config.heads), heads("k_proj", config.kv_heads), heads("v_proj", config.kv_heads)
    total = trace.op("Add", trace.size(key, 2), trace.size(f"past_key_values.{layer}.key", 2))
    tables = (
        trace.slice(trace.weight(f"rotary.{name}", config.positions, config.head_size), 0, total, 0) for name in ("cos", "sin")
    )
    cos, sin = (trace.unsqueeze(trace.op("Gather", table, "position_ids"), 1) for table in tables)
    query, key = _apply_rotary(trace, query, cos, sin), _apply_rotary(trace, key, cos, sin)
    key = trace.op("Concat", f"past_key_values.{layer}.key", key, axis=2, output=f"present.{layer}.key")
    value = trace.op("Concat", f"past_key_values.{layer}.value", value, axis=2, output=f"present.{layer}.value")
    key, value = _repeat_kv(trace, key), _repeat_kv(trace, value)
    scores = trace.op("MatMul", query, trace.op("Transpose", key, perm=[0, 1, 3, 2]))
    scores = trace.op("Add", trace.op("Div", scores, trace.scalar(config.head_size**0.5)), mask)
    weights = trace.cast(trace.op("Softmax", trace.cast(scores, TensorProto.FLOAT), axis=-1), TensorProto.FLOAT16)
    mixed = trace.op("Transpose", trace.op("MatMul", weights, value), perm=[0, 2, 1, 3])
    return trace.linear(trace.view(mixed, batch, rows, config.hidden), "o_proj", config.hidden, config.hidden)


def _mlp(trace: _GraphTrace, tensor: str) -> str:
    config = trace.config
    gate = trace.linear(tensor, "gate_proj", config.hidden, config.intermediate)
    gate = trace.op("Mul", gate, trace.op("Sigmoid", gate))
    return trace.linear(
        trace.op("Mul", gate, trace.linear(tensor, "up_proj", config.hidden, config.intermediate)),
        "down_proj",
        config.intermediate,
        config.hidden,
    )


def _mask(trace: _GraphTrace, embedded: str) -> str:
    """Add the attention mask, (batch, 1, seq, past + seq): causal over the new rows, zero over the past, plus padding."""
    lowest = float(np.finfo(trace.config.dtype).min)
    batch, rows, past = trace.size(embedded, 0), trace.size(embedded, 1), trace.size("past_key_values.0.key", 2)
    full = trace.expand(trace.scalar(lowest), rows, rows)
    steps = trace.op("Range", trace.constant(0), rows, trace.constant(1))
    is_causal = trace.op("Less", steps, trace.view(trace.op("Add", steps, trace.constant(1)), rows, 1))
    causal = trace.op("Where", is_causal, trace.scalar(0.0), full)
    zeros = trace.op(
        "ConstantOfShape", trace.shape([rows, past]), value=numpy_helper.from_array(np.zeros(1, trace.config.dtype))
    )
    causal = trace.unsqueeze(trace.unsqueeze(trace.op("Concat", zeros, causal, axis=-1), 0), 1)
    total = trace.op("Add", rows, past)
    causal = trace.expand(causal, batch, 1, rows, total)
    padding = trace.unsqueeze(trace.unsqueeze("attention_mask", 1), 2)
    padding = trace.expand(padding, batch, 1, rows, trace.size("attention_mask", 1))
    dtype = TensorProto.FLOAT16 if trace.config.half else TensorProto.FLOAT
    inverted = trace.op("Sub", trace.scalar(1.0), trace.op("Cast", padding, to=dtype))
    inverted = trace.op("Where", trace.op("Cast", inverted, to=TensorProto.BOOL), trace.scalar(lowest), inverted)
    # In half precision the sum of two lowest values overflows; the original model clamps it to the lowest value.
    return trace.op("Max", trace.op("Add", inverted, causal), trace.scalar(lowest))


def build(config: SyntheticLlamaConfig) -> tuple[onnx.ModelProto, dict[str, tuple[int, ...]]]:
    """Return the graph without weights, and the shapes of the weights by name."""
    trace = _GraphTrace(config)
    embedded = trace.op("Gather", trace.weight("embed_tokens.weight", config.vocabulary, config.hidden), "input_ids")
    mask = _mask(trace, embedded)
    for layer in range(config.layers):
        trace.scope = f"/model/layers.{layer}"
        embedded = trace.op("Add", embedded, _attention(trace, _norm(trace, embedded, "input_layernorm"), mask, layer))
        embedded = trace.op("Add", embedded, _mlp(trace, _norm(trace, embedded, "post_attention_layernorm")))
    trace.scope = "/model"
    logits = trace.weight("lm_head.weight", config.hidden, config.vocabulary)
    trace.op("MatMul", _norm(trace, embedded, "norm"), logits, output="logits")
    dtype = helper.np_dtype_to_tensor_dtype(config.dtype)
    caches = [(layer, kind) for layer in range(config.layers) for kind in ("key", "value")]

    def cache(name: str, rows: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, dtype, ["batch", config.kv_heads, rows, config.head_size])

    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "seq"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]),
        helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["batch", "seq"]),
        *(cache(f"past_key_values.{layer}.{kind}", "past") for layer, kind in caches),
    ]
    outputs = [
        helper.make_tensor_value_info("logits", dtype, ["batch", "seq", config.vocabulary]),
        *(cache(f"present.{layer}.{kind}", "total") for layer, kind in caches),
    ]
    graph = helper.make_graph(trace.nodes, "decoder", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), trace.weights


def _weight_values(
    config: SyntheticLlamaConfig, weights: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    angles = np.arange(config.positions)[:, None] / 10000 ** (np.arange(0, config.head_size, 2) / config.head_size)[None]
    angles = np.concatenate([angles, angles], axis=-1)
    tables = {"rotary.cos": np.cos(angles), "rotary.sin": np.sin(angles)}
    for seed, (name, shape) in enumerate(weights.items()):
        if name in tables:
            value = tables[name]
        elif len(shape) == 1:
            value = np.ones(shape) + 0.1 * np.random.default_rng(seed).random(shape)
        else:
            # In place; uniform with the standard deviation of the usual initialization.
            value = np.random.default_rng(seed).random(shape, np.float32)
            value -= np.float32(0.5)
            value *= np.float32((12 / shape[0]) ** 0.5) if name != "embed_tokens.weight" else np.float32(2)
        yield name, value.astype(config.dtype)


def write(config: SyntheticLlamaConfig, path: Path, *, external: bool = False) -> None:
    """Write the decoder to `path`; external weights are written one at a time to `<path>.data`."""
    model, weights = build(config)
    if not external:
        model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in _weight_values(config, weights))
        onnx.save(model, path)
        return
    data = path.with_name(path.name + ".data")
    with data.open("wb") as file:
        for name, value in _weight_values(config, weights):
            file.write(b"\0" * (-file.tell() % 4096))
            dtype = helper.np_dtype_to_tensor_dtype(value.dtype)
            tensor = TensorProto(name=name, dims=value.shape, data_type=dtype, data_location=TensorProto.EXTERNAL)
            for key, entry in (("location", data.name), ("offset", file.tell()), ("length", value.nbytes)):
                tensor.external_data.add(key=key, value=str(entry))
            model.graph.initializer.append(tensor)
            file.write(value.tobytes())
    path.write_bytes(model.SerializeToString())


def make_inputs(
    config: SyntheticLlamaConfig, *, batch: int, seq: int, past: int, seed: int = 0
) -> dict[str, np.ndarray[Any, Any]]:
    """Return random inputs of these sizes; with a past, the first row has one token of left padding."""
    random = np.random.default_rng(seed)
    mask = np.ones((batch, past + seq), np.int64)
    mask[:1, : min(past, 1)] = 0
    values = {
        "input_ids": random.integers(0, config.vocabulary, (batch, seq)),
        "attention_mask": mask,
        "position_ids": np.tile(np.arange(past, past + seq), (batch, 1)),
    }
    for layer in range(config.layers):
        for kind in ("key", "value"):
            shape = (batch, config.kv_heads, past, config.head_size)
            values[f"past_key_values.{layer}.{kind}"] = random.standard_normal(shape).astype(config.dtype)
    return values
